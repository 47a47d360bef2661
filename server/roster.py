"""The hospitals of a run: introductions, reconnections, late joiners, members that may train."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedgan import files
from fedgan.config import Settings
from fedgan.errors import ConfigError, FederationError
from fedgan.run_folder import RunFolder
from fedgan.runs.participants import Member
from fedgan.runs.round_state import State
from server.requests import retry_on_5xx, send_and_receive

HELLO = "query.hello"
JOIN_SECONDS = 300.0  # for an introduction: a shard is opened, and in a simulation Ray starts
LATE_JOIN_SECONDS = 60.0  # the same between two rounds, while the other hospitals wait
NAME = r"[^\x00-\x1f\x7f/\\]{1,64}"  # hospitals and labels: one line, no path separators
MAX_LABELS = 10_000


class Roster:
    """The connected hospitals of a run, by number.

    `config`: the ConfigRecord of every request. `reconnecting`: as in `Federation`.
    """

    def __init__(
        self,
        settings: Settings,
        run: RunFolder,
        config: Mapping[str, Any],
        members: Sequence[Member],
        on_event: Callable[[dict[str, Any]], None],
        reconnecting: bool,
    ) -> None:
        self.settings, self.run, self.config = settings, run, config
        self.on_event, self.reconnecting = on_event, reconnecting
        self.members = {member.number: member for member in members}

    def rejoin(self, state: State) -> State:
        """Match the connected hospitals with a resumed run's participants, and add new ones."""
        for member in list(self.members.values()):
            self._admit(member, state)
        return state

    def _admit(self, member: Member, state: State) -> None:
        """Add a hospital; `FederationError` when it differs from the one that joined before."""
        known = next((row for row in state.participants if row.number == member.number), None)
        if any(
            row.name == member.name and row.number != member.number for row in state.participants
        ):
            raise FederationError(
                f"{member} has the name of another hospital: give its shard a unique name "
                "(fedgan data import --name)"
            )
        if known is None:
            state.participants.append(member.participant(state.round))
        elif (known.name, known.images) != (member.name, member.images):
            raise FederationError(
                f"{member} has {member.images} training images, and hospital {known.number + 1} "
                f"joined this run as '{known.name}' with {known.images}: give it the shard that it "
                "began with, or begin a new run"
            )
        state.phantoms = state.phantoms and member.phantoms
        self.members[member.number] = member

    def admit_late_joiners(self, grid: Grid, state: State) -> None:
        """Introduce and add hospitals that have come online since the last round."""
        known = {member.node for member in self.members.values()}
        participants = self.settings.federation.participants
        new = [node for node in online_nodes(grid, participants) if node not in known]
        if not new:
            return
        members, problems = request_introductions(
            grid, self.settings, self.config, new, LATE_JOIN_SECONDS
        )
        first = next(iter(self.members.values()))
        for member in members:
            try:
                check_compatible(first, member)
                self._admit(member, state)
                self._note(f"{member} has joined after round {state.round}")
            except FederationError as error:
                problems.append(str(error))
        self.report_absent(problems)
        if members:
            self.write_hospitals(state)

    def report_absent(self, problems: Sequence[str]) -> None:
        """Emit a note for each hospital that could not join."""
        for why in problems:
            self._note(f"a hospital did not join: {why}")

    def active_members(self, state: State) -> list[Member]:
        """The connected hospitals that may still train, by number."""
        exhausted = {row["number"] for row in state.exhausted}
        return [self.members[number] for number in sorted(self.members) if number not in exhausted]

    def write_hospitals(self, state: State) -> None:
        """Write hospitals.json of a deployment, whose server opens no hospital's shard."""
        if not self.reconnecting:
            return
        counts = {
            member.number: {
                "train": dict(zip(member.label_names, member.label_counts, strict=True))
            }
            for member in self.members.values()
            if member.label_counts
        }
        rows = [
            {
                "name": row.name,
                "counts": counts.get(row.number, {}),
                "images": {"train": row.images},
            }
            for row in sorted(state.participants, key=lambda row: row.number)
        ]
        files.write_json(self.run.hospitals, rows)

    def _note(self, text: str) -> None:
        self.on_event({"event": "note", "text": text})


