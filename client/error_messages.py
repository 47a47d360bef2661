"""What a hospital says of its errors: one line in listed words. No message of an exception leaves, it may hold anything."""

from __future__ import annotations

import builtins
import re

import torch

import fedgan.errors
from fedgan.errors import HOSPITAL_REASON, FedganError

FAILED = 2  # Flower's code for "the ClientApp raised": the only one that an error of a hospital has

DOING = (  # N: a round's number
    "reading the server's order",
    "holding the order against its own max-epsilon",
    "holding the order against its own require-secure",
    "opening its shard",
    "beginning its work",
    "introducing itself",
    "preparing the training",
    "loading its state of round N",
    "preparing its folder",
    "taking over the server's model",
    "training round N",
    "saving its state of round N",
    "giving out its model in the numbers of federation.wire",
    "answering",
    "checking what leaves",
    "writing its outbound log",
)
# What the server is told of a refusal.
MESSAGE, RECORD, ERROR = (
    "a message that is not listed",
    "a record that is not listed",
    "an error in words that are not listed",
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
    for kind in vars(builtins).values()
    if isinstance(kind, type) and issubclass(kind, Exception)
}
KINDS |= {
    kind
    for kind in vars(fedgan.errors).values()
    if isinstance(kind, type) and issubclass(kind, Exception)
}
KINDS |= {torch.OutOfMemoryError}
_PHRASE = "|".join(re.escape(phrase).replace("N", r"[0-9]{1,6}") for phrase in DOING)
_NAMES = "|".join(sorted(kind.__name__ for kind in KINDS))
REASON = re.compile(
    rf"{HOSPITAL_REASON}(?:(?:{_NAMES}) while (?:{_PHRASE})(?: \(partition-id [0-9]{{1,4}}\))?"
    rf"|refused to send (?:{'|'.join(map(re.escape, REFUSALS))}))"
)


class Refused(FedganError):
    """An answer holds something that may not leave. `what` may be told to the server, the message itself stays here."""

    def __init__(self, what: str, detail: str) -> None:
        super().__init__(f"refused to send {what}: {detail}")
        self.what = what


def reason(error: BaseException, doing: str, who: object = None) -> str:
    """One line for the server: the kind of an error and what was being done, in words that are listed; `who`: a partition-id.

    Of an exception that is not among `KINDS` the kind is that of its nearest ancestor which is: a class may have any name.
    """
    kind = next(kind.__name__ for kind in [*type(error).__mro__, Exception] if kind in KINDS)
    phrase = doing if re.fullmatch(_PHRASE, doing) else "answering"
    place = f" (partition-id {who})" if re.fullmatch(r"[0-9]{1,4}", str(who)) else ""
    return f"{HOSPITAL_REASON}{kind} while {phrase}{place}"
