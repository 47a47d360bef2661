"""Privacy accounting: ε of composed Poisson-subsampled Gaussian mechanisms, and noise for an ε.

Neighbouring data sets differ by one unit (an image or a patient) that is added or removed. Two
accountants bound the same loss from above (fedgan/privacy/accountants.py): PRV, the tighter one,
and RDP as its check. RDP's bound counts where PRV cannot be computed or is larger. Mechanisms
without sampling have a closed form.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

from fedgan.errors import ConfigError
from fedgan.privacy import accountants
from fedgan.privacy.accountants import FEW_ORDERS, ORDERS, ROUGH, TOLERANCE, Mechanism, Merged

__all__ = [
    "Mechanism",
    "epsilon_of",
    "epsilon_prv",
    "epsilon_rdp",
    "filtered_steps",
    "joint_noise",
    "merge",
    "noise_for",
    "steps_within",
]

MAX_NOISE = 1e4
MIN_NOISE = 0.01


def epsilon_of(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """ε of all mechanisms composed, at δ in (0, 1); infinite if one of them adds no noise."""
    return _guarded(mechanisms, delta, _best)


def epsilon_rdp(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The same by Rényi differential privacy: looser, in milliseconds."""
    return _guarded(mechanisms, delta, accountants.rdp)


def epsilon_prv(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The same by PRV. Raises `ArithmeticError` where it cannot be computed in doubles."""
    return _guarded(mechanisms, delta, accountants.prv)


def _guarded(
    mechanisms: Iterable[Mechanism], delta: float, accountant: Callable[[Merged, float], float]
) -> float:
    if not 0 < delta < 1:
        raise ConfigError(
            f"delta = {delta:g}: epsilon is defined for 0 < delta < 1 only; set privacy.delta"
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
    """`_best` approximated with a mesh ten times as coarse; never 0."""
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
    """Rényi's ε from a few orders: an upper bound too, within about 5 % of that from all."""
    return max(accountants.rdp(merged, delta, FEW_ORDERS), 1e-30)


def _within(epsilon: float, mechanisms: Sequence[Mechanism], delta: float) -> bool:
    """Whether `mechanisms` cost at most `epsilon`; the slow accountant runs only if needed."""
    return any(_guarded(mechanisms, delta, accountant) <= epsilon for accountant in (_quick, _best))


# --- how much noise, how many steps ---------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def noise_for(
    epsilon: float, delta: float, sample_rate: float, steps: int, others: tuple[Mechanism, ...] = ()
) -> float:
    """The smallest noise multiplier (to 1 %) for `steps` steps, with `others`, within ε at δ.

    Raises `ConfigError` when `others` alone exceed `epsilon`, or no noise is enough.
    """

    def parts(noise: float) -> list[Mechanism]:
        return [*others, Mechanism(noise, sample_rate, steps)]

    def by_quick(target: float, start: float = 1.0) -> float:
        """The noise at which the quickest accountant gives `target`."""
        return _solve_decreasing(lambda noise: _guarded(parts(noise), delta, _quick), target, start)

    if not _within(epsilon, parts(MAX_NOISE), delta):
        raise ConfigError(
            f"no noise keeps {steps} steps at sampling rate {sample_rate:.3g} within "
            f"epsilon = {epsilon:g} at delta = {delta:.3g}: raise privacy.epsilon, lower "
            "training.kimg, or release labels with more noise"
        )
    if _guarded(parts(MAX_NOISE), delta, _quick) < epsilon:
        # All accountants decrease alike with noise: their ratio, where the quickest meets epsilon,
        # predicts where the next one does.
        noise = by_quick(epsilon)
        for _ in range(3):
            ratio = _guarded(parts(noise), delta, _quick) / _guarded(parts(noise), delta, _likely)
            target = max(epsilon, epsilon * ratio)
            before, noise = noise, by_quick(target, noise)
            if abs(noise / before - 1) < 0.002:
                break
    else:  # only the tightest accountant finds a solution
        noise = _solve_decreasing(lambda noise: _guarded(parts(noise), delta, _likely), epsilon)
    noise *= 1.001
    while _guarded(parts(noise), delta, _best) > epsilon:  # check by the accountant that counts
        noise *= 1.003
    return noise


