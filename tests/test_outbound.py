"""Nothing leaves a hospital but what is listed, and nothing before its line is in the outbound log."""

from __future__ import annotations

import ast
import copy
import dataclasses
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from small_federation import LocalGrid, NoEvaluator, federate, tiny, write_shards

from client import error_messages as reasons
from client import hospital as site
from client.allow_list import INTRODUCTION, MEANINGS, _checked_arrays, model_arrays, rows
from client.app import RequestContext, app
from client.error_messages import DOING, REASON, reason
from client.gate import Gate
from client.hospital import SIMULATION, find_local_hospital
from client.sent import OPEN
from fedgan.config import Settings, from_dict, to_dict
from fedgan.errors import ConfigError, DataError, FederationError
from fedgan.exchange import outbound_log as outbound
from fedgan.exchange.outbound_log import NAME, Entry, OutboundLog, values_record
from fedgan.privacy.validator import check_private
from fedgan.run_folder import RunFolder
from fedgan.runs.preparation import experiment_of, prepare_run
from fedgan.training.trainer import Trainer
from server.federation import Federation
from server.roster import introduce

ROOT = Path(__file__).resolve().parent.parent
PRIVATELY = (
    "privacy.noise_multiplier=1",
    "model.minibatch_std_group=0",
    "augment.mode=fixed",
    "training.r1_gamma=0",
)


# --- one message at one hospital ---------------------------------------------------------------------


class Place:
    """A hospital on a disk, and the questions that a server has asked it."""

    def __init__(self, path: Path) -> None:
        self.data = write_shards(path / "data", (40, 16))
        self.settings = tiny(self.data, hospitals=2, rounds=1, kimg=0.016)
        self.run = RunFolder.at(path / "run")
        prepare_run(self.settings, self.run)
        self.arrived: list[Message] = []

        def keep(number: int, message: Message) -> None:
            if number == 0:
                self.arrived.append(copy.deepcopy(message))

        federation = Federation(
            self.run.settings(), self.run, experiment_of(self.run), NoEvaluator()
        )
        federation.train(LocalGrid(2, app, keep))  # type: ignore[arg-type]
        self.log = OutboundLog(self.data / "alpha" / NAME)
        self.client_log = self.run.hospital_state("alpha") / "client.log"

    def question(self, kind: str, *overrides: str) -> Message:
        """What the server asked the hospital, with other settings."""
        (message,) = [
            copy.deepcopy(each) for each in self.arrived if each.metadata.message_type == kind
        ]
        config = message.content.config_records["config"]
        config["settings"] = json.dumps(
            to_dict(from_dict(json.loads(str(config["settings"])), overrides))
        )
        return message

    def honest(self, kind: str, message: Message) -> RecordDict:
        """An answer that may leave."""
        if kind == "query.hello":
            facts = {
                "number": 0,
                "name": "alpha",
                "images": 20,
                "label_names": ["dark", "bright"],
                "exclusive": True,
            }
            return RecordDict(
                {
                    "hospital": ConfigRecord(
                        facts | {"channels": 1, "resolution": 16, "phantoms": False}
                    )
                }  # type: ignore[dict-item]
            )
        arrays = {
            key: Array(array.numpy() + 1)
            for key, array in message.content.array_records["arrays"].items()
        }
        facts = {"images": 8.0, "images_seen": 8, "threads": 1, "loss_g": 0.5, "p": 0.2}
        return RecordDict(
            {
                "arrays": ArrayRecord(arrays),
                "metrics": MetricRecord({"num_examples": 20}),
                "facts": ConfigRecord(facts),  # type: ignore[arg-type]
            }
        )

    def answer(
        self,
        kind: str,
        tamper: Callable[[RecordDict], Any],
        *overrides: str,
        node: dict[str, Any] | None = None,
        mod: bool = False,
    ) -> Message:
        """What leaves when a handler, or a mod round it, answers what `tamper` made of an honest answer."""
        message, gate = self.question(kind, *overrides), Gate()

        def make(message: Message, context: Context) -> Message:
            content = self.honest(kind, message)
            return (
                made
                if isinstance(made := tamper(content), Message)
                else Message(content, reply_to=message)
            )

        def honestly(message: Message, context: Context) -> Message:
            return Message(self.honest(kind, message), reply_to=message)

        mods = (
            [
                lambda message, context, call_next: make(
                    call_next(message, context) and message, context
                )
            ]
            if mod
            else []
        )
        register = (
            gate.query("hello", mods=mods) if kind == "query.hello" else gate.train(mods=mods)
        )
        register(honestly if mod else make)
        return send(gate, message, node)


