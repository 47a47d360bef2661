"""Faults of a deployment's processes that have this folder in PYTHONPATH.

Heartbeats are sent every 12 s instead of 30, so that a ClientApp's death is detected within 24 s.
The ServerApp keeps 30 s: while the SuperLink is down, its heartbeats are retried at growing
intervals. The SuperLink waits for three heartbeats instead of two, 36 s for a SuperNode: proxy and
SuperLink stop one after the other, and on a busy machine it may take 20 s until a heartbeat
arrives.

While the file `slow` exists in its FLWR_HOME, a ClientApp does not find its code but keeps sending
heartbeats, as on a very slow disk.
"""

import os
import sys
import time
from pathlib import Path

from flwr.common import constant

NAME = os.environ.get("FEDGAN_LOOPBACK_NAME", "")

constant.HEARTBEAT_MIN_INTERVAL = 1
if NAME == "superlink":
    constant.HEARTBEAT_PATIENCE = 3
elif NAME != "serverapp":
    constant.HEARTBEAT_DEFAULT_INTERVAL = 12


class Slow:
    """First module finder; blocks the import of the ClientApp and finds nothing."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        while name == "client.app" and (Path(os.environ["FLWR_HOME"]) / "slow").exists():
            time.sleep(0.2)


if NAME.startswith("clientapp"):
    sys.meta_path.insert(0, Slow)  # type: ignore[arg-type]
