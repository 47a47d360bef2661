"""Requests to hospitals and their replies: every wait is bounded, every failure has a reason.

A failure that a hospital reports itself is final. A failure of its connection (the node is offline,
its process died) is not where hospitals reconnect: the request is sent again when the node is
online. Arrays travel to and from such hospitals as bundles (server/records.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from fedgan.errors import HOSPITAL_REASON, FederationError
from fedgan.exchange.error_messages import REASON
from server.records import TOO_LARGE, Bundler, is_too_large

POLL = (0.05, 0.5)  # seconds between two polls for replies: at first, and at most
ONLINE_POLL = 2.0  # seconds between two polls of the online nodes
MAX_ATTEMPTS = 4  # requests to one node, so that one that crashes each time cannot stall the others
UNAVAILABLE, CRASHED = 5, 8  # Flower's codes for a node without heartbeat and a dead ClientApp
UNLOADED = 1  # Flower's code for a ClientApp that was refused, or cannot be imported
EXPIRED = (3, 4)  # Flower's codes for an expired request or reply
DIED = ("ActorDied", "WorkerCrashed", "OutOfMemory")  # the same in Ray's words
LATE = "did not reply in time"
NOT_AWAITED = "was not waited for"  # because enough replies were no longer possible
OFFLINE = "is not online"
PROCESS_DIED = "its process died (killed, or out of memory)"
UPLOAD_SECONDS = 600.0  # for the rest of an announced reply, while the other replies wait
BUSY_SECONDS = 120.0  # how long a SuperLink may reply with nothing but errors of its own

T = TypeVar("T")


@dataclass
class Replies:
    """By node: the replies, and why the other nodes have none. Each node is in one of the two."""

    received: dict[int, Message] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


def send_and_receive(
    grid: Grid,
    nodes: Collection[int],
    make_request: Callable[[int, float], Message],
    timeout: float,
    min_replies: int | None = None,
    reconnecting: bool = False,
    on_reply: Callable[[int], None] = lambda node: None,
) -> Replies:
    """Send each node a request and wait for its reply, at most `timeout` seconds.

    `make_request(node, seconds)` returns a fresh message that is valid for so long. `min_replies`:
    replies that the caller needs (None: all); the wait ends when so many are no longer possible.
    `reconnecting`: nodes that are offline or whose process died get the request again when they
    are online, while others still work or fewer than `min_replies` have replied. `on_reply(node)`
    is called for each reply as it arrives.
    """
    begun, last_online_poll = time.monotonic(), -ONLINE_POLL
    needed = len(nodes) if min_replies is None else min_replies
    found, unsent, attempts = Replies(), dict.fromkeys(nodes, OFFLINE), dict.fromkeys(nodes, 0)
    waiting, is_hopeless = dict[str, int](), False
    bundler = Bundler()
    while True:
        left = timeout - (time.monotonic() - begun)
        # --- send the first requests, and send again to nodes that have reconnected
        if unsent and left > 0 and time.monotonic() - last_online_poll >= ONLINE_POLL:
            online = set(retry_on_5xx(grid.get_node_ids)) if reconnecting else set(unsent)
            last_online_poll = time.monotonic()
            targets = [node for node in nodes if node in unsent and node in online]
            # Valid until an upload that holds up the last poll has been given up, too.
            requests = [make_request(node, left + UPLOAD_SECONDS) for node in targets]
            if reconnecting:
                requests = [bundler.pack(request) for request in requests]
            keys = grid.push_messages(requests) if requests else []
            for key, node in zip(keys, targets, strict=True):
                waiting[key] = node
                attempts[node] += 1
                del unsent[node]
        # --- receive
        for reply in (
            retry_on_5xx(partial(bundler.pull, grid, list(waiting), min(left, UPLOAD_SECONDS)))
            if waiting
            else ()
        ):
            # an error about an absent node has the server's own id as its source
            node = waiting.pop(reply.metadata.reply_to_message_id)
            if is_too_large(reply):
                found.failures[node] = TOO_LARGE
            elif not reply.has_error():
                try:
                    bundler.unpack(reply)
                except FederationError as error:
                    found.failures[node] = f"replied with {error}"
                    continue
                found.received[node] = reply
                on_reply(node)
            elif reconnecting and not is_client_error(reply) and attempts[node] < MAX_ATTEMPTS:
                unsent[node] = failure_reason(reply)
            else:
                found.failures[node] = failure_reason(reply)
        # --- decide whether to wait on
        if is_hopeless := len(nodes) - len(found.failures) < needed:
            break
        if not waiting and (not unsent or len(found.received) >= needed):
            break
        # `left` is of before this poll: a slow read of one reply must not make the others late
        if left <= 0:
            break
        time.sleep(min(max(0.05 * (time.monotonic() - begun), POLL[0]), POLL[1], max(left, 0.0)))
    silent = dict.fromkeys(waiting.values(), NOT_AWAITED if is_hopeless else LATE) | unsent
    found.failures |= {node: silent[node] for node in nodes if node in silent}
    return found


def retry_on_5xx(request: Callable[[], T]) -> T:
    """Call `request`, again where the SuperLink fails (5xx): on a busy machine its database locks.

    For idempotent requests. Flower itself retries on 502 to 504 only.
    """
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return request()
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500 or time.monotonic() > end:
                raise
        time.sleep(ONLINE_POLL)


def is_client_error(reply: Message) -> bool:
    """Whether the hospital itself wrote this error reply."""
    return str(reply.error.reason or "").startswith(HOSPITAL_REASON)


def failure_reason(reply: Message) -> str:
    """The reason of an error reply, in one of the texts of this module or of REASON.

    Any other text may come from a framework or from a hostile hospital and is not passed on.
    """
    reason = str(reply.error.reason or "") if reply.has_error() else ""
    if any(name in reason for name in DIED) or reply.error.code == CRASHED:
        return PROCESS_DIED
    if reply.error.code == UNAVAILABLE:
        return OFFLINE
    if reply.error.code in EXPIRED:
        return LATE
    if reply.error.code == UNLOADED:
        return "it has not approved this code, or cannot load it: its log says which"
    if REASON.fullmatch(reason):
        return reason.removeprefix(HOSPITAL_REASON)
    return "an error that its own log explains"