def steps_within(
    epsilon: float, delta: float, spent: Sequence[Mechanism], step: Mechanism, most: int
) -> int:
    """Number of further steps like `step`, up to `most`, that fit into ε at δ beside `spent`.

    The result fits; 0.2 % more (one step more, below 1,000 steps) does not, up to the error of
    PRV's mesh (0.5 %).
    """

    def parts(steps: int) -> list[Mechanism]:
        return [*spent, Mechanism(step.noise_multiplier, step.sample_rate, steps)]

    def by_quick(target: float) -> int:
        """The number of steps up to which the quickest accountant stays within `target`."""
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
    # low fits, because the quickest accountant is an upper bound; high does not fit.
    low, high = by_quick(epsilon), most
    guess = max(1, low)
    for _ in range(2):  # as in noise_for
        ratio = _guarded(parts(guess), delta, _quick) / _guarded(parts(guess), delta, _likely)
        guess = max(1, by_quick(epsilon * ratio))
    width = max(1, guess // 1000)
    # Step over the guess to close the bracket from both sides.
    while high - low > max(1, low // 500):
        if not low < guess < high:
            guess = (low + high) // 2
        if _within(epsilon, parts(guess), delta):
            low, guess = guess, guess + width
        else:
            high, guess = guess, guess - width
        width *= 2
    return low


def filtered_steps(
    epsilon: float, delta: float, spent: Sequence[Mechanism], step: Mechanism, most: int
) -> int:
    """`steps_within` for mechanisms that may have been chosen after looking at earlier releases.

    Rényi divergences of one order add up under full adaptivity, and steps are allowed while their
    sum stays below the budget of that order (arXiv 2008.11193, theorem 4.3). The order follows from
    ε and δ alone: it has the largest budget per order.
    """
    parts = [*spent, step]
    if most <= 0 or any(not part.noise_multiplier > 0 for part in parts):
        return 0
    order = max(ORDERS, key=lambda order: accountants.rdp_budget(order, epsilon, delta) / order)
    left = accountants.rdp_budget(order, epsilon, delta) - sum(
        part.steps * accountants.divergence(part, order) for part in merge(spent)
    )
    return max(0, min(most, int(left / accountants.divergence(step, order))))


def joint_noise(*multipliers: float) -> float:
    """Noise multiplier of one mechanism that releases several Gaussian sums: (Σ σ⁻²)^(-1/2).

    The sums are over the same sample. Divided by its sensitivity, each is a part of one vector in
    which a unit changes every part by at most 1.
    """
    if any(multiplier <= 0 for multiplier in multipliers):
        return 0.0
    return sum(multiplier**-2 for multiplier in multipliers) ** -0.5


def merge(mechanisms: Iterable[Mechanism]) -> Merged:
    """Mechanisms by noise and rate, in a fixed order, without entries of no steps.

    All without sampling become one step: Gaussian mechanisms compose exactly to a Gaussian one.
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


def _solve_decreasing(
    function: Callable[[float], float], target: float, start: float = 1.0
) -> float:
    """The noise at which the decreasing `function` meets `target` (to 0.1 %), or the nearer limit.

    The search goes from `start` outwards: the accountants are slowest at small noise.
    """
    from scipy.optimize import brentq

    @functools.cache
    def log_ratio(logarithm: float) -> float:
        return math.log(min(max(function(math.exp(logarithm)), 1e-30), 1e30) / target)

    least, most = math.log(MIN_NOISE), math.log(MAX_NOISE)
    here, step = math.log(start), 0.1
    sign = 1.0 if log_ratio(here) > 0 else -1.0
    while True:
        there = min(max(here + sign * step, least), most)
        if log_ratio(there) * sign <= 0:
            return (
                math.exp(brentq(log_ratio, here, there, xtol=0.001))
                if there != here
                else math.exp(here)
            )
        if there in (least, most):
            return math.exp(there)
        here, step = there, 2 * step
