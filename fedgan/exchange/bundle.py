"""Bundle: all arrays of a message as one safetensors file, so that they travel in one request.

Flower sends every array of a record as an object with its own requests on every hop, each signed
and stored in a database. A model of a few hundred small arrays then takes time by their number, not
by their bytes. Safetensors needs no pickle.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

from fedgan.errors import FederationError

BUNDLE = "fedgan.bundle"  # name and serialization type of the one array that replaces the others
SLACK = 4096  # bytes: masked replies hold two arrays more than the request


def pack_bundle(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays by name → the bytes of a safetensors file."""
    from safetensors.numpy import save

    return save(
        {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    )


def unpack_bundle(data: bytes, request: bytes | None = None) -> dict[str, np.ndarray]:
    """Bytes of `pack_bundle` → arrays by sorted name. Raises `FederationError` for any other bytes.

    `request`: the bundle that this one replies to and may not exceed by much. Both lengths are
    checked before the header is parsed, because a short header of many empty arrays expands to many
    objects.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if request is not None and (
        len(data) > largest_reply(request)
        or _header_bytes(data) > 2 * _header_bytes(request) + SLACK
    ):
        raise FederationError("a bundle of arrays that is far larger than the one that was sent")
    try:
        arrays = load(data)
        return {name: arrays[name] for name in sorted(arrays)}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        # without the library's message, which quotes the bytes
        raise FederationError("bytes that are no bundle of arrays") from None


def largest_reply(request: bytes) -> int:
    """Bytes that a bundle may have in reply to `request`."""
    return 2 * len(request) + SLACK


def _header_bytes(data: bytes) -> int:
    """The length that the header claims."""
    return int(struct.unpack("<Q", data[:8])[0]) if len(data) >= 8 else 0
