"""Utility figures against scikit-learn, torchmetrics and explicit resampling."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    roc_auc_score,
    roc_curve,
)
from torchmetrics.functional import classification as tm

from fedgan.data.dataset import ImageDataset, unit_numbers
from fedgan.evaluation.metrics import bootstrap, ranking
from fedgan.evaluation.metrics.bootstrap import interval, resamples
from fedgan.evaluation.metrics.ranking import (
    average_precision,
    sensitivity_at_specificity,
    weighted_auc,
)
from fedgan.evaluation.metrics.thresholded import (
    balanced_accuracy,
    calibration_error,
    f1_scores,
    predictions,
)
from fedgan.evaluation.metrics.utility import FIGURES, majority_scores, statistics, utility

SEEDS = st.integers(0, 2**32 - 1)


def _classes(rng, count, classes, skill=1.0):
    truth = np.r_[np.arange(classes), rng.integers(classes, size=count - classes)]
    labels = np.eye(classes, dtype=np.uint8)[truth]
    logits = rng.normal(size=(count, classes)) + skill * labels
    return labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def _scored(seed, count, levels):
    rng = np.random.default_rng(seed)
    scores = rng.integers(levels, size=count) / levels  # few levels: many ties
    positive = np.r_[True, False, rng.random(count - 2) < 0.4]
    return (
        scores,
        positive,
        np.c_[np.ones((4, 2)), rng.integers(0, 4, (4, count - 2))].astype(float),
    )


# --- figures of one class -----------------------------------------------------------------------


@settings(max_examples=60)
@given(SEEDS, st.integers(3, 60), st.sampled_from([2, 5, 10**6]))
def test_weighted_auc_agrees_with_scikit_learn(seed, count, levels):
    scores, positive, weights = _scored(seed, count, levels)
    expected = [roc_auc_score(positive, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(weighted_auc(scores, positive, weights), expected, atol=1e-12)


@settings(max_examples=60)
@given(SEEDS, st.integers(3, 60), st.sampled_from([2, 5, 10**6]))
def test_average_precision_agrees_with_scikit_learn_with_ties(seed, count, levels):
    scores, positive, weights = _scored(seed, count, levels)
    expected = [average_precision_score(positive, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(average_precision(scores, positive, weights), expected, atol=1e-12)


@settings(max_examples=60)
@given(SEEDS, st.integers(3, 60), st.sampled_from([2, 5, 10**6]))
def test_sensitivity_at_90_is_the_best_point_with_that_specificity(seed, count, levels):
    scores, positive, weights = _scored(seed, count, levels)
    expected = []
    for row in weights:
        alarms, found, _ = roc_curve(positive, scores, sample_weight=row, drop_intermediate=False)
        expected.append(found[alarms <= 0.1 + 1e-9].max())
    np.testing.assert_allclose(
        sensitivity_at_specificity(scores, positive, weights), expected, atol=1e-12
    )


@pytest.mark.parametrize("negatives", [10, 30, 70, 190])
def test_sensitivity_at_90_allows_exactly_ten_percent_false_positives(negatives):
    scores = np.r_[
        np.arange(negatives), negatives - negatives // 10 - 0.5
    ]  # 10 % of the negatives above the positive
    positive = np.arange(negatives + 1) == negatives
    assert sensitivity_at_specificity(scores, positive, np.ones((1, negatives + 1)))[0] == 1.0
    scores[-1] -= 1
    assert sensitivity_at_specificity(scores, positive, np.ones((1, negatives + 1)))[0] == 0.0


@settings(max_examples=40)
@given(SEEDS, st.booleans())
def test_weights_equal_repeated_images_in_every_figure(seed, exclusive):
    rng = np.random.default_rng(seed)
    labels, scores = _classes(rng, 30, 3)
    if not exclusive:
        labels = (rng.random((30, 3)) < 0.4).astype(np.uint8)
    scores = np.round(scores, 1)  # ties
    weights = rng.integers(0, 4, 30)
    rows = np.repeat(np.arange(30), weights)
    weighted = statistics(scores[None], labels, weights[None].astype(float), exclusive)
    copied = statistics(scores[None, rows], labels[rows], np.ones((1, len(rows))), exclusive)
    assert weighted.keys() == copied.keys()
    for key in weighted:
        np.testing.assert_allclose(weighted[key], copied[key], atol=1e-12, err_msg=key)


def test_auc_of_an_inverted_classifier_is_one_minus_auc():
    rng = np.random.default_rng(1)
    truth = rng.random(200) < 0.3
    p = 1 / (1 + np.exp(-rng.normal(size=200) - truth))
    labels = np.c_[~truth, truth].astype(np.uint8)
    good, bad = (
        utility(np.c_[1 - q, q][None], labels, ("no", "yes"), True, np.arange(200), 100, 0)
        for q in (p, 1 - p)
    )
    assert bad["macro_auc"] == pytest.approx(1 - good["macro_auc"])
    assert bad["macro_auc"] < bad["macro_auc_ci"][1] < 0.5
    assert bad["per_class"]["yes"]["auc"] < 0.5
    assert bad["macro_auc_seeds"][0] < 0.5


def test_ranking_metrics_do_not_depend_on_the_block(monkeypatch):
    scores, positive, weights = _scored(3, 50, 5)
    before = [measure(scores, positive, weights) for measure in (weighted_auc, average_precision)]
    monkeypatch.setattr(ranking, "ENTRIES", 1)
    for one, measure in zip(before, (weighted_auc, average_precision), strict=True):
        np.testing.assert_array_equal(one, measure(scores, positive, weights))


def test_auc_is_nan_without_positives_or_negatives():
    scores, positive = np.array([0.1, 0.2, 0.3, 0.4]), np.array([True, True, False, False])
    assert weighted_auc(scores, positive, np.ones((1, 4)))[0] == 0.0
    for measure in (weighted_auc, average_precision, sensitivity_at_specificity):
        assert np.isnan(measure(scores, positive, np.array([[1.0, 1, 0, 0], [0, 0, 1, 1]]))).all()


@settings(max_examples=30)
@given(SEEDS, st.integers(2, 5))
def test_balanced_accuracy_of_exclusive_classes_agrees_with_scikit_learn(seed, classes):
    rng = np.random.default_rng(seed)
    labels, scores = _classes(rng, 40, classes)
    weights = rng.integers(1, 4, 40).astype(float)
    expected = balanced_accuracy_score(labels.argmax(1), scores.argmax(1), sample_weight=weights)
    assert balanced_accuracy(scores, labels, weights[None], True)[0] == pytest.approx(expected)


def test_balanced_accuracy_of_labels_averages_both_rates():
    labels = np.array(
        [[1, 0], [1, 0], [0, 0], [0, 0]], np.uint8
    )  # the second finding never occurs: left out
    scores = np.array([[0.9, 0.1], [0.4, 0.1], [0.2, 0.9], [0.1, 0.1]])
    assert balanced_accuracy(scores, labels, np.ones((1, 4)), False)[0] == pytest.approx(
        (0.5 + 1.0) / 2
    )


@settings(max_examples=30)
@given(SEEDS, st.booleans())
def test_f1_agrees_with_scikit_learn(seed, exclusive):
    rng = np.random.default_rng(seed)
    labels, scores = _classes(rng, 40, 4)
    if not exclusive:
        labels = np.r_[np.eye(4), rng.random((36, 4)) < 0.3].astype(np.uint8)
    weights = rng.integers(1, 4, 40).astype(float)
    calls = predictions(scores, exclusive)
    expected = f1_score(labels, calls, average=None, sample_weight=weights, zero_division=0.0)
    np.testing.assert_allclose(f1_scores(calls, labels, weights[None])[0], expected, atol=1e-12)


def test_f1_is_nan_without_positives_and_zero_without_hits():
    f1 = f1_scores(
        np.array([[1.0, 0, 0], [0, 0, 0]]),
        np.array([[0, 1, 0], [0, 0, 0]], np.uint8),
        np.ones((1, 2)),
    )[0]
    np.testing.assert_array_equal(f1, [np.nan, 0.0, np.nan])


def test_calibration_error_of_known_cases():
    labels = np.eye(2, dtype=np.uint8)[np.r_[np.zeros(8, int), np.ones(2, int)]]
    once = np.ones((1, 10))
    assert calibration_error(np.tile([0.8, 0.2], (10, 1)), labels, once, True)[0] == pytest.approx(
        0.0
    )
    assert calibration_error(np.tile([1.0, 0.0], (10, 1)), labels, once, True)[0] == pytest.approx(
        0.2
    )
    assert calibration_error(np.tile([0.7, 0.3], (10, 1)), labels, once, False)[0] == pytest.approx(
        0.1
    )


# --- against torchmetrics -----------------------------------------------------------------------


@pytest.mark.parametrize("exclusive", [True, False])
def test_every_figure_agrees_with_torchmetrics(exclusive):
    rng = np.random.default_rng(12)
    labels, scores = _classes(rng, 300, 4)
    if not exclusive:
        labels, scores = (rng.random((300, 4)) < 0.3).astype(np.uint8), rng.random((300, 4)) * 0.998
        scores = 0.6 * scores + 0.3 * labels
    found = {
        key: value[0]
        for key, value in statistics(scores[None], labels, np.ones((1, 300)), exclusive).items()
    }
    p, truth = torch.from_numpy(scores), torch.from_numpy(labels.astype(np.int64))
    if exclusive:
        target = truth.argmax(1)
        auc, ap, f1, recall = (
            measure(p, target, 4, average="none")
            for measure in (
                tm.multiclass_auroc,
                tm.multiclass_average_precision,
                tm.multiclass_f1_score,
                tm.multiclass_recall,
            )
        )
        balanced = recall.mean()
        ece = tm.multiclass_calibration_error(p, target, 4, n_bins=15)
        sensitivity = tm.multiclass_sensitivity_at_specificity(p, target, 4, 0.9)[0]
    else:
        auc, ap, f1, recall, specificity = (
            measure(p, truth, 4, average="none")
            for measure in (
                tm.multilabel_auroc,
                tm.multilabel_average_precision,
                tm.multilabel_f1_score,
                tm.multilabel_recall,
                tm.multilabel_specificity,
            )
        )
        balanced = (recall + specificity).mean() / 2
        ece = torch.stack(
            [
                tm.binary_calibration_error(p[:, k].contiguous(), truth[:, k], n_bins=15)
                for k in range(4)
            ]
        ).mean()
        sensitivity = tm.multilabel_sensitivity_at_specificity(p, truth, 4, 0.9)[0]
    expected = {"auc": auc, "auprc": ap, "f1": f1, "sensitivity": sensitivity}
    for key, value in expected.items():
        np.testing.assert_allclose(found[key][:4], value, atol=1e-6, err_msg=key)
    macro = {"macro_auc": auc, "macro_auprc": ap, "macro_f1": f1, "sensitivity_at_90": sensitivity}
    for key, value in macro.items():
        assert found[key] == pytest.approx(float(value.mean()), abs=1e-6)
    assert found["balanced_accuracy"] == pytest.approx(float(balanced), abs=1e-6)
    assert found["ece"] == pytest.approx(float(ece), abs=1e-6)
    assert found["micro_auc"] == pytest.approx(
        float(tm.multilabel_auroc(p, truth, 4, average="micro")), abs=1e-6
    )
    assert found["micro_auprc"] == pytest.approx(
        float(tm.multilabel_average_precision(p, truth, 4, average="micro")), abs=1e-6
    )


# --- bootstrap ----------------------------------------------------------------------------------


def test_resamples_keep_the_images_of_a_patient_together(monkeypatch):
    monkeypatch.setattr(bootstrap, "CHUNK", 50)  # several blocks
    data = ImageDataset(
        "d",
        np.zeros((6, 1, 1, 1), np.uint8),
        np.zeros((6, 0), np.uint8),
        (),
        patients=np.array(["a", "a", "b", "", "", "a"]),
        institutions=np.array(["x", "x", "x", "x", "x", "y"]),
    )
    groups = unit_numbers(data)
    assert groups[0] == groups[1]
    assert (
        len(set(groups)) == 5
    )  # unknown patients are distinct; 'a' of another institution is another person
    weights = np.concatenate(list(resamples(groups, 200, rng=0)))
    assert weights.shape == (200, 6)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 1])
    assert (weights[:, [0, 2, 3, 4, 5]].sum(1) == 5).all()
    assert weights[:, 2].mean() == pytest.approx(1.0, abs=0.25)


def test_interval_is_percentile_and_needs_half_of_the_resamples():
    values = np.arange(1001) / 1000
    assert interval(values) == pytest.approx([0.025, 0.975])
    assert interval(np.r_[values, np.full(1002, np.nan)]) is None
    assert interval(np.r_[values, np.nan]) == pytest.approx([0.025, 0.975])


def _binormal(rng, people, images):
    """AUC 0.76: two normals one standard deviation apart; images of a person nearly equal."""
    truth = np.r_[np.ones(people // 2), np.zeros(people - people // 2)]
    scores = rng.normal(size=people) + truth
    jitter = 0.05 * rng.normal(size=(people, images))
    return np.repeat(truth, images).astype(np.uint8), (scores[:, None] + jitter).ravel()


def _coverage(by_patient, images, repeats=60):
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


def test_intervals_by_patient_cover_where_those_by_image_do_not():
    assert _coverage(by_patient=True, images=5) >= 0.88
    assert _coverage(by_patient=False, images=5) < 0.75


# --- all figures together -----------------------------------------------------------------------


def test_figures_are_means_over_seeds_and_classes():
    rng = np.random.default_rng(6)
    labels, first = _classes(rng, 90, 3)
    second = _classes(np.random.default_rng(7), 90, 3, skill=0.0)[1]
    figures = utility(
        np.stack([first, second]), labels, ("a", "b", "c"), True, np.arange(90), 100, 0
    )
    each = [roc_auc_score(labels, scores, average=None) for scores in (first, second)]
    np.testing.assert_allclose(
        [row["auc"] for row in figures["per_class"].values()], np.mean(each, axis=0)
    )
    assert figures["macro_auc"] == pytest.approx(np.mean(each))
    np.testing.assert_allclose(figures["macro_auc_seeds"], np.mean(each, axis=1))
    assert figures["macro_auc_ci"][0] < figures["macro_auc"] < figures["macro_auc_ci"][1]
    assert figures["per_class"]["b"]["positives"] == labels[:, 1].sum()
    assert figures["images"] == 90


def test_interval_agrees_with_explicit_resampling():
    rng = np.random.default_rng(8)
    labels, scores = _classes(rng, 50, 3)
    figures = utility(scores[None], labels, ("a", "b", "c"), True, np.arange(50), 60, seed=3)
    drawn = []
    for weights in np.concatenate(list(resamples(np.arange(50), 60, rng=3))):
        rows = np.repeat(np.arange(50), weights.astype(int))
        drawn.append(roc_auc_score(labels[rows], scores[rows], average="macro"))
    assert figures["macro_auc_ci"] == pytest.approx(list(np.percentile(drawn, [2.5, 97.5])))


def test_class_without_test_images_is_none_and_not_in_macro():
    rng = np.random.default_rng(9)
    labels, scores = _classes(rng, 60, 3)
    keep = labels[:, 2] == 0
    figures = utility(
        scores[None, keep], labels[keep], ("a", "b", "gone"), True, np.arange(keep.sum()), 50, 0
    )
    gone = figures["per_class"]["gone"]
    assert gone.pop("positives") == 0
    assert set(gone) == {"auc", "auc_ci", "auprc", "auprc_ci", "f1", "sensitivity_at_90"}
    assert set(gone.values()) == {None}
    for key in ("auprc", "f1"):
        assert figures[f"macro_{key}"] == pytest.approx(
            np.mean([figures["per_class"][name][key] for name in "ab"])
        )
    assert figures["macro_auc"] == pytest.approx(
        np.mean([figures["per_class"][name]["auc"] for name in "ab"])
    )


def test_single_class_has_no_auc():
    labels, scores = np.eye(2, dtype=np.uint8)[np.zeros(5, int)], np.full((1, 5, 2), 0.5)
    figures = utility(scores, labels, ("a", "b"), True, np.arange(5), 20, 0)
    assert figures["macro_auc"] is None
    assert figures["macro_auc_ci"] is None
    assert figures["sensitivity_at_90"] is None
    assert figures["macro_auprc_ci"] is None
    assert figures["balanced_accuracy"] == 1.0


def test_multi_label_data_have_no_finding_outside_the_macro_mean():
    rng = np.random.default_rng(10)
    labels = (rng.random((80, 2)) < 0.4).astype(np.uint8)
    scores = 1 / (1 + np.exp(-(rng.normal(size=(80, 2)) + labels)))
    figures = utility(scores[None], labels, ("mass", "effusion"), False, np.arange(80), 50, 0)
    assert figures["macro_auc"] == pytest.approx(roc_auc_score(labels, scores, average="macro"))
    none = labels.sum(1) == 0
    row = figures["per_class"]["no finding"]
    assert row["auc"] == pytest.approx(roc_auc_score(none, np.prod(1 - scores, axis=1)))
    assert row["positives"] == none.sum()


def test_every_figure_has_an_interval_and_is_json():
    rng = np.random.default_rng(14)
    labels, scores = _classes(rng, 120, 3)
    figures = utility(scores[None], labels, ("a", "b", "c"), True, np.arange(120) // 2, 100, 0)
    assert json.loads(json.dumps(figures)) == figures
    assert set(figures) == {
        *FIGURES,
        *(f"{key}_ci" for key in FIGURES),
        "macro_auc_seeds",
        "per_class",
        "images",
    }
    for key in set(FIGURES) - {
        "ece"
    }:  # resampling adds noise to a calibration error: its interval lies higher
        low, high = figures[f"{key}_ci"]
        assert 0 <= low < figures[key] < high <= 1
    assert figures["ece_ci"][0] < figures["ece_ci"][1]


@pytest.mark.parametrize("exclusive", [True, False])
def test_majority_classifier_is_at_chance(exclusive):
    rng = np.random.default_rng(15)
    train, test = (
        np.eye(3, dtype=np.uint8)[rng.choice(3, 100, p=[0.6, 0.3, 0.1])] for _ in range(2)
    )
    scores = majority_scores(train, 100, exclusive)
    np.testing.assert_allclose(scores[0, 7], train.mean(0))
    figures = utility(scores, test, ("a", "b", "c"), exclusive, np.arange(100), 50, 0)
    assert figures["macro_auc"] == 0.5
    assert figures["macro_auc_ci"] == [0.5, 0.5]
    assert figures["macro_auprc"] == pytest.approx(1 / 3)
    assert figures["sensitivity_at_90"] == 0.0
    assert figures["balanced_accuracy"] == pytest.approx(1 / 3 if exclusive else 0.5)
    assert figures["macro_f1"] == pytest.approx(
        f1_score(test.argmax(1), np.zeros(100, int), average="macro", zero_division=0)
    )
    assert majority_scores(np.zeros((0, 2)), 4, True).tolist() == np.zeros((1, 4, 2)).tolist()


def test_normal_label_replaces_no_finding():
    rng = np.random.default_rng(11)
    labels = (rng.random((40, 2)) < 0.4).astype(np.uint8)
    figures = utility(
        rng.random((1, 40, 2)), labels, ("No_Finding", "mass"), False, np.arange(40), 20, 0
    )
    assert list(figures["per_class"]) == ["No_Finding", "mass"]


def test_resamples_without_a_class_are_not_in_the_macro_interval():
    """One class has two patients and AUC 1, the other is at chance.

    With resamples that lack a class the interval would reach 0.5.
    """
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