def send(gate: Any, message: Message, node: dict[str, Any] | None = None) -> Message:
    """Let the app of hospital 0 answer."""
    config = {"partition-id": 0} if node is None else node
    context = Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})
    with mock.patch.dict(os.environ, {SIMULATION: "1"}):
        found: Message = gate(message=message, context=context)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


def add_array(content: RecordDict, name: str, array: Array) -> None:
    content.array_records["arrays"][name] = array


def some_array(content: RecordDict) -> str:
    return next(
        name for name, array in content.array_records["arrays"].items() if array.numpy().ndim > 1
    )


def replace(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[RecordDict], None]:
    def tamper(content: RecordDict) -> None:
        name = some_array(content)
        add_array(content, name, Array(change(content.array_records["arrays"][name].numpy())))

    return tamper


def put(record: str, key: str, value: Any) -> Callable[[RecordDict], None]:
    return lambda content: content[record].__setitem__(key, value)


def records(**more: Any) -> Callable[[RecordDict], None]:
    return lambda content: (
        [content.__setitem__(name, record) for name, record in more.items()] and None
    )


SECRET = "patient-0017"
IMAGE = Array(np.zeros((1, 16, 16), np.float32))


@pytest.mark.parametrize("mod", [False, True], ids=["handler", "mod"])
@pytest.mark.parametrize(
    ("kind", "tamper", "what"),
    [
        (
            "train",
            lambda content: add_array(content, "generator/patient-0017", IMAGE),
            reasons.ARRAY,
        ),
        ("train", lambda content: add_array(content, "images", IMAGE), reasons.ARRAY),
        ("train", replace(lambda values: values[:1]), reasons.SHAPE),
        (
            "train",
            replace(
                lambda values: values.T.copy() if values.shape != values.T.shape else values[None]
            ),
            reasons.SHAPE,
        ),
        ("train", replace(lambda values: values.astype(np.float64)), reasons.SHAPE),
        (
            "train",
            lambda content: add_array(
                content, some_array(content), Array("float32", (1,), "p0017", b"p")
            ),
            reasons.SHAPE,
        ),
        ("train", put("facts", "age", 61.0), reasons.VALUE),
        ("train", put("facts", "note", SECRET), reasons.VALUE),
        ("train", put("facts", "loss_g", SECRET), reasons.TYPE),
        ("train", put("facts", "loss_g", [1.0, 2.0]), reasons.TYPE),
        ("train", put("facts", "loss_g", SECRET.encode()), reasons.TYPE),
        ("train", put("facts", "threads", True), reasons.TYPE),
        ("train", put("metrics", "age", 61), reasons.VALUE),
        ("train", put("metrics", "num_examples", [1, 2]), reasons.TYPE),
        ("train", records(images=ArrayRecord({"x": IMAGE})), reasons.RECORD),
        ("train", records(facts=ArrayRecord({"x": IMAGE})), reasons.RECORD),
        ("train", records(hospital=ConfigRecord({"name": "alpha"})), reasons.RECORD),
        ("query.hello", put("hospital", "name", SECRET), reasons.FOREIGN),
        ("query.hello", put("hospital", "label_names", ["dark", SECRET]), reasons.FOREIGN),
        ("query.hello", put("hospital", "images", 20.0), reasons.FOREIGN),
        ("query.hello", put("hospital", "label_counts", [10, 10]), reasons.VALUE),
        ("query.hello", put("hospital", "units", 20), reasons.VALUE),
        ("query.hello", put("hospital", "note", SECRET), reasons.VALUE),
        ("query.hello", records(arrays=ArrayRecord({"x": IMAGE})), reasons.RECORD),
    ],
)
def test_what_is_not_listed_does_not_leave(
    place: Place, kind: str, tamper: Callable[[RecordDict], None], what: str, mod: bool
) -> None:
    place.client_log.unlink(missing_ok=True)
    reply = place.answer(kind, tamper, mod=mod)
    assert reply.has_error()
    assert reply.error.reason == f"hospital: refused to send {what}"
    assert (
        f"refused to send {what}: " in place.client_log.read_text()
    )  # with the name of what it was
    last = place.log.read().entries[-1]
    assert [record["values"] for record in last.records] == [
        {"code": 2, "reason": reply.error.reason}
    ]


