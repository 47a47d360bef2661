"""Outbound gate, allow-list and outbound log of a hospital, and `fedgan outbound`."""

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

from client import hospital as hospital_module
from client.allow_list import (
    INTRODUCTION,
    _checked_arrays,
    model_arrays,
    reference_markdown,
    table_rows,
)
from client.app import RequestContext, app
from client.gate import OutboundGate
from client.hospital import SIMULATION, find_local_hospital
from fedgan.config import Settings, from_dict, to_dict
from fedgan.errors import ConfigError, DataError, FederationError
from fedgan.exchange import error_messages as reasons
from fedgan.exchange import outbound_log as outbound
from fedgan.exchange.error_messages import REASON, STEPS, reason
from fedgan.exchange.outbound_log import NAME, Entry, OutboundLog, values_record
from fedgan.exchange.round_metrics import COUNTS, MEANS, ROUND_METRICS, allowed_metrics
from fedgan.privacy.validator import check_private
from fedgan.run_folder import RunFolder
from fedgan.runs.preparation import experiment_of, prepare_run
from fedgan.training.trainer import Trainer
from server.federation import Federation
from server.roster import wait_for_members

ROOT = Path(__file__).resolve().parent.parent
PRIVATELY = (
    "privacy.noise_multiplier=1",
    "model.minibatch_std_group=0",
    "augment.mode=fixed",
    "training.r1_gamma=0",
)


# --- one message ----------------------------------------------------------------------------------


class Hospital:
    """Hospital 0 of a finished run of one round, with the requests that it received."""

    def __init__(self, path: Path) -> None:
        self.data = write_shards(path / "data", (40, 16))
        self.settings = tiny(self.data, hospitals=2, rounds=1, kimg=0.016)
        self.run = RunFolder.at(path / "run")
        prepare_run(self.settings, self.run)
        self.requests: list[Message] = []

        def keep(number: int, message: Message) -> None:
            if number == 0:
                self.requests.append(copy.deepcopy(message))

        federation = Federation(
            self.run.settings(), self.run, experiment_of(self.run), NoEvaluator()
        )
        federation.train(LocalGrid(2, app, keep))  # type: ignore[arg-type]
        self.log = OutboundLog(self.data / "alpha" / NAME)
        self.client_log = self.run.hospital_state("alpha") / "client.log"

    def request(self, kind: str, *overrides: str) -> Message:
        """The request that the hospital received; with other settings it is of a new experiment."""
        (message,) = [
            copy.deepcopy(each) for each in self.requests if each.metadata.message_type == kind
        ]
        config = message.content.config_records["config"]
        config["settings"] = json.dumps(
            to_dict(from_dict(json.loads(str(config["settings"])), overrides))
        )
        if overrides:
            config["experiment"] = f"exp-{abs(hash(overrides))}"
        return message

    def valid_content(self, kind: str, message: Message) -> RecordDict:
        """Content that may leave."""
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

    def reply(
        self,
        kind: str,
        tamper: Callable[[RecordDict], Any],
        *overrides: str,
        node: dict[str, Any] | None = None,
        mod: bool = False,
    ) -> Message:
        """The reply that leaves when a handler, or a mod around it, tampers with valid content."""
        message, gate = self.request(kind, *overrides), OutboundGate()

        def make(message: Message, context: Context) -> Message:
            content = self.valid_content(kind, message)
            replaced = tamper(content)
            return replaced if isinstance(replaced, Message) else Message(content, reply_to=message)

        def valid(message: Message, context: Context) -> Message:
            return Message(self.valid_content(kind, message), reply_to=message)

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
        register(valid if mod else make)
        return send(gate, message, node)


