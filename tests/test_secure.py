"""Secure aggregation: the mean equals FedAvg's, single updates stay hidden, losses are named."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st
from small_federation import NAMES, LocalGrid, NoEvaluator, error_reply, tiny, write_shards

import client.secure
import server.aggregation.secure
from client.app import app
from client.gate import OutboundGate
from client.hospital import SIMULATION, TrainRequest
from client.policy import apply_policy
from client.secure import check_request
from fedgan.config import Settings
from fedgan.errors import ConfigError, FederationError
from fedgan.exchange.masking import MODULUS, apply_mean, levels, mask_numbers, ranges, scale
from fedgan.exchange.outbound_log import NAME, OutboundLog
from fedgan.run_folder import RunFolder
from fedgan.runs.compatibility import check_compatibility, reason_to_end
from fedgan.runs.preparation import experiment_of, prepare_run
from fedgan.training.checkpoint import load_tensors
from server.aggregation.secure import check_mean
from server.federation import Federation

PARTS = ("generator/", "discriminator/", "ema/")
SIZES = (40, 24, 16, 8)
Handler = Callable[[Message, Context], Message]
Fault = Callable[[int, Message], Message | None]


def stage_of(message: Message) -> str:
    """The protocol stage of a message; '' for any other message."""
    return str((message.content.config_records.get(RECORD_KEY_CONFIGS) or {}).get(Key.STAGE, ""))


def fail_at(number: int, stage: str) -> Fault:
    """A fault: the hospital's process dies at this stage."""
    return lambda hospital, message: (
        error_reply(message, "gone", 8)
        if (hospital, stage_of(message)) == (number, stage)
        else None
    )


class RecordedFederation:
    """A federation that records the hospitals' replies and the server's events."""

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        hospitals: int = 3,
        rounds: int = 1,
        handler: Handler = app,
        fault: Fault | None = None,
    ) -> None:
        self.data = write_shards(folder / "data", SIZES[:hospitals])
        self.settings = tiny(
            self.data, *overrides, hospitals=hospitals, rounds=rounds, kimg=0.04 * rounds
        )
        self.run = RunFolder.at(folder / "run")
        prepare_run(self.settings, self.run)
        self.replies: list[tuple[int, str, Message]] = []
        self.events: list[dict[str, Any]] = []
        self.grid = LocalGrid(
            hospitals, lambda message, context: self._record(handler, message, context), fault
        )  # type: ignore[arg-type]

    def _record(self, handler: Handler, message: Message, context: Context) -> Message:
        stage = stage_of(message)
        # a simulated hospital has no run id, and can only reply
        with mock.patch.object(TaskIdentity, "_run_id", None):
            reply = handler(message, context)
        self.replies.append((int(context.node_config["partition-id"]), stage, copy.deepcopy(reply)))
        return reply

    def train(self) -> RecordedFederation:
        Federation(
            self.run.settings(),
            self.run,
            experiment_of(self.run),
            NoEvaluator(),
            self.events.append,
        ).train(self.grid)  # type: ignore[arg-type]
        return self

    def model(self, round_number: int = 1) -> dict[str, np.ndarray]:
        tensors, _ = load_tensors(self.run.checkpoint(round_number))
        return {key: tensor.numpy() for key, tensor in tensors.items() if key.startswith(PARTS)}

    def change(self, number: int) -> dict[str, np.ndarray]:
        """This hospital's change of round 1, from its own disk."""
        state, _ = load_tensors(self.run.hospital_state(NAMES[number]) / "state-00001.safetensors")
        return {key: state[key].numpy() - array for key, array in self.model(0).items()}

    def masked(self, number: int) -> dict[str, np.ndarray]:
        """This hospital's masked change as the server received it."""
        (reply,) = [
            r
            for hospital, stage, r in self.replies
            if (hospital, stage) == (number, Stage.COLLECT_MASKED_VECTORS)
        ]
        return {key: array.numpy() for key, array in reply.content.array_records["masked"].items()}

    @property
    def notes(self) -> str:
        return "\n".join(event["text"] for event in self.events if event["event"] == "note")


