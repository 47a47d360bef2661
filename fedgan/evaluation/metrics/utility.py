"""Utility: what a classifier's scores on real test images are worth. Arrays in, numbers out.

Every figure is the mean over classifiers trained with different seeds; its 95 % interval is the percentile bootstrap of
that mean over test images (over patients where they are known). The interval speaks of the test set's size, not of
the spread between seeds, which `macro_auc_seeds` shows. Resamples that lack a class of the macro mean are left out; where
that is more than half of them there is no interval. An AUC below 0.5 is reported as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedgan.evaluation.metrics.bootstrap import interval, resamples
from fedgan.evaluation.metrics.ranking import Ranking, curves, ranking
from fedgan.evaluation.metrics.ranking import weighted_auc as weighted_auc
from fedgan.evaluation.metrics.thresholded import balanced_accuracy as balanced_accuracy
from fedgan.evaluation.metrics.thresholded import calibration_error, called, defined_mean, f1_scores

NO_FINDING = "no finding"
NORMAL = (NO_FINDING, "normal", "none")  # labels that say what an all-zero vector would say

MACRO = {
    "macro_auc": "auc",
    "macro_auprc": "auprc",
    "macro_f1": "f1",
    "sensitivity_at_90": "sensitivity",
}
OF_ONE_SET = ("micro_auc", "micro_auprc", "balanced_accuracy", "ece")
FIGURES = (*MACRO, *OF_ONE_SET)  # with an interval each


def names_normal(label_names: tuple[str, ...]) -> bool:
    """Whether one of the labels itself says that nothing was found."""
    return any(name.lower().replace("_", " ") in NORMAL for name in label_names)


def with_no_finding(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add a last column 'no finding' to multi-label probabilities (S, N, K) and labels (N, K): the product of 1 - p."""
    none = np.prod(1.0 - probabilities, axis=2, keepdims=True)
    return np.concatenate([probabilities, none], axis=2), np.c_[
        labels, (labels.sum(1) == 0).astype(labels.dtype)
    ]


def majority_scores(train_labels: np.ndarray, count: int, exclusive: bool) -> np.ndarray:
    """Scores (1, count, K) of the classifier that never looks: for every image the shares of the training labels (N, K).

    What `utility` makes of them is the always-majority row: AUC 0.5 by ties within each class, average precision the share
    of positives, balanced accuracy 1 / K. Only the micro figures are above chance, as they compare scores of several labels.
    """
    labels = np.asarray(train_labels, np.float64)
    prevalence = labels.mean(0) if len(labels) else np.zeros(labels.shape[1])
    if exclusive and prevalence.sum() > 0:
        prevalence = prevalence / prevalence.sum()
    return np.tile(prevalence, (1, count, 1))


class Scored:
    """Probabilities (S, N, K) of S classifiers on N images with labels (N, K), ordered once and weighted many times.

    Multi-label data gain a last column, normal (no finding) against the rest, which no macro or micro figure counts; it is
    called where its own probability, the product of 1 - p, is at least 0.5.
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
        """The figures for B rows of image weights (B, N), as the function `statistics` lists them."""
        classes = self.labels.shape[1]
        rows = [[curves(one, weights) for one in seed] for seed in self.by_class]
        micro = [curves(one, weights) for one in self.micro]
        found = {
            "auc": _over_seeds([[one.auc for one in seed] for seed in rows]),
            "auprc": _over_seeds([[one.average_precision for one in seed] for seed in rows]),
            "sensitivity": _over_seeds([[one.sensitivity for one in seed] for seed in rows]),
            "f1": np.mean(
                [
                    f1_scores(called(seed, self.exclusive), self.truth, weights)
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
    """All figures, means over seeds, of probabilities (S, N, K) and labels (N, K) for B rows of image weights (B, N).

    By class, (B, K): `auc`, `auprc`, `f1`, `sensitivity` (at 90 % specificity). Over all, (B,): their macro means
    `macro_auc`, `macro_auprc`, `macro_f1`, `sensitivity_at_90` over the classes where they are defined; `micro_auc` and
    `micro_auprc` over all (image, label) pairs; `balanced_accuracy`; `ece`. For multi-label data what is by class has one
    further column, normal (no finding) against the rest, which macro and micro figures leave out.
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
    """All figures of one arm on one set of test images, as evaluation.json has them.

    probabilities (S, N, K) of S classifiers, labels (N, K), groups (N,) the cluster (patient) of each image.
    Macro figures are means over the classes with both positive and negative test images (F1: with positive ones); what is
    not defined is None. `sensitivity_at_90` is the macro mean of the highest sensitivity at a specificity of at least 90 %;
    `ece` is about the most probable class (15 bins), for multi-label data the mean over labels. `bootstrap` resamples serve
    every interval; resampling adds noise to a calibration error, so the interval of `ece` lies on its high side.
    """
    scored = Scored(probabilities, labels, exclusive)
    once = np.ones((1, len(labels)))
    point = scored.statistics(once)
    blocks = [scored.statistics(weights) for weights in resamples(groups, bootstrap, seed)]
    drawn = {key: np.concatenate([block[key] for block in blocks]) for key in point}
    # A resample without one of the classes has the mean of other classes: another quantity, so it is left out.
    counted = np.isfinite(point["auc"][0, : len(label_names)])
    lacking = (~np.isfinite(drawn["auc"][:, : len(label_names)]) & counted).any(axis=1)
    for key in (*MACRO, "balanced_accuracy"):
        drawn[key][lacking] = np.nan
    result: dict[str, Any] = {}
    for key in FIGURES:
        result[key] = number(point[key][0])
        result[f"{key}_ci"] = interval(drawn[key]) if np.isfinite(point[key][0]) else None
    alone = [
        Scored(one[None], labels, exclusive).statistics(once)["macro_auc"][0]
        for one in probabilities
    ]
    result["macro_auc_seeds"] = [number(value) for value in alone]
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
    """A row a label, and one of 'no finding' where images are multi-label, some have none and no label says so."""
    names = label_names if exclusive else (*label_names, NO_FINDING)
    rows: dict[str, Any] = {}
    for k, name in enumerate(names):
        positives = int(truth[:, k].sum())
        if k >= len(label_names) and (names_normal(label_names) or not 0 < positives < len(truth)):
            continue
        rows[name] = {
            "auc": number(point["auc"][0, k]),
            "auc_ci": interval(drawn["auc"][:, k]) if np.isfinite(point["auc"][0, k]) else None,
            "auprc": number(point["auprc"][0, k]),
            "auprc_ci": interval(drawn["auprc"][:, k])
            if np.isfinite(point["auprc"][0, k])
            else None,
            "f1": number(point["f1"][0, k]),
            "sensitivity_at_90": number(point["sensitivity"][0, k]),
            "positives": positives,
        }
    return rows


def number(value: float) -> float | None:
    """A Python float, or None for what is not defined."""
    return float(value) if np.isfinite(value) else None


def _over_seeds(values: list[list[np.ndarray]]) -> np.ndarray:
    """Mean over seeds of [seed][class] arrays (B,), as (B, classes)."""
    return np.asarray(np.mean(values, axis=0).T)
