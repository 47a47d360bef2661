"""What a real-trained classifier reads in images whose labels were asked for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from fedgan.errors import DataError
from fedgan.evaluation.metrics.label_fidelity import label_fidelity


def _read(seed, skill, count=200, classes=3):
    rng = np.random.default_rng(seed)
    asked = np.eye(classes, dtype=np.uint8)[
        np.r_[np.arange(classes), rng.integers(classes, size=count - classes)]
    ]
    logits = rng.normal(size=(count, classes)) + skill * asked
    return asked, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_figures_agree_with_scikit_learn_and_are_means_over_classifiers():
    asked, first = _read(0, 2.0)
    second = _read(0, 1.0)[1]
    found = label_fidelity(np.stack([first, second]), asked, ("a", "b", "c"), True)
    truth, calls = asked.argmax(1), [scores.argmax(1) for scores in (first, second)]
    assert found["accuracy_seeds"] == pytest.approx([accuracy_score(truth, one) for one in calls])
    assert found["accuracy"] == pytest.approx(np.mean(found["accuracy_seeds"]))
    recall = np.mean([recall_score(truth, one, average=None) for one in calls], axis=0)
    auc = np.mean(
        [roc_auc_score(asked, scores, average=None) for scores in (first, second)], axis=0
    )
    assert [row["recall"] for row in found["per_class"].values()] == pytest.approx(list(recall))
    assert [row["auc"] for row in found["per_class"].values()] == pytest.approx(list(auc))
    assert [row["positives"] for row in found["per_class"].values()] == asked.sum(0).tolist()
    assert found["images"] == 200
    assert json.loads(json.dumps(found)) == found


def test_a_generator_that_ignores_one_class_is_seen_in_that_class_alone():
    asked = np.eye(3, dtype=np.uint8)[np.repeat([0, 1, 2], 20)]
    shown = np.eye(3)[np.repeat([0, 1, 0], 20)]  # asked for the third, it draws the first
    found = label_fidelity((0.9 * shown + 0.1 / 3)[None], asked, ("a", "b", "c"), True)
    assert [row["recall"] for row in found["per_class"].values()] == [1.0, 1.0, 0.0]
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["per_class"]["c"]["auc"] == 0.5
    swapped = label_fidelity(
        (0.9 * asked[:, [1, 0, 2]] + 0.1 / 3)[None], asked, ("a", "b", "c"), True
    )
    assert (
        swapped["per_class"]["a"]["auc"] < 0.5
    )  # draws the second for the first and the other way round: not flipped


def test_findings_agree_label_by_label_at_one_half():
    asked = np.array([[1, 0], [1, 1], [0, 0], [0, 0]], np.uint8)
    scores = np.array([[0.9, 0.6], [0.4, 0.5], [0.1, 0.1], [0.2, 0.4]])
    found = label_fidelity(scores[None], asked, ("mass", "effusion"), False)
    assert found["accuracy"] == pytest.approx(6 / 8)
    assert found["per_class"]["mass"] == {"recall": 0.5, "auc": 1.0, "positives": 2}


def test_a_class_that_was_never_asked_for_is_null():
    asked, scores = _read(1, 2.0)
    keep = asked[:, 2] == 0
    found = label_fidelity(scores[None, keep], asked[keep], ("a", "b", "c"), True)
    assert found["per_class"]["c"] == {"recall": None, "auc": None, "positives": 0}
    assert found["accuracy"] is not None


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="do not fit"):
        label_fidelity(np.zeros((5, 2)), np.zeros((5, 2)), ("a", "b"), True)