def assert_same(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], limit: float = 2e-6
) -> None:
    """Assert equality within `limit` times each array's largest number and within 1e-4."""
    assert set(found) == set(expected)
    for key, array in expected.items():
        assert found[key].dtype == np.float32
        error = float(np.abs(found[key] - array).max())
        assert error < 1e-4, key
        assert error <= limit * max(1.0, float(np.abs(array).max())), key


# --- scaling and masks ----------------------------------------------------------------------------


@given(st.integers(3, 40), st.floats(0.001, 300), st.floats(1e-4, 1), st.integers(0, 99))
def test_scaled_changes_are_restored_as_their_mean(
    n: int, std: float, step: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    master = {"w": rng.normal(0, std, (7, 5)).astype(np.float32), "zero": np.zeros(3, np.float32)}
    changes = [
        {key: rng.normal(0, step, array.shape).astype(np.float32) for key, array in master.items()}
        for _ in range(n)
    ]
    spans, fine = ranges(master, 4.0), levels(n)
    rounded = [
        [np.rint((a + 1) / 2 * fine) / fine * 2 - 1 for a in scale(change, spans)[0]]
        for change in changes
    ]
    model, clipped = apply_mean(
        master, [np.mean(parts, axis=0) for parts in zip(*rounded, strict=True)], spans
    )
    assert clipped < 0.5
    assert n * fine <= 2**31
    for key, array in master.items():
        expected = array + np.mean([change[key].astype(np.float64) for change in changes], axis=0)
        assert (
            np.abs(model[key] - expected).max() <= spans[key] / fine + 1e-7 * np.abs(expected).max()
        )


def test_scale_clips_and_counts_numbers_beyond_the_range() -> None:
    master = {"w": np.array([100.0, 1.0], np.float32)}
    spans = ranges(master, 2.0)
    assert spans == {"w": 256.0}
    scaled, clipped = scale({"w": np.array([1.0, 300.0], np.float32)}, spans)
    assert clipped == 1
    assert scaled[0].tolist() == [1 / 256, 1.0]
    model, clipped = apply_mean(master, scaled, spans)
    assert model["w"].tolist() == [101.0, 257.0]
    assert clipped == 1


@pytest.mark.parametrize("largest", [4.0, 4.0001, 127.99, 128.0, 128.01, 1e30])
def test_range_is_the_next_power_of_two_of_the_largest_number(largest: float) -> None:
    span = ranges({"w": np.array([-largest, 0.5], np.float32)}, 1.0)["w"]
    assert span >= np.float32(largest) > span / 2
    assert np.log2(span) == int(np.log2(span))


def test_scale_refuses_a_change_that_is_not_finite() -> None:
    with pytest.raises(FederationError, match="'w' is not finite"):
        scale({"w": np.array([np.nan], np.float32)}, {"w": 1.0})


def test_masks_are_uniform_and_depend_on_the_whole_secret() -> None:
    one, other = (
        mask_numbers(bytes(30) + end, MODULUS, [(1,), (50, 1000)]) for end in (b"ab", b"ba")
    )
    assert [array.shape for array in one] == [(1,), (50, 1000)]
    assert np.array_equal(one[1], mask_numbers(bytes(30) + b"ab", MODULUS, [(1,), (50, 1000)])[1])
    assert one[0] != one[1][0, 0]
    # Flower folds a seed to 32 bits by XOR: these two seeds would give the same mask
    folded = [
        mask_numbers(b"abcd" + rest, MODULUS, [(1000,)])[0]
        for rest in (b"abcd" + bytes(4), bytes(4) + b"abcd")
    ]
    assert not np.array_equal(*folded)
    for array in (one[1], other[1], (one[1] - other[1]) % MODULUS):
        assert abs(array.mean() / MODULUS - 0.5) < 0.01
        assert 0.99 < np.histogram(array, 16, (0, MODULUS))[0].max() / (array.size / 16) < 1.1


# --- rounds ---------------------------------------------------------------------------------------


def test_secure_run_equals_fedavg_with_large_weights(tmp_path: Path) -> None:
    plain = RecordedFederation(tmp_path / "plain", rounds=2).train()
    secure = RecordedFederation(tmp_path / "secure", "federation.secure=true", rounds=2).train()
    assert_same(secure.model(1), plain.model(1))
    # both trainings start from models that differ in the last bit
    assert_same(secure.model(2), plain.model(2), 1e-4)
    assert max(array.std() for array in plain.model(0).values()) > 70
    assert any(np.abs(change).max() > 1e-3 for change in plain.change(0).values())
    lines = [run.run.metrics.read_text().count("\n") for run in (plain, secure)]
    assert lines == [2, 2]
    assert "max_update_ratio = 10 cannot check" in secure.notes


@pytest.mark.parametrize("rule", ["equal", "sum", "damped", "damped federation.local_images=equal"])
def test_secure_weights_that_need_no_size_equal_those_in_clear(rule: str, tmp_path: Path) -> None:
    overrides = (
        *f"federation.weights={rule}".split(),
        "federation.exchange=generator,discriminator",
    )
    plain = RecordedFederation(tmp_path / "plain", *overrides).train().model()
    secure = (
        RecordedFederation(tmp_path / "secure", *overrides, "federation.secure=true")
        .train()
        .model()
    )
    # averages: under the mask with equal weights, in clear weighted by size
    averages = [key for key in plain if key.endswith("w_avg")]
    assert averages
    assert_same(
        *(
            {key: array for key, array in model.items() if key not in averages}
            for model in (secure, plain)
        )
    )


@pytest.mark.parametrize("rule", ["sum", "damped"])
def test_secure_sum_excludes_a_hospital_lost_in_training(rule: str, tmp_path: Path) -> None:
    """The lost hospital's masks are removed, and the others' changes are summed."""
    overrides = (
        f"federation.weights={rule}",
        "federation.exchange=generator,discriminator",
        "federation.secure=true",
    )
    fault = fail_at(3, Stage.COLLECT_MASKED_VECTORS)
    recorded = RecordedFederation(
        tmp_path, *overrides, "federation.min_hospitals=3", hospitals=4, fault=fault
    ).train()
    changes = [recorded.change(number) for number in range(3)]
    factor = 1 if rule == "sum" else math.hypot(*SIZES[:3]) / sum(SIZES[:3])
    for key, before in recorded.model(0).items():
        if not key.startswith("ema/") and not key.endswith("w_avg"):
            expected = before + factor * sum(change[key] for change in changes)
            np.testing.assert_allclose(recorded.model()[key], expected, atol=1e-4, rtol=1e-5)


def test_secure_plan_refuses_rounds_in_which_two_hospitals_train(tmp_path: Path) -> None:
    """Each of two hospitals that train alone could compute the other's change."""
    recorded = RecordedFederation(
        tmp_path, "federation.secure=true", "training.kimg=0.048", rounds=4
    )
    with pytest.raises(ConfigError, match=r"2 hospitals train.*lower federation\.rounds"):
        recorded.train()


def correlation(recorded: RecordedFederation, number: int) -> float:
    """Correlation between a hospital's change and its masked change at the server."""
    masked, change = recorded.masked(number), recorded.change(number)
    spans = ranges(recorded.model(0), recorded.settings.federation.secure_range)
    fine, share = levels(3), SIZES[number] / SIZES[0]
    received = np.concatenate(
        [(masked[key].ravel() / fine * 2 - 1) * spans[key] / share for key in change]
    )
    true = np.concatenate([change[key].ravel() for key in change])
    return float(np.corrcoef(received, true)[0, 1])


def test_masked_change_does_not_correlate_with_the_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = RecordedFederation(tmp_path / "masked", "federation.secure=true").train()
    size = sum(array.size for array in recorded.model(0).values())
    for number in range(3):
        assert abs(correlation(recorded, number)) < 5 / np.sqrt(size)
        arrived = np.concatenate([array.ravel() for array in recorded.masked(number).values()])
        assert abs(arrived.mean() / MODULUS - 0.5) < 0.05
        (reply,) = [
            r
            for hospital, stage, r in recorded.replies
            if hospital == number and stage == Stage.COLLECT_MASKED_VECTORS
        ]
        assert set(reply.content) == {"masked", "metrics", "facts"}

    # positive control: without masks the correlation is high
    def no_masks(seed: bytes, num_range: int, shapes: Any) -> list[np.ndarray]:
        return [np.zeros(shape, np.int64) for shape in shapes]

    for end in (client.secure._flower, server.aggregation.secure._flower):
        monkeypatch.setattr(end, "pseudo_rand_gen", no_masks)
    bare = RecordedFederation(tmp_path / "bare", "federation.secure=true").train()
    assert all(correlation(bare, number) > 0.9 for number in range(3))


def test_hospital_lost_in_training_is_left_out_of_the_mean(tmp_path: Path) -> None:
    def fail_in_training(hospital: int, message: Message) -> Message | None:
        return (
            error_reply(message, "gone", 8)
            if hospital == 1 and message.metadata.message_type == "train"
            else None
        )

    plain = RecordedFederation(
        tmp_path / "plain", "federation.min_hospitals=2", fault=fail_in_training
    ).train()
    secure = RecordedFederation(
        tmp_path / "secure",
        "federation.secure=true",
        "federation.min_hospitals=2",
        fault=fail_at(1, Stage.COLLECT_MASKED_VECTORS),
    ).train()
    assert_same(secure.model(), plain.model())
    assert "hospital 2 ('beta') failed in round 1: its process died" in secure.notes


def test_hospital_lost_after_its_reply_still_counts(tmp_path: Path) -> None:
    plain = RecordedFederation(tmp_path / "plain").train()
    secure = RecordedFederation(
        tmp_path / "secure",
        "federation.secure=true",
        "federation.min_hospitals=2",
        fault=fail_at(2, Stage.UNMASK),
    ).train()
    assert_same(secure.model(), plain.model())


@pytest.mark.parametrize("stage", [Stage.SETUP, Stage.SHARE_KEYS])
def test_hospital_lost_before_the_masks_ends_a_round_of_three(tmp_path: Path, stage: str) -> None:
    recorded = RecordedFederation(
        tmp_path, "federation.secure=true", "federation.min_hospitals=2", fault=fail_at(1, stage)
    )
    with pytest.raises(
        FederationError,
        match=r"hospital 2 \('beta'\) failed in round 1: its process died.*"
        "during the agreement on masks",
    ):
        recorded.train()
    assert not recorded.run.checkpoint(1).exists()
    # no hospital has trained
    assert not any(stage == Stage.COLLECT_MASKED_VECTORS for _, stage, _ in recorded.replies)


@pytest.mark.parametrize("stage", [Stage.SETUP, Stage.SHARE_KEYS])
def test_three_of_four_hospitals_agree_on_masks_again_after_a_loss(
    tmp_path: Path, stage: str
) -> None:
    overrides = ("federation.secure=true", "federation.min_hospitals=3")
    secure = RecordedFederation(
        tmp_path / "secure", *overrides, hospitals=4, fault=fail_at(3, stage)
    ).train()
    plain = RecordedFederation(
        tmp_path / "plain",
        overrides[1],
        hospitals=4,
        fault=lambda hospital, m: (
            fail_at(3, "")(hospital, m) if m.metadata.message_type == "train" else None
        ),
    ).train()
    assert_same(secure.model(), plain.model())
    assert "hospital 4 ('delta') failed in round 1" in secure.notes


def test_secure_round_of_two_hospitals_does_not_start(tmp_path: Path) -> None:
    recorded = RecordedFederation(
        tmp_path,
        "federation.secure=true",
        "federation.min_hospitals=2",
        "federation.join_timeout=1",
    )
    del recorded.grid.nodes[998]
    with pytest.raises(FederationError, match="needs 3 hospitals, and 2 have joined"):
        recorded.train()
    assert all(not stage for _, stage, _ in recorded.replies)


def test_too_few_hospitals_to_unmask_is_an_error_that_names_the_missing(tmp_path: Path) -> None:
    recorded = RecordedFederation(
        tmp_path, "federation.secure=true", fault=fail_at(0, Stage.UNMASK)
    )
    with pytest.raises(
        FederationError, match=r"cannot be read.*hospital 1 \('alpha'\): its process died"
    ):
        recorded.train()
    assert not recorded.run.checkpoint(1).exists()


def tamper(number: int, stage: str, change: Callable[[RecordDict], None]) -> Handler:
    """A hospital that changes its reply at this stage."""

    def handle(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if (context.node_config["partition-id"], stage_of(message)) == (number, stage):
            change(reply.content)
        return reply

    return handle


def other_dtype(content: RecordDict) -> None:
    masked = content.array_records["masked"]
    content["masked"] = ArrayRecord(
        {key: Array(array.numpy().astype(np.int64)) for key, array in masked.items()}
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda content: content.metric_records["metrics"].update({"num_examples": 99}),
            "claims num_examples = 99",
        ),
        (lambda content: content.array_records["masked"].pop("factor"), "other masked arrays"),
        (other_dtype, "no masked array of the expected"),
        (lambda content: content.config_records["facts"].pop("images"), "does not report"),
    ],
)
def test_invalid_reply_is_left_out_before_the_sum(tmp_path: Path, change: Any, text: str) -> None:
    overrides = ("federation.secure=true", "federation.min_hospitals=2")
    recorded = RecordedFederation(
        tmp_path, *overrides, handler=tamper(0, Stage.COLLECT_MASKED_VECTORS, change)
    ).train()
    assert (
        f"in round 1 hospital 1 ('alpha') {'replied' if 'masked' in text else text.split()[0]}"
        in recorded.notes
    )
    assert text in recorded.notes
    weights = [SIZES[1], SIZES[2]]
    for key, array in recorded.model(0).items():
        mean = np.average(
            [recorded.change(number)[key] for number in (1, 2)], axis=0, weights=weights
        )
        assert np.allclose(recorded.model()[key] - array, mean, atol=1e-4)


