"""Attack on the private step: the empirical ε of a canary image against the accountant's ε.

An adversary who knows everything except whether the canary is in the data, and sees the release of
one step, distinguishes both worlds with some false positives and false negatives. (ε, δ)-privacy
bounds these from below, so that their Clopper-Pearson bounds give a lower bound of ε (arXiv
2101.04535, section 4; arXiv 2006.07709). It must be below the accountant's ε, and far above it when
a part of the mechanism is off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta

from fedgan.config import from_dict
from fedgan.data.dataset import ImageDataset
from fedgan.models.stylegan2.discriminator import Discriminator
from fedgan.privacy import clipping
from fedgan.privacy import step as step_module
from fedgan.privacy.accounting import epsilon_of
from fedgan.privacy.clipping import ClippedSum, clipped_sum
from fedgan.privacy.ledger import Ledger
from fedgan.privacy.step import Draw, PrivateStep
from fedgan.training.losses import discriminator_loss

OTHERS, TRIALS, DELTA, NOISE, CLIP = 5, 600, 1e-2, 2.0, 1.0
RATE = 0.5
CONFIDENCE = 0.999
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> Discriminator:
    model = from_dict(
        {}, ["model.channel_base=32", "model.channel_max=4", "model.minibatch_std_group=0"]
    ).model
    return Discriminator(model, 16, 1, 0, torch.Generator().manual_seed(2)).to(
        memory_format=torch.channels_last
    )  # type: ignore[call-overload]


def world(canary: bool) -> ImageDataset:
    """Uniform grey images, and a canary unlike them."""
    images = np.full((OTHERS + 1, 1, 16, 16), 140, np.uint8)
    if canary:
        images[-1] = 255 * (np.indices((16, 16)).sum(axis=0) // 2 % 2)
    return ImageDataset(
        "clinic", images if canary else images[:-1], np.zeros((OTHERS + canary, 0), np.uint8), ()
    )


def shown(data: ImageDataset, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = data.batch(rows)
    return images.float() / 127.5 - 1, labels


def mechanism(tmp_path: Path, data: ImageDataset) -> PrivateStep:
    """The same sampling rate in both worlds, independent of the number of images."""
    keys = [
        f"privacy.noise_multiplier={NOISE}",
        f"privacy.max_grad_norm={CLIP}",
        f"privacy.delta={DELTA}",
        f"data.resolution={data.resolution}",
    ]
    made = PrivateStep(
        from_dict({}, keys), data, 1, TRIALS, Ledger(tmp_path / f"{len(data)}.jsonl"), "attack", CPU
    )
    made.sample_rate = RATE
    return made


def remembered(work: Callable[..., ClippedSum]) -> Callable[..., ClippedSum]:
    """Cache `work`, a pure function of its tensors, over the few possible samples."""
    known: dict[Any, ClippedSum] = {}

    def look(network, loss, fakes, reals, units, *others) -> ClippedSum:
        key = (*(tensor.numpy().tobytes() for tensor in (*fakes, *reals, units)), others)
        if key not in known:
            known[key] = work(network, loss, fakes, reals, units, *others)
        return known[key]

    return look


def guesses(tmp_path: Path, network: Discriminator, canary: bool) -> np.ndarray:
    """(TRIALS,): projection of each release on the direction of the canary."""
    data, both = world(canary), world(True)
    step = mechanism(tmp_path, data)
    step._reserved = TRIALS  # each trial is the only step of a world
    blank = torch.zeros(1, 1, 16, 16)
    none = torch.zeros(1, 0)

    def direction(row: int) -> torch.Tensor:
        single = clipped_sum(
            network,
            discriminator_loss,
            (blank, none),
            shown(both, np.array([row])),
            torch.tensor([0]),
            CLIP,
            1,
        )
        return torch.cat(
            [single.gradients[name].flatten() for name, _ in network.named_parameters()]
        )

    aim, other = direction(OTHERS), direction(0)
    aim = aim - other * (aim @ other) / (other @ other)
    aim = aim / aim.norm()
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "clipped_sum", remembered(step_module.clipped_sum))
        for number in range(TRIALS):
            draw = step.draw(number)
            fakes = (blank.expand(len(draw.rows), 1, 16, 16), none.expand(len(draw.rows), 0))
            step.gradient(network, discriminator_loss, fakes, shown(data, draw.rows), draw)
            release = torch.cat(
                [parameter.grad.double().flatten() for parameter in network.parameters()]
            ) * (RATE * step.units)
            found.append(float(release @ aim))
    return np.array(found)


def lower_bound(without: np.ndarray, with_canary: np.ndarray) -> float:
    """Empirical lower bound of ε (`CONFIDENCE`); threshold from the first half of the trials."""
    half = len(without) // 2

    def bound(threshold: float, out: np.ndarray, inside: np.ndarray) -> float:
        false_positive = at_most(int((out > threshold).sum()), len(out))
        false_negative = at_most(int((inside <= threshold).sum()), len(inside))
        odds = max(
            (1 - DELTA - false_negative) / false_positive,
            (1 - DELTA - false_positive) / false_negative,
        )
        return float(np.log(max(odds, 1.0)))

    tried = np.unique(np.concatenate([without[:half], with_canary[:half]]))
    best = max(
        tried, key=lambda threshold: bound(float(threshold), without[:half], with_canary[:half])
    )
    return bound(float(best), without[half:], with_canary[half:])


def at_most(errors: int, trials: int) -> float:
    """Upper Clopper-Pearson bound of a rate; half of the error probability per rate."""
    return (
        1.0
        if errors == trials
        else float(beta.ppf(1 - (1 - CONFIDENCE) / 2, errors + 1, trials - errors))
    )


def attack(tmp_path: Path, network: Discriminator) -> tuple[float, float]:
    """(empirical lower bound of ε of one step, ε of the accountant)."""
    bound = lower_bound(guesses(tmp_path, network, False), guesses(tmp_path, network, True))
    made = mechanism(tmp_path, world(True))
    claimed = epsilon_of([type(made.step)(made.step.noise_multiplier, RATE, 1)], DELTA)
    return bound, claimed


def test_empirical_epsilon_stays_below_the_accountant(tmp_path, network):
    bound, claimed = attack(tmp_path, network)
    assert 0.1 < claimed < 1.2
    assert bound < claimed


def test_attack_detects_missing_noise(tmp_path, network, monkeypatch):
    monkeypatch.setattr(Draw, "normal", lambda self, shape, device: torch.zeros(shape))
    bound, claimed = attack(tmp_path, network)
    assert bound > 3 * claimed


def test_attack_detects_missing_clipping(tmp_path, network, monkeypatch):
    def unclipped(network, loss, fakes, reals, units, clip, chunk, r1):
        return clipping.clipped_sum(network, loss, fakes, reals, units, 1e9, chunk, r1)

    loud = torch.nn.Parameter(
        network.b4.out.weight.detach() * 30
    )  # whose gradients are far longer than the clip
    monkeypatch.setattr(network.b4.out, "weight", loud)
    bound, claimed = attack(tmp_path, network)
    assert bound < claimed
    monkeypatch.setattr(step_module, "clipped_sum", unclipped)
    assert (
        lower_bound(guesses(tmp_path, network, False), guesses(tmp_path, network, True))
        > 3 * claimed
    )


# --- low bits of a release ------------------------------------------------------------------------

SIDE, PAIRS, TRAINING_PAIRS = 128, 200, 100
REACH = CLIP / SIDE  # what the target adds to a weight: its gradient has the same size everywhere


class CraftedDiscriminator(torch.nn.Module):
    """A server's D under which the target alone has a gradient, of equal size in all weights.

    The logit of every other image is ±200, where the sigmoid in float32 is 0.
    """

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(-400 * target.flatten()[None] / target.numel())
        self.bias = torch.nn.Parameter(torch.tensor([200.0]))

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(images.flatten(1), self.weight, self.bias).squeeze(1)


def trailing_zeros(weights: torch.Tensor) -> float:
    """Mean number of zeros at the end of float32 numbers, over those far below `REACH`.

    float32 noise alone has about one; the sum of `REACH` and noise that nearly cancel is a multiple
    of the last bit of `REACH`, and has several.
    """
    small = weights[weights.abs() < REACH / 4].numpy().view(np.int32) & 0x7FFFFF
    lowest = np.where(small, small & -small, 2**23)
    return float(np.log2(lowest).mean()) if len(small) else 0.0


def find_target(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """(share of correct guesses, lower bound of ε) by one threshold, in (out, in) `pairs`.

    The threshold comes from the first pairs. Expected power: with `PAIRS` pairs a distinguisher
    that is right in 65 % of its guesses is told from chance (3.3 deviations) 99 times in 100.
    """
    known, tested = np.array(pairs[:TRAINING_PAIRS]), np.array(pairs[TRAINING_PAIRS:])
    threshold, sign = max(
        ((edge, way) for edge in np.unique(known) for way in (1, -1)),
        key=lambda rule: np.mean(rule[1] * (known - rule[0]) > 0, axis=0) @ [-1, 1],
    )
    out, inside = (sign * (tested - threshold) > 0).T
    false_positive, false_negative = (
        at_most(int(errors.sum()), PAIRS) for errors in (out, ~inside)
    )
    bound = max(
        np.log(max(1.0, (1 - DELTA - miss) / alarm))
        for miss, alarm in ((false_negative, false_positive), (false_positive, false_negative))
    )
    return float(np.mean([~out, inside])), float(bound)


def test_low_bits_of_a_release_reveal_no_member(tmp_path):
    """A crafted D and G: the sum is exactly 0 unless the target is in the sample."""
    target = np.where(np.indices((SIDE, SIDE)).sum(axis=0) % 2, 255, 0).astype(np.uint8)
    images = np.full((4, 1, SIDE, SIDE), 140, np.uint8)
    images[-1] = target
    data = ImageDataset("clinic", images, np.zeros((4, 0), np.uint8), ())
    pattern = torch.from_numpy(target).float() / 127.5 - 1
    network, rng = CraftedDiscriminator(pattern), np.random.default_rng(0)
    step = mechanism(tmp_path, data)
    step._reserved = 2 * (PAIRS + TRAINING_PAIRS)
    expected = step.sample_rate * step.units  # a power of two: no bit is lost
    new, old = [], []
    for number in range(PAIRS + TRAINING_PAIRS):
        found, before = [], []
        for rows in (np.arange(3), np.arange(4)):  # without the target, with it
            draw = dataclasses.replace(
                step.draw(2 * number + len(found)), rows=rows, units=torch.arange(len(rows))
            )
            fakes = pattern.expand(len(rows), 1, SIDE, SIDE), torch.zeros(len(rows), 0)
            step.gradient(network, discriminator_loss, fakes, shown(data, rows), draw)
            found.append(trailing_zeros(network.weight.grad.flatten() * expected))
            # float32 noise and sum, as positive control
            total = clipped_sum(
                network, discriminator_loss, fakes, shown(data, rows), draw.units, CLIP, 4
            ).gradients["weight"]
            assert bool(total.any()) == (len(rows) == 4)
            noise = torch.from_numpy(rng.standard_normal(total.numel(), dtype=np.float32))
            before.append(trailing_zeros(total.float().flatten() + noise * (NOISE * CLIP)))
        new.append((found[0], found[1]))
        old.append((before[0], before[1]))
    claimed = epsilon_of([type(step.step)(NOISE, 1.0, 1)], DELTA)  # the sample is not secret here
    right, bound = find_target(old)
    assert right > 0.95
    assert bound > 2 * claimed
    right, bound = find_target(new)
    assert abs(right - 0.5) < 3.3 * np.sqrt(0.25 / (2 * PAIRS))
    assert bound == 0.0


def test_empirical_bound_is_sound_for_randomised_response():
    """Randomised response with ε = 1 (δ = 0): the bound is just below it."""
    rng, count = np.random.default_rng(0), 40_000
    truth = np.exp(1) / (1 + np.exp(1))
    inside, out = (
        (rng.random(count) < truth).astype(float),
        (rng.random(count) < 1 - truth).astype(float),
    )
    assert 0.8 < lower_bound(out, inside) < 1.0