@pytest.mark.parametrize("kind", ["query.hello", "train"])
def test_an_honest_answer_leaves_as_it_is(place: Place, kind: str) -> None:
    reply = place.answer(kind, lambda content: None)
    assert not reply.has_error(), reply.error.reason
    honest = place.honest(kind, place.question(kind))
    assert dict(reply.content.config_records) == dict(honest.config_records)
    for name, array in honest.array_records.get("arrays", {}).items():
        assert reply.content.array_records["arrays"][name].data == array.data


@pytest.mark.parametrize(
    ("overrides", "tamper", "what"),
    [
        (
            ("federation.exchange=generator",),
            lambda content: None,
            reasons.ARRAY,
        ),  # D and EMA are there
        (("privacy.noise_multiplier=1",), put("facts", "loss_d", 0.5), reasons.VALUE),
        (("privacy.noise_multiplier=1",), put("facts", "seconds", 0.5), reasons.VALUE),
        (("privacy.noise_multiplier=1",), put("facts", "r_t", 0.5), reasons.VALUE),
        (("privacy.client_level=server",), lambda content: None, reasons.VALUE),  # loss_g is there
    ],
)
def test_what_the_settings_keep_at_home_does_not_leave(
    place: Place, overrides: tuple[str, ...], tamper: Callable[[RecordDict], None], what: str
) -> None:
    assert (
        place.answer("train", tamper, *overrides).error.reason
        == f"hospital: refused to send {what}"
    )


def test_the_signs_of_a_private_training_leave_where_they_have_noise(place: Place) -> None:
    noised = ("privacy.noise_multiplier=1", "privacy.r_t_noise=1")
    assert not place.answer("train", put("facts", "r_t", 0.5), *noised).has_error()


def test_an_array_that_the_server_did_not_send_does_not_leave(place: Place) -> None:
    message, gate = place.question("train"), Gate()
    content = place.honest("train", message)
    del message.content.array_records["arrays"][some_array(content)]
    gate.train()(lambda message, context: Message(content, reply_to=message))
    assert send(gate, message).error.reason == f"hospital: refused to send {reasons.ARRAY}"


def test_bytes_behind_the_numbers_of_an_array_stay_at_home(place: Place) -> None:
    def tamper(content: RecordDict) -> None:
        name = some_array(content)
        array = content.array_records["arrays"][name]
        add_array(
            content, name, Array(SECRET, array.shape, array.stype, array.data + SECRET.encode())
        )

    reply = place.answer("train", tamper)
    arrays = reply.content.array_records["arrays"]
    assert len(arrays) > 10
    assert not any(
        SECRET.encode() in array.data or SECRET in array.dtype for array in arrays.values()
    )


def test_an_array_has_one_hash_however_it_lies_in_memory() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    turned = np.asfortranarray(values)
    found = [
        _checked_arrays(ArrayRecord({"x": Array(each)}), {"x": ("float32", (2, 3))})["x"].data
        for each in (values, turned)
    ]
    assert found[0] == found[1]


def test_a_kind_of_message_that_is_not_listed_has_no_answer(place: Place) -> None:
    message, gate = place.question("query.hello"), Gate()
    message.metadata.message_type = "query.images"
    assert send(gate, message).error.reason == "hospital: ValueError while answering"
    gate.query("images")(
        lambda message, context: Message(
            RecordDict({"x": ArrayRecord({"x": IMAGE})}), reply_to=message
        )
    )
    assert send(gate, message).error.reason == f"hospital: refused to send {reasons.MESSAGE}"


@pytest.mark.parametrize("code", [0, 2, 8])
def test_an_error_in_other_words_is_replaced(place: Place, code: int) -> None:
    def tamper(content: RecordDict) -> Message:
        return Message(
            Error(code, f"hospital: ValueError while reading {SECRET}"),
            reply_to=place.question("train"),
        )

    assert (
        place.answer("train", tamper).error.reason == f"hospital: refused to send {reasons.ERROR}"
    )
    assert SECRET in place.client_log.read_text()


# --- errors ------------------------------------------------------------------------------------------

