"""Fréchet and kernel distances, fidelity, label mixes, SqueezeNet."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity.metric_kid
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd
from torchvision.models import squeezenet1_0

from fedgan.errors import ConfigError, DataError
from fedgan.evaluation.features import FIRES, SqueezeNetExtractor, squeezenet_shapes
from fedgan.evaluation.metrics.fidelity import MEASURES, fidelity, grouped_fidelity, measures
from fedgan.evaluation.metrics.frechet_distance import frechet_distance, frechet_gaussians
from fedgan.evaluation.metrics.kernel_distance import kernel_distance, polynomial_kernel
from fedgan.evaluation.mixing import label_mix_rows, missing_share

SEEDS = st.integers(0, 2**32 - 1)


def _covariance(rng, dimension):
    root = rng.normal(size=(dimension, 2 * dimension))
    return root @ root.T / dimension


# --- Fréchet distance ---------------------------------------------------------------------------


def test_frechet_of_diagonal_gaussians_has_the_closed_form():
    a, b, shift = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.0]), np.array([1.0, -2.0, 0.5])
    expected = (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_gaussians(shift, np.diag(a), np.zeros(3), np.diag(b)) == pytest.approx(
        expected, rel=1e-12
    )


@settings(max_examples=25)
@given(SEEDS, st.integers(1, 8))
def test_frechet_agrees_with_the_matrix_square_root(seed, dimension):
    rng = np.random.default_rng(seed)
    x, y, mean = (
        _covariance(rng, dimension),
        _covariance(rng, dimension),
        rng.normal(size=dimension),
    )
    root = scipy.linalg.sqrtm(x @ y)
    expected = mean @ mean + np.trace(x + y - 2 * np.real(root))
    assert frechet_gaussians(mean, x, np.zeros(dimension), y) == pytest.approx(
        expected, rel=1e-6, abs=1e-8
    )


@settings(max_examples=25)
@given(SEEDS, st.integers(2, 12), st.integers(1, 10))
def test_frechet_of_a_shifted_set_is_the_squared_shift(seed, count, dimension):
    rng = np.random.default_rng(seed)
    x, shift = rng.normal(size=(count, dimension)), rng.normal(size=dimension)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + shift) == pytest.approx(shift @ shift, rel=1e-6, abs=1e-9)


@settings(max_examples=25)
@given(SEEDS)
def test_frechet_is_symmetric_and_translation_invariant(seed):
    rng = np.random.default_rng(seed)
    x, y, shift = (
        rng.normal(size=(20, 5)),
        1 + 2 * rng.normal(size=(30, 5)),
        10 * rng.normal(size=5),
    )
    distance = frechet_distance(x, y)
    assert frechet_distance(y, x) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(x + shift, y + shift) == pytest.approx(distance, rel=1e-7)


def test_frechet_works_with_fewer_images_than_features():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(10, 64)), rng.normal(size=(12, 64)) + 1
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(
        np.maximum(np.real(np.linalg.eigvals(cov_x @ cov_y)), 0)
    )  # of a product of two PSD matrices: real, >= 0
    expected = (
        ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * roots.sum()
    )
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("count", "dimension"), [(300, 20), (40, 64)])
def test_frechet_agrees_with_torchmetrics(count, dimension):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(count, dimension)), 1.3 * rng.normal(size=(2 * count, dimension)) + 0.2
    theirs = _compute_fid(
        *(
            torch.from_numpy(f(a))
            for a in (x, y)
            for f in (lambda a: a.mean(0), lambda a: np.cov(a, rowvar=False))
        )
    )
    assert frechet_distance(x, y) == pytest.approx(float(theirs), rel=1e-4)


@settings(max_examples=15)
@given(SEEDS, st.integers(2, 30), st.integers(2, 30), st.integers(1, 16))
def test_frechet_of_features_equals_that_of_their_moments(seed, n, m, dimension):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, dimension)) + 3, 2 * rng.normal(size=(m, dimension))
    moments = [
        f(a)
        for a in (x, y)
        for f in (lambda a: a.mean(0), lambda a: np.atleast_2d(np.cov(a, rowvar=False)))
    ]
    assert frechet_distance(x, y) == pytest.approx(frechet_gaussians(*moments), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("bad", [np.zeros((1, 3)), np.zeros(3), np.full((4, 3), np.nan)])
def test_distances_refuse_unusable_features(bad):
    with pytest.raises(ValueError, match="features must be"):
        frechet_distance(bad, np.zeros((4, 3)))
    with pytest.raises(ValueError, match="features must be"):
        kernel_distance(np.zeros((4, 3)), bad)


# --- kernel distance ----------------------------------------------------------------------------


def _naive_kernel_distance(x, y):
    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@settings(max_examples=20)
@given(SEEDS, st.integers(2, 9), st.integers(2, 9), st.integers(1, 12))
def test_kernel_distance_is_the_double_sum_for_any_block(seed, n, m, block):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 4)), rng.normal(size=(m, 4)) + 0.5
    assert kernel_distance(x, y, block) == pytest.approx(
        _naive_kernel_distance(x, y), rel=1e-8, abs=1e-9
    )


def _rectified(rng, count, dimension, shift=0.0):
    return np.maximum(rng.normal(size=(count, dimension)) + 0.5 + shift, 0)


def test_kernel_distance_agrees_with_other_libraries():
    rng = np.random.default_rng(0)
    x, y = _rectified(rng, 400, 48), _rectified(rng, 400, 48, 0.05)
    ours = kernel_distance(x, y)
    assert ours == pytest.approx(
        float(poly_mmd(torch.from_numpy(x), torch.from_numpy(y))), rel=1e-4
    )
    theirs = torch_fidelity.metric_kid.kernel_mmd(
        x,
        y,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1.0,
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1.0, 10.0])
def test_kernel_distance_of_large_sets_agrees_with_float64(offset):
    rng = np.random.default_rng(1)
    x, y = _rectified(rng, 2500, 64) + offset, _rectified(rng, 2100, 64, 0.03) + offset
    n, m = len(x), len(y)
    within = [
        polynomial_kernel(a, a).sum() - ((np.square(a).mean(1) + 1) ** 3).sum() for a in (x, y)
    ]
    expected = (
        within[0] / (n * (n - 1))
        + within[1] / (m * (m - 1))
        - 2 * polynomial_kernel(x, y).sum() / (n * m)
    )
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-4)


def test_polynomial_kernel_is_cubic_and_normalised_by_dimension():
    x = np.array([[1.0, 2.0], [0.0, -1.0]])
    np.testing.assert_allclose(polynomial_kernel(x, x), [[3.5**3, 0.0], [0.0, 1.5**3]])


def test_kernel_distance_is_unbiased_and_detects_a_difference():
    rng = np.random.default_rng(1)
    same = np.array(
        [kernel_distance(rng.normal(size=(30, 6)), rng.normal(size=(40, 6))) for _ in range(300)]
    )
    assert abs(same.mean()) < 3 * same.std() / np.sqrt(len(same))
    assert (same < 0).mean() > 0.2  # an unbiased estimate is often negative
    assert (
        kernel_distance(rng.normal(size=(200, 6)), 1.5 * rng.normal(size=(200, 6))) > 5 * same.std()
    )


# --- fidelity with reference values -------------------------------------------------------------


def test_perfect_generator_reaches_the_reference_and_a_bad_one_does_not():
    rng = np.random.default_rng(2)
    real = rng.normal(size=(400, 8))
    good, bad = (
        fidelity(real, rng.normal(size=(500, 8)), seed=0),
        fidelity(real, rng.normal(size=(500, 8)) + 0.5, seed=0),
    )
    assert good["frechet"] == pytest.approx(good["frechet_reference"], abs=0.1)
    assert abs(good["kernel"] - good["kernel_reference"]) < 0.1
    assert bad["frechet"] > 5 * bad["frechet_reference"]
    assert bad["kernel"] > 5 * abs(bad["kernel_reference"])
    assert bad["frechet_reference"] == good["frechet_reference"]  # depends on the real images only


@pytest.mark.parametrize(("real", "synthetic", "images"), [(101, 500, 50), (400, 30, 30)])
def test_distance_and_reference_have_the_same_size(real, synthetic, images):
    rng = np.random.default_rng(3)
    numbers = fidelity(rng.normal(size=(real, 3)), rng.normal(size=(synthetic, 3)), seed=0)
    assert numbers["images"] == numbers["reference_images"] == images


def test_reference_compares_disjoint_real_images():
    real = np.random.default_rng(4).normal(size=(60, 3))
    assert fidelity(real, real, seed=0)["frechet_reference"] > 0


def test_every_measure_has_an_interval_and_a_reference():
    rng = np.random.default_rng(5)
    found = fidelity(
        rng.normal(size=(200, 6)), rng.normal(size=(600, 6)) + 0.2, seed=1, splits=2, k=3
    )
    assert set(found) == {
        f"{name}{end}" for name in MEASURES for end in ("", "_ci", "_reference")
    } | {
        "images",
        "reference_images",
        "k",
    }
    assert found["k"] == 3
    for name in MEASURES:
        low, high = found[f"{name}_ci"]
        assert low <= found[name] <= high
    assert found["precision_ci"][1] <= 1


def test_fidelity_is_deterministic_by_seed():
    rng = np.random.default_rng(6)
    real, synthetic = rng.normal(size=(60, 4)), rng.normal(size=(80, 4))
    assert fidelity(real, synthetic, seed=3, splits=2) == fidelity(
        real, synthetic, seed=3, splits=2
    )
    assert fidelity(real, synthetic, seed=3, splits=2) != fidelity(
        real, synthetic, seed=4, splits=2
    )


@pytest.mark.parametrize("made", [300, 60])
def test_fidelity_intervals_cover_the_value_of_fresh_images(made):
    def real(count):
        return rng.normal(size=(count, 5))

    def synthetic(count):
        return 0.9 * rng.normal(size=(count, 5)) + 0.2

    rng = np.random.default_rng(7)
    size, draws = min(75, made), 30
    truth = np.mean(
        [list(measures(real(size), synthetic(size)).values()) for _ in range(150)], axis=0
    )
    hits, widths, values = np.zeros(len(MEASURES)), np.zeros(len(MEASURES)), []
    for seed in range(draws):
        found = fidelity(real(150), synthetic(made), seed, splits=4)
        bounds = np.array([found[f"{name}_ci"] for name in MEASURES])
        hits += (bounds[:, 0] <= truth) & (truth <= bounds[:, 1])
        widths += np.diff(bounds)[:, 0]
        values.append([found[name] for name in MEASURES])
    assert (hits >= 0.8 * draws).all(), dict(zip(MEASURES, hits / draws, strict=True))
    assert (widths / draws < 3 * 3.92 * np.std(values, axis=0)).all()  # not because they are huge


def test_fidelity_interval_of_a_constant_share_has_a_width():
    rng = np.random.default_rng(8)
    found = fidelity(rng.normal(size=(80, 3)), 0.01 * rng.normal(size=(200, 3)), seed=0, splits=2)
    assert found["precision"] == 1
    assert found["precision_ci"] == [pytest.approx(1 - 3 / 80), 1]


def test_reference_keeps_the_images_of_a_patient_on_one_side():
    rng = np.random.default_rng(9)
    patients = np.repeat(np.arange(40), 5)
    real = (3 * rng.normal(size=(40, 4)))[patients] + 0.05 * rng.normal(size=(200, 4))
    synthetic = 3 * rng.normal(size=(300, 4))
    without, aware = (
        fidelity(real, synthetic, 0),
        fidelity(real, synthetic, 0, patients=np.array([f"p{i}" for i in patients])),
    )
    assert without["precision_reference"] > 0.8  # neighbours are of the same patient
    assert aware["precision_reference"] < without["precision_reference"] - 0.2
    assert aware["frechet_reference"] > 1.5 * without["frechet_reference"]
    with pytest.raises(ValueError, match="patients do not fit"):
        fidelity(real, synthetic, 0, patients=patients[:-1])


def test_prdc_is_none_with_too_few_images():
    rng = np.random.default_rng(10)
    found = fidelity(rng.normal(size=(8, 2)), rng.normal(size=(30, 2)), seed=0)
    assert [found[f"coverage{end}"] for end in ("", "_ci", "_reference")] == [None] * 3
    assert found["frechet_reference"] > 0
    with pytest.raises(ValueError, match="four real and two synthetic"):
        fidelity(rng.normal(size=(3, 2)), rng.normal(size=(30, 2)), seed=0)


def test_grouped_fidelity_uses_the_rows_of_each_group():
    rng = np.random.default_rng(11)
    real, synthetic = rng.normal(size=(120, 3)), rng.normal(size=(200, 3))
    synthetic[100:] += 3  # the second class is wrong
    groups = {
        "right": (np.arange(60), np.arange(100)),
        "wrong": (np.arange(60, 120), np.arange(100, 200)),
        "few real": (np.arange(19), np.arange(100)),
        "few made": (np.arange(60), np.arange(9)),
        "none": (np.arange(0), np.arange(100)),
    }
    found = grouped_fidelity(real, synthetic, groups, seed=0, splits=2, patients=np.arange(120))
    assert list(found) == list(groups)
    assert found["few real"] is found["few made"] is found["none"] is None
    assert found["wrong"]["frechet"] > 5 * found["right"]["frechet"]
    assert found["wrong"]["recall"] < 0.2 < found["right"]["recall"]
    assert found["right"]["images"] == 30


# --- the label mix of a hospital ----------------------------------------------------------------


@settings(max_examples=60)
@given(SEEDS, st.integers(1, 300), st.integers(1, 300), st.integers(1, 3))
def test_label_mix_rows_are_unique_and_report_their_deviation(seed, made, target, width):
    rng = np.random.default_rng(seed)
    chance = rng.random(width)
    have, want = (
        (rng.random((made, width)) < chance).astype(int),
        rng.integers(0, 2, (target, width)),
    )
    rows, deviation = label_mix_rows(have, want, seed)
    occurring = [v for v in np.unique(want, axis=0) if (have == v).all(1).any()]
    known = sum((want == v).all(1).sum() for v in occurring)
    assert missing_share(have, want) == pytest.approx(1 - known / target)
    assert len(rows) == len(set(rows))
    assert {tuple(v) for v in have[rows]} <= {tuple(v) for v in occurring}
    if not occurring:
        assert (len(rows), deviation) == (0, 0)
        return
    wanted, supply = (
        np.array([(labels == v).all(1).sum() for v in occurring]) for labels in (want, have)
    )
    found = np.array([(have[rows] == v).all(1).sum() for v in occurring])
    assert deviation == pytest.approx(np.abs(found / len(rows) - wanted / known).sum() / 2)
    total = max(int((supply * known / wanted).min() + 1e-9), min(100, target))
    short = found < wanted / known * total - 1
    assert (found[short] == supply[short]).all()  # only vectors that are too rare are missing
    assert (found < wanted / known * total + 1).all()


def test_label_mix_has_as_many_rows_as_the_rarest_vector_allows():
    have = np.repeat(np.eye(2, dtype=np.uint8), [300, 100], axis=0)
    rows, deviation = label_mix_rows(
        have, np.repeat(np.eye(2, dtype=np.uint8), [30, 10], axis=0), seed=0
    )
    assert sorted(rows) == list(range(400))  # the mix is already right
    assert deviation == 0
    half, deviation = label_mix_rows(have, np.repeat(np.eye(2), [10, 10], axis=0), seed=0)
    assert len(half) == len(set(half)) == 200
    assert (half < 300).sum() == 100
    rare, deviation = label_mix_rows(have, np.repeat(np.eye(2), [100, 900], axis=0), seed=0)
    assert (len(rare), deviation) == (
        111,
        pytest.approx(0, abs=0.01),
    )  # 11 and 100, for 1,000 real images


def test_label_mix_deviates_where_the_exact_mix_is_tiny():
    have = np.repeat(np.eye(2, dtype=np.uint8), [3, 97], axis=0)
    rows, deviation = label_mix_rows(have, np.repeat(np.eye(2), [300, 300], axis=0), seed=0)
    assert len(rows) == len(set(rows)) == 53  # 3 of 50, and the other 50
    assert set(range(3)) <= set(rows)
    assert deviation == pytest.approx(0.5 - 3 / 53)
    rows, _ = label_mix_rows(have, np.repeat(np.eye(2), [3, 3], axis=0), seed=0)
    assert len(rows) == 6  # six real images need no more


def test_perfect_generator_reaches_the_reference_in_a_rare_label_mix():
    rng = np.random.default_rng(12)
    centres = np.array([[0.0] * 6, [3.0] * 6])
    held, made = np.repeat([0, 1], [300, 300]), np.repeat([0, 1], [60, 2000])
    real, synthetic = (centres[kind] + rng.normal(size=(len(kind), 6)) for kind in (held, made))
    rows = label_mix_rows(np.eye(2)[made], np.eye(2)[held], seed=0).rows
    found = fidelity(real, synthetic[rows], seed=0, splits=4)
    assert found["images"] == 120
    for name in ("precision", "recall", "density", "coverage"):
        assert found[name] == pytest.approx(found[f"{name}_reference"], abs=0.08)


def test_label_mix_without_common_vectors_is_empty():
    assert label_mix_rows(np.array([[1, 0]]), np.array([[0, 1]]), 0).rows.size == 0
    assert missing_share(np.array([[1, 0]]), np.array([[0, 1], [1, 0]])) == 0.5
    assert sorted(label_mix_rows(np.zeros((4, 0)), np.zeros((9, 0)), 0).rows) == [
        0,
        1,
        2,
        3,
    ]  # no labels: all rows


# --- SqueezeNet ---------------------------------------------------------------------------------


def _random_weights(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.normal(size=shape) * (2 / np.prod(shape[1:])) ** 0.5
            if len(shape) > 1
            else 0.1 * rng.normal(size=shape)
        )
        for name, shape in squeezenet_shapes().items()
    }


def test_squeezenet_agrees_with_torchvision(tmp_path):
    weights = {name: array.astype(np.float32) for name, array in _random_weights().items()}
    np.savez(tmp_path / "weights.npz", **weights)
    network = squeezenet1_0(weights=None).features.eval()
    state = {f"0.{part}": weights[f"conv1.{part}"] for part in ("weight", "bias")}
    layers = {2: 3, 3: 4, 4: 5, 5: 7, 6: 8, 7: 9, 8: 10, 9: 12}
    names = {"squeeze": "squeeze", "expand1": "expand1x1", "expand3": "expand3x3"}
    for fire in FIRES:
        for ours, theirs in names.items():
            for part in ("weight", "bias"):
                state[f"{layers[fire]}.{theirs}.{part}"] = weights[f"fire{fire}.{ours}.{part}"]
    network.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    images = np.random.default_rng(1).integers(0, 256, (3, 3, 227, 227), dtype=np.uint8)
    bgr = torch.from_numpy(images[:, ::-1].copy()).float() - torch.tensor(
        [104.0, 117.0, 123.0]
    ).view(1, 3, 1, 1)
    with torch.inference_mode():
        expected = network(bgr).mean((2, 3)).numpy() / 100
    extractor = SqueezeNetExtractor(tmp_path / "weights.npz", batch=2)
    np.testing.assert_allclose(extractor(images), expected, rtol=1e-3, atol=1e-5)
    assert "SqueezeNet" in extractor.name
    assert "FID" not in extractor.name


def test_squeezenet_accepts_small_grey_images(tmp_path):
    np.savez(tmp_path / "weights.npz", **_random_weights())
    features = SqueezeNetExtractor(tmp_path / "weights.npz")(np.full((2, 1, 16, 16), 90, np.uint8))
    assert features.shape == (2, 512)
    np.testing.assert_allclose(features[0], features[1], rtol=1e-5)


def test_missing_weights_file_raises_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation\.features.*nothing\.npz"):
        SqueezeNetExtractor(tmp_path / "nothing.npz")


@pytest.mark.parametrize(
    "damage", ["truncated", "text", "missing", "shape", "nan", "pickle", "npy"]
)
def test_damaged_weights_file_raises_a_data_error(tmp_path, damage):
    path = tmp_path / "weights.npz"
    weights = _random_weights()
    if damage == "missing":
        del weights["fire5.squeeze.bias"]
    elif damage == "shape":
        weights["conv1.weight"] = np.zeros((96, 3, 3, 3))
    elif damage == "nan":
        weights["conv1.bias"] = np.full(96, np.nan)
    elif damage == "pickle":
        weights["conv1.bias"] = np.array([object()] * 96)
    np.savez(path, **weights)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    elif damage == "text":
        path.write_text("no weights")
    elif damage == "npy":
        with open(path, "wb") as stream:
            np.save(stream, np.zeros(3))
    with pytest.raises(DataError, match=r"weights\.npz is not a SqueezeNet"):
        SqueezeNetExtractor(path)
