"""A private step of D: per-pair gradients, clipping, noise, Poisson samples, and the Trainer."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from fedgan.config import Settings, from_dict
from fedgan.data.dataset import ImageDataset
from fedgan.errors import ConfigError, FedganError
from fedgan.models.stylegan2.discriminator import Discriminator
from fedgan.privacy import clipping
from fedgan.privacy import ledger as ledger_module
from fedgan.privacy import step as step_module
from fedgan.privacy.accounting import Mechanism, epsilon_rdp
from fedgan.privacy.clipping import clipped_sum, pair_gradients
from fedgan.privacy.ledger import JointLedger, Ledger
from fedgan.privacy.per_pair import PerPair
from fedgan.privacy.step import PrivateStep, noise_multiplier, releases_labels, units_of
from fedgan.training.losses import discriminator_loss, r1_penalty
from fedgan.training.start import begin_training

CPU = torch.device("cpu")
CLIP = 0.7
TREE = {
    "seed": 3,
    "data": {"resolution": 16},
    "model": {
        "z_dim": 4,
        "w_dim": 8,
        "channel_base": 64,
        "channel_max": 8,
        "mapping_layers": 1,
        "minibatch_std_group": 0,
    },
    "augment": {"mode": "fixed", "p": 0.3},
    "training": {"batch_size": 6, "device": "cpu", "r1_gamma": 0.0, "labels": "uniform"},
    "privacy": {"noise_multiplier": 1.5, "max_grad_norm": CLIP, "delta": 1e-3},
}


@pytest.fixture(autouse=True)
def quick_accountant(monkeypatch):
    """A ledger without ε, whose computation has its own tests."""
    for module in (ledger_module, step_module):
        monkeypatch.setattr(module, "epsilon_of", epsilon_rdp, raising=False)


def settings_of(*overrides: str) -> Settings:
    return from_dict(TREE, overrides)


def images_of(count: int, patients: int = 0, seed: int = 0) -> ImageDataset:
    rng = np.random.default_rng(seed)
    labels = np.eye(2, dtype=np.uint8)[np.arange(count) % 2]
    pictures = rng.integers(0, 256, (count, 1, 16, 16), dtype=np.uint8)
    names = (
        np.array([f"p{row % patients}" for row in range(count)])
        if patients
        else np.zeros(0, dtype="<U1")
    )
    return ImageDataset("clinic", pictures, labels, ("dark", "bright"), patients=names)


def small_discriminator(bf16: bool = False, resolution: int = 16) -> Discriminator:
    network = Discriminator(settings_of().model, resolution, 1, 2, torch.Generator().manual_seed(5))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.dtype = torch.bfloat16 if bf16 else torch.float32
    return network


def pairs_of(
    count: int, seed: int = 0, resolution: int = 16
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    rng = torch.Generator().manual_seed(seed)
    shape = (count, 1, resolution, resolution)
    labels = torch.eye(2)[torch.arange(count) % 2]
    return (torch.randn(shape, generator=rng), labels), (
        torch.randn(shape, generator=rng),
        labels.flip(1),
    )


def single_gradients(
    network: nn.Module, fakes, reals, r1_weight: float = 0.0
) -> list[dict[str, torch.Tensor]]:
    """Reference: autograd on one pair at a time."""
    found = []
    for row in range(len(fakes[0])):
        network.zero_grad(set_to_none=True)
        fake, fake_c, real, real_c = (t[row : row + 1] for t in (*fakes, *reals))
        value = discriminator_loss(network(fake, fake_c), network(real, real_c))
        if r1_weight:
            at = real.clone().requires_grad_(True)
            value = value + r1_weight * r1_penalty(network(at, real_c), at).sum()
        value.backward()
        found.append(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in network.named_parameters()
            }
        )
    network.zero_grad(set_to_none=True)
    return found


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten().double() for name in sorted(gradients)])


def sum_of(
    network: nn.Module,
    fakes,
    reals,
    units: list[int],
    clip: float = CLIP,
    chunk: int = 64,
    r1: float = 0.0,
):
    return clipped_sum(
        network,
        discriminator_loss,
        fakes,
        reals,
        torch.tensor(units, dtype=torch.int64),
        clip,
        chunk,
        r1,
    )


def private_step(
    tmp_path: Path, *overrides: str, data: ImageDataset | None = None, **others
) -> PrivateStep:
    data = data or images_of(60)
    chosen = settings_of(*overrides)
    return PrivateStep(
        chosen,
        data,
        chosen.training.batch_size,
        60,
        Ledger(tmp_path / "ledger.jsonl"),
        "run",
        CPU,
        **others,
    )


def release(step: PrivateStep, network: nn.Module, pairs, number: int = 0) -> torch.Tensor:
    """The release of one step on these pairs (one per unit), times the expected sample size."""
    draw = step.draw(number)
    draw = type(draw)(
        np.arange(len(pairs[0][0])),
        torch.arange(len(pairs[0][0])),
        draw.host,
        draw.device,
        draw.noise,
    )
    step.reserve(1)
    step.gradient(network, discriminator_loss, *pairs, draw)
    return flat({name: p.grad for name, p in network.named_parameters()}) * (
        step.sample_rate * step.units
    )


# --- per-pair gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [16, 32])
@pytest.mark.parametrize("r1", [0.0, 0.8])
def test_per_pair_gradients_equal_a_loop_over_pairs(r1, resolution):
    network, (fakes, reals) = (
        small_discriminator(resolution=resolution),
        pairs_of(5, resolution=resolution),
    )
    truth = single_gradients(network, fakes, reals, r1)
    found, logits = pair_gradients(network, discriminator_loss, *fakes, *reals, r1)
    for row, one in enumerate(truth):
        for name, value in one.items():
            torch.testing.assert_close(
                found[name][row], value, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
    torch.testing.assert_close(logits, network(*reals).detach(), rtol=1e-5, atol=1e-6)


def test_per_pair_gradients_in_bf16_equal_a_loop():
    network, (fakes, reals) = small_discriminator(bf16=True), pairs_of(4)
    truth = single_gradients(network, fakes, reals)
    found, _ = pair_gradients(network, discriminator_loss, *fakes, *reals)
    for row, one in enumerate(truth):
        own_rows = flat({name: value[row] for name, value in found.items()})
        assert float((own_rows - flat(one)).norm() / flat(one).norm()) < 0.05
    within = sum_of(network, fakes, reals, [0, 1, 2, 3], clip=0.01)
    assert all(value.dtype == torch.float64 for value in within.gradients.values())
    assert float(flat(within.gradients).norm()) <= 4 * 0.01 * (1 + 1e-5)


@pytest.mark.parametrize("r1", [0.0, 0.5])
@pytest.mark.parametrize("units", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 2, 2]])
def test_clipped_sum_is_independent_of_the_chunk_size(units, r1):
    network, (fakes, reals) = small_discriminator(), pairs_of(6)
    single = torch.stack([flat(one) for one in single_gradients(network, fakes, reals, r1)])
    means = [
        single[[row for row, unit in enumerate(units) if unit == one]].mean(dim=0)
        for one in range(max(units) + 1)
    ]
    clip = float(
        torch.stack([mean.norm() for mean in means]).median()
    )  # some are clipped, some are not
    expected = sum(mean * min(1.0, clip / float(mean.norm())) for mean in means)
    for chunk in (1, 2, 4, 64):
        found = sum_of(network, fakes, reals, units, clip, chunk, r1)
        torch.testing.assert_close(flat(found.gradients), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            found.norms.double(), torch.stack([m.norm() for m in means]), rtol=1e-4, atol=1e-6
        )


def test_unsupported_parameter_raises_an_error():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(3, 1), nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.layer(x) * self.scale)[:, 0]

    network = Scaled()
    with PerPair(4) as each:
        value = network(torch.randn(4, 3)).sum()
    with pytest.raises(FedganError, match="in no convolution or linear layer"):
        each.gradients(value, list(network.parameters()))
    with PerPair(4), pytest.raises(FedganError, match="groups"):
        torch.nn.functional.conv2d(
            torch.randn(4, 2, 3, 3), nn.Parameter(torch.randn(2, 1, 1, 1)), groups=2
        )


# --- sensitivity ----------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    index=st.integers(0, 3),
    scale=st.sampled_from([0.01, 1.0, 300.0]),
    clip=st.sampled_from([1e-3, 0.5, 50.0]),
)
def test_sensitivity_of_the_clipped_sum_is_the_clip(seed, sizes, index, scale, clip):
    network, index = small_discriminator(), index % len(sizes)
    units = [unit for unit, size in enumerate(sizes) for _ in range(size)]
    (fakes, fake_c), (reals, real_c) = pairs_of(len(units), seed)
    own_rows = torch.tensor([unit == index for unit in units])
    reals = torch.where(own_rows[:, None, None, None], reals * scale, reals)
    full = flat(sum_of(network, (fakes, fake_c), (reals, real_c), units, clip).gradients)
    rest = [unit - (unit > index) for unit in units if unit != index]
    without = sum_of(
        network,
        (fakes[~own_rows], fake_c[~own_rows]),
        (reals[~own_rows], real_c[~own_rows]),
        rest,
        clip,
    )
    assert float((full - flat(without.gradients)).norm()) <= clip * (1 + 1e-3) + 1e-5
    other = torch.where(own_rows[:, None, None, None], -reals, reals)
    replaced = flat(sum_of(network, (fakes, fake_c), (other, real_c), units, clip).gradients)
    assert float((full - replaced).norm()) <= 2 * clip * (1 + 1e-3) + 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_nan_gradient_of_an_image_counts_as_zero(bad):
    network, (fakes, reals) = small_discriminator(), pairs_of(3)
    spoiled = reals[0].clone()
    spoiled[1] = bad
    found = sum_of(network, fakes, (spoiled, reals[1]), [0, 1, 2], CLIP)
    keep = torch.tensor([0, 2])
    without = sum_of(
        network, (fakes[0][keep], fakes[1][keep]), (reals[0][keep], reals[1][keep]), [0, 1], CLIP
    )
    moved = float((flat(found.gradients) - flat(without.gradients)).norm())
    assert moved <= CLIP * (1 + 1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_nan_gradient_of_a_patient_affects_no_other(bad):
    """Else the weights could let one image erase all others from the sum, despite any noise."""
    network, (fakes, reals) = small_discriminator(), pairs_of(6)
    spoiled = reals[0].clone()
    spoiled[2] = bad
    found = sum_of(network, fakes, (spoiled, reals[1]), [0, 0, 1, 1, 2, 2], CLIP)
    keep = torch.tensor([0, 1, 4, 5])
    without = sum_of(
        network,
        (fakes[0][keep], fakes[1][keep]),
        (reals[0][keep], reals[1][keep]),
        [0, 0, 1, 1],
        CLIP,
    )
    assert float(flat(without.gradients).norm()) > CLIP
    assert float((flat(found.gradients) - flat(without.gradients)).norm()) <= CLIP * (1 + 1e-3)


def test_images_of_a_patient_count_as_one_unit():
    step_units = [0] * 8 + [1]
    network, (fakes, reals) = small_discriminator(), pairs_of(9)
    full = flat(sum_of(network, fakes, reals, step_units, 1e-3, chunk=2).gradients)
    last = flat(
        sum_of(
            network, tuple(t[8:] for t in fakes), tuple(t[8:] for t in reals), [0], 1e-3
        ).gradients
    )
    assert float((full - last).norm()) == pytest.approx(1e-3, rel=1e-3)


# --- noise ----------------------------------------------------------------------------------------


def test_gradient_without_noise_is_the_clipped_mean(tmp_path):
    network, pairs = small_discriminator(), pairs_of(5)
    found = release(private_step(tmp_path, "privacy.noise_multiplier=0"), network, pairs)
    torch.testing.assert_close(
        found, flat(sum_of(network, *pairs, [0, 1, 2, 3, 4]).gradients), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_noise_has_the_requested_standard_deviation(tmp_path, scale):
    network, ((fakes, fake_c), (reals, real_c)) = small_discriminator(), pairs_of(5)
    pairs = ((fakes * scale, fake_c), (reals * scale, real_c))
    clean = flat(sum_of(network, *pairs, [0, 1, 2, 3, 4]).gradients)
    step = private_step(tmp_path)
    noise = torch.cat(
        [release(step, network, pairs, number) - clean for number in range(12)]
    ).numpy() / (1.5 * CLIP)
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], len(noise)) / len(noise)
    assert low < np.mean(noise**2) < high
    assert abs(np.mean(noise)) < 5 / np.sqrt(len(noise))
    assert stats.kstest(noise[:5000], "norm").pvalue > 1e-6


def test_noise_is_new_per_step_and_process(
    tmp_path,
):
    network, nothing = small_discriminator(), pairs_of(0)
    first, again = private_step(tmp_path), private_step(tmp_path)
    drawn = [
        release(first, network, nothing, 0),
        release(first, network, nothing, 1),
        release(again, network, nothing, 0),
    ]
    drawn.append(
        release(first, network, nothing, 0)
    )  # the same step again, as after a restored checkpoint
    correlations = np.corrcoef(torch.stack(drawn).numpy())[~np.eye(4, dtype=bool)]
    assert np.abs(correlations).max() < 6 / np.sqrt(len(drawn[0]))


@pytest.mark.parametrize("clip", [0.2, 0.07, 1e-3])
def test_clipped_gradient_is_exactly_within_the_clip(clip):
    """In whole arithmetic: no rounding may lengthen the contribution of a unit."""
    network = small_discriminator()
    for seed in range(4):
        found = sum_of(network, *pairs_of(2, seed), [0, 0], clip=clip)
        assert float(found.norms) > clip
        length = sum(Fraction(value) ** 2 for value in flat(found.gradients).tolist())
        assert Fraction(clip) ** 2 * (1 - Fraction(1, 2**17)) < length <= Fraction(clip) ** 2


def test_chunks_have_a_fixed_size_where_kernels_depend_on_it(monkeypatch):
    network, pairs, sizes = small_discriminator(), pairs_of(7), []
    units = [0, 1, 1, 1, 2, 3, 4]
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda x, c: (sizes.append(len(x)), forward(x, c))[1])
    free = sum_of(network, *pairs, units, chunk=3)
    assert sizes == [2, 6, 6]
    sizes.clear()
    monkeypatch.setattr(clipping, "FIXED_CHUNKS", ("cpu",))
    fixed = sum_of(network, *pairs, units, chunk=3)
    assert sizes == [6, 6, 6]
    torch.testing.assert_close(flat(fixed.gradients), flat(free.gradients), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(fixed.norms, free.norms, rtol=1e-5, atol=1e-7)
    assert len(fixed.real_logits) == 7


def test_private_step_runs_without_tf32_and_measured_kernels(tmp_path, monkeypatch):
    cudnn, found = torch.backends.cudnn, []
    monkeypatch.setattr(cudnn, "benchmark", True)
    trainer = trainer_of(tmp_path)
    gradient = trainer.private.gradient

    def watched(*rest):
        found.append((cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return gradient(*rest)

    monkeypatch.setattr(trainer.private, "gradient", watched)
    before = cudnn.allow_tf32
    trainer.train(6)
    assert found == [(False, False, False)]
    assert (cudnn.benchmark, cudnn.allow_tf32) == (True, before)


def test_noise_uses_all_bits_of_the_secret(tmp_path):
    low, high = private_step(tmp_path, secret=7), private_step(tmp_path, secret=7 + 2**255)
    network, nothing = small_discriminator(), pairs_of(0)
    assert not torch.equal(release(low, network, nothing), release(high, network, nothing))
    assert torch.equal(
        release(low, network, nothing, 3),
        release(private_step(tmp_path, secret=7), network, nothing, 3),
    )


def test_empty_sample_costs_a_step_and_gets_noise(tmp_path):
    step = private_step(tmp_path)
    found = release(step, small_discriminator(), pairs_of(0))
    assert float(found.square().mean().sqrt()) == pytest.approx(1.5 * CLIP, rel=0.1)
    assert step.ledger.mechanisms() == [Mechanism(1.5, 0.1, 1)]


def test_step_without_reservation_is_refused(tmp_path):
    step, network, pairs = private_step(tmp_path), small_discriminator(), pairs_of(2)
    release(step, network, pairs)
    with pytest.raises(FedganError, match="reserve"):
        step.gradient(network, discriminator_loss, *pairs, step.draw(1))


def test_released_signs_are_noisy_and_accounted(tmp_path):
    step = private_step(tmp_path, "privacy.r_t_noise=3", "augment.mode=ada")
    network, pairs = small_discriminator(), pairs_of(6)
    truth = float(network(*pairs[1]).detach().sign().sum())
    step.reserve(60)
    found = []
    for number in range(60):
        draw = step.draw(number)
        draw = type(draw)(np.arange(6), torch.arange(6), draw.host, draw.device, draw.noise)
        found.append(step.gradient(network, discriminator_loss, *pairs, draw))
    errors = np.array([signs for signs, _ in found]) - truth
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], 60) / 60
    assert low < np.mean((errors / 3) ** 2) < high
    assert {count for _, count in found} == {6}  # the expected number, not that of the sample
    assert step.step.noise_multiplier == pytest.approx((1.5**-2 + 3**-2) ** -0.5)


def test_least_noise_raises_the_noise_multiplier_only(tmp_path, monkeypatch):
    def quick_noise(
        epsilon: float, delta: float, sample_rate: float, steps: int, others: tuple[Mechanism, ...]
    ) -> float:
        return sample_rate * steps**0.5 * 10 / epsilon + delta + len(others)

    monkeypatch.setattr(step_module, "noise_for", quick_noise)
    keys = ("privacy.noise_multiplier=-1", "privacy.epsilon=5")
    own = private_step(tmp_path, *keys).noise_multiplier
    assert (
        own
        == noise_multiplier(settings_of(*keys), 2, 60, 60, 6, 60)
        == pytest.approx(0.1 * 10**0.5 * 2 + 1e-3)
    )
    assert private_step(tmp_path, *keys, least_noise=own * 2).noise_multiplier == own * 2
    assert private_step(tmp_path, *keys, least_noise=own / 2).noise_multiplier == own
    # The smaller of two hospitals needs more noise at the same batch; released labels need more.
    assert noise_multiplier(settings_of(*keys), 2, 30, 30, 6, 60) > own
    released = settings_of(*keys, "training.labels=data", "privacy.label_noise=9")
    assert noise_multiplier(released, 2, 60, 60, 6, 60) == own + 1
    # Without a release of label counts, or without labels, no more noise is needed.
    for silent, labels in ((settings_of(*keys, "privacy.label_noise=9"), 2), (released, 0)):
        assert noise_multiplier(silent, labels, 60, 60, 6, 60) == own
        assert not releases_labels(silent, labels)
    assert releases_labels(released, 2)
    with_signs = noise_multiplier(settings_of(*keys, "privacy.r_t_noise=3"), 2, 60, 60, 6, 60)
    assert (with_signs**-2 + 3**-2) ** -0.5 == pytest.approx(own)
    with pytest.raises(ConfigError, match="r_t_noise"):
        noise_multiplier(settings_of(*keys, "privacy.r_t_noise=0.1"), 2, 60, 60, 6, 60)


# --- samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "patients"), [("image", 0), ("patient", 20)])
def test_units_are_sampled_independently_at_the_rate(tmp_path, unit, patients):
    draws = 3000
    step = private_step(tmp_path, f"privacy.unit={unit}", data=images_of(60, patients))
    rows = np.zeros((draws, 60))
    for number in range(draws):
        draw = step.draw(number)
        rows[number, draw.rows] = 1
        assert len(np.unique(draw.rows)) == len(draw.rows) == len(draw.units)
    chosen = rows[:, :20] if patients else rows  # patient p has rows p, p + 20, p + 40
    if patients:
        assert (rows[:, :20] == rows[:, 20:40]).all()
        assert (rows[:, :20] == rows[:, 40:]).all()
    q, units = 0.1, chosen.shape[1]
    counts = chosen.sum(axis=0)
    assert (np.abs(counts - draws * q) < 5 * np.sqrt(draws * q * (1 - q))).all()
    sizes = chosen.sum(axis=1)
    assert abs(sizes.mean() - units * q) < 5 * np.sqrt(units * q * (1 - q) / draws)
    assert abs(sizes.var() / (units * q * (1 - q)) - 1) < 5 * np.sqrt(2 / draws)
    between = np.corrcoef(chosen.T)[~np.eye(units, dtype=bool)]
    assert np.abs(between).max() < 6 / np.sqrt(draws)
    in_time = np.corrcoef(sizes[:-1], sizes[1:])[0, 1]
    assert abs(in_time) < 5 / np.sqrt(draws)


def test_images_per_patient_limits_the_sample(tmp_path):
    step = private_step(
        tmp_path, "privacy.unit=patient", "privacy.images_per_patient=1", data=images_of(60, 20)
    )
    seen = [step.draw(number) for number in range(1000)]  # one image is missed with 2e-13
    assert all((np.bincount(draw.units.numpy()) == 1).all() for draw in seen if len(draw.units))
    assert set(np.concatenate([draw.rows for draw in seen])) == set(range(60))


def test_by_default_no_patient_has_more_than_eight_images_in_a_step(tmp_path):
    step = private_step(tmp_path, data=images_of(60, 4))
    assert step.units == 4
    sizes = np.concatenate([np.bincount(step.draw(n).units.numpy()) for n in range(200)])
    assert sizes.max() == 8


def test_units_are_patients_of_one_institution_and_blank_ones_alone(tmp_path):
    data = dataclasses.replace(
        images_of(8),
        patients=np.array(["p", "p", "p", "q", "", "", "p", "q"]),
        institutions=np.array(["a", "a", "b", "a", "a", "a", "b", "a"]),
    )
    numbers, count = units_of(data, "patient")
    assert count == 5
    assert [sorted(np.flatnonzero(numbers == n).tolist()) for n in range(count)] == [
        [4],
        [5],
        [0, 1],
        [3, 7],
        [2, 6],
    ]
    assert units_of(dataclasses.replace(data, patients=np.empty(0, str)), "patient")[1] == 8
    assert units_of(data, "image")[1] == 8


def test_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Poisson"):
        private_step(tmp_path, data=images_of(5))


# --- labels ---------------------------------------------------------------------------------------


def test_released_labels_are_noisy_counts(tmp_path):
    data = images_of(60)
    released = [
        private_step(tmp_path, "privacy.label_noise=2").release_labels(data) for _ in range(400)
    ]
    assert np.allclose([weights.sum() for weights in released], 1)
    odds = np.array([weights[0] / weights[1] for weights in released])
    # counts 30 ± 2 each: the log of their ratio deviates by √2 · 2 / 30
    assert np.std(np.log(odds)) == pytest.approx(np.sqrt(2) * 2 / 30, rel=0.2)


def test_labels_are_released_once_also_after_a_restart(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    keys = ("training.labels=data", "privacy.label_noise=4")
    begin = {"planned_images": 60, "ledger": JointLedger([Ledger(ledger)]), "run": "run"}
    first = begin_training(settings_of(*keys), images_of(60), **begin)
    first.train(12)
    first.train(12)
    second = begin_training(settings_of(*keys), images_of(60), **begin)
    second.load_state_dict(first.state_dict())
    second.train(12)
    assert second.batches.label_weights == first.batches.label_weights
    assert [entry.kind for entry in Ledger(ledger).entries()].count("label counts") == 1


# --- in the Trainer -------------------------------------------------------------------------------


def trainer_of(
    tmp_path: Path, *overrides: str, secret: int | None = None, data: ImageDataset | None = None
):
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    return begin_training(
        settings_of(*overrides),
        data or images_of(60),
        planned_images=60,
        ledger=JointLedger([Ledger(path)]),
        run="run",
        secret=secret,
    )


def test_ledger_holds_steps_before_they_run(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    known: list[int] = []
    gradient = PrivateStep.gradient

    def watched(self: PrivateStep, *rest, **more):
        known.append(sum(part.steps for part in self.ledger.ledgers[0].mechanisms()))
        return gradient(self, *rest, **more)

    monkeypatch.setattr(PrivateStep, "gradient", watched)
    trainer.train(18)
    trainer.train(6)
    assert known == [3, 3, 3, 4]


def test_resumed_training_repeats_noise_only_with_the_secret(
    tmp_path,
):
    def continued(secret: int | None) -> tuple[dict, dict]:
        trainer = trainer_of(
            tmp_path, "training.d_average=0.9", "training.d_steps=2", secret=secret
        )
        trainer.train(12)
        state = trainer.state_dict()
        trainer.train(12)
        other = trainer_of(tmp_path, "training.d_average=0.9", "training.d_steps=2", secret=secret)
        other.load_state_dict(state)
        other.train(12)
        return trainer.state_dict()[0], other.state_dict()[0]

    uninterrupted, resumed = continued(11)
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)
    uninterrupted, resumed = continued(None)
    assert any(
        not torch.equal(uninterrupted[name], resumed[name])
        for name in uninterrupted
        if name.startswith("discriminator/")
    )


def test_generator_draws_are_independent_of_the_sample_size(tmp_path):
    """Two secrets give samples of different sizes; the generator's random streams stay equal."""
    trainers = [trainer_of(tmp_path, secret=secret) for secret in (1, 2)]
    sizes = [
        [len(trainer.private.draw(number).rows) for number in range(2)] for trainer in trainers
    ]
    assert sizes[0] != sizes[1]
    for trainer in trainers:
        trainer.train(12)
    first, second = trainers
    assert torch.equal(first.streams.host.get_state(), second.streams.host.get_state())
    assert torch.equal(first.streams.noise.get_state(), second.streams.noise.get_state())


