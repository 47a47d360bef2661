"""Questions to hospitals and their answers: every wait is bounded, and who failed is known with the reason.

A failure that a hospital reports itself is its last word. One of its connection (the node is away, its process died) need not
be: where the hospitals are containers that come back, the question is asked again as soon as the node is online. To such
hospitals arrays go in parcels, and come back so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from fedgan.errors import HOSPITAL_REASON, FederationError
from server.parcels import Parcels

POLL = (0.05, 0.5)  # seconds between two looks for answers: at first, and at most
ONLINE_POLL = 2.0  # seconds between two looks at who is online
TRIES = 4  # questions to one node: one whose process dies each time must not hold the others
UNAVAILABLE, CRASHED = (
    5,
    8,
)  # Flower's codes for a node without heartbeat and for a ClientApp that died
EXPIRED = (3, 4)  # for a question or an answer whose time is over
DIED = ("ActorDied", "WorkerCrashed", "OutOfMemory")  # what Ray says instead
LATE = "did not answer in time"
UNASKED = "was not waited for"  # because enough could no longer answer
AWAY = "is not online"
BUSY_SECONDS = 120.0  # of a SuperLink that answers with nothing but its own failure

T = TypeVar("T")


@dataclass
class Answers:
    """By node: the answers that came, and why none came from the others. Each asked node is in one of the two."""

    replies: dict[int, Message] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


def send_and_receive(
    grid: Grid,
    nodes: Collection[int],
    question: Callable[[int, float], Message],
    timeout: float,
    enough: int | None = None,
    reconnecting: bool = False,
    on_reply: Callable[[int], None] = lambda node: None,
) -> Answers:
    """Ask each node and wait for its answer, for `timeout` seconds at most.

    `question(node, seconds left)` makes a fresh message. `enough`: how many answers the caller cannot do without (all where it
    is None); as soon as they can no longer come, the wait is over. `patient`: nodes that are away or whose process died are
    asked again when they are online, while the others still work or fewer than enough have answered. `heard(node)` is called
    for each answer as it comes.
    """
    begun, seen_online = time.monotonic(), -ONLINE_POLL
    least = len(nodes) if enough is None else enough
    found, away, tries = Answers(), dict.fromkeys(nodes, AWAY), dict.fromkeys(nodes, 0)
    waiting, hopeless = dict[str, int](), False
    parcels = Parcels()
    while True:
        left = timeout - (time.monotonic() - begun)
        # --- ask whom we have not asked, and again who has failed and is back
        if away and left > 0 and time.monotonic() - seen_online >= ONLINE_POLL:
            online, seen_online = (
                set(retry_on_5xx(grid.get_node_ids)) if reconnecting else set(away),
                time.monotonic(),
            )
            called = [node for node in nodes if node in away and node in online]
            questions = [question(node, left) for node in called]
            if reconnecting:
                questions = [parcels.close(each) for each in questions]
            keys = grid.push_messages(questions) if questions else []
            for key, node in zip(keys, called, strict=True):
                waiting[key] = node
                tries[node] += 1
                del away[node]
        # --- take what has come
        for answer in retry_on_5xx(lambda: grid.pull_messages(list(waiting))) if waiting else ():
            # an error about an absent node carries the server's own id: the question tells whose answer it is
            node = waiting.pop(answer.metadata.reply_to_message_id)
            if not answer.has_error():
                try:
                    parcels.open(answer)
                except FederationError as error:
                    found.failures[node] = f"answered with {error}"
                    continue
                found.replies[node] = answer
                on_reply(node)
            elif reconnecting and not is_client_error(answer) and tries[node] < TRIES:
                away[node] = reason_of(answer)
            else:
                found.failures[node] = reason_of(answer)
        # --- is there anything to wait for?
        if hopeless := len(nodes) - len(found.failures) < least:
            break
        if not waiting and (not away or len(found.replies) >= least):
            break
        if (
            left <= 0
        ):  # as it was before this look: who answered in time is not late because another took long to read
            break
        time.sleep(min(max(0.05 * (time.monotonic() - begun), POLL[0]), POLL[1], max(left, 0.0)))
    silent = dict.fromkeys(waiting.values(), UNASKED if hopeless else LATE) | away
    found.failures |= {node: silent[node] for node in nodes if node in silent}
    return found


def retry_on_5xx(look: Callable[[], T]) -> T:
    """What the SuperLink answers; asked again where it failed (5xx): on a busy machine its database is locked at times.

    For what may be asked twice. Flower itself asks again for 502 to 504 alone, and a run would end with the first 500.
    """
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return look()
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500 or time.monotonic() > end:
                raise
        time.sleep(ONLINE_POLL)


def is_client_error(answer: Message) -> bool:
    """Whether an error reply was written by the hospital itself."""
    return str(answer.error.reason or "").startswith(HOSPITAL_REASON)


def reason_of(answer: Message) -> str:
    """One line about an error reply, without what a framework may have put into it."""
    reason = str(answer.error.reason or "") if answer.has_error() else ""
    if any(word in reason for word in DIED) or answer.error.code == CRASHED:
        return "its process died (killed, or out of memory)"
    if answer.error.code == UNAVAILABLE:
        return AWAY
    if answer.error.code in EXPIRED:
        return LATE
    return (
        reason.removeprefix(HOSPITAL_REASON)
        if reason.startswith(HOSPITAL_REASON)
        else "an error that its own log explains"
    )
