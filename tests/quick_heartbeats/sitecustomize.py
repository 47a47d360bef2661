"""Flower with heartbeats each 8 s in the place of 30: who has this folder in PYTHONPATH notices a hospital's death in 16 s.

Not the ServerApp's, which is left at 60: while the SuperLink is away its heartbeats are tried again ever later.
"""

import os

from flwr.common import constant

constant.HEARTBEAT_MIN_INTERVAL = 1
if os.environ.get("FEDGAN_LOOPBACK_NAME") not in ("superlink", "serverapp"):
    constant.HEARTBEAT_DEFAULT_INTERVAL = 8
