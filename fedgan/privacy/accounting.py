"""From noise to epsilon: what a list of Poisson-subsampled Gaussian mechanisms costs together.

Neighbouring data sets differ by one unit (an image or a patient) that is there or not (add / remove). Two accountants of
Opacus bound the same loss from above: PRV (numerical composition, arXiv 2106.02848), which is the tighter one, and RDP
(Rényi, arXiv 1908.10530) as its check. Where PRV cannot be computed, or is above RDP, RDP's bound is given. What is not
sampled at all is a plain Gaussian mechanism, whose cost has a closed form (arXiv 1805.06530, theorem 8).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedgan.errors import ConfigError

MOST_NOISE = 1e4
LEAST_NOISE = 0.01
TOLERANCE = 0.005  # error of epsilon that PRV may make, as a share of RDP's; its upper end is reported
ROUGH = 0.05  # the same where a search only looks for the neighbourhood
MOST_POINTS = 2**22  # of PRV's mesh: some 300 MB, a few seconds; beyond it the error grows instead
MOST_LOSS = 600.0  # above it exp(privacy loss) leaves the range of a double
ORDERS = (*(1 + x / 10 for x in range(1, 50)), *range(6, 64), 128, 256, 512, 1024)  # broken ones take a hundred times as long


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
    return _guarded(mechanisms, delta, _epsilon)


def epsilon_rdp(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The same by Rényi differential privacy alone: looser, and takes milliseconds."""
    return _guarded(mechanisms, delta, _rdp)


