"""Which answers of a round count: a hospital's update is checked before it can move the model.

An answer must hold the very arrays that were sent, finite, for the round that was asked, with the numbers of images that the
hospital was introduced with and was asked for. Then its update's length is held against the others'
(`federation.max_update_ratio`): a scaled update is found, one that is merely wrong is not; that is what the robust strategies are
for (fedmedian, krum).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Message

from fedgan.config import Settings
from fedgan.errors import FederationError
from fedgan.exchange.round_metrics import COUNTS
from fedgan.runs.participants import Member
from server.records import ARRAYS, METRICS, WEIGHT, check_reply

FACTS = "facts"


def check_answer(
    member: Member,
    reply: Message,
    sent: Mapping[str, np.ndarray],
    round_number: int,
    images: int,
    wire: str = "fp32",
) -> None:
    """Raise `FederationError` for an answer that must not count. `images`: what the hospital was asked to show in this round."""
    check_reply(member, reply, sent, wire)
    check_facts(member, reply, round_number, images)


def check_facts(member: Member, reply: Message, round_number: int, images: int) -> None:
    """The part of `check_answer` that is about the numbers beside the model."""
    facts = reply.content.config_records.get(FACTS)
    claimed = (reply.content.metric_records.get(METRICS) or {}).get(WEIGHT)
    if facts is None or any(not _count(facts.get(key)) for key in COUNTS):
        raise FederationError(
            f"{member} does not tell {', '.join(COUNTS)} as whole numbers: its fedgan is of another version"
        )
    if facts["round"] != round_number:
        raise FederationError(
            f"{member} answers for round {facts['round']}, and round {round_number} was asked for"
        )
    if facts["images"] > images:
        raise FederationError(
            f"{member} claims {facts['images']} images in this round, and was asked for {images}"
        )
    if claimed != member.images:
        raise FederationError(
            f"{member} claims {WEIGHT} = {claimed}, and was introduced with {member.images}"
        )


def _count(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value == int(value) >= 0
    )


def length_for_images(reply: Message, sent: Mapping[str, np.ndarray], images: int) -> float:
    """Euclidean length of an update over the root of the images behind it, because steps add up like a walk."""
    record = reply.content.array_records[ARRAYS]
    with np.errstate(over="ignore"):  # an infinite length is a long one
        squares = sum(
            float(np.square(record[key].numpy().astype(np.float64) - sent[key]).sum())
            for key in sent
        )
    return math.sqrt(squares) / math.sqrt(max(images, 1))


def too_long(settings: Settings, lengths: Sequence[float]) -> list[bool]:
    """Which updates of a round are longer than `federation.max_update_ratio` medians; the lower median where there are two.

    Updates of nothing (length 0) are no measure. Where whole hospitals are private, Flower's clipping bounds each update, and one
    hospital's update must not decide over the others': nobody is rejected then.
    """
    limit = settings.federation.max_update_ratio
    moved = [length for length in lengths if length > 0]
    if not moved or not limit or settings.privacy.client_level != "none":
        return [False] * len(lengths)
    median = statistics.median_low(moved)
    return [length > limit * median for length in lengths]
