"""The server's parcels (fedgan/exchange/bundle.py): what is sent to hospitals that are elsewhere, and what comes back from them."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, Message

from fedgan.errors import FederationError
from fedgan.exchange.bundle import BUNDLE, pack_bundle, unpack_bundle


class Parcels:
    """Parcels of one question's messages and of their answers: all hospitals are sent the same model, which is packed once."""

    def __init__(self) -> None:
        self.made: dict[
            int, tuple[ArrayRecord, ArrayRecord]
        ] = {}  # by identity, which holds while the record is kept here
        self.sent: bytes | None = None

    def close(self, message: Message) -> Message:
        """The message with a parcel in the place of each record's arrays."""
        for name, record in list(message.content.array_records.items()):
            if id(record) not in self.made:
                self.sent = data = pack_bundle(
                    {key: array.numpy() for key, array in record.items()}
                )
                self.made[id(record)] = (
                    record,
                    ArrayRecord({BUNDLE: Array("uint8", (len(data),), BUNDLE, data)}),
                )
            message.content[name] = self.made[id(record)][1]
        return message

    def open(self, answer: Message) -> None:
        """Put arrays in the place of the answer's parcel. Raises `FederationError` for what is none, or was not asked for."""
        names = [
            name for name, record in answer.content.array_records.items() if set(record) == {BUNDLE}
        ]
        if names and (self.sent is None or len(names) > 1):
            raise FederationError("a bundle of arrays that was not asked for")
        for name in names:
            arrays = unpack_bundle(answer.content.array_records[name][BUNDLE].data, self.sent)
            answer.content[name] = ArrayRecord({key: Array(array) for key, array in arrays.items()})
