"""What a deployment's processes are made to suffer that have this folder in PYTHONPATH.

Heartbeats come each 12 s in the place of 30, so that a ClientApp's death is noticed in 24 s. Not the ServerApp's, which is
left at 30: while the SuperLink is away its heartbeats are tried again ever later. The SuperLink waits for three heartbeats in
the place of two, 36 s for a SuperNode's: filter and SuperLink die one after the other, and on a busy machine it may be 20 s
until one passes.

A ClientApp does not find its code while the file `slow` lies in its folder, and goes on sending heartbeats: a disk that is far
too slow.
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
    """Stands before all finders of modules, and finds none."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        while name == "client.app" and (Path(os.environ["FLWR_HOME"]) / "slow").exists():
            time.sleep(0.2)


if NAME.startswith("clientapp"):
    sys.meta_path.insert(0, Slow)  # type: ignore[arg-type]
