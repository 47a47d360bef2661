"""From noise to epsilon: what a list of Poisson-subsampled Gaussian mechanisms costs together.

Neighbouring data sets differ by one unit (an image or a patient) that is there or not (add / remove). Two accountants bound
the same loss from above (fedgan/privacy/accountants.py): PRV, which is the tighter one, and RDP as its check. Where PRV cannot
be computed, or is above RDP, RDP's bound is given. What is not sampled at all has a closed form.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

from fedgan.errors import ConfigError
from fedgan.privacy import accountants
from fedgan.privacy.accountants import FEW_ORDERS, ROUGH, TOLERANCE, Mechanism, Merged

__all__ = [
    "Mechanism",
    "epsilon_of",
    "epsilon_prv",
    "epsilon_rdp",
    "joint_noise",
    "merge",
    "noise_for",
    "steps_within",
]

MOST_NOISE = 1e4
LEAST_NOISE = 0.01


def epsilon_of(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """ε of all mechanisms composed, at δ = `delta` in (0, 1); infinite as soon as one of them adds no noise."""
    return _guarded(mechanisms, delta, _best)


def epsilon_rdp(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The same by Rényi differential privacy alone: looser, and takes milliseconds."""
    return _guarded(mechanisms, delta, accountants.rdp)


def epsilon_prv(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The same by PRV alone. Raises `ArithmeticError` where it cannot be computed in doubles."""
    return _guarded(mechanisms, delta, accountants.prv)


def _guarded(
    mechanisms: Iterable[Mechanism], delta: float, accountant: Callable[[Merged, float], float]
) -> float:
    if not 0 < delta < 1:
        raise ConfigError(
            f"delta = {delta:g}: epsilon has a meaning for 0 < delta < 1 only; set privacy.delta"
        )
    merged = merge(mechanisms)
    if not merged:
        return 0.0
    return (
        math.inf
        if any(not part.noise_multiplier > 0 for part in merged)
        else accountant(merged, delta)
    )


def _best(merged: Merged, delta: float) -> float:
    if all(part.sample_rate >= 1 for part in merged):
        return accountants.gaussian(merged[0].noise_multiplier, delta)
    bound = accountants.rdp(merged, delta)
    try:
        return min(bound, accountants.prv(merged, delta))
    except ArithmeticError:
        return bound


def _likely(merged: Merged, delta: float) -> float:
    """What `_best` will say, nearly, from a mesh ten times as rough. Never 0."""
    if all(part.sample_rate >= 1 for part in merged):
        return max(accountants.gaussian(merged[0].noise_multiplier, delta), 1e-30)
    bound = accountants.rdp(merged, delta)
    try:
        return max(
            min(bound, accountants.prv(merged, delta, ROUGH) - (ROUGH - TOLERANCE) * bound), 1e-30
        )
    except ArithmeticError:
        return max(bound, 1e-30)


def _quick(merged: Merged, delta: float) -> float:
    """Rényi's ε from a few orders: an upper bound too, and within some 5 % of that from all."""
    return max(accountants.rdp(merged, delta, FEW_ORDERS), 1e-30)


def _within(epsilon: float, mechanisms: Sequence[Mechanism], delta: float) -> bool:
    """Whether `mechanisms` cost no more than `epsilon`; asks the slower accountant only where the quicker ones leave it open."""
    return any(_guarded(mechanisms, delta, accountant) <= epsilon for accountant in (_quick, _best))


# --- how much noise, how many steps ----------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def noise_for(
    epsilon: float, delta: float, sample_rate: float, steps: int, others: tuple[Mechanism, ...] = ()
) -> float:
    """The smallest noise multiplier (to 1 %) whose `steps` steps, with `others`, cost no more than `epsilon` at `delta`.

    Raises `ConfigError` when `others` alone cost more, or no noise is enough.
    """

    def parts(noise: float) -> list[Mechanism]:
        return [*others, Mechanism(noise, sample_rate, steps)]

    def by_quick(target: float, start: float = 1.0) -> float:
        """The noise at which the quickest accountant gives `target`."""
        return _falling(lambda noise: _guarded(parts(noise), delta, _quick), target, start)

    if not _within(epsilon, parts(MOST_NOISE), delta):
        raise ConfigError(
            f"no noise keeps {steps} steps at sampling rate {sample_rate:.3g} within epsilon = {epsilon:g} at "
            f"delta = {delta:.3g}: raise privacy.epsilon, lower training.kimg, or release labels with more noise"
        )
    if _guarded(parts(MOST_NOISE), delta, _quick) < epsilon:
        # All accountants fall alike with noise: their ratio where the quickest meets epsilon tells nearly where the next does.
        noise = by_quick(epsilon)
        for _ in range(3):
            ratio = _guarded(parts(noise), delta, _quick) / _guarded(parts(noise), delta, _likely)
            target = max(epsilon, epsilon * ratio)
            before, noise = noise, by_quick(target, noise)
            if abs(noise / before - 1) < 0.002:
                break
    else:  # only the tightest accountant knows a way
        noise = _falling(lambda noise: _guarded(parts(noise), delta, _likely), epsilon)
    noise *= 1.001
    while (
        _guarded(parts(noise), delta, _best) > epsilon
    ):  # what is returned was checked by the accountant that counts
        noise *= 1.003
    return noise


