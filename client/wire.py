"""The model that a hospital receives, and the update that it sends
(fedgan/exchange/number_formats.py).

Between machines the arrays of a record travel as one bundle (fedgan/exchange/bundle.py): the reply
to a request in bundles is in bundles.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedgan.config import Settings
from fedgan.exchange.bundle import BUNDLE, pack_bundle, unpack_bundle
from fedgan.exchange.number_formats import make_update, unpack
from fedgan.privacy.client_level import clipped_change


def received_model(message: Message, settings: Settings) -> dict[str, np.ndarray]:
    """The server's model, float32. Raises `FederationError` for another dtype."""
    arrays = {key: array.numpy() for key, array in message.content.array_records["arrays"].items()}
    return unpack(arrays, settings.federation.wire)


def update_record(
    after: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray], settings: Settings
) -> ArrayRecord:
    """The update of a hospital that trained `before` to `after`, as a record.

    With `privacy.client_level = "client"` it is clipped here. Raises `FederationError`, whose text
    names an array and settings only, when 16 bits cannot hold it.
    """
    federation, privacy = settings.federation, settings.privacy
    if privacy.client_level == "client":
        change = clipped_change(after, before, privacy.client_clip)
        after = {key: (before[key] + part).astype(np.float32) for key, part in change.items()}
    # masked are always changes: weights of magnitude 100 would exceed any range
    delta = federation.delta or federation.secure
    update = make_update(after, before, federation.wire, delta)
    return ArrayRecord({key: Array(value) for key, value in sorted(update.items())})


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