def swap_shares(content: RecordDict) -> None:
    keys = content.config_records["keys"]
    keys["shares"] = list(reversed(keys["shares"]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "change", "text"),
    [
        (
            Stage.SETUP,
            lambda content: content.config_records["keys"].pop("pk1"),
            "'alpha'.*violates the protocol",
        ),
        (
            Stage.SHARE_KEYS,
            lambda content: content.config_records["keys"].update({"ctxts": [b"no"]}),
            "'alpha'.*violates the protocol",
        ),
        (
            Stage.UNMASK,
            lambda content: content.config_records["keys"].update({"shares": [b"", b"", b""]}),
            "a hospital's reply violates",
        ),
        (Stage.UNMASK, swap_shares, "secure aggregation failed|out of range"),
    ],
)
def test_protocol_violation_ends_the_round_and_names_the_hospital(
    tmp_path: Path, stage: str, change: Any, text: str
) -> None:
    recorded = RecordedFederation(
        tmp_path, "federation.secure=true", handler=tamper(0, stage, change)
    )
    with pytest.raises(FederationError, match=text):
        recorded.train()
    assert not recorded.run.checkpoint(1).exists()


def test_mean_with_a_remaining_mask_is_refused() -> None:
    check_mean([np.array([1.0, -1.0]), np.zeros(0)])
    for wrong in (np.array([0.0, 1.1]), np.array([np.inf]), np.array([np.nan])):
        with pytest.raises(FederationError, match="out of range"):
            check_mean([np.zeros(2), wrong])


