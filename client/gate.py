"""The one door of a hospital: every answer is checked, written into the outbound log, and only then given out.

`Gate` stands round the whole ClientApp, handlers and mods alike, so that nothing that any of them answers leaves unchecked.
What may leave is listed in client/allow_list.py; an answer that holds anything else becomes an error that names the kind of thing,
and this hospital's client.log says which it was. An answer leaves when its line is on the disk: a log that cannot be written
is an error, too. Only an error may leave without a line, in listed words, where the log cannot be written or the node has
no place for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client.allow_list import checked
from client.error_messages import ERROR, FAILED, REASON, Refused, reason
from client.hospital import (
    LocalHospital,
    TrainRequest,
    apply_epsilon_cap,
    check_secure,
    find_local_hospital,
    log_failure,
    log_folder,
)
from client.wire import in_parcels, open_parcels
from fedgan.errors import HOSPITAL_REASON, ConfigError
from fedgan.exchange.bundle import KIND
from fedgan.exchange.outbound_log import (
    NAME,
    Entry,
    OutboundLog,
    Record,
    array_row,
    arrays_record,
    values_record,
)


class Gate(ClientApp):
    """A ClientApp whose answers leave by the door of this module."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer `message`; no exception leaves, because its text would go to the server."""
        door = ReplyGuard(message, context)
        try:
            door.open()
            reply = super().__call__(message, context)
        except Exception as error:
            reply = door.failed(error, "answering")
        return door.give_out(reply)


class ReplyGuard:
    """The way out for the answer to one message. It finds out by itself whose answer it is, and trusts no handler."""

    def __init__(self, message: Message, context: Context) -> None:
        self.message, self.node = message, context.node_config
        self.request: TrainRequest | None = None
        self.local: LocalHospital | None = None
        self.parcels = False
        self.unknown: Exception | None = None  # why it is not known whose answer it is

    def open(self) -> None:
        """Unpack what the message brings. Raises `FederationError` for a parcel that is none."""
        self.parcels = not self.message.has_error() and open_parcels(self.message.content)

    def give_out(self, reply: Message) -> Message:
        """The reply as it leaves, in the log; or an error in its place."""
        sealed = None
        try:
            self._find()
            reply = self._checked(reply)
            if self.parcels and not reply.has_error():
                sealed = in_parcels(reply.content)
        except Refused as refusal:
            self._log("checking what leaves")
            reply = failure(self.message, f"{HOSPITAL_REASON}refused to send {refusal.what}")
        except Exception as error:
            reply = self.failed(error, "checking what leaves")
        try:
            self._note(reply, sealed)
        except Exception as error:
            return self.failed(error, "writing its outbound log")
        if sealed is not None and not reply.has_error():
            reply.content = sealed
        return reply

    def failed(self, error: Exception, doing: str) -> Message:
        """The error reply for an exception that is being handled; its traceback goes to this hospital's log."""
        self._log(doing)
        return failure(self.message, reason(error, doing))

    def _find(self) -> None:
        """Whose answer it is, as far as that can be known: a hospital that cannot open its shard answers with an error.

        So does one whose own rules refuse the run: without a site no answer but an error leaves.
        """
        try:
            self.request = TrainRequest.read(self.message.content.config_records["config"])
            self.request = apply_epsilon_cap(self.request, self.node)
            check_secure(self.request, self.node)
            self.local = find_local_hospital(self.request, self.node)
        except Exception as error:
            self.unknown = error

    def _checked(self, reply: Message) -> Message:
        if reply.has_error():
            words = str(reply.error.reason)
            if reply.error.code != FAILED or not REASON.fullmatch(words):
                raise Refused(ERROR, f"code {reply.error.code}, '{words}'")
            return failure(self.message, words)
        if self.request is None or self.local is None:
            raise ConfigError("an answer of a hospital that does not know itself") from self.unknown
        return Message(
            checked(self.message, reply, self.request, self.local), reply_to=self.message
        )

    def _note(self, reply: Message, sealed: RecordDict | None) -> None:
        place = self._place()
        if place is None:
            if not reply.has_error():
                raise ConfigError("this hospital has no place for its outbound log")
            return
        experiment, number = (
            (self.request.experiment, self.request.round) if self.request else ("", 0)
        )
        entry = Entry.of(
            experiment, number, self.message.metadata.message_type, list(records_of(reply, sealed))
        )
        OutboundLog(place).append(entry)

    def _place(self) -> Path | None:
        if self.local is not None:
            return self.local.outbound
        folder = self._folder()
        return folder / NAME if folder else None

    def _folder(self) -> Path | None:
        """Where this hospital's own log lies."""
        if self.local is not None:
            return self.local.folder
        if own := str(self.node.get("state-dir", "")):
            return Path(own)
        return (
            log_folder(self.request, self.node)
            if self.request and "partition-id" in self.node
            else None
        )

    def _log(self, doing: str) -> None:
        log_failure(self._folder(), self.request.round if self.request else 0, doing)


def failure(message: Message, words: str) -> Message:
    """An error reply."""
    return Message(Error(FAILED, words), reply_to=message)


def records_of(reply: Message, sealed: RecordDict | None = None) -> Iterator[Record]:
    """The records of a reply as the outbound log holds them. `sealed`: with its arrays in parcels, as it leaves."""
    if reply.has_error():
        yield values_record(
            "error", "error", {"code": reply.error.code, "reason": reply.error.reason}
        )
        return
    content: RecordDict = reply.content
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            parcel = sealed.array_records[name][KIND].data if sealed else None
            yield arrays_record(
                name,
                [array_row(key, each.dtype, each.shape, each.data) for key, each in record.items()],
                parcel,
            )
        else:
            yield values_record(name, "values", record)
