"""`fedgan doctor`: is this machine ready, and how long will a scenario take on it?"""

from __future__ import annotations

from fedgan.cli import console


def doctor(as_json: console.Json = False) -> None:
    """Check this machine, and tell how long a scenario takes on it.

    Python, packages, processor, memory, GPU, disk, ports, and five seconds of training.
    """
    console.emit({}, as_json, "")
