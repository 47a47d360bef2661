"""Who takes part: a bounded wait for nodes, an introduction, and answers with the hospital's name on them."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedgan.config import Settings
from fedgan.errors import HOSPITAL_REASON, ConfigError, FederationError

HELLO = "query.hello"
NODE_WAIT = 60.0
HELLO_WAIT = 300.0  # opening a shard, and in a simulation the start of Ray
POLL = 0.05
CRASHED = 8  # Flower's code for "the ClientApp process crashed"


@dataclass(frozen=True)
class Member:
    """One hospital as the server knows it: nothing but what the exchange needs."""

    node: int
    number: int
    name: str
    images: int
    label_names: tuple[str, ...]
    exclusive: bool
    channels: int
    resolution: int
    drawn: bool = False  # it says that all its images are drawn phantoms
    units: int = 0  # what `privacy` hides one of: images or patients; 0 where nobody has to know
    label_counts: tuple[int, ...] = ()  # training images of each label; empty unless federation.share_label_counts

    def __str__(self) -> str:
        return f"hospital {self.number + 1} ('{self.name}')"


class Roster:
    """What a strategy sees instead of the grid: the nodes that were introduced. It never waits."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)

    def get_node_ids(self) -> list[int]:
        """Node ids in the order of the hospitals."""
        return [member.node for member in self.members]


def introduce(grid: Grid, settings: Settings, order: ConfigRecord, gone: Collection[int] = ()) -> list[Member]:
    """Wait for the hospitals and ask each who it is; members in the order of their numbers.

    `gone`: numbers of hospitals that take no more part; they may come, but nobody waits for them. Raises `FederationError`
    when too few or too many come, when one cannot open its shard, or when their labels and image sizes do not fit together.
    """
    wanted, members, asked = settings.federation.participants, list[Member](), list[int]()
    needed = set(range(wanted)) - set(gone)
    least = len(needed)
    while True:
        nodes = wait_for_nodes(grid, wanted, NODE_WAIT, least)
        members += _ask(grid, order, [node for node in nodes if node not in asked])
        asked = nodes
        if len(nodes) == wanted or needed <= {member.number for member in members}:
            return check_members(sorted(members, key=lambda member: member.number), gone)
        least = len(nodes) + 1  # one who has left came before one who is needed


def _ask(grid: Grid, order: ConfigRecord, nodes: Sequence[int]) -> list[Member]:
    """Who the hospitals on these nodes are."""
    questions = [Message(RecordDict({"config": ConfigRecord(dict(order))}), node, HELLO) for node in nodes]
    answers = gather(grid, questions, HELLO_WAIT)
    members = []
    for node in nodes:
        answer = answers.get(node)
        if answer is None or answer.has_error():
            continue
        facts = answer.content.config_records["hospital"]
        members.append(
            Member(
                node=node,
                number=int(facts["number"]),
                name=str(facts["name"]),
                images=int(facts["images"]),
                label_names=tuple(facts["label_names"]),
                exclusive=bool(facts["exclusive"]),
                channels=int(facts["channels"]),
                resolution=int(facts["resolution"]),
                drawn=facts.get("drawn") is True,
                units=int(facts.get("units", 0)),
                label_counts=tuple(int(count) for count in facts.get("label_counts", ())),
            )
        )
    for answer in answers.values():
        if answer.has_error():
            raise FederationError(f"a hospital could not join: {reason_of(answer)}")
    if len(members) < len(nodes):
        raise FederationError(
            f"only {len(members)} of {len(nodes)} hospitals answered within {HELLO_WAIT:.0f} s: "
            "see flower.log and the client.log of each"
        )
    return members


def check_members(members: list[Member], gone: Collection[int] = ()) -> list[Member]:
    """Return the members, or raise `FederationError` when two have one number or their images do not fit together.

    Numbers count from 0 without gaps but for those of the hospitals that are `gone`.
    """
    numbers = [member.number for member in members]
    all_numbers = {*numbers, *gone}
    if len(set(numbers)) < len(numbers) or all_numbers != set(range(len(all_numbers))):
        raise FederationError(f"hospitals came with the numbers {numbers}: give each its own partition-id from 0")
    first = members[0]
    for other in members[1:]:
        for what in ("label_names", "exclusive", "channels", "resolution"):
            if getattr(other, what) != getattr(first, what):
                raise FederationError(f"{first} and {other} differ in {what}: prepare both shards alike")
    return members


def wait_for_nodes(grid: Grid, wanted: int, limit: float, least: int | None = None) -> list[int]:
    """Node ids once `wanted` are online (or `least`, where fewer will do), sorted. `FederationError` after `limit` seconds."""
    end = time.monotonic() + limit
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) > wanted:
            raise ConfigError(
                f"{len(nodes)} nodes for federation.hospitals = {wanted}: start as many, "
                f"e.g. flwr run . --federation-config 'num-supernodes={wanted}'"
            )
        if len(nodes) >= (wanted if least is None else least):
            return nodes
        if time.monotonic() > end:
            raise FederationError(
                f"{len(nodes)} of {wanted} hospitals came online within {limit:.0f} s: "
                f"start the others (flwr run: --federation-config 'num-supernodes={wanted}') or lower federation.hospitals"
            )
        time.sleep(0.2)


def gather(grid: Grid, messages: Iterable[Message], timeout: float, until_error: bool = True) -> dict[int, Message]:
    """Send each message and collect the answers by node id; who is not in the result has not answered.

    Returns when all have answered, after `timeout` seconds, or (`until_error`) as soon as one answer is an
    error: a round that has failed need not wait for the hospitals that still train.
    """
    messages = list(messages)
    nodes = [message.metadata.dst_node_id for message in messages]
    waiting = dict(zip(grid.push_messages(messages), nodes, strict=True))
    answers: dict[int, Message] = {}
    end = time.monotonic() + timeout
    while waiting and time.monotonic() < end:
        for answer in grid.pull_messages(list(waiting)):
            # an error about an absent node carries the server's own id: the question tells whose answer it is
            answers[waiting.pop(answer.metadata.reply_to_message_id)] = answer
        if until_error and any(answer.has_error() for answer in answers.values()):
            break
        if waiting:
            time.sleep(POLL)
    return answers


def require_all(members: Sequence[Member], answers: dict[int, Message], timeout: float, doing: str) -> list[Message]:
    """The answers in the order of the hospitals, or a `FederationError` that names the hospital that failed or is late."""
    failed = [(member, answers[member.node]) for member in members if member.node in answers and answers[member.node].has_error()]
    for member, answer in failed:
        raise FederationError(f"{member} failed {doing}: {reason_of(answer)}")
    late = [str(member) for member in members if member.node not in answers]
    if late:
        raise FederationError(
            f"{' and '.join(late)} did not answer {doing} within federation.round_timeout = {timeout:g} s: "
            "see its log, or raise the timeout"
        )
    return [answers[member.node] for member in members]


def reason_of(answer: Message) -> str:
    """One line about an error reply, without what a framework may have put into it."""
    reason = str(answer.error.reason or "") if answer.has_error() else ""
    if any(word in reason for word in ("ActorDied", "WorkerCrashed", "OutOfMemory")) or answer.error.code == CRASHED:
        return "its process died (killed, or out of memory)"
    return reason.removeprefix(HOSPITAL_REASON) if reason.startswith(HOSPITAL_REASON) else "an error that its own log explains"