def epsilon_prv(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The same by PRV alone. Raises `ArithmeticError` where it cannot be computed in doubles."""
    return _guarded(mechanisms, delta, _prv)


def _guarded(mechanisms: Iterable[Mechanism], delta: float, accountant: Callable[[tuple[Mechanism, ...], float], float]) -> float:
    if not 0 < delta < 1:
        raise ConfigError(f"delta = {delta:g}: epsilon has a meaning for 0 < delta < 1 only; set privacy.delta")
    merged = merge(mechanisms)
    if not merged:
        return 0.0
    return math.inf if any(part.noise_multiplier <= 0 for part in merged) else accountant(merged, delta)


# --- how much noise, how many steps ----------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def noise_for(epsilon: float, delta: float, sample_rate: float, steps: int, others: tuple[Mechanism, ...] = ()) -> float:
    """The smallest noise multiplier (to 1 %) whose `steps` steps, with `others`, cost no more than `epsilon` at `delta`.

    Raises `ConfigError` when `others` alone cost more, or no noise is enough.
    """

    def cost(noise: float, accountant: Callable[[Iterable[Mechanism], float], float]) -> float:
        return accountant([*others, Mechanism(noise, sample_rate, steps)], delta)

    def by_renyi(target: float, start: float = 1.0) -> float:
        """The noise at which Rényi's accountant, which is quick, gives `target`."""
        return _falling(lambda noise: cost(noise, epsilon_rdp), target, start)

    if cost(MOST_NOISE, epsilon_of) > epsilon:
        raise ConfigError(
            f"no noise keeps {steps} steps at sampling rate {sample_rate:.3g} within epsilon = {epsilon:g} at "
            f"delta = {delta:.3g}: raise privacy.epsilon, lower training.kimg, or release labels with more noise"
        )
    if cost(MOST_NOISE, epsilon_rdp) < epsilon:
        # Both accountants fall alike with noise, so that their ratio where one meets epsilon tells nearly where the other does.
        noise = by_renyi(epsilon)
        for _ in range(2):
            noise = by_renyi(max(epsilon, epsilon * cost(noise, epsilon_rdp) / cost(noise, _estimate)), noise)
    else:  # only the tighter accountant knows a way
        noise = _falling(lambda noise: cost(noise, _estimate), epsilon)
    while cost(noise, epsilon_of) > epsilon:  # the search was rough; what is returned was checked by the accountant that counts
        noise *= 1.003
    return noise


def steps_within(epsilon: float, delta: float, spent: Sequence[Mechanism], step: Mechanism, most: int) -> int:
    """How many of at most `most` further steps like `step` fit into `epsilon` at `delta` beside what was `spent`.

    What is returned fits; 0.2 % more (one step more, of fewer than 1,000) does not, but for the wobble of PRV's mesh (0.5 %).
    """

    def cost(steps: int, accountant: Callable[[Iterable[Mechanism], float], float]) -> float:
        return accountant([*spent, Mechanism(step.noise_multiplier, step.sample_rate, steps)], delta)

    def by_renyi(target: float) -> int:
        """The steps up to which Rényi's accountant, which is quick, stays within `target`."""
        low, high = 0, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle, epsilon_rdp) <= target else (low, middle)
        return low

    if most <= 0 or cost(most, epsilon_of) <= epsilon:
        return max(0, most)
    if cost(0, epsilon_of) > epsilon:
        return 0
    low, high = by_renyi(epsilon), most  # low fits: Rényi's accountant never allows more than the other; high does not fit
    guess = max(1, low)
    for _ in range(2):  # as in noise_for
        guess = max(1, by_renyi(epsilon * cost(guess, epsilon_rdp) / cost(guess, _estimate)))
    width = max(1, guess // 1000)
    while high - low > max(1, low // 500):  # step over the guess to close the bracket from both sides
        if not low < guess < high:
            guess = (low + high) // 2
        if cost(guess, epsilon_of) <= epsilon:
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


def merge(mechanisms: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
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

    def over(logarithm: float) -> float:
        return math.log(min(max(function(math.exp(logarithm)), 1e-30), 1e30) / target)

    least, most = math.log(LEAST_NOISE), math.log(MOST_NOISE)
    here, step = math.log(start), 0.1
    sign = 1.0 if over(here) > 0 else -1.0
    while True:
        there = min(max(here + sign * step, least), most)
        if over(there) * sign <= 0:
            return math.exp(brentq(over, here, there, xtol=0.001)) if there != here else math.exp(here)
        if there in (least, most):
            return math.exp(there)
        here, step = there, 2 * step


# --- the accountants -------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _epsilon(merged: tuple[Mechanism, ...], delta: float) -> float:
    if all(part.sample_rate >= 1 for part in merged):
        return _gaussian(merged[0].noise_multiplier, delta)
    bound = _rdp(merged, delta)
    try:
        return min(bound, _prv(merged, delta))
    except ArithmeticError:
        return bound


def _estimate(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """What `epsilon_of` will say, nearly, from a mesh ten times as rough."""

    def rough(merged: tuple[Mechanism, ...], delta: float) -> float:
        bound = _rdp(merged, delta)
        if all(part.sample_rate >= 1 for part in merged):
            return _gaussian(merged[0].noise_multiplier, delta)
        try:
            return min(bound, _prv(merged, delta, ROUGH) - (ROUGH - TOLERANCE) * bound)
        except ArithmeticError:
            return bound

    return max(_guarded(mechanisms, delta, rough), 1e-30)


def _gaussian(noise: float, delta: float) -> float:
    """ε of one Gaussian mechanism without sampling: the root of Φ(1/2σ − εσ) − e^ε Φ(−1/2σ − εσ) = δ."""
    from scipy.optimize import brentq
    from scipy.special import log_ndtr, ndtr

    def excess(epsilon: float) -> float:
        half = 1 / (2 * noise)
        return float(ndtr(half - epsilon * noise) - math.exp(min(0.0, epsilon + log_ndtr(-half - epsilon * noise)))) - delta

    if excess(0.0) <= 0:
        return 0.0
    high = 1 / (2 * noise**2) + math.sqrt(2 * math.log(1 / delta)) / noise  # a tail bound of the privacy loss
    return float(brentq(excess, 0.0, high, xtol=1e-12, rtol=1e-12)) * (1 + 1e-9)


@functools.lru_cache(maxsize=4096)
def _rdp(merged: tuple[Mechanism, ...], delta: float) -> float:
    from opacus.accountants.analysis.rdp import get_privacy_spent

    total = sum(part.steps * _curve(part.noise_multiplier, part.sample_rate) for part in merged)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return max(0.0, float(get_privacy_spent(orders=list(ORDERS), rdp=total, delta=delta)[0]))


@functools.lru_cache(maxsize=4096)
def _curve(noise: float, sample_rate: float) -> np.ndarray:
    """Rényi divergence (orders,) of one step."""
    from opacus.accountants.analysis.rdp import compute_rdp

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return np.asarray(compute_rdp(q=sample_rate, noise_multiplier=noise, steps=1, orders=list(ORDERS)))


@functools.lru_cache(maxsize=4096)
def _prv(merged: tuple[Mechanism, ...], delta: float, tolerance: float = TOLERANCE) -> float:
    """The upper end of ε by Opacus's PRV. Raises `ArithmeticError` where doubles do not carry it.

    The mesh follows from the error that is allowed (arXiv 2106.02848, theorem 5.5): `tolerance` of Rényi's ε, so that a large
    ε costs no more time than a small one. Opacus's own accountant takes an absolute error: two minutes for 2.4 M steps.
    """
    from opacus.accountants.analysis import prv

    bound, delta_error = _rdp(merged, delta), delta / 1000
    counts = [part.steps for part in merged]
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            spread = math.sqrt(sum(counts) * math.log(12 / delta_error) / 2)
            domain, error = _mesh(_reach(merged, delta_error), tolerance * bound, spread)
            losses = [_loss(part, domain) for part in merged]
            sums = [_self_composed(loss, domain, steps) for loss, steps in zip(losses, counts, strict=True)]
            composed = prv.compose_heterogeneous(sums, [1] * len(sums))
            mean = sum(steps * loss.mean() for steps, loss in zip(counts, losses, strict=True))
            drift = mean - float(composed.pmf @ composed.domain.ts)
            upper = composed.compute_epsilon(delta, delta_error, 0.0)[2]
    except (RuntimeError, ValueError, IndexError, MemoryError) as problem:
        raise ArithmeticError(f"PRV: {problem}") from None
    if not (math.isfinite(upper) and abs(drift) < error / 10 and abs(composed.pmf.sum() - 1) < delta_error):
        raise ArithmeticError("PRV: the composed distribution is not the sum of its parts")
    return max(0.0, float(upper)) + error


def _self_composed(loss: Any, domain: Any, steps: int) -> Any:
    """The discrete distribution of the sum of `steps` losses, each rounded to `domain`'s mesh with its mean kept.

    Opacus keeps the mean by a shift of the domain. Over millions of steps the shifts add up to more than the domain is wide,
    and the circular convolution then puts the sum a whole domain too low: an ε of 0.5 instead of 9. So the shift goes into
    the numbering of the mesh here, but for the part of it that is less than a mesh width.
    """
    from opacus.accountants.analysis import prv

    single = prv.discretize(loss, domain)
    single.pmf /= single.pmf.sum()
    composed = prv.compose_heterogeneous([single], [steps])
    shift = composed.domain.shifts
    cells = round(shift / domain.dt)
    return prv.DiscretePRV(np.roll(composed.pmf, cells), domain.shift_right(shift - cells * domain.dt))


def _loss(part: Mechanism, domain: Any) -> Any:
    """Opacus's privacy loss of one step on `domain`, with a mean that millions of steps may multiply.

    Opacus integrates the mean to 1e-8, which 2.4 M steps make an error of 0.01 and more. Here it is a trapezoidal sum over
    x ~ (1-q) N(0, σ²) + q N(1, σ²) of ln(1 - q + q exp((2x - 1) / 2σ²)), which for such smooth functions is exact to the last
    digits.
    """
    from opacus.accountants.analysis import prv

    noise, q = part.noise_multiplier, part.sample_rate
    x = np.arange(-12 * noise, 1 + 12 * noise, noise / 64)
    weights = (1 - q) * np.exp(-(x**2) / (2 * noise**2)) + q * np.exp(-((x - 1) ** 2) / (2 * noise**2))
    slope = (2 * x - 1) / (2 * noise**2)
    loss = np.log1p(q * np.expm1(np.minimum(slope, 1.0))) if q < 1 else slope
    high = slope > 1.0  # there expm1 may overflow
    loss = np.where(high, slope + np.log(q + (1 - q) * np.exp(-slope)), loss)
    inside = (loss >= domain.t_min) & (loss <= domain.t_max)
    mean = float((weights * loss)[inside].sum() / weights[inside].sum())

    class Loss(prv.TruncatedPrivacyRandomVariable):
        def mean(self) -> float:
            return mean

    return Loss(prv.PoissonSubsampledGaussianPRV(q, noise), domain.t_min, domain.t_max)


def _reach(merged: tuple[Mechanism, ...], delta_error: float) -> float:
    """The privacy loss beyond which nothing counts (arXiv 2106.02848, remark 5.6)."""
    steps = sum(part.steps for part in merged)
    singles = (_rdp((Mechanism(part.noise_multiplier, part.sample_rate, 1),), delta_error / (8 * steps)) for part in merged)
    reach = max(_rdp(merged, delta_error / 4), *singles) + 3
    if not reach < MOST_LOSS:
        raise ArithmeticError(f"PRV: privacy losses up to {reach:g} overflow")
    return reach


def _mesh(reach: float, error: float, spread: float) -> tuple[Any, float]:
    """(Opacus's domain from -`reach` to `reach` or a little more, the error of ε that it stands for).

    Its points are a number that the Fourier transform likes: a prime one would take it several times as long.
    """
    from opacus.accountants.analysis.prv import Domain
    from scipy.fft import next_fast_len

    error = max(error, 2 * reach * spread / MOST_POINTS)
    width = error / spread
    points = next_fast_len(2 * math.ceil(reach / width) + 2, real=True)
    while points % 2:
        points = next_fast_len(points + 1, real=True)
    edge = (points / 2 - 1.5) * width  # Opacus rounds it outwards to (points / 2 - 1) widths
    return Domain.create_aligned(-edge, edge, width), error
