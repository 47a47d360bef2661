"""Bundles of arrays: round trip, refusal of invalid bytes, and their use in a round."""

from __future__ import annotations

import json
import pickle
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_federation import LocalGrid, NoEvaluator, tiny, write_shards

from client.app import app
from fedgan import files
from fedgan.errors import FederationError
from fedgan.exchange.bundle import BUNDLE, pack_bundle, unpack_bundle
from fedgan.run_folder import RunFolder
from fedgan.runs.preparation import experiment_of, prepare_run
from server.federation import Federation
from server.records import Bundler
from server.requests import LATE, send_and_receive

NUMBERS = st.sampled_from(
    [np.dtype(kind) for kind in (np.float32, np.float16, np.uint16, np.uint32)]
)
ARRAYS = NUMBERS.flatmap(
    lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)


@given(st.dictionaries(st.text(min_size=1, max_size=12), ARRAYS, max_size=5))
def test_unpacked_arrays_equal_the_packed_arrays(arrays: dict[str, np.ndarray]) -> None:
    arrays = {name: array for name, array in arrays.items() if name != "__metadata__"}
    unpacked = unpack_bundle(pack_bundle(arrays))
    assert list(unpacked) == sorted(arrays)
    for name, array in arrays.items():
        assert (unpacked[name].dtype, unpacked[name].shape) == (array.dtype, array.shape)
        assert unpacked[name].tobytes() == array.tobytes()


def test_transposed_array_keeps_its_values() -> None:
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert np.array_equal(unpack_bundle(pack_bundle({"x": turned}))["x"], turned)


