"""Label fidelity against scikit-learn, and for generators that ignore or swap labels."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from fedgan.errors import DataError
from fedgan.evaluation.metrics.label_fidelity import label_fidelity


def _read(seed, skill, count=200, classes=3):
    rng = np.random.default_rng(seed)
    requested = np.eye(classes, dtype=np.uint8)[
        np.r_[np.arange(classes), rng.integers(classes, size=count - classes)]
    ]
    logits = rng.normal(size=(count, classes)) + skill * requested
    return requested, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_label_fidelity_agrees_with_scikit_learn_as_mean_of_classifiers():
    requested, first = _read(0, 2.0)
    second = _read(0, 1.0)[1]
    found = label_fidelity(np.stack([first, second]), requested, ("a", "b", "c"), True)
    truth, predicted = requested.argmax(1), [scores.argmax(1) for scores in (first, second)]
    assert found["accuracy_seeds"] == pytest.approx(
        [accuracy_score(truth, one) for one in predicted]
    )
    assert found["accuracy"] == pytest.approx(np.mean(found["accuracy_seeds"]))
    recall = np.mean([recall_score(truth, one, average=None) for one in predicted], axis=0)
    auc = np.mean(
        [roc_auc_score(requested, scores, average=None) for scores in (first, second)], axis=0
    )
    assert [row["recall"] for row in found["per_class"].values()] == pytest.approx(list(recall))
    assert [row["auc"] for row in found["per_class"].values()] == pytest.approx(list(auc))
    assert [row["positives"] for row in found["per_class"].values()] == requested.sum(0).tolist()
    assert found["images"] == 200
    assert json.loads(json.dumps(found)) == found


def test_label_fidelity_shows_an_ignored_class_only_there():
    requested = np.eye(3, dtype=np.uint8)[np.repeat([0, 1, 2], 20)]
    shown = np.eye(3)[np.repeat([0, 1, 0], 20)]  # the third class looks like the first
    found = label_fidelity((0.9 * shown + 0.1 / 3)[None], requested, ("a", "b", "c"), True)
    assert [row["recall"] for row in found["per_class"].values()] == [1.0, 1.0, 0.0]
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["per_class"]["c"]["auc"] == 0.5
    swapped = label_fidelity(
        (0.9 * requested[:, [1, 0, 2]] + 0.1 / 3)[None], requested, ("a", "b", "c"), True
    )
    assert swapped["per_class"]["a"]["auc"] < 0.5  # the first two classes are swapped


def test_label_fidelity_of_multi_label_data_uses_threshold_one_half():
    requested = np.array([[1, 0], [1, 1], [0, 0], [0, 0]], np.uint8)
    scores = np.array([[0.9, 0.6], [0.4, 0.5], [0.1, 0.1], [0.2, 0.4]])
    found = label_fidelity(scores[None], requested, ("mass", "effusion"), False)
    assert found["accuracy"] == pytest.approx(6 / 8)
    assert found["per_class"]["mass"] == {"recall": 0.5, "auc": 1.0, "positives": 2}


def test_label_fidelity_of_an_absent_class_is_none():
    requested, scores = _read(1, 2.0)
    keep = requested[:, 2] == 0
    found = label_fidelity(scores[None, keep], requested[keep], ("a", "b", "c"), True)
    assert found["per_class"]["c"] == {"recall": None, "auc": None, "positives": 0}
    assert found["accuracy"] is not None


def test_label_fidelity_refuses_shapes_that_do_not_fit():
    with pytest.raises(DataError, match="do not fit"):
        label_fidelity(np.zeros((5, 2)), np.zeros((5, 2)), ("a", "b"), True)
