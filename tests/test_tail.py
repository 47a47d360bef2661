"""Single copies: one copied image is found, clean images are not, and the power is measured."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan.audit.attacks.copies import closest
from fedgan.audit.attacks.copy_controls import plant_copies
from fedgan.audit.attacks.nearest import nearest_of_others
from fedgan.audit.attacks.tail import Neighbours, Outliers, find_outliers, intrinsic_dimension
from fedgan.audit.copy_search import power
from fedgan.audit.rules import POWERFUL, chance_to_find, outliers_stand_out
from fedgan.audit.subject import Space, pixel_space
from fedgan.data.phantoms import CHEST_LABELS, render_chest

SIDE, TRAINING, HELD_OUT, SYNTHETIC = 32, 150, 60, 300


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Phantom radiographs (N, 1, 32, 32) uint8 of different patients."""
    pictures = [
        render_chest(
            (CHEST_LABELS[row % len(CHEST_LABELS)],), np.random.default_rng([5, row]), SIDE
        )[0]
        for row in range(TRAINING + HELD_OUT + SYNTHETIC)
    ]
    return np.stack(pictures)[:, None]


def search(
    space: Space, images: np.ndarray, synthetic: np.ndarray, seed: int = 0, per_patient: int = 2
) -> Outliers:
    """Outliers of `synthetic` among training and held-out images, the first rows of `images`."""
    training, held_out = images[:TRAINING], images[TRAINING : TRAINING + HELD_OUT]
    copies, _, _ = plant_copies(synthetic, training, 1.0, np.random.default_rng(seed))
    rows = space.rows(training)
    made, held, planted = (
        Neighbours.of(space.rows(part), rows, space.moves)
        for part in (synthetic, held_out, copies[:50])
    )
    return find_outliers(
        made,
        held,
        planted,
        rows,
        np.arange(TRAINING) // per_patient,
        np.arange(HELD_OUT) // per_patient,
        closest(held.distances, 5.0),
        seed=seed,
        moves=space.moves,
    )


def is_flagged(found: Outliers) -> bool:
    return outliers_stand_out(
        found.count, found.images, found.held_out_count, found.held_out_images
    )


def test_one_image_copied_twenty_times_and_one_percent_are_found(pictures):
    space, fresh = pixel_space((1, SIDE, SIDE)), pictures[-SYNTHETIC:]
    twenty = np.concatenate([np.repeat(pictures[7:8], 20, axis=0), fresh[20:]])
    found = search(space, pictures, twenty)
    assert found.count == 20
    assert found.flags[:20].all()
    assert is_flagged(found)
    few, planted, _ = plant_copies(fresh, pictures[:TRAINING], 0.01, np.random.default_rng(3))
    found = search(space, pictures, few)
    assert planted.sum() == 3
    assert 1 <= found.count <= 3
    assert planted[found.flags].all()
    assert power(found)["1 %"] > POWERFUL
    assert power(found)["one"] == pytest.approx(found.found_share)


def test_clean_images_stay_clean_in_twenty_seeds(pictures):
    """Other patients take the places of training, held-out and synthetic images."""
    space = pixel_space((1, SIDE, SIDE))
    flagged = 0
    for seed in range(20):
        mixed = pictures[np.random.default_rng(seed).permutation(len(pictures))]
        flagged += is_flagged(search(space, mixed, mixed[-SYNTHETIC:], seed, per_patient=1))
    assert flagged <= 1


def test_blurred_images_are_near_to_many_patients_and_no_copies(pictures):
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, TRAINING, (SYNTHETIC, 8))
    means = pictures[chosen].astype(float).mean(1).round().astype(np.uint8)
    assert search(pixel_space((1, SIDE, SIDE)), pictures, means).count == 0


def test_a_held_out_copy_asks_for_more_outliers(pictures):
    doubled = pictures.copy()
    doubled[TRAINING] = doubled[3]  # a patient with two ids
    one = np.concatenate([pictures[7:8], pictures[-SYNTHETIC + 1 :]])
    found = search(pixel_space((1, SIDE, SIDE)), doubled, one)
    assert (found.count, found.held_out_count) == (1, 1)
    assert not is_flagged(found)
    assert power(found)["one"] == 0.0
    assert power(found)["5 %"] < power(search(pixel_space((1, SIDE, SIDE)), pictures, one))["5 %"]


@given(st.integers(2, 5), st.integers(0, 100))
@settings(max_examples=20)
def test_ratio_to_the_power_of_the_dimension_is_uniform(dimension, seed):
    """Uniform points of a cube: the ratios give its dimension (arXiv 1803.06992)."""
    rng = np.random.default_rng(seed)
    points, queries = rng.random((2000, dimension)), rng.uniform(0.3, 0.7, (400, dimension))
    groups = np.arange(2000)
    first, rows = nearest_of_others(queries, points, groups, np.full((400, 1), -1))
    second, _ = nearest_of_others(queries, points, groups, rows[:, None])
    found = intrinsic_dimension(first / second, 0.05)
    assert found == pytest.approx(dimension, rel=0.3)  # 6 standard deviations
    spoiled = np.where(np.arange(400) < 16, 0.0, first / second)  # copies
    assert intrinsic_dimension(spoiled, 0.05) == pytest.approx(dimension, rel=0.35)


def test_nearest_of_others_agrees_with_all_distances():
    rng = np.random.default_rng(0)
    base, queries = rng.normal(size=(60, 5)), rng.normal(size=(20, 5))
    groups, own = rng.integers(0, 6, 60), rng.integers(0, 6, (20, 2))
    far = np.linalg.norm(queries[:, None] - base[None], axis=2)
    far[(own[:, :, None] == groups).any(1)] = np.inf
    distances, rows = nearest_of_others(queries, base, groups, own)
    np.testing.assert_allclose(distances, far.min(1), rtol=1e-5)
    np.testing.assert_array_equal(rows, far.argmin(1))
    alone, _ = nearest_of_others(queries, base, np.zeros(60, int), np.zeros((20, 1), int))
    assert np.isinf(alone).all()


@given(st.integers(0, 40), st.integers(0, 5), st.integers(0, 40))
@settings(max_examples=50)
def test_more_outliers_stand_out_and_more_held_out_ones_less(outliers, real, more):
    assert outliers_stand_out(outliers, 2000, 0, 500) == (outliers > 0)
    if outliers_stand_out(outliers, 2000, real, 500):
        assert outliers_stand_out(outliers + more, 2000, real, 500)
        assert outliers_stand_out(outliers, 2000, max(0, real - 1), 500)
    assert chance_to_find(5, 1.0, 2000, 0, 500) == 1.0
    assert chance_to_find(5, 0.5, 2000, 0, 500) == pytest.approx(1 - 0.5**5)
    assert chance_to_find(5, 1.0, 2000, 2, 500) == 0.0  # 2 of 500 explain 5 of 2,000