def test_hospital_that_trained_no_image_is_not_in_the_secure_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # stands for a private run, which is slower
    monkeypatch.setattr("server.federation.check_exhausted", lambda *facts: None)

    def exhausted_budget(content: RecordDict) -> None:
        content.config_records["facts"].update({"images": 0.0, "exhausted": 1.0})

    overrides = ("federation.secure=true", "federation.min_hospitals=2")
    recorded = RecordedFederation(
        tmp_path / "two",
        *overrides,
        handler=tamper(2, Stage.COLLECT_MASKED_VECTORS, exhausted_budget),
    ).train()
    for key, array in recorded.model(0).items():
        mean = np.average(
            [recorded.change(number)[key] for number in (0, 1)],
            axis=0,
            weights=[SIZES[0], SIZES[1]],
        )
        assert np.allclose(recorded.model()[key] - array, mean, atol=1e-4)
    # a sum needs all three: the round changes nothing, and the run ends
    recorded = RecordedFederation(
        tmp_path / "all",
        overrides[0],
        handler=tamper(2, Stage.COLLECT_MASKED_VECTORS, exhausted_budget),
        rounds=2,
    ).train()
    assert_same(recorded.model(1), recorded.model(0), 0.0)
    assert "federation.secure needs 3 hospitals, and 2 are left" in recorded.run.metrics.read_text()