def test_fakes_are_independent_of_the_synthesis_chunk(tmp_path, monkeypatch):
    """Else one more image in the sample would change the fakes of others, beyond the clip."""
    seen = []
    for size in (1, 256):
        monkeypatch.setattr("fedgan.training.stylegan2_step.SYNTHESIS_CHUNK", size)
        trainer = trainer_of(
            tmp_path, "training.style_mixing=0.5", "privacy.noise_multiplier=0", secret=5
        )
        with monkeypatch.context() as patch:
            patch.setattr(
                trainer.private,
                "gradient",
                lambda d, loss, fakes, *rest: (seen.append(fakes), (0.0, 0))[1],
            )
            trainer.step._d_main_private(trainer.private)
    torch.testing.assert_close(seen[0][1], seen[1][1])
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-3, atol=1e-3)


def test_average_of_d_follows_its_decay(tmp_path):
    trainer = trainer_of(tmp_path, "training.d_average=0.5")
    expected = {name: value.clone() for name, value in trainer.step.d_average.state_dict().items()}

    def follow(trainer) -> None:
        for name, value in trainer.step.discriminator.state_dict().items():
            expected[name].lerp_(value, 0.5)

    trainer.train(18, follow)
    for name, value in trainer.step.d_average.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_average_of_d_moves_with_a_received_d(tmp_path):
    trainer = trainer_of(tmp_path, "training.d_average=0.999")
    received = {
        name: array + 1 for name, array in trainer.get_parameters(["discriminator"]).items()
    }
    trainer.load_parameters(received)  # before the first step the average is D
    for name, value in trainer.step.d_average.state_dict().items():
        torch.testing.assert_close(
            value, trainer.step.discriminator.state_dict()[name], rtol=0, atol=0
        )
    trainer.train(18)
    before = {name: value.clone() for name, value in trainer.step.d_average.state_dict().items()}
    trainer.load_parameters(trainer.get_parameters(["discriminator"]))  # its own D: no change
    assert all(
        torch.equal(value, before[name])
        for name, value in trainer.step.d_average.state_dict().items()
    )
    trainer.load_parameters(
        {name: array + 1 for name, array in trainer.get_parameters(["discriminator"]).items()}
    )
    moved = {name for name, _ in trainer.step.discriminator.named_parameters()}
    for name, value in trainer.step.d_average.state_dict().items():
        torch.testing.assert_close(value, before[name] + (name in moved), rtol=1e-5, atol=1e-5)