def send(gate: Any, message: Message, node: dict[str, Any] | None = None) -> Message:
    """The reply of hospital 0."""
    config = {"partition-id": 0} if node is None else node
    context = Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})
    with mock.patch.dict(os.environ, {SIMULATION: "1"}):
        reply: Message = gate(message=message, context=context)
    return reply


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return Hospital(tmp_path_factory.mktemp("hospital"))


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
def test_reply_with_unlisted_content_becomes_an_error(
    hospital: Hospital, kind: str, tamper: Callable[[RecordDict], None], what: str, mod: bool
) -> None:
    hospital.client_log.unlink(missing_ok=True)
    reply = hospital.reply(kind, tamper, mod=mod)
    assert reply.has_error()
    assert reply.error.reason == f"hospital: refused to send {what}"
    assert (
        f"refused to send {what}: " in hospital.client_log.read_text()
    )  # with the name of the content
    last = hospital.log.read().entries[-1]
    assert [record["values"] for record in last.records] == [
        {"code": 2, "reason": reply.error.reason}
    ]


@pytest.mark.parametrize("kind", ["query.hello", "train"])
def test_valid_reply_leaves_unchanged(hospital: Hospital, kind: str) -> None:
    reply = hospital.reply(kind, lambda content: None)
    assert not reply.has_error(), reply.error.reason
    honest = hospital.valid_content(kind, hospital.request(kind))
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
def test_content_that_the_settings_exclude_is_refused(
    hospital: Hospital, overrides: tuple[str, ...], tamper: Callable[[RecordDict], None], what: str
) -> None:
    assert (
        hospital.reply("train", tamper, *overrides).error.reason
        == f"hospital: refused to send {what}"
    )


def test_r_t_leaves_a_private_training_only_with_noise(hospital: Hospital) -> None:
    noised = ("privacy.noise_multiplier=1", "privacy.r_t_noise=1")
    assert not hospital.reply("train", put("facts", "r_t", 0.5), *noised).has_error()


def test_array_that_the_server_did_not_send_is_refused(hospital: Hospital) -> None:
    message, gate = hospital.request("train"), OutboundGate()
    content = hospital.valid_content("train", message)
    del message.content.array_records["arrays"][some_array(content)]
    gate.train()(lambda message, context: Message(content, reply_to=message))
    assert send(gate, message).error.reason == f"hospital: refused to send {reasons.ARRAY}"


def test_bytes_after_the_numbers_of_an_array_are_removed(hospital: Hospital) -> None:
    def tamper(content: RecordDict) -> None:
        name = some_array(content)
        array = content.array_records["arrays"][name]
        add_array(
            content, name, Array(SECRET, array.shape, array.stype, array.data + SECRET.encode())
        )

    reply = hospital.reply("train", tamper)
    arrays = reply.content.array_records["arrays"]
    assert len(arrays) > 10
    assert not any(
        SECRET.encode() in array.data or SECRET in array.dtype for array in arrays.values()
    )


def test_hash_of_an_array_is_independent_of_memory_layout() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    turned = np.asfortranarray(values)
    found = [
        _checked_arrays(ArrayRecord({"x": Array(each)}), {"x": ("float32", (2, 3))})["x"].data
        for each in (values, turned)
    ]
    assert found[0] == found[1]