def with_header(header: Any, body: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def header_of_one_array(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


BAD = {
    "nothing": b"",
    "no length": b"\1\2",
    "a length beyond the end": struct.pack("<Q", 2**63) + b"{}",
    "half a header": with_header(header_of_one_array())[:20],
    "half the numbers": with_header(header_of_one_array())[:-4],
    "bytes behind the numbers": with_header(header_of_one_array()) + b"more",
    "no json": with_header(b"{'x': 1}"),
    "a list": with_header([1, 2]),
    "a deep nest": with_header(b"[" * 50_000),
    "offsets outside": with_header(header_of_one_array(data_offsets=[0, 2**40])),
    "offsets that are negative": with_header(header_of_one_array(data_offsets=[-8, 0])),
    "a shape that overflows": with_header(header_of_one_array(shape=[2**62, 2**62])),
    "a shape of another size": with_header(header_of_one_array(shape=[3])),
    "a kind of number that is unknown": with_header(header_of_one_array(dtype="OBJECT")),
    "a kind that numpy has not": with_header(header_of_one_array(dtype="F8_E4M3", shape=[8])),
    "two in one place": with_header(
        header_of_one_array() | {"y": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    ),
    "a pickle": pickle.dumps({"x": 1}),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_invalid_bytes_are_refused_without_quoting_them(
    data: bytes,
) -> None:
    with pytest.raises(FederationError, match=r"^bytes that are no bundle of arrays$"):
        unpack_bundle(data)


def test_bundle_far_larger_than_the_request_is_refused() -> None:
    """A short header of many empty arrays expands to many objects."""
    sent = pack_bundle({f"generator/{number}": np.zeros(4, np.float32) for number in range(100)})
    assert len(unpack_bundle(sent, sent)) == 100
    many = pack_bundle({f"a{number}": np.zeros(0, np.float32) for number in range(1000)})
    for data in (many, pack_bundle({"x": np.zeros(10_000, np.float32)}), struct.pack("<Q", 2**40)):
        with pytest.raises(FederationError, match="far larger than the one that was sent"):
            unpack_bundle(data, sent)


def test_model_is_packed_once_for_all_remote_hospitals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("run_id", "task_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    record = ArrayRecord(
        {"a": Array(np.ones(3, np.float32)), "b": Array(np.zeros((2, 2), np.float32))}
    )
    bundler = Bundler()
    sent = [bundler.pack(Message(RecordDict({"arrays": record}), node, "train")) for node in (1, 2)]
    assert [list(message.content["arrays"]) for message in sent] == [[BUNDLE], [BUNDLE]]
    assert sent[0].content["arrays"] is sent[1].content["arrays"]
    assert unpack_bundle(sent[0].content.array_records["arrays"][BUNDLE].data)["b"].shape == (2, 2)


class ObjectStore:
    """A stand-in for the SuperLink: the runtime API of replies that have arrived."""

    def __init__(self) -> None:
        self.replies: list[Message] = []
        self.objects: dict[str, bytes] = {}
        self.pulled: list[str] = []
        self.uploading: set[int] = set()  # nodes whose upload does not end

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:
        replies, self.replies = self.replies, []
        for reply in replies:
            objects = get_all_nested_objects(reply)
            is_whole = reply.metadata.src_node_id not in self.uploading
            objects = {key: each for key, each in objects.items() if not self.objects.get(key)}
            self.objects |= {
                key: each.deflate() if is_whole else b"" for key, each in objects.items()
            }
        trees = [get_object_tree(reply) for reply in replies]
        return PullAppMessagesResponse(
            messages_list=[message_to_proto(remove_content_from_message(each)) for each in replies],
            message_object_trees=trees,
        )

    def PullObject(self, request: Any) -> PullObjectResponse:
        content = self.objects[request.object_id]
        self.pulled.append(request.object_id)
        return PullObjectResponse(
            object_found=True, object_available=bool(content), object_content=content
        )

    def ConfirmMessageReceived(self, request: Any) -> None:
        self.objects.pop(request.message_object_id)


class RemoteGrid(HttpGrid):
    """Flower's own grid of a deployment; `reply(request)` makes a hospital's reply."""

    def __init__(self, reply: Callable[[Message], RecordDict]) -> None:
        super().__init__(token="t")
        self._client = self.store = ObjectStore()  # type: ignore[assignment]
        self._run = SimpleNamespace(run_id=1)  # type: ignore[assignment]
        self.reply = reply

    def get_node_ids(self) -> list[int]:
        return [1, 2, 3]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            ids.append(message.object_id)
            answer = Message(self.reply(message), reply_to=message)
            answer.metadata.__dict__["_message_id"] = answer.object_id
            self.store.replies.append(answer)
        return ids


MODEL = {"x": np.zeros(1000, np.float32)}


def ask(node: int, seconds: float) -> Message:
    arrays = ArrayRecord({"x": Array(MODEL["x"])})
    return Message(RecordDict({"arrays": arrays}), node, "train", ttl=seconds)


@pytest.mark.parametrize("mib", [6, 200])  # few objects, many objects
def test_reply_of_any_size_is_not_assembled(monkeypatch: pytest.MonkeyPatch, mib: int) -> None:
    for name in ("run_id", "task_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)

    def reply(request: Message) -> RecordDict:
        metrics = MetricRecord({"images": 1})  # the same object in each reply
        liar = request.metadata.dst_node_id == 2
        data = np.random.default_rng(0).bytes(mib * 2**20) if liar else pack_bundle(MODEL)
        bundle = ArrayRecord({BUNDLE: Array("uint8", (len(data),), BUNDLE, data)})
        return RecordDict({"arrays": bundle, "metrics": metrics})

    grid = RemoteGrid(reply)
    found = send_and_receive(grid, [1, 2, 3], ask, timeout=60, reconnecting=True)
    assert found.failures == {2: "replied with more than twice the bytes that it was sent"}
    for node in (1, 3):
        assert set(found.received[node].content.array_records["arrays"]) == {"x"}
    pulled = sum(len(grid.store.objects.get(key, b"")) for key in grid.store.pulled)
    assert pulled < (12 if mib == 6 else 1) * 2**20
    assert grid._client is grid.store


def test_upload_that_does_not_end_is_awaited_until_the_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("run_id", "task_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    data = pack_bundle(MODEL)

    def reply(request: Message) -> RecordDict:
        own = MetricRecord({"node": request.metadata.dst_node_id})
        bundle = ArrayRecord({BUNDLE: Array("uint8", (len(data),), BUNDLE, data)})
        return RecordDict({"arrays": bundle, "metrics": own})

    grid = RemoteGrid(reply)
    grid.store.uploading = {1}
    begun = time.monotonic()
    found = send_and_receive(grid, [2, 1], ask, timeout=1, reconnecting=True)
    assert time.monotonic() - begun < 20
    assert found.failures == {1: LATE}
    assert set(found.received) == {2}


class Tampering(LocalGrid):
    """A grid that replaces the second hospital's reply of round 1 by other bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(3, app)
        self.data, self.tampered = data, 0

    def _deliver(self, message: Message, key: str) -> None:
        super()._deliver(message, key)
        reply, number = self.replies[key], self.nodes[message.metadata.dst_node_id]
        if number == 1 and not reply.has_error() and "arrays" in reply.content.array_records:
            assert list(reply.content["arrays"]) == [BUNDLE]
            reply.content["arrays"] = ArrayRecord(
                {BUNDLE: Array("uint8", (len(self.data),), BUNDLE, self.data)}
            )
            self.tampered += 1


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (BAD["a shape that overflows"], "replied with bytes that are no bundle of arrays"),
        (
            pack_bundle({f"a{number}": np.zeros(0, np.float32) for number in range(5000)}),
            "replied with a bundle of arrays that is far larger",
        ),
        (
            with_header({"../../../etc/passwd": header_of_one_array()["x"]}),
            "replied with other arrays than were sent",
        ),
    ],
    ids=["header", "number", "names"],
)
def test_round_continues_without_a_hospital_whose_bundle_is_bad(
    data: bytes, text: str, tmp_path: Path
) -> None:
    settings = tiny(
        write_shards(tmp_path / "data", (48, 32, 24)),
        "federation.min_hospitals=2",
        rounds=1,
        kimg=0.036,
    )
    run = RunFolder.at(tmp_path / "run")
    prepare_run(settings, run)
    grid = Tampering(data)
    Federation(run.settings(), run, experiment_of(run), NoEvaluator(), reconnecting=True).train(
        grid
    )  # type: ignore[arg-type]
    (line,) = files.read_json_lines(run.metrics)
    assert [row["name"] for row in line["hospitals"]] == ["alpha", "gamma"]
    ((reason),) = [row["why"] for row in line["absent"] if row["name"] == "beta"]
    assert text in reason
    assert "passwd" not in reason
    assert grid.tampered == 1
