"""Threshold-free metrics: ROC AUC, average precision, sensitivity at 90 % specificity.

Weighted, for many rows of weights at once: each row is one bootstrap resample of the images. What
depends on scores (order, ties) is computed once as two sparse matrices; what depends on weights is
then two products and a cumulative sum. Only the distinct scores of positive images matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

SPECIFICITY = 0.9  # at which sensitivity is measured
ROUNDING = 1e-9  # 7 of 70 false positives count as at most 10 %
ENTRIES = 1_000_000  # of one array of positive scores × resamples, about 8 MB


@dataclass(frozen=True)
class RankingMetrics:
    """Three metrics (B,) for B rows of weights; NaN without weight on positives or on negatives."""

    auc: np.ndarray
    average_precision: np.ndarray
    sensitivity: np.ndarray


@dataclass(frozen=True)
class Ranking:
    """The order of M scored items, ready to be weighted by the N images that they belong to.

    `hits` (G, N): positive items of each image at each of the G distinct scores of positive items,
    highest first. `steps` (2G, N): all items of each image strictly between two such scores (even
    rows) and at one (odd rows). `members` (N,): items of each image, including negatives below the
    last positive.
    """

    hits: csr_array
    steps: csr_array
    members: np.ndarray


def ranking(scores: np.ndarray, positive: np.ndarray, images: np.ndarray, count: int) -> Ranking:
    """Rank items with scores (M,) and truth (M,) bool of `images` (M,), numbers < `count`."""
    levels = np.unique(scores[positive])  # ascending
    groups = len(levels)
    above = groups - np.searchsorted(levels, scores, side="right")  # positive scores above its own
    tied = np.zeros(len(scores), bool)
    if groups:
        tied = levels[np.minimum(np.searchsorted(levels, scores), groups - 1)] == scores
    step = 2 * above + tied
    counted = step < 2 * groups  # the others are below every positive score
    return Ranking(
        hits=_incidence(above[positive], images[positive], (groups, count)),
        steps=_incidence(step[counted], images[counted], (2 * groups, count)),
        members=np.bincount(images, minlength=count).astype(np.float64),
    )


def ranking_metrics(ranked: Ranking, weights: np.ndarray) -> RankingMetrics:
    """The three metrics of a ranking for B rows of image weights (B, N)."""
    groups = ranked.hits.shape[0]
    step = max(1, ENTRIES // max(2 * groups, 1))
    blocks = [
        _metrics(ranked, weights[start : start + step]) for start in range(0, len(weights), step)
    ]
    return RankingMetrics(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def weighted_auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """ROC AUC (B,) for scores (N,), truth (N,) bool and image weights (B, N).

    The Mann-Whitney statistic P(s₊ > s₋) + P(s₊ = s₋) / 2 (Hanley and McNeil 1982), weighted. NaN
    without weight on positives or on negatives.
    """
    return ranking_metrics(_plain(scores, positive), weights).auc


def average_precision(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision (B,), arguments as in `weighted_auc`.

    Σ_t (recall_t - recall_{t-1}) · precision_t, without interpolation (Davis and Goadrich 2006);
    equal scores are one threshold. Chance is the share of positives. NaN as in `weighted_auc`.
    """
    return ranking_metrics(_plain(scores, positive), weights).average_precision


def sensitivity_at_specificity(
    scores: np.ndarray, positive: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Highest sensitivity (B,) at a specificity of at least 90 %, arguments as in `weighted_auc`.

    A point of the ROC curve that a threshold can reach: no interpolation, so constant scores have
    0.
    """
    return ranking_metrics(_plain(scores, positive), weights).sensitivity


def _plain(scores: np.ndarray, positive: np.ndarray) -> Ranking:
    return ranking(
        np.asarray(scores), np.asarray(positive, bool), np.arange(len(scores)), len(scores)
    )


def _incidence(rows: np.ndarray, images: np.ndarray, shape: tuple[int, int]) -> csr_array:
    matrix = csr_array((np.ones(len(rows)), (rows, images)), shape=shape)
    matrix.sum_duplicates()
    return matrix


def _metrics(ranked: Ranking, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    by_image = np.ascontiguousarray(weights.T)
    hits = ranked.hits @ by_image  # (G, B)
    # Items above (even rows) and down to (odd rows) each score.
    called = np.cumsum(ranked.steps @ by_image, axis=0)
    found = np.cumsum(hits, axis=0)
    alarms_above, alarms = called[0::2] - (found - hits), called[1::2] - found  # false positives
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
    figures = (np.where(defined, values, np.nan) for values in (auc, areas, reached))
    return tuple(figures)  # type: ignore[return-value]
