"""The server's end of the wire: what is sent for the master model, and the models that the answers stand for.

fedgan/exchange/number_formats.py says which is added to what, and why Flower's strategies then need know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict

from fedgan.config import Settings
from fedgan.exchange.number_formats import DTYPES, pack, restore, unpack
from server.records import ARRAYS, to_record


def outward(
    settings: Settings, messages: Iterable[Message], master: Mapping[str, np.ndarray]
) -> list[Message]:
    """The strategy's messages with the model as it travels. Raises `FederationError` when the wire cannot hold it."""
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


def outward_bytes(settings: Settings, master: Mapping[str, np.ndarray]) -> int:
    """Bytes of the numbers that one hospital is sent (no headers)."""
    return sum(array.size for array in master.values()) * DTYPES[settings.federation.wire].itemsize


def inward(
    settings: Settings, replies: Sequence[Message], master: Mapping[str, np.ndarray]
) -> list[Message]:
    """The checked replies with whole float32 models in the place of what travelled."""
    wire, delta = settings.federation.wire, settings.federation.delta
    if wire == "fp32" and not delta:
        return list(replies)
    received = unpack(pack(master, wire), wire)
    for reply in replies:
        arrived = {key: array.numpy() for key, array in reply.content.array_records[ARRAYS].items()}
        reply.content[ARRAYS] = to_record(restore(arrived, master, received, wire, delta))
    return list(replies)
