"""Content of the server's messages: arrays, their number format on the wire, bundles, checks.

The algebra of the wire formats is in fedgan/exchange/number_formats.py. Strategies see whole
float32 models only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedgan.config import Settings
from fedgan.errors import FederationError
from fedgan.exchange.bundle import BUNDLE, pack_bundle, unpack_bundle
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