PATHS = st.text("abcdefghxyz0123456789_-", min_size=4, max_size=12).map(
    lambda word: f"/data/q{word}q/images.npy"
)
IDS = st.integers(10**7, 10**9).map(lambda number: f"PAT-{number}")
VALUES = st.floats(1e6, 1e12).map(repr)
BASES = st.sampled_from(
    [
        Exception,
        OSError,
        ValueError,
        ConfigError,
        DataError,
        StopIteration,
        UnicodeError,
        RecursionError,
    ]
)


@st.composite
def failures(draw: st.DrawFn) -> tuple[Exception, list[str]]:
    """An exception that tells secrets, and the secrets: in its message, and (a class may have any name) in its name."""
    secrets = [draw(PATHS), draw(IDS), draw(VALUES)]
    words = draw(st.permutations(secrets))
    base = draw(BASES)
    kind = draw(st.sampled_from([base, type(f"Bad{secrets[1].replace('-', '')}", (base,), {})]))
    return kind(" ".join(words)), [*secrets, secrets[1].replace("-", "")]


def assert_silent(reply: Message, secrets: list[str]) -> None:
    assert reply.has_error()
    words = str(reply.error.reason)
    assert REASON.fullmatch(words), words
    assert not any(secret in words for secret in secrets), words
    assert not re.search(r"[0-9]{5}|/|\.npy", words)


@given(failures(), st.sampled_from([phrase.replace("N", "3") for phrase in DOING]), st.booleans())
def test_nothing_of_an_exception_leaves_by_a_visit(
    place: Place, failure: tuple[Exception, list[str]], doing: str, leaky: bool
) -> None:
    error, secrets = failure

    def work(visit: RequestContext, *_: object) -> RecordDict:
        visit.doing = f"reading {secrets[0]} of {secrets[1]}" if leaky else doing
        raise error

    message = place.question("train")
    context = Context(
        run_id=1, node_id=1, node_config={"partition-id": 0}, state=RecordDict(), run_config={}
    )
    with mock.patch.dict(os.environ, {SIMULATION: "1"}):
        reply = RequestContext(message, context).answer(work)
    assert_silent(reply, secrets)
    assert leaky or str(reply.error.reason).endswith(doing)


@hypothesis_settings(max_examples=25)
@given(failures(), st.sampled_from(["before", "after", "error", "handler"]))
def test_nothing_of_an_exception_leaves_by_a_mod(
    place: Place, failure: tuple[Exception, list[str]], where: str
) -> None:
    error, secrets = failure
    gate = Gate()

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        if where == "before":
            raise error
        reply: Message = call_next(message, context)
        if where == "after":
            raise error
        return (
            Message(Error(2, f"hospital: {error}"), reply_to=message) if where == "error" else reply
        )

    def train(message: Message, context: Context) -> Message:
        if where == "handler":
            raise error
        return Message(place.honest("train", message), reply_to=message)

    gate.train(mods=[mod])(train)
    assert_silent(send(gate, place.question("train")), secrets)


@pytest.mark.parametrize("number", ["/data/north", "PAT-1", "17; DROP", "12345", None, "1\n"])
def test_a_partition_id_that_is_no_small_number_is_not_told(number: object) -> None:
    assert (
        reason(ValueError(), "opening its shard", number)
        == "hospital: ValueError while opening its shard"
    )
    assert (
        reason(ValueError(), "opening its shard", 7)
        == "hospital: ValueError while opening its shard (partition-id 7)"
    )


def test_every_phrase_that_the_client_uses_is_listed() -> None:
    used = []
    for path in (ROOT / "client").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and any(
                "doing" in ast.unparse(target) for target in node.targets
            ):
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                used += [
                    value for value in values if isinstance(value, ast.Constant | ast.JoinedStr)
                ]
    words = [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "N" for part in value.values)
        if isinstance(value, ast.JoinedStr)
        else str(value.value)
        for value in used
        if not isinstance(value, ast.Constant) or isinstance(value.value, str)
    ]
    assert len(words) > 8
    assert set(words) <= set(DOING)


# --- the log -----------------------------------------------------------------------------------------


