"""MS-SSIM against torchmetrics, and its mean inside classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from fedgan.data.dataset import Rows
from fedgan.evaluation.metrics.ms_ssim import WEIGHTS, intra_class_ms_ssim, ms_ssim, scales


def _images(rng, count, channels, height, width=None):
    """Smooth random images in [0, 255]."""
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, channels, 6, 6)))
    return torch.nn.functional.interpolate(
        coarse, (height, width or height), mode="bilinear"
    ).numpy()


@pytest.mark.parametrize(
    ("height", "width", "channels", "count"),
    [(176, 200, 1, 5), (176, 176, 3, 5), (64, 64, 3, 3), (32, 48, 1, 2)],
)
def test_ms_ssim_agrees_with_torchmetrics(height, width, channels, count):
    rng = np.random.default_rng(0)
    a = _images(rng, 4, channels, height, width)
    b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255)
    b[3] = _images(rng, 1, channels, height, width)[0]  # an unrelated image
    assert scales(height, width) == count
    weights = tuple(float(w) for w in np.array(WEIGHTS[:count]) / sum(WEIGHTS[:count]))
    theirs = multiscale_structural_similarity_index_measure(
        torch.from_numpy(a), torch.from_numpy(b), data_range=255.0, betas=weights, reduction="none"
    )
    np.testing.assert_allclose(ms_ssim(a, b), theirs.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("side", "count"), [(11, 1), (22, 2), (43, 2), (44, 3), (88, 4), (175, 4), (176, 5), (512, 5)]
)
def test_ms_ssim_uses_scales_that_fit_the_window(side, count):
    assert scales(side, 600) == scales(600, side) == count


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(11, 50), st.integers(11, 50))
def test_ms_ssim_of_equal_images_is_one_and_it_is_symmetric(seed, height, width):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 256, (2, 2, 1, height, width), dtype=np.uint8)
    np.testing.assert_allclose(ms_ssim(a, a), 1, atol=1e-6)
    np.testing.assert_allclose(ms_ssim(a, b), ms_ssim(b, a), rtol=1e-4, atol=1e-6)
    assert (ms_ssim(a, b) < 1).all()


def test_ms_ssim_falls_with_noise_and_is_zero_for_an_inverse():
    rng = np.random.default_rng(1)
    image = _images(rng, 1, 1, 64)
    values = [
        ms_ssim(image, np.clip(image + rng.normal(0, sd, image.shape), 0, 255))[0]
        for sd in (0, 5, 20, 80)
    ]
    assert values == sorted(values, reverse=True)
    assert ms_ssim(image, 255 - image)[0] == 0  # a negative mean counts as 0


def test_ms_ssim_of_flat_images_is_their_luminance_term():
    a, b = np.full((1, 1, 32, 32), 100.0), np.full((1, 1, 32, 32), 200.0)
    c1 = (0.01 * 255) ** 2
    luminance = (2 * 100 * 200 + c1) / (100**2 + 200**2 + c1)
    assert ms_ssim(a, b)[0] == pytest.approx(
        luminance ** (WEIGHTS[1] / (WEIGHTS[0] + WEIGHTS[1])), rel=1e-4
    )


def test_ms_ssim_is_equal_for_uint8_and_float_images():
    a, b = np.random.default_rng(2).integers(0, 256, (2, 3, 3, 32, 32), dtype=np.uint8)
    np.testing.assert_array_equal(ms_ssim(a, b), ms_ssim(a.astype(np.float64), torch.from_numpy(b)))


@pytest.mark.parametrize(
    "shapes",
    [((1, 1, 32, 32), (1, 1, 32, 31)), ((1, 32, 32), (1, 32, 32)), ((1, 1, 8, 8), (1, 1, 8, 8))],
)
def test_ms_ssim_refuses_unequal_or_small_images(shapes):
    with pytest.raises(ValueError, match="MS-SSIM needs"):
        ms_ssim(*(np.zeros(shape) for shape in shapes))


# --- inside classes -----------------------------------------------------------------------------


def _classes():
    """20 equal images, 20 different ones, one alone."""
    rng = np.random.default_rng(3)
    unlike = _images(rng, 20, 1, 32)
    alike = np.repeat(_images(rng, 1, 1, 32), 20, axis=0) + rng.normal(0, 2, (20, 1, 32, 32))
    images = np.clip(np.concatenate([alike, unlike, unlike[:1]]), 0, 255).astype(np.uint8)
    return images, np.repeat(np.eye(3, dtype=np.uint8), [20, 20, 1], axis=0)


def test_intra_class_ms_ssim_detects_a_collapsed_class():
    images, labels = _classes()
    found = intra_class_ms_ssim(images, labels, ("alike", "unlike", "alone"), True, pairs=60)
    assert found["alike"] > 0.9
    assert found["unlike"] < found["alike"] - 0.3
    assert found["alone"] is None


def test_intra_class_ms_ssim_averages_pairs_of_different_images():
    images, labels = _classes()
    rows = np.arange(20, 26)
    found = intra_class_ms_ssim(
        Rows(images, rows), labels[rows], ("a", "b", "c"), True, pairs=1500
    )["b"]
    every = [ms_ssim(images[[i]], images[[j]])[0] for i in rows for j in rows if i != j]
    assert found == pytest.approx(np.mean(every), abs=4 * np.std(every) / 1500**0.5)


def test_intra_class_ms_ssim_is_deterministic_by_seed():
    images, labels = _classes()
    first, again, other = (
        intra_class_ms_ssim(images, labels, "abc", True, 20, seed) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_intra_class_ms_ssim_counts_multi_label_images_in_each_class():
    images, _ = _classes()
    labels = np.zeros((41, 2), np.uint8)
    labels[:20] = 1
    found = intra_class_ms_ssim(images, labels, ("a", "b"), False, pairs=30)
    assert found["a"] > 0.9
    assert found["b"] > 0.9
    assert found["no finding"] < 0.7
    assert set(intra_class_ms_ssim(images, labels, ("a", "Normal"), False, pairs=5)) == {
        "a",
        "Normal",
    }  # a label means normal
    assert set(intra_class_ms_ssim(images, labels, ("a", "b"), True, pairs=5)) == {"a", "b"}