def test_unlisted_message_type_is_refused(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, gate = hospital.request("query.hello"), OutboundGate()
    message.metadata.message_type = "query.images"
    refused = "hospital: ConfigError while reading the request"
    assert send(gate, message).error.reason.startswith(refused)
    monkeypatch.setattr("client.gate.MESSAGES", ("query.images",))
    gate.query("images")(
        lambda message, context: Message(
            RecordDict({"x": ArrayRecord({"x": IMAGE})}), reply_to=message
        )
    )
    assert send(gate, message).error.reason == f"hospital: refused to send {reasons.MESSAGE}"


@pytest.mark.parametrize("code", [0, 2, 8])
def test_error_with_unlisted_text_is_replaced(hospital: Hospital, code: int) -> None:
    def tamper(content: RecordDict) -> Message:
        return Message(
            Error(code, f"hospital: ValueError while reading {SECRET}"),
            reply_to=hospital.request("train"),
        )

    assert (
        hospital.reply("train", tamper).error.reason == f"hospital: refused to send {reasons.ERROR}"
    )
    assert SECRET in hospital.client_log.read_text()


# --- errors ---------------------------------------------------------------------------------------

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
    """An exception whose message and class name hold secrets, and the secrets."""
    secrets = [draw(PATHS), draw(IDS), draw(VALUES)]
    text = draw(st.permutations(secrets))
    base = draw(BASES)
    kind = draw(st.sampled_from([base, type(f"Bad{secrets[1].replace('-', '')}", (base,), {})]))
    return kind(" ".join(text)), [*secrets, secrets[1].replace("-", "")]


def assert_reveals_nothing(reply: Message, secrets: list[str]) -> None:
    assert reply.has_error()
    text = str(reply.error.reason)
    assert REASON.fullmatch(text), text
    assert not any(secret in text for secret in secrets), text
    assert not re.search(r"[0-9]{5}|/|\.npy", text)


@given(failures(), st.sampled_from([phrase.replace("N", "3") for phrase in STEPS]), st.booleans())
def test_exception_in_a_handler_reveals_only_kind_and_step(
    hospital: Hospital, failure: tuple[Exception, list[str]], step: str, is_leaky: bool
) -> None:
    error, secrets = failure

    def work(context_: RequestContext, *_: object) -> RecordDict:
        context_.step = f"reading {secrets[0]} of {secrets[1]}" if is_leaky else step
        raise error

    message = hospital.request("train")
    context = Context(
        run_id=1, node_id=1, node_config={"partition-id": 0}, state=RecordDict(), run_config={}
    )
    with mock.patch.dict(os.environ, {SIMULATION: "1"}):
        reply = RequestContext(message, context).reply(work)
    assert_reveals_nothing(reply, secrets)
    assert is_leaky or str(reply.error.reason).endswith(step)


@hypothesis_settings(max_examples=25)
@given(failures(), st.sampled_from(["before", "after", "error", "handler"]))
def test_exception_in_a_mod_reveals_only_its_kind(
    hospital: Hospital, failure: tuple[Exception, list[str]], where: str
) -> None:
    error, secrets = failure
    gate = OutboundGate()

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
        return Message(hospital.valid_content("train", message), reply_to=message)

    gate.train(mods=[mod])(train)
    assert_reveals_nothing(send(gate, hospital.request("train")), secrets)


@pytest.mark.parametrize("number", ["/data/north", "PAT-1", "17; DROP", "12345", None, "1\n"])
def test_error_text_omits_invalid_partition_ids(number: object) -> None:
    assert (
        reason(ValueError(), "opening its shard", number)
        == "hospital: ValueError while opening its shard"
    )
    assert (
        reason(ValueError(), "opening its shard", 7)
        == "hospital: ValueError while opening its shard (partition-id 7)"
    )


def test_every_step_of_the_client_is_listed() -> None:
    used = []
    for path in (ROOT / "client").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and any(
                "step" in ast.unparse(target) for target in node.targets
            ):
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                used += [
                    value for value in values if isinstance(value, ast.Constant | ast.JoinedStr)
                ]
    text = [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "N" for part in value.values)
        if isinstance(value, ast.JoinedStr)
        else str(value.value)
        for value in used
        if not isinstance(value, ast.Constant) or isinstance(value.value, str)
    ]
    assert len(text) > 8
    assert set(text) <= set(STEPS)


# --- log ------------------------------------------------------------------------------------------


def test_outbound_log_matches_what_the_server_received(tmp_path: Path) -> None:
    data, requests = write_shards(tmp_path / "data", (40, 24, 16)), list[tuple[str, Message]]()
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
            # the line was written before the reply left
            assert len(OutboundLog(data / name / NAME).read().entries) > sum(
                one == name for one, _ in requests
            )
            requests.append((name, message))
        return found

    grid.pull_messages = see  # type: ignore[method-assign]
    federation = Federation(run.settings(), run, experiment_of(run), NoEvaluator())
    federation.train(grid)  # type: ignore[arg-type]
    for name in names.values():
        reading = OutboundLog(data / name / NAME).read()
        assert (reading.changed, reading.unfinished) == ([], 0)
        seen = [message for owner, message in requests if owner == name]
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


