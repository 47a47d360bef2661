"""Who takes part: a bounded wait for nodes, an introduction, and what is known of each hospital."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedgan.config import Settings
from fedgan.errors import ConfigError, FederationError
from fedgan.runs.participants import Member
from server.requests import retry_on_5xx, send_and_receive

HELLO = "query.hello"
HELLO_WAIT = 300.0  # opening a shard, and in a simulation the start of Ray
RETURN_WAIT = 60.0  # the same between two rounds, while the others wait
NAME = r"[^\x00-\x1f\x7f/\\]{1,64}"  # of hospitals and labels: one line, and no way out of a folder
MOST_LABELS = 10_000


class Roster:
    """What a strategy sees instead of the grid: the nodes that were introduced. It never waits."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)

    def get_node_ids(self) -> list[int]:
        """Node ids in the order of the hospitals."""
        return [member.node for member in self.members]


def introduce(
    grid: Grid,
    settings: Settings,
    order: Mapping[str, Any],
    gone: Collection[int] = (),
    reconnecting: bool = False,
) -> tuple[list[Member], list[str]]:
    """Wait for the hospitals and ask each who it is: members in the order of their numbers, and why others could not join.

    `gone`: numbers of hospitals that take no more part; they may come, but nobody waits for them. `patient`: as in `ask`.
    Raises `FederationError` when fewer than `federation.min_hospitals` (all, where it is 0) come within
    `federation.join_timeout` seconds, or when their labels and image sizes do not fit together; `ConfigError` for too many.
    """
    wanted = settings.federation.participants
    needed = set(range(wanted)) - set(gone)
    least = min(settings.federation.min_hospitals or wanted, len(needed))
    members, problems, asked = list[Member](), list[str](), set[int]()
    end = time.monotonic() + settings.federation.join_timeout
    while True:
        nodes = online(grid, wanted)
        # all at once where all are there; else the first ones wait for the others, who may come within the limit
        late = time.monotonic() > end
        if (
            new := [node for node in nodes if node not in asked]
            if late or len(nodes) >= len(needed)
            else []
        ):
            asked.update(new)
            more, why = request_introductions(
                grid, settings, order, new, HELLO_WAIT, least == len(needed), reconnecting
            )
            members, problems = members + more, problems + why
            if why and least == len(needed):
                raise FederationError(f"a hospital could not join: {why[0]}")
        if (
            len(nodes) == len(asked) == wanted
            or needed <= {member.number for member in members}
            or late
        ):
            break
        time.sleep(0.2)
    present = {member.number for member in members} - set(gone)
    if len(present) < least and not problems:
        raise FederationError(
            f"{len(asked)} of {wanted} hospitals came online within {settings.federation.join_timeout:.0f} s: "
            f"start the others (flwr run: --federation-config 'num-supernodes={wanted}'), or lower federation.hospitals or "
            "federation.min_hospitals"
        )
    if len(present) < least:
        raise FederationError(f"{len(present)} of {wanted} hospitals joined: {'; '.join(problems)}")
    return check_members(sorted(members, key=lambda member: member.number), wanted), problems


def request_introductions(
    grid: Grid,
    settings: Settings,
    order: Mapping[str, Any],
    nodes: Sequence[int],
    wait: float,
    all_needed: bool = False,
    reconnecting: bool = False,
) -> tuple[list[Member], list[str]]:
    """Who the hospitals on these nodes are, and why others could not say so. `all_needed`: the first failure ends the wait."""

    def question(node: int, left: float) -> Message:
        return Message(RecordDict({"config": ConfigRecord(dict(order))}), node, HELLO, ttl=left)

    answers = send_and_receive(grid, nodes, question, wait, None if all_needed else 0, reconnecting)
    members, problems = [], [why for _, why in sorted(answers.failures.items())]
    for node in nodes:
        if node in answers.replies:
            try:
                members.append(read_member(node, answers.replies[node], settings))
            except FederationError as error:
                problems.append(str(error))
    return members, problems


def read_member(node: int, answer: Message, settings: Settings) -> Member:
    """The introduction of a node. Raises `FederationError` for one that no right hospital would give."""
    facts = answer.content.config_records.get("hospital") or {}
    kinds: dict[str, Callable[[Any], bool]] = {
        "number": lambda value: _whole(value) and 0 <= value < settings.federation.participants,
        "name": _name,
        "images": lambda value: _whole(value) and 0 < value <= settings.federation.max_num_examples,
        "label_names": lambda value: (
            isinstance(value, list) and len(value) <= MOST_LABELS and all(map(_name, value))
        ),
        "exclusive": lambda value: isinstance(value, bool),
        "channels": lambda value: _whole(value) and 0 < value <= 4,
        "resolution": lambda value: value == settings.data.resolution,
        "phantoms": lambda value: isinstance(value, bool),
        "units": lambda value: _whole(value) and 0 <= value <= settings.federation.max_num_examples,
        "label_counts": lambda value: (
            isinstance(value, list) and len(value) in (0, labels) and all(map(_whole, value))
        ),
    }
    given: dict[str, Any] = {"phantoms": False, "units": 0, "label_counts": []} | dict(facts)
    labels = len(given["label_names"]) if isinstance(given.get("label_names"), list) else 0
    if wrong := [key for key, right in kinds.items() if key not in given or not right(given[key])]:
        number = f" (partition-id {facts['number']})" if _whole(facts.get("number")) else ""
        raise FederationError(
            f"a hospital{number} introduces itself with an impossible {wrong[0]}: see docs/deployment.md"
        )
    known = dict[str, Any]({key: given[key] for key in kinds})
    for key in ("label_names", "label_counts"):
        known[key] = tuple(known[key])
    return Member(node=node, **known)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _name(value: Any) -> bool:
    return (
        isinstance(value, str) and re.fullmatch(NAME, value) is not None and value.strip(". ") != ""
    )


def check_members(members: list[Member], wanted: int) -> list[Member]:
    """Return the members, or raise `FederationError` when two have one number or their images do not fit together."""
    numbers = [member.number for member in members]
    if len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(wanted)):
        raise FederationError(
            f"hospitals came with the numbers {numbers}: give each its own partition-id from 0"
        )
    if len({member.name for member in members}) < len(members):
        raise FederationError(
            f"hospitals came with the names {[member.name for member in members]}: give each shard a name of its own "
            "(fedgan data import --name)"
        )
    for other in members[1:]:
        check_alike(members[0], other)
    return members


def check_alike(first: Member, other: Member) -> None:
    """Raise `FederationError` when the images of two hospitals do not fit together."""
    for what in ("label_names", "exclusive", "channels", "resolution"):
        if getattr(other, what) != getattr(first, what):
            raise FederationError(
                f"{first} and {other} differ in {what}: prepare both shards alike"
            )


def online(grid: Grid, wanted: int) -> list[int]:
    """Node ids that are online, sorted. Raises `ConfigError` where they are more than `wanted`."""
    nodes = sorted(retry_on_5xx(grid.get_node_ids))
    if len(nodes) > wanted:
        raise ConfigError(
            f"{len(nodes)} nodes for federation.hospitals = {wanted}: start as many, "
            f"e.g. flwr run . --federation-config 'num-supernodes={wanted}'"
        )
    return nodes
