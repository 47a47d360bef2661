"""The hospital's end of the wire: the model that arrived, and the answer as it travels (fedgan/training/wire.py)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Message

from fedgan.config import Settings
from fedgan.training.wire import answer, unpack


def received(message: Message, settings: Settings) -> dict[str, np.ndarray]:
    """The server's model, float32. Raises `FederationError` for arrays of another dtype than `federation.wire`'s."""
    arrays = {key: array.numpy() for key, array in message.content.array_records["arrays"].items()}
    return unpack(arrays, settings.federation.wire)


def outgoing(after: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray], settings: Settings) -> ArrayRecord:
    """The answer of a hospital that made `after` of `before`.

    Raises `FederationError`, whose text names an array and settings and nothing else, when 16 bits cannot hold it.
    """
    federation = settings.federation
    delta = federation.delta or federation.secure  # what is masked are changes: weights of 100 would leave any range
    return ArrayRecord({key: Array(value) for key, value in answer(after, before, federation.wire, delta).items()})
