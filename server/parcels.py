"""The server's parcels (fedgan/parcel.py): what is sent to hospitals that are elsewhere, and what comes back from them."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, Message

from fedgan.parcel import KIND, seal, unseal


class Parcels:
    """Parcels of the records of one question's messages: all hospitals are sent the same model, which is packed once."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[ArrayRecord, ArrayRecord]] = {}  # by identity, which holds while the record is kept here

    def close(self, message: Message) -> Message:
        """The message with a parcel in the place of each record's arrays."""
        for name, record in list(message.content.array_records.items()):
            if id(record) not in self.made:
                data = seal({key: array.numpy() for key, array in record.items()})
                self.made[id(record)] = record, ArrayRecord({KIND: Array("uint8", (len(data),), KIND, data)})
            message.content[name] = self.made[id(record)][1]
        return message


def open_parcels(answer: Message) -> None:
    """Put arrays in the place of an answer's parcels. Raises `FederationError` for one that is none."""
    for name, record in list(answer.content.array_records.items()):
        if set(record) == {KIND}:
            answer.content[name] = ArrayRecord({key: Array(array) for key, array in unseal(record[KIND].data).items()})
