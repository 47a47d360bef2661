"""What a message holds: one record of arrays, the hospital's weight, and an order of its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedgan.errors import FederationError
from fedgan.training.wire import DTYPES, widen
from server.roster import Member

WEIGHT = "num_examples"
ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"


def to_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """One ArrayRecord of all arrays, by sorted key."""
    return ArrayRecord({key: Array(arrays[key]) for key in sorted(arrays)})


def array_bytes(record: Mapping[str, Array]) -> int:
    """Bytes of the numbers in a record (no headers)."""
    return sum(int(array.numpy().nbytes) for array in record.values())


def personal(message: Message, numbers: Mapping[int, Mapping[str, int]]) -> Message:
    """The strategy's message with the hospital's own numbers of images in a ConfigRecord of its own."""
    node = message.metadata.dst_node_id
    records = dict(message.content.items())
    config = {**message.content.config_records[CONFIG], **numbers[node]}
    return Message(RecordDict(records | {CONFIG: ConfigRecord(config)}), node, message.metadata.message_type)


def check_reply(member: Member, reply: Message, sent: Mapping[str, np.ndarray], wire: str = "fp32") -> None:
    """Raise `FederationError` when an answer does not hold the very arrays that were sent, as finite numbers of the wire."""
    record = reply.content.array_records.get(ARRAYS)
    if record is None or set(record) != set(sent):
        raise FederationError(f"{member} answered with other arrays than were sent: its model or federation.exchange differs")
    for key, array in record.items():
        value = array.numpy()
        if value.shape != sent[key].shape or value.dtype != DTYPES[wire]:
            raise FederationError(
                f"{member} answered '{key}' as {value.dtype} {value.shape}, sent was {DTYPES[wire]} {sent[key].shape}"
            )
        if not np.isfinite(widen(value, wire)).all():
            raise FederationError(
                f"{member} answered '{key}' with values that are not finite: its training diverged; lower training.learning_rate"
            )
