"""From noise to epsilon: what a list of Poisson-subsampled Gaussian mechanisms costs together.

Neighbouring data sets differ by one unit (an image or a patient) that is there or not (add / remove). Two accountants of
Opacus bound the same loss from above: PRV (numerical composition, arXiv 2106.02848), which is the tighter one, and RDP
(Rényi, arXiv 1908.10530) as its check. Where PRV cannot be computed, or is above RDP, RDP's bound is given.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fedgan.errors import ConfigError

MOST_NOISE = 1e4
PRV_TOLERANCE = 0.01  # absolute error of epsilon that PRV may make; its upper end is reported


@dataclass(frozen=True)
class Mechanism:
    """`steps` releases of a sum over a Poisson sample, each unit in it with probability `sample_rate`.

    `noise_multiplier`: standard deviation of the noise over the most that one unit can move the sum. `sample_rate` 1:
    no sampling (a plain Gaussian mechanism).
    """

    noise_multiplier: float
    sample_rate: float
    steps: int = 1


def epsilon_of(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """ε of all mechanisms composed, at δ = `delta` in (0, 1); infinite as soon as one of them adds no noise."""
    merged = merge(mechanisms)
    if not merged:
        return 0.0
    if any(part.noise_multiplier <= 0 for part in merged):
        return math.inf
    return _epsilon(merged, delta)


def epsilon_rdp(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The same by Rényi differential privacy alone: looser, and takes milliseconds."""
    merged = merge(mechanisms)
    if not merged:
        return 0.0
    return math.inf if any(part.noise_multiplier <= 0 for part in merged) else _rdp(merged, delta)


@functools.lru_cache(maxsize=256)
def noise_for(epsilon: float, delta: float, sample_rate: float, steps: int, others: tuple[Mechanism, ...] = ()) -> float:
    """The smallest noise multiplier (to 1 %) whose `steps` steps, with `others`, cost no more than `epsilon` at `delta`.

    Raises `ConfigError` when `others` alone cost more, or no noise is enough.
    """

    def costs_more(noise: float, accountant: Callable[[Iterable[Mechanism], float], float]) -> bool:
        return accountant([*others, Mechanism(noise, sample_rate, steps)], delta) > epsilon

    if epsilon_of(others, delta) >= epsilon or costs_more(MOST_NOISE, epsilon_rdp):
        raise ConfigError(
            f"no noise keeps {steps} steps at sampling rate {sample_rate:.3g} within epsilon = {epsilon:g} at "
            f"delta = {delta:.3g}: raise privacy.epsilon, lower training.kimg, or release labels with more noise"
        )
    # Rényi's accountant is quick and errs to the safe side: it gives the upper end, from which the tighter one goes down.
    high = _smallest(0.01, MOST_NOISE, lambda noise: costs_more(noise, epsilon_rdp))
    low = high
    while low > 0.01 and not costs_more(low, epsilon_of):
        high, low = low, low * 0.9
    return _smallest(low, high, lambda noise: costs_more(noise, epsilon_of))


def _smallest(low: float, high: float, too_small: Callable[[float], bool]) -> float:
    """Where `too_small` turns false between `low` and `high`, to 1 %; `high` if nowhere before."""
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if too_small(middle) else (low, middle)
    return high


def steps_within(epsilon: float, delta: float, spent: Sequence[Mechanism], step: Mechanism, most: int) -> int:
    """How many of at most `most` further steps like `step` fit into `epsilon` at `delta` beside what was `spent`."""

    def fits(steps: int) -> bool:
        return epsilon_of([*spent, Mechanism(step.noise_multiplier, step.sample_rate, steps)], delta) <= epsilon

    if most <= 0 or fits(most):
        return max(0, most)
    low, high = 0, most  # low fits (or is nothing at all), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def joint_noise(*multipliers: float) -> float:
    """The multiplier of one mechanism that releases several Gaussian sums over the same sample: (Σ σ⁻²)^(-1/2).

    The sums, each divided by its sensitivity, are one vector in which a unit moves every part by at most 1.
    """
    if any(multiplier <= 0 for multiplier in multipliers):
        return 0.0
    return sum(multiplier**-2 for multiplier in multipliers) ** -0.5


def merge(mechanisms: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
    """Equal noise and rate as one entry, in a fixed order; entries of no steps are dropped."""
    steps: dict[tuple[float, float], int] = {}
    for part in mechanisms:
        if part.steps > 0 and part.sample_rate > 0:
            key = (part.noise_multiplier, part.sample_rate)
            steps[key] = steps.get(key, 0) + part.steps
    return tuple(Mechanism(*key, count) for key, count in sorted(steps.items()))


@functools.lru_cache(maxsize=4096)
def _epsilon(merged: tuple[Mechanism, ...], delta: float) -> float:
    bound = _rdp(merged, delta)
    try:
        tighter = _prv(merged, delta)
    except (RuntimeError, ValueError, OverflowError, ArithmeticError, IndexError, MemoryError):
        return bound
    return min(bound, tighter) if math.isfinite(tighter) and tighter > 0 else bound


@functools.lru_cache(maxsize=4096)
def _rdp(merged: tuple[Mechanism, ...], delta: float) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = _history(merged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))


def _prv(merged: tuple[Mechanism, ...], delta: float) -> float:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = _history(merged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta, eps_error=PRV_TOLERANCE))


def _history(merged: tuple[Mechanism, ...]) -> list[tuple[float, float, int]]:
    return [(part.noise_multiplier, part.sample_rate, part.steps) for part in merged]
