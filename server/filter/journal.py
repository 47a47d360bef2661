"""The filter's log: one line an event on standard output. Never a body, a query or a header's value."""

from __future__ import annotations

import datetime
import json
import sys
from typing import TextIO

LONGEST = {"method": 16, "path": 120, "reason": 200}


def clean(text: str | bytes, longest: int) -> str:
    """Printable ASCII without spaces, quotes or backslashes; any other byte as \\xNN; cut at `longest` characters."""
    raw = text.encode("utf-8", "replace") if isinstance(text, str) else text
    shown = "".join(
        chr(byte) if 0x20 < byte < 0x7F and byte not in b"\"'\\" else f"\\x{byte:02x}"
        for byte in raw[:longest]
    )
    return shown if len(shown) <= longest and len(raw) <= longest else f"{shown[:longest]}..."


class Journal:
    """Writes events as `time event key=value …`, or as JSON lines."""

    def __init__(self, as_json: bool = False, out: TextIO | None = None) -> None:
        self.as_json, self.out = as_json, out or sys.stdout

    def write(
        self,
        event: str,
        peer: str = "",
        method: str = "",
        path: str | bytes = b"",
        status: int | None = None,
        reason: str = "",
    ) -> None:
        """Write one line. `peer` is an address, `path` the raw one without its query; what a client chose is cleaned."""
        now = (
            datetime.datetime.now(datetime.UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z")
        )
        fields = {
            "peer": peer,
            "method": clean(method, LONGEST["method"]),
            "path": clean(path, LONGEST["path"]),
            "status": status,
            "reason": " ".join(clean(word, LONGEST["reason"]) for word in reason.split())[
                : LONGEST["reason"]
            ],
        }
        known = {key: value for key, value in fields.items() if value not in ("", None)}
        if self.as_json:
            line = json.dumps({"time": now, "event": event} | known)
        else:
            line = " ".join(
                [
                    now,
                    event,
                    *(
                        f'{key}="{value}"' if " " in str(value) else f"{key}={value}"
                        for key, value in known.items()
                    ),
                ]
            )
        print(line, file=self.out, flush=True)
