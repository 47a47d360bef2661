"""Contrastive embedding: NT-Xent against the paper, and copies found among phantoms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedgan.audit.attacks.contrastive import (
    DIMENSION,
    build_network,
    change,
    nt_xent,
    train_embedding,
)
from fedgan.audit.attacks.copies import find_copies
from fedgan.audit.attacks.copy_controls import plant_copies, recovered
from fedgan.audit.attacks.nearest import nearest
from fedgan.data.phantoms import LESION_LABELS, render_lesion


@pytest.fixture(scope="module")
def lesions() -> np.ndarray:
    """Procedural lesions (360, 3, 32, 32) uint8."""
    pictures = [
        render_lesion(LESION_LABELS[i % 7], np.random.default_rng([4, i]), 32)[0]
        for i in range(360)
    ]
    return np.stack(pictures).transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def embedding(lesions):
    return train_embedding(lesions[:160], seed=0, steps=30)


def test_nt_xent_agrees_with_the_paper():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(10, 6))  # the views of image k are 2k and 2k + 1, as in algorithm 1
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    tau = 0.3

    def loss(i: int, j: int) -> float:
        others = sum(math.exp(z[i] @ z[k] / tau) for k in range(10) if k != i)
        return -math.log(math.exp(z[i] @ z[j] / tau) / others)

    expected = np.mean([loss(2 * k, 2 * k + 1) + loss(2 * k + 1, 2 * k) for k in range(5)]) / 2
    views = torch.from_numpy(z)
    assert float(nt_xent(views[0::2], views[1::2], tau)) == pytest.approx(expected, rel=1e-10)


def test_change_is_individual_and_keeps_the_content(lesions):
    images = torch.from_numpy(lesions[:2].repeat(8, 0)).float() / 127.5 - 1
    changed = change(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape
    assert len({row.tobytes() for row in changed.numpy()}) == 16
    assert torch.equal(changed, change(images, torch.Generator().manual_seed(0)))

    def mean_gap(a, b):
        return float(
            (a - a.mean((1, 2, 3), keepdim=True) - b + b.mean((1, 2, 3), keepdim=True))
            .square()
            .mean()
        )

    both_ways = min(mean_gap(changed[:8], images[:8]), mean_gap(changed[:8], images[:8].flip(3)))
    assert both_ways < mean_gap(images[:8], images[8:])


def test_embedding_rows_are_unit_and_invariant_to_mirroring(embedding, lesions):
    features = embedding.features(lesions[:20])
    assert features.shape == (20, DIMENSION)
    assert features.dtype == np.float32
    assert np.linalg.norm(features, axis=1) == pytest.approx(1, abs=1e-5)
    assert embedding.features(np.ascontiguousarray(lesions[:20, :, :, ::-1])) == pytest.approx(
        features, abs=1e-5
    )
    assert embedding.features(lesions[:0]).shape == (0, DIMENSION)


def test_changed_copies_are_nearest_to_their_source(embedding, lesions):
    training, held_out, synthetic = lesions[:160], lesions[160:260], lesions[260:]
    images, planted, rows = plant_copies(
        synthetic, training, 0.3, np.random.default_rng(0), mirrored=0.5
    )
    features = [embedding.features(part) for part in (training, held_out, synthetic, images)]
    clean, leaking = (find_copies(part, features[0], features[1], seed=0) for part in features[2:])
    result = recovered(leaking, planted, clean, rows)
    assert result.passed
    assert result.right_row is not None
    assert result.right_row > 0.9
    # Training matters: the untrained network finds fewer.
    untrained = train_embedding(training, seed=0, steps=0)
    before = find_copies(
        untrained.features(images),
        untrained.features(training),
        untrained.features(held_out),
        seed=0,
    )
    assert recovered(before, planted).auc < result.auc


def test_embedding_finds_rotated_copies(embedding, lesions):
    picture = torch.from_numpy(lesions[:60]).float() / 127.5 - 1
    turned = change(picture, torch.Generator().manual_seed(1))
    copies = ((turned + 1) * 127.5).clamp(0, 255).round().byte().numpy()
    assert (
        nearest(embedding.features(copies), embedding.features(lesions[:160]))[1] == np.arange(60)
    ).mean() > 0.8


def test_embedding_is_deterministic_and_keeps_the_global_rng(lesions):
    state = torch.get_rng_state()
    first, again, other = (
        train_embedding(lesions[:40], seed=seed, steps=4).features(lesions[:9])
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("side", [8, 16, 24, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_embedding_supports_every_image_size(side, channels):
    assert build_network(channels, side)(torch.zeros(2, channels, side, side)).shape == (
        2,
        DIMENSION,
    )


def test_embedding_averages_large_images_down():
    images = np.random.default_rng(0).integers(0, 256, (4, 1, 128, 128), dtype=np.uint8)
    trained = train_embedding(images, seed=0, steps=1)
    assert trained.side == 64
    assert trained.features(images).shape == (4, DIMENSION)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (4, 1, 32, 16), (4, 1, 4, 4)])
def test_embedding_refuses_unusable_images(shape):
    with pytest.raises(ValueError, match="square"):
        train_embedding(np.zeros(shape, np.uint8), seed=0, steps=1)
