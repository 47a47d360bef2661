"""The hospitals' part of a round's line in metrics.jsonl, and the texts about absent hospitals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import Message

from fedgan.config import Settings
from fedgan.exchange.round_metrics import COUNTS, MEANS, ROUND_METRICS
from fedgan.runs.participants import Member, hospital_label
from fedgan.runs.round_state import State
from server.aggregation.update_checks import FACTS
from server.records import METRICS, WEIGHT
from server.requests import LATE


def absence_note(absence: Mapping[str, Any], number: int) -> str:
    """The note for a hospital that missed round `number`, sent with its next request."""
    return f"the reply of round {number} did not count ({absence['what']}: {absence['why']})"


def describe_absence(absence: Mapping[str, Any], number: int, settings: Settings) -> str:
    """Which hospital is missing in round `number` and why, in one line."""
    label, why = hospital_label(absence["number"], absence["name"]), absence["why"]
    if absence["what"] == "rejected":
        return f"in round {number} {why}"  # the reason names the hospital
    if why == LATE:
        return (
            f"{label} did not reply in round {number} within federation.round_timeout = "
            f"{settings.federation.round_timeout:g} s: see its log, or raise the timeout"
        )
    return f"{label} failed in round {number}: {why}"


def newly_exhausted(
    members: Sequence[Member], rows: Sequence[Mapping[str, Any]], number: int
) -> list[dict[str, Any]]:
    """The hospitals that reported a spent privacy budget in round `number`."""
    return [
        {
            "name": member.name,
            "number": member.number,
            "images": member.images,
            "units": member.units,
            "round": number,
        }
        for member, row in zip(members, rows, strict=True)
        if row.get("exhausted")
    ]


def exhausted_status(state: State, settings: Settings) -> dict[str, Any]:
    """Spent budgets in a round's line: `exhausted` names, and `ended` where too few are left."""
    if not state.exhausted:
        return {}
    why = state.ended_early(settings) if state.round < settings.federation.rounds else ""
    names = sorted(row["name"] for row in state.exhausted)
    return {"exhausted": names} | ({"ended": why} if why else {})


def hospital_metrics(member: Member, reply: Message) -> dict[str, Any]:
    """The hospital's part of the round's line: name, num_examples, counts and its means."""
    facts = dict(reply.content.config_records[FACTS])
    row: dict[str, Any] = {
        "name": member.name,
        WEIGHT: reply.content.metric_records[METRICS][WEIGHT],
    }
    counts = {key: int(facts.pop(key)) for key in COUNTS}
    del counts["round"]
    return row | counts | finite_numbers(facts)


def lost_states(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each hospital that had lost its state before the round."""
    return [
        f"'{row['name']}' had lost its state and "
        + (f"continued that of round {older:g}" if older else "began anew from the server's model")
        for row in rows
        if (older := row.get("continued_from")) is not None
    ]


def finite_numbers(facts: Mapping[str, Any]) -> dict[str, float | None]:
    """The finite numbers of `ROUND_METRICS`; an infinite epsilon (no noise) as None, as in JSON.

    A reply may hold any other name; none of them reaches metrics.jsonl.
    """
    listed = {metric.name for metric in ROUND_METRICS}
    found: dict[str, float | None] = {
        key: value
        for key, value in facts.items()
        if key in listed and isinstance(value, float) and math.isfinite(value)
    }
    return found | ({"epsilon": None} if "epsilon" in facts and "epsilon" not in found else {})


def mean_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over hospitals, weighted by their images of this round; only of measured keys."""
    means = {}
    for key in MEANS:
        measured = [(row[key], row["images"]) for row in rows if key in row and row["images"] > 0]
        if measured:
            means[key] = sum(value * images for value, images in measured) / sum(
                images for _, images in measured
            )
    return means
