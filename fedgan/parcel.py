"""All arrays of a message in one piece, as a safetensors file: no pickle, and one request where each array would be two.

Flower sends every array of a record as objects of their own, each with a request of its own on every hop, signed and written into
a database. A model of a few hundred small arrays then takes its time by their number, not by their bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedgan.errors import FederationError

KIND = "fedgan.parcel"  # the name of the one array in the place of the others, and its kind


def seal(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays by name → the bytes of a safetensors file."""
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()})


def unseal(data: bytes) -> dict[str, np.ndarray]:
    """What `seal` made → arrays by sorted name. Raises `FederationError` for bytes of anything else."""
    from safetensors.numpy import load

    try:
        arrays = load(data)
        return {name: arrays[name] for name in sorted(arrays)}
    except Exception:  # whatever the bytes make it say, it would tell of them
        raise FederationError("bytes that are no parcel of arrays") from None