def test_generator_waits_until_d_reaches_d_accuracy(tmp_path):
    waiting = trainer_of(tmp_path, "training.d_accuracy=1.0", "privacy.noise_multiplier=50")
    means = waiting.train(60)
    assert waiting.step.steps == 10
    assert waiting.step.g_steps < 10  # a D of noise never calls the whole batch fake
    assert "d_accuracy" in means
    free = trainer_of(tmp_path)
    free.train(60)
    assert free.step.g_steps == 10


def test_private_round_reports_nothing_of_real_images(tmp_path):
    means = trainer_of(tmp_path).train(12)
    assert set(means) == {
        *(
            "loss_g",
            "d_accuracy",
            "path_length",
            "p",
            "epsilon",
            "delta",
            "noise_multiplier",
            "sample_rate",
        ),
        *("images", "seconds", "core_seconds"),
    }
    assert means["images"] == 12  # the expected number, not that of the samples


def test_data_without_labels_releases_no_counts(tmp_path):
    data = images_of(60)
    bare = ImageDataset("clinic", data.images, np.zeros((60, 0), np.uint8), ())
    trainer = trainer_of(tmp_path, "training.labels=data", "privacy.label_noise=4", data=bare)
    trainer.train(12)
    trainer.train(12)
    assert len(trainer.private.ledger.ledgers[0].mechanisms()) == 2
