"""The model that a hospital receives, and the update that it sends
(fedgan/exchange/number_formats.py).

Between machines the arrays of a record travel as one bundle (fedgan/exchange/bundle.py): the reply
to a request in bundles is in bundles.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.mod import fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable

from fedgan.config import Settings
from fedgan.errors import ConfigError
from fedgan.exchange.bundle import BUNDLE, pack_bundle, unpack_bundle
from fedgan.exchange.number_formats import make_update, unpack

CLIPPING_NORM = "clipping_norm"  # Flower's key, sent by the wrapper of the server's strategy


def received_model(message: Message, settings: Settings) -> dict[str, np.ndarray]:
    """The server's model, float32. Raises `FederationError` for another dtype."""
    arrays = {key: array.numpy() for key, array in message.content.array_records["arrays"].items()}
    return unpack(arrays, settings.federation.wire)


def update_record(
    after: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray], settings: Settings
) -> ArrayRecord:
    """The update of a hospital that trained `before` to `after`, as a record.

    Raises `FederationError`, whose text names an array and settings only, when 16 bits cannot hold
    it.
    """
    federation = settings.federation
    # masked are always changes: weights of magnitude 100 would exceed any range
    delta = federation.delta or federation.secure
    update = make_update(after, before, federation.wire, delta)
    return ArrayRecord({key: Array(value) for key, value in sorted(update.items())})


def check_clip(message: Message, settings: Settings) -> None:
    """Raise `ConfigError` where the settings have a clip here and the request does not ask for it.

    Flower's mod clips only what the request asks for.
    """
    privacy = settings.privacy
    if privacy.client_level != "client" or message.metadata.message_type != "train":
        return
    norms = [
        config[CLIPPING_NORM]
        for config in message.content.config_records.values()
        if CLIPPING_NORM in config
    ]
    if len(norms) != 1 or not 0 < float(norms[0]) <= privacy.client_clip:
        raise ConfigError(
            f"privacy.client_level = 'client' clips here at {privacy.client_clip:g}, and the "
            f"request has {norms or 'none'}"
        )


def clip_update(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower mod: clip the update where the server's strategy requests it (`fixedclipping_mod`).

    A reply without any change passes unclipped, because Flower would divide by the norm of the
    change.
    """
    is_requested = any(
        CLIPPING_NORM in config for config in message.content.config_records.values()
    )
    before = {
        key: array.numpy()
        for record in message.content.array_records.values()
        for key, array in record.items()
    }
    reply = call_next(message, context)
    if (
        not is_requested
        or reply.has_error()
        or not _has_changed(before, next(iter(reply.content.array_records.values())))
    ):
        return reply
    return fixedclipping_mod(message, context, lambda *_: reply)


def _has_changed(before: Mapping[str, np.ndarray], after: Mapping[str, Array]) -> bool:
    return any(
        not np.array_equal(before.get(key, np.nan), array.numpy()) for key, array in after.items()
    )


def unpack_bundles(content: RecordDict) -> bool:
    """Replace bundles by their arrays; return whether there were any. Raises `FederationError`."""
    bundles = {
        name: record for name, record in content.array_records.items() if set(record) == {BUNDLE}
    }
    for name, record in bundles.items():
        content[name] = ArrayRecord(
            {key: Array(array) for key, array in unpack_bundle(record[BUNDLE].data).items()}
        )
    return bool(bundles)


def pack_bundles(content: RecordDict) -> RecordDict:
    """The records, with one bundle instead of each record's arrays."""
    records = dict(content.items())
    for name, record in content.array_records.items():
        data = pack_bundle({key: array.numpy() for key, array in record.items()})
        records[name] = ArrayRecord({BUNDLE: Array("uint8", (len(data),), BUNDLE, data)})
    return RecordDict(records)
