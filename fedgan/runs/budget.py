"""The budget: how many real images each hospital's discriminator is shown in each round.

It is dealt in whole batches, because a Trainer shows no other: so each arm of a comparison (pooled, federated, or a
hospital alone) sees the very same number of images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedgan.config import Settings
from fedgan.errors import ConfigError
from fedgan.privacy.step import noise_multiplier
from fedgan.runs.participants import Participant


@dataclass(frozen=True)
class Deal:
    """`images[r][h]`: real images of hospital h in round r. `batches[h]`: its images a step."""

    images: list[list[int]]
    batches: list[int]

    @property
    def totals(self) -> list[int]:
        """Images of each round over all hospitals."""
        return [sum(row) for row in self.images]


def deal(settings: Settings, sizes: Sequence[int]) -> Deal:
    """What each hospital is asked for, by its number of training images (`sizes`)."""
    training, federation = settings.training, settings.federation
    totals = round_totals(training.kimg, federation.rounds, training.batch_size)
    if federation.batch == "each":
        equal = federation.local_images == "equal"
        return Deal(
            deal_images(sizes, totals, training.batch_size, equal),
            [training.batch_size] * len(sizes),
        )
    batches = share_batch(sizes, training.batch_size)
    return Deal(
        [[total // training.batch_size * batch for batch in batches] for total in totals], batches
    )


class Plan:
    """Images of each round for each hospital by its number, once and for all.

    A hospital's share is that of the federation as it was when it joined. It never changes after that, whoever comes or goes:
    what a hospital was told to plan for is what its noise was chosen for.
    """

    def __init__(self, settings: Settings, shares: Sequence[Participant]) -> None:
        self.shares = sorted(shares, key=lambda share: share.number)
        self._images: dict[int, list[int]] = {}
        self.batches: dict[int, int] = {}
        for joined in {share.joined for share in shares}:
            known = [share for share in self.shares if share.joined <= joined]
            dealt = deal(settings, [share.images for share in known])
            for place, share in enumerate(known):
                if share.joined == joined:
                    self._images[share.number] = [0] * joined + [
                        row[place] for row in dealt.images[joined:]
                    ]
                    self.batches[share.number] = dealt.batches[place]

    def images(self, done: int, number: int) -> int:
        """Images of hospital `number` in the round that follows `done` rounds."""
        return self._images[number][done]

    def fewest(self, done: int) -> tuple[int, int]:
        """(number of hospitals, round) of the round after `done` in which the fewest hospitals show images."""
        rounds = range(done, max(len(images) for images in self._images.values()))
        return min(
            (
                (sum(images[number] > 0 for images in self._images.values()), number + 1)
                for number in rounds
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
        """The noise multiplier that no hospital goes below: with `privacy.noise_split = "equal"` the largest one's, else 0.

        `label_dim`: the number of labels.
        """
        privacy = settings.privacy
        if not privacy.on or privacy.noise_split != "equal":
            return 0.0
        return max(
            noise_multiplier(
                settings,
                label_dim,
                share.images,
                share.units,
                self.batches[share.number],
                self.planned(share.number),
            )
            for share in self.shares
        )


def share_batch(sizes: Sequence[int], batch_size: int) -> list[int]:
    """One step of the whole federation dealt by size: largest remainders, at least one image each; sums to `batch_size`.

    Then every hospital looks at the same share of its images in a step, and takes as many steps. Raises `ConfigError` when
    there are fewer images than hospitals.
    """
    if batch_size < len(sizes):
        raise ConfigError(
            f"training.batch_size = {batch_size} cannot be shared by {len(sizes)} hospitals: raise it, or set "
            "federation.batch = 'each'"
        )
    exact = [batch_size * size / sum(sizes) for size in sizes]
    shares = [max(1, math.floor(share)) for share in exact]
    while sum(shares) < batch_size:
        shares[max(range(len(shares)), key=lambda index: exact[index] - shares[index])] += 1
    while sum(shares) > batch_size:
        shares[
            max(
                range(len(shares)),
                key=lambda index: shares[index] - exact[index] if shares[index] > 1 else -math.inf,
            )
        ] -= 1
    return shares


def round_totals(kimg: float, rounds: int, batch_size: int) -> list[int]:
    """Images of each round, summed over hospitals: `rounds` multiples of `batch_size`.

    They add up to 1000 * `kimg`, rounded up to a whole batch; two rounds differ by one batch at most.
    """
    batches = -(-round(kimg * 1000) // batch_size)
    ends = [batches * number // rounds for number in range(rounds + 1)]
    return [(after - before) * batch_size for before, after in itertools.pairwise(ends)]


def deal_images(
    sizes: Sequence[int], totals: Sequence[int], batch_size: int, equal: bool = False
) -> list[list[int]]:
    """Images of each round (row) for each hospital (column), all multiples of `batch_size`; row r sums to `totals[r]`.

    Shares follow `sizes` (training images of a hospital) or are the same for each (`equal`). Rounding
    is carried over: after any round a hospital is less than two batches from its exact share, and no
    entry is negative, so a hospital's chunks add up without drift.
    """
    weights = [1] * len(sizes) if equal else list(sizes)
    everything = sum(weights)
    dealt = [0] * len(sizes)
    rows = []
    until_now = 0
    for total in totals:
        batches = total // batch_size
        until_now += batches
        owed = [
            until_now * weight / everything - done
            for weight, done in zip(weights, dealt, strict=True)
        ]
        row = [max(0, math.floor(share)) for share in owed]
        for _ in range(
            batches - sum(row)
        ):  # the remainder goes to whom most is owed, the first of equals
            row[max(range(len(row)), key=lambda index: owed[index] - row[index])] += 1
        for _ in range(
            sum(row) - batches
        ):  # one batch too many was handed out: take it where most was granted
            row[max(range(len(row)), key=lambda index: row[index])] -= 1
        dealt = [done + more for done, more in zip(dealt, row, strict=True)]
        rows.append([share * batch_size for share in row])
    return rows
