"""Losses, EMA, sampler and Trainer: formulas against definitions, and the two identities."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedgan.config import ModelSettings, Settings, from_dict, to_dict
from fedgan.data.dataset import ImageDataset, pool
from fedgan.errors import CheckpointError, ConfigError, DataError, FedganError, MachineError
from fedgan.models.stylegan2.discriminator import Discriminator
from fedgan.models.stylegan2.generator import Generator
from fedgan.training import losses
from fedgan.training.checkpoint import load_generator, load_tensors, save_tensors
from fedgan.training.ema import ema_decay, ema_update
from fedgan.training.sampler import Sampler
from fedgan.training.trainer import Trainer, resolve_device

SMALL = ModelSettings(z_dim=4, w_dim=6, channel_base=64, channel_max=6)


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-identical results need the same number of threads on both sides."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_settings(*overrides: str) -> Settings:
    tree = {
        "data": {"resolution": 16},
        "model": {"z_dim": 4, "w_dim": 6, "channel_base": 64, "channel_max": 6},
        "augment": {"p": 0.3, "speed_kimg": 1.0},
        "training": {"kimg": 1.0, "batch_size": 8, "device": "cpu"},
        "federation": {"rounds": 2},
    }
    return from_dict(tree, overrides)


def tiny_dataset(
    n: int = 40, labels: int = 3, channels: int = 3, exclusive: bool = True, seed: int = 0
) -> ImageDataset:
    rng = np.random.default_rng(seed)
    hot = (
        np.eye(labels, dtype=np.uint8)[rng.integers(labels, size=n)]
        if labels
        else np.zeros((n, 0), np.uint8)
    )
    if labels and not exclusive:
        hot = rng.integers(0, 2, (n, labels)).astype(np.uint8)
    images = rng.integers(0, 256, (n, channels, 16, 16), dtype=np.uint8)
    return ImageDataset("tiny", images, hot, tuple(f"class-{k}" for k in range(labels)), exclusive)


def same_state(a: Trainer, b: Trainer) -> bool:
    (left, plain_left), (right, plain_right) = a.state_dict(), b.state_dict()
    equal = left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )
    return equal and json.dumps(plain_left, sort_keys=True) == json.dumps(
        plain_right, sort_keys=True
    )


# --- losses against finite differences, in float64 ------------------------------------------------


def directional(f, x: torch.Tensor, direction: torch.Tensor, step: float = 1e-5) -> float:
    return float((f(x + step * direction) - f(x - step * direction)) / (2 * step))


def test_r1_penalty_and_its_gradient_match_finite_differences():
    discriminator = Discriminator(SMALL, 16, 1, 2, torch.Generator().manual_seed(0)).double()
    discriminator.dtype = torch.float64
    images = torch.randn(
        2, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    c = torch.eye(2, dtype=torch.float64)
    seen = images.clone().requires_grad_(True)
    penalty = losses.r1_penalty(discriminator(seen, c), seen)

    # The penalty: every coordinate of the gradient by central differences. Images of one
    # minibatch-std group change each other's logits, so the sum over the group is differentiated.
    squares = torch.zeros(2, dtype=torch.float64)
    for pixel in range(256):
        shift = torch.zeros(256, dtype=torch.float64)
        shift[pixel] = 1e-5
        shift = shift.view(1, 16, 16)
        for image in range(2):
            up, down = images.clone(), images.clone()
            up[image] += shift
            down[image] -= shift
            with torch.no_grad():
                squares[image] += (
                    (discriminator(up, c).sum() - discriminator(down, c).sum()) / 2e-5
                ).square()
    assert torch.allclose(penalty.detach(), squares, rtol=1e-5)

    # Its gradient with respect to the weights: second derivatives.
    weight = discriminator.b16.conv0.weight
    direction = torch.randn(
        weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    (gradient,) = torch.autograd.grad(penalty.sum(), weight)

    def at(shifted: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            kept = weight.clone()
            weight.copy_(shifted)
        leaf = images.clone().requires_grad_(True)
        value = losses.r1_penalty(discriminator(leaf, c), leaf).sum().detach()
        with torch.no_grad():
            weight.copy_(kept)
        return value

    expected = directional(at, weight.detach().clone(), direction)
    assert math.isclose(float((gradient * direction).sum()), expected, rel_tol=1e-4)


def test_path_lengths_and_their_gradient_match_finite_differences():
    generator = Generator(SMALL, 16, 1, 0, torch.Generator().manual_seed(0)).double()
    generator.dtype = torch.float64
    rng = torch.Generator().manual_seed(1)
    w = torch.randn(2, 6, dtype=torch.float64, generator=rng)
    noise = torch.randn(2, 1, 16, 16, dtype=torch.float64, generator=rng)
    depth = generator.synthesis.num_ws

    def lengths_at(ws: torch.Tensor) -> torch.Tensor:
        leaf = ws.clone().requires_grad_(True)
        return losses.path_lengths(generator.synthesis(leaf, "const"), leaf, noise)

    ws = w.unsqueeze(1).repeat(1, depth, 1)
    # Definition: the gradient of <image, y> with respect to each layer's w.
    squares = torch.zeros(2, dtype=torch.float64)
    for layer in range(depth):
        for coordinate in range(6):
            shift = torch.zeros_like(ws)
            shift[:, layer, coordinate] = 1e-5
            up, down = (
                (generator.synthesis(ws + sign * shift, "const") * noise / 16).sum(dim=(1, 2, 3))
                for sign in (1, -1)
            )
            squares += ((up - down) / 2e-5).detach().square()
    assert torch.allclose(lengths_at(ws).detach(), (squares / depth).sqrt(), rtol=1e-5)

    weight = generator.synthesis.b8.conv0.weight
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=rng)
    (gradient,) = torch.autograd.grad(lengths_at(ws).sum(), weight)

    def at(shifted: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            kept = weight.clone()
            weight.copy_(shifted)
        value = lengths_at(ws).sum().detach()
        with torch.no_grad():
            weight.copy_(kept)
        return value

    assert math.isclose(
        float((gradient * direction).sum()),
        directional(at, weight.detach().clone(), direction),
        rel_tol=1e-4,
    )


def test_adversarial_losses_are_cross_entropies():
    fake, real = torch.tensor([0.3, -1.2]), torch.tensor([2.0, 0.1])
    assert torch.allclose(losses.generator_loss(fake), -torch.sigmoid(fake).log().mean())
    expected = -(1 - torch.sigmoid(fake)).log().mean() - torch.sigmoid(real).log().mean()
    assert torch.allclose(losses.discriminator_loss(fake, real), expected)


@given(interval=st.integers(1, 64), beta=st.floats(0.5, 0.9999), rate=st.floats(1e-5, 1e-1))
def test_lazy_adam_preserves_the_update_of_an_interval(interval, beta, rate):
    corrected, (first, second) = losses.lazy_adam(rate, (0.0, beta), interval)
    # interval + 1 steps (one of them the regulariser's) equal `interval` steps without it.
    assert math.isclose(corrected * (interval + 1), rate * interval, rel_tol=1e-9)
    assert math.isclose(second ** (interval + 1), beta**interval, rel_tol=1e-9)
    assert first == 0.0


def test_lazy_regularisers_are_weighted_by_their_interval(monkeypatch):
    step = Trainer(tiny_settings("training.r1_gamma=3.0"), tiny_dataset()).step
    training, penalties = step.training, []
    monkeypatch.setattr(step, "_update_d", lambda loss: penalties.append(float(loss.detach())))
    monkeypatch.setattr(step, "_update_g", lambda loss: penalties.append(float(loss.detach())))
    real, c = step.batches.real(step.streams.host)
    measured = {"r1": [], "path_length": []}
    step._d_r1(real, c, measured)
    expected = 3.0 / 2 * training.r1_interval * float(measured["r1"][0])
    assert penalties[0] == pytest.approx(expected)
    monkeypatch.setattr(losses, "path_lengths", lambda images, ws, y: images.sum() * 0 + 2.0)
    step._g_pl(measured)  # the running mean moves from 0 to 0.02
    expected = training.path_length_weight * training.path_length_interval * (2.0 - 0.02) ** 2
    assert penalties[1] == pytest.approx(expected)


def test_trainer_corrects_adam_for_lazy_regularisation():
    trainer = Trainer(
        tiny_settings("training.path_length_interval=4", "training.r1_interval=16"), tiny_dataset()
    )
    assert math.isclose(trainer.step.g_adam.param_groups[0]["lr"], 0.0025 * 4 / 5)
    assert math.isclose(trainer.step.d_adam.param_groups[0]["betas"][1], 0.99 ** (16 / 17))
    plain = Trainer(
        tiny_settings("training.path_length_weight=0", "training.r1_gamma=0"), tiny_dataset()
    )
    assert (
        plain.step.g_adam.param_groups[0]["lr"] == plain.step.d_adam.param_groups[0]["lr"] == 0.0025
    )


# --- EMA of the generator -----------------------------------------------------------------------


@given(batch=st.integers(1, 64), half_life=st.floats(0.1, 20))
def test_ema_halves_after_its_half_life(batch, half_life):
    decay = ema_decay(batch, half_life, rampup=0.0, images_seen=0)
    steps = half_life * 1000 / batch
    assert math.isclose(decay**steps, 0.5, rel_tol=1e-6)


def test_ema_ramps_up_to_its_half_life():
    assert ema_decay(16, 5, 0.05, images_seen=0) < 1e-6
    assert math.isclose(ema_decay(16, 5, 0.05, images_seen=1600), 0.5 ** (16 / 80))
    assert ema_decay(16, 5, 0.05, images_seen=10**9) == ema_decay(16, 5, 0.0, images_seen=0)


def test_ema_update_is_the_weighted_mean_of_old_and_new():
    old, new = (Generator(SMALL, 16, 1, 2, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    new.mapping.w_avg.fill_(3.0)
    expected = {
        name: 0.9 * a + 0.1 * dict(new.named_parameters())[name]
        for name, a in old.named_parameters()
    }
    ema_update(old, new, 0.9)
    assert all(
        torch.allclose(parameter, expected[name], rtol=1e-5, atol=1e-5)
        for name, parameter in old.named_parameters()
    )
    assert torch.equal(old.mapping.w_avg, new.mapping.w_avg)


# --- sampler -------------------------------------------------------------------------------------


@given(size=st.integers(1, 30), cuts=st.lists(st.integers(1, 17), min_size=1, max_size=8))
def test_sampler_shows_each_image_once_per_pass(size, cuts):
    sampler, whole = Sampler(size, 3, 1), Sampler(size, 3, 1)
    pieces = np.concatenate([sampler.take(cut) for cut in cuts])
    assert np.array_equal(pieces, whole.take(sum(cuts)))
    for start in range(0, len(pieces) - size + 1, size):
        assert sorted(pieces[start : start + size]) == list(range(size))


def test_sampler_depends_on_the_stream_and_resumes():
    a, b = Sampler(50, 0, 0), Sampler(50, 0, 1)
    assert not np.array_equal(a.take(50), b.take(50))
    again = Sampler(50, 0, 0)
    again.load_state(json.loads(json.dumps(a.state())))
    assert np.array_equal(a.take(30), again.take(30))


# --- the Trainer ---------------------------------------------------------------------------------


def test_training_resumed_from_a_file_is_bit_identical(tmp_path):
    settings_, dataset = tiny_settings("augment.mirror=true"), tiny_dataset()
    uninterrupted, stopped = (
        Trainer(settings_, dataset, stream=2),
        Trainer(settings_, dataset, stream=2),
    )
    uninterrupted.train(72)  # past both regularisers, within an ADA window, past one pass
    uninterrupted.train(72)
    stopped.train(72)
    stopped.save(tmp_path / "state.safetensors")
    fresh = Trainer(settings_, dataset, stream=2)
    fresh.load(tmp_path / "state.safetensors")
    assert same_state(fresh, stopped)
    fresh.train(72)
    assert same_state(fresh, uninterrupted)


def test_budget_split_into_rounds_is_bit_identical():
    settings_, dataset = tiny_settings(), tiny_dataset()
    whole, cut = Trainer(settings_, dataset), Trainer(settings_, dataset)
    whole.train(100)
    for images in (1, 50, 12, 37):  # no multiples of the batch
        cut.train(images)
    assert whole.images_seen == cut.images_seen == 104
    assert all(
        np.array_equal(a, cut.get_parameters(["generator"])[name])
        for name, a in whole.get_parameters(["generator"]).items()
    )


def test_hospitals_share_initial_weights_but_not_draws():
    settings_, dataset = tiny_settings(), tiny_dataset()
    first, second = Trainer(settings_, dataset, stream=0), Trainer(settings_, dataset, stream=1)
    parts = ("generator", "discriminator", "ema")
    assert all(
        np.array_equal(a, second.get_parameters(parts)[name])
        for name, a in first.get_parameters(parts).items()
    )
    first.train(8)
    second.train(8)
    name = "generator/synthesis.b16.conv1.weight"
    assert not np.array_equal(
        first.get_parameters(["generator"])[name], second.get_parameters(["generator"])[name]
    )


def test_training_changes_every_parameter_and_reports_metrics():
    trainer = Trainer(tiny_settings(), tiny_dataset())
    before = trainer.get_parameters(["generator", "discriminator", "ema"])
    result = trainer.train(160)
    after = trainer.get_parameters(["generator", "discriminator", "ema"])
    assert [name for name in before if np.array_equal(before[name], after[name])] == []
    assert {
        "loss_g",
        "loss_d",
        "d_accuracy",
        "r1",
        "path_length",
        "r_t",
        "p",
        "images",
        "seconds",
        "core_seconds",
    } == result.keys()
    assert result["images"] == trainer.images_seen == 160


@pytest.mark.parametrize(
    ("labels", "channels", "exclusive", "precision"),
    [(0, 1, True, "fp32"), (4, 1, False, "fp32"), (2, 3, True, "bf16")],
    ids=["unconditional", "multi-label", "bfloat16"],
)
def test_trainer_accepts_every_kind_of_data(labels, channels, exclusive, precision):
    trainer = Trainer(
        tiny_settings(f"training.precision={precision}"),
        tiny_dataset(40, labels, channels, exclusive),
    )
    assert math.isfinite(trainer.train(40)["loss_d"])


def test_generator_labels_follow_the_hospitals_frequencies():
    dataset = tiny_dataset(400, 3)
    dataset.labels[:] = 0
    dataset.labels[np.arange(400), np.where(np.arange(400) < 300, 0, 2)] = 1
    trainers = [Trainer(tiny_settings(), dataset, stream=s) for s in range(5)]
    sampled = [t.batches.generator_labels(400, t.streams.host) for t in trainers]
    frequencies = torch.cat(sampled).mean(dim=0)
    assert frequencies[1] == 0
    assert abs(float(frequencies[0]) - 0.75) < 0.05


def test_parameters_travel_as_sorted_float32_arrays():
    a, b = (Trainer(tiny_settings(), tiny_dataset(), stream=s) for s in (0, 1))
    a.train(24)
    arrays = a.get_parameters(["generator", "discriminator", "ema"])
    assert list(arrays) == sorted(arrays)
    assert all(array.dtype == np.float32 and array.ndim >= 1 for array in arrays.values())
    assert not [name for name in arrays if "fir" in name or "noise_const" in name]
    b.load_parameters(arrays)
    assert all(
        np.array_equal(array, b.get_parameters(["generator", "discriminator", "ema"])[name])
        for name, array in arrays.items()
    )


def test_load_parameters_refuses_another_model_unchanged():
    trainer = Trainer(tiny_settings(), tiny_dataset())
    before = trainer.get_parameters(["generator", "discriminator"])
    wrong = dict(before)
    wrong["discriminator/b4.out.weight"] = np.zeros((1, 1), np.float32)
    with pytest.raises(CheckpointError, match=r"b4\.out\.weight"):
        trainer.load_parameters(wrong)
    with pytest.raises(CheckpointError, match="unknown part"):
        trainer.load_parameters({"labels/x": np.zeros(1, np.float32)})
    assert all(
        np.array_equal(array, trainer.get_parameters(["generator", "discriminator"])[name])
        for name, array in before.items()
    )


def test_proximal_term_adds_mu_times_the_distance():
    trainer = Trainer(tiny_settings("training.proximal_mu=0.5"), tiny_dataset())
    trainer.load_parameters(trainer.get_parameters(["generator", "discriminator"]))
    parameter = next(iter(trainer.step.discriminator.parameters()))
    with torch.no_grad():
        parameter += 2.0
    loss = parameter.sum() * 3.0
    trainer.step._update_d(loss)
    assert torch.allclose(parameter.grad, torch.full_like(parameter, 3.0 + 0.5 * 2.0), atol=1e-4)


def test_proximal_term_keeps_weights_near_the_received_model():
    def distance(mu: float) -> float:
        trainer = Trainer(
            tiny_settings(f"training.proximal_mu={mu}", "training.learning_rate=0.01"),
            tiny_dataset(),
        )
        start = trainer.get_parameters(["discriminator"])
        trainer.load_parameters(start | trainer.get_parameters(["generator"]))
        trainer.train(160)
        end = trainer.get_parameters(["discriminator"])
        return sum(
            float(np.square(end[name] - start[name]).sum()) for name in start if ".conv" in name
        )

    assert distance(100.0) < distance(0.0)


def test_augmentation_with_mode_none_returns_the_same_tensor():
    trainer = Trainer(tiny_settings("augment.mode=none"), tiny_dataset())
    images = torch.randn(2, 3, 16, 16)
    assert trainer.step._augment(images, trainer.streams) is images


def test_diverged_training_raises_an_error():
    trainer = Trainer(tiny_settings(), tiny_dataset())
    with torch.no_grad():
        trainer.step.generator.synthesis.b4.const.fill_(float("nan"))
    with pytest.raises(FedganError, match="diverged"):
        trainer.train(8)


def test_errors_name_wrong_resolution_device_and_state(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="16 pixels wide"):
        Trainer(tiny_settings("data.resolution=32"), tiny_dataset())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(MachineError, match="no CUDA"):
        resolve_device("cuda")
    trainer = Trainer(tiny_settings(), tiny_dataset(), stream=1)
    trainer.train(8)
    trainer.save(tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match="stream"):
        Trainer(tiny_settings(), tiny_dataset(), stream=0).load(tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match="40 images"):
        Trainer(tiny_settings(), tiny_dataset(32), stream=1).load(tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match="another model"):
        Trainer(tiny_settings("model.w_dim=5"), tiny_dataset(), stream=1).load(
            tmp_path / "state.safetensors"
        )


def test_load_state_refuses_a_changed_shard_and_changes_nothing():
    dataset = tiny_dataset()
    trainer = Trainer(tiny_settings(), dataset)
    trainer.train(8)
    tensors, plain = trainer.state_dict()
    relabelled = tiny_dataset()
    relabelled.labels[0] = np.roll(relabelled.labels[0], 1)
    with pytest.raises(CheckpointError, match="other images or labels"):
        Trainer(tiny_settings(), relabelled).load_state_dict((tensors, plain))
    fresh = Trainer(tiny_settings(), dataset)
    before = fresh.get_parameters(["generator"])
    broken = {name: tensor for name, tensor in tensors.items() if not name.startswith("ema/")}
    with pytest.raises(CheckpointError, match="another model"):
        fresh.load_state_dict((broken, plain))
    with pytest.raises(CheckpointError, match="lacks 'sampler'"):
        fresh.load_state_dict(
            (tensors, {key: value for key, value in plain.items() if key != "sampler"})
        )
    assert all(
        np.array_equal(array, fresh.get_parameters(["generator"])[name])
        for name, array in before.items()
    )
    with pytest.raises(DataError, match="no training image"):
        Trainer(tiny_settings(), dataset.take(np.empty(0, np.int64)))


def test_w_avg_is_near_the_mean_of_w_after_short_training():
    trainer = Trainer(tiny_settings("training.style_mixing=0"), tiny_dataset(labels=0))
    trainer.train(320)
    mapping = trainer.step.generator.mapping
    mean = mapping(
        torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(4000, 0)
    ).mean(dim=0)
    assert torch.linalg.vector_norm(mapping.w_avg - mean) < 0.3 * torch.linalg.vector_norm(mean)


# --- checkpoints ---------------------------------------------------------------------------------


def test_checkpoint_without_json_or_with_other_bytes_is_refused(tmp_path):
    path = tmp_path / "round-00001.safetensors"
    save_tensors(path, {"a": torch.arange(4.0)}, {"round": 1})
    tensors, meta = load_tensors(path)
    assert torch.equal(tensors["a"], torch.arange(4.0))
    assert meta["round"] == 1
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    with pytest.raises(CheckpointError, match="damaged"):
        load_tensors(path)
    path.write_bytes(data)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_tensors(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        load_tensors(path)


def test_load_generator_restores_the_average(tmp_path):
    trainer = Trainer(tiny_settings(), tiny_dataset())
    trainer.train(16)
    arrays = {
        name: torch.from_numpy(array)
        for name, array in trainer.get_parameters(["generator", "ema"]).items()
    }
    meta = {
        "settings": to_dict(trainer.settings),
        "resolution": 16,
        "channels": 3,
        "label_names": ["a", "b", "c"],
    }
    save_tensors(tmp_path / "round-00001.safetensors", arrays, meta)
    generator, _ = load_generator(tmp_path / "round-00001.safetensors")
    z, c = torch.randn(2, 4), torch.eye(3)[:2]
    assert torch.equal(generator(z, c, noise="const"), trainer.ema(z, c, noise="const"))
    trainer.save(tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint of a round"):
        load_generator(tmp_path / "state.safetensors")
    save_tensors(tmp_path / "round-00002.safetensors", {"discriminator/x": torch.zeros(1)}, meta)
    with pytest.raises(CheckpointError, match="no generator"):
        load_generator(tmp_path / "round-00002.safetensors")


def test_pool_keeps_images_and_their_order():
    parts = [tiny_dataset(10, seed=seed) for seed in range(3)]
    pooled = pool(parts)
    rows = np.array([25, 3, 14])
    images, labels = pooled.batch(rows)
    for image, label, row in zip(images, labels, rows, strict=True):
        expected, expected_label = parts[row // 10].batch(np.array([row % 10]))
        assert torch.equal(image, expected[0])
        assert torch.equal(label, expected_label[0])
