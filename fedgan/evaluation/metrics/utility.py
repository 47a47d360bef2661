"""Utility metrics of classifiers on real test images (TSTR, TRTR, mixed).

Every figure is the mean over classifiers trained with different seeds. Its 95 % interval is the
percentile bootstrap of this mean over test images (over patients where known): it covers the size
of the test set, not the spread between seeds, which `macro_auc_seeds` shows. Resamples that lack a
class of the macro mean are left out; where this is more than half, there is no interval. An AUC
below 0.5 is reported unchanged.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedgan.evaluation.metrics.bootstrap import interval, resamples
from fedgan.evaluation.metrics.ranking import Ranking, ranking, ranking_metrics
from fedgan.evaluation.metrics.thresholded import (
    balanced_accuracy,
    calibration_error,
    defined_mean,
    f1_scores,
    predictions,
)

NO_FINDING = "no finding"
NORMAL = (NO_FINDING, "normal", "none")  # labels with the meaning of an all-zero vector

MACRO = {
    "macro_auc": "auc",
    "macro_auprc": "auprc",
    "macro_f1": "f1",
    "sensitivity_at_90": "sensitivity",
}
MICRO = ("micro_auc", "micro_auprc", "balanced_accuracy", "ece")
FIGURES = (*MACRO, *MICRO)  # each with an interval


def names_normal(label_names: tuple[str, ...]) -> bool:
    """Whether one of the labels means that nothing was found."""
    return any(name.lower().replace("_", " ") in NORMAL for name in label_names)


def with_no_finding(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add a last column 'no finding', Π (1 - p), to probabilities (S, N, K) and labels (N, K)."""
    none = np.prod(1.0 - probabilities, axis=2, keepdims=True)
    return np.concatenate([probabilities, none], axis=2), np.c_[
        labels, (labels.sum(1) == 0).astype(labels.dtype)
    ]


def majority_scores(train_labels: np.ndarray, count: int, exclusive: bool) -> np.ndarray:
    """Scores (1, count, K) of the majority classifier: the shares of the training labels.

    Baseline of `utility`: AUC 0.5 by ties within each class, average precision the share of
    positives, balanced accuracy 1 / K. Only the micro figures exceed chance, as they compare scores
    of several labels.
    """
    labels = np.asarray(train_labels, np.float64)
    prevalence = labels.mean(0) if len(labels) else np.zeros(labels.shape[1])
    if exclusive and prevalence.sum() > 0:
        prevalence = prevalence / prevalence.sum()
    return np.tile(prevalence, (1, count, 1))


