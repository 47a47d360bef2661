"""Secure aggregation: the mean is FedAvg's, one hospital's change is not to be seen, and who is lost is named."""

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
from client.hospital import SIMULATION, TrainRequest, check_secure
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
Answer = Callable[[Message, Context], Message]
Fault = Callable[[int, Message], Message | None]


def stage_of(message: Message) -> str:
    """Which message of the protocol it is; '' for any other."""
    return str((message.content.config_records.get(RECORD_KEY_CONFIGS) or {}).get(Key.STAGE, ""))


def lose(number: int, stage: str) -> Fault:
    """A hospital whose process dies when it is asked this."""
    return lambda who, message: (
        error_reply(message, "gone", 8) if (who, stage_of(message)) == (number, stage) else None
    )


class Tried:
    """A federation that was trained, with all that the server got and said."""

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        hospitals: int = 3,
        rounds: int = 1,
        answer: Answer = app,
        fault: Fault | None = None,
    ) -> None:
        self.data = write_shards(folder / "data", SIZES[:hospitals])
        self.settings = tiny(
            self.data, *overrides, hospitals=hospitals, rounds=rounds, kimg=0.04 * rounds
        )
        self.run = RunFolder.at(folder / "run")
        prepare_run(self.settings, self.run)
        self.replies: list[tuple[int, str, Message]] = []
        self.said: list[dict[str, Any]] = []
        self.grid = LocalGrid(
            hospitals, lambda message, context: self._keep(answer, message, context), fault
        )  # type: ignore[arg-type]

    def _keep(self, answer: Answer, message: Message, context: Context) -> Message:
        stage = stage_of(message)
        with mock.patch.object(
            TaskIdentity, "_run_id", None
        ):  # a simulated hospital has none, and can only answer
            reply = answer(message, context)
        self.replies.append((int(context.node_config["partition-id"]), stage, copy.deepcopy(reply)))
        return reply

    def train(self) -> Tried:
        Federation(
            self.run.settings(), self.run, experiment_of(self.run), NoEvaluator(), self.said.append
        ).train(self.grid)  # type: ignore[arg-type]
        return self

    def model(self, round_number: int = 1) -> dict[str, np.ndarray]:
        tensors, _ = load_tensors(self.run.checkpoint(round_number))
        return {key: tensor.numpy() for key, tensor in tensors.items() if key.startswith(PARTS)}

    def change(self, number: int) -> dict[str, np.ndarray]:
        """What this hospital changed in round 1, from its own disk."""
        state, _ = load_tensors(self.run.hospital_state(NAMES[number]) / "state-00001.safetensors")
        return {key: state[key].numpy() - array for key, array in self.model(0).items()}

    def masked(self, number: int) -> dict[str, np.ndarray]:
        """What the server got of this hospital's change."""
        (reply,) = [
            r
            for who, stage, r in self.replies
            if (who, stage) == (number, Stage.COLLECT_MASKED_VECTORS)
        ]
        return {key: array.numpy() for key, array in reply.content.array_records["masked"].items()}

    @property
    def remarks(self) -> str:
        return "\n".join(event["text"] for event in self.said if event["event"] == "note")


def assert_same(
    got: dict[str, np.ndarray], expected: dict[str, np.ndarray], limit: float = 2e-6
) -> None:
    """Equal to `limit` of each array's largest number, and to 1e-4 in all."""
    assert set(got) == set(expected)
    for key, array in expected.items():
        assert got[key].dtype == np.float32
        error = float(np.abs(got[key] - array).max())
        assert error < 1e-4, key
        assert error <= limit * max(1.0, float(np.abs(array).max())), key


# --- the numbers -------------------------------------------------------------------------------------


