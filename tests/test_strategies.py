"""Strategies: Flower's classes, their formulas, server state over a restart, round budgets."""

from __future__ import annotations

from pathlib import Path

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st
from small_federation import error_reply, federate, tiny, write_shards

from client.app import app
from fedgan.config import STRATEGIES
from fedgan.errors import CheckpointError, ConfigError, FederationError
from fedgan.run_folder import RunFolder
from fedgan.runs.budget import apportion_images, images_per_round
from fedgan.runs.compatibility import check_compatibility
from fedgan.training.checkpoint import load_tensors
from server.aggregation.strategies import (
    aggregate,
    make_strategy,
    restore_strategy,
    set_expected_hospitals,
    strategy_state,
)
from server.metrics import mean_metrics
from server.records import to_record

CLASSES = {
    "fedavg": flower.FedAvg,
    "fedprox": flower.FedProx,
    "fedavgm": flower.FedAvgM,
    "fedadam": flower.FedAdam,
    "fedyogi": flower.FedYogi,
    "fedmedian": flower.FedMedian,
    "fedtrimmedavg": flower.FedTrimmedAvg,
    "krum": flower.Krum,
    "multikrum": flower.MultiKrum,
}
PARTS = ("generator/", "discriminator/", "ema/")


def overrides(strategy: str) -> list[str]:
    more = {"fedprox": ["training.proximal_mu=0.1"], "fedtrimmedavg": ["federation.trim=0.34"]}
    return [f"federation.strategy={strategy}", *more.get(strategy, [])]


def arrays_of(run: RunFolder, round_number: int) -> dict[str, np.ndarray]:
    tensors, _ = load_tensors(run.checkpoint(round_number))
    return {key: tensor.numpy() for key, tensor in tensors.items() if key.startswith(PARTS)}


def local_models(
    run: RunFolder, round_number: int, names: tuple[str, ...]
) -> list[dict[str, np.ndarray]]:
    """The hospitals' own models after training a round, before aggregation."""
    states = [
        load_tensors(run.hospital_state(name) / f"state-{round_number:05d}.safetensors")[0]
        for name in names
    ]
    return [
        {key: tensor.numpy() for key, tensor in state.items() if key.startswith(PARTS)}
        for state in states
    ]


# --- aggregation ----------------------------------------------------------------------------------


def test_every_strategy_has_a_flower_class() -> None:
    assert set(CLASSES) == set(STRATEGIES)


@pytest.mark.parametrize("name", STRATEGIES)
def test_round_equals_the_formula_of_the_strategy(name: str, tmp_path: Path) -> None:
    settings = tiny(
        write_shards(tmp_path / "data", (48, 24, 16)), *overrides(name), rounds=1, kimg=0.012
    )
    assert type(make_strategy(settings)) is CLASSES[name]
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    before, after = arrays_of(run, 0), arrays_of(run, 1)
    locals_ = local_models(run, 1, ("alpha", "beta", "gamma"))
    assert set(after) == set(before) == set(locals_[0])
    weights = np.array([24, 12, 8]) / 44
    for key, array in after.items():
        stack = np.stack([np.asarray(model[key], np.float64) for model in locals_])
        mean = np.tensordot(weights, stack, 1)
        match name:
            case "fedavg" | "fedprox" | "fedavgm":  # momentum starts in round 2
                expected = mean
            case "fedmedian":
                expected = np.median(stack, axis=0)
            case "fedtrimmedavg":  # removes one of three at each end
                expected = np.sort(stack, axis=0)[1]
            case "multikrum":  # malicious = 0: the mean of all
                expected = mean
            case "krum":
                expected = next(model for model in stack if np.allclose(model, array, atol=1e-6))
            case "fedadam" | "fedyogi" if key.startswith("ema/") or key.endswith("w_avg"):
                expected = mean  # averages are not optimised
            case "fedadam" | "fedyogi":
                delta = mean - before[key]
                m, v = 0.1 * delta, 0.01 * delta**2
                corrected = np.sqrt(1 - 0.99**2) / (1 - 0.9**2) if name == "fedadam" else 1.0
                expected = before[key] + 0.01 * corrected * m / (np.sqrt(v) + 1e-3)
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=2e-6)


