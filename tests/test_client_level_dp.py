"""Client-level DP by Flower's wrappers: clipping, noise, privacy cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st
from small_federation import LocalGrid, federate, tiny, write_shards

from client.app import app
from client.wire import CLIPPING_NORM, clip_update
from fedgan import files
from fedgan.config import Settings
from fedgan.errors import ConfigError, FederationError
from fedgan.privacy.accounting import Mechanism, epsilon_of
from fedgan.privacy.ledger import Ledger
from fedgan.run_folder import RunFolder
from fedgan.runs.compatibility import check_compatibility
from fedgan.runs.preparation import experiment_of
from fedgan.training.checkpoint import load_tensors
from server.aggregation.client_level_dp import (
    LEDGER,
    equalize_weights,
    noise_statement,
    record_round,
)
from server.aggregation.strategies import make_strategy, set_expected_hospitals
from server.federation import Federation
from server.records import to_record
from server.roster import MemberGrid

SHAPES = {"generator/strength": (1,), "discriminator/w": (40, 50), "ema/b": (7,)}
HOSPITALS = 3


@pytest.fixture(autouse=True)
def identity() -> None:
    """Set the task identity that Flower's Message needs."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def settings_of(
    *overrides: str, hospitals: int = HOSPITALS, data: Path = Path("nowhere"), rounds: int = 2
) -> Settings:
    return tiny(data, *overrides, hospitals=hospitals, rounds=rounds, kimg=0.012 * rounds)


def arrays(rng: np.random.Generator, scale: float) -> dict[str, np.ndarray]:
    return {
        key: (scale * rng.standard_normal(shape)).astype(np.float32)
        for key, shape in SHAPES.items()
    }


def reply(model: dict[str, np.ndarray], weight: int = 5) -> Message:
    request = Message(RecordDict({"config": ConfigRecord()}), 1, "train")
    request.metadata.__dict__["_message_id"] = "request"
    records = {"arrays": ArrayRecord({key: Array(value) for key, value in model.items()})}
    return Message(
        RecordDict(records | {"metrics": MetricRecord({"num_examples": weight})}), reply_to=request
    )  # type: ignore[arg-type]


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    return math.sqrt(
        sum(float(np.square(one[key].astype(float) - other[key]).sum()) for key in one)
    )


def aggregate(
    settings: Settings,
    sent: dict[str, np.ndarray],
    models: list[dict[str, np.ndarray]],
    weights: tuple[int, ...] = (),
) -> dict[str, np.ndarray]:
    """The aggregated model of these replies."""
    strategy: Any = make_strategy(settings)
    set_expected_hospitals(strategy, len(models))
    members: Any = MemberGrid([])
    members.get_node_ids = lambda: list(range(len(models)))
    list(strategy.configure_train(1, to_record(sent), ConfigRecord(), members))
    replies = [
        reply(model, weight)
        for model, weight in zip(models, weights or (1,) * len(models), strict=True)
    ]
    record, _ = strategy.aggregate_train(1, equalize_weights(replies))
    return {key: array.numpy() for key, array in record.items()}