def test_clipped_numbers_are_noted_as_a_sum_and_in_the_client_log(
    tmp_path: Path,
) -> None:
    recorded = RecordedFederation(
        tmp_path, "federation.secure=true", "federation.secure_range=0.001"
    ).train()
    assert "numbers of a hospital's change were clipped" in recorded.notes
    logs = [path.read_text() for path in tmp_path.rglob("client.log")]
    assert any("numbers changed by more than federation.secure_range" in text for text in logs)


# --- outbound gate --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def round_requests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Message]:
    """The four requests of a round as hospital 0 received them."""
    found: dict[str, Message] = {}

    def record(hospital: int, message: Message) -> None:
        if hospital == 0:
            found[stage_of(message)] = copy.deepcopy(message)

    RecordedFederation(
        tmp_path_factory.mktemp("requests"), "federation.secure=true", fault=record
    ).train()
    return found


def test_outbound_log_has_the_four_messages_of_a_secure_round(
    round_requests: dict[str, Message], tmp_path: Path
) -> None:
    recorded = RecordedFederation(tmp_path, "federation.secure=true").train()
    entries = OutboundLog(recorded.data / "alpha" / NAME).read().entries
    assert [entry.message for entry in entries] == [
        "query.hello",
        "train",
        "train",
        "train",
        "train",
    ]
    names = [[record["name"] for record in entry.records] for entry in entries[1:]]
    assert [sorted(each) for each in names] == [
        ["keys"],
        ["keys"],
        ["facts", "masked", "metrics"],
        ["keys"],
    ]
    (public,) = entries[1].records
    (reply,) = [
        r for hospital, stage, r in recorded.replies if (hospital, stage) == (0, Stage.SETUP)
    ]
    assert public["values"].keys() == {"pk1", "pk2"}
    assert public["bytes"] > sum(len(key) for key in reply.content.config_records["keys"].values())
    assert "PUBLIC KEY" not in str(entries[1])


