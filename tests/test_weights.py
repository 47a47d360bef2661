"""federation.weights and federation.label_rows: the weight of each hospital's change."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st
from small_federation import federate, tiny, write_shards

from client.app import app
from fedgan.config import Settings
from fedgan.errors import ConfigError
from fedgan.run_folder import RunFolder
from fedgan.runs.budget import make_budget
from fedgan.runs.compatibility import check_compatibility
from fedgan.training.checkpoint import load_generator, load_tensors
from fedgan.training.ema import ema_decay
from server.aggregation.strategies import aggregate, make_strategy
from server.aggregation.weights import holder_weights, limit_weights, mean_weights
from server.records import to_record

EMBED = "generator/mapping.embed.weight"


def replies_of(sizes: list[int], models: list[dict[str, np.ndarray]]) -> list[Message]:
    # Flower makes no message without a task identity
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    return [
        Message(
            RecordDict(
                {"arrays": to_record(model), "metrics": MetricRecord({"num_examples": size})}
            ),
            node,
            "train",
        )
        for node, (size, model) in enumerate(zip(sizes, models, strict=True))
    ]


def model_change(
    settings: Settings,
    sent: dict[str, np.ndarray],
    sizes: list[int],
    changes: list[dict[str, np.ndarray]],
):  # type: ignore[no-untyped-def]
    """The change of the model by one aggregation."""
    models = [
        {key: (sent[key] + change[key]).astype(np.float32) for key in sent} for change in changes
    ]
    aggregated = aggregate(make_strategy(settings), settings, 1, replies_of(sizes, models), sent)
    assert aggregated is not None
    return {key: aggregated[key] - sent[key] for key in sent}


def settings_of(root: Path, *overrides: str, hospitals: int = 3) -> Settings:
    return tiny(root, *overrides, hospitals=hospitals)


# --- the algebra ----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=5), st.integers(0, 2**31))
def test_weights_equal_the_formula_of_each_rule(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    sent = {
        "generator/w": rng.standard_normal((3, 4)).astype(np.float32),
        "generator/mapping.w_avg": np.zeros(4, np.float32),
    }
    changes = [
        {key: rng.standard_normal(array.shape) for key, array in sent.items()} for _ in sizes
    ]
    n = np.array(sizes, float)
    expected = {
        "size": n / n.sum(),
        "root": np.sqrt(n) / np.sqrt(n).sum(),
        "equal": np.full(len(n), 1 / len(n)),
        "sum": n * 0 + 1,
    }
    expected["damped"] = n * 0 + math.hypot(*n) / n.sum()
    for rule, weights in expected.items():
        settings = settings_of(Path(), f"federation.weights={rule}", hospitals=len(sizes))
        moved = model_change(settings, sent, sizes, changes)
        by_rule = sum(w * change["generator/w"] for w, change in zip(weights, changes, strict=True))
        np.testing.assert_allclose(moved["generator/w"], by_rule, atol=1e-5)
        average = sum(
            w * change["generator/mapping.w_avg"]
            for w, change in zip(n / n.sum(), changes, strict=True)
        )
        np.testing.assert_allclose(moved["generator/mapping.w_avg"], average, atol=1e-5)


@pytest.mark.parametrize(
    "overrides", [(), ("federation.local_images=equal",), ("federation.batch=shared",)]
)
def test_damped_sum_weighs_hospitals_by_their_steps(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    """16 changes sum to √16 = 4 with equal steps, to 15.8 with nearly all steps in one hospital."""
    sizes = [10_000] + [10] * 15
    settings = settings_of(
        tmp_path,
        "federation.weights=damped",
        "training.batch_size=16",
        "training.kimg=1",
        *overrides,
        hospitals=16,
    )
    sent = {"generator/w": np.zeros(3, np.float32)}
    moved = model_change(settings, sent, sizes, [{"generator/w": np.ones(3)}] * 16)["generator/w"]
    np.testing.assert_allclose(moved, 4 if overrides else 16 / 1.015, rtol=1e-4)


@pytest.mark.parametrize("rule", ["size", "root", "equal", "sum", "damped"])
def test_model_of_a_single_hospital_is_kept_bit_for_bit(rule: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sent = {"generator/w": (rng.standard_normal((64, 64)) * 100).astype(np.float32)}
    model = {
        "generator/w": sent["generator/w"]
        + rng.standard_normal((64, 64)).astype(np.float32) * 0.001
    }
    settings = settings_of(tmp_path, f"federation.weights={rule}", hospitals=1)
    aggregated = aggregate(
        make_strategy(settings), settings, 1, replies_of([7], [dict(model)]), sent
    )
    assert aggregated is not None
    assert aggregated["generator/w"].tobytes() == model["generator/w"].tobytes()


@pytest.mark.parametrize("rule", ["size", "root", "equal"])
def test_label_rows_average_only_the_holders_of_the_label(rule: str, tmp_path: Path) -> None:
    """70, 20 and 10 images; labels held by the first, the last two, all, and no hospital."""
    held = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]])
    sent = {EMBED: np.random.default_rng(3).standard_normal((5, 4)).astype(np.float32)}
    sent["ema/mapping.embed.weight"] = sent[EMBED] + 1
    changes = [
        {EMBED: np.random.default_rng(number).standard_normal((5, 4)) * row}
        for number, row in enumerate(held)
    ]
    for change in changes:  # an average changes in every row
        change["ema/mapping.embed.weight"] = change[EMBED] * 0.1 + 0.01
    settings = settings_of(tmp_path, f"federation.weights={rule}", "federation.label_rows=true")
    moved = model_change(settings, sent, [70, 20, 10], changes)
    for key, weights in (
        (EMBED, mean_weights(np.array([70.0, 20.0, 10.0]), rule)),
        ("ema/mapping.embed.weight", np.array([0.7, 0.2, 0.1])),
    ):
        for label in range(3):
            holders = held[:, label] * weights / (held[:, label] * weights).sum()
            expected = sum(
                w * change[key][:, label] for w, change in zip(holders, changes, strict=True)
            )
            np.testing.assert_allclose(moved[key][:, label], expected, atol=1e-5)


def test_holder_weights_of_unchanged_columns_are_kept() -> None:
    found = holder_weights([np.zeros((2, 1)), np.zeros((2, 1))], np.array([0.25, 0.75]))
    assert [row.tolist() for row in found] == [[[0.25]], [[0.75]]]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["federation.weights=sum", "federation.strategy=fedmedian"], "takes none"),
        (["federation.label_rows=true", "federation.strategy=krum"], "takes none"),
        (["federation.weights=root", "federation.secure=true"], "hides from the server"),
        (["federation.label_rows=true", "federation.secure=true"], "hides from the server"),
        (
            ["federation.weights=sum", "privacy.client_level=server"],
            "further than the bound of privacy.client_level",
        ),
        (
            ["federation.weights=damped", "privacy.client_level=client"],
            "further than the bound of privacy.client_level",
        ),
        (["federation.label_rows=true", "federation.weights=sum"], "takes no mean"),
        (["federation.label_rows=true", "federation.weights=damped"], "takes no mean"),
        (["federation.label_rows=true", "training.labels=uniform"], "does not hold"),
        (["federation.label_rows=true", "privacy.noise_multiplier=1"], "by its noise"),
        (["federation.strategy=fedavgm", "federation.server_momentum=0"], "server_momentum > 0"),
    ],
)
def test_weights_are_refused_with_incompatible_settings(
    overrides: list[str], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=text):
        check_compatibility(settings_of(tmp_path, *overrides, hospitals=5))


# --- whole runs -----------------------------------------------------------------------------------


def test_sum_adds_the_changes_of_all_hospitals(tmp_path: Path) -> None:
    settings = tiny(
        write_shards(tmp_path / "data", (48, 24, 16)),
        "federation.weights=sum",
        rounds=2,
        kimg=0.048,
    )
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    before, after = (load_tensors(run.checkpoint(number))[0] for number in (1, 2))
    states = [
        load_tensors(run.hospital_state(name) / "state-00002.safetensors")[0]
        for name in ("alpha", "beta", "gamma")
    ]
    for key in before:
        if key.startswith(("generator/", "discriminator/")) and not key.endswith("w_avg"):
            expected = before[key].double() + sum(
                state[key].double().reshape(before[key].shape) - before[key] for state in states
            )
            np.testing.assert_allclose(after[key].numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_server_computes_an_ema_that_is_not_exchanged(tmp_path: Path) -> None:
    """It is updated like a Trainer's EMA in one step of a round's images, and is evaluated."""
    settings = tiny(
        write_shards(tmp_path / "data", (24, 16)),
        'federation.exchange=["generator","discriminator"]',
        "training.ema_half_life_kimg=0.02",
        hospitals=2,
        rounds=2,
        kimg=0.048,
    )
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    states = [load_tensors(run.checkpoint(number)) for number in range(3)]
    average = {
        key: tensor.numpy() for key, tensor in states[0][0].items() if key.startswith("ema/")
    }
    assert average
    for (_, before), (tensors, meta) in itertools.pairwise(states):
        decay = ema_decay(
            meta["images_seen"] - before["images_seen"], 0.02, 0.05, before["images_seen"]
        )
        for key in average:
            now = tensors["generator/" + key.removeprefix("ema/")].numpy()
            average[key] = (
                now if key.endswith("w_avg") else decay * average[key] + (1 - decay) * now
            )
            np.testing.assert_allclose(tensors[key].numpy(), average[key], rtol=1e-5, atol=1e-6)
    evaluated = load_generator(run.checkpoint(2))[0].state_dict()
    assert all(
        np.array_equal(evaluated[key.removeprefix("ema/")].numpy(), states[2][0][key].numpy())
        for key in average
    )
    numbers = sum(
        tensor.numel() for key, tensor in states[2][0].items() if not key.startswith("ema/")
    )
    # rounds, hospitals, directions, bytes of float32
    assert states[2][1]["bytes_exchanged"] == 2 * 2 * 2 * 4 * numbers


def test_server_ema_survives_a_restart(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "data", (24, 16))
    settings = tiny(root, 'federation.exchange=["generator"]', hospitals=2, rounds=3, kimg=0.048)
    whole, broken = RunFolder.at(tmp_path / "whole"), RunFolder.at(tmp_path / "broken")
    federate(settings, whole, app)

    def fault(number: int, message: Message) -> Message | None:
        if message.content.config_records["config"].get("round") == 3:
            raise KeyboardInterrupt
        return None

    with pytest.raises(KeyboardInterrupt):
        federate(settings, broken, app, fault)
    federate(settings, broken, app)
    first, second = (load_tensors(run.checkpoint(3))[0] for run in (whole, broken))
    assert any(key.startswith("ema/") for key in first)
    assert first.keys() == second.keys()
    assert all(first[key].equal(second[key]) for key in first)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi"])
def test_server_optimizers_keep_the_ema_between_the_hospitals(name: str, tmp_path: Path) -> None:
    settings = tiny(
        write_shards(tmp_path / "data", (24, 16)),
        f"federation.strategy={name}",
        hospitals=2,
        rounds=3,
        kimg=0.072,
    )
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    final = load_tensors(run.checkpoint(3))[0]
    states = [
        load_tensors(run.hospital_state(name) / "state-00003.safetensors")[0]
        for name in ("alpha", "beta")
    ]
    for key in filter(lambda key: key.startswith("ema/"), final):
        low, high = (
            torch.minimum(*(state[key] for state in states)),
            torch.maximum(*(state[key] for state in states)),
        )
        assert ((final[key] >= low - 1e-5) & (final[key] <= high + 1e-5)).all()


def test_no_hospital_has_more_than_max_share_of_weight_and_images() -> None:
    """A hospital that claims 1,000,000 images had 0.997 of both."""
    settings, sizes = tiny(Path("data"), hospitals=2, rounds=4, kimg=4), [1_000_000, 3000]
    models = [{"generator/w": np.full(2, value, np.float32)} for value in (1.0, 0.0)]
    replies = replies_of(sizes, models)
    limit_weights(settings, replies)
    model = aggregate(make_strategy(settings), settings, 1, replies, models[1])
    assert model is not None
    assert model["generator/w"] == pytest.approx(0.9)
    images = np.sum(make_budget(settings, sizes).images, axis=0)
    assert images[0] / images.sum() == pytest.approx(0.9, abs=0.01)
