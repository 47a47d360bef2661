"""Events of a run as JSON lines: the log of a deployed server, and the output under
FEDGAN_LOG=json.

One line holds one JSON object with "event" and "time" (UTC) among its keys. `simulations/runner.py`
lists the events. A deployed run has two more, because its caller sees nothing but the log:

    {"event": "finished", "run": folder, "report": the report, or "" where it could not be written}
    {"event": "failed", "kind": name of the exception, "message": text}
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import Any

Event = dict[str, Any]
FORMAT = "FEDGAN_LOG"  # the environment variable
_PREFIX = '{"event": '


def as_line(event: Event) -> str:
    """An event as one JSON line with the time, without "result", which evaluation.json holds."""
    head = {"event": event["event"], "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
    return json.dumps(head | {key: value for key, value in event.items() if key != "result"})


def from_line(line: str) -> Event | None:
    """The event in a line of a log; None for any other line."""
    if not line.startswith(_PREFIX):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event["event"], str) else None


def wants_json() -> bool:
    """Whether logs are JSON lines (FEDGAN_LOG=json)."""
    return os.environ.get(FORMAT, "").lower() == "json"