def shifted(sent: dict[str, np.ndarray], update: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The model of a hospital, with its arrays in reverse order."""
    return {key: sent[key] + update[key] for key in reversed(list(sent))}


# --- the mechanism --------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.floats(0.01, 100.0), st.sampled_from([0.1, 1.0, 10.0]))
def test_sensitivity_of_the_sum_is_bounded_by_the_clip(seed: int, size: float, clip: float) -> None:
    rng = np.random.default_rng(seed)
    settings = settings_of(
        "privacy.client_level=server",
        "privacy.client_noise_multiplier=0",
        f"privacy.client_clip={clip}",
    )
    sent = arrays(rng, 1.0)
    others = [shifted(sent, arrays(rng, 0.01)) for _ in range(HOSPITALS - 1)]
    tiny_step = shifted(sent, arrays(rng, 1e-6))  # a hospital with almost no change
    with_it = aggregate(
        settings, sent, [shifted(sent, arrays(rng, size)), *others], weights=(1000, 1, 1)
    )
    without = aggregate(settings, sent, [tiny_step, *others], weights=(1, 1, 1))
    sensitivity = HOSPITALS * distance(with_it, without)
    assert sensitivity <= clip * 1.001 + 1e-3
    assert sensitivity > 0.9 * min(clip, size) - 1e-3


@pytest.mark.parametrize("side", ["server", "client"])
def test_noise_has_the_configured_deviation_with_an_absent_hospital(
    side: str,
) -> None:
    clip, noise = 0.5, 4.0
    overrides = (
        f"privacy.client_level={side}",
        f"privacy.client_noise_multiplier={noise}",
        f"privacy.client_clip={clip}",
    )
    sent = {"generator/w": np.zeros((300, 400), np.float32), "ema/one": np.zeros(1, np.float32)}
    update = {key: np.full(value.shape, 1e-6, np.float32) for key, value in sent.items()}
    for hospitals in (3, 2):
        found = aggregate(settings_of(*overrides), sent, [shifted(sent, update)] * hospitals)
        assert found["generator/w"].std() == pytest.approx(noise * clip / hospitals, rel=0.01)
        assert abs(found["generator/w"].mean()) < 0.02
    noises = []
    for _ in range(2):
        np.random.seed(0)  # the noise does not depend on numpy's seed
        noises.append(
            aggregate(settings_of(*overrides), sent, [shifted(sent, update)] * 3)["generator/w"]
        )
    assert not np.array_equal(*noises)


def test_array_without_a_dimension_is_refused() -> None:
    with pytest.raises(
        FederationError, match="'a' has no dimension and would escape Flower's clipping"
    ):
        equalize_weights([reply({"a": np.array(3, np.float32), "b": np.ones(2, np.float32)})])


def clipped_reply(
    sent: dict[str, np.ndarray], model: dict[str, np.ndarray], clip: float | None
) -> dict[str, np.ndarray]:
    """The arrays that leave a hospital after clipping."""
    config = ConfigRecord({} if clip is None else {CLIPPING_NORM: clip})
    message = Message(RecordDict({"arrays": to_record(sent), "config": config}), 1, "train")
    message.metadata.__dict__["_message_id"] = "request"
    content = RecordDict({"arrays": to_record(model), "metrics": MetricRecord({"num_examples": 5})})
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    found = clip_update(message, context, lambda request, _: Message(content, reply_to=request))
    assert not found.has_error()
    return {key: array.numpy() for key, array in found.content.array_records["arrays"].items()}


def test_hospital_clips_its_update_on_request() -> None:
    rng = np.random.default_rng(3)
    # some weights of StyleGAN2 have a standard deviation of 100
    sent, update = arrays(rng, 100.0), arrays(rng, 2.0)
    model = shifted(sent, update)
    clipped = clipped_reply(sent, model, 1.0)
    assert distance(clipped, sent) == pytest.approx(1.0, rel=1e-2)
    direction = {key: (clipped[key] - sent[key]) * distance(model, sent) for key in sent}
    assert distance(direction, update) < 0.05 * distance(model, sent)
    assert distance(clipped_reply(sent, model, None), model) == 0
    # no change: Flower would divide by zero
    assert distance(clipped_reply(sent, sent, 1.0), sent) == 0


def test_client_level_dp_uses_flower_s_wrappers_of_fedavg_alone() -> None:
    kinds = {
        "server": flower.DifferentialPrivacyServerSideFixedClipping,
        "client": flower.DifferentialPrivacyClientSideFixedClipping,
        "none": flower.FedAvg,
    }
    for side, kind in kinds.items():
        assert type(make_strategy(settings_of(f"privacy.client_level={side}"))) is kind
    for strategy in ("fedadam", "fedmedian", "krum"):
        with pytest.raises(ConfigError, match="computes another result"):
            check_compatibility(
                settings_of(
                    "privacy.client_level=server", f"federation.strategy={strategy}", hospitals=3
                )
            )
    with pytest.raises(ConfigError, match="makes none: raise it"):
        check_compatibility(settings_of("privacy.client_level=server", "training.learning_rate=0"))


# --- privacy cost ---------------------------------------------------------------------------------


def test_every_release_is_one_gaussian_mechanism_of_the_ledger(tmp_path: Path) -> None:
    settings = settings_of("privacy.client_level=server", "privacy.client_noise_multiplier=5")
    run, records = RunFolder.at(tmp_path), list[dict[str, Any]]()
    for _ in range(4):
        records.append(record_round(settings, run, "x", 3))
    assert [row["releases"] for row in records] == [1, 2, 3, 4]
    for row in records:
        assert row["epsilon"] == pytest.approx(
            epsilon_of([Mechanism(5.0, 1.0, row["releases"])], 1e-5), rel=1e-6
        )
        # against the exact curve of the Gaussian mechanism (arXiv 1805.06530, theorem 8)
        assert row["epsilon"] == pytest.approx(
            gaussian(5 / math.sqrt(row["releases"]), 1e-5), rel=0.03
        )
    assert records[0]["delta"] == 1e-5
    assert (
        record_round(
            settings_of("privacy.client_level=server", "privacy.client_noise_multiplier=0"),
            run,
            "x",
            3,
        )["epsilon"]
        is None
    )


def gaussian(noise: float, delta: float) -> float:
    """ε of one Gaussian mechanism with this noise over its sensitivity."""

    def tail(epsilon: float) -> float:
        def normal(x: float) -> float:
            return 0.5 * math.erfc(-x / math.sqrt(2))

        return normal(0.5 / noise - epsilon * noise) - math.exp(epsilon) * normal(
            -0.5 / noise - epsilon * noise
        )

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) > delta else (low, middle)
    return high


def test_noise_statement_explains_epsilon_and_noise() -> None:
    text = noise_statement(
        settings_of("privacy.client_level=server", "privacy.client_noise_multiplier=2", rounds=5),
        1_000_000,
    )
    epsilon = epsilon_of([Mechanism(2.0, 1.0, 5)], 1e-5)
    assert f"5 rounds cost every hospital epsilon = {epsilon:.3g} at delta = 1e-05" in text
    assert "over 1,000,000 numbers the noise is 2,000 times as long" in text
    assert "delta = 1/3 would allow the full disclosure of one hospital" in text


@pytest.mark.parametrize("side", ["server", "client"])
def test_client_level_dp_run_clips_adds_noise_and_reports_epsilon(
    side: str, tmp_path: Path
) -> None:
    clip, noise, data = 0.5, 3.0, write_shards(tmp_path / "data", (40, 24, 16))
    overrides = (
        f"privacy.client_level={side}",
        f"privacy.client_clip={clip}",
        "privacy.client_noise_multiplier=",
    )
    change, lines = {}, {}
    for multiplier in (0.0, noise):
        settings = settings_of(*overrides[:2], f"{overrides[2]}{multiplier}", data=data, rounds=1)
        run = RunFolder.at(tmp_path / f"run-{multiplier}")
        federate(settings, run, app)
        begin, end = (load_tensors(run.checkpoint(number))[0] for number in (0, 1))
        change[multiplier] = np.concatenate(
            [(end[key] - begin[key]).numpy().ravel() for key in begin]
        )
        (lines[multiplier],) = files.read_json_lines(run.metrics)
    # the mean of three updates of at most the clip's length
    assert 0.1 * clip < np.linalg.norm(change[0.0]) < 1.01 * clip
    assert change[noise].std() == pytest.approx(noise * clip / 3, rel=0.1)
    assert lines[0.0]["client_level_dp"]["epsilon"] is None
    reported = lines[noise]["client_level_dp"]
    assert (
        reported["releases"],
        reported["hospitals"],
        reported["clip"],
        reported["noise_multiplier"],
    ) == (
        1,
        3,
        clip,
        noise,
    )
    assert reported["epsilon"] == pytest.approx(
        epsilon_of(Ledger(run.path / LEDGER).mechanisms(), 1e-5)
    )
    assert all("loss_g" not in row for line in lines.values() for row in line["hospitals"])


def test_repeated_round_counts_twice_and_the_note_appears_once(
    tmp_path: Path,
) -> None:
    settings = settings_of(
        "privacy.client_level=server",
        "privacy.client_noise_multiplier=3",
        data=write_shards(tmp_path / "d", (40, 24, 16)),
    )
    run = RunFolder.at(tmp_path / "run")
    federation = federate(settings, run, app)
    run.checkpoint(2).unlink()
    run.checkpoint(2).with_suffix(".json").unlink()
    events: list[dict[str, Any]] = []
    Federation(run.settings(), run, experiment_of(run), federation.evaluator, events.append).train(
        LocalGrid(3, app)
    )  # type: ignore[arg-type]
    assert [event["event"] for event in events].count("note") == 1
    assert [line["client_level_dp"]["releases"] for line in files.read_json_lines(run.metrics)] == [
        1,
        3,
    ]