class MemberGrid:
    """The grid as a strategy sees it: the nodes of the members. It never waits."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)

    def get_node_ids(self) -> list[int]:
        """Node ids in the order of the hospitals."""
        return [member.node for member in self.members]


# --- introductions -----------------------------------------------------------------------------


def wait_for_members(
    grid: Grid,
    settings: Settings,
    config: Mapping[str, Any],
    exhausted: Collection[int] = (),
    reconnecting: bool = False,
) -> tuple[list[Member], list[str]]:
    """Wait for the hospitals; return the members by number, and why others could not join.

    `exhausted`: numbers of hospitals that train no more; they may connect but are not waited for.
    `reconnecting`: as in `send_and_receive`. Raises `FederationError` when fewer than
    `federation.min_hospitals` (all, where it is 0) connect within `federation.join_timeout` seconds
    or their images differ in kind, `ConfigError` for too many nodes.
    """
    expected = settings.federation.participants
    needed = set(range(expected)) - set(exhausted)
    minimum = min(settings.federation.min_hospitals or expected, len(needed))
    members, problems, requested = list[Member](), list[str](), set[int]()
    end = time.monotonic() + settings.federation.join_timeout
    while True:
        nodes = online_nodes(grid, expected)
        # introductions are requested once all are online, or at the end of the time limit
        is_late = time.monotonic() > end
        is_complete = is_late or len(nodes) >= len(needed)
        if new := [node for node in nodes if node not in requested] if is_complete else []:
            requested.update(new)
            more, why = request_introductions(
                grid, settings, config, new, JOIN_SECONDS, minimum == len(needed), reconnecting
            )
            members, problems = members + more, problems + why
            if why and minimum == len(needed):
                raise FederationError(f"a hospital could not join: {why[0]}")
        if (
            len(nodes) == len(requested) == expected
            or needed <= {member.number for member in members}
            or is_late
        ):
            break
        time.sleep(0.2)
    present = {member.number for member in members} - set(exhausted)
    if len(present) < minimum and not problems:
        raise FederationError(
            f"{len(requested)} of {expected} hospitals came online within "
            f"{settings.federation.join_timeout:.0f} s: start the others (flwr run: "
            f"--federation-config 'num-supernodes={expected}'), or lower federation.hospitals or "
            "federation.min_hospitals"
        )
    if len(present) < minimum:
        raise FederationError(
            f"{len(present)} of {expected} hospitals joined: {'; '.join(problems)}"
        )
    members.sort(key=lambda member: member.number)
    return check_members(members, expected), problems


def request_introductions(
    grid: Grid,
    settings: Settings,
    config: Mapping[str, Any],
    nodes: Sequence[int],
    timeout: float,
    needs_all: bool = False,
    reconnecting: bool = False,
) -> tuple[list[Member], list[str]]:
    """The members on these nodes, and why others could not join.

    `needs_all`: the first failure ends the wait.
    """

    def make_request(node: int, left: float) -> Message:
        return Message(RecordDict({"config": ConfigRecord(dict(config))}), node, HELLO, ttl=left)

    found = send_and_receive(
        grid, nodes, make_request, timeout, None if needs_all else 0, reconnecting
    )
    members, problems = [], [why for _, why in sorted(found.failures.items())]
    for node in nodes:
        if node in found.received:
            try:
                members.append(read_member(node, found.received[node], settings))
            except FederationError as error:
                problems.append(str(error))
    return members, problems


def read_member(node: int, reply: Message, settings: Settings) -> Member:
    """Validate the introduction of a node; `FederationError` names the invalid key."""
    facts = reply.content.config_records.get("hospital") or {}
    most = settings.federation.max_num_examples
    validators: dict[str, Callable[[Any], bool]] = {
        "number": lambda value: (
            _is_integer(value) and 0 <= value < settings.federation.participants
        ),
        "name": _is_name,
        "images": lambda value: _is_integer(value) and 0 < value <= most,
        "label_names": lambda value: (
            isinstance(value, list) and len(value) <= MAX_LABELS and all(map(_is_name, value))
        ),
        "exclusive": lambda value: isinstance(value, bool),
        "channels": lambda value: _is_integer(value) and 0 < value <= 4,
        "resolution": lambda value: value == settings.data.resolution,
        "phantoms": lambda value: isinstance(value, bool),
        "units": lambda value: _is_integer(value) and 0 <= value <= most,
        "label_counts": lambda value: (
            isinstance(value, list) and len(value) in (0, labels) and all(map(_is_integer, value))
        ),
    }
    given: dict[str, Any] = {"phantoms": False, "units": 0, "label_counts": []} | dict(facts)
    labels = len(given["label_names"]) if isinstance(given.get("label_names"), list) else 0
    invalid = [
        key for key, valid in validators.items() if key not in given or not valid(given[key])
    ]
    if invalid:
        number = f" (partition-id {facts['number']})" if _is_integer(facts.get("number")) else ""
        raise FederationError(
            f"a hospital{number} introduces itself with an impossible {invalid[0]}: "
            "see docs/guides/deploy.md"
        )
    values = dict[str, Any]({key: given[key] for key in validators})
    for key in ("label_names", "label_counts"):
        values[key] = tuple(values[key])
    return Member(node=node, **values)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_name(value: Any) -> bool:
    return (
        isinstance(value, str) and re.fullmatch(NAME, value) is not None and value.strip(". ") != ""
    )


def check_members(members: list[Member], expected: int) -> list[Member]:
    """Return the members; `FederationError` for numbers or names used twice, or unlike images."""
    numbers = [member.number for member in members]
    if len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(expected)):
        raise FederationError(
            f"hospitals connected with the numbers {numbers}: give each its own partition-id from 0"
        )
    names = [member.name for member in members]
    if len(set(names)) < len(names):
        raise FederationError(
            f"hospitals connected with the names {names}: give each shard a unique name "
            "(fedgan data import --name)"
        )
    for other in members[1:]:
        check_compatible(members[0], other)
    return members


def check_compatible(first: Member, other: Member) -> None:
    """Raise `FederationError` when labels or image shapes of two hospitals differ."""
    for key in ("label_names", "exclusive", "channels", "resolution"):
        if getattr(other, key) != getattr(first, key):
            raise FederationError(
                f"{first} and {other} differ in {key}: import both shards with the same options"
            )


def online_nodes(grid: Grid, expected: int) -> list[int]:
    """Ids of the online nodes, sorted. Raises `ConfigError` where they are more than `expected`."""
    nodes = sorted(retry_on_5xx(grid.get_node_ids))
    if len(nodes) > expected:
        raise ConfigError(
            f"{len(nodes)} nodes for federation.hospitals = {expected}: start as many, "
            f"e.g. flwr run . --federation-config 'num-supernodes={expected}'"
        )
    return nodes
