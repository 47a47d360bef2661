"""Nearest neighbours, copy shares with intervals, and the controls of copy detection."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from sklearn.metrics import roc_auc_score

from fedgan.audit.attacks import copies, nearest
from fedgan.audit.attacks.copies import (
    closer_share,
    closest,
    compare,
    find_copies,
    release_threshold,
)
from fedgan.audit.attacks.copy_controls import negative_control, plant_copies, recovered
from fedgan.audit.attacks.nearest import Moves, pixels
from fedgan.data.phantoms import LESION_LABELS, render_lesion
from fedgan.evaluation.metrics.intervals import wilson_interval

SEEDS = st.integers(0, 2**32 - 1)


def cloud(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def contains(interval: tuple[float, float], value: float) -> bool:
    return interval[0] <= value <= interval[1]


def by_brute_force(queries: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    squared = np.square(queries[:, None].astype(np.float64) - base[None].astype(np.float64)).sum(2)
    rows = squared.argmin(1)
    return np.sqrt(squared[np.arange(len(queries)), rows]), rows


@pytest.fixture(scope="module")
def lesions() -> np.ndarray:
    """Procedural lesions (420, 3, 32, 32) uint8."""
    pictures = [
        render_lesion(LESION_LABELS[i % 7], np.random.default_rng([9, i]), 32)[0]
        for i in range(420)
    ]
    return np.stack(pictures).transpose(0, 3, 1, 2)


# --- nearest ------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    SEEDS,
    st.integers(0, 40),
    st.integers(1, 60),
    st.integers(1, 20),
    st.integers(1, 50),
    st.booleans(),
)
def test_nearest_agrees_with_brute_force_for_any_block(seed, q, n, features, block, ties):
    rng = np.random.default_rng(seed)
    queries, base = (rng.normal(size=(rows, features)).astype(np.float32) for rows in (q, n))
    if ties:  # equal rows, and queries that are rows
        base[n // 2 :] = base[: n - n // 2]
        queries[: min(q, n)] = base[: min(q, n)]
    distances, rows = nearest.nearest(queries, base, block)
    expected, expected_rows = by_brute_force(queries, base)
    assert distances == pytest.approx(expected, rel=1e-12, abs=0)
    assert np.array_equal(rows, expected_rows)
    assert rows.dtype == np.int64


@pytest.mark.parametrize("middle", [1e2, 1e4, 1e6])
def test_nearest_is_exact_where_float32_products_are_not(middle):
    base = (np.random.default_rng(0).integers(-50, 50, (200, 24)) + middle).astype(np.float32)
    base[::2] += np.float32(8 * middle)  # two clusters: centering cannot make them small
    queries = base[:100].copy()
    queries[:, 0] += 1
    assert np.array_equal(nearest.nearest(queries, base)[1], by_brute_force(queries, base)[1])
    assert nearest.nearest(base[:100], base)[0].max() == 0


def test_nearest_recomputes_few_rows(monkeypatch):
    measured = []
    exact = nearest._exact
    monkeypatch.setattr(nearest, "_exact", lambda *a: measured.append(len(a[3])) or exact(*a))
    nearest.nearest(cloud(0, 500, 64), cloud(1, 800, 64))
    assert 500 <= sum(measured) < 600


def test_nearest_with_moves_finds_mirrored_and_shifted_copies(lesions):
    base = pixels(lesions[:100])
    copied = pixels(np.roll(lesions[:20, :, :, ::-1], 1, axis=2))  # one row wraps around
    plain = nearest.nearest(copied, base)[0]
    flips = nearest.nearest(copied, base, moves=Moves((3, 32, 32)))[0]
    both, rows = nearest.nearest(copied, base, moves=Moves((3, 32, 32), shifts=1))
    assert np.array_equal(rows, np.arange(20))
    assert (both <= flips).all()
    assert (flips <= plain).all()
    assert np.median(both) < 0.35 * np.median(plain)
    exact_mirror = pixels(lesions[:20, :, :, ::-1])
    assert nearest.nearest(exact_mirror, base, moves=Moves((3, 32, 32)))[0].max() == pytest.approx(
        0, abs=1e-4
    )
    assert nearest.nearest(exact_mirror, base, moves=Moves((3, 32, 32), flips=False))[0].min() > 1


def test_pixel_distances_are_grey_levels_without_brightness(lesions):
    image = lesions[:1].clip(40, 200)
    changed = image.astype(np.int64) + np.where(np.indices(image.shape).sum(0) % 2, 3, -3)
    rows = pixels(np.concatenate([image, image + 20, changed.astype(np.uint8)]))
    assert np.linalg.norm(rows[0] - rows[1]) == pytest.approx(0, abs=1e-3)
    assert np.linalg.norm(rows[0] - rows[2]) == pytest.approx(3, abs=1e-3)


@pytest.mark.parametrize(
    ("queries", "base", "moves"),
    [
        (np.zeros((3, 4)), np.zeros((3, 5)), None),
        (np.zeros((3, 4)), np.zeros((0, 4)), None),
        (np.zeros(4), np.zeros((3, 4)), None),
        (np.full((3, 4), np.nan), np.zeros((3, 4)), None),
        (np.zeros((3, 4)), np.zeros((3, 4)), Moves((1, 2, 3))),
    ],
)
def test_nearest_refuses_sets_that_do_not_fit(queries, base, moves):
    with pytest.raises(ValueError, match=r"queries|base|shape"):
        nearest.nearest(queries, base, moves=moves)


# --- intervals ----------------------------------------------------------------------------------


@given(st.integers(1, 400), st.floats(0, 1))
def test_wilson_interval_agrees_with_scipy(n, share):
    k = round(share * n)
    ci = binomtest(k, n).proportion_ci(0.95, "wilson")
    assert wilson_interval(k / n, n) == pytest.approx((ci.low, ci.high), abs=1e-9)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.floats(0.1, 50))
def test_closest_is_the_percentile_and_includes_one_image(distances, percentile):
    values = np.array(distances)
    threshold = closest(values, percentile)
    assert threshold in values
    allowed = max(1, int(len(values) * percentile / 100 + 1e-9))
    assert (values < threshold).sum() < allowed <= (values <= threshold).sum()


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.5])
@pytest.mark.parametrize("held_out", [20, 60, 300])
def test_copy_share_intervals_have_their_coverage(held_out, shift):
    """Distances of a known distribution, so the share below the threshold is known."""
    rng = np.random.default_rng([held_out, int(10 * shift)])
    excess = real = 0
    for _ in range(400):
        found = compare(rng.normal(size=500) - shift, rng.normal(size=held_out), 5.0)
        below = norm.cdf(found.threshold)
        real += contains(found.real_ci, below)
        excess += contains(found.excess_ci, norm.cdf(found.threshold + shift) - below)
    assert 0.92 <= real / 400 <= 0.98
    assert excess / 400 >= 0.9


def test_copy_share_intervals_account_for_patients():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    covered = {True: 0, False: 0}
    for _ in range(300):
        distances = rng.normal(size=40)[groups]  # all images of a patient at one distance
        for grouped in covered:
            found = compare(
                rng.normal(size=1000), distances, 10.0, real_groups=groups if grouped else None
            )
            covered[grouped] += contains(found.real_ci, norm.cdf(found.threshold))
    assert covered[True] / 300 > 0.92
    assert covered[False] / 300 < 0.75


@settings(max_examples=40)
@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
def test_matched_memorised_share_averages_smaller_releases(seed, drawn, most):
    most = min(most, drawn)
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 4, drawn)
    flags = rng.random(drawn) < 0.6
    chosen = [np.array(pick) for pick in itertools.combinations(range(drawn), most)]
    expected = np.mean([len(set(rows[pick][flags[pick]])) / 4 for pick in chosen])
    hits = np.bincount(rows[flags], minlength=4)
    assert copies._hit_share(hits, drawn, most) == pytest.approx(expected, abs=1e-9)


# --- findings -----------------------------------------------------------------------------------


def test_independent_images_have_no_excess():
    findings = [
        find_copies(
            cloud(3 * s, 400, 6), cloud(3 * s + 1, 500, 6), cloud(3 * s + 2, 300, 6), seed=s
        )
        for s in range(40)
    ]
    assert {found.held_out_share for found in findings} == {0.05}
    assert abs(np.mean([found.excess for found in findings])) < 0.01
    assert sum(contains(found.excess_ci, 0) for found in findings) >= 36
    assert sum(contains(found.held_out_ci, 0.05) for found in findings) == 40
    assert np.mean([found.closer_share for found in findings]) == pytest.approx(0.5, abs=0.015)
    assert sum(contains(found.closer_ci, 0.5) for found in findings) >= 34
    gaps = [found.memorised_matched - found.memorised_held_out for found in findings]
    assert abs(np.mean(gaps)) < 0.005


def test_planted_copies_are_counted_and_listed():
    training, held_out, synthetic = cloud(1, 500, 16), cloud(2, 400, 16), cloud(3, 600, 16)
    sources = np.random.default_rng(4).choice(500, 60, replace=False)
    synthetic[100:160] = training[sources] + 0.05 * cloud(5, 60, 16)
    found = find_copies(synthetic, training, held_out, seed=0)
    assert found.excess_ci[0] > 0
    assert found.copying_share == pytest.approx(0.1 + 0.9 * 0.05, abs=0.03)
    assert found.memorised_share >= 60 / 500
    assert found.memorised_matched_ci[0] > found.memorised_held_out
    assert found.closer_ci[0] > 0.5
    assert len(found.pairs) == 24
    assert {(s, t) for s, t, _ in found.pairs} <= set(
        zip(range(100, 160), sources.tolist(), strict=True)
    )
    assert [d for _, _, d in found.pairs] == sorted(found.distances)[:24]
    assert np.array_equal(found.rows[100:160], sources)
    assert (
        found.synthetic_images,
        found.reference_images,
        found.held_out_images,
        found.matched_images,
    ) == (600, 500, 400, 400)


def test_repeated_copy_counts_as_one_memorised_image():
    training, held_out = cloud(1, 300, 16), cloud(2, 300, 16)
    found = find_copies(np.repeat(training[7:8], 200, 0), training, held_out, seed=0)
    assert found.copying_share == 1
    assert found.memorised_share == 1 / 300
    assert found.memorised_matched == pytest.approx(1 / 300)


def test_closer_share_is_neutral_for_typical_images():
    """Typical images are within the threshold, but equally near to training and to other images."""
    synthetic = 0.5 * cloud(1, 800, 8)
    found = find_copies(synthetic, cloud(2, 400, 8), cloud(3, 400, 8), seed=0)
    assert found.excess_ci[0] > 0
    assert contains(found.closer_ci, 0.5)


def test_closer_share_matches_the_numbers_of_rows():
    training, held_out, synthetic = cloud(1, 4000, 6), cloud(2, 200, 6), cloud(3, 1000, 6)
    unmatched = nearest.nearest(synthetic, training)[0] < nearest.nearest(synthetic, held_out)[0]
    assert unmatched.mean() > 0.85
    matched = [
        closer_share(synthetic, training, cloud(4 + s, 200, 6), seed=s, bootstrap=1)[0]
        for s in range(10)
    ]
    assert np.mean(matched) == pytest.approx(0.5, abs=0.04)
    # More queries hit more training images; equally many queries hit equally many.
    found = find_copies(synthetic, training, held_out, seed=0)
    assert found.memorised_share > 3 * found.memorised_held_out
    assert contains(found.memorised_held_out_ci, found.memorised_matched)


def test_copy_findings_are_deterministic_by_seed():
    sets = cloud(1, 100, 4), cloud(2, 400, 4), cloud(3, 90, 4)
    first, again, other = (dataclasses.asdict(find_copies(*sets, seed=seed)) for seed in (1, 1, 2))
    assert first.keys() == other.keys()
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert {key for key in first if not np.array_equal(first[key], other[key])} <= {
        "closer_share",
        "closer_ci",
    }


def test_find_copies_refuses_unusable_sets():
    good = cloud(0, 20, 3)
    for position in range(3):
        sets = [good] * 3
        sets[position] = good[:1]
        with pytest.raises(ValueError, match="two images or more"):
            find_copies(*sets, seed=0)
    with pytest.raises(ValueError, match="percentile"):
        find_copies(good, good, good, seed=0, percentile=95.0)
    with pytest.raises(ValueError, match="groups"):
        find_copies(good, good, good, seed=0, held_out_groups=np.zeros(3))


def test_release_threshold_drops_one_percent_and_all_copies():
    dropped = []
    for s in range(30):
        training = cloud(4 * s, 400, 8)
        threshold = release_threshold(training, cloud(4 * s + 1, 500, 8))
        dropped.append((nearest.nearest(cloud(4 * s + 2, 500, 8), training)[0] <= threshold).mean())
        assert (
            nearest.nearest(training + 0.01 * cloud(4 * s + 3, 400, 8), training)[0] <= threshold
        ).all()
    assert np.mean(dropped) == pytest.approx(0.01, abs=0.003)
    assert (
        release_threshold(training, training[:50] + 1)
        == nearest.nearest(training[:50] + 1, training)[0].min()
    )


# --- controls -----------------------------------------------------------------------------------


def test_plant_copies_replaces_a_share_by_changed_images(lesions):
    synthetic, training = lesions[:100], lesions[100:300]
    before = synthetic.copy()
    images, planted, rows = plant_copies(
        synthetic, training, 0.3, np.random.default_rng(0), shift=0, mirrored=0.0
    )
    assert planted.sum() == 30
    assert np.array_equal(planted, rows >= 0)
    assert len(set(rows[planted])) == 30
    difference = images[planted].astype(int) - training[rows[planted]]
    assert np.abs(difference).max() == 2
    assert np.array_equal(images[~planted], synthetic[~planted])
    assert np.array_equal(synthetic, before)
    assert plant_copies(synthetic, training[:5], 0.3, np.random.default_rng(0))[1].sum() == 30


def test_positive_control_finds_moved_and_mirrored_copies(lesions):
    training, held_out, synthetic = lesions[:160], lesions[160:300], lesions[300:]
    images, planted, rows = plant_copies(synthetic, training, 0.2, np.random.default_rng(0))
    moves = Moves((3, 32, 32), shifts=1)
    clean, leaking = (
        find_copies(pixels(s), pixels(training), pixels(held_out), seed=0, moves=moves)
        for s in (synthetic, images)
    )
    result = recovered(leaking, planted, clean, rows)
    assert result.passed
    assert result.auc == pytest.approx(roc_auc_score(planted, -leaking.distances), abs=1e-12)
    assert result.auc > 0.98
    assert result.right_row == 1
    assert result.planted_share == 0.2
    assert leaking.excess_ci[0] > 0
    assert contains(clean.excess_ci, 0)
    # Pixels without moves miss some of them, and the control fails.
    unmoved = [
        find_copies(pixels(s), pixels(training), pixels(held_out), seed=0)
        for s in (synthetic, images)
    ]
    assert recovered(unmoved[1], planted, unmoved[0]).auc < 0.9
    assert not recovered(unmoved[1], planted, unmoved[0]).passed


def test_insensitive_detector_fails_the_positive_control():
    rng = np.random.default_rng(0)
    found = find_copies(cloud(1, 400, 4), cloud(2, 300, 4), cloud(3, 300, 4), seed=0)
    planted = rng.random(400) < 0.2  # flagged, but not planted
    assert not recovered(found, planted).passed
    assert recovered(found, planted).auc == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match="both kinds"):
        recovered(found, np.zeros(400, bool))


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_found_share_estimates_the_planted_share(share):
    rng = np.random.default_rng(1)
    inside, estimates = 0, []
    for s in range(30):
        training, held_out, synthetic = (
            cloud(3 * s, 300, 8),
            cloud(3 * s + 1, 300, 8),
            cloud(3 * s + 2, 400, 8),
        )
        clean = find_copies(synthetic, training, held_out, seed=0, bootstrap=1)
        planted = np.zeros(400, bool)
        planted[rng.choice(400, round(400 * share), replace=False)] = True
        synthetic[planted] = training[rng.choice(300, planted.sum())] + 0.01
        result = recovered(
            find_copies(synthetic, training, held_out, seed=0, bootstrap=1), planted, clean
        )
        inside += result.passed
        estimates.append(result.found_share)
    assert np.mean(estimates) == pytest.approx(share, abs=0.01)
    assert inside >= 28


def test_negative_control_passes_on_held_out_images():
    training = cloud(1, 400, 6)
    groups = np.repeat(np.arange(100), 3)
    held_out = cloud(2, 100, 6)[groups] + 0.1 * cloud(3, 300, 6)
    for names in (None, groups):
        control = negative_control(training, held_out, seed=0, held_out_groups=names)
        assert control.passed
        assert abs(control.mean_excess) < 0.02
        assert control == negative_control(training, held_out, seed=0, held_out_groups=names)
    with pytest.raises(ValueError, match="four or more patients"):
        negative_control(training, held_out, seed=0, held_out_groups=np.arange(300) % 3)


def test_negative_control_fails_with_wrong_intervals(monkeypatch):
    monkeypatch.setattr(copies, "wilson_interval", lambda share, count: (share, share))
    monkeypatch.setattr(copies, "_population_share", lambda share, count: (share, share))
    assert not negative_control(cloud(1, 200, 6), cloud(2, 200, 6), seed=0).passed
