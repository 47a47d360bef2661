"""Errors that a hospital may send: one line of listed texts, never the message of an exception."""

from __future__ import annotations

import builtins
import re

import torch

import fedgan.errors
from fedgan.errors import HOSPITAL_REASON, FedganError

FAILED = 2  # Flower's code for "the ClientApp raised", the only code of a hospital's error

STEPS = (  # N: number of a round
    "reading the request",
    "reading its node-config",
    "applying its max-epsilon",  # and the other keys of client/policy.py
    "applying its max-delta",
    "applying its min-noise",
    "applying its unit",
    "applying its require-secure",
    "applying its min-images",
    "applying its min-batch",
    "applying its max-images",
    "applying its max-seconds",
    "applying its max-threads",
    "applying its state-quota",
    "applying its allow-families",
    "applying its allow-exchange",
    "opening its shard",
    "comparing the request with its pinned settings",
    "comparing the request with its states",
    "waiting for its other process",
    "starting the work",
    "describing its data",
    "preparing the training",
    "loading its state of round N",
    "loading the server's model",
    "training round N",
    "saving its state of round N",
    "encoding its update for federation.wire",
    "replying",
    "checking the reply",
    "writing its outbound log",
)
# What a refusal reports to the server.
MESSAGE, RECORD, ERROR = (
    "a message that is not listed",
    "a record that is not listed",
    "an error text that is not listed",
)
ARRAY, SHAPE = "an array that is not listed", "an array of another type or shape"
VALUE, TYPE, FOREIGN = (
    "a value that is not listed",
    "a value of another type",
    "a value that is not its own",
)
REFUSALS = (MESSAGE, RECORD, ERROR, ARRAY, SHAPE, VALUE, TYPE, FOREIGN)

KINDS = {
    kind
    for module in (builtins, fedgan.errors)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Exception)
} | {torch.OutOfMemoryError}
_STEPS = "|".join(re.escape(step).replace("N", r"[0-9]{1,6}") for step in STEPS)
_NAMES = "|".join(sorted(kind.__name__ for kind in KINDS))
REASON = re.compile(
    rf"{HOSPITAL_REASON}(?:(?:{_NAMES}) while (?:{_STEPS})(?: \(partition-id [0-9]{{1,4}}\))?"
    rf"|refused to send (?:{'|'.join(map(re.escape, REFUSALS))}))"
)


class Refused(FedganError):
    """A reply holds content that may not leave. `what` may reach the server, the message not."""

    def __init__(self, what: str, detail: str) -> None:
        super().__init__(f"refused to send {what}: {detail}")
        self.what = what


def reason(error: BaseException, step: str, partition_id: object = None) -> str:
    """One line for the server: kind of the error and failed step, in listed texts.

    An exception class that is not in `KINDS` is named by its nearest listed ancestor, because a
    class may have any name.
    """
    kind = next(kind.__name__ for kind in [*type(error).__mro__, Exception] if kind in KINDS)
    listed = step if re.fullmatch(_STEPS, step) else "replying"
    is_id = re.fullmatch(r"[0-9]{1,4}", str(partition_id))
    hospital = f" (partition-id {partition_id})" if is_id else ""
    return f"{HOSPITAL_REASON}{kind} while {listed}{hospital}"
