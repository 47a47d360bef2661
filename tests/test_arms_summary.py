"""Rows, matrix, cost and answer of a comparison, and the check that its arms are comparable."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest

from fedgan.config import Settings, to_dict
from fedgan.errors import ConfigError
from fedgan.evaluation.arms.summary import (
    RealTest,
    Run,
    answer,
    check_comparable,
    cross_hospital,
    frechet_threshold,
    kimg_to_frechet,
    real_row,
    summary_row,
)
from fedgan.evaluation.metrics.utility import utility

HOSPITALS = ("guangzhou", "kermany", "nih")


def _test_images(count=90):
    rng = np.random.default_rng(0)
    labels = np.eye(3, dtype=np.uint8)[rng.integers(3, size=count)]
    institutions = np.array(HOSPITALS)[rng.integers(3, size=count)]
    return RealTest(
        labels, ("a", "b", "c"), True, np.repeat(np.arange(count // 2), 2), institutions, 60, 0
    )


def _scores(test, seed, skill=1.0, seeds=2):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(seeds, *test.labels.shape)) + skill * test.labels
    return np.exp(logits) / np.exp(logits).sum(2, keepdims=True)


# --- rows ----------------------------------------------------------------------------------------


def test_row_is_the_mean_over_generator_and_classifier_seeds():
    test = _test_images()
    runs = [
        Run(
            seed,
            150_000,
            _scores(test, seed),
            {"frechet": 10.0 + seed, "recall": 0.4, "coverage": 0.5},
        )
        for seed in (0, 1)
    ]
    row = summary_row("federated", "fedadam", runs, test)
    stacked = np.concatenate([run.scores for run in runs])
    whole = utility(stacked, test.labels, test.label_names, True, test.groups, 60, 0)
    assert {key: row[key] for key in ("arm", "name", "seeds", "images_seen", "hospital")} == {
        "arm": "federated",
        "name": "fedadam",
        "seeds": [0, 1],
        "images_seen": 150_000,
        "hospital": None,
    }
    for key in ("macro_auc", "macro_auc_ci", "balanced_accuracy", "balanced_accuracy_ci"):
        assert row[key] == whole[key]
    assert row["per_class"]["b"] == {key: whole["per_class"]["b"][key] for key in ("auc", "auc_ci")}
    assert len(row["macro_auc_seeds"]) == 2
    assert np.mean(row["macro_auc_seeds"]) == pytest.approx(row["macro_auc"])
    assert (row["frechet"], row["frechet_seeds"], row["recall"]) == (10.5, [10.0, 11.0], 0.4)
    json.dumps(row, allow_nan=False)


def test_row_has_figures_per_institution():
    test = _test_images()
    scores = _scores(test, 3)
    row = summary_row("local", "local: nih", [Run(0, 50_000, scores)], test, hospital="nih")
    here = test.institutions == "nih"
    groups = np.unique(test.groups[here], return_inverse=True)[1]
    inside = utility(scores[:, here], test.labels[here], test.label_names, True, groups, 60, 0)
    assert row["hospital"] == "nih"
    assert set(row["per_institution"]) == set(HOSPITALS)
    assert row["per_institution"]["nih"]["macro_auc"] == pytest.approx(inside["macro_auc"])
    assert row["per_institution"]["nih"]["macro_auc_ci"] == pytest.approx(inside["macro_auc_ci"])
    assert (row["frechet"], row["frechet_seeds"]) == (None, [None])


def test_arm_without_a_finished_run_has_none_values():
    row = summary_row("federated", "federated", [], _test_images())
    assert (row["seeds"], row["macro_auc_seeds"], row["frechet_seeds"]) == ([], [], [])
    assert [
        row[key]
        for key in ("images_seen", "macro_auc", "macro_auc_ci", "macro_auprc", "frechet", "recall")
    ] == [None] * 6


def test_real_row_has_figures_but_no_generator():
    test = _test_images()
    scores = _scores(test, 4, skill=3.0)
    row = real_row(scores, test)
    assert (row["arm"], row["name"], row["seeds"], row["frechet"], row["images_seen"]) == (
        "real",
        "real",
        [],
        None,
        None,
    )
    assert (
        row["macro_auc"]
        == utility(scores, test.labels, test.label_names, True, test.groups, 60, 0)["macro_auc"]
    )
    assert list(row) == list(
        summary_row("federated", "f", [Run(0, 1, scores)], test)
    )  # rows are alike


def test_cross_hospital_matrix_has_a_cell_per_row_and_hospital():
    inside = {
        "guangzhou": {"macro_auc": 0.8, "macro_auc_ci": [0.7, 0.9]},
        "nih": {"macro_auc": None, "macro_auc_ci": None},
    }
    rows = [
        {"name": "federated", "hospital": None, "per_institution": inside},
        {"name": "local: nih", "hospital": "nih", "per_institution": {}},
    ]
    matrix = cross_hospital(rows, HOSPITALS)
    assert (matrix["rows"], matrix["columns"]) == (["federated", "local: nih"], list(HOSPITALS))
    assert matrix["macro_auc"] == [[0.8, None, None], [None, None, None]]
    assert matrix["ci"] == [[[0.7, 0.9], None, None], [None, None, None]]
    assert matrix["is_own"] == [[False, False, False], [False, False, True]]


# --- cost ----------------------------------------------------------------------------------------


def _curve(*points):
    return [{"images_seen": seen, "frechet": value} for seen, value in points]


def test_kimg_to_frechet_is_the_first_measurement_that_reaches_it():
    curve = _curve((30_000, 12.0), (10_000, 50.0), (20_000, 20.0), (40_000, 25.0))
    assert kimg_to_frechet(curve, 20.0) == 20.0
    assert kimg_to_frechet(curve, 15.0) == 30.0
    assert kimg_to_frechet(curve, 60.0) == 10.0
    assert kimg_to_frechet(curve, 11.9) is None
    assert kimg_to_frechet(curve, None) is None
    assert kimg_to_frechet([], 20.0) is None
    assert (
        kimg_to_frechet(_curve((10_000, None), (20_000, float("nan")), (30_000, 3.0)), 5.0) == 30.0
    )


def test_frechet_threshold_is_reached_by_every_arm():
    curves = [
        _curve((10_000, 9.0), (20_000, 5.0)),
        _curve((20_000, 7.0), (10_000, 4.0)),
        [],
        _curve((10_000, None)),
    ]
    assert frechet_threshold(curves) == 7.0
    assert all(kimg_to_frechet(curve, 7.0) is not None for curve in curves[:2])
    assert frechet_threshold([[], []]) is None


# --- the answer ----------------------------------------------------------------------------------


def _summary(federated=("federated",), hospitals=HOSPITALS, central=True):
    row = {"macro_auc": 0.85, "hospital": None}
    return [
        {**row, "arm": "real", "name": "real"},
        *([{**row, "arm": "centralized", "name": "centralized"}] if central else []),
        *({**row, "arm": "federated", "name": name} for name in federated),
        {**row, "arm": "local", "name": "local"},
        *(
            {**row, "arm": "local", "name": f"local: {hospital}", "hospital": hospital}
            for hospital in hospitals
        ),
    ]


def _row(b, value, ci, p_holm, a="federated", margin=0.02):
    inferior = None if ci is None else ci[0] > -margin
    return {
        "a": a,
        "b": b,
        "difference": value,
        "ci": ci,
        "p_holm": p_holm,
        "margin": margin,
        "non_inferior": inferior,
    }


GAINS = [
    _row("local: guangzhou", 0.02, [-0.01, 0.05], 0.2),
    _row("local: kermany", 0.15, [0.12, 0.18], 0.002),
    _row("local: nih", 0.08, [0.05, 0.11], 0.002),
]


def _answer(cost, gains=GAINS, **changes):
    return answer(_summary(**changes), [*([cost] if cost else []), *gains], HOSPITALS)


def _sentences(text):
    return re.findall(r"[^.]+(?:\.\d[^.]*)*\.", text)


def test_answer_has_two_sentences_with_cost_and_gain():
    text = _answer(_row("centralized", -0.0121, [-0.0199, -0.004], 0.01))
    assert text == (
        "In macro AUC, classifiers trained on federated synthetic images score 0.012 below those "
        "of centralised training (95 % interval −0.020 to −0.004: a cost within the margin of "
        "0.020). They score 0.150 above the weakest hospital alone (kermany: a gain) and 0.020 "
        "above the strongest (guangzhou: no difference shown)."
    )
    assert len(_sentences(text)) == 2
    assert max(len(sentence.split()) for sentence in _sentences(text)) <= 32


@pytest.mark.parametrize(
    ("value", "ci", "p_holm", "text"),
    [
        (
            -0.09,
            [-0.112, -0.065],
            0.01,
            "0.090 below the pooled releases of the hospitals (a loss)",
        ),
        (0.05, [0.02, 0.08], 0.01, "0.050 above the pooled releases of the hospitals (a gain)"),
        (
            0.0001,
            [-0.02, 0.02],
            1.0,
            "level with the pooled releases of the hospitals (no difference shown)",
        ),
    ],
)
def test_answer_includes_the_pooled_releases(value, ci, p_holm, text):
    found = _answer(
        _row("centralized", -0.1, [-0.12, -0.07], 0.01),
        gains=[*GAINS, _row("local", value, ci, p_holm)],
    )
    assert found.endswith(f" and {text}.")
    assert len(_sentences(found)) == 2


MARGIN = "the margin of 0.020"


@pytest.mark.parametrize(
    ("value", "ci", "p_holm", "gap", "verdict"),
    [
        (-0.06, [-0.08, -0.04], 0.002, "0.060 below", f"−0.080 to −0.040: a cost beyond {MARGIN}"),
        (
            -0.03,
            [-0.05, -0.01],
            0.01,
            "0.030 below",
            f"−0.050 to −0.010: a cost, not shown to be within {MARGIN}",
        ),
        (
            -0.01,
            [-0.019, -0.001],
            0.04,
            "0.010 below",
            f"−0.019 to −0.001: a cost within {MARGIN}",
        ),
        (
            -0.01,
            [-0.019, -0.001],
            0.08,
            "0.010 below",
            f"−0.019 to −0.001: non-inferior at {MARGIN}",
        ),
        (0.001, [-0.01, 0.012], 0.9, "0.001 above", f"−0.010 to 0.012: non-inferior at {MARGIN}"),
        (
            -0.01,
            [-0.04, 0.02],
            0.5,
            "0.010 below",
            f"−0.040 to 0.020: neither a cost nor non-inferiority is shown at {MARGIN}",
        ),
        (0.03, [0.01, 0.05], 0.01, "0.030 above", "0.010 to 0.050: a gain"),
        (0.03, [0.01, 0.05], 0.06, "0.030 above", f"0.010 to 0.050: non-inferior at {MARGIN}"),
        (
            -0.0002,
            [-0.0004, 0.0004],
            0.9,
            "level with",
            f"0.000 to 0.000: non-inferior at {MARGIN}",
        ),
        (-0.01, None, None, "0.010 below", ""),
    ],
)
def test_answer_has_the_right_verdict_for_every_sign(value, ci, p_holm, gap, verdict):
    text = _answer(_row("centralized", value, ci, p_holm))
    reason = f"(95 % interval {verdict})" if verdict else "(no interval)"
    assert f"score {gap} those of centralised training {reason}." in text
    assert max(len(sentence.split()) for sentence in _sentences(text)) <= 36


@pytest.mark.parametrize(
    ("value", "ci", "p_holm", "text"),
    [
        (-0.05, [-0.07, -0.03], 0.01, "0.050 below nih alone (a loss)"),
        (0.05, [0.03, 0.07], 0.01, "0.050 above nih alone (a gain)"),
        (0.05, [0.03, 0.07], 0.07, "0.050 above nih alone (no difference shown)"),
        (0.0, [-0.01, 0.01], 1.0, "level with nih alone (no difference shown)"),
        (0.05, None, None, "0.050 above nih alone (no interval)"),
    ],
)
def test_answer_names_a_single_hospital_and_missing_ones(value, ci, p_holm, text):
    found = _answer(
        _row("centralized", 0.0, [-0.01, 0.01], 1.0), [_row("local: nih", value, ci, p_holm)]
    )
    assert found.endswith(f" They score {text}; 2 hospitals alone were not measured.")


def test_verdict_needs_the_same_sign_in_every_seed():
    def with_seeds(row, *differences):
        seeds = [{"seed": seed, "difference": value} for seed, value in enumerate(differences)]
        return {**row, "seed_differences": seeds}

    cost = _row("centralized", -0.03, [-0.05, -0.01], 0.01)
    gain = _row("local: nih", 0.05, [0.03, 0.07], 0.01)
    text = _answer(with_seeds(cost, -0.04, -0.02), [with_seeds(gain, 0.04, 0.06)])
    assert "a cost, not shown to be within" in text
    assert "a gain)" in text
    text = _answer(with_seeds(cost, -0.07, 0.01), [with_seeds(gain, 0.11, -0.01)])
    assert (
        "0.030 below those of centralised training "
        "(95 % interval −0.050 to −0.010: not the same in every seed)" in text
    )
    assert "0.050 above nih alone (not the same in every seed)" in text
    assert "a gain" not in text
    for differences in ([0.05], [], [0.1, None]):
        text = _answer(cost, [with_seeds(gain, *differences)])
        assert ("a gain)" in text) == (None not in differences)
    near = with_seeds(_row("centralized", -0.01, [-0.019, -0.001], 0.01), -0.03, 0.01)
    # non-inferiority holds whichever sign the difference has
    assert "−0.019 to −0.001: non-inferior at the margin of 0.020)" in _answer(near)
    vague = with_seeds(_row("local: nih", 0.05, [-0.03, 0.07], 0.4), 0.11, -0.01)
    assert "no difference shown)" in _answer(cost, [vague])


def test_answer_says_what_was_not_measured():
    blank = _row("centralized", None, None, None)
    for central, has_arm in ((None, False), (None, True), (blank, True)):
        text = _answer(central, central=has_arm)
        assert text.startswith(
            "Centralised training was not measured. In macro AUC, classifiers trained on federated "
            "synthetic images score 0.150 above the weakest"
        )
    cost = _row("centralized", -0.01, [-0.019, -0.001], 0.01)
    assert _answer(cost, []).endswith(
        "within the margin of 0.020). The hospitals alone were not measured."
    )
    assert _answer(cost, GAINS[:2]).endswith("; nih alone was not measured.")
    assert _answer(None, []) == (
        "Cost and gain of federation are unknown: "
        "centralised training and the hospitals alone were not measured."
    )
    assert answer(_summary(federated=()), GAINS, HOSPITALS) == (
        "Cost and gain of federation are unknown: federated training was not measured."
    )
    failed = [
        {**row, "macro_auc": None} if row["arm"] == "federated" else row for row in _summary()
    ]
    assert "the arm 'federated' was not measured" in answer(failed, GAINS, HOSPITALS)


def test_answer_names_the_arm_among_several_federated_ones():
    rows = _summary(federated=("federated", "fedadam"))
    comparisons = [
        _row("centralized", -0.01, [-0.02, 0.0], 0.5),
        _row("centralized", 0.04, [0.03, 0.05], 0.01, a="fedadam"),
    ]
    assert "federated ('federated') synthetic images score 0.010 below" in answer(
        rows, comparisons, HOSPITALS
    )
    assert "federated ('fedadam') synthetic images score 0.040 above" in answer(
        rows, comparisons, HOSPITALS, "fedadam"
    )
    assert "the arm 'krum' was not measured" in answer(rows, comparisons, HOSPITALS, "krum")


# --- check ---------------------------------------------------------------------------------------


def _arm(name, seed=0, **changes):
    arm = {
        "name": name,
        "seed": seed,
        "images_seen": 150_000,
        "settings": to_dict(Settings(seed=seed, name=name)),
        "resolution": 64,
        "label_names": ["normal", "pneumonia"],
        "evaluator": {
            "extractor": "reference",
            "classifier": "small-cnn",
            "suite": "full",
            "test_hash": "abc",
        },
    }
    return {**arm, **changes}


def _changed(path, value):
    arm = copy.deepcopy(_arm("federated", seed=1))
    inner = arm
    *parents, last = path.split(".")
    for key in parents:
        inner = inner[key]
    assert last in inner
    inner[last] = value
    return arm


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "images_seen",
            149_984,
            r"images_seen differs: arm 'centralized' .* has 150,000, "
            r"arm 'federated' .* has 149,984",
        ),
        (
            "images_seen",
            150_016,
            r"images_seen differs: arm 'federated' .* has 150,016, "
            r"arm 'centralized' .* has 150,000",
        ),
        (
            "resolution",
            32,
            r"resolution differs: arm 'federated' \(seed 1\) has 32, "
            r"arm 'centralized' \(seed 0\) has 64",
        ),
        (
            "label_names",
            ["normal", "abnormal"],
            "label_names differs: .*abnormal.* has .*pneumonia",
        ),
        ("settings.data.resolution", 64, "data.resolution differs: .* has 64, .* has 32"),
        ("settings.data.label_map", "*=x", r"data.label_map differs: .* has '\*=x', .* has ''"),
        (
            "settings.data.partition",
            "iid",
            "data.partition differs: .* has 'iid', .* has 'institution'",
        ),
        ("settings.data.seed", 3, "data.seed differs: .* has 3, .* has -1"),
        (
            "settings.model.channel_base",
            4096,
            "model.channel_base differs: .* has 4,096, .* has 2,048",
        ),
        ("settings.augment.mode", "none", "augment.mode differs: .* has 'none', .* has 'ada'"),
        (
            "settings.training.learning_rate",
            0.001,
            "training.learning_rate differs: .* has 0.001, .* has 0.0025",
        ),
        ("settings.training.batch_size", 32, "training.batch_size differs"),
        ("settings.evaluation.epochs", 3, "evaluation.epochs differs"),
        (
            "evaluator.extractor",
            "inception",
            "evaluator.extractor differs: .* has 'inception', .* has 'reference'",
        ),
        ("evaluator.classifier", "resnet18", "evaluator.classifier differs"),
        ("evaluator.suite", "quick", "evaluator.suite differs"),
        ("evaluator.test_hash", "abd", "evaluator.test_hash differs: .* has 'abd', .* has 'abc'"),
    ],
)
def test_arms_trained_or_evaluated_differently_are_refused(path, value, message):
    with pytest.raises(ConfigError, match=message):
        check_comparable([_arm("centralized"), _arm("local"), _changed(path, value)])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("settings.data.root", "pooled"),
        ("settings.training.proximal_mu", 0.01),
        ("settings.federation.strategy", "fedprox"),
        ("settings.federation.hospitals", 1),
        ("settings.evaluation.every", 1),
        ("label_names", ("normal", "pneumonia")),
    ],
)
def test_settings_that_define_an_arm_may_differ(path, value):
    check_comparable([_arm("centralized"), _changed(path, value)])


def test_error_names_the_arms_with_most_and_fewest_images():
    arms = [
        _arm("centralized"),
        _arm("local", images_seen=149_970),
        _arm("federated", images_seen=150_030),
    ]
    with pytest.raises(ConfigError, match=r"arm 'federated'.* 150,030.* arm 'local'.* 149,970"):
        check_comparable(arms)


@pytest.mark.parametrize(
    "key", ["resolution", "label_names", "settings", "images_seen", "evaluator"]
)
def test_arm_without_facts_is_refused(key):
    arm = {name: value for name, value in _arm("federated").items() if name != key}
    for arms in ([_arm("centralized"), arm], [arm]):
        with pytest.raises(ConfigError, match=f"'federated'.* has no .*{key}"):
            check_comparable(arms)


def test_setting_missing_in_one_arm_is_a_difference():
    old = _arm("federated")
    del old["settings"]["training"]["r1_gamma"]
    for arms in ([_arm("centralized"), old], [old, _arm("centralized")]):
        with pytest.raises(ConfigError, match=r"training\.r1_gamma"):
            check_comparable(arms)
    check_comparable([])
