"""Label fidelity: agreement of synthetic images with their labels, by classifiers of real images.

The same figures of real held-out images are the reference: the loss by conditioning is the
difference between the two.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedgan.errors import DataError
from fedgan.evaluation.metrics.ranking import weighted_auc
from fedgan.evaluation.metrics.thresholded import predictions, share
from fedgan.evaluation.metrics.utility import finite_or_none


def label_fidelity(
    probabilities: np.ndarray, requested: np.ndarray, label_names: tuple[str, ...], exclusive: bool
) -> dict[str, Any]:
    """Agreement of the labels of M images with classifiers trained on real images.

    probabilities (S, M, K) of S classifiers in [0, 1], requested labels (M, K) multi-hot →
    {`accuracy`, `accuracy_seeds`, `per_class`: {label: {`recall`, `auc`, `positives`}}, `images`}.
    Means over classifiers. `accuracy`: for exclusive classes the share of images whose most
    probable class is the requested one, otherwise the share of (image, label) pairs that agree at
    threshold 0.5. `recall`: share of a label's images for which it is predicted. Undefined figures
    are None. Raises `DataError` for shapes that do not fit.
    """
    if (
        probabilities.ndim != 3
        or probabilities.shape[1:] != requested.shape
        or requested.shape[1] != len(label_names)
    ):
        raise DataError(
            f"probabilities of shape {probabilities.shape} do not fit labels of shape "
            f"{requested.shape} and {len(label_names)} label names: give (classifiers, images, "
            "labels), (images, labels) and one name per label"
        )
    once, truth = np.ones((1, len(requested))), requested.astype(np.float64)
    predicted = [predictions(seed, exclusive) for seed in probabilities]
    agreed = [(one == truth).all(1) if exclusive else (one == truth) for one in predicted]
    accuracies = [float(one.mean()) if one.size else float("nan") for one in agreed]
    recall = np.mean([share(once, one * truth, truth)[0] for one in predicted], axis=0)
    auc = [
        np.mean([weighted_auc(seed[:, k], requested[:, k] == 1, once)[0] for seed in probabilities])
        for k in range(len(label_names))
    ]
    return {
        "accuracy": finite_or_none(float(np.mean(accuracies))),
        "accuracy_seeds": [finite_or_none(value) for value in accuracies],
        "per_class": {
            name: {
                "recall": finite_or_none(recall[k]),
                "auc": finite_or_none(auc[k]),
                "positives": int(requested[:, k].sum()),
            }
            for k, name in enumerate(label_names)
        },
        "images": len(requested),
    }