def test_reply_without_a_log_line_does_not_leave(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for kind in ("query.hello", "train"):
        reply = hospital.reply(kind, lambda content: None)
        assert reply.error.reason == "hospital: StorageError while writing its outbound log"
        assert "so nothing is sent" in hospital.client_log.read_text()


def test_unwritable_log_stops_the_federation_with_its_error(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2, rounds=1, kimg=0.008)
    run = RunFolder.at(tmp_path / "run")
    prepare_run(settings, run)
    (tmp_path / "data" / "beta" / NAME).mkdir()
    with pytest.raises(
        FederationError,
        match="a hospital could not join: StorageError while writing its outbound log",
    ):
        federate(settings, run, app)


def test_deployed_hospital_writes_its_log_only_to_its_state_dir(
    tmp_path: Path,
) -> None:
    settings = tiny(write_shards(tmp_path / "data", (40,)), hospitals=1)
    config = ConfigRecord(
        {"settings": json.dumps(to_dict(settings)), "experiment": "e", "run": "/nowhere"}
    )
    node = {
        "partition-id": 0,
        "data-root": str(tmp_path / "data" / "alpha"),
        "state-dir": str(tmp_path / "state"),
    }
    before = sorted((tmp_path / "data" / "alpha").iterdir())
    reply = send(app, request(config), node)
    assert reply.content.config_records["hospital"]["name"] == "alpha"
    (entry,) = OutboundLog(tmp_path / "state" / NAME).read().entries
    assert entry.records[0]["values"]["images"] == 20
    assert sorted((tmp_path / "data" / "alpha").iterdir()) == before
    lost = send(app, request(config), node | {"data-root": str(tmp_path / "nowhere")})
    assert lost.error.reason == "hospital: DataError while opening its shard (partition-id 0)"
    broken = send(app, request(ConfigRecord({"experiment": "../../etc"})), node)
    assert broken.error.reason == "hospital: ConfigError while reading the request (partition-id 0)"
    assert [
        entry.records[0]["kind"] for entry in OutboundLog(tmp_path / "state" / NAME).read().entries
    ] == [
        "values",
        "error",
        "error",
    ]


def request(config: ConfigRecord, kind: str = "query.hello") -> Message:
    message = Message(RecordDict({"config": config}), 1, kind)
    message.metadata.__dict__["_message_id"] = "request"
    return message


def test_node_without_partition_id_replies_with_a_listed_error(hospital: Hospital) -> None:
    reply = send(app, hospital.request("query.hello"), {})
    assert reply.error.reason == "hospital: KeyError while opening its shard"


def test_simulation_with_read_only_shards_logs_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_shards(tmp_path / "data", (16,))
    monkeypatch.setenv(SIMULATION, "1")
    monkeypatch.setattr(hospital_module.os, "access", lambda path, mode: False)
    config = hospital_module.TrainRequest(tiny(data, hospitals=1), "e", str(tmp_path / "run"))
    assert (
        find_local_hospital(config, {"partition-id": 0}).outbound
        == tmp_path / "run" / "hospitals" / "alpha" / NAME
    )


def test_unfinished_line_is_counted_and_damages_no_other(tmp_path: Path) -> None:
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
def test_invalid_line_is_counted_and_skipped(tmp_path: Path, line: bytes) -> None:
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


def test_changed_line_is_reported_with_its_number(tmp_path: Path) -> None:
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


# --- parts of the log -----------------------------------------------------------------------------


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


def test_full_log_continues_in_a_new_part(tmp_path: Path, small_parts: None) -> None:
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


def test_parts_are_sorted_by_number(tmp_path: Path) -> None:
    log = OutboundLog(tmp_path / NAME)
    for number in (11, 2, 0, 10):
        log.part(number).write_bytes(b"")
    (tmp_path / "outbound-1.jsonl").write_bytes(b"{")  # no part of the log
    (tmp_path / "outbound-00003.jsonl.gz").write_bytes(b"{")
    assert log.numbers() == [0, 2, 10, 11]
    assert log.read().missing == [log.part(number).name for number in (1, *range(3, 10))]
    log.append(some_entry(1))
    assert log.part(11).stat().st_size > 0


def test_changed_and_unfinished_lines_are_found_in_every_part(
    tmp_path: Path, small_parts: None, fedgan: Any
) -> None:
    log = full_log(tmp_path, 5)
    log.path.write_text(log.path.read_text() + '{"time":')  # unfinished, at the end of a part
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
        assert "total: 5 messages" in out
        assert "changed after writing: outbound-00001.jsonl:3" in out
        assert "unfinished or damaged: 2 lines" in out
    assert fedgan("outbound", log.part(2))[1].count("train") > 0
    assert "total: 1 messages" in fedgan("outbound", log.part(2))[1]


def test_moved_parts_are_reported_and_their_numbers_not_reused(
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
    assert "missing: 2 parts of this log, the first is outbound.jsonl" in out
    assert json.loads(fedgan("outbound", tmp_path, "--json")[1])["logs"][0]["missing_parts"] == [
        NAME,
        "outbound-00001.jsonl",
    ]


def test_reply_does_not_leave_when_the_next_part_cannot_be_created(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not hospital.reply("train", lambda content: None).has_error()
    monkeypatch.setattr(outbound, "PART_BYTES", 1)
    last = hospital.log.part(max(hospital.log.numbers()) + 1)
    last.mkdir()  # in its place
    try:
        reply = hospital.reply("train", lambda content: None)
        assert reply.error.reason == "hospital: StorageError while writing its outbound log"
        assert "so nothing is sent" in hospital.client_log.read_text()
    finally:
        last.rmdir()


def test_concurrent_writers_lose_no_line_at_the_end_of_a_part(
    tmp_path: Path, small_parts: None
) -> None:
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


# --- fedgan outbound ------------------------------------------------------------------------------


def test_outbound_lists_messages_by_shard_and_by_run(hospital: Hospital, fedgan: Any) -> None:
    code, out, err = fedgan("outbound", hospital.run.path, "--json")
    assert (code, err) == (0, "")
    logs = json.loads(out)["logs"]
    assert [Path(log["path"]).parent.name for log in logs] == ["alpha", "beta"]
    beta = logs[1]
    assert [(row["message"], row["round"]) for row in beta["messages"]] == [
        ("query.hello", 0),
        ("train", 1),
    ]
    assert beta["totals"]["bytes"] == sum(row["bytes"] for row in beta["messages"]) > 1000
    assert beta["contents"]["train"]["arrays"] == ["discriminator", "ema", "generator"]
    assert "loss_d" in beta["contents"]["train"]["facts"]
    code, out, _ = fedgan("outbound", hospital.data / "beta")
    assert code == 0
    assert beta["messages"][1]["sha256"][:12] in out
    assert f"total: 2 messages, {beta['totals']['bytes']:,} bytes" in out


def test_outbound_of_a_run_omits_other_experiments(hospital: Hospital, fedgan: Any) -> None:
    OutboundLog(hospital.data / "beta" / NAME).append(Entry.of("other", 9, "train", []))
    try:
        runs = json.loads(fedgan("outbound", hospital.run.path, "--json")[1])["logs"]
        shard = json.loads(fedgan("outbound", hospital.data / "beta", "--json")[1])["logs"]
        assert [log["totals"]["experiments"] for log in (*runs, *shard)] == [1, 1, 2]
    finally:
        lines = hospital.data / "beta" / NAME
        lines.write_bytes(b"\n".join(lines.read_bytes().split(b"\n")[:-2]) + b"\n")


def test_outbound_reports_changed_lines_and_errors(tmp_path: Path, fedgan: Any) -> None:
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
    assert "2 messages (errors: 1)" in out
    assert "hospital: OSError while x" in out
    assert "changed after writing: outbound.jsonl:2" in out
    assert "unfinished or damaged: 1 lines" in out


def test_outbound_without_a_log_says_where_to_look(tmp_path: Path, fedgan: Any) -> None:
    code, _, err = fedgan("outbound", tmp_path)
    assert code == 3
    assert "no outbound log" in err
    assert "state-dir" in err


# --- label counts ---------------------------------------------------------------------------------


def test_label_counts_leave_only_when_requested(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", (16, 40))
    for share, expected in ((False, [(), ()]), (True, [(10, 10), (4, 4)])):
        settings = tiny(data, f"federation.share_label_counts={str(share).lower()}", hospitals=2)
        config = {
            "settings": json.dumps(to_dict(settings)),
            "experiment": "e",
            "run": str(tmp_path),
        }
        members, _ = wait_for_members(LocalGrid(2, app), settings, config)  # type: ignore[arg-type]
        assert [member.label_counts for member in members] == expected


def test_label_counts_are_refused_with_privacy_by_both_sides(tmp_path: Path) -> None:
    settings = tiny(
        write_shards(tmp_path / "data", (16,)), *PRIVATELY, "training.labels=uniform", hospitals=1
    )
    check_private(settings)
    asking = dataclasses.replace(
        settings, federation=dataclasses.replace(settings.federation, share_label_counts=True)
    )
    with pytest.raises(
        ConfigError,
        match=r"share_label_counts = true: the server would receive the real label counts",
    ):
        check_private(asking)
    config = ConfigRecord(
        {"settings": json.dumps(to_dict(asking)), "experiment": "e", "run": str(tmp_path / "run")}
    )
    reply = send(app, request(config))
    assert reply.error.reason == "hospital: ConfigError while describing its data"


# --- allow-list -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [(), ("training.d_steps=2", "model.mapping_layers=3", "model.minibatch_std_group=0")],
)
@pytest.mark.parametrize("labels", [0, 2])
def test_model_arrays_match_the_output_of_the_trainer(
    hospital: Hospital, overrides: tuple[str, ...], labels: int
) -> None:
    settings: Settings = tiny(hospital.data, *overrides)
    context = Context(
        run_id=1, node_id=1, node_config={"partition-id": 0}, state=RecordDict(), run_config={}
    )
    with mock.patch.dict(os.environ, {SIMULATION: "1"}):
        data = find_local_hospital(
            hospital_module.TrainRequest(hospital.settings, "e", str(hospital.run.path)),
            context.node_config,
        ).hospital.train
    data = dataclasses.replace(
        data, labels=data.labels[:, :labels], label_names=data.label_names[:labels]
    )
    outgoing = Trainer(settings, data).get_parameters(("generator", "discriminator", "ema"))
    listed = model_arrays(settings.model, settings.data.resolution, data.channels, labels)
    assert {name: array.shape for name, array in outgoing.items()} == listed


def test_every_value_of_the_allow_list_has_a_meaning() -> None:
    assert all(metric.meaning for metric in ROUND_METRICS)
    assert all(all(row) for row in INTRODUCTION.values())
    assert all(all(row) for row in table_rows())


def test_reference_table_lists_every_round_metric() -> None:
    lines = reference_markdown().splitlines()
    assert len(lines) == 2 + len(table_rows())
    assert all(line.count(" | ") == 4 for line in (lines[0], *lines[2:]))
    assert [line.split(" | ")[1] for line in lines if "| `facts/" in line] == [
        f"`facts/{metric.name}`" for metric in ROUND_METRICS
    ]


@pytest.mark.parametrize(
    ("overrides", "absent"),
    [
        ((), set()),
        (
            ("privacy.noise_multiplier=1",),
            {"r_t", "loss_d", "r1", "seconds", "core_seconds", "peak_memory_bytes"},
        ),
        (
            ("privacy.noise_multiplier=1", "privacy.r_t_noise=1"),
            {"loss_d", "r1", "seconds", "core_seconds", "peak_memory_bytes"},
        ),
        (
            ("privacy.client_level=server",),
            {metric.name for metric in ROUND_METRICS}
            - {"round", "images_seen", "images", "threads", "exhausted", "continued_from"}
            - {"epsilon", "delta", "noise_multiplier", "sample_rate"},
        ),
    ],
    ids=["open", "private", "noisy r_t", "client-level"],
)
def test_allowed_metrics_depend_on_the_privacy_settings(
    overrides: tuple[str, ...], absent: set[str]
) -> None:
    allowed = allowed_metrics(from_dict({}, overrides))
    assert {metric.name for metric in ROUND_METRICS} - set(allowed) == absent


def test_means_and_counts_keep_their_order() -> None:
    assert MEANS == ("loss_g", "loss_d", "d_accuracy", "r_t", "p", "r1", "path_length")
    assert COUNTS == ("round", "images_seen", "images", "threads")
