"""The budget: how many real images each hospital's discriminator sees in each round.

All numbers are whole batches, as a Trainer trains on no other, so that every arm of a comparison
(pooled, federated, or one hospital alone) sees exactly the same number of images.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fedgan.apportion import apportion, limit_shares
from fedgan.config import Settings
from fedgan.errors import ConfigError
from fedgan.privacy.step import noise_multiplier
from fedgan.runs.participants import Participant


@dataclass(frozen=True)
class Budget:
    """`images[r][h]`: real images of hospital h in round r. `batches[h]`: its images per step."""

    images: list[list[int]]
    batches: list[int]

    @property
    def totals(self) -> list[int]:
        """Images of each round over all hospitals."""
        return [sum(row) for row in self.images]


def make_budget(settings: Settings, sizes: Sequence[int]) -> Budget:
    """The budget of hospitals with these numbers of training images (`sizes`).

    `federation.max_share` limits the share of a hospital.
    """
    training, federation = settings.training, settings.federation
    sizes = limit_shares(sizes, federation.max_share)
    totals = images_per_round(training.kimg, federation.rounds, training.batch_size)
    if federation.batch == "each":
        equal = federation.local_images == "equal"
        images = apportion_images(sizes, totals, training.batch_size, equal)
        return Budget(images, [training.batch_size] * len(sizes))
    batches = apportion_batch(sizes, training.batch_size)
    steps = [total // training.batch_size for total in totals]
    return Budget([[count * batch for batch in batches] for count in steps], batches)


class Plan:
    """Images of each hospital in each round.

    A hospital's budget is computed from the participants at the time when it joined and never
    changes after that: its noise was calibrated to it.
    """

    def __init__(self, settings: Settings, participants: Sequence[Participant]) -> None:
        self.participants = sorted(participants, key=lambda participant: participant.number)
        self.batches: dict[int, int] = {}  # images per step, by hospital number
        self._images: dict[int, list[int]] = {}
        for joined in {participant.joined for participant in participants}:
            present = [row for row in self.participants if row.joined <= joined]
            budget = make_budget(settings, [row.images for row in present])
            for column, row in enumerate(present):
                if row.joined == joined:
                    images = [counts[column] for counts in budget.images[joined:]]
                    self._images[row.number] = [0] * joined + images
                    self.batches[row.number] = budget.batches[column]

    def images(self, done: int, number: int) -> int:
        """Images of hospital `number` in the round that follows `done` rounds."""
        return self._images[number][done]

    def fewest_training(self, done: int) -> tuple[int, int]:
        """(hospitals that train, round) of the round after `done` in which the fewest train."""
        rounds = range(done, max(len(images) for images in self._images.values()))
        return min(
            (
                (sum(images[index] > 0 for images in self._images.values()), index + 1)
                for index in rounds
            ),
            default=(0, 0),
        )

    def planned(self, number: int) -> int:
        """Images of hospital `number` over the whole run."""
        return sum(self._images[number])

    @property
    def total(self) -> int:
        """Images of all hospitals over the whole run."""
        return sum(map(sum, self._images.values()))

    def least_noise(self, settings: Settings, label_dim: int) -> float:
        """The lower bound of every hospital's noise multiplier.

        With `privacy.noise_split = "equal"` the largest that any hospital needs, else 0.
        """
        privacy = settings.privacy
        if not privacy.on or privacy.noise_split != "equal":
            return 0.0
        return max(
            noise_multiplier(
                settings,
                label_dim,
                row.images,
                row.units,
                self.batches[row.number],
                self.planned(row.number),
            )
            for row in self.participants
        )


def apportion_batch(sizes: Sequence[int], batch_size: int) -> list[int]:
    """Divide one step of the federation among hospitals by size, at least one image each.

    Every hospital then takes equally many steps and sees the same fraction of its images in each.
    Raises `ConfigError` when there are fewer images than hospitals.
    """
    if batch_size < len(sizes):
        raise ConfigError(
            f"training.batch_size = {batch_size} cannot be divided among {len(sizes)} hospitals: "
            "raise it, or set federation.batch = 'each'"
        )
    total = sum(sizes)
    return apportion([batch_size * size / total for size in sizes], batch_size, minimum=1)


def images_per_round(kimg: float, rounds: int, batch_size: int) -> list[int]:
    """Images of each round, summed over hospitals: `rounds` multiples of `batch_size`.

    They add up to 1000 * `kimg`, rounded up to a whole batch, and differ by at most one batch.
    """
    batches = -(-round(kimg * 1000) // batch_size)
    ends = [batches * number // rounds for number in range(rounds + 1)]
    return [(after - before) * batch_size for before, after in itertools.pairwise(ends)]


def apportion_images(
    sizes: Sequence[int], totals: Sequence[int], batch_size: int, equal: bool = False
) -> list[list[int]]:
    """Images of each round (row) for each hospital (column), multiples of `batch_size`.

    Row r sums to `totals[r]`. Shares follow `sizes` (training images per hospital) or are equal.
    Rounding errors carry over: after any round a hospital is less than two batches from its exact
    share, and no entry is negative.
    """
    weights = [1] * len(sizes) if equal else list(sizes)
    weight_sum = sum(weights)
    granted = [0] * len(sizes)  # batches until now
    rows = []
    batches_until_now = 0
    for total in totals:
        batches = total // batch_size
        batches_until_now += batches
        owed = [
            batches_until_now * weight / weight_sum - done
            for weight, done in zip(weights, granted, strict=True)
        ]
        row = apportion(owed, batches, reduce_largest=True)
        granted = [done + more for done, more in zip(granted, row, strict=True)]
        rows.append([share * batch_size for share in row])
    return rows
