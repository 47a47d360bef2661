"""How well scores tell members from non-members, with intervals: arrays of scores in, numbers out.

An image counts as often as its weight says, so that one sweep over the sorted scores serves the figure itself (all
weights 1) and every resample of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.stats import norm

LEVEL = 0.95
CHUNK = 1_000_000  # most entries of one block of resamples × images, 8 MB

Interval = tuple[float, float]


def roc_figures(
    members: np.ndarray,
    non_members: np.ndarray,
    weights: tuple[np.ndarray, np.ndarray],
    rates: tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """AUC (B,) and true-positive rates (B, R) at the false-positive rates `rates`, of scores that are higher for members.

    `members` (M,), `non_members` (M',) scores; `weights` (B, M) and (B, M'): how often each image counts. AUC is the
    probability that a member has the higher score, ties half (Mann-Whitney). The rate at x is the highest one of a
    threshold whose false-positive rate is x at most: nothing is interpolated, for an attacker cannot use half a threshold
    (arXiv 2112.03570 reports membership attacks so).
    """
    scores = np.concatenate([members, non_members])
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(
        np.append(np.diff(scores[order]) != 0, True)
    )  # the last of each run of equal scores
    count = len(weights[0])
    hits = np.concatenate([weights[0], np.zeros((count, len(non_members)))], 1)[:, order].cumsum(1)[
        :, ends
    ]
    alarms = np.concatenate([np.zeros((count, len(members))), weights[1]], 1)[:, order].cumsum(1)[
        :, ends
    ]
    hits, alarms = (np.concatenate([np.zeros((count, 1)), part], 1) for part in (hits, alarms))
    area = (np.diff(alarms, axis=1) * (hits[:, 1:] + hits[:, :-1]) / 2).sum(1)
    auc = area / (hits[:, -1] * alarms[:, -1])
    found = []
    for rate in rates:
        # Both curves rise, so the last threshold that is still allowed is the best one.
        last = (alarms <= rate * alarms[:, -1:] + 1e-9).sum(1) - 1
        found.append(hits[np.arange(count), last] / hits[:, -1])
    return auc, np.stack(found, 1) if found else np.empty((count, 0))


def resamples(
    groups: np.ndarray, other_groups: np.ndarray, count: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of weights (b, N) and (b, N') of the two-sample bootstrap, `count` resamples in all.

    Each side is drawn by itself, with replacement, by group: `groups` (N,) numbers from 0 without gaps. Images of one
    patient are not independent, so a resample takes or leaves all of them together.
    """
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // (len(groups) + len(other_groups)))
    for start in range(0, count, step):
        size = min(step, count - start)
        yield _draw(groups, size, rng), _draw(other_groups, size, rng)


def _draw(groups: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    total = int(groups.max()) + 1
    drawn: np.ndarray = rng.multinomial(total, np.full(total, 1.0 / total), size=size)[:, groups]
    return drawn.astype(np.float64)


def group_numbers(groups: np.ndarray | None, count: int) -> np.ndarray:
    """Groups (N,) of any kind (patients) as numbers from 0; every image its own group where there are none.

    Raises `ValueError` when there are not as many as images.
    """
    if groups is None:
        return np.arange(count)
    if len(groups) != count:
        raise ValueError(f"{len(groups)} groups do not fit {count} scores: give one an image")
    return np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)


def percentile_interval(values: np.ndarray, level: float = LEVEL) -> Interval:
    """Percentile interval of bootstrap values (B,) (Efron and Tibshirani 1993, chapter 13)."""
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(values, [tail, 100.0 - tail])
    return float(low), float(high)


def wilson_interval(share: float, count: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a share of `count` images (Wilson 1927). Never of no width, not even at 0 or 1."""
    z = float(norm.ppf(0.5 + level / 2))
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z
        / (1 + z * z / count)
        * float(np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)))
    )
    return max(0.0, middle - half), min(1.0, middle + half)