def test_the_log_holds_what_the_server_saw_arriving(tmp_path: Path) -> None:
    data, arrived = write_shards(tmp_path / "data", (40, 24, 16)), list[tuple[str, Message]]()
    settings = tiny(data, rounds=2, kimg=0.1)
    run = RunFolder.at(tmp_path / "run")
    prepare_run(settings, run)
    grid = LocalGrid(3, app)
    names = dict(zip(grid.nodes, ("alpha", "beta", "gamma"), strict=True))
    pull = grid.pull_messages

    def see(ids: Any) -> list[Message]:
        found = pull(ids)
        for message in found:
            name = names[message.metadata.src_node_id]
            # it was written before it left
            assert len(OutboundLog(data / name / NAME).read().entries) > sum(
                one == name for one, _ in arrived
            )
            arrived.append((name, message))
        return found

    grid.pull_messages = see  # type: ignore[method-assign]
    Federation(run.settings(), run, experiment_of(run), NoEvaluator()).train(grid)  # type: ignore[arg-type]
    for name in names.values():
        reading = OutboundLog(data / name / NAME).read()
        assert (reading.changed, reading.unfinished) == ([], 0)
        seen = [message for whose, message in arrived if whose == name]
        assert [entry.message for entry in reading.entries] == ["query.hello", "train", "train"]
        assert [entry.round for entry in reading.entries] == [0, 1, 2]
        assert {entry.experiment for entry in reading.entries} == {experiment_of(run)}
        for entry, message in zip(reading.entries, seen, strict=True):
            assert [record["name"] for record in entry.records] == list(message.content)
            assert entry.bytes == sum(record["bytes"] for record in entry.records)
            for record in entry.records:
                found = message.content[record["name"]]
                if record["kind"] == "values":
                    assert record["values"] == dict(found)
                    continue
                for row, (key, array) in zip(record["arrays"], found.items(), strict=True):
                    digest = hashlib.sha256(array.data).hexdigest()
                    assert row == [
                        key,
                        "float32",
                        list(array.numpy().shape),
                        len(array.data),
                        digest,
                    ]
        assert str(tmp_path) not in (data / name / NAME).read_text()


def test_an_answer_whose_line_cannot_be_written_does_not_leave(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for kind in ("query.hello", "train"):
        reply = place.answer(kind, lambda content: None)
        assert reply.error.reason == "hospital: StorageError while writing its outbound log"
        assert "so nothing is sent" in place.client_log.read_text()


def test_a_log_that_is_a_folder_stops_the_federation_by_name(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2, rounds=1, kimg=0.008)
    run = RunFolder.at(tmp_path / "run")
    prepare_run(settings, run)
    (tmp_path / "data" / "beta" / NAME).mkdir()
    with pytest.raises(
        FederationError,
        match="a hospital could not join: StorageError while writing its outbound log",
    ):
        federate(settings, run, app)


def test_a_deployed_hospital_keeps_its_log_in_its_state_dir_and_writes_nothing_beside_its_shard(
    tmp_path: Path,
) -> None:
    settings = tiny(write_shards(tmp_path / "data", (40,)), hospitals=1)
    order = ConfigRecord(
        {"settings": json.dumps(to_dict(settings)), "experiment": "e", "run": "/nowhere"}
    )
    node = {
        "partition-id": 0,
        "data-root": str(tmp_path / "data" / "alpha"),
        "state-dir": str(tmp_path / "state"),
    }
    before = sorted((tmp_path / "data" / "alpha").iterdir())
    reply = send(app, question(order), node)
    assert reply.content.config_records["hospital"]["name"] == "alpha"
    (entry,) = OutboundLog(tmp_path / "state" / NAME).read().entries
    assert entry.records[0]["values"]["images"] == 20
    assert sorted((tmp_path / "data" / "alpha").iterdir()) == before
    lost = send(app, question(order), node | {"data-root": str(tmp_path / "nowhere")})
    assert lost.error.reason == "hospital: DataError while opening its shard (partition-id 0)"
    broken = send(app, question(ConfigRecord({"experiment": "../../etc"})), node)
    assert (
        broken.error.reason
        == "hospital: ConfigError while reading the server's order (partition-id 0)"
    )
    assert [
        entry.records[0]["kind"] for entry in OutboundLog(tmp_path / "state" / NAME).read().entries
    ] == [
        "values",
        "error",
        "error",
    ]


def question(order: ConfigRecord, kind: str = "query.hello") -> Message:
    message = Message(RecordDict({"config": order}), 1, kind)
    message.metadata.__dict__["_message_id"] = "question"
    return message


def test_a_node_without_a_number_answers_in_listed_words(place: Place) -> None:
    reply = send(app, place.question("query.hello"), {})
    assert reply.error.reason == "hospital: KeyError while reading the server's order"


def test_a_simulation_of_shards_that_nobody_may_write_to_logs_in_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_shards(tmp_path / "data", (16,))
    monkeypatch.setenv(SIMULATION, "1")
    monkeypatch.setattr(site.os, "access", lambda path, mode: False)
    order = site.TrainRequest(tiny(data, hospitals=1), "e", str(tmp_path / "run"))
    assert (
        find_local_hospital(order, {"partition-id": 0}).outbound
        == tmp_path / "run" / "hospitals" / "alpha" / NAME
    )


def test_a_line_that_was_never_finished_is_no_message_and_spoils_no_other(tmp_path: Path) -> None:
    log = OutboundLog(tmp_path / NAME)
    entries = [
        Entry.of("e", number, "train", [values_record("facts", "values", {"p": 0.5})])
        for number in (1, 2)
    ]
    log.append(entries[0])
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + whole[: len(whole) // 2])
    assert (log.read().entries, log.read().unfinished) == (entries[:1], 1)
    log.append(entries[1])
    assert (log.read().entries, log.read().unfinished, log.read().changed) == (entries, 1, [])


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b"7", b"\xff\xfe", b'{"time": 3}', b'{"records": [{}]}', b'"records"'],
)
def test_a_line_that_is_no_entry_is_counted_and_read_past(tmp_path: Path, line: bytes) -> None:
    log = OutboundLog(tmp_path / NAME)
    entry = Entry.of("e", 1, "train", [values_record("facts", "values", {"p": 0.5})])
    log.append(entry)
    whole = log.path.read_bytes()
    for bad in (
        line,
        whole.replace(b'"bytes":', b'"bytes":"x","was":').strip(),
        whole.replace(b'"kind"', b'"sort"').strip(),
    ):
        log.path.write_bytes(whole + bad + b"\n" + whole)
        assert (log.read().entries, log.read().unfinished) == ([entry, entry], 1)


