"""Figures of what a classifier decides and how sure it is: balanced accuracy, F1, calibration error.

Each takes probabilities and labels (N, K) and B rows of image weights (B, N), as the bootstrap draws them. Exclusive
classes: the most probable class is the one that is called. Otherwise every label of at least 0.5 is.
"""

from __future__ import annotations

import numpy as np

THRESHOLD = 0.5  # of a label that others do not exclude
BINS = 15  # of equal width, of the calibration error


def called(probabilities: np.ndarray, exclusive: bool) -> np.ndarray:
    """What is called, (N, K) float64 of 0 and 1, for probabilities (N, K); of equal probabilities the first class is."""
    if not exclusive:
        return (probabilities >= THRESHOLD).astype(np.float64)
    calls = np.zeros(probabilities.shape)
    calls[np.arange(len(calls)), probabilities.argmax(1)] = 1.0
    return calls


def balanced_accuracy(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray, exclusive: bool
) -> np.ndarray:
    """Balanced accuracy (B,) for probabilities and labels (N, K) and B rows of image weights (B, N).

    Exclusive classes: mean over the classes present of the recall of the most probable class. Otherwise: mean over
    labels with positives and negatives of (sensitivity + specificity) / 2 at the threshold 0.5.
    """
    truth, calls = labels.astype(np.float64), called(probabilities, exclusive)
    parts = share(weights, truth * calls, truth)
    if not exclusive:
        parts = (parts + share(weights, (1.0 - truth) * (1.0 - calls), 1.0 - truth)) / 2.0
    return defined_mean(parts)


def f1_scores(calls: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 = 2 tp / (2 tp + fp + fn) of each label (B, K) for calls and labels (N, K) and B rows of image weights (B, N).

    NaN where a row has no weight on positives: there the figure says nothing about finding them.
    """
    truth = labels.astype(np.float64)
    positives = weights @ truth
    with np.errstate(invalid="ignore", divide="ignore"):
        f1: np.ndarray = np.where(
            positives > 0, 2.0 * (weights @ (truth * calls)) / (positives + weights @ calls), np.nan
        )
    return f1


def calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray, exclusive: bool
) -> np.ndarray:
    """Expected calibration error (B,), arguments as in `balanced_accuracy` (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    Exclusive classes: 15 bins of equal width of the confidence of the most probable class; the mean over images of
    |confidence - share that is right| of their bin. Otherwise: the mean over labels of the same error of that label's
    probability against how often the label is there.
    """
    rows = np.arange(len(labels))
    if exclusive:
        best = probabilities.argmax(1)
        columns = [(probabilities[rows, best], labels[rows, best])]
    else:
        columns = list(zip(probabilities.T, labels.T, strict=True))
    total = weights.sum(1)
    errors = []
    for confidence, truth in columns:
        gaps = np.zeros((len(rows), BINS))
        gaps[rows, np.minimum((confidence * BINS).astype(np.int64), BINS - 1)] = confidence - truth
        errors.append(np.abs(weights @ gaps).sum(1) / total)
    return np.mean(errors, axis=0) if errors else np.full(len(weights), np.nan)


def share(weights: np.ndarray, hits: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Weighted hits among weighted members, (B, K) for B rows of weights (B, N) and (N, K) of each; NaN without members."""
    total = weights @ members
    with np.errstate(invalid="ignore", divide="ignore"):
        part: np.ndarray = np.where(total > 0, (weights @ hits) / total, np.nan)
    return part


def defined_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of the defined values; NaN where none is."""
    defined = np.isfinite(values)
    count = defined.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: np.ndarray = np.where(
            count > 0, np.where(defined, values, 0.0).sum(-1) / count, np.nan
        )
    return mean
