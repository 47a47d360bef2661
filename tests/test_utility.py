"""Utility figures against scikit-learn and against explicit resampling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from fedgan.evaluation import bootstrap
from fedgan.evaluation.bootstrap import clusters, interval, resamples
from fedgan.evaluation.utility import balanced_accuracy, statistics, utility, weighted_auc

SEEDS = st.integers(0, 2**32 - 1)


def _classes(rng, count, classes, skill=1.0):
    truth = np.r_[np.arange(classes), rng.integers(classes, size=count - classes)]
    labels = np.eye(classes, dtype=np.uint8)[truth]
    logits = rng.normal(size=(count, classes)) + skill * labels
    return labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


# --- AUC and balanced accuracy -------------------------------------------------------------------


@settings(max_examples=60)
@given(SEEDS, st.integers(3, 60), st.sampled_from([2, 5, 10**6]))
def test_weighted_auc_agrees_with_scikit_learn(seed, count, levels):
    rng = np.random.default_rng(seed)
    scores = rng.integers(levels, size=count) / levels  # few levels: many ties
    positive = np.r_[True, False, rng.random(count - 2) < 0.4]
    weights = np.c_[np.ones((4, 2)), rng.integers(0, 4, (4, count - 2))].astype(float)
    expected = [roc_auc_score(positive, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(weighted_auc(scores, positive, weights), expected, atol=1e-12)


def test_auc_is_undefined_without_positives_or_negatives_and_never_flipped():
    scores, positive = np.array([0.1, 0.2, 0.3, 0.4]), np.array([True, True, False, False])
    assert weighted_auc(scores, positive, np.ones((1, 4)))[0] == 0.0
    assert np.isnan(weighted_auc(scores, positive, np.array([[1.0, 1, 0, 0], [0, 0, 1, 1]]))).all()


@settings(max_examples=30)
@given(SEEDS, st.integers(2, 5))
def test_balanced_accuracy_of_exclusive_classes_agrees_with_scikit_learn(seed, classes):
    rng = np.random.default_rng(seed)
    labels, scores = _classes(rng, 40, classes)
    weights = rng.integers(1, 4, 40).astype(float)
    expected = balanced_accuracy_score(labels.argmax(1), scores.argmax(1), sample_weight=weights)
    assert balanced_accuracy(scores, labels, weights[None], True)[0] == pytest.approx(expected)


def test_balanced_accuracy_of_findings_is_the_mean_of_sensitivity_and_specificity():
    labels = np.array([[1, 0], [1, 0], [0, 0], [0, 0]], np.uint8)  # the second finding never occurs: left out
    scores = np.array([[0.9, 0.1], [0.4, 0.1], [0.2, 0.9], [0.1, 0.1]])
    assert balanced_accuracy(scores, labels, np.ones((1, 4)), False)[0] == pytest.approx((0.5 + 1.0) / 2)


# --- bootstrap -----------------------------------------------------------------------------------


def test_a_resample_takes_or_leaves_a_patient_whole(monkeypatch):
    monkeypatch.setattr(bootstrap, "CHUNK", 50)  # several blocks
    patients = np.array(["a", "a", "b", "", "", "a"])
    places = np.array(["x", "x", "x", "x", "x", "y"])
    groups = clusters(patients, places, 6)
    assert groups[0] == groups[1]
    assert len(set(groups)) == 5  # two unknown patients are two; 'a' of another institution is another person
    weights = np.concatenate(list(resamples(groups, 200, seed=0)))
    assert weights.shape == (200, 6)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 1])
    assert (weights[:, [0, 2, 3, 4, 5]].sum(1) == 5).all()
    assert weights[:, 2].mean() == pytest.approx(1.0, abs=0.25)


def test_images_without_patients_are_resampled_one_by_one():
    np.testing.assert_array_equal(clusters(np.empty(0, str), np.empty(0, str), 4), np.arange(4))


def test_interval_is_the_percentile_one_and_needs_half_of_the_resamples():
    values = np.arange(1001) / 1000
    assert interval(values) == pytest.approx([0.025, 0.975])
    assert interval(np.r_[values, np.full(1002, np.nan)]) is None
    assert interval(np.r_[values, np.nan]) == pytest.approx([0.025, 0.975])


def _binormal(rng, people, images):
    """AUC 0.5 + 0.26: two normals one standard deviation apart; the images of a person are nearly the same."""
    truth = np.r_[np.ones(people // 2), np.zeros(people - people // 2)]
    scores = rng.normal(size=people) + truth
    jitter = 0.05 * rng.normal(size=(people, images))
    return np.repeat(truth, images).astype(np.uint8), (scores[:, None] + jitter).ravel()


def _coverage(by_patient, images, repeats=80):
    rng = np.random.default_rng(5)
    hits = 0
    for repeat in range(repeats):
        truth, scores = _binormal(rng, 60, images)
        probability = 1 / (1 + np.exp(-scores))
        groups = np.repeat(np.arange(60), images) if by_patient else np.arange(60 * images)
        figures = utility(
            np.stack([1 - probability, probability], 1)[None],
            np.stack([1 - truth, truth], 1),
            ("no", "yes"),
            True,
            groups,
            200,
            repeat,
        )
        low, high = figures["per_class"]["yes"]["auc_ci"]
        hits += low <= 0.7602 <= high
    return hits / repeats


def test_intervals_cover_the_true_auc():
    assert 0.88 <= _coverage(by_patient=True, images=1) <= 0.995


def test_intervals_by_patient_cover_where_intervals_by_image_are_too_narrow():
    assert _coverage(by_patient=True, images=5) >= 0.88
    assert _coverage(by_patient=False, images=5) < 0.75


# --- all figures together ------------------------------------------------------------------------


def test_figures_are_means_over_seeds_and_classes():
    rng = np.random.default_rng(6)
    labels, first = _classes(rng, 90, 3)
    second = _classes(np.random.default_rng(7), 90, 3, skill=0.0)[1]
    figures = utility(np.stack([first, second]), labels, ("a", "b", "c"), True, np.arange(90), 100, 0)
    each = [roc_auc_score(labels, scores, average=None) for scores in (first, second)]
    np.testing.assert_allclose([row["auc"] for row in figures["per_class"].values()], np.mean(each, axis=0))
    assert figures["macro_auc"] == pytest.approx(np.mean(each))
    np.testing.assert_allclose(figures["macro_auc_seeds"], np.mean(each, axis=1))
    assert figures["macro_auc_ci"][0] < figures["macro_auc"] < figures["macro_auc_ci"][1]
    assert figures["per_class"]["b"]["positives"] == labels[:, 1].sum()
    assert figures["images"] == 90


def test_an_interval_is_what_explicit_resampling_gives():
    rng = np.random.default_rng(8)
    labels, scores = _classes(rng, 50, 3)
    figures = utility(scores[None], labels, ("a", "b", "c"), True, np.arange(50), 60, seed=3)
    drawn = []
    for weights in np.concatenate(list(resamples(np.arange(50), 60, seed=3))):
        rows = np.repeat(np.arange(50), weights.astype(int))
        drawn.append(roc_auc_score(labels[rows], scores[rows], average="macro"))
    assert figures["macro_auc_ci"] == pytest.approx(list(np.percentile(drawn, [2.5, 97.5])))


def test_a_class_without_test_images_is_null_and_outside_the_macro_mean():
    rng = np.random.default_rng(9)
    labels, scores = _classes(rng, 60, 3)
    keep = labels[:, 2] == 0
    figures = utility(scores[None, keep], labels[keep], ("a", "b", "gone"), True, np.arange(keep.sum()), 50, 0)
    assert figures["per_class"]["gone"] == {"auc": None, "auc_ci": None, "positives": 0}
    assert figures["macro_auc"] == pytest.approx(np.mean([figures["per_class"][name]["auc"] for name in "ab"]))


def test_one_class_alone_has_no_auc_at_all():
    labels, scores = np.eye(2, dtype=np.uint8)[np.zeros(5, int)], np.full((1, 5, 2), 0.5)
    figures = utility(scores, labels, ("a", "b"), True, np.arange(5), 20, 0)
    assert figures["macro_auc"] is None
    assert figures["macro_auc_ci"] is None


def test_findings_have_an_auc_of_no_finding_outside_the_macro_mean():
    rng = np.random.default_rng(10)
    labels = (rng.random((80, 2)) < 0.4).astype(np.uint8)
    scores = 1 / (1 + np.exp(-(rng.normal(size=(80, 2)) + labels)))
    figures = utility(scores[None], labels, ("mass", "effusion"), False, np.arange(80), 50, 0)
    assert figures["macro_auc"] == pytest.approx(roc_auc_score(labels, scores, average="macro"))
    none = labels.sum(1) == 0
    row = figures["per_class"]["no finding"]
    assert row["auc"] == pytest.approx(roc_auc_score(none, np.prod(1 - scores, axis=1)))
    assert row["positives"] == none.sum()


def test_a_label_that_says_normal_is_not_doubled():
    rng = np.random.default_rng(11)
    labels = (rng.random((40, 2)) < 0.4).astype(np.uint8)
    figures = utility(rng.random((1, 40, 2)), labels, ("No_Finding", "mass"), False, np.arange(40), 20, 0)
    assert list(figures["per_class"]) == ["No_Finding", "mass"]


def test_resamples_without_a_class_do_not_enter_the_macro_interval():
    """A class of two patients that is always right, beside one at chance: without the rule the interval would reach 0.5."""
    rng = np.random.default_rng(0)
    labels = np.zeros((102, 3), np.uint8)
    labels[:100, 0] = np.arange(100) % 2
    labels[:100, 1] = 1 - labels[:100, 0]
    labels[100:, 2] = 1
    scores = np.zeros((1, 102, 3))
    scores[0, :, 2] = labels[:, 2]
    scores[0, :, :2] = rng.random((102, 2))
    found = utility(scores, labels, ("a", "b", "rare"), True, np.arange(102), 400, 0)
    assert found["per_class"]["rare"]["auc"] == 1.0
    weights = np.concatenate(list(resamples(np.arange(102), 400, 0)))
    drawn = statistics(scores, labels, weights, True)
    whole = np.isfinite(drawn["auc"]).all(axis=1)
    assert 20 < (~whole).sum() < 120  # e^-2 of the resamples lack both
    assert found["macro_auc_ci"] == pytest.approx(interval(drawn["macro_auc"][whole]))
    assert found["macro_auc_ci"] != pytest.approx(interval(drawn["macro_auc"]))
