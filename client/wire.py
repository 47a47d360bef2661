"""The hospital's end of the wire: the model that arrived, and the answer as it travels (fedgan/exchange/number_formats.py).

Between machines the arrays of a record travel in one parcel (fedgan/exchange/bundle.py): a question in parcels is answered in parcels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

from fedgan.config import Settings
from fedgan.exchange.bundle import KIND, seal, unseal
from fedgan.exchange.number_formats import answer, unpack


def received(message: Message, settings: Settings) -> dict[str, np.ndarray]:
    """The server's model, float32. Raises `FederationError` for arrays of another dtype than `federation.wire`'s."""
    arrays = {key: array.numpy() for key, array in message.content.array_records["arrays"].items()}
    return unpack(arrays, settings.federation.wire)


def outgoing(
    after: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray], settings: Settings
) -> ArrayRecord:
    """The answer of a hospital that made `after` of `before`.

    Raises `FederationError`, whose text names an array and settings and nothing else, when 16 bits cannot hold it.
    """
    federation = settings.federation
    delta = (
        federation.delta or federation.secure
    )  # what is masked are changes: weights of 100 would leave any range
    return ArrayRecord(
        {
            key: Array(value)
            for key, value in sorted(answer(after, before, federation.wire, delta).items())
        }
    )


def open_parcels(content: RecordDict) -> bool:
    """Put arrays in the place of parcels; whether there were any. Raises `FederationError` for one that is none."""
    parcels = {
        name: record for name, record in content.array_records.items() if set(record) == {KIND}
    }
    for name, record in parcels.items():
        content[name] = ArrayRecord(
            {key: Array(array) for key, array in unseal(record[KIND].data).items()}
        )
    return bool(parcels)


def in_parcels(content: RecordDict) -> RecordDict:
    """The records with a parcel in the place of each one's arrays."""
    records = dict(content.items())
    for name, record in content.array_records.items():
        data = seal({key: array.numpy() for key, array in record.items()})
        records[name] = ArrayRecord({KIND: Array("uint8", (len(data),), KIND, data)})
    return RecordDict(records)
