"""What a round's line of metrics.jsonl says of the hospitals, and how an absence is told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import Message

from fedgan.config import Settings
from fedgan.exchange.round_metrics import COUNTS, MEANS
from fedgan.runs.participants import Member, hospital_label
from fedgan.runs.round_state import State
from server.aggregation.update_checks import FACTS
from server.records import METRICS, WEIGHT
from server.requests import LATE


def absence_note(absence: Mapping[str, Any], number: int) -> str:
    """What a hospital that was left out of round `number` is told of it with its next order."""
    return f"the answer of round {number} did not count ({absence['what']}: {absence['why']})"


def describe_absence(absence: Mapping[str, Any], number: int, settings: Settings) -> str:
    """Who is left out of round `number` and why, in one line."""
    who, why = hospital_label(absence["number"], absence["name"]), absence["why"]
    if absence["what"] == "rejected":
        return f"in round {number} {why}"  # which names the hospital
    if why == LATE:
        limit = f"federation.round_timeout = {settings.federation.round_timeout:g} s"
        return f"{who} did not answer in round {number} within {limit}: see its log, or raise the timeout"
    return f"{who} failed in round {number}: {why}"


def exhausted_now(
    members: Sequence[Member], facts: Sequence[Mapping[str, Any]], number: int
) -> list[dict[str, Any]]:
    """The hospitals that said in round `number` that their privacy ledger allows no more."""
    return [
        {
            "name": member.name,
            "number": member.number,
            "images": member.images,
            "units": member.units,
            "round": number,
        }
        for member, row in zip(members, facts, strict=True)
        if row.get("exhausted")
    ]


def exhausted_status(state: State, settings: Settings) -> dict[str, Any]:
    """What a round's line says of spent budgets: `exhausted`, the names until now, and `ended` where too few are left."""
    if not state.exhausted:
        return {}
    why = state.ended_early(settings) if state.round < settings.federation.rounds else ""
    names = sorted(row["name"] for row in state.exhausted)
    return {"exhausted": names} | ({"ended": why} if why else {})


def hospital_line(member: Member, reply: Message) -> dict[str, Any]:
    """The hospital's part of the round's line: name, num_examples, images_seen, seconds, threads and its means."""
    facts = dict(reply.content.config_records[FACTS])
    row: dict[str, Any] = {
        "name": member.name,
        WEIGHT: reply.content.metric_records[METRICS][WEIGHT],
    }
    counts = {key: int(facts.pop(key)) for key in COUNTS}
    del counts["round"]
    return row | counts | plain_numbers(facts)


def plain_numbers(facts: Mapping[str, Any]) -> dict[str, float | None]:
    """The finite numbers among the facts; an epsilon that is infinite (no noise) as None, because JSON knows no infinity."""
    found: dict[str, float | None] = {
        key: value
        for key, value in facts.items()
        if isinstance(value, float) and math.isfinite(value)
    }
    return found | ({"epsilon": None} if "epsilon" in facts and "epsilon" not in found else {})


def mean_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the hospitals, weighted by the images that each showed in this round; keys that nobody measured are absent."""
    means = {}
    for key in MEANS:
        known = [(row[key], row["images"]) for row in rows if key in row and row["images"] > 0]
        if known:
            means[key] = sum(value * images for value, images in known) / sum(
                images for _, images in known
            )
    return means