def steps_within(
    epsilon: float, delta: float, spent: Sequence[Mechanism], step: Mechanism, most: int
) -> int:
    """How many of at most `most` further steps like `step` fit into `epsilon` at `delta` beside what was `spent`.

    What is returned fits; 0.2 % more (one step more, of fewer than 1,000) does not, but for the wobble of PRV's mesh (0.5 %).
    """

    def parts(steps: int) -> list[Mechanism]:
        return [*spent, Mechanism(step.noise_multiplier, step.sample_rate, steps)]

    def by_quick(target: float) -> int:
        """The steps up to which the quickest accountant stays within `target`."""
        low, high = 0, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (middle, high)
                if _guarded(parts(middle), delta, _quick) <= target
                else (low, middle)
            )
        return low

    if most <= 0 or _within(epsilon, parts(most), delta):
        return max(0, most)
    if not _within(epsilon, parts(0), delta):
        return 0
    low, high = (
        by_quick(epsilon),
        most,
    )  # low fits: the quickest accountant never allows more than another; high does not fit
    guess = max(1, low)
    for _ in range(2):  # as in noise_for
        ratio = _guarded(parts(guess), delta, _quick) / _guarded(parts(guess), delta, _likely)
        guess = max(1, by_quick(epsilon * ratio))
    width = max(1, guess // 1000)
    while high - low > max(
        1, low // 500
    ):  # step over the guess to close the bracket from both sides
        if not low < guess < high:
            guess = (low + high) // 2
        if _within(epsilon, parts(guess), delta):
            low, guess = guess, guess + width
        else:
            high, guess = guess, guess - width
        width *= 2
    return low


def joint_noise(*multipliers: float) -> float:
    """The multiplier of one mechanism that releases several Gaussian sums over the same sample: (Σ σ⁻²)^(-1/2).

    The sums, each divided by its sensitivity, are one vector in which a unit moves every part by at most 1.
    """
    if any(multiplier <= 0 for multiplier in multipliers):
        return 0.0
    return sum(multiplier**-2 for multiplier in multipliers) ** -0.5


def merge(mechanisms: Iterable[Mechanism]) -> Merged:
    """Equal noise and rate as one entry, in a fixed order; entries of no steps are dropped.

    All that is not sampled becomes one step: Gaussian mechanisms compose to a Gaussian mechanism, exactly.
    """
    steps: dict[tuple[float, float], int] = {}
    plain: list[float] = []
    for part in mechanisms:
        if part.steps <= 0 or part.sample_rate <= 0:
            continue
        if part.sample_rate >= 1:
            plain.append(part.noise_multiplier / math.sqrt(part.steps))
        else:
            key = (part.noise_multiplier, part.sample_rate)
            steps[key] = steps.get(key, 0) + part.steps
    merged = tuple(Mechanism(*key, count) for key, count in sorted(steps.items()))
    return (*merged, Mechanism(joint_noise(*sorted(plain)), 1.0, 1)) if plain else merged


def _falling(function: Callable[[float], float], target: float, start: float = 1.0) -> float:
    """Where `function`, which falls with noise, meets `target` (to 0.1 %); the nearer end of all noise where it does not.

    Looks from `start` outwards, because small noise, where divergences are large, takes the accountants longest.
    """
    from scipy.optimize import brentq

    @functools.cache
    def over(logarithm: float) -> float:
        return math.log(min(max(function(math.exp(logarithm)), 1e-30), 1e30) / target)

    least, most = math.log(LEAST_NOISE), math.log(MOST_NOISE)
    here, step = math.log(start), 0.1
    sign = 1.0 if over(here) > 0 else -1.0
    while True:
        there = min(max(here + sign * step, least), most)
        if over(there) * sign <= 0:
            return (
                math.exp(brentq(over, here, there, xtol=0.001)) if there != here else math.exp(here)
            )
        if there in (least, most):
            return math.exp(there)
        here, step = there, 2 * step
