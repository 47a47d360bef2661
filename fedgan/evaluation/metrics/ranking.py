"""Figures that need no threshold of the classifier's own: area under the ROC curve, average precision, sensitivity at 90 %
specificity. Weighted, and for many rows of weights at once.

A row of weights is one resample of the images, so a bootstrap of a thousand resamples is one call. What depends on the
scores (their order and their ties) is worked out once, as two sparse matrices; what depends on the weights is then two
products and a running sum. Only the distinct scores of positive images matter: nothing here changes at any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

SPECIFICITY = 0.9  # at which the sensitivity is read
ROUNDING = 1e-9  # keeps 7 of 70 false alarms "at most a tenth"
ENTRIES = 1_000_000  # most entries of one array of positive scores × resamples, about 8 MB


@dataclass(frozen=True)
class Curves:
    """Three figures (B,) for B rows of weights; NaN where a row has no weight on positives or none on negatives."""

    auc: np.ndarray
    average_precision: np.ndarray
    sensitivity: np.ndarray


@dataclass(frozen=True)
class Ranking:
    """The order of M scored items, fit to be weighted by the N images that they belong to.

    `hits` (G, N): positive items of each image at each of the G distinct scores of positive items, highest first.
    `steps` (2G, N): all items of each image strictly between two such scores (even rows) and at one (odd rows).
    `members` (N,): items of each image, negatives below the last positive included.
    """

    hits: csr_array
    steps: csr_array
    members: np.ndarray


def ranking(scores: np.ndarray, positive: np.ndarray, images: np.ndarray, count: int) -> Ranking:
    """The ranking of items with scores (M,) and truth (M,) bool that belong to `images` (M,), row numbers below `count`."""
    levels = np.unique(scores[positive])  # ascending
    groups = len(levels)
    above = groups - np.searchsorted(
        levels, scores, side="right"
    )  # positive scores strictly above the item's own
    tied = np.zeros(len(scores), bool)
    if groups:
        tied = levels[np.minimum(np.searchsorted(levels, scores), groups - 1)] == scores
    step = 2 * above + tied
    counted = step < 2 * groups  # the others lie below every positive score
    return Ranking(
        hits=_incidence(above[positive], images[positive], (groups, count)),
        steps=_incidence(step[counted], images[counted], (2 * groups, count)),
        members=np.bincount(images, minlength=count).astype(np.float64),
    )


def curves(ranked: Ranking, weights: np.ndarray) -> Curves:
    """The three figures of a ranking for B rows of image weights (B, N); `weighted_auc` and its neighbours say what they are."""
    groups = ranked.hits.shape[0]
    step = max(1, ENTRIES // max(2 * groups, 1))
    blocks = [
        _curves(ranked, weights[start : start + step]) for start in range(0, len(weights), step)
    ]
    return Curves(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def weighted_auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve (B,) for scores (N,), truth (N,) bool and B rows of image weights (B, N).

    The Mann-Whitney statistic (Hanley and McNeil 1982): the weighted share of positive-negative pairs in which the
    positive scores higher, ties counting one half. NaN where a row has no weight on positives or none on negatives.
    """
    return curves(_plain(scores, positive), weights).auc


def average_precision(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve (B,) as average precision, arguments as in `weighted_auc`.

    The sum over thresholds of (gain of recall) × precision, without interpolation (Davis and Goadrich 2006 say why);
    equal scores are one threshold. At chance it is the share of positives, not 0.5. NaN as in `weighted_auc`.
    """
    return curves(_plain(scores, positive), weights).average_precision


def sensitivity_at_specificity(
    scores: np.ndarray, positive: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The highest sensitivity (B,) of any threshold whose specificity is at least 90 %, arguments as in `weighted_auc`.

    A point of the ROC curve that a threshold can reach: nothing is interpolated, so constant scores have 0.
    """
    return curves(_plain(scores, positive), weights).sensitivity


def _plain(scores: np.ndarray, positive: np.ndarray) -> Ranking:
    return ranking(
        np.asarray(scores), np.asarray(positive, bool), np.arange(len(scores)), len(scores)
    )


def _incidence(rows: np.ndarray, images: np.ndarray, shape: tuple[int, int]) -> csr_array:
    matrix = csr_array((np.ones(len(rows)), (rows, images)), shape=shape)
    matrix.sum_duplicates()
    return matrix


def _curves(ranked: Ranking, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    by_image = np.ascontiguousarray(weights.T)
    hits = ranked.hits @ by_image  # (G, B)
    called = np.cumsum(
        ranked.steps @ by_image, axis=0
    )  # items above (even rows) and down to (odd rows) each score
    found = np.cumsum(hits, axis=0)
    alarms_above, alarms = called[0::2] - (found - hits), called[1::2] - found  # false ones
    positives = hits.sum(0)
    negatives = ranked.members @ by_image - positives
    defined = (positives > 0) & (negatives > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        auc = (hits * (negatives - (alarms_above + alarms) / 2.0)).sum(0) / (positives * negatives)
        precision = np.where(hits > 0, found / called[1::2], 0.0)
        areas = (hits * precision).sum(0) / positives
        reached = (hits * (alarms <= (1.0 - SPECIFICITY) * negatives * (1.0 + ROUNDING))).sum(
            0
        ) / positives
    return tuple(np.where(defined, values, np.nan) for values in (auc, areas, reached))  # type: ignore[return-value]