def test_krum_selects_the_whole_model_of_one_hospital(tmp_path: Path) -> None:
    settings = tiny(
        write_shards(tmp_path / "data", (48, 24, 16)), *overrides("krum"), rounds=1, kimg=0.012
    )
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    after = arrays_of(run, 1)
    same = [
        all(np.allclose(model[key], after[key], atol=1e-6) for key in after)
        for model in local_models(run, 1, ("alpha", "beta", "gamma"))
    ]
    assert sum(same) == 1


def five_replies(sent: np.ndarray, seed: int) -> tuple[list[Message], np.ndarray]:
    """Replies and changes: one reversed update, then four that nearly agree."""
    # Flower makes no message without a task identity
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    rng = np.random.default_rng(seed)
    honest_change = rng.standard_normal(sent.shape) * 0.01
    changes = np.stack(
        [-honest_change]
        + [honest_change + rng.standard_normal(sent.shape) * 0.001 for _ in range(4)]
    ).astype(np.float32)
    replies = [
        Message(
            RecordDict(
                {
                    "arrays": to_record({"w": sent + change}),
                    "metrics": MetricRecord({"num_examples": 9}),
                }
            ),
            node,
            "train",
        )
        for node, change in enumerate(changes)
    ]
    return replies, changes


@pytest.mark.parametrize("name", ["krum", "multikrum"])
@pytest.mark.parametrize("hospitals", [5, 6], ids=["all", "one-absent"])
def test_krum_excludes_a_reversed_update_of_large_weights(
    name: str, hospitals: int, tmp_path: Path
) -> None:
    """Mapping networks hold weights of standard deviation 100; a round changes them by 0.01."""
    sent = (np.random.default_rng(1).standard_normal((256, 256)) * 100).astype(np.float32)
    settings = tiny(
        tmp_path, f"federation.strategy={name}", "federation.malicious=1", hospitals=hospitals
    )
    strategy = make_strategy(settings)
    for seed in range(8):  # a random choice is sometimes right
        replies, changes = five_replies(sent, seed)
        set_expected_hospitals(strategy, len(replies))
        aggregated = aggregate(strategy, settings, 1, replies, {"w": sent})
        assert aggregated is not None
        change = aggregated["w"] - sent
        if name == "krum":
            assert any(np.allclose(change, honest, atol=1e-4) for honest in changes[1:])
        else:
            np.testing.assert_allclose(change, changes[1:].mean(axis=0), atol=1e-4)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi"])
def test_server_moments_survive_a_restart(name: str, tmp_path: Path) -> None:
    settings = tiny(
        write_shards(tmp_path / "data", (24, 16)),
        *overrides(name),
        hospitals=2,
        rounds=3,
        kimg=0.024,
    )
    whole, broken = RunFolder.at(tmp_path / "whole"), RunFolder.at(tmp_path / "broken")
    federate(settings, whole, app)

    def fault(number: int, message: object) -> object:
        config = message.content.config_records["config"]  # type: ignore[attr-defined]
        return error_reply(message, "gone") if config.get("round") == 3 and number == 1 else None

    with pytest.raises(FederationError, match=r"hospital 2 \('beta'\) failed in round 3"):
        federate(settings, broken, app, fault)
    assert broken.last_round() == 2
    federate(settings, broken, app)
    tensors, other = load_tensors(whole.checkpoint(3))[0], load_tensors(broken.checkpoint(3))[0]
    assert any(key.startswith("strategy/m/") for key in tensors)
    assert name == "fedavgm" or any(key.startswith("strategy/v/") for key in tensors)
    assert tensors.keys() == other.keys()
    assert all(tensors[key].equal(other[key]) for key in tensors)


