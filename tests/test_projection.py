"""Latent projection recovers the generator's images; the gap detects memorisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan.audit.attacks import projection
from fedgan.audit.attacks.projection import null_projection_gap, project, projection_gap
from fedgan.config import ModelSettings
from fedgan.errors import DataError, FedganError
from fedgan.models.stylegan2.generator import Generator

SIDE = 8
MODEL = ModelSettings(z_dim=8, w_dim=8, channel_base=64, channel_max=8)


def make_generator(seed, label_dim=2):
    """An untrained generator with effective noise and styles."""
    rng = torch.Generator().manual_seed(seed)
    generator = Generator(MODEL, SIDE, 1, label_dim, rng)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.05)
    return generator


def own_images(generator, count, seed):
    """Images of the generator, (N, 1, SIDE, SIDE) uint8, and their labels."""
    z = torch.randn(count, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    labels = np.eye(max(generator.label_dim, 1))[np.arange(count) % max(generator.label_dim, 1)][
        :, : generator.label_dim
    ]
    with torch.no_grad():
        images = generator(z, torch.from_numpy(labels).float(), noise="const")
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).numpy(), labels


def holds(interval, value):
    return interval[0] <= value <= interval[1]


@pytest.fixture(scope="module")
def generator():
    return make_generator(3)


# --- projection ---------------------------------------------------------------------------------


def test_project_recovers_the_generators_own_images(generator):
    images, labels = own_images(generator, 12, 50)
    start, _ = project(generator, images, labels, steps=0)
    distances, ws = project(generator, images, labels, steps=150)
    assert (images == 255).any()  # white that the generator overshoots must not add to the distance
    assert (distances < 0.2 * start).all()
    assert (distances < 1).all()  # grey levels; rounding alone is 0.3
    with torch.no_grad():
        made = generator.synthesis(torch.from_numpy(ws), noise="const").clamp(-1, 1) * 127.5 + 127.5
    by_hand = np.sqrt(((made.numpy() - images) ** 2).mean((1, 2, 3)))
    assert distances == pytest.approx(by_hand, rel=1e-4)
    assert ws.shape == (12, generator.synthesis.num_ws, generator.w_dim)
    assert (ws == ws[:, :1]).all()


def test_project_treats_images_of_a_batch_independently(generator):
    images, labels = own_images(make_generator(4), 7, 51)
    together, ws = project(generator, images, labels, steps=25, batch=7)
    for batch in (1, 3):
        distances, others = project(generator, images, labels, steps=25, batch=batch)
        assert distances == pytest.approx(together, rel=1e-3, abs=1e-3)
        assert others == pytest.approx(ws, rel=1e-2, abs=1e-2)
    some, _ = project(generator, images[[2, 5]], labels[[2, 5]], steps=25)
    assert some == pytest.approx(together[[2, 5]], rel=1e-3, abs=1e-3)


def test_project_is_deterministic_and_keeps_the_global_rng(generator):
    images, labels = own_images(make_generator(4), 3, 51)
    torch.manual_seed(0)
    first = project(generator, images, labels, steps=5, seed=9)
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    again = project(generator, images, labels, steps=5, seed=9)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not np.array_equal(first[0], project(generator, images, labels, steps=5, seed=10)[0])


def test_project_keeps_the_best_step(generator, monkeypatch):
    """A learning rate that overshoots must not end worse than the start."""
    images, labels = own_images(make_generator(4), 5, 51)
    start, _ = project(generator, images, labels, steps=0)
    monkeypatch.setattr(projection, "LEARNING_RATE", 50.0)
    assert (project(generator, images, labels, steps=10)[0] <= start + 1e-6).all()


def test_project_restores_the_generator(generator):
    images, labels = own_images(generator, 2, 52)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    generator.train()
    generator.mapping.fc0.weight.requires_grad_(False)
    project(generator, images, labels, steps=3)
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    assert generator.training
    assert all(parameter.grad is None for parameter in generator.parameters())
    wanted = {name: parameter.requires_grad for name, parameter in generator.named_parameters()}
    assert [name for name, want in wanted.items() if not want] == ["mapping.fc0.weight"]
    generator.requires_grad_(True)


def test_project_starts_from_the_labels_of_the_image(generator):
    """Starts depend on the label vector; more label vectors than the cache holds change nothing."""
    images, labels = own_images(generator, 8, 53)
    start, _ = project(generator, images, labels, steps=0)
    other, _ = project(generator, images, labels[:, ::-1], steps=0)
    assert start.mean() < other.mean()
    old = projection.CACHED_VECTORS
    try:
        projection.CACHED_VECTORS = 1
        assert np.array_equal(project(generator, images, labels, steps=0)[0], start)
    finally:
        projection.CACHED_VECTORS = old


def test_project_supports_unconditional_generators():
    generator = make_generator(5, label_dim=0)
    images, labels = own_images(generator, 3, 1)
    start, _ = project(generator, images, labels, steps=0)
    distances, _ = project(generator, images, labels, steps=30, batch=2)
    assert (distances < start).all()


def test_project_refuses_unusable_arguments(generator):
    images, labels = own_images(generator, 2, 52)
    with pytest.raises(ValueError, match="label vector"):
        project(generator, images, labels[:, :1])
    with pytest.raises(FedganError, match=r"do not fit a generator of 1 × 8²"):
        project(generator, images[:, :, :4, :4], labels)
    broken = make_generator(0)
    with torch.no_grad():
        broken.synthesis.b8.torgb.bias.fill_(torch.nan)
    with pytest.raises(FedganError, match="diverged"):
        project(broken, images, labels, steps=2)


def test_project_compares_candidates_at_a_smaller_size(generator, monkeypatch):
    images, labels = own_images(generator, 4, 52)
    full, _ = project(generator, images, labels, steps=0)
    monkeypatch.setattr(projection, "CANDIDATE_SIDE", 4)
    small, _ = project(generator, images, labels, steps=0)
    assert (
        small >= full - 1e-4
    ).all()  # the choice at full size is the best one, the small one is close
    assert small.mean() < 1.5 * full.mean()


# --- gap ----------------------------------------------------------------------------------------


def test_projection_gap_by_hand():
    found = projection_gap(
        np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0, 8.0]), seed=0, bootstrap=50
    )
    assert (found.gap, found.median_gap) == (3.0, 3.0)
    assert found.auc == pytest.approx(
        (4 + 3.5 + 3) / 12
    )  # 1 is below all four; 2 ties with one; 3 is below three
    assert (found.train_mean, found.held_out_mean, found.images) == (2.0, 5.0, (3, 4))
    assert holds(found.gap_ci, 3.0)
    assert holds(found.median_gap_ci, 3.0)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_weighted_median_is_the_median_of_repeated_values(seed, count):
    rng = np.random.default_rng(seed)
    values, weights = rng.integers(0, 9, count) / 4, rng.integers(0, 4, (5, count))
    weights[:, 0] += 1
    repeated = [np.median(np.repeat(values, row)) for row in weights]
    assert projection._medians(values, weights.astype(float)) == pytest.approx(repeated, abs=1e-12)


def test_projection_gap_of_one_distribution_covers_zero():
    rng = np.random.default_rng(0)
    found = [
        projection_gap(rng.gamma(4, 2, 120), rng.gamma(4, 2, 90), seed, bootstrap=200)
        for seed in range(100)
    ]
    for interval, value in (("gap_ci", 0), ("median_gap_ci", 0), ("auc_ci", 0.5)):
        assert 86 <= sum(holds(getattr(part, interval), value) for part in found) <= 100
    halves = [null_projection_gap(rng.gamma(4, 2, 201), seed, bootstrap=200) for seed in range(60)]
    assert sum(holds(part.gap_ci, 0) for part in halves) >= 52
    assert halves[0].images == (100, 101)


def test_projection_gap_accounts_for_patients():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(30), 8)
    train, held_out = (np.repeat(rng.gamma(4, 2, 30), 8) for _ in range(2))
    alone = projection_gap(train, held_out, 0, bootstrap=300)
    together = projection_gap(
        train, held_out, 0, bootstrap=300, train_groups=patients, held_out_groups=patients
    )
    assert alone.gap == together.gap
    assert np.diff(together.gap_ci) > 2 * np.diff(alone.gap_ci)
    null = null_projection_gap(
        np.repeat([1.0, 2.0], 40), 0, bootstrap=20, groups=np.repeat([0, 1], 40)
    )
    assert abs(null.gap) == 1.0


def test_projection_gap_detects_a_memorising_generator(
    generator,
):
    """Training images are the generator's own with grain, held-out ones of a similar generator.

    Between two sets of held-out images there is no gap.
    """
    rng = np.random.default_rng(0)
    (own, labels), (foreign, _), (more, _) = (
        own_images(maker, 24, seed)
        for maker, seed in ((generator, 60), (make_generator(4), 61), (make_generator(4), 62))
    )
    own = np.clip(own + rng.integers(-3, 4, own.shape), 0, 255).astype(np.uint8)
    by_heart, held_out, others = (
        project(generator, images, labels, steps=60)[0] for images in (own, foreign, more)
    )
    overfitted = projection_gap(by_heart, held_out, seed=0, bootstrap=300)
    assert overfitted.gap_ci[0] > 5
    assert overfitted.median_gap_ci[0] > 0
    assert overfitted.auc > 0.95
    fair = projection_gap(others, held_out, seed=0, bootstrap=300, level=0.99)
    assert holds(fair.gap_ci, 0)
    assert holds(fair.auc_ci, 0.5)


def test_projection_gap_refuses_too_few_distances():
    with pytest.raises(DataError, match="two finite distances"):
        projection_gap(np.array([1.0]), np.array([1.0, 2.0]), 0)
    with pytest.raises(DataError, match="two finite distances"):
        projection_gap(np.array([1.0, np.inf]), np.array([1.0, 2.0]), 0)
    with pytest.raises(DataError, match="two finite distances"):
        null_projection_gap(np.array([1.0, 2.0, 3.0]), 0)
