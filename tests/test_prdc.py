"""PRDC against torch-fidelity, the papers' formulas, and known cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_prc import prc_features_to_metric

from fedgan.evaluation.metrics import prdc as module
from fedgan.evaluation.metrics.prdc import prdc

SEEDS = st.integers(0, 2**32 - 1)


def _by_the_papers(real, synthetic, k):
    """The formulas literally: all pairs, differences, float64."""

    def squared(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(-1)

    def radii(a):
        own = squared(a, a)
        np.fill_diagonal(own, np.inf)
        return np.sort(own, axis=1)[:, k - 1]

    between = squared(real, synthetic)
    in_real = between <= radii(real)[:, None]
    return {
        "precision": in_real.any(0).mean(),
        "recall": (between <= radii(synthetic)[None]).any(1).mean(),
        "density": in_real.sum() / (k * len(synthetic)),
        "coverage": in_real.any(1).mean(),
    }


@settings(max_examples=40)
@given(
    SEEDS,
    st.integers(8, 60),
    st.integers(8, 60),
    st.integers(1, 20),
    st.integers(1, 7),
    st.integers(1, 70),
    st.booleans(),
)
def test_prdc_agrees_with_the_papers_for_any_block(seed, n, m, dimension, k, block, copies):
    rng = np.random.default_rng(seed)
    real, synthetic = rng.normal(size=(n, dimension)), 1.2 * rng.normal(size=(m, dimension))
    if copies:  # equal images within and between sets: distances equal to radii
        count = min(n, m) // 2
        synthetic[:count] = real[:count]
        synthetic[-3:] = synthetic[0]
    assert prdc(real, synthetic, k, block) == pytest.approx(
        _by_the_papers(real, synthetic, k), abs=1e-12
    )


@pytest.mark.parametrize("distance", [1e2, 1e4, 1e6])
def test_prdc_decides_in_float64_where_float32_is_inexact(distance):
    """Two tight clusters far apart: |x|² + |y|² - 2 x·y of a pair is only rounding in float32."""
    rng = np.random.default_rng(0)
    real, synthetic = (
        rng.normal(size=(120, 24)) + distance * rng.integers(0, 2, (120, 1)) for _ in range(2)
    )
    assert prdc(real, synthetic, 5, 50) == pytest.approx(
        _by_the_papers(real, synthetic, 5), abs=1e-12
    )


@pytest.mark.parametrize("k", [3, 5])
def test_precision_and_recall_agree_with_torch_fidelity(k):
    rng = np.random.default_rng(1)
    real, synthetic = rng.normal(size=(500, 24)), 0.9 * rng.normal(size=(400, 24)) + 0.1
    theirs = prc_features_to_metric(
        torch.from_numpy(synthetic),
        torch.from_numpy(real),
        prc_neighborhood=k,
        prc_batch_size=10000,
        save_cpu_ram=False,
        verbose=False,
    )
    ours = prdc(real, synthetic, k)
    assert 0.05 < ours["precision"] < 0.95 or 0.05 < ours["recall"] < 0.95
    assert [ours["precision"], ours["recall"]] == pytest.approx(
        [theirs["precision"], theirs["recall"]], rel=1e-4
    )


def test_prdc_of_identical_sets_is_perfect():
    features = np.random.default_rng(2).normal(size=(100, 8))
    # Each image is in its own ball and in those of k others: the density of a copy exceeds 1.
    assert prdc(features, features, 4) == {
        "precision": 1,
        "recall": 1,
        "density": 5 / 4,
        "coverage": 1,
    }


def test_prdc_of_one_distribution_has_the_expected_values():
    rng = np.random.default_rng(3)
    n, k, runs = 150, 5, 60
    scores = [prdc(rng.normal(size=(n, 3)), rng.normal(size=(n, 3)), k) for _ in range(runs)]
    # arXiv 2002.09797, lemma 2: E[coverage] = 1 - (M-1)…(M-k) / ((2M-1)…(2M-k)), E[density] = 1.
    steps = np.arange(1, k + 1)
    expected = 1 - np.prod((n - steps) / (2 * n - steps))
    assert np.mean([s["coverage"] for s in scores]) == pytest.approx(expected, abs=0.005)
    assert np.mean([s["density"] for s in scores]) == pytest.approx(1.0, abs=0.03)


def test_prdc_of_distant_sets_is_zero():
    rng = np.random.default_rng(4)
    real = rng.normal(size=(100, 6))
    assert set(prdc(real, rng.normal(size=(100, 6)) + 50).values()) == {0.0}


def test_prdc_falls_with_distance():
    rng = np.random.default_rng(5)
    real, synthetic = rng.normal(size=(300, 4)), rng.normal(size=(300, 4))
    scores = [prdc(real, synthetic + shift) for shift in (0.0, 1.0, 2.0, 4.0)]
    for name in scores[0]:
        values = [score[name] for score in scores]
        assert values == sorted(values, reverse=True), name
        assert values[-1] < 0.2 < 0.75 < values[0]


def test_dropped_mode_lowers_recall_and_coverage_not_precision():
    rng = np.random.default_rng(6)
    centers = 20 * np.eye(4)[:, :3]
    real = centers[rng.integers(0, 4, 400)] + rng.normal(size=(400, 3))
    whole, part = (
        centers[rng.integers(0, modes, 400)] + rng.normal(size=(400, 3)) for modes in (4, 3)
    )
    before, after = prdc(real, whole), prdc(real, part)
    assert after["recall"] < before["recall"] - 0.15
    assert after["coverage"] < before["coverage"] - 0.15
    assert after["precision"] == pytest.approx(before["precision"], abs=0.03)


def _means(images):
    """Features of images: means of 4 × 4 patches and the contrast inside them."""
    patches = images.reshape(len(images), 4, 4, 4, 4).swapaxes(2, 3).reshape(len(images), 16, 16)
    return np.concatenate([patches.mean(2), patches.std(2)], axis=1)


@pytest.mark.parametrize("damage", ["blur", "noise"])
def test_damaged_images_lower_precision(damage):
    rng = np.random.default_rng(7)

    def draw():
        return rng.normal(size=(300, 16, 16)) * rng.uniform(0.8, 1.2, (300, 1, 1))

    real, good, bad = draw(), draw(), draw()
    if damage == "blur":
        bad = (bad + np.roll(bad, 1, 1) + np.roll(bad, 1, 2) + np.roll(bad, (1, 1), (1, 2))) / 4
    else:
        bad = bad + 2 * rng.normal(size=bad.shape)
    before, after = (prdc(_means(real), _means(set_)) for set_ in (good, bad))
    assert after["precision"] < before["precision"] - 0.3
    assert after["density"] < before["density"] / 2


def test_collapsed_generator_has_precision_without_recall():
    rng = np.random.default_rng(8)
    scores = prdc(
        rng.normal(size=(60, 3)), np.zeros((60, 3))
    )  # 60 equal images at the mean of the real ones
    assert scores["precision"] == 1
    assert scores["recall"] == 0
    assert scores["coverage"] < 0.5


def test_prdc_recomputes_few_pairs(monkeypatch):
    decided = []
    exact = module._exact
    monkeypatch.setattr(module, "_exact", lambda *a: decided.append(len(a[2])) or exact(*a))
    rng = np.random.default_rng(9)
    n = 600
    prdc(rng.normal(size=(n, 64)), rng.normal(size=(n, 64)))
    assert sum(decided) < 2 * n * (5 + module.SPARE) + 1e-4 * n * n


@pytest.mark.parametrize("bad", [np.zeros((5, 3)), np.zeros(30), np.full((30, 3), np.nan)])
def test_prdc_refuses_unusable_features(bad):
    good = np.random.default_rng(0).normal(size=(30, 3))
    for sets in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="above k = 5"):
            prdc(*sets)