def test_moments_are_refused_by_a_strategy_without_state(tmp_path: Path) -> None:
    adam = make_strategy(tiny(tmp_path, *overrides("fedadam")))
    adam.m_t, adam.v_t = {"ema/w": np.ones(2, np.float32)}, {"ema/w": np.full(2, 3, np.float32)}
    state = strategy_state(adam)
    assert set(state) == {"strategy/m/ema/w", "strategy/v/ema/w"}
    again = make_strategy(tiny(tmp_path, *overrides("fedadam")))
    restore_strategy(again, state)
    assert np.array_equal(again.v_t["ema/w"], adam.v_t["ema/w"])
    with pytest.raises(CheckpointError, match="FedAvg does not have"):
        restore_strategy(make_strategy(tiny(tmp_path)), state)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (["federation.strategy=fedprox"], "proximal_mu"),
        (["training.proximal_mu=0.01"], "choose federation.strategy = 'fedprox'"),
        (["federation.strategy=fedadam", "training.proximal_mu=0.01"], "proximal_mu = 0.01 adds"),
        (["federation.strategy=fedtrimmedavg", "federation.trim=0.5"], "less than 0.5"),
        (["federation.strategy=fedtrimmedavg", "federation.trim=0"], "no protection"),
        (["federation.strategy=fedtrimmedavg"], "removes none of 3 hospitals.*needs 5"),
        (
            [
                "federation.strategy=fedtrimmedavg",
                "federation.trim=0.34",
                "federation.min_hospitals=2",
            ],
            "no model of fewer than 3 updates",
        ),
        (["federation.strategy=krum", "federation.malicious=1"], "5 hospitals"),
        (
            ["federation.strategy=multikrum", "federation.min_hospitals=2"],
            "no model of fewer than 3 updates",
        ),
        (['federation.exchange=["discriminator"]'], "neither generator nor ema"),
    ],
)
def test_strategy_refuses_incompatible_settings(
    override: list[str], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=text):
        check_compatibility(tiny(tmp_path, *override))


# --- the budget -----------------------------------------------------------------------------------


@given(kimg=st.floats(0.001, 500), rounds=st.integers(1, 300), batch=st.integers(1, 64))
def test_round_budgets_sum_to_whole_batches_of_the_budget(
    kimg: float, rounds: int, batch: int
) -> None:
    totals = images_per_round(kimg, rounds, batch)
    assert len(totals) == rounds
    assert 0 <= sum(totals) - round(kimg * 1000) < batch
    assert all(total % batch == 0 for total in totals)
    assert max(totals) - min(totals) <= batch


@given(
    sizes=st.lists(st.integers(1, 20000), min_size=1, max_size=8),
    batches=st.lists(st.integers(0, 3000), min_size=1, max_size=30),
    batch=st.integers(1, 64),
    equal=st.booleans(),
)
def test_hospital_budgets_sum_to_the_rounds_without_drift(
    sizes: list[int], batches: list[int], batch: int, equal: bool
) -> None:
    totals = [count * batch for count in batches]
    rows = apportion_images(sizes, totals, batch, equal)
    assert [sum(row) for row in rows] == totals
    assert min(min(row) for row in rows) >= 0
    assert not (np.array(rows) % batch).any()
    weights = [1] * len(sizes) if equal else sizes
    done = np.cumsum(np.array(rows), axis=0)
    exact = np.cumsum(totals)[:, None] * np.array(weights)[None] / sum(weights)
    assert np.abs(done - exact).max() < 2 * batch


def test_mean_metrics_are_weighted_by_images() -> None:
    rows = [
        {"images": 30, "loss_g": 1.0, "r1": 0.5},
        {"images": 10, "loss_g": 3.0},
        {"images": 0, "r_t": 9.0},
    ]
    assert mean_metrics(rows) == {"loss_g": 1.5, "r1": 0.5}
