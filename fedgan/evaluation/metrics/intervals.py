"""Confidence intervals: percentile bootstrap, Wilson (share), Newcombe (difference of shares)."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri

LEVEL = 0.95

Interval = tuple[float, float]


def percentile_interval(values: np.ndarray, level: float = LEVEL) -> Interval:
    """Percentile interval of bootstrap values (B,) (Efron and Tibshirani 1993, chapter 13)."""
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(values, [tail, 100.0 - tail])
    return float(low), float(high)


def wilson_interval(share: float, count: float, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a binomial share of `count` draws (Wilson 1927).

    Its width is never 0: a share of 0 has [0, 3.8 / (n + 3.8)] at 95 %.
    """
    z = float(ndtri(0.5 + level / 2))
    z2 = z**2
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, float(center - half)), min(1.0, float(center + half))


def newcombe_interval(
    first: float, first_ci: Interval, second: float, second_ci: Interval
) -> Interval:
    """Interval of the difference of two independent shares (Newcombe 1998, method 10)."""
    gap = first - second
    low = gap - np.hypot(first - first_ci[0], second_ci[1] - second)
    high = gap + np.hypot(first_ci[1] - first, second - second_ci[0])
    return float(low), float(high)


def effective_size(count: int, groups: np.ndarray | None) -> float:
    """Kish's effective sample size n² / Σ m² of n images, m per group; n without groups.

    `groups` (n,): the patient of each image. Exact where all images of a patient are alike, else an
    underestimate: intervals made with it err on the wide side. Raises `ValueError` for another
    length.
    """
    if groups is None:
        return float(count)
    if len(groups) != count:
        raise ValueError(f"{len(groups)} groups for {count} images")
    sizes = np.unique(np.asarray(groups), return_counts=True)[1].astype(np.float64)
    return float(count**2 / np.square(sizes).sum())
