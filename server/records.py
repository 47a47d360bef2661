"""Content of the server's messages: arrays, their number format on the wire, bundles, checks.

The algebra of the wire formats is in fedgan/exchange/number_formats.py. Strategies see whole
float32 models only.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

from fedgan.config import Settings
from fedgan.errors import FederationError
from fedgan.exchange.bundle import BUNDLE, largest_reply, pack_bundle, unpack_bundle
from fedgan.exchange.number_formats import DTYPES, pack, restore, unpack, widen
from fedgan.runs.participants import Member

# --- records -----------------------------------------------------------------------------------

WEIGHT = "num_examples"
ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"


def to_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """One ArrayRecord of all arrays, by sorted key."""
    return ArrayRecord({key: Array(arrays[key]) for key in sorted(arrays)})


def model_of(message: Message) -> dict[str, np.ndarray]:
    """The arrays of a message by key."""
    return {key: array.numpy() for key, array in message.content.array_records[ARRAYS].items()}


def array_bytes(message: Message) -> int:
    """Bytes of the numbers in a message's arrays, without headers where they are readable."""
    arrays = [
        array for record in message.content.array_records.values() for array in record.values()
    ]
    return sum(
        len(array.data) if (value := decode_array(array)) is None else int(value.nbytes)
        for array in arrays
    )


def decode_array(array: Array) -> np.ndarray | None:
    """The numbers of an array of unknown origin; None where its bytes are no array."""
    try:
        return np.asarray(array.numpy())
    except Exception:  # numpy raises various types for malformed bytes
        return None


def personalize(message: Message, config: Mapping[str, int | str], seconds: float) -> Message:
    """A fresh copy of the strategy's message with a hospital's own `config`.

    Flower does not deliver it after `seconds`.
    """
    node = message.metadata.dst_node_id
    records = dict(message.content.items())
    merged = {**message.content.config_records[CONFIG], **config}
    return Message(
        RecordDict(records | {CONFIG: ConfigRecord(merged)}),
        node,
        message.metadata.message_type,
        ttl=seconds,
    )


def check_reply(
    member: Member, reply: Message, sent: Mapping[str, np.ndarray], wire: str = "fp32"
) -> None:
    """Raise `FederationError` unless a reply holds the keys and shapes of `sent`, all finite."""
    record = reply.content.array_records.get(ARRAYS)
    if record is None or set(record) != set(sent):
        raise FederationError(
            f"{member} replied with other arrays than were sent: its model or "
            "federation.exchange differs"
        )
    for key, array in record.items():
        value = decode_array(array)
        if value is None:
            raise FederationError(
                f"{member} replied for '{key}' with bytes that are no array: it runs another "
                "version of fedgan"
            )
        if value.shape != sent[key].shape or value.dtype != DTYPES[wire]:
            raise FederationError(
                f"{member} replied for '{key}' with {value.dtype} {value.shape}, expected "
                f"{DTYPES[wire]} {sent[key].shape}"
            )
        if not np.isfinite(widen(value, wire)).all():
            raise FederationError(
                f"{member} replied for '{key}' with values that are not finite: its training "
                "diverged; lower training.learning_rate"
            )


# --- number formats of the wire ----------------------------------------------------------------


def encode_messages(
    settings: Settings, messages: Iterable[Message], master: Mapping[str, np.ndarray]
) -> list[Message]:
    """The strategy's messages with the model in the number format of `federation.wire`.

    Raises `FederationError` when the format cannot hold a number.
    """
    if settings.federation.wire == "fp32":
        return list(messages)
    packed: ArrayRecord = to_record(pack(master, settings.federation.wire))
    return [
        Message(
            RecordDict(dict(message.content.items()) | {ARRAYS: packed}),
            message.metadata.dst_node_id,
            message.metadata.message_type,
        )
        for message in messages
    ]


def encoded_bytes(settings: Settings, master: Mapping[str, np.ndarray]) -> int:
    """Bytes of the numbers that are sent to one hospital, without headers."""
    return sum(array.size for array in master.values()) * DTYPES[settings.federation.wire].itemsize


def decode_replies(
    settings: Settings, replies: Sequence[Message], master: Mapping[str, np.ndarray]
) -> list[Message]:
    """The checked replies, with whole float32 models in the place of what was sent."""
    wire, delta = settings.federation.wire, settings.federation.delta
    if wire == "fp32" and not delta:
        return list(replies)
    received = unpack(pack(master, wire), wire)
    for reply in replies:
        reply.content[ARRAYS] = to_record(restore(model_of(reply), master, received, wire, delta))
    return list(replies)


# --- bundles -----------------------------------------------------------------------------------


