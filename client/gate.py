"""Outbound gate: every reply of a hospital is checked, written to the outbound log, and only then
sent.

`OutboundGate` encloses the whole ClientApp, handlers and mods, so that no reply bypasses the check.
client/allow_list.py lists what may leave. A reply with other content becomes an error that names
the kind of content; this hospital's client.log names the content itself. A reply leaves once its
line is on the disk; a failure to write the log is an error, too. Only an error in listed texts may
leave without a line, where the log cannot be written or the node has no folder for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client.allow_list import checked_content
from client.hospital import (
    LocalHospital,
    TrainRequest,
    find_local_hospital,
    log_failure,
    log_folder,
)
from client.policy import apply_policy
from client.wire import pack_bundles, unpack_bundles
from fedgan.errors import HOSPITAL_REASON, ConfigError
from fedgan.exchange.bundle import BUNDLE
from fedgan.exchange.error_messages import ERROR, FAILED, REASON, Refused, reason
from fedgan.exchange.outbound_log import (
    NAME,
    Entry,
    OutboundLog,
    Record,
    array_row,
    arrays_record,
    values_record,
)

# Not Flower's other names of the same handlers, such as train.default.
MESSAGES = ("query.hello", "train")


class OutboundGate(ClientApp):
    """A ClientApp whose requests pass the hospital's own rules, and whose replies pass the
    allow-list and the outbound log.
    """

    def __call__(self, message: Message, context: Context) -> Message:
        """Reply to `message`. Raises nothing: an exception's text would reach the server."""
        guard = ReplyGuard(message, context)
        try:
            guard.admit()
            guard.unpack_request()
            reply = super().__call__(message, context)
        except Exception as error:
            reply = guard.error_reply(error)
        return guard.release(reply)


class Admission:
    """A request at one hospital, and the rules that it must pass before any work.

    `step`: the current step, for the report of a failure. `request` and `local` are None until they
    are known; `request` is lowered to the node's policy (client/policy.py).
    """

    def __init__(self, message: Message, context: Context) -> None:
        self.message, self.node = message, context.node_config
        self.step = "replying"
        self.request: TrainRequest | None = None
        self.asked: TrainRequest | None = None  # before the policy
        self.local: LocalHospital | None = None

    def admit(self) -> tuple[TrainRequest, LocalHospital]:
        """Apply the hospital's policy and the experiment's pinned settings.

        Raises `ConfigError` for a request beyond them, `DataError` for a shard that does not open.
        """
        self.at("reading the request")
        if (kind := self.message.metadata.message_type) not in MESSAGES:
            raise ConfigError(f"a message of type '{kind}' in place of {' or '.join(MESSAGES)}")
        asked = self.asked = TrainRequest.read(self.message.content.config_records["config"])
        self.request = asked
        request = self.request = apply_policy(asked, self.node, self.at)
        self.at("opening its shard")
        local = self.local = find_local_hospital(request, self.node)
        self.at("comparing the request with its pinned settings")
        local.check_pins(asked, kind == "train")
        self.at("replying")
        return request, local

    def at(self, step: str) -> None:
        """Set the current step."""
        self.step = step

    def folder(self) -> Path | None:
        """Folder of this hospital's client.log."""
        if self.local is not None:
            return self.local.folder
        if state_dir := str(self.node.get("state-dir", "")):
            return Path(state_dir)
        return (
            log_folder(self.request, self.node)
            if self.request and "partition-id" in self.node
            else None
        )

    def error_reply(self, error: Exception, step: str = "") -> Message:
        """Error reply for the exception being handled; its traceback goes to client.log."""
        step = step or self.step
        self.log_failure(step)
        partition_id = None if self.local else self.node.get("partition-id")
        return failure(self.message, reason(error, step, partition_id))

    def log_failure(self, step: str) -> None:
        """Append the exception being handled to client.log."""
        log_failure(self.folder(), self.request.round if self.request else 0, step)


class ReplyGuard(Admission):
    """Checks and logs the reply to one message; finds the hospital without any handler."""

    has_bundles = False

    def unpack_request(self) -> None:
        """Unpack the request's bundles. Raises `FederationError` for a broken one."""
        self.has_bundles = not self.message.has_error() and unpack_bundles(self.message.content)

    def release(self, reply: Message) -> Message:
        """Check and log the reply; return it as it leaves, or an error instead."""
        packed = None
        try:
            reply = self._checked(reply)
            if self.has_bundles and not reply.has_error():
                packed = pack_bundles(reply.content)
        except Refused as refusal:
            self.log_failure("checking the reply")
            reply = failure(self.message, f"{HOSPITAL_REASON}refused to send {refusal.what}")
        except Exception as error:
            reply = self.error_reply(error, "checking the reply")
        try:
            self._write_log(reply, packed)
        except Exception as error:
            return self.error_reply(error, "writing its outbound log")
        if packed is not None and not reply.has_error():
            reply.content = packed
        return reply

    def _checked(self, reply: Message) -> Message:
        if reply.has_error():
            text = str(reply.error.reason)
            if reply.error.code != FAILED or not REASON.fullmatch(text):
                raise Refused(ERROR, f"code {reply.error.code}, '{text}'")
            return failure(self.message, text)
        if self.request is None or self.local is None:
            raise ConfigError("a reply of an unknown hospital")
        content = checked_content(self.message, reply, self.request, self.local)
        return Message(content, reply_to=self.message)

    def _write_log(self, reply: Message, packed: RecordDict | None) -> None:
        path = self.local.outbound if self.local else None
        if path is None and (folder := self.folder()):
            path = folder / NAME
        if path is None:
            if not reply.has_error():
                raise ConfigError("this hospital has no folder for its outbound log")
            return
        experiment, number = (
            (self.request.experiment, self.request.round) if self.request else ("", 0)
        )
        records = list(records_of(reply, packed))
        OutboundLog(path).append(
            Entry.of(experiment, number, self.message.metadata.message_type, records)
        )


def failure(message: Message, text: str) -> Message:
    """An error reply."""
    return Message(Error(FAILED, text), reply_to=message)


def records_of(reply: Message, packed: RecordDict | None = None) -> Iterator[Record]:
    """Records of a reply for the outbound log. `packed`: its content in bundles, as it leaves."""
    if reply.has_error():
        yield values_record(
            "error", "error", {"code": reply.error.code, "reason": reply.error.reason}
        )
        return
    content: RecordDict = reply.content
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            bundle = packed.array_records[name][BUNDLE].data if packed else None
            yield arrays_record(
                name,
                [array_row(key, each.dtype, each.shape, each.data) for key, each in record.items()],
                bundle,
            )
        else:
            yield values_record(name, "values", record)