def refusal_of(message: Message, monkeypatch: pytest.MonkeyPatch, content: RecordDict) -> str:
    """The app's error where Flower's mod returns this content; '' if none."""
    monkeypatch.setattr(
        "client.secure.secaggplus_mod",
        lambda inner, context, train: Message(content, reply_to=inner),
    )
    context = Context(
        run_id=1, node_id=1, node_config={"partition-id": 0}, state=RecordDict(), run_config={}
    )
    context.state["secaggplus_state"] = ConfigRecord({})
    with mock.patch.dict(os.environ, {SIMULATION: "1"}):
        reply = app(copy.deepcopy(message), context)
    return str(reply.error.reason) if reply.has_error() else ""


@pytest.mark.parametrize(
    ("stage", "values", "what"),
    [
        (Stage.SETUP, {"pk1": b"my images"}, "an array of another type or shape"),
        (Stage.SETUP, {"pk1": "text"}, "a value of another type"),
        (Stage.SETUP, {"sk1": b"secret"}, "a value that is not listed"),
        (Stage.SHARE_KEYS, {"dsts": [1, 2, 3]}, "an array of another type or shape"),
        (Stage.SHARE_KEYS, {"ctxts": [b"x" * 2000, b"y"]}, "an array of another type or shape"),
        (Stage.UNMASK, {"shares": [b"x"] * 9}, "an array of another type or shape"),
        (Stage.UNMASK, {"nids": ["a", "b", "c"]}, "an array of another type or shape"),
    ],
)
def test_gate_refuses_values_that_are_not_listed_for_the_stage(
    round_requests: dict[str, Message],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    values: Any,
    what: str,
) -> None:
    content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(values)})
    assert (
        refusal_of(round_requests[stage], monkeypatch, content)
        == f"hospital: refused to send {what}"
    )


