"""Membership attacks: known cases, scikit-learn, scipy, chance, planted leaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gaussian_kde
from sklearn.metrics import roc_auc_score, roc_curve
from torch.nn.functional import softplus

from fedgan.audit.attacks.density import (
    choose_bandwidth,
    density_ratio_scores,
    density_scores,
    fit_reduction,
    log_density,
)
from fedgan.audit.attacks.logan import discriminator_scores
from fedgan.audit.attacks.membership import LEAK_AUC, score_attack
from fedgan.audit.attacks.nearest import nearest
from fedgan.audit.attacks.roc import roc_figures
from fedgan.audit.attacks.shadow import (
    assign_shadows,
    calibrated_scores,
    likelihood_ratio_scores,
)
from fedgan.config import ModelSettings
from fedgan.errors import ConfigError, DataError, FedganError
from fedgan.evaluation.metrics.intervals import wilson_interval
from fedgan.models.stylegan2.discriminator import Discriminator

SEEDS = st.integers(0, 2**32 - 1)


def figures(members, others, rates=()):
    """AUC and rates with weight 1 for each image."""
    weights = np.ones((1, len(members))), np.ones((1, len(others)))
    auc, shares = roc_figures(np.asarray(members, float), np.asarray(others, float), weights, rates)
    return auc[0], shares[0]


def contains(interval, value):
    return interval[0] <= value <= interval[1]


# --- ROC figures --------------------------------------------------------------------------------


def test_roc_figures_by_hand():
    # Of 2 × 4 pairs a member wins (5 > 1, 2, 3, 4) and (3 > 1, 2; ties with 3): 4 + 2.5.
    auc, shares = figures([5, 3], [1, 2, 3, 4], (0.0, 0.24, 0.25, 0.5, 1.0))
    assert auc == 6.5 / 8
    assert list(shares) == [0.5, 0.5, 0.5, 1.0, 1.0]


@settings(max_examples=60)
@given(
    SEEDS,
    st.integers(2, 80),
    st.integers(2, 80),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.01, 0.1, 0.3, 1.0]),
)
def test_roc_figures_agree_with_scikit_learn(seed, m, n, digits, rate):
    rng = np.random.default_rng(seed)
    members, others = np.round(rng.normal(0.5, 1, m), digits), np.round(rng.normal(size=n), digits)
    truth, scores = np.repeat([1, 0], [m, n]), np.concatenate([members, others])
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    auc, (share,) = figures(members, others, (rate,))
    assert auc == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert share == pytest.approx(true[false <= rate + 1e-12].max(), abs=1e-12)


@settings(max_examples=40)
@given(SEEDS, st.integers(2, 30), st.integers(2, 30))
def test_roc_weights_equal_repeated_images(seed, m, n):
    rng = np.random.default_rng(seed)
    members, others = rng.integers(0, 6, m).astype(float), rng.integers(0, 6, n).astype(float)
    often, other_often = rng.integers(1, 4, m), rng.integers(1, 4, n)
    auc, shares = roc_figures(
        members, others, (often[None].astype(float), other_often[None].astype(float)), (0.1,)
    )
    whole, (share,) = figures(np.repeat(members, often), np.repeat(others, other_often), (0.1,))
    assert auc[0] == pytest.approx(whole, abs=1e-12)
    assert shares[0, 0] == pytest.approx(share, abs=1e-12)


def test_roc_of_inverted_scores_is_one_minus_auc():
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 50), rng.normal(size=70)
    assert figures(members, others)[0] == pytest.approx(
        1 - figures(-members, -others)[0], abs=1e-12
    )


def test_wilson_interval_agrees_with_published_values():
    """Newcombe 1998, table I: 81 of 263 and 0 of 20, at 95 %."""
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


# --- evaluation of attacks ----------------------------------------------------------------------


def test_attack_intervals_cover_chance_for_exchangeable_scores():
    rng = np.random.default_rng(0)
    found = [
        score_attack("noise", rng.normal(size=150), rng.normal(size=150), seed=seed, bootstrap=200)
        for seed in range(100)
    ]
    assert 88 <= sum(contains(part.auc_ci, 0.5) for part in found) <= 99
    assert sum(contains(part.tpr_at_1_ci, 0.01) for part in found) >= 88
    assert abs(np.mean([part.auc for part in found]) - 0.5) < 0.01


def test_attack_intervals_cover_the_true_auc():
    rng = np.random.default_rng(1)
    truth = 0.7602  # Φ(1 / √2)
    found = [
        score_attack("shift", rng.normal(1, 1, 150), rng.normal(size=150), seed=seed, bootstrap=200)
        for seed in range(100)
    ]
    assert 88 <= sum(contains(part.auc_ci, truth) for part in found) <= 99


def test_rates_need_enough_non_members():
    rng = np.random.default_rng(0)
    few = score_attack("few", rng.normal(size=99), rng.normal(size=99), seed=0, bootstrap=20)
    some = score_attack("some", rng.normal(size=999), rng.normal(size=999), seed=0, bootstrap=20)
    many = score_attack("many", rng.normal(2, 1, 1000), rng.normal(size=1000), seed=0, bootstrap=20)
    assert few.tpr_at_1 is few.tpr_at_1_ci is few.tpr_at_01 is None
    assert "1.0% needs 100 non-members, here are 99" in few.note
    assert some.tpr_at_1 is not None
    assert some.tpr_at_01 is None
    assert "0.1% needs 1,000" in some.note
    assert many.note == ""
    assert many.tpr_at_01 <= many.tpr_at_1 < many.auc
    assert contains(many.tpr_at_01_ci, many.tpr_at_01)


def test_rate_without_hits_has_an_interval():
    found = score_attack("blind", np.zeros(200), np.ones(200), seed=0, bootstrap=50)
    assert found.tpr_at_1 == 0
    assert 0.01 < found.tpr_at_1_ci[1] < 0.03


def test_score_attack_matches_sizes_on_request():
    rng = np.random.default_rng(0)
    members, others = rng.normal(size=500), rng.normal(size=120)
    matched = score_attack("a", members, others, seed=3, bootstrap=20)
    whole = score_attack("a", members, others, seed=3, bootstrap=20, match=False)
    assert (matched.members, matched.non_members) == (120, 120)
    assert (whole.members, whole.non_members) == (500, 120)
    assert matched == score_attack("a", members, others, seed=3, bootstrap=20)
    assert matched.auc != score_attack("a", members, others, seed=4, bootstrap=20).auc


def test_attack_intervals_account_for_patients():
    rng = np.random.default_rng(0)
    patients = np.repeat([f"p{number}" for number in range(40)], 10)
    members, others = (
        np.repeat(rng.normal(size=40), 10) + 0.1 * rng.normal(size=400) for _ in range(2)
    )
    alone = score_attack("a", members, others, seed=0, bootstrap=300)
    together = score_attack(
        "a",
        members,
        others,
        seed=0,
        bootstrap=300,
        member_groups=patients,
        non_member_groups=patients,
    )
    assert alone.auc == together.auc
    assert np.diff(together.auc_ci) > 2 * np.diff(alone.auc_ci)


def test_score_attack_refuses_wrong_scores():
    with pytest.raises(DataError, match=r"distance: scores of shape \(1,\)"):
        score_attack("distance", np.zeros(1), np.zeros(5), seed=0)
    with pytest.raises(FedganError, match="density: 1 scores are not numbers"):
        score_attack("density", np.array([1.0, np.nan]), np.zeros(5), seed=0)
    with pytest.raises(ValueError, match="3 groups do not fit 4 scores"):
        score_attack("a", np.zeros(4), np.zeros(4), seed=0, member_groups=np.arange(3))


# --- attacks on released images -----------------------------------------------------------------


def cloud(seed, count, features=24):
    """Features of correlated directions, as extractors give them."""
    mix = np.random.default_rng(99).normal(size=(features, features)) * np.geomspace(
        1, 0.05, features
    )
    return np.random.default_rng(seed).normal(size=(count, features)) @ mix.T


def leaking(members, share=0.3, seed=7):
    """Synthetic features (800, F), a `share` of them near-copies of members; copied members."""
    rng = np.random.default_rng(seed)
    leaked = rng.choice(len(members), 60, replace=False)
    copies = members[rng.choice(leaked, int(share * 800))]
    copies = copies + 0.02 * members.std(0) * rng.normal(size=copies.shape)
    return np.concatenate([copies, cloud(seed + 1, 800 - len(copies), members.shape[1])]), leaked


ATTACKS = {
    "distance": lambda x, synthetic, _: -nearest(x, synthetic)[0],
    "density": lambda x, synthetic, _: density_scores(x, synthetic),
    "ratio": density_ratio_scores,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_find_a_planted_leak_and_nothing_in_fresh_data(attack):
    members, others, fresh, reference = (
        cloud(seed, count) for seed, count in ((0, 400), (1, 400), (2, 400), (3, 800))
    )
    synthetic, leaked = leaking(members)
    score = ATTACKS[attack]
    planted, new, outside = (
        score(x, synthetic, reference) for x in (members[leaked], fresh, others)
    )
    caught = score_attack(attack, planted, outside, seed=0, bootstrap=300, match=False)
    assert caught.auc >= LEAK_AUC
    assert (caught.members, caught.non_members) == (60, 400)
    assert contains(
        score_attack(attack, new, outside, seed=0, bootstrap=300, level=0.983, match=False).auc_ci,
        0.5,
    )
    # Nothing is found without a leak: the same attack on independent synthetic images.
    clean = cloud(11, 800)
    found = score_attack(
        attack,
        score(members, clean, reference),
        score(others, clean, reference),
        seed=0,
        bootstrap=300,
        level=0.99,
    )
    assert contains(found.auc_ci, 0.5)


def test_density_ratio_finds_rare_members():
    """As in arXiv 2302.12580: members in the tail are copied; densities favour typical images."""
    rng = np.random.default_rng(0)
    members, others, reference = (rng.normal(size=(600, 2)) for _ in range(3))
    rare = np.linalg.norm(members, axis=1) > 2.0
    copies = members[rng.choice(np.flatnonzero(rare), 300)] + 0.03 * rng.normal(size=(300, 2))
    synthetic = np.concatenate([copies, rng.normal(size=(900, 2))])
    plain, ratio = (
        figures(score(members[rare]), score(others))[0]
        for score in (
            lambda x: density_scores(x, synthetic),
            lambda x: density_ratio_scores(x, synthetic, reference),
        )
    )
    assert plain < 0.6
    assert ratio > 0.85


def test_density_ratio_does_not_favour_typical_images():
    """Without a leak a plain density is the distance from the mean; the ratio is not."""
    x, synthetic, reference = (cloud(seed, 600, 4) for seed in (0, 1, 2))
    middle = -np.abs(fit_reduction(synthetic).apply(x)).sum(1)
    plain = np.corrcoef(density_scores(x, synthetic), middle)[0, 1]
    ratio = np.corrcoef(density_ratio_scores(x, synthetic, reference), middle)[0, 1]
    assert plain > 0.8
    assert abs(ratio) < 0.4


# --- densities ----------------------------------------------------------------------------------


def test_log_density_agrees_with_scipy():
    rng = np.random.default_rng(0)
    base, points = rng.normal(size=(300, 3)), 2 * rng.normal(size=(50, 3))
    white = np.linalg.cholesky(np.linalg.inv(np.cov(base.T)))  # so that scipy uses our bandwidth
    base, points = base @ white, points @ white
    assert log_density(points, base, 0.4) == pytest.approx(
        gaussian_kde(base.T, 0.4).logpdf(points.T), abs=1e-9
    )


def test_log_density_is_finite_for_any_block(monkeypatch):
    base = np.random.default_rng(0).normal(size=(100, 3))
    points = np.concatenate([base[:30], np.full((1, 3), 1e4)])
    whole = log_density(points, base, 0.05)
    assert np.isfinite(whole).all()
    monkeypatch.setattr("fedgan.audit.attacks.density.BLOCK", 7)
    assert log_density(points, base, 0.05) == pytest.approx(whole, abs=1e-9)


def test_bandwidth_shrinks_with_more_images():
    rng = np.random.default_rng(0)
    few, many = (
        choose_bandwidth(rng.normal(size=(50, 1))),
        choose_bandwidth(rng.normal(size=(2000, 1))),
    )
    assert many < few
    assert many == pytest.approx(1.06 * 2000**-0.2, rel=0.6)


@pytest.mark.parametrize("features", [8, 400])
def test_reduction_whitens_the_principal_axes(features):
    sets = [cloud(seed, 150, features) for seed in (0, 1)]
    reduction = fit_reduction(*sets, dims=5)
    reduced = np.concatenate([reduction.apply(part) for part in sets])
    assert reduced.T @ reduced / len(reduced) == pytest.approx(np.eye(5), abs=1e-6)
    pooled = np.concatenate(sets) - np.concatenate(sets).mean(0)
    directions = np.linalg.svd(pooled, full_matrices=False)[2][:5]
    unit = reduction.axes / np.linalg.norm(reduction.axes, axis=0)
    assert np.abs(np.diag(directions @ unit)) == pytest.approx(np.ones(5), abs=1e-6)


def test_reduction_weights_sets_equally_and_drops_flat_axes():
    small, large = cloud(0, 40, 6), cloud(1, 900, 6) + 3
    assert fit_reduction(small, large).center == pytest.approx((small.mean(0) + large.mean(0)) / 2)
    flat = np.concatenate([small, np.zeros((40, 2))], 1)
    assert fit_reduction(flat).axes.shape == (8, 6)


def test_density_refuses_a_collapsed_generator():
    with pytest.raises(DataError, match="collapsed"):
        density_scores(np.ones((5, 3)), np.ones((10, 3)))
    with pytest.raises(DataError, match="at least two images"):
        density_scores(np.ones((5, 3)), np.ones((1, 3)))


# --- discriminator ------------------------------------------------------------------------------


def pictures(seed, count, side=8):
    return np.random.default_rng(seed).integers(0, 256, (count, 1, side, side), np.uint8)


@pytest.fixture(scope="module")
def overfitted():
    """A discriminator with minibatch-std, overfitted to 16 noise images against new noise."""
    model = ModelSettings(z_dim=8, w_dim=8, channel_base=128, channel_max=16)
    discriminator = Discriminator(model, 8, 1, 2)
    members, labels = pictures(0, 16), np.eye(2)[np.arange(16) % 2]
    real, c = torch.from_numpy(members) / 127.5 - 1, torch.from_numpy(labels).float()
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.0, 0.99))
    for _ in range(150):
        fake = torch.randint(0, 256, real.shape, generator=rng) / 127.5 - 1
        logits = discriminator(torch.cat([fake, real]), torch.cat([c, c]), halves=2)
        loss = softplus(logits[:16]).mean() + softplus(-logits[16:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return discriminator, members, labels


@pytest.mark.parametrize(
    "companions",
    [None, (pictures(5, 40), np.eye(2)[np.arange(40) % 2])],
    ids=["alone", "companions"],
)
def test_discriminator_attack_finds_members_of_an_overfitted_network(overfitted, companions):
    discriminator, members, labels = overfitted
    c = np.eye(2)[np.arange(100) % 2]
    inside = discriminator_scores(discriminator, members, labels, companions=companions)
    outside, fresh = (
        discriminator_scores(discriminator, pictures(seed, 100), c, companions=companions)
        for seed in (6, 7)
    )
    assert figures(inside, outside)[0] >= LEAK_AUC
    assert contains(
        score_attack("discriminator", fresh, outside, seed=0, bootstrap=200, match=False).auc_ci,
        0.5,
    )


@pytest.mark.parametrize(
    "companions", [None, (pictures(5, 9), np.eye(2)[np.arange(9) % 2])], ids=["alone", "companions"]
)
def test_discriminator_scores_do_not_depend_on_the_batch(overfitted, companions):
    discriminator, images, labels = overfitted
    whole = discriminator_scores(discriminator, images, labels, companions=companions)
    single = discriminator_scores(discriminator, images, labels, batch=1, companions=companions)
    turned = discriminator_scores(
        discriminator, images[::-1], labels[::-1], batch=5, companions=companions
    )
    assert whole == pytest.approx(single, abs=1e-4)
    assert whole == pytest.approx(turned[::-1], abs=1e-4)
    if companions is None:
        with torch.inference_mode():
            alone = [
                float(
                    discriminator(
                        torch.from_numpy(images[[row]]) / 127.5 - 1,
                        torch.from_numpy(labels[[row]]).float(),
                    )
                )
                for row in range(4)
            ]
        assert whole[:4] == pytest.approx(alone, abs=1e-4)


def test_discriminator_scores_restore_the_network(overfitted):
    discriminator, images, labels = overfitted
    batch = torch.from_numpy(images) / 127.5 - 1, torch.from_numpy(labels).float()
    with torch.no_grad():
        before = discriminator(*batch)
        discriminator_scores(discriminator, images, labels, companions=(images, labels))
        assert torch.equal(discriminator(*batch), before)
    assert discriminator.training


def test_discriminator_scores_without_minibatch_std_are_logits():
    model = ModelSettings(z_dim=8, w_dim=8, channel_base=64, channel_max=8, minibatch_std_group=0)
    discriminator, images = Discriminator(model, 8, 1, 0), pictures(0, 6)
    with torch.no_grad():
        logits = discriminator(torch.from_numpy(images) / 127.5 - 1, torch.zeros(6, 0)).numpy()
    scores = discriminator_scores(
        discriminator, images, np.zeros((6, 0)), batch=4, companions=(images, np.zeros((6, 0)))
    )
    assert scores == pytest.approx(logits, abs=1e-5)


def test_discriminator_scores_refuse_unusable_arguments(overfitted):
    discriminator, images, labels = overfitted
    with pytest.raises(ValueError, match="do not fit 16 images and a discriminator of 2 labels"):
        discriminator_scores(discriminator, images, labels[:, :1])
    with pytest.raises(DataError, match="fewer than a group of 4"):
        discriminator_scores(discriminator, images, labels, companions=(images[:3], labels[:3]))
    broken = Discriminator(ModelSettings(channel_base=64, channel_max=8), 8, 1, 2)
    with torch.no_grad():
        broken.b4.out.bias.fill_(torch.nan)
    with pytest.raises(FedganError, match="diverged"):
        discriminator_scores(broken, images, labels)


# --- shadow models ------------------------------------------------------------------------------


@settings(max_examples=40)
@given(SEEDS, st.integers(2, 60), st.integers(1, 5), st.booleans())
def test_assign_shadows_halves_rows_by_patient(seed, rows, pairs, grouped):
    groups = np.random.default_rng(seed).integers(0, max(2, rows // 3), rows) if grouped else None
    if grouped and len(set(groups)) < 2:
        groups[0] = groups[-1] + 1
    inside = assign_shadows(rows, 2 * pairs, seed, groups)
    assert inside.shape == (2 * pairs, rows)
    assert (inside.sum(0) == pairs).all()
    assert inside.any(1).all()
    if groups is None:
        assert (np.abs(2 * inside.sum(1) - rows) <= 1).all()
    else:
        assert all(
            (inside[:, groups == group] == inside[:, groups == group][:, :1]).all()
            for group in set(groups)
        )


def test_assign_shadows_refuses_unusable_numbers():
    for rows, shadows, groups in (
        (10, 3, None),
        (10, 0, None),
        (10, 2, np.zeros(10)),
        (0, 2, None),
    ):
        with pytest.raises(ConfigError, match="even number of models"):
            assign_shadows(rows, shadows, 0, groups)


def shadowed(seed, shadows, rows=400, gain=1.0):
    """Scores of a target model and shadows: difficulty, gain for members, and noise."""
    rng = np.random.default_rng(seed)
    easy, member = 3 * rng.normal(size=rows), rng.random(rows) < 0.5
    inside = assign_shadows(rows, shadows, seed)
    scores = easy + gain * inside + 0.5 * rng.normal(size=inside.shape)
    return easy + gain * member + 0.5 * rng.normal(size=rows), scores, inside, member


def test_calibration_removes_the_difficulty_of_images():
    target, scores, inside, member = shadowed(0, 8)
    raw = figures(target[member], target[~member])[0]
    calibrated = calibrated_scores(target, scores, inside)
    assert raw < 0.65
    assert figures(calibrated[member], calibrated[~member])[0] > 0.85
    ratio = likelihood_ratio_scores(target, scores, inside)
    assert figures(ratio[member], ratio[~member])[0] > 0.85


def test_calibration_averages_models_with_and_without_the_image():
    target, scores = np.array([1.0, 2.0]), np.array([[0.5, 9.0], [9.0, 1.0], [0.7, 3.0]])
    inside = np.array([[False, True], [True, False], [False, False]])
    expected = [1 - (9 + 0.6) / 2, 2 - (9 + 2.0) / 2]
    assert calibrated_scores(target, scores, inside) == pytest.approx(expected)
    assert calibrated_scores(target, scores[:1]) == pytest.approx([0.5, -7.0])  # offline


@pytest.mark.parametrize("shadows", [2, 4])
def test_calibration_with_few_shadows_beats_the_mean_without_the_image(shadows):
    """Both halves of the shadows measure how easy an image is, with half the variance."""
    areas = []
    for seed in range(10):
        target, scores, inside, member = shadowed(seed, shadows, gain=0.7)
        without = (scores * ~inside).sum(0) / (~inside).sum(0)
        kinds = calibrated_scores(target, scores, inside), target - without
        areas.append([figures(values[member], values[~member])[0] for values in kinds])
    assert np.subtract(*np.mean(areas, axis=0)) > 0.01


@pytest.mark.parametrize("shadows", [4, 64], ids=["pooled variance", "variance per image"])
def test_likelihood_ratio_is_at_chance_without_memorisation(shadows):
    target, scores, inside, member = shadowed(1, shadows, gain=0.0)
    ratio = likelihood_ratio_scores(target, scores, inside)
    assert contains(
        score_attack("lira", ratio[member], ratio[~member], seed=0, bootstrap=200).auc_ci, 0.5
    )


def test_likelihood_ratio_agrees_with_normal_densities():
    from scipy.stats import norm

    target, scores, inside, _ = shadowed(2, 64, rows=5)
    ratio = likelihood_ratio_scores(target, scores, inside)
    for row in range(5):
        kinds = scores[inside[:, row], row], scores[~inside[:, row], row]
        logs = [norm.logpdf(target[row], kind.mean(), kind.std(ddof=1)) for kind in kinds]
        assert ratio[row] == pytest.approx(logs[0] - logs[1], abs=1e-9)


def test_shadow_scores_refuse_unusable_shapes():
    target, scores, inside, _ = shadowed(0, 2)
    with pytest.raises(ValueError, match="in every shadow"):
        calibrated_scores(target, scores, np.ones_like(inside))
    with pytest.raises(ValueError, match="four or more"):
        likelihood_ratio_scores(target, scores, inside)
    with pytest.raises(ValueError, match="are not"):
        calibrated_scores(target[:-1], scores, inside)
