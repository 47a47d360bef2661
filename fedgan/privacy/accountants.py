"""Bounds of ε at δ: Rényi DP, PRV, and the closed form of the Gaussian mechanism.

Each takes mechanisms in the order of `accounting.merge`. PRV (arXiv 2106.02848) discretises the
privacy loss of one step and composes by Fourier transform. Opacus does this with an absolute error
and two transforms per mechanism, which takes minutes for millions of steps; here the mesh follows
from the allowed relative error, and all mechanisms share one inverse transform. The Rényi
divergences, and ε of a composed loss, come from Opacus.

Neighbouring data sets differ by one unit that is added or removed. The loss is that of the removal,
which is the larger one at every ε ≥ 0 for Poisson-sampled Gaussian noise; tests/test_accounting.py
compares it with another library's bound of both directions.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

TOLERANCE = 0.005  # PRV's error of ε as a share of RDP's ε; the upper end is reported
ROUGH = 0.05  # the same for a first search
MAX_POINTS = 2**22  # of PRV's mesh: 300 MB, one or two seconds; beyond it the error grows
MAX_TOTAL_POINTS = 4 * MAX_POINTS  # over all mechanisms
MAX_LOSS = 600.0  # above it exp(privacy loss) overflows a double
# Fractional orders take a hundred times as long.
ORDERS = (*(1 + x / 10 for x in range(1, 50)), *range(6, 64), 128, 256, 512, 1024)
FEW_ORDERS = (1.2, 1.5, 1.8, 2.5, 3.5, *range(2, 33), 40, 48, 64, 128, 256)


@dataclass(frozen=True)
class Mechanism:
    """`steps` releases of a sum over a Poisson sample that holds each unit with `sample_rate`.

    `noise_multiplier`: standard deviation of the noise over the sensitivity of the sum.
    `sample_rate` 1: no sampling (a plain Gaussian mechanism).
    """

    noise_multiplier: float
    sample_rate: float
    steps: int = 1


Merged = tuple[Mechanism, ...]

# --- in closed form -------------------------------------------------------------------------------


def gaussian(noise: float, delta: float) -> float:
    """ε of one Gaussian mechanism without sampling (arXiv 1805.06530).

    The root of Φ(1/2σ − εσ) − e^ε Φ(−1/2σ − εσ) = δ.
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr, ndtr

    def excess(epsilon: float) -> float:
        half = 1 / (2 * noise)
        return (
            float(
                ndtr(half - epsilon * noise)
                - math.exp(min(0.0, epsilon + log_ndtr(-half - epsilon * noise)))
            )
            - delta
        )

    if excess(0.0) <= 0:
        return 0.0
    # A tail bound of the privacy loss.
    high = 1 / (2 * noise**2) + math.sqrt(2 * math.log(1 / delta)) / noise
    return float(brentq(excess, 0.0, high, xtol=1e-12, rtol=1e-12)) * (1 + 1e-9)


# --- by Rényi divergences -------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def rdp(merged: Merged, delta: float, orders: tuple[float, ...] = ORDERS) -> float:
    """ε by Rényi differential privacy (arXiv 1908.10530), an upper bound for any `orders`."""
    from opacus.accountants.analysis.rdp import get_privacy_spent

    total = sum(
        part.steps * _divergences(part.noise_multiplier, part.sample_rate, orders)
        for part in merged
    )
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return max(0.0, float(get_privacy_spent(orders=list(orders), rdp=total, delta=delta)[0]))


def divergence(step: Mechanism, order: float) -> float:
    """Rényi divergence of one step like `step`, at an order above 1."""
    return float(_divergences(step.noise_multiplier, step.sample_rate, (order,))[0])


def rdp_budget(order: float, epsilon: float, delta: float) -> float:
    """The divergence of `order` that gives ε at δ (arXiv 1905.09982, theorem 21)."""
    return epsilon - math.log1p(-1 / order) + (math.log(delta) + math.log(order)) / (order - 1)


@functools.lru_cache(maxsize=4096)
def _divergences(noise: float, sample_rate: float, orders: tuple[float, ...]) -> np.ndarray:
    """Rényi divergence (orders,) of one step."""
    from opacus.accountants.analysis.rdp import compute_rdp

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return np.asarray(
            compute_rdp(q=sample_rate, noise_multiplier=noise, steps=1, orders=list(orders))
        )


