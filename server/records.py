"""What a message holds: one record of arrays, the hospital's weight, and an order of its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedgan.errors import FederationError
from fedgan.exchange.number_formats import DTYPES, widen
from fedgan.runs.participants import Member

WEIGHT = "num_examples"
ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"


def to_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """One ArrayRecord of all arrays, by sorted key."""
    return ArrayRecord({key: Array(arrays[key]) for key in sorted(arrays)})


def array_bytes(message: Message) -> int:
    """Bytes of the numbers in a message's arrays: no headers, but for arrays that cannot be read."""
    arrays = [
        array for record in message.content.array_records.values() for array in record.values()
    ]
    return sum(
        len(array.data) if (value := readable(array)) is None else int(value.nbytes)
        for array in arrays
    )


def readable(array: Array) -> np.ndarray | None:
    """The numbers of an array that somebody else has packed; None where its bytes are no array."""
    try:
        return np.asarray(array.numpy())
    except Exception:  # whatever the bytes make numpy say
        return None


def personal(message: Message, own: Mapping[str, int | str], seconds: float) -> Message:
    """A fresh copy of the strategy's message with this hospital's own order; not delivered any more after `seconds`."""
    node = message.metadata.dst_node_id
    records = dict(message.content.items())
    config = {**message.content.config_records[CONFIG], **own}
    return Message(
        RecordDict(records | {CONFIG: ConfigRecord(config)}),
        node,
        message.metadata.message_type,
        ttl=seconds,
    )


def check_reply(
    member: Member, reply: Message, sent: Mapping[str, np.ndarray], wire: str = "fp32"
) -> None:
    """Raise `FederationError` when an answer does not hold the very arrays that were sent, as finite numbers of the wire."""
    record = reply.content.array_records.get(ARRAYS)
    if record is None or set(record) != set(sent):
        raise FederationError(
            f"{member} answered with other arrays than were sent: its model or federation.exchange differs"
        )
    for key, array in record.items():
        value = readable(array)
        if value is None:
            raise FederationError(
                f"{member} answered '{key}' with bytes that are no array: its fedgan is of another version"
            )
        if value.shape != sent[key].shape or value.dtype != DTYPES[wire]:
            raise FederationError(
                f"{member} answered '{key}' as {value.dtype} {value.shape}, sent was {DTYPES[wire]} {sent[key].shape}"
            )
        if not np.isfinite(widen(value, wire)).all():
            raise FederationError(
                f"{member} answered '{key}' with values that are not finite: its training diverged; lower training.learning_rate"
            )