class Scored:
    """Probabilities (S, N, K) of S classifiers on N images with labels (N, K), ranked once.

    Multi-label data get a last column 'no finding', which macro and micro figures leave out; it is
    predicted where the product of 1 - p is at least 0.5.
    """

    def __init__(self, probabilities: np.ndarray, labels: np.ndarray, exclusive: bool) -> None:
        self.probabilities, self.labels, self.exclusive = probabilities, labels, exclusive
        self.scores, self.truth = (
            (probabilities, labels) if exclusive else with_no_finding(probabilities, labels)
        )
        count, classes = labels.shape
        every = np.arange(count)
        self.by_class: list[list[Ranking]] = [
            [
                ranking(seed[:, k], self.truth[:, k] == 1, every, count)
                for k in range(self.truth.shape[1])
            ]
            for seed in self.scores
        ]
        pairs = np.repeat(every, classes)
        self.micro = [
            ranking(seed.ravel(), labels.ravel() == 1, pairs, count) for seed in probabilities
        ]

    def statistics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The figures for image weights (B, N), as the function `statistics` lists them."""
        classes = self.labels.shape[1]
        rows = [[ranking_metrics(one, weights) for one in seed] for seed in self.by_class]
        micro = [ranking_metrics(one, weights) for one in self.micro]
        found = {
            "auc": _over_seeds([[one.auc for one in seed] for seed in rows]),
            "auprc": _over_seeds([[one.average_precision for one in seed] for seed in rows]),
            "sensitivity": _over_seeds([[one.sensitivity for one in seed] for seed in rows]),
            "f1": np.mean(
                [
                    f1_scores(predictions(seed, self.exclusive), self.truth, weights)
                    for seed in self.scores
                ],
                axis=0,
            ),
            "micro_auc": np.mean([one.auc for one in micro], axis=0),
            "micro_auprc": np.mean([one.average_precision for one in micro], axis=0),
        }
        for name, measure in (("balanced_accuracy", balanced_accuracy), ("ece", calibration_error)):
            each = [
                measure(seed, self.labels, weights, self.exclusive) for seed in self.probabilities
            ]
            found[name] = np.mean(each, axis=0)
        return {
            **found,
            **{name: defined_mean(found[one][:, :classes]) for name, one in MACRO.items()},
        }


def statistics(
    probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray, exclusive: bool
) -> dict[str, np.ndarray]:
    """All figures, means over seeds, of probabilities (S, N, K), labels (N, K), weights (B, N).

    Per class, (B, K): `auc`, `auprc`, `f1`, `sensitivity` (at 90 % specificity). Overall, (B,): the
    macro means `macro_auc`, `macro_auprc`, `macro_f1`, `sensitivity_at_90` over the classes where
    they are defined; `micro_auc` and `micro_auprc` over all (image, label) pairs;
    `balanced_accuracy`; `ece`. Multi-label data have one more class column, 'no finding', outside
    macro and micro figures.
    """
    return Scored(probabilities, labels, exclusive).statistics(weights)


def utility(
    probabilities: np.ndarray,
    labels: np.ndarray,
    label_names: tuple[str, ...],
    exclusive: bool,
    groups: np.ndarray,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """All figures of one arm on one set of test images, as in evaluation.json.

    probabilities (S, N, K) of S classifiers, labels (N, K), groups (N,) the cluster (patient) of
    each image. Macro figures are means over the classes with positive and negative test images (F1:
    with positive ones); undefined figures are None. `sensitivity_at_90`: macro mean of the highest
    sensitivity at a specificity of at least 90 %. `ece`: calibration error of the most probable
    class (15 bins), for multi-label data the mean over labels. All intervals share `bootstrap`
    resamples. Resampling adds noise to a calibration error, so the interval of `ece` is biased
    upwards.
    """
    scored = Scored(probabilities, labels, exclusive)
    once = np.ones((1, len(labels)))
    point = scored.statistics(once)
    blocks = [scored.statistics(weights) for weights in resamples(groups, bootstrap, seed)]
    drawn = {key: np.concatenate([block[key] for block in blocks]) for key in point}
    # A resample without one of the classes averages other classes: it is left out.
    counted = np.isfinite(point["auc"][0, : len(label_names)])
    incomplete = (~np.isfinite(drawn["auc"][:, : len(label_names)]) & counted).any(axis=1)
    for key in (*MACRO, "balanced_accuracy"):
        drawn[key][incomplete] = np.nan
    result: dict[str, Any] = {}
    for key in FIGURES:
        result[key] = finite_or_none(point[key][0])
        result[f"{key}_ci"] = interval(drawn[key]) if np.isfinite(point[key][0]) else None
    alone = [
        Scored(one[None], labels, exclusive).statistics(once)["macro_auc"][0]
        for one in probabilities
    ]
    result["macro_auc_seeds"] = [finite_or_none(value) for value in alone]
    result["per_class"] = _per_class(scored.truth, label_names, exclusive, point, drawn)
    result["images"] = len(labels)
    return result


def _per_class(
    truth: np.ndarray,
    label_names: tuple[str, ...],
    exclusive: bool,
    point: dict[str, np.ndarray],
    drawn: dict[str, np.ndarray],
) -> dict[str, Any]:
    """One row per label, and 'no finding' for multi-label images without a label that means it."""
    names = label_names if exclusive else (*label_names, NO_FINDING)
    rows: dict[str, Any] = {}
    for k, name in enumerate(names):
        positives = int(truth[:, k].sum())
        if k >= len(label_names) and (names_normal(label_names) or not 0 < positives < len(truth)):
            continue
        rows[name] = {
            "auc": finite_or_none(point["auc"][0, k]),
            "auc_ci": interval(drawn["auc"][:, k]) if np.isfinite(point["auc"][0, k]) else None,
            "auprc": finite_or_none(point["auprc"][0, k]),
            "auprc_ci": interval(drawn["auprc"][:, k])
            if np.isfinite(point["auprc"][0, k])
            else None,
            "f1": finite_or_none(point["f1"][0, k]),
            "sensitivity_at_90": finite_or_none(point["sensitivity"][0, k]),
            "positives": positives,
        }
    return rows


def finite_or_none(value: float) -> float | None:
    """A Python float; None for an undefined value."""
    return float(value) if np.isfinite(value) else None


def _over_seeds(values: list[list[np.ndarray]]) -> np.ndarray:
    """Mean over seeds of [seed][class] arrays (B,), as (B, classes)."""
    return np.asarray(np.mean(values, axis=0).T)