# --- by numerical composition ---------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def prv(merged: Merged, delta: float, tolerance: float = TOLERANCE) -> float:
    """The upper end of ε by PRV; its error is `tolerance` of Rényi's ε.

    The mesh follows from the error (theorem 5.5), so that a large ε takes no more time than a small
    one. Raises `ArithmeticError` where doubles are not precise enough.
    """
    bound, delta_error = rdp(merged, delta), delta / 1000
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            spread = math.sqrt(sum(part.steps for part in merged) * math.log(12 / delta_error) / 2)
            points = min(MAX_POINTS, MAX_TOTAL_POINTS // len(merged))
            width, half, error = _mesh(
                _reach(merged, delta_error), tolerance * bound, spread, points
            )
            pmf, offset, drift = _composed(merged, width, half)
            if not (abs(drift) < error / 10 and abs(pmf.sum() - 1) < delta_error):
                raise ArithmeticError("PRV: the composed distribution is not the sum of its parts")
            upper = _read(np.maximum(pmf[half - 1 :], 0.0), offset, width, delta, delta_error)
    except (RuntimeError, ValueError, IndexError, MemoryError) as problem:
        raise ArithmeticError(f"PRV: {problem}") from None
    if not math.isfinite(upper):
        raise ArithmeticError("PRV: no finite epsilon")
    return max(0.0, upper) + error


def _reach(merged: Merged, delta_error: float) -> float:
    """The privacy loss beyond which the tail is negligible (remark 5.6)."""
    steps = sum(part.steps for part in merged)
    singles = (
        rdp((Mechanism(part.noise_multiplier, part.sample_rate, 1),), delta_error / (8 * steps))
        for part in merged
    )
    reach = max(rdp(merged, delta_error / 4), *singles) + 3
    if not reach < MAX_LOSS:
        raise ArithmeticError(f"PRV: privacy losses up to {reach:g} overflow")
    return reach


def _mesh(reach: float, error: float, spread: float, points: int) -> tuple[float, int, float]:
    """(mesh width, points on each side of 0, error of ε), at least from -`reach` to `reach`.

    2·half points, -half … half - 1, a length with a fast Fourier transform; a prime length would
    take several times as long.
    """
    from scipy.fft import next_fast_len

    error = max(error, 2 * reach * spread / points)
    width = error / spread
    half = next_fast_len(math.ceil(reach / width) + 1, real=True)
    return width, half, error


def _composed(merged: Merged, width: float, half: int) -> tuple[np.ndarray, float, float]:
    """Compose all steps: (P(loss = offset + k·width), offset, error of the mean).

    k = -half … half - 1. Each step's loss is rounded to the mesh, and a shift keeps its mean. Over
    millions of steps the shifts exceed the mesh, so whole widths of their sum go into the numbering
    of the mesh, and only the rest is `offset`. (The convolution is circular: shifting its result
    would put the sum a whole period too low, an ε of 0.5 instead of 9.)
    """
    from scipy.fft import irfft, rfft

    number = np.arange(-half, half, dtype=float)
    product, shift, mean = np.ones(half + 1, complex), 0.0, 0.0
    for part in merged:
        single = _discrete(part, width, half)
        exact = _mean(part, width * half)
        shift += part.steps * (exact - width * float(number @ single))
        mean += part.steps * exact
        product *= rfft(np.roll(single, half)) ** part.steps  # loss 0 first
    cells = round(shift / width)
    pmf = np.roll(irfft(product, 2 * half), half + cells)
    offset = shift - cells * width
    return pmf, offset, mean - (width * float(number @ pmf) + offset)


def _discrete(part: Mechanism, width: float, half: int) -> np.ndarray:
    """P(loss of one step rounds to k·width), k = -half … half - 1, given that it is in range."""
    survival = _survival(
        (np.arange(-half, half + 1) - 0.5) * width, part.noise_multiplier, part.sample_rate
    )
    return (survival[:-1] - survival[1:]) / (survival[0] - survival[-1])


def _survival(loss: np.ndarray, noise: float, q: float) -> np.ndarray:
    """P(ln(1 - q + q exp((2x - 1) / 2σ²)) > loss), x ~ (1-q) N(0, σ²) + q N(1, σ²).

    `loss`: increasing. Upper tails, which determine ε, are computed directly, not as 1 - P.
    """
    from scipy.special import ndtr

    result = np.ones(len(loss))
    # No loss is below ln(1 - q).
    first = int(np.searchsorted(loss, math.log1p(-q), side="right")) if q < 1 else 0
    above = loss[first:]
    x = noise * (np.log((np.expm1(above) + q) / q) if q < 1 else above)
    x = x + 1 / (2 * noise)  # in units of σ
    result[first:] = q * ndtr(1 / noise - x) + ((1 - q) * ndtr(-x) if q < 1 else 0.0)
    return result


def _mean(part: Mechanism, reach: float) -> float:
    """The mean of one step's loss within ±`reach`, exact enough for millions of steps.

    A trapezoidal sum, which is exact to the last digits for such smooth functions. Opacus's
    quadrature has an error of 1e-8: 0.01 and more after 2.4 million steps.
    """
    noise, q = part.noise_multiplier, part.sample_rate
    x = np.arange(-12 * noise, 1 + 12 * noise, noise / 64)
    weights = (1 - q) * np.exp(-(x**2) / (2 * noise**2)) + q * np.exp(
        -((x - 1) ** 2) / (2 * noise**2)
    )
    slope = (2 * x - 1) / (2 * noise**2)
    loss = np.log1p(q * np.expm1(np.minimum(slope, 1.0))) if q < 1 else slope
    high = slope > 1.0  # where expm1 may overflow
    loss = np.where(high, slope + np.log(q + (1 - q) * np.exp(-slope)), loss)
    inside = np.abs(loss) <= reach
    return float((weights * loss)[inside].sum() / weights[inside].sum())


def _read(pmf: np.ndarray, offset: float, width: float, delta: float, delta_error: float) -> float:
    """The least ε ≥ 0 at δ - `delta_error` of the loss `offset` + (k - 1)·`width`, P = pmf[k].

    Smaller losses do not count for an ε ≥ 0; the first of these is negative.
    """
    from opacus.accountants.analysis.prv import DiscretePRV, Domain

    pmf = pmf[: len(pmf) // 2 * 2]  # Opacus needs an even number
    losses = offset + width * np.arange(-1, len(pmf) - 1)
    if float(pmf @ np.maximum(-np.expm1(-losses), 0.0)) <= delta - delta_error:
        return 0.0  # ε = 0 holds
    found: Any = DiscretePRV(pmf, Domain(float(losses[0]), float(losses[-1]), len(pmf)))
    return float(found.compute_epsilon(delta, delta_error, 0.0)[2])