def test_gate_refuses_a_model_in_clear_in_a_secure_round(
    round_requests: dict[str, Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = round_requests[Stage.COLLECT_MASKED_VECTORS]
    monkeypatch.setattr(
        "client.secure._masked",
        lambda content, request: ArrayRecord({"ema/x": Array(np.zeros(1, np.float32))}),
    )
    content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord({})})
    assert (
        refusal_of(message, monkeypatch, content)
        == "hospital: refused to send an array that is not listed"
    )
    monkeypatch.setattr("client.secure.MASKED", "arrays")
    monkeypatch.setattr(
        "client.secure._masked", lambda content, request: request.content.array_records["arrays"]
    )
    assert (
        refusal_of(message, monkeypatch, content)
        == "hospital: refused to send a record that is not listed"
    )


def test_secure_request_without_a_stage_gets_no_reply(
    round_requests: dict[str, Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = copy.deepcopy(round_requests[Stage.COLLECT_MASKED_VECTORS])
    del message.content[RECORD_KEY_CONFIGS]
    assert refusal_of(message, monkeypatch, RecordDict()).startswith(
        "hospital: KeyError while replying"
    )


NUMBERS = {Key.CLIPPING_RANGE: 1.0, Key.TARGET_RANGE: levels(3), Key.MOD_RANGE: MODULUS}
SETUP = {Key.SAMPLE_NUMBER: 3, Key.SHARE_NUMBER: 3, Key.THRESHOLD: 2, **NUMBERS}
UNMASK = {Key.ACTIVE_NODE_ID_LIST: [1, 2], Key.DEAD_NODE_ID_LIST: [3]}


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        (Stage.SETUP, SETUP | {Key.SAMPLE_NUMBER: 2, Key.SHARE_NUMBER: 2}),
        (Stage.SETUP, SETUP | {Key.THRESHOLD: 1}),
        (Stage.SETUP, SETUP | {Key.TARGET_RANGE: 2}),
        (Stage.SETUP, SETUP | {Key.CLIPPING_RANGE: 8.0}),
        (Stage.SHARE_KEYS, {"1": [b"", b""], "2": [b"", b""], Key.STAGE: "share_keys"}),
        (Stage.UNMASK, UNMASK | {Key.DEAD_NODE_ID_LIST: [2, 3]}),  # both secrets of 2
        # the hospital's own first key
        (Stage.UNMASK, {Key.ACTIVE_NODE_ID_LIST: [2, 3], Key.DEAD_NODE_ID_LIST: [1]}),
    ],
)
def test_hospital_refuses_requests_that_would_reveal_its_change(stage: str, config: Any) -> None:
    check_request(Stage.SETUP, SETUP, 1)
    check_request(Stage.UNMASK, UNMASK, 1)
    with pytest.raises(ConfigError, match="the server"):
        check_request(stage, config, 1)


def test_secrets_are_deleted_after_the_round(tmp_path: Path) -> None:
    recorded = RecordedFederation(tmp_path, "federation.secure=true").train()
    assert all(not state for state in recorded.grid.states.values())


# --- require-secure -------------------------------------------------------------------------------


