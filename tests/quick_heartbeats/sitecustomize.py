"""Flower with heartbeats each 8 s in the place of 30: who has this folder in PYTHONPATH notices a death in 16 s, not in 60."""

from flwr.common import constant

constant.HEARTBEAT_DEFAULT_INTERVAL = 8
constant.HEARTBEAT_MIN_INTERVAL = 1
