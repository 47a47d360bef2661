"""Label fidelity: do the images show what was asked for? Classifiers trained on real images read the synthetic labels.

The same readings of real held-out images stand beside it: a generator cannot be asked for labels that are read better
than those of real images, and a share below is what its conditioning loses.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedgan.errors import DataError
from fedgan.evaluation.metrics.ranking import weighted_auc
from fedgan.evaluation.metrics.thresholded import called, share
from fedgan.evaluation.metrics.utility import number


def label_fidelity(
    probabilities: np.ndarray, asked: np.ndarray, label_names: tuple[str, ...], exclusive: bool
) -> dict[str, Any]:
    """How often real-trained classifiers read in M images the labels that were asked for.

    probabilities (S, M, K) of S classifiers in [0, 1], asked (M, K) multi-hot → {`accuracy`, `accuracy_seeds`, `per_class`:
    {label: {`recall`, `auc`, `positives`}}, `images`}. Means over classifiers. `accuracy`: exclusive classes: the share of
    images whose most probable class is the one asked for; otherwise the share of (image, label) pairs that agree at the
    threshold 0.5. `recall`: the share of a label's images in which it is read. What is not defined is None.
    Raises `DataError` when shapes do not fit.
    """
    if (
        probabilities.ndim != 3
        or probabilities.shape[1:] != asked.shape
        or asked.shape[1] != len(label_names)
    ):
        raise DataError(
            f"probabilities of shape {probabilities.shape} do not fit labels of shape {asked.shape} and {len(label_names)} "
            "label names: give (classifiers, images, labels), (images, labels) and a name a label"
        )
    once, truth = np.ones((1, len(asked))), asked.astype(np.float64)
    calls = [called(seed, exclusive) for seed in probabilities]
    agreed = [(one == truth).all(1) if exclusive else (one == truth) for one in calls]
    accuracies = [float(one.mean()) if one.size else float("nan") for one in agreed]
    recall = np.mean([share(once, one * truth, truth)[0] for one in calls], axis=0)
    auc = [
        np.mean([weighted_auc(seed[:, k], asked[:, k] == 1, once)[0] for seed in probabilities])
        for k in range(len(label_names))
    ]
    return {
        "accuracy": number(float(np.mean(accuracies))),
        "accuracy_seeds": [number(value) for value in accuracies],
        "per_class": {
            name: {
                "recall": number(recall[k]),
                "auc": number(auc[k]),
                "positives": int(asked[:, k].sum()),
            }
            for k, name in enumerate(label_names)
        },
        "images": len(asked),
    }