class Bundler:
    """Bundles the arrays of one round of requests and unbundles the replies.

    All hospitals receive the same model, which is packed once.
    """

    def __init__(self) -> None:
        # by identity of the record, which stays valid while the record is kept here
        self.bundles: dict[int, tuple[ArrayRecord, ArrayRecord]] = {}
        self.request: bytes | None = None

    def pull(self, grid: Grid, keys: Sequence[str], seconds: float) -> list[Message]:
        """The replies that have arrived; those of too many bytes as errors (`is_too_large`).

        A reply whose upload has not ended after `seconds` is an error of Flower's.
        """
        with _bounded_pulls(grid, REST + largest_reply(self.request or b""), seconds):
            return list(grid.pull_messages(keys))

    def pack(self, message: Message) -> Message:
        """Replace the arrays of each record by one bundle, in place."""
        for name, record in list(message.content.array_records.items()):
            if id(record) not in self.bundles:
                arrays = {key: array.numpy() for key, array in record.items()}
                self.request = data = pack_bundle(arrays)
                bundle = ArrayRecord({BUNDLE: Array("uint8", (len(data),), BUNDLE, data)})
                self.bundles[id(record)] = (record, bundle)
            message.content[name] = self.bundles[id(record)][1]
        return message

    def unpack(self, reply: Message) -> None:
        """Replace the reply's bundle by its arrays.

        Raises `FederationError` for an invalid bundle, or one where no bundle was sent.
        """
        records = reply.content.array_records
        names = [name for name, record in records.items() if set(record) == {BUNDLE}]
        if names and (self.request is None or len(names) > 1):
            raise FederationError("an unexpected bundle of arrays")
        for name in names:
            arrays = unpack_bundle(records[name][BUNDLE].data, self.request)
            reply.content[name] = ArrayRecord({key: Array(array) for key, array in arrays.items()})


# --- the size of replies -----------------------------------------------------------------------

REST = 2**20  # bytes of a reply without its bundle: metrics, keys
OBJECTS = 32  # of a reply, and one more per MiB: Flower cuts arrays in pieces of 5 MiB
TOO_LARGE = "replied with more than twice the bytes that it was sent"


def is_too_large(reply: Message) -> bool:
    """Whether a reply was not pulled because of its size."""
    return reply.has_error() and TOO_LARGE in str(reply.error.reason or "")


@contextlib.contextmanager
def _bounded_pulls(grid: Grid, limit: int, seconds: float) -> Iterator[None]:
    """Stop pulling a reply at `limit` bytes: Flower would assemble one of any size first.

    Stop waiting for the upload of a reply after `seconds`: Flower would wait for hours. Only
    Flower's grid over HTTP pulls replies in pieces.
    """
    client = getattr(grid, "_runtime_client", None)
    if client is None:
        yield
        return
    grid._client = _BoundedClient(client, limit, time.monotonic() + seconds)
    try:
        yield
    finally:
        grid._client = client


class _BoundedClient:
    """Flower's client of the SuperLink with limits of bytes and objects per reply and of time.

    Flower pulls the objects of one reply with several threads, then those of the next reply.
    """

    def __init__(self, client: Any, limit: int, deadline: float) -> None:
        self.client, self.limit, self.left = client, limit, limit
        self.deadline = deadline
        self.replies: list[tuple[str, set[str]]] = []  # id and objects of replies not yet pulled
        self.lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def PullMessages(self, request: Any) -> Any:
        """Pull the list of replies with the ids of their objects."""
        response = self.client.PullMessages(request)
        self.replies = [
            (tree.object_id, {each.object_id for each in iterate_object_tree(tree)})
            for tree in response.message_object_trees
        ]
        self.left = self.limit
        return response

    def PullObject(self, request: Any) -> Any:
        """Pull an object. Raises `ObjectPullError` where its reply exceeds a limit."""
        with self.lock:
            objects = self._objects_with(request.object_id)
        if len(objects) <= OBJECTS + self.limit // 2**20:
            response = self.client.PullObject(request)
            if not response.object_available and time.monotonic() > self.deadline:
                raise ObjectPullError(request.object_id, "its upload takes too long")
            with self.lock:
                self._objects_with(request.object_id)
                self.left -= len(response.object_content)
                if self.left >= 0:
                    return response
        with self.lock:
            self._objects_with(request.object_id)
            reply = self._next()
        self.client.ConfirmMessageReceived(  # the SuperLink deletes what it has
            ConfirmMessageReceivedRequest(
                node=request.node, run_id=request.run_id, message_object_id=reply
            )
        )
        raise ObjectPullError(request.object_id, TOO_LARGE)

    def ConfirmMessageReceived(self, request: Any) -> Any:
        """Confirm that all objects of a reply were pulled."""
        self._next()
        return self.client.ConfirmMessageReceived(request)

    def _objects_with(self, object_id: str) -> set[str]:
        """The current reply's objects; `ObjectPullError` in a thread of a refused reply."""
        if not any(object_id in objects for _, objects in self.replies):
            raise ObjectPullError(object_id, TOO_LARGE)
        while object_id not in self.replies[0][1]:
            self._next()
        return self.replies[0][1]

    def _next(self) -> str:
        self.left = self.limit
        return self.replies.pop(0)[0]