@given(st.integers(3, 40), st.floats(0.001, 300), st.floats(1e-4, 1), st.integers(0, 99))
def test_scaled_changes_of_any_weights_come_back_as_their_mean(
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
        wanted = array + np.mean([change[key].astype(np.float64) for change in changes], axis=0)
        assert np.abs(model[key] - wanted).max() <= spans[key] / fine + 1e-7 * np.abs(wanted).max()


def test_a_number_beyond_its_range_is_cut_off_and_counted() -> None:
    master = {"w": np.array([100.0, 1.0], np.float32)}
    spans = ranges(master, 2.0)
    assert spans == {"w": 256.0}
    scaled, clipped = scale({"w": np.array([1.0, 300.0], np.float32)}, spans)
    assert clipped == 1
    assert scaled[0].tolist() == [1 / 256, 1.0]
    model, told = apply_mean(master, scaled, spans)
    assert model["w"].tolist() == [101.0, 257.0]
    assert told == 1


@pytest.mark.parametrize("largest", [4.0, 4.0001, 127.99, 128.0, 128.01, 1e30])
def test_a_range_is_a_power_of_two_not_below_the_largest_number(largest: float) -> None:
    span = ranges({"w": np.array([-largest, 0.5], np.float32)}, 1.0)["w"]
    assert span >= np.float32(largest) > span / 2
    assert np.log2(span) == int(np.log2(span))


def test_a_change_that_is_not_finite_is_not_masked() -> None:
    with pytest.raises(FederationError, match="'w' is not finite"):
        scale({"w": np.array([np.nan], np.float32)}, {"w": 1.0})


def test_masks_are_uniform_numbers_that_take_all_of_the_secret() -> None:
    one, other = (
        mask_numbers(bytes(30) + end, MODULUS, [(1,), (50, 1000)]) for end in (b"ab", b"ba")
    )
    assert [array.shape for array in one] == [(1,), (50, 1000)]
    assert np.array_equal(one[1], mask_numbers(bytes(30) + b"ab", MODULUS, [(1,), (50, 1000)])[1])
    assert one[0] != one[1][0, 0]
    # Flower folds a seed to 32 bits by XOR of its words: these two would give the same mask
    folded = [
        mask_numbers(b"abcd" + rest, MODULUS, [(1000,)])[0]
        for rest in (b"abcd" + bytes(4), bytes(4) + b"abcd")
    ]
    assert not np.array_equal(*folded)
    for array in (one[1], other[1], (one[1] - other[1]) % MODULUS):
        assert abs(array.mean() / MODULUS - 0.5) < 0.01
        assert 0.99 < np.histogram(array, 16, (0, MODULUS))[0].max() / (array.size / 16) < 1.1


# --- rounds ------------------------------------------------------------------------------------------


def test_a_secure_run_is_fedavg_large_weights_included(tmp_path: Path) -> None:
    plain = Tried(tmp_path / "plain", rounds=2).train()
    secure = Tried(tmp_path / "secure", "federation.secure=true", rounds=2).train()
    assert_same(secure.model(1), plain.model(1))
    assert_same(
        secure.model(2), plain.model(2), 1e-4
    )  # two trainings from models that differ in the last bit
    assert max(array.std() for array in plain.model(0).values()) > 70
    assert any(np.abs(change).max() > 1e-3 for change in plain.change(0).values())
    lines = [run.run.metrics.read_text().count("\n") for run in (plain, secure)]
    assert lines == [2, 2]
    assert "max_update_ratio = 10 cannot check" in secure.remarks


@pytest.mark.parametrize("rule", ["equal", "sum", "damped", "damped federation.local_images=equal"])
def test_changes_that_weigh_alike_are_averaged_or_summed_under_the_mask(
    rule: str, tmp_path: Path
) -> None:
    words = (*f"federation.weights={rule}".split(), "federation.exchange=generator,discriminator")
    plain = Tried(tmp_path / "plain", *words).train().model()
    secure = Tried(tmp_path / "secure", *words, "federation.secure=true").train().model()
    averages = [
        key for key in plain if key.endswith("w_avg")
    ]  # of those that weigh alike under the mask, by size in clear
    assert averages
    assert_same(
        *(
            {key: array for key, array in model.items() if key not in averages}
            for model in (secure, plain)
        )
    )


@pytest.mark.parametrize("rule", ["sum", "damped"])
def test_a_sum_is_of_those_that_counted(rule: str, tmp_path: Path) -> None:
    """Lost while it trains: its masks come off, and the others' changes are summed."""
    words = (
        f"federation.weights={rule}",
        "federation.exchange=generator,discriminator",
        "federation.secure=true",
    )
    fault = lose(3, Stage.COLLECT_MASKED_VECTORS)
    tried = Tried(tmp_path, *words, "federation.min_hospitals=3", hospitals=4, fault=fault).train()
    changes = [tried.change(number) for number in range(3)]
    factor = 1 if rule == "sum" else math.hypot(*SIZES[:3]) / sum(SIZES[:3])
    for key, before in tried.model(0).items():
        if not key.startswith("ema/") and not key.endswith("w_avg"):
            expected = before + factor * sum(change[key] for change in changes)
            np.testing.assert_allclose(tried.model()[key], expected, atol=1e-4, rtol=1e-5)


def test_a_plan_in_which_two_would_train_alone_is_refused(tmp_path: Path) -> None:
    """The smallest shows no image in some rounds; each of the other two would learn the other's change."""
    tried = Tried(tmp_path, "federation.secure=true", "training.kimg=0.048", rounds=4)
    with pytest.raises(ConfigError, match=r"2 hospitals train.*lower federation\.rounds"):
        tried.train()


def correlation(tried: Tried, number: int) -> float:
    """Between what the server got of a hospital and what it changed, over all numbers that changed much enough to be seen."""
    masked, change = tried.masked(number), tried.change(number)
    spans = ranges(tried.model(0), tried.settings.federation.secure_range)
    fine, share = levels(3), SIZES[number] / SIZES[0]
    got = np.concatenate(
        [(masked[key].ravel() / fine * 2 - 1) * spans[key] / share for key in change]
    )
    true = np.concatenate([change[key].ravel() for key in change])
    return float(np.corrcoef(got, true)[0, 1])


def test_what_the_server_gets_of_a_hospital_says_nothing_of_its_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = Tried(tmp_path / "masked", "federation.secure=true").train()
    size = sum(array.size for array in tried.model(0).values())
    for number in range(3):
        assert abs(correlation(tried, number)) < 5 / np.sqrt(size)
        arrived = np.concatenate([array.ravel() for array in tried.masked(number).values()])
        assert abs(arrived.mean() / MODULUS - 0.5) < 0.05
        (reply,) = [
            r
            for who, stage, r in tried.replies
            if who == number and stage == Stage.COLLECT_MASKED_VECTORS
        ]
        assert set(reply.content) == {"masked", "metrics", "facts"}

    # the same figure without masks: it would be seen
    def no_masks(seed: bytes, num_range: int, shapes: Any) -> list[np.ndarray]:
        return [np.zeros(shape, np.int64) for shape in shapes]

    for end in (client.secure._flower, server.aggregation.secure._flower):
        monkeypatch.setattr(end, "pseudo_rand_gen", no_masks)
    bare = Tried(tmp_path / "bare", "federation.secure=true").train()
    assert all(correlation(bare, number) > 0.9 for number in range(3))


def test_a_hospital_lost_while_it_trains_is_left_out_of_the_mean(tmp_path: Path) -> None:
    def at_training(who: int, message: Message) -> Message | None:
        return (
            error_reply(message, "gone", 8)
            if who == 1 and message.metadata.message_type == "train"
            else None
        )

    plain = Tried(tmp_path / "plain", "federation.min_hospitals=2", fault=at_training).train()
    secure = Tried(
        tmp_path / "secure",
        "federation.secure=true",
        "federation.min_hospitals=2",
        fault=lose(1, Stage.COLLECT_MASKED_VECTORS),
    ).train()
    assert_same(secure.model(), plain.model())
    assert "hospital 2 ('beta') failed in round 1: its process died" in secure.remarks


def test_a_hospital_lost_after_it_has_answered_still_counts(tmp_path: Path) -> None:
    plain = Tried(tmp_path / "plain").train()
    secure = Tried(
        tmp_path / "secure",
        "federation.secure=true",
        "federation.min_hospitals=2",
        fault=lose(2, Stage.UNMASK),
    ).train()
    assert_same(secure.model(), plain.model())


@pytest.mark.parametrize("stage", [Stage.SETUP, Stage.SHARE_KEYS])
def test_a_hospital_lost_before_the_masks_are_agreed_on_ends_a_round_of_three(
    tmp_path: Path, stage: str
) -> None:
    tried = Tried(
        tmp_path, "federation.secure=true", "federation.min_hospitals=2", fault=lose(1, stage)
    )
    with pytest.raises(
        FederationError,
        match=r"hospital 2 \('beta'\) failed in round 1: its process died.*during the agreement on masks",
    ):
        tried.train()
    assert not tried.run.checkpoint(1).exists()
    assert not any(
        stage == Stage.COLLECT_MASKED_VECTORS for _, stage, _ in tried.replies
    )  # nobody trained for nothing


@pytest.mark.parametrize("stage", [Stage.SETUP, Stage.SHARE_KEYS])
def test_of_four_the_other_three_agree_anew(tmp_path: Path, stage: str) -> None:
    more = ("federation.secure=true", "federation.min_hospitals=3")
    secure = Tried(tmp_path / "secure", *more, hospitals=4, fault=lose(3, stage)).train()
    plain = Tried(
        tmp_path / "plain",
        more[1],
        hospitals=4,
        fault=lambda who, m: lose(3, "")(who, m) if m.metadata.message_type == "train" else None,
    ).train()
    assert_same(secure.model(), plain.model())
    assert "hospital 4 ('delta') failed in round 1" in secure.remarks


def test_a_round_of_two_is_not_begun(tmp_path: Path) -> None:
    tried = Tried(
        tmp_path,
        "federation.secure=true",
        "federation.min_hospitals=2",
        "federation.join_timeout=1",
    )
    del tried.grid.nodes[998]
    with pytest.raises(FederationError, match="needs 3 hospitals, and 2 have joined"):
        tried.train()
    assert all(not stage for _, stage, _ in tried.replies)


def test_too_few_left_to_unmask_is_an_error_that_names_who_is_missing(tmp_path: Path) -> None:
    tried = Tried(tmp_path, "federation.secure=true", fault=lose(0, Stage.UNMASK))
    with pytest.raises(
        FederationError, match=r"cannot be read.*hospital 1 \('alpha'\): its process died"
    ):
        tried.train()
    assert not tried.run.checkpoint(1).exists()


def tamper(number: int, stage: str, change: Callable[[RecordDict], None]) -> Answer:
    """A hospital that changes what leaves it in this message."""

    def answer(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if (context.node_config["partition-id"], stage_of(message)) == (number, stage):
            change(reply.content)
        return reply

    return answer


def other_dtype(content: RecordDict) -> None:
    masked = content.array_records["masked"]
    content["masked"] = ArrayRecord(
        {key: Array(array.numpy().astype(np.int64)) for key, array in masked.items()}
    )


@pytest.mark.parametrize(
    ("change", "words"),
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
def test_an_answer_that_must_not_count_is_left_out_before_the_sum(
    tmp_path: Path, change: Any, words: str
) -> None:
    more = ("federation.secure=true", "federation.min_hospitals=2")
    tried = Tried(tmp_path, *more, answer=tamper(0, Stage.COLLECT_MASKED_VECTORS, change)).train()
    assert (
        f"in round 1 hospital 1 ('alpha') {'replied' if 'masked' in words else words.split()[0]}"
        in tried.remarks
    )
    assert words in tried.remarks
    weights = [SIZES[1], SIZES[2]]
    for key, array in tried.model(0).items():
        mean = np.average([tried.change(number)[key] for number in (1, 2)], axis=0, weights=weights)
        assert np.allclose(tried.model()[key] - array, mean, atol=1e-4)


def swap_shares(content: RecordDict) -> None:
    keys = content.config_records["keys"]
    keys["shares"] = list(reversed(keys["shares"]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "change", "words"),
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
def test_words_that_do_not_fit_the_protocol_end_the_round_and_not_the_server(
    tmp_path: Path, stage: str, change: Any, words: str
) -> None:
    tried = Tried(tmp_path, "federation.secure=true", answer=tamper(0, stage, change))
    with pytest.raises(FederationError, match=words):
        tried.train()
    assert not tried.run.checkpoint(1).exists()


def test_a_sum_with_a_mask_still_on_it_is_no_model() -> None:
    check_mean([np.array([1.0, -1.0]), np.zeros(0)])
    for wrong in (np.array([0.0, 1.1]), np.array([np.inf]), np.array([np.nan])):
        with pytest.raises(FederationError, match="out of range"):
            check_mean([np.zeros(2), wrong])


def test_a_hospital_that_was_allowed_no_step_is_not_summed(tmp_path: Path) -> None:
    def spent(content: RecordDict) -> None:
        content.config_records["facts"].update({"images": 0.0, "exhausted": 1.0})

    more = ("federation.secure=true", "federation.min_hospitals=2")
    tried = Tried(
        tmp_path / "two", *more, answer=tamper(2, Stage.COLLECT_MASKED_VECTORS, spent)
    ).train()
    for key, array in tried.model(0).items():
        mean = np.average(
            [tried.change(number)[key] for number in (0, 1)], axis=0, weights=[SIZES[0], SIZES[1]]
        )
        assert np.allclose(tried.model()[key] - array, mean, atol=1e-4)
    # where the sum takes all three, there is none: a round that changes nothing, and the run is over
    tried = Tried(
        tmp_path / "all", more[0], answer=tamper(2, Stage.COLLECT_MASKED_VECTORS, spent), rounds=2
    ).train()
    assert_same(tried.model(1), tried.model(0), 0.0)
    assert "federation.secure needs 3 hospitals, and 2 are left" in tried.run.metrics.read_text()


def test_numbers_that_were_cut_off_are_told_as_a_sum_and_in_the_hospital_s_own_log(
    tmp_path: Path,
) -> None:
    tried = Tried(tmp_path, "federation.secure=true", "federation.secure_range=0.001").train()
    assert "numbers of a hospital's change were clipped" in tried.remarks
    logs = [path.read_text() for path in tmp_path.rglob("client.log")]
    assert any("numbers changed by more than federation.secure_range" in text for text in logs)


# --- what leaves -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Message]:
    """The four questions of a round as hospital 0 got them, and where its shard lies."""
    found: dict[str, Message] = {}

    def keep(who: int, message: Message) -> None:
        if who == 0:
            found[stage_of(message)] = copy.deepcopy(message)

    Tried(tmp_path_factory.mktemp("asked"), "federation.secure=true", fault=keep).train()
    return found


def test_the_outbound_log_has_the_four_messages_of_a_round(
    asked: dict[str, Message], tmp_path: Path
) -> None:
    tried = Tried(tmp_path, "federation.secure=true").train()
    entries = OutboundLog(tried.data / "alpha" / NAME).read().entries
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
    (reply,) = [r for who, stage, r in tried.replies if (who, stage) == (0, Stage.SETUP)]
    assert public["values"].keys() == {"pk1", "pk2"}
    assert public["bytes"] > sum(len(key) for key in reply.content.config_records["keys"].values())  # type: ignore[arg-type]
    assert "PUBLIC KEY" not in str(entries[1])


def let_answer(message: Message, monkeypatch: pytest.MonkeyPatch, said: RecordDict) -> str:
    """What leaves where Flower's mod, or anything else behind the gate, makes this answer."""
    monkeypatch.setattr(
        "client.secure.secaggplus_mod", lambda inner, context, train: Message(said, reply_to=inner)
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
def test_what_is_not_listed_for_a_message_does_not_leave(
    asked: dict[str, Message], monkeypatch: pytest.MonkeyPatch, stage: str, values: Any, what: str
) -> None:
    said = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(values)})
    assert let_answer(asked[stage], monkeypatch, said) == f"hospital: refused to send {what}"


def test_a_model_in_clear_does_not_leave_in_a_secure_round(
    asked: dict[str, Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = asked[Stage.COLLECT_MASKED_VECTORS]
    monkeypatch.setattr(
        "client.secure._masked",
        lambda said, question: ArrayRecord({"ema/x": Array(np.zeros(1, np.float32))}),
    )
    said = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord({})})
    assert (
        let_answer(message, monkeypatch, said)
        == "hospital: refused to send an array that is not listed"
    )
    monkeypatch.setattr("client.secure.MASKED", "arrays")
    monkeypatch.setattr(
        "client.secure._masked", lambda said, question: question.content.array_records["arrays"]
    )
    assert (
        let_answer(message, monkeypatch, said)
        == "hospital: refused to send a record that is not listed"
    )


def test_a_round_that_is_not_the_protocol_s_has_no_answer(
    asked: dict[str, Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = copy.deepcopy(asked[Stage.COLLECT_MASKED_VECTORS])
    del message.content[RECORD_KEY_CONFIGS]
    assert let_answer(message, monkeypatch, RecordDict()).startswith(
        "hospital: KeyError while replying"
    )


NUMBERS = {Key.CLIPPING_RANGE: 1.0, Key.TARGET_RANGE: levels(3), Key.MOD_RANGE: MODULUS}
SETUP = {Key.SAMPLE_NUMBER: 3, Key.SHARE_NUMBER: 3, Key.THRESHOLD: 2, **NUMBERS}
UNMASK = {Key.ACTIVE_NODE_ID_LIST: [1, 2], Key.DEAD_NODE_ID_LIST: [3]}


@pytest.mark.parametrize(
    ("stage", "question"),
    [
        (Stage.SETUP, SETUP | {Key.SAMPLE_NUMBER: 2, Key.SHARE_NUMBER: 2}),
        (Stage.SETUP, SETUP | {Key.THRESHOLD: 1}),
        (Stage.SETUP, SETUP | {Key.TARGET_RANGE: 2}),
        (Stage.SETUP, SETUP | {Key.CLIPPING_RANGE: 8.0}),
        (Stage.SHARE_KEYS, {"1": [b"", b""], "2": [b"", b""], Key.STAGE: "share_keys"}),
        (Stage.UNMASK, UNMASK | {Key.DEAD_NODE_ID_LIST: [2, 3]}),  # both secrets of 2
        (
            Stage.UNMASK,
            {Key.ACTIVE_NODE_ID_LIST: [2, 3], Key.DEAD_NODE_ID_LIST: [1]},
        ),  # its own first key
    ],
)
def test_a_hospital_refuses_questions_that_would_show_it(stage: str, question: Any) -> None:
    check_request(Stage.SETUP, SETUP, 1)
    check_request(Stage.UNMASK, UNMASK, 1)
    with pytest.raises(ConfigError, match="the server"):
        check_request(stage, question, 1)


def test_secrets_are_forgotten_with_the_round(tmp_path: Path) -> None:
    tried = Tried(tmp_path, "federation.secure=true").train()
    assert all(not state for state in tried.grid.states.values())


# --- a hospital that insists -------------------------------------------------------------------------


def insisting(number: int, gate: Answer = app) -> Answer:
    """Hospitals, of whom this one's node-config says require-secure = true."""

    def answer(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == number:
            context.node_config["require-secure"] = True
        return gate(message, context)

    return answer


def test_a_hospital_that_insists_takes_part_in_a_secure_run(tmp_path: Path) -> None:
    tried = Tried(tmp_path, "federation.secure=true", answer=insisting(0)).train()
    assert not any(reply.has_error() for _, _, reply in tried.replies)


def test_a_hospital_that_insists_tells_a_run_in_clear_one_reason_and_nothing_else(
    tmp_path: Path,
) -> None:
    tried = Tried(tmp_path, answer=insisting(1))
    with pytest.raises(FederationError, match="ConfigError while applying its require-secure"):
        tried.train()
    (reply,) = [reply for who, _, reply in tried.replies if who == 1]
    assert reply.has_error()
    (log,) = tried.run.path.glob("hospitals/*/client.log")
    assert "require-secure = true, and the run has no secure aggregation" in log.read_text()


@pytest.mark.parametrize(
    "gate", [app, OutboundGate()], ids=["this app", "a handler that does not ask"]
)
def test_no_round_in_clear_leaves_a_hospital_that_insists(
    tmp_path: Path, gate: OutboundGate
) -> None:
    """Also where the server's first question was about a secure run, and where only the gate holds the rule."""
    handed: list[tuple[Message, Context]] = []

    def keep(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1 and message.metadata.message_type == "train":
            handed.append((copy.deepcopy(message), context))
        return app(message, context)

    tried = Tried(tmp_path, answer=keep).train()
    ((message, context),) = handed
    honest = next(
        reply for who, _, reply in tried.replies if who == 1 and "arrays" in reply.content
    )
    if gate is not app:
        gate.train()(
            lambda message, context: Message(copy.deepcopy(honest.content), reply_to=message)
        )
    log = OutboundLog(tried.data / NAMES[1] / NAME)
    before = len(log.read().entries)
    with mock.patch.dict(os.environ, {SIMULATION: "1"}):
        assert not gate(copy.deepcopy(message), context).has_error()
        refusal = insisting(1, gate)(message, context)
    doing = "applying its require-secure" if gate is app else "checking the reply"
    assert str(refusal.error.reason).startswith(f"hospital: ConfigError while {doing}")
    assert (
        len(log.read().entries) == before + 1
    )  # the answer that left without the rule; the refusal is in the node's own folder


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"require-secure": "yes"}, "give true or false"),
        ({"require-secure": 1}, "give true or false"),
        ({"require-secure": "true"}, "no secure aggregation"),
        ({"require_secure": True}, "it is written require-secure"),
        ({"Require-Secure": False}, "it is written require-secure"),
    ],
)
def test_a_rule_that_could_be_misread_refuses(
    tmp_path: Path, node: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_secure(TrainRequest(tiny(tmp_path), "e", "run"), node)
    check_secure(TrainRequest(tiny(tmp_path), "e", "run"), {"require-secure": False})
    check_secure(
        TrainRequest(tiny(tmp_path, "federation.secure=true"), "e", "run"),
        {"require-secure": "True"},
    )


# --- settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["federation.strategy=fedmedian"], "choose fedavg or fedprox"),
        (["federation.wire=fp16"], "leave federation.wire = 'fp32'"),
        (["privacy.client_level=server"], "choose one of the two"),
        (["federation.hospitals=2"], "among 3 or more"),
        (["federation.hospitals=4", "federation.min_hospitals=2"], "is no majority"),
    ],
)
def test_settings_that_need_single_updates_are_refused(
    tmp_path: Path, overrides: list[str], words: str
) -> None:
    settings = tiny(tmp_path, "federation.secure=true", *overrides)
    with pytest.raises(ConfigError, match=words):
        check_compatibility(settings)


def test_what_secure_aggregation_can_serve_is_taken(tmp_path: Path) -> None:
    for more in (
        [],
        ["federation.min_hospitals=2"],
        ["federation.strategy=fedprox", "training.proximal_mu=0.1"],
    ):
        settings: Settings = tiny(tmp_path, "federation.secure=true", *more)
        check_compatibility(settings)
        assert reason_to_end(settings, []) == ""
        assert "federation.secure needs 3 hospitals" in reason_to_end(settings, ["alpha"])
    assert not tiny(tmp_path).federation.secure
