"""Metrics of a classifier's decisions: balanced accuracy, F1, expected calibration error.

Each takes probabilities and labels (N, K) and B rows of image weights (B, N) (bootstrap resamples).
Exclusive classes: the most probable class is predicted. Otherwise: every label with at least 0.5.
"""

from __future__ import annotations

import numpy as np

THRESHOLD = 0.5  # of labels that are not exclusive
BINS = 15  # of the calibration error, of equal width


def predictions(probabilities: np.ndarray, exclusive: bool) -> np.ndarray:
    """Predicted labels (N, K) float64 of 0 and 1; of equal probabilities the first class."""
    if not exclusive:
        return (probabilities >= THRESHOLD).astype(np.float64)
    predicted = np.zeros(probabilities.shape)
    predicted[np.arange(len(predicted)), probabilities.argmax(1)] = 1.0
    return predicted


def balanced_accuracy(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray, exclusive: bool
) -> np.ndarray:
    """Balanced accuracy (B,) for probabilities and labels (N, K) and image weights (B, N).

    Exclusive classes: mean recall over the classes present. Otherwise: mean of (sensitivity +
    specificity) / 2 over labels with positives and negatives, at threshold 0.5.
    """
    truth, predicted = labels.astype(np.float64), predictions(probabilities, exclusive)
    parts = share(weights, truth * predicted, truth)
    if not exclusive:
        parts = (parts + share(weights, (1.0 - truth) * (1.0 - predicted), 1.0 - truth)) / 2.0
    return defined_mean(parts)


def f1_scores(predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 = 2 tp / (2 tp + fp + fn) of each label (B, K) for labels (N, K), weights (B, N).

    NaN without weight on positives.
    """
    truth = labels.astype(np.float64)
    positives = weights @ truth
    with np.errstate(invalid="ignore", divide="ignore"):
        f1: np.ndarray = np.where(
            positives > 0,
            2.0 * (weights @ (truth * predicted)) / (positives + weights @ predicted),
            np.nan,
        )
    return f1


def calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray, exclusive: bool
) -> np.ndarray:
    """Expected calibration error (B,) (arXiv 1706.04599, eq. 3); see `balanced_accuracy`.

    Σ_b |B_b| / N · |accuracy(B_b) - confidence(B_b)| over 15 bins of equal width. Exclusive
    classes: of the confidence of the most probable class. Otherwise: mean over labels of the same
    error of the label's probability.
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
    """Weighted hits among weighted members, (B, K) for weights (B, N); NaN without members."""
    total = weights @ members
    with np.errstate(invalid="ignore", divide="ignore"):
        part: np.ndarray = np.where(total > 0, (weights @ hits) / total, np.nan)
    return part


def defined_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the defined values over the last axis; NaN where none is defined."""
    defined = np.isfinite(values)
    count = defined.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: np.ndarray = np.where(
            count > 0, np.where(defined, values, 0.0).sum(-1) / count, np.nan
        )
    return mean
