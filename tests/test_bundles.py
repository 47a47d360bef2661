"""Bundles of arrays: round trip, refusal of invalid bytes, and their use in a round."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
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
