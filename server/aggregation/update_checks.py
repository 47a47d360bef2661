"""Checks that every reply passes before its update can move the model.

A reply must hold exactly the arrays that were sent, finite, for the requested round, with the
numbers of images of the hospital's introduction and of the request. Then the length of its update
is compared with the others' (`federation.max_update_ratio`). This finds a scaled update, not one
that is merely wrong; use the robust strategies (fedmedian, krum) against those.
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


def check_update(
    member: Member,
    reply: Message,
    sent: Mapping[str, np.ndarray],
    round_number: int,
    images: int,
    wire: str = "fp32",
) -> None:
    """Raise `FederationError` for a reply that must not count.

    `images`: the number that the hospital was requested to train on in this round.
    """
    check_reply(member, reply, sent, wire)
    check_facts(member, reply, round_number, images)


def check_facts(member: Member, reply: Message, round_number: int, images: int) -> None:
    """The part of `check_update` about the numbers beside the model."""
    facts = reply.content.config_records.get(FACTS)
    weight = (reply.content.metric_records.get(METRICS) or {}).get(WEIGHT)
    if facts is None or any(not _is_count(facts.get(key)) for key in COUNTS):
        raise FederationError(
            f"{member} does not report {', '.join(COUNTS)} as whole numbers: it runs another "
            "version of fedgan"
        )
    if facts["round"] != round_number:
        raise FederationError(
            f"{member} replied for round {facts['round']}, the request was for round {round_number}"
        )
    if facts["images"] > images:
        raise FederationError(
            f"{member} claims {facts['images']} images in this round, the request was for {images}"
        )
    if weight != member.images:
        raise FederationError(
            f"{member} claims {WEIGHT} = {weight}, its introduction said {member.images}"
        )


def check_exhausted(settings: Settings, member: Member, reply: Message) -> None:
    """Raise `FederationError` for a spent privacy budget in a run without one."""
    if reply.content.config_records[FACTS].get("exhausted") and not settings.privacy.on:
        raise FederationError(
            f"{member} reports a spent privacy budget in a run without privacy: it runs another "
            "version of fedgan"
        )


def _is_count(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value == int(value) >= 0
    )


def update_length(reply: Message, sent: Mapping[str, np.ndarray], images: int) -> float:
    """Euclidean length of an update over √images, as the length of a random walk grows."""
    record = reply.content.array_records[ARRAYS]
    with np.errstate(over="ignore"):  # an infinite length is a valid result
        squares = sum(
            float(np.square(record[key].numpy().astype(np.float64) - sent[key]).sum())
            for key in sent
        )
    return math.sqrt(squares) / math.sqrt(max(images, 1))


def find_too_long(settings: Settings, lengths: Sequence[float]) -> list[bool]:
    """Which updates exceed `federation.max_update_ratio` times the (lower) median length.

    Updates of length 0 are left out of the median. With client-level DP none is rejected: each
    update is clipped, and one hospital's must not influence whether another one counts.
    """
    limit = settings.federation.max_update_ratio
    nonzero = [length for length in lengths if length > 0]
    if not nonzero or not limit or settings.privacy.client_level != "none":
        return [False] * len(lengths)
    median = statistics.median_low(nonzero)
    return [length > limit * median for length in lengths]
