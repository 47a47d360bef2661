"""Paired comparison of arms, against DeLong's variance, a closed test and simulations."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan.errors import ConfigError, DataError
from fedgan.evaluation.arms import paired
from fedgan.evaluation.arms.paired import (
    bootstrap_auc,
    compare_arms,
    difference,
    holm,
    macro_auc,
    paired_difference,
    standard_families,
)
from fedgan.evaluation.metrics.utility import statistics, utility

SEEDS = st.integers(0, 2**32 - 1)


def _binary(truth, margin):
    """Scores (1, N, 2) and labels (N, 2) of a binary problem; `margin` is the log odds of yes."""
    yes = 1 / (1 + np.exp(-margin))
    return np.stack([1 - yes, yes], 1)[None], np.stack([1 - truth, truth], 1).astype(np.uint8)


def _arms(rng, count, skill_a=1.0, skill_b=1.0, shared=0.0):
    """Scores of two arms on the same images; `shared`: the part of the noise that they share."""
    truth = np.r_[np.ones(count // 2), np.zeros(count - count // 2)]
    common = np.sqrt(shared) * rng.normal(size=count)
    noise = [common + np.sqrt(1 - shared) * rng.normal(size=count) for _ in range(2)]
    (a, labels), (b, _) = (
        _binary(truth, skill * truth + part)
        for skill, part in zip((skill_a, skill_b), noise, strict=True)
    )
    return a, b, labels


def _compare(a, b, labels, groups=None, margin=0.02, bootstrap=400, seed=0):
    groups = np.arange(len(labels)) if groups is None else groups
    return paired_difference(a, b, labels, True, groups, margin, bootstrap, seed)


# --- macro AUC -----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.booleans(), st.sampled_from([3, 10**6]))
def test_macro_auc_equals_that_of_utility(seed, exclusive, levels):
    rng = np.random.default_rng(seed)
    labels = np.eye(3, dtype=np.uint8)[np.r_[0, 1, 2, rng.integers(3, size=22)]]
    if not exclusive:
        labels = np.maximum(labels, (rng.random((25, 3)) < 0.3).astype(np.uint8))
    scores = rng.integers(levels, size=(2, 25, 3)) / levels  # few levels: many ties
    weights = np.r_[np.ones((1, 25)), rng.integers(0, 4, (5, 25))].astype(float)
    expected = statistics(scores, labels, weights, exclusive)
    # utility leaves the other resamples out, here they are NaN
    whole = np.isfinite(expected["auc"][:, :3]).all(1)
    found = macro_auc(scores, labels, weights)
    np.testing.assert_allclose(found[whole], expected["macro_auc"][whole], atol=1e-12)
    if np.isfinite(expected["auc"][0, :3]).all():
        assert np.isnan(found[~whole]).all()


def test_macro_auc_ignores_classes_without_positives(monkeypatch):
    monkeypatch.setattr(paired, "CHUNK", 5)  # several blocks of positives
    rng = np.random.default_rng(0)
    scores, labels = rng.random((2, 20, 3)), np.zeros((20, 3), np.uint8)
    labels[:8, 0] = labels[8:, 1] = 1
    found = macro_auc(scores, labels, np.ones((1, 20)))
    assert found == pytest.approx(macro_auc(scores[:, :, :2], labels[:, :2], np.ones((1, 20))))
    assert np.isnan(macro_auc(scores[:, :, 2:], labels[:, 2:], np.ones((4, 20)))).all()


def test_interval_of_one_arm_equals_that_of_utility():
    rng = np.random.default_rng(1)
    a, _, labels = _arms(rng, 60)
    groups = np.repeat(np.arange(30), 2)
    figures = utility(a, labels, ("no", "yes"), True, groups, 100, 7)
    auc = bootstrap_auc(a, labels, groups, 100, 7)
    assert auc.value == pytest.approx(figures["macro_auc"])
    assert paired.interval(auc.draws) == pytest.approx(figures["macro_auc_ci"])


# --- the difference of two arms ------------------------------------------------------------------


def test_identical_scores_have_no_difference():
    a, _, labels = _arms(np.random.default_rng(2), 50)
    row = _compare(a, a.copy(), labels, margin=0.01)
    assert (row["difference"], row["ci"], row["p_value"]) == (0.0, [0.0, 0.0], 1.0)
    assert row["non_inferior"]
    assert not row["better"]
    # the interval has to lie above, not on, the margin
    assert not _compare(a, a, labels, margin=0.0)["non_inferior"]


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_exchanged_arms_give_the_opposite_sign(seed):
    a, b, labels = _arms(np.random.default_rng(seed), 40, 1.5, 0.5)
    there, back = _compare(a, b, labels, bootstrap=80), _compare(b, a, labels, bootstrap=80)
    assert there["difference"] == pytest.approx(-back["difference"])
    assert there["ci"] == pytest.approx([-back["ci"][1], -back["ci"][0]])
    assert there["p_value"] == back["p_value"]


def test_planted_difference_is_found():
    rng = np.random.default_rng(3)
    a, b, labels = _arms(rng, 400, 2.0, 0.5)
    row = _compare(a, b, labels)
    assert row["better"]
    assert row["p_value"] == pytest.approx(2 / 401)  # no resample contradicts it, but it is not 0
    worse = _compare(b, a, labels)
    assert not worse["better"]
    assert not worse["non_inferior"]


def test_non_inferiority_needs_the_whole_interval_above_the_margin():
    a, b, labels = _arms(np.random.default_rng(4), 300, 1.0, 1.0, shared=0.9)
    low = _compare(a, b, labels)["ci"][0]
    assert low < 0
    assert _compare(a, b, labels, margin=-low + 1e-6)["non_inferior"]
    assert not _compare(a, b, labels, margin=-low - 1e-6)["non_inferior"]


def _null_p_values(repeats, people, images, by_patient):
    rng = np.random.default_rng(5)
    found = []
    for repeat in range(repeats):
        truth = np.repeat(np.r_[np.ones(people // 2), np.zeros(people // 2)], images)
        noise = [
            np.repeat(rng.normal(size=people), images) + 0.05 * rng.normal(size=people * images)
            for _ in range(2)
        ]
        (a, labels), (b, _) = (_binary(truth, truth + part) for part in noise)
        groups = np.repeat(np.arange(people), images) if by_patient else np.arange(people * images)
        found.append(_compare(a, b, labels, groups, bootstrap=199, seed=repeat)["p_value"])
    return np.array(found)


def test_p_values_are_uniform_under_the_null():
    found = _null_p_values(300, 100, 1, by_patient=True)
    for level in (0.05, 0.25, 0.5, 0.75):
        assert (
            abs((found <= level).mean() - level) < 3.5 * np.sqrt(level * (1 - level) / 300) + 0.015
        )


def test_resampling_images_instead_of_patients_is_anticonservative():
    assert (_null_p_values(120, 60, 4, by_patient=True) < 0.05).mean() < 0.13
    assert (_null_p_values(120, 60, 4, by_patient=False) < 0.05).mean() > 0.2


def test_pairing_narrows_the_interval_of_similar_arms():
    a, b, labels = _arms(np.random.default_rng(6), 300, shared=0.9)
    groups = np.arange(300)
    first, second, other = (
        bootstrap_auc(arm, labels, groups, 1000, seed) for arm, seed in ((a, 0), (b, 0), (b, 1))
    )
    width = [np.ptp(difference(first, auc, 0.02)["ci"]) for auc in (second, other)]
    assert width[0] < 0.6 * width[1]


def _delong_variance(a, b, positive):
    """Variance of AUC(a) − AUC(b) by placement values (DeLong, DeLong and Clarke-Pearson 1988)."""
    cases, controls = [], []
    for scores in (a, b):
        above = scores[positive][:, None] - scores[~positive][None, :]
        ordered = (above > 0) + 0.5 * (above == 0)
        cases.append(ordered.mean(1))
        controls.append(ordered.mean(0))
    contrast = np.array([1.0, -1.0])
    covariance = np.cov(cases) / positive.sum() + np.cov(controls) / (~positive).sum()
    return contrast @ covariance @ contrast


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_spread_of_the_difference_is_delongs(shared):
    a, b, labels = _arms(np.random.default_rng(7), 500, 1.5, 1.0, shared)
    exact = np.sqrt(_delong_variance(a[0, :, 1], b[0, :, 1], labels[:, 1] == 1))
    row = _compare(a, b, labels, bootstrap=4000)
    assert np.ptp(row["ci"]) / (2 * 1.96) == pytest.approx(exact, rel=0.08)


def test_undefined_values_are_none_and_no_claim():
    rng = np.random.default_rng(8)
    labels = np.eye(2, dtype=np.uint8)[[0] * 6]  # one class alone
    row = paired_difference(
        rng.random((1, 6, 2)), rng.random((2, 6, 2)), labels, True, np.arange(6), 0.02, 50, 0
    )
    assert [row[key] for key in ("difference", "ci", "p_value", "non_inferior", "better")] == [
        None
    ] * 5
    # three quarters of the resamples lack one of three single images
    rare = np.eye(4, dtype=np.uint8)[[0, 0, 0, 1, 2, 3]]
    few = paired_difference(
        rng.random((1, 6, 4)), rng.random((2, 6, 4)), rare, True, np.arange(6), 0.02, 400, 0
    )
    assert few["difference"] is not None
    assert [few[key] for key in ("ci", "p_value", "non_inferior", "better")] == [None] * 4


def test_differences_per_generator_seed_average_to_the_difference():
    rng = np.random.default_rng(9)
    a, b = (np.concatenate([_arms(rng, 60)[0] for _ in range(4)]) for _ in range(2))
    labels = _arms(rng, 60)[2]
    row = paired_difference(
        a, b, labels, True, np.arange(60), 0.02, 20, 0, seeds_a=[0, 0, 1, 1], seeds_b=[1, 1, 0, 0]
    )
    assert [one["seed"] for one in row["seed_differences"]] == [0, 1]
    assert np.mean([one["difference"] for one in row["seed_differences"]]) == pytest.approx(
        row["difference"]
    )
    ones = np.ones((1, 60))
    by_hand = macro_auc(a[:2], labels, ones) - macro_auc(b[2:], labels, ones)
    assert row["seed_differences"][0]["difference"] == pytest.approx(by_hand[0])
    assert row["seeds"] == [0, 1]
    with pytest.raises(ConfigError, match="3 generator seeds for 4 rows"):
        paired_difference(a, b, labels, True, np.arange(60), 0.02, 20, 0, [0, 0, 1], [0, 0, 1, 1])


def test_only_common_seeds_are_compared():
    rng = np.random.default_rng(13)
    a, b = (np.concatenate([_arms(rng, 60)[0] for _ in range(4)]) for _ in range(2))
    labels, groups = _arms(rng, 60)[2], np.arange(60)
    families = {"f": [("a", "b"), ("a", "c"), ("a", "real")]}
    seeds = {"a": [0, 0, 1, 1], "b": [1, 2, 2, 1], "c": [3, 3, 4, 4]}
    row, disjoint, real = compare_arms(
        {"a": a, "b": b, "c": b, "real": b}, families, labels, True, groups, 0.02, 400, 0, seeds
    )
    expected = paired_difference(a[2:], b[[0, 3]], labels, True, groups, 0.02, 400, 0)
    assert [row[key] for key in ("difference", "ci", "p_value")] == [
        expected[key] for key in ("difference", "ci", "p_value")
    ]
    assert row["seeds"] == [1]
    assert row["seed_differences"] == [{"seed": 1, "difference": pytest.approx(row["difference"])}]
    assert (disjoint["difference"], disjoint["ci"], disjoint["p_holm"], disjoint["seeds"]) == (
        None,
        None,
        None,
        [],
    )
    # real images have no generator
    assert (real["seeds"], real["seed_differences"]) == ([0, 1], None)
    assert (
        real["difference"]
        == paired_difference(a, b, labels, True, groups, 0.02, 20, 0)["difference"]
    )
    assert (
        paired_difference(a, b, labels, True, groups, 0.02, 400, 0, seeds["a"], seeds["b"]).items()
        <= row.items()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, labels, groups: (a[:, :-1], labels, groups), "scores"),
        (lambda a, labels, groups: (a[0], labels, groups), "scores"),
        (lambda a, labels, groups: (a, labels, groups[:-1]), "9 clusters for 10"),
        (lambda a, labels, groups: (np.where(a > 0.5, np.nan, a), labels, groups), "not finite"),
        (lambda a, labels, groups: (a, np.ones_like(labels), groups), "exclude each other"),
    ],
)
def test_scores_of_other_images_are_refused(change, message):
    a, b, labels = _arms(np.random.default_rng(10), 10)
    a, labels, groups = change(a, labels, np.arange(10))
    with pytest.raises(DataError, match=message):
        paired_difference(a, b, labels, True, groups, 0.02, 20, 0)


# --- many comparisons ----------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_equals_the_closed_bonferroni_test(p_values):
    count = len(p_values)
    adjusted = holm(p_values)
    for index in range(count):
        sets = [
            chosen
            for size in range(1, count + 1)
            for chosen in combinations(range(count), size)
            if index in chosen
        ]
        closed = max(
            min(1.0, len(chosen) * min(p_values[one] for one in chosen)) for chosen in sets
        )
        assert adjusted[index] == pytest.approx(closed)
    assert all(raw <= after <= 1 for raw, after in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


def test_holm_of_an_empty_list_and_of_a_known_example():
    assert holm([]) == []
    # statsmodels' multipletests
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_correction_is_per_family_and_missing_arms_stay_visible():
    rng = np.random.default_rng(11)
    a, b, labels = _arms(rng, 300, 1.5, 0.7)
    arms = {"federated": a, "local": b, "unused": b}
    families = {
        "federation": [
            ("federated", "local"),
            ("federated", "centralized"),
            ("local", "federated"),
        ],
        "again": [("federated", "local")],
    }
    rows = compare_arms(
        arms, families, labels, True, np.arange(300), 0.02, 300, 0, {"federated": [0], "local": [0]}
    )
    assert [(row["family"], row["a"], row["b"]) for row in rows] == [
        *(("federation", *pair) for pair in families["federation"]),
        ("again", "federated", "local"),
    ]
    first, missing, back, again = rows
    expected = paired_difference(a, b, labels, True, np.arange(300), 0.02, 300, 0, [0], [0])
    assert {key: first[key] for key in expected} == expected
    assert (first["p_holm"], back["p_holm"]) == pytest.approx(
        (2 * first["p_value"], 2 * back["p_value"])
    )
    assert again["p_holm"] == again["p_value"]
    assert first["metric"] == "macro_auc"
    assert [
        missing[key] for key in ("difference", "ci", "p_value", "p_holm", "better", "non_inferior")
    ] == [None] * 6


def test_better_uses_the_corrected_p_value():
    rng = np.random.default_rng(12)
    for _ in range(50):
        a, b, labels = _arms(rng, 120, 1.4, 1.0)
        single = _compare(a, b, labels, bootstrap=300)
        if single["better"] and single["p_value"] > 0.02:
            break
    assert single["better"]
    rows = compare_arms(
        {"a": a, "b": b}, {"f": [("a", "b")] * 5}, labels, True, np.arange(120), 0.02, 300, 0
    )
    assert [row["better"] for row in rows] == [False] * 5


def test_large_family_can_show_a_clear_difference():
    a, b, labels = _arms(np.random.default_rng(14), 200, 4.0, 0.0)
    rows = compare_arms(
        {"a": a, "b": b}, {"f": [("a", "b")] * 12}, labels, True, np.arange(200), 0.02, 100, 0
    )
    assert rows[0]["p_value"] == pytest.approx(2 / 1201)
    # with 100 resamples only, 12 × 2 / 101 would be 0.24
    assert all(row["better"] and row["p_holm"] < 0.05 for row in rows)


def test_standard_families_have_the_expected_pairs():
    rows = [
        {"arm": kind, "name": name, "hospital": hospital}
        for kind, name, hospital in [
            ("real", "real", None),
            ("centralized", "centralized", None),
            ("federated", "federated", None),
            ("federated", "fedadam", None),
            ("local", "local", None),
            ("local", "local: a", "a"),
            ("finetuned", "finetuned", None),
            ("finetuned", "finetuned: a", "a"),
            ("coalition", "coalition a", None),
            ("coalition", "coalition a+b", None),
        ]
    ]
    families = standard_families(rows)
    rivals = ["centralized", "local", "local: a", "coalition a"]  # the last with the whole budget
    pairs = [(one, other) for one in ("federated", "fedadam", "finetuned") for other in rivals]
    assert families["federation"] == [*pairs, ("local", "centralized")]
    assert families["against real"] == [
        (one, "real") for one in ("centralized", "federated", "fedadam", "local", "finetuned")
    ]
    assert standard_families(rows[1:3]) == {"federation": [("federated", "centralized")]}
