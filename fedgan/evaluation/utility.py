"""Utility: what a classifier's scores on real test images are worth. Arrays in, numbers out.

Every figure is the mean over classifiers trained with different seeds; its 95 % interval is the percentile bootstrap of
that mean over test images (over patients where they are known). The interval speaks of the test set's size, not of
the spread between seeds, which `macro_auc_seeds` shows. Resamples that lack a class of the macro mean are left out; where
that is more than half of them there is no interval. An AUC below 0.5 is reported as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedgan.evaluation.bootstrap import interval, resamples

NO_FINDING = "no finding"
NORMAL = (NO_FINDING, "normal", "none")  # labels that say what an all-zero vector would say


def weighted_auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve (B,) for scores (N,), truth (N,) bool and B rows of image weights (B, N).

    The Mann-Whitney statistic (Hanley and McNeil 1982): the weighted share of positive-negative pairs in which the
    positive scores higher, ties counting one half. NaN where a row has no weight on positives or none on negatives.
    """
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])  # one group for each distinct score
    sorted_weights, truth = weights[:, order], positive[order].astype(np.float64)
    positives = np.add.reduceat(sorted_weights * truth, starts, axis=1)
    negatives = np.add.reduceat(sorted_weights * (1.0 - truth), starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    pairs = positives.sum(1) * negatives.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        auc: np.ndarray = np.where(pairs > 0, (positives * (below + 0.5 * negatives)).sum(1) / pairs, np.nan)
    return auc


def balanced_accuracy(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray, exclusive: bool) -> np.ndarray:
    """Balanced accuracy (B,) for probabilities and labels (N, K) and B rows of image weights (B, N).

    Exclusive classes: mean over the classes present of the recall of the most probable class. Otherwise: mean over
    labels with positives and negatives of (sensitivity + specificity) / 2 at the threshold 0.5.
    """
    truth = labels.astype(np.float64)
    if exclusive:
        called = np.zeros_like(truth)
        called[np.arange(len(truth)), probabilities.argmax(1)] = 1.0
        parts = _share(weights, truth * called, truth)
    else:
        called = (probabilities >= 0.5).astype(np.float64)
        sensitivity = _share(weights, truth * called, truth)
        specificity = _share(weights, (1.0 - truth) * (1.0 - called), 1.0 - truth)
        parts = (sensitivity + specificity) / 2.0
    return _nanmean(parts)


def names_normal(label_names: tuple[str, ...]) -> bool:
    """Whether one of the labels itself says that nothing was found."""
    return any(name.lower().replace("_", " ") in NORMAL for name in label_names)


def with_no_finding(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add a last column 'no finding' to multi-label probabilities (S, N, K) and labels (N, K): the product of 1 - p."""
    none = np.prod(1.0 - probabilities, axis=2, keepdims=True)
    return np.concatenate([probabilities, none], axis=2), np.c_[labels, (labels.sum(1) == 0).astype(labels.dtype)]


def statistics(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray, exclusive: bool) -> dict[str, np.ndarray]:
    """AUC by class, macro AUC and balanced accuracy, means over seeds, for B rows of image weights (B, N).

    probabilities (S, N, K), labels (N, K) → `auc` (B, K), `macro_auc` (B,), `balanced_accuracy` (B,). For multi-label
    data `auc` has one further column, normal (no finding) against the rest, which the macro mean leaves out.
    """
    classes = labels.shape[1]
    scores, truth = (probabilities, labels) if exclusive else with_no_finding(probabilities, labels)
    by_seed = np.stack(
        [
            np.stack([weighted_auc(seed[:, k], truth[:, k] == 1, weights) for k in range(truth.shape[1])], axis=1)
            for seed in scores
        ]
    )
    accuracy = np.mean([balanced_accuracy(seed, labels, weights, exclusive) for seed in probabilities], axis=0)
    auc = by_seed.mean(0)
    return {"auc": auc, "macro_auc": _nanmean(auc[:, :classes]), "balanced_accuracy": accuracy}


def utility(
    probabilities: np.ndarray,
    labels: np.ndarray,
    label_names: tuple[str, ...],
    exclusive: bool,
    groups: np.ndarray,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """All figures of one arm on one set of test images, as evaluation.json has them.

    probabilities (S, N, K) of S classifiers, labels (N, K), groups (N,) the cluster (patient) of each image.
    `macro_auc` is the mean over the classes with both positive and negative test images; the others are None.
    """
    point = statistics(probabilities, labels, np.ones((1, len(labels))), exclusive)
    blocks = [statistics(probabilities, labels, weights, exclusive) for weights in resamples(groups, bootstrap, seed)]
    drawn = {key: np.concatenate([block[key] for block in blocks]) for key in point}
    # A resample without one of the classes has the mean of other classes: another quantity, so it is left out.
    counted = np.isfinite(point["auc"][0, : len(label_names)])
    lacking = (~np.isfinite(drawn["auc"][:, : len(label_names)]) & counted).any(axis=1)
    for key in ("macro_auc", "balanced_accuracy"):
        drawn[key][lacking] = np.nan
    names = label_names if exclusive else (*label_names, NO_FINDING)
    truth = labels if exclusive else with_no_finding(probabilities, labels)[1]
    seeds = [statistics(one[None], labels, np.ones((1, len(labels))), exclusive)["macro_auc"][0] for one in probabilities]
    per_class = {
        name: {
            "auc": number(point["auc"][0, k]),
            "auc_ci": interval(drawn["auc"][:, k]) if np.isfinite(point["auc"][0, k]) else None,
            "positives": int(truth[:, k].sum()),
        }
        for k, name in enumerate(names)
        if k < len(label_names) or (not names_normal(label_names) and 0 < truth[:, k].sum() < len(truth))
    }
    return {
        "macro_auc": number(point["macro_auc"][0]),
        "macro_auc_ci": interval(drawn["macro_auc"]),
        "macro_auc_seeds": [number(value) for value in seeds],
        "balanced_accuracy": number(point["balanced_accuracy"][0]),
        "balanced_accuracy_ci": interval(drawn["balanced_accuracy"]),
        "per_class": per_class,
        "images": len(labels),
    }


def number(value: float) -> float | None:
    """A Python float, or None for what is not defined."""
    return float(value) if np.isfinite(value) else None


def _share(weights: np.ndarray, hits: np.ndarray, members: np.ndarray) -> np.ndarray:
    total = weights @ members
    with np.errstate(invalid="ignore", divide="ignore"):
        share: np.ndarray = np.where(total > 0, (weights @ hits) / total, np.nan)
    return share


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of the defined values; NaN where none is."""
    defined = np.isfinite(values)
    count = defined.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: np.ndarray = np.where(count > 0, np.where(defined, values, 0.0).sum(-1) / count, np.nan)
    return mean