def test_a_line_that_was_changed_is_named(tmp_path: Path) -> None:
    log = OutboundLog(tmp_path / NAME)
    for number in (1, 2, 3):
        log.append(
            Entry.of(
                "e",
                number,
                "train",
                [values_record("facts", "values", {"epsilon": float("inf"), "p": 0.5})],
            )
        )
    log.path.write_text(log.path.read_text().replace("0.5", "0.7", 1))
    assert log.read().changed == [f"{NAME}:1"]
    assert log.read().entries[1].records[0]["values"] == {"epsilon": "inf", "p": 0.5}


# --- its parts ---------------------------------------------------------------------------------------


def some_entry(number: int) -> Entry:
    return Entry.of("e", number, "train", [values_record("facts", "values", {"p": 0.5})])


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two lines fill a part."""
    monkeypatch.setattr(outbound, "PART_BYTES", 300)


def full_log(folder: Path, lines: int) -> OutboundLog:
    log = OutboundLog(folder / NAME)
    for number in range(lines):
        log.append(some_entry(number))
    return log


def test_a_full_log_goes_on_in_a_new_part_and_is_read_as_one(
    tmp_path: Path, small_parts: None
) -> None:
    log = full_log(tmp_path, 5)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "outbound-00001.jsonl",
        "outbound-00002.jsonl",
        NAME,
    ]
    assert [len(log.part(number).read_bytes().splitlines()) for number in range(3)] == [2, 2, 1]
    reading = log.read()
    assert [entry.round for entry in reading.entries] == [0, 1, 2, 3, 4]
    assert (reading.changed, reading.unfinished, reading.missing) == ([], 0, [])
    assert [entry.round for entry in OutboundLog(log.part(1)).read().entries] == [2, 3]


def test_parts_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    log = OutboundLog(tmp_path / NAME)
    for number in (11, 2, 0, 10):
        log.part(number).write_bytes(b"")
    (tmp_path / "outbound-1.jsonl").write_bytes(b"{")  # no part of it, as any other file
    (tmp_path / "outbound-00003.jsonl.gz").write_bytes(b"{")
    assert log.numbers() == [0, 2, 10, 11]
    assert log.read().missing == [log.part(number).name for number in (1, *range(3, 10))]
    log.append(some_entry(1))
    assert log.part(11).stat().st_size > 0


def test_changed_and_unfinished_lines_are_found_in_every_part(
    tmp_path: Path, small_parts: None, fedgan: Any
) -> None:
    log = full_log(tmp_path, 5)
    log.path.write_text(
        log.path.read_text() + '{"time":'
    )  # never finished, and the last of its part
    second = log.part(1).read_text().splitlines()
    log.part(1).write_text("\n".join(["{", second[0], second[1].replace("0.5", "0.7")]) + "\n")
    reading = log.read()
    assert (len(reading.entries), reading.changed, reading.unfinished) == (
        5,
        ["outbound-00001.jsonl:3"],
        2,
    )
    for path in (tmp_path, log.path):
        code, out, _ = fedgan("outbound", path)
        assert code == 0
        assert "in all: 5 messages" in out
        assert "changed after they were written: outbound-00001.jsonl:3" in out
        assert "no entries: 2 lines" in out
    assert fedgan("outbound", log.part(2))[1].count("train") > 0
    assert "in all: 1 messages" in fedgan("outbound", log.part(2))[1]


def test_parts_that_were_moved_away_are_told_and_their_numbers_not_used_again(
    tmp_path: Path, small_parts: None, fedgan: Any
) -> None:
    log = full_log(tmp_path, 6)
    for number in (0, 1):
        log.part(number).rename(tmp_path / f"moved-{number}")
    log.append(some_entry(6))
    assert log.numbers() == [2, 3]
    assert [entry.round for entry in log.read().entries] == [4, 5, 6]
    code, out, _ = fedgan("outbound", tmp_path)
    assert code == 0
    assert "not here: 2 parts of this log, outbound.jsonl the first of them" in out
    assert json.loads(fedgan("outbound", tmp_path, "--json")[1])["logs"][0]["missing_parts"] == [
        NAME,
        "outbound-00001.jsonl",
    ]


def test_an_answer_does_not_leave_where_the_next_part_cannot_be_begun(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not place.answer("train", lambda content: None).has_error()
    monkeypatch.setattr(outbound, "PART_BYTES", 1)
    last = place.log.part(max(place.log.numbers()) + 1)
    last.mkdir()  # in its place
    try:
        reply = place.answer("train", lambda content: None)
        assert reply.error.reason == "hospital: StorageError while writing its outbound log"
        assert "so nothing is sent" in place.client_log.read_text()
    finally:
        last.rmdir()


def test_several_writers_lose_no_line_where_a_part_ends(tmp_path: Path, small_parts: None) -> None:
    """Arms of a comparison write beside one shard."""
    threads = [threading.Thread(target=full_log, args=(tmp_path, 20)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reading = OutboundLog(tmp_path / NAME).read()
    assert sorted(entry.round for entry in reading.entries) == sorted([*range(20)] * 4)
    assert (reading.changed, reading.unfinished, reading.missing) == ([], 0, [])
    assert len(OutboundLog(tmp_path / NAME).numbers()) > 10


# --- fedgan outbound ---------------------------------------------------------------------------------


def test_the_verb_shows_what_left_by_shard_and_by_run(place: Place, fedgan: Any) -> None:
    code, out, err = fedgan("outbound", place.run.path, "--json")
    assert (code, err) == (0, "")
    logs = json.loads(out)["logs"]
    assert [Path(log["path"]).parent.name for log in logs] == ["alpha", "beta"]
    beta = logs[1]
    assert [(row["message"], row["round"]) for row in beta["messages"]] == [
        ("query.hello", 0),
        ("train", 1),
    ]
    assert beta["totals"]["bytes"] == sum(row["bytes"] for row in beta["messages"]) > 1000
    assert beta["held"]["train"]["arrays"] == ["discriminator", "ema", "generator"]
    assert "loss_d" in beta["held"]["train"]["facts"]
    code, out, _ = fedgan("outbound", place.data / "beta")
    assert code == 0
    assert beta["messages"][1]["sha256"][:12] in out
    assert f"in all: 2 messages, {beta['totals']['bytes']:,} bytes" in out


def test_the_verb_leaves_out_other_experiments_of_a_run_s_shards(place: Place, fedgan: Any) -> None:
    OutboundLog(place.data / "beta" / NAME).append(Entry.of("other", 9, "train", []))
    try:
        runs = json.loads(fedgan("outbound", place.run.path, "--json")[1])["logs"]
        shard = json.loads(fedgan("outbound", place.data / "beta", "--json")[1])["logs"]
        assert [log["totals"]["experiments"] for log in (*runs, *shard)] == [1, 1, 2]
    finally:
        lines = place.data / "beta" / NAME
        lines.write_bytes(b"\n".join(lines.read_bytes().split(b"\n")[:-2]) + b"\n")


def test_the_verb_names_changed_lines_and_errors(tmp_path: Path, fedgan: Any) -> None:
    log = OutboundLog(tmp_path / NAME)
    log.append(
        Entry.of(
            "e",
            0,
            "train",
            [values_record("error", "error", {"code": 2, "reason": "hospital: OSError while x"})],
        )
    )
    log.append(Entry.of("e", 1, "train", [values_record("facts", "values", {"p": 0.5})]))
    log.path.write_text(log.path.read_text().replace("0.5", "0.7") + "{")
    code, out, _ = fedgan("outbound", log.path)
    assert code == 0
    assert "2 messages, 1 of them errors" in out
    assert "hospital: OSError while x" in out
    assert "changed after they were written: outbound.jsonl:2" in out
    assert "no entries: 1 lines" in out


def test_the_verb_says_where_a_log_would_lie(tmp_path: Path, fedgan: Any) -> None:
    code, _, err = fedgan("outbound", tmp_path)
    assert code == 3
    assert "no outbound log" in err
    assert "state-dir" in err


# --- counts of labels --------------------------------------------------------------------------------


def test_counts_of_labels_travel_only_where_they_are_asked_for(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", (16, 40))
    for share, expected in ((False, [(), ()]), (True, [(10, 10), (4, 4)])):
        settings = tiny(data, f"federation.share_label_counts={str(share).lower()}", hospitals=2)
        order = {"settings": json.dumps(to_dict(settings)), "experiment": "e", "run": str(tmp_path)}
        members, _ = introduce(LocalGrid(2, app), settings, order)  # type: ignore[arg-type]
        assert [member.label_counts for member in members] == expected


def test_counts_of_labels_are_refused_with_privacy_by_server_and_hospital(tmp_path: Path) -> None:
    settings = tiny(
        write_shards(tmp_path / "data", (16,)), *PRIVATELY, "training.labels=uniform", hospitals=1
    )
    check_private(settings)
    asking = dataclasses.replace(
        settings, federation=dataclasses.replace(settings.federation, share_label_counts=True)
    )
    with pytest.raises(
        ConfigError, match=r"share_label_counts = true: the server would learn the real counts"
    ):
        check_private(asking)
    order = ConfigRecord(
        {"settings": json.dumps(to_dict(asking)), "experiment": "e", "run": str(tmp_path / "run")}
    )
    reply = send(app, question(order))
    assert reply.error.reason == "hospital: ConfigError while introducing itself"


# --- the list itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [(), ("training.d_steps=2", "model.mapping_layers=3", "model.minibatch_std_group=0")],
)
@pytest.mark.parametrize("labels", [0, 2])
def test_the_arrays_that_may_leave_are_those_that_a_trainer_gives_out(
    place: Place, overrides: tuple[str, ...], labels: int
) -> None:
    settings: Settings = tiny(place.data, *overrides)
    context = Context(
        run_id=1, node_id=1, node_config={"partition-id": 0}, state=RecordDict(), run_config={}
    )
    with mock.patch.dict(os.environ, {SIMULATION: "1"}):
        data = find_local_hospital(
            site.TrainRequest(place.settings, "e", str(place.run.path)), context.node_config
        ).hospital.train
    data = dataclasses.replace(
        data, labels=data.labels[:, :labels], label_names=data.label_names[:labels]
    )
    given_out = Trainer(settings, data).outgoing(("generator", "discriminator", "ema"))
    listed = model_arrays(settings.model, settings.data.resolution, data.channels, labels)
    assert {name: array.shape for name, array in given_out.items()} == listed


def test_every_number_that_may_leave_has_its_meaning() -> None:
    assert set(MEANINGS) == set(OPEN)
    assert all(fact.meaning and fact.when for fact in INTRODUCTION.values())


def test_the_page_lists_what_the_code_lists() -> None:
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    section = text.partition("## What leaves a hospital")[2].partition("\n## ")[0]
    shown = [
        line
        for line in section.splitlines()
        if line.startswith(("| `query.hello`", "| `train`", "| any"))
    ]
    expected = [
        f"| {message if message == 'any' else f'`{message}`'} | `{name}` | {kind} | {when} | {meaning} |"
        for message, name, kind, when, meaning in rows()
    ]
    assert shown == expected
