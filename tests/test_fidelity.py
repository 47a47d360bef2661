"""Fréchet and kernel distances against their definitions, and the extractors."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models import squeezenet1_0

from fedgan.errors import ConfigError, DataError
from fedgan.evaluation.features import FIRES, SqueezeNetExtractor, squeezenet_shapes
from fedgan.evaluation.fidelity import fidelity, frechet_distance, frechet_gaussians, kernel_distance, polynomial_kernel

SEEDS = st.integers(0, 2**32 - 1)


def _covariance(rng, dimension):
    root = rng.normal(size=(dimension, 2 * dimension))
    return root @ root.T / dimension


# --- Fréchet distance ----------------------------------------------------------------------------


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    a, b, shift = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.0]), np.array([1.0, -2.0, 0.5])
    expected = (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_gaussians(shift, np.diag(a), np.zeros(3), np.diag(b)) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=25)
@given(SEEDS, st.integers(1, 8))
def test_frechet_agrees_with_the_matrix_square_root(seed, dimension):
    rng = np.random.default_rng(seed)
    x, y, mean = _covariance(rng, dimension), _covariance(rng, dimension), rng.normal(size=dimension)
    root = scipy.linalg.sqrtm(x @ y)
    expected = mean @ mean + np.trace(x + y - 2 * np.real(root))
    assert frechet_gaussians(mean, x, np.zeros(dimension), y) == pytest.approx(expected, rel=1e-6, abs=1e-8)


@settings(max_examples=25)
@given(SEEDS, st.integers(2, 12), st.integers(1, 10))
def test_frechet_of_a_set_with_itself_is_zero_and_a_shift_costs_its_square(seed, count, dimension):
    rng = np.random.default_rng(seed)
    x, shift = rng.normal(size=(count, dimension)), rng.normal(size=dimension)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + shift) == pytest.approx(shift @ shift, rel=1e-6, abs=1e-9)


@settings(max_examples=25)
@given(SEEDS)
def test_frechet_is_symmetric_and_moves_with_both_sets(seed):
    rng = np.random.default_rng(seed)
    x, y, shift = rng.normal(size=(20, 5)), 1 + 2 * rng.normal(size=(30, 5)), 10 * rng.normal(size=5)
    distance = frechet_distance(x, y)
    assert frechet_distance(y, x) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(x + shift, y + shift) == pytest.approx(distance, rel=1e-7)


def test_frechet_stands_fewer_images_than_features():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(10, 64)), rng.normal(size=(12, 64)) + 1
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.maximum(np.real(np.linalg.eigvals(cov_x @ cov_y)), 0))  # of a product of two PSD matrices: real, >= 0
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * roots.sum()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bad", [np.zeros((1, 3)), np.zeros(3), np.full((4, 3), np.nan)])
def test_distances_refuse_features_that_are_no_sample(bad):
    with pytest.raises(ValueError, match="features must be"):
        frechet_distance(bad, np.zeros((4, 3)))
    with pytest.raises(ValueError, match="features must be"):
        kernel_distance(np.zeros((4, 3)), bad)


# --- kernel distance -----------------------------------------------------------------------------


def _naive_kernel_distance(x, y):
    def k(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@settings(max_examples=20)
@given(SEEDS, st.integers(2, 9), st.integers(2, 9), st.integers(1, 12))
def test_kernel_distance_is_the_double_sum_whatever_the_block(seed, n, m, block):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 4)), rng.normal(size=(m, 4)) + 0.5
    assert kernel_distance(x, y, block) == pytest.approx(_naive_kernel_distance(x, y), rel=1e-8, abs=1e-9)


def test_kernel_is_cubic_and_normalised_by_the_dimension():
    x = np.array([[1.0, 2.0], [0.0, -1.0]])
    np.testing.assert_allclose(polynomial_kernel(x, x), [[3.5**3, 0.0], [0.0, 1.5**3]])


def test_kernel_distance_is_unbiased_and_sees_a_difference():
    rng = np.random.default_rng(1)
    same = np.array([kernel_distance(rng.normal(size=(30, 6)), rng.normal(size=(40, 6))) for _ in range(300)])
    assert abs(same.mean()) < 3 * same.std() / np.sqrt(len(same))
    assert (same < 0).mean() > 0.2  # an estimate without bias is often negative
    assert kernel_distance(rng.normal(size=(200, 6)), 1.5 * rng.normal(size=(200, 6))) > 5 * same.std()


# --- both, with floors ---------------------------------------------------------------------------


def test_a_perfect_generator_stands_at_the_floor_and_a_bad_one_above_it():
    rng = np.random.default_rng(2)
    real = rng.normal(size=(400, 8))
    good, bad = fidelity(real, rng.normal(size=(500, 8)), seed=0), fidelity(real, rng.normal(size=(500, 8)) + 0.5, seed=0)
    assert good["frechet"] == pytest.approx(good["frechet_floor"], abs=0.1)
    assert abs(good["kernel"] - good["kernel_floor"]) < 0.1
    assert bad["frechet"] > 5 * bad["frechet_floor"]
    assert bad["kernel"] > 5 * abs(bad["kernel_floor"])
    assert bad["frechet_floor"] == good["frechet_floor"]  # the floor speaks of the real images alone


@pytest.mark.parametrize(("real", "synthetic", "images"), [(101, 500, 50), (400, 30, 30)])
def test_distance_and_floor_have_the_same_size(real, synthetic, images):
    rng = np.random.default_rng(3)
    numbers = fidelity(rng.normal(size=(real, 3)), rng.normal(size=(synthetic, 3)), seed=0)
    assert numbers["images"] == numbers["floor_images"] == images


def test_a_copy_of_the_real_images_is_not_compared_with_itself_in_the_floor():
    real = np.random.default_rng(4).normal(size=(60, 3))
    assert fidelity(real, real, seed=0)["frechet_floor"] > 0


# --- SqueezeNet ----------------------------------------------------------------------------------


def _random_weights(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) * (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1 * rng.normal(size=shape))
        for name, shape in squeezenet_shapes().items()
    }


def test_squeezenet_agrees_with_torchvisions_layers(tmp_path):
    weights = {name: array.astype(np.float32) for name, array in _random_weights().items()}
    np.savez(tmp_path / "weights.npz", **weights)
    network = squeezenet1_0(weights=None).features.eval()
    state = {f"0.{part}": weights[f"conv1.{part}"] for part in ("weight", "bias")}
    places = {2: 3, 3: 4, 4: 5, 5: 7, 6: 8, 7: 9, 8: 10, 9: 12}
    names = {"squeeze": "squeeze", "expand1": "expand1x1", "expand3": "expand3x3"}
    for fire in FIRES:
        for ours, theirs in names.items():
            for part in ("weight", "bias"):
                state[f"{places[fire]}.{theirs}.{part}"] = weights[f"fire{fire}.{ours}.{part}"]
    network.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    images = np.random.default_rng(1).integers(0, 256, (3, 3, 227, 227), dtype=np.uint8)
    bgr = torch.from_numpy(images[:, ::-1].copy()).float() - torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1)
    with torch.inference_mode():
        expected = network(bgr).mean((2, 3)).numpy() / 100
    extractor = SqueezeNetExtractor(tmp_path / "weights.npz", batch=2)
    np.testing.assert_allclose(extractor(images), expected, rtol=1e-3, atol=1e-5)
    assert "SqueezeNet" in extractor.name
    assert "FID" not in extractor.name


def test_squeezenet_takes_small_grey_images(tmp_path):
    np.savez(tmp_path / "weights.npz", **_random_weights())
    features = SqueezeNetExtractor(tmp_path / "weights.npz")(np.full((2, 1, 16, 16), 90, np.uint8))
    assert features.shape == (2, 512)
    np.testing.assert_allclose(features[0], features[1], rtol=1e-5)


def test_a_missing_weights_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation\.features.*nothing\.npz"):
        SqueezeNetExtractor(tmp_path / "nothing.npz")


@pytest.mark.parametrize("damage", ["truncated", "text", "lacking", "shape", "nan", "pickle", "npy"])
def test_a_damaged_weights_file_is_a_data_error(tmp_path, damage):
    path = tmp_path / "weights.npz"
    weights = _random_weights()
    if damage == "lacking":
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
    with pytest.raises(DataError, match=r"weights\.npz is no SqueezeNet"):
        SqueezeNetExtractor(path)