def with_require_secure(number: int, gate: Handler = app) -> Handler:
    """Hospitals; the node-config of this one has require-secure = true."""

    def handle(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == number:
            context.node_config["require-secure"] = True
        return gate(message, context)

    return handle


def test_hospital_with_require_secure_joins_a_secure_run(tmp_path: Path) -> None:
    recorded = RecordedFederation(
        tmp_path, "federation.secure=true", handler=with_require_secure(0)
    ).train()
    assert not any(reply.has_error() for _, _, reply in recorded.replies)


def test_hospital_with_require_secure_sends_only_a_reason_in_clear(
    tmp_path: Path,
) -> None:
    recorded = RecordedFederation(tmp_path, handler=with_require_secure(1))
    with pytest.raises(FederationError, match="ConfigError while applying its require-secure"):
        recorded.train()
    (reply,) = [reply for hospital, _, reply in recorded.replies if hospital == 1]
    assert reply.has_error()
    (log,) = recorded.run.path.glob("hospitals/*/client.log")
    assert "require-secure = true, and the run has no secure aggregation" in log.read_text()


@pytest.mark.parametrize("gate", [app, OutboundGate()], ids=["app", "gate-only"])
def test_hospital_with_require_secure_sends_no_round_in_clear(
    tmp_path: Path, gate: OutboundGate
) -> None:
    """Also where the first request was secure, and where only the gate applies the rule."""
    recorded_requests: list[tuple[Message, Context]] = []

    def record(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1 and message.metadata.message_type == "train":
            recorded_requests.append((copy.deepcopy(message), context))
        return app(message, context)

    recorded = RecordedFederation(tmp_path, handler=record).train()
    ((message, context),) = recorded_requests
    honest = next(
        reply
        for hospital, _, reply in recorded.replies
        if hospital == 1 and "arrays" in reply.content
    )
    if gate is not app:
        gate.train()(
            lambda message, context: Message(copy.deepcopy(honest.content), reply_to=message)
        )
    log = OutboundLog(recorded.data / NAMES[1] / NAME)
    before = len(log.read().entries)
    with mock.patch.dict(os.environ, {SIMULATION: "1"}):
        assert not gate(copy.deepcopy(message), context).has_error()
        refusal = with_require_secure(1, gate)(message, context)
    step = "applying its require-secure"
    assert str(refusal.error.reason).startswith(f"hospital: ConfigError while {step}")
    # the reply without the rule; the refusal is in the node's own folder
    assert len(log.read().entries) == before + 1


@pytest.mark.parametrize(
    ("node", "text"),
    [
        ({"require-secure": "yes"}, "give true or false"),
        ({"require-secure": 1}, "give true or false"),
        ({"require-secure": "true"}, "no secure aggregation"),
        ({"require_secure": True}, "it is written require-secure"),
        ({"Require-Secure": False}, "it is written require-secure"),
    ],
)
def test_ambiguous_require_secure_is_refused(
    tmp_path: Path, node: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        apply_policy(TrainRequest(tiny(tmp_path), "e", "run"), node)
    apply_policy(TrainRequest(tiny(tmp_path), "e", "run"), {"require-secure": False})
    apply_policy(
        TrainRequest(tiny(tmp_path, "federation.secure=true"), "e", "run"),
        {"require-secure": "True"},
    )


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["federation.strategy=fedmedian"], "choose fedavg or fedprox"),
        (["federation.wire=fp16"], "leave federation.wire = 'fp32'"),
        (["privacy.client_level=server"], "choose one of the two"),
        (["federation.hospitals=2"], "among 3 or more"),
        (["federation.hospitals=4", "federation.min_hospitals=2"], "is no majority"),
    ],
)
def test_secure_refuses_settings_that_need_single_updates(
    tmp_path: Path, overrides: list[str], text: str
) -> None:
    settings = tiny(tmp_path, "federation.secure=true", *overrides)
    with pytest.raises(ConfigError, match=text):
        check_compatibility(settings)


def test_secure_accepts_compatible_settings(tmp_path: Path) -> None:
    for overrides in (
        [],
        ["federation.min_hospitals=2"],
        ["federation.strategy=fedprox", "training.proximal_mu=0.1"],
    ):
        settings: Settings = tiny(tmp_path, "federation.secure=true", *overrides)
        check_compatibility(settings)
        assert reason_to_end(settings, []) == ""
        assert "federation.secure needs 3 hospitals" in reason_to_end(settings, ["alpha"])
    assert not tiny(tmp_path).federation.secure
