"""Events of a run as lines: what a server prints where nobody shares its memory, and what FEDGAN_LOG=json prints.

One line holds one JSON object, "event" and "time" (UTC) among its keys. `simulations/runner.py` says which events there are;
a deployed run adds two, because its end is told in no other way:

    {"event": "finished", "run": folder, "report": the page, or "" where it could not be written}
    {"event": "failed", "kind": name of the exception, "message": text}
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import Any

Event = dict[str, Any]
FORMAT = "FEDGAN_LOG"  # the environment variable
_BEGINNING = '{"event": '


def as_line(event: Event) -> str:
    """An event as one line, with the time; without the evaluator's whole result, which stands in evaluation.json."""
    told = {"event": event["event"], "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
    return json.dumps(told | {key: value for key, value in event.items() if key != "result"})


def from_line(line: str) -> Event | None:
    """The event that a line of a log holds; None where it holds something else."""
    if not line.startswith(_BEGINNING):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found["event"], str) else None


def wants_json() -> bool:
    """Whether logs are to be JSON lines: FEDGAN_LOG=json."""
    return os.environ.get(FORMAT, "").lower() == "json"
