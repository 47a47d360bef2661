"""All arrays of a message in one piece, as a safetensors file: no pickle, and one request where each array would be two.

Flower sends every array of a record as objects of their own, each with a request of its own on every hop, signed and written into
a database. A model of a few hundred small arrays then takes its time by their number, not by their bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

from fedgan.errors import FederationError

KIND = (
    "fedgan.exchange.bundle"  # the name of the one array in the place of the others, and its kind
)
SLACK = 4096  # bytes: masked answers hold two arrays more than were sent


def seal(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays by name → the bytes of a safetensors file."""
    from safetensors.numpy import save

    return save(
        {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    )


def unseal(data: bytes, sent: bytes | None = None) -> dict[str, np.ndarray]:
    """What `seal` made → arrays by sorted name. Raises `FederationError` for bytes of anything else.

    `sent`: the parcel that this one answers, which it may not exceed by much. A header of empty arrays is short, and what has
    to be made of them is not: it is judged by its length before it is read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if sent is not None and (
        len(data) > 2 * len(sent) + SLACK or _header(data) > 2 * _header(sent) + SLACK
    ):
        raise FederationError("a parcel of arrays that is far larger than the one that was sent")
    try:
        arrays = load(data)
        return {name: arrays[name] for name in sorted(arrays)}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        # without their words, which would tell of the bytes
        raise FederationError("bytes that are no parcel of arrays") from None


def _header(data: bytes) -> int:
    """How long the header says it is."""
    return int(struct.unpack("<Q", data[:8])[0]) if len(data) >= 8 else 0
