"""The hospitals of a run: introductions, reconnections, late joiners, members that may train.

In a deployment a hospital's name is the one that the operator registered with its key, whatever its
introduction says, and its number belongs to that key from its first introduction in a run. A node
that does not fit is left out and named, and the others continue: one that claims the number or name
of another, or a number that does not exist, that reports more images than its key allows, or whose
images differ in kind. Where two unknown nodes claim one number, both are left out: if the first or
any other rule won, a hostile hospital could train in the place of another.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedgan import files
from fedgan.config import Settings
from fedgan.data.labels import MAX_LABELS
from fedgan.deployment.registrations import split_bound
from fedgan.errors import ConfigError, DataError, FederationError, FedganError
from fedgan.redact import is_printable, printable
from fedgan.run_folder import RunFolder
from fedgan.runs.participants import Member, Participant, hospital_label
from fedgan.runs.round_state import State
from server.requests import OFFLINE, PROCESS_DIED, retry_on_5xx, send_and_receive

HELLO = "query.hello"
JOIN_SECONDS = 300.0  # for an introduction: a shard is opened, and in a simulation Ray starts
LATE_JOIN_SECONDS = 60.0  # the same between two rounds, while the other hospitals wait
NAME = r"[^/\\]{1,64}"  # hospitals and labels: no path separators, and printable
MAX_IMAGES = 1_000_000  # of a hospital without a bound

Check = Callable[[Member], None]
Names = Mapping[int, str]  # by online node: the name of its registered key, or ""


class Roster:
    """The connected hospitals of a run, by number.

    `config`: the ConfigRecord of every request. `reconnecting`: as in `Federation`. `check`: as in
    `wait_for_members`. `refused`: by node, who did not join and why.
    """

    def __init__(
        self,
        settings: Settings,
        run: RunFolder,
        config: Mapping[str, Any],
        members: Sequence[Member],
        on_event: Callable[[dict[str, Any]], None],
        reconnecting: bool,
        check: Check = lambda member: None,
        refused: Mapping[int, dict[str, str]] | None = None,
    ) -> None:
        self.settings, self.run, self.config = settings, run, config
        self.on_event, self.reconnecting, self.check = on_event, reconnecting, check
        self.members = {member.number: member for member in members}
        self.refused = dict[int, dict[str, str]]()
        self._refuse(refused or {})

    def rejoin(self, state: State) -> State:
        """Enter the connected hospitals, which fit its participants, in a resumed run."""
        for member in list(self.members.values()):
            self._admit(member, state, is_resumed=True)
        return state

    def _admit(self, member: Member, state: State, is_resumed: bool = False) -> None:
        """Add a hospital that fits the participants; a new one becomes a participant."""
        numbers = [row.number for row in state.participants]
        if member.number in numbers:  # what it joined with stays, and a run of old gets the key
            index = numbers.index(member.number)
            state.participants[index] = dataclasses.replace(
                state.participants[index], name=member.name, key=member.key
            )
        else:
            # With privacy its plan must not change those of hospitals that may have begun round 1.
            first = 1 if is_resumed and self.settings.privacy.on else 0
            state.participants.append(member.participant(max(state.round, first)))
        state.phantoms = state.phantoms and member.phantoms
        self.members[member.number] = member

    def admit_late_joiners(self, grid: Grid, state: State) -> None:
        """Introduce and add hospitals that have come online since the last round.

        Nodes beyond the expected hospitals are not waited for while all of those are online.
        """
        names = online_nodes(grid, self.settings.federation.participants, self.reconnecting)
        self.refused = {node: row for node, row in self.refused.items() if node in names}
        online = {member.number for member in self.members.values() if member.node in names}
        exhausted = {row["number"] for row in state.exhausted}
        if set(range(self.settings.federation.participants)) <= online | exhausted:
            return
        connected = {member.node for member in self.members.values()}
        new = {node: name for node, name in names.items() if node not in connected}
        if not new:
            return
        keys = names if self.reconnecting else None
        found, failures = request_introductions(
            grid, self.settings, self.config, new, LATE_JOIN_SECONDS, keys
        )
        taken = {member.key for member in self.members.values() if member.number in online}
        for member in [member for member in found if member.key in taken]:
            failures[member.node] = f"{member} is online already, with another key of this name"
            found.remove(member)
        misfits = find_misfits(found, state.participants, self.check, kind_of(state))
        self._refuse(refusals(names, failures | {n: str(why) for n, why in misfits.items()}))
        members = [member for member in found if member.node not in misfits]
        for member in members:
            self._admit(member, state)
            self.refused.pop(member.node, None)
            self._note(f"{member} has joined after round {state.round}")
        if members:
            self.write_hospitals(state)

    def _refuse(self, refused: Mapping[int, dict[str, str]]) -> None:
        """Remember who did not join, with a note where the reason is new."""
        for node, row in refused.items():
            if self.refused.get(node) != row:
                who = f"'{row['name']}'" if row["name"] else "a hospital"
                self._note(f"{who} did not join: {row['why']}")
            self.refused[node] = row

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
    state: State | None = None,
    reconnecting: bool = False,
    check: Check = lambda member: None,
) -> tuple[list[Member], dict[int, dict[str, str]]]:
    """Wait for the hospitals; return the members by number, and by node who could not join.

    `state`: of a resumed run; its exhausted hospitals may connect but are not waited for.
    `reconnecting`: as in `send_and_receive`; a deployment waits out `federation.join_timeout` for a
    hospital in the place of one that does not fit. `check` raises a `FedganError` for a member
    whose images the evaluator cannot use. Raises `FederationError` when fewer than
    `federation.min_hospitals` (all, where it is 0) join in that time, `DataError` when the
    evaluator can use no hospital's images, `ConfigError` for too many nodes of a simulation.
    """
    expected = settings.federation.participants
    exhausted = {row["number"] for row in state.exhausted} if state else set()
    needed = set(range(expected)) - exhausted
    minimum = min(settings.federation.min_hospitals or expected, len(needed))
    participants, kind = (state.participants, kind_of(state)) if state else ([], None)
    found, failures, requested = list[Member](), dict[int, str](), set[int]()
    misfits, names = dict[int, FedganError](), dict[int, str]()
    members = list[Member]()
    end = time.monotonic() + settings.federation.join_timeout
    needs_all = minimum == len(needed) and not reconnecting
    while True:
        online = online_nodes(grid, expected, reconnecting)
        names |= online
        # introductions are requested once all are online, or at the end of the time limit
        is_late = time.monotonic() > end
        is_complete = is_late or len(online) >= len(needed)
        new = {node: name for node, name in online.items() if node not in requested}
        if new and is_complete:
            requested.update(new)
            more, why = request_introductions(
                grid,
                settings,
                config,
                new,
                JOIN_SECONDS,
                online if reconnecting else None,
                needs_all,
            )
            found, failures = found + more, failures | why
            if why and needs_all:
                raise FederationError(f"a hospital could not join: {next(iter(why.values()))}")
            misfits = find_misfits(found, participants, check, kind)
            members = [member for member in found if member.node not in misfits]
            if reconnecting:  # a lost connection is not final
                lost = {node for node, text in why.items() if text in (OFFLINE, PROCESS_DIED)}
                requested -= lost
        is_asked = len(online) == len(requested) >= expected
        if (
            needed <= {member.number for member in members}
            or (is_asked and not (reconnecting and minimum == len(needed)))
            or is_late
        ):
            break
        time.sleep(0.2)
    why_not = {node: text for node, text in failures.items() if node not in {m.node for m in found}}
    refused = refusals(names, why_not | {node: str(error) for node, error in misfits.items()})
    present = {member.number for member in members} & needed
    if len(present) < minimum and not refused:
        raise FederationError(
            f"{len(requested)} of {expected} hospitals came online within "
            f"{settings.federation.join_timeout:.0f} s: start the others (flwr run: "
            f"--federation-config 'num-supernodes={expected}'), or lower federation.hospitals or "
            "federation.min_hospitals"
        )
    if len(present) < minimum:
        unusable = [error for error in misfits.values() if isinstance(error, DataError)]
        if unusable and len(unusable) == len(found):
            raise unusable[0]
        reasons = dict.fromkeys(
            row["why"]
            if not row["name"] or f"'{row['name']}'" in row["why"]
            else f"'{row['name']}': {row['why']}"
            for row in refused.values()
        )
        raise FederationError(
            f"{len(present)} of {expected} hospitals joined: {'; '.join(reasons)}"
        )
    return sorted(members, key=lambda member: member.number), refused


def request_introductions(
    grid: Grid,
    settings: Settings,
    config: Mapping[str, Any],
    asked: Names,
    timeout: float,
    keys: Names | None = None,
    needs_all: bool = False,
) -> tuple[list[Member], dict[int, str]]:
    """The members on the nodes of `asked`, and by node why others could not join.

    `keys`: all online nodes of a deployment, where nodes reconnect and members have keys.
    `needs_all`: the first failure ends the wait.
    """

    def make_request(node: int, left: float) -> Message:
        return Message(RecordDict({"config": ConfigRecord(dict(config))}), node, HELLO, ttl=left)

    replies = send_and_receive(
        grid, list(asked), make_request, timeout, None if needs_all else 0, keys is not None
    )
    members, failures = [], dict(sorted(replies.failures.items()))
    for node, reply in sorted(replies.received.items()):
        try:
            member = read_member(node, reply, settings, asked[node])
            members.append(bind_key(member, keys) if keys else member)
        except FederationError as error:
            failures[node] = str(error)
    return members, failures


def read_member(node: int, reply: Message, settings: Settings, registered: str = "") -> Member:
    """Validate the introduction of a node; `FederationError` names the invalid key.

    `registered`: its name at the SuperLink, which may state the most images (NAME=IMAGES).
    """
    facts = reply.content.config_records.get("hospital") or {}
    bound, limit = _bound(registered), settings.federation.max_num_examples
    most = min(filter(None, (bound, limit)), default=MAX_IMAGES)
    claimed: Any = facts.get("images")
    images = claimed if _is_integer(claimed) else 0
    if images > most:
        name = _name(registered)
        source = (
            f"its key is registered with {most} at most: fedgan keys rotate {name}=IMAGES"
            if most == bound
            else f"federation.max_num_examples allows {most}"
        )
        label = f"'{name}'" if name else "a hospital"
        raise FederationError(f"{label} reports {images} training images, and {source}")
    validators: dict[str, Callable[[Any], bool]] = {
        "number": lambda value: (
            _is_integer(value) and 0 <= value < settings.federation.participants
        ),
        "name": _is_name,
        "images": lambda value: images > 0,
        "label_names": lambda value: (
            isinstance(value, list) and len(value) <= MAX_LABELS and all(map(_is_name, value))
        ),
        "exclusive": lambda value: isinstance(value, bool),
        "channels": lambda value: _is_integer(value) and 0 < value <= 4,
        "resolution": lambda value: _is_integer(value) and value == settings.data.resolution,
        "phantoms": lambda value: isinstance(value, bool),
        "units": lambda value: _is_integer(value) and 0 <= value <= images,
        "label_counts": lambda value: (
            isinstance(value, list)
            and len(value) in (0, labels)
            and all(_is_integer(count) and 0 <= count <= images for count in value)
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


def bind_key(member: Member, names: Names) -> Member:
    """The member under the name of its registered key.

    Raises `FederationError` where its introduction has the name of another registered key.
    """
    own = _name(names[member.node])
    others = {_name(name) for node, name in names.items() if node != member.node}
    if member.name in others - {own}:
        raise FederationError(
            f"{member} has the name of another hospital's key: give its shard a unique name "
            "(fedgan data import --name)"
        )
    return dataclasses.replace(member, key=own or f"node {member.node}", name=own or member.name)


def _name(registered: str) -> str:
    """The name of a key from its name at the SuperLink; "" where that is no name."""
    name = registered.partition("=")[0]
    return name if _is_name(name) else ""


def _bound(registered: str) -> int | None:
    try:
        return split_bound(registered)[1]
    except ConfigError:  # registered by hand under another text
        return None


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_name(value: Any) -> bool:
    return (
        isinstance(value, str)
        and re.fullmatch(NAME, value) is not None
        and is_printable(value)
        and value.strip(". ") != ""
    )


Kind = tuple[tuple[str, ...], bool, int, int]  # label names, exclusive, channels, resolution


def kind_of(images: Member | State) -> Kind:
    """What must be equal in all hospitals."""
    return images.label_names, images.exclusive, images.channels, images.resolution


def find_misfits(
    members: Sequence[Member],
    participants: Sequence[Participant] = (),
    check: Check = lambda member: None,
    kind: Kind | None = None,
) -> dict[int, FedganError]:
    """By node, why members may not take part.

    `participants`: all that ever joined. `check`: as in `wait_for_members`. `kind`: of the run;
    None: that of most members that pass `check`.
    """
    misfits = dict[int, FedganError]()

    def left() -> list[Member]:
        return [member for member in members if member.node not in misfits]

    for member in members:
        try:
            check_identity(member, participants)
            check(member)
        except DataError as error:
            misfits[member.node] = DataError(f"{member}: {error}")
        except FedganError as error:
            misfits[member.node] = error
    for key, advice in (
        ("number", "give each its own partition-id from 0"),
        ("name", "give each shard a unique name (fedgan data import --name)"),
    ):
        uses = Counter(getattr(member, key) for member in left())
        for member in left():
            if uses[getattr(member, key)] > 1:
                misfits[member.node] = FederationError(
                    f"{member} has the {key} of another hospital that introduces itself: {advice}"
                )
    candidates = sorted(left(), key=lambda member: member.number)
    kind = kind or Counter(map(kind_of, candidates)).most_common(1)[0][0] if candidates else None
    for member in candidates:
        if kind_of(member) != kind:
            misfits[member.node] = FederationError(
                f"{member} and the other hospitals differ in {_difference(kind_of(member), kind)}: "
                "import all shards with the same options"
            )
    return misfits


def _difference(one: Kind, other: Kind | None) -> str:
    keys = ("label_names", "exclusive", "channels", "resolution")
    return ", ".join(k for k, a, b in zip(keys, one, other or one, strict=True) if a != b)


def check_identity(member: Member, participants: Sequence[Participant]) -> None:
    """Raise `FederationError` where a member contradicts what joined the run before."""
    for row in participants:
        is_same = row.key == member.key or not row.key  # a row without key is bound now
        if not is_same and member.number == row.number:
            raise FederationError(
                f"{member} has the number of {hospital_label(row.number, row.name)}, whose key is "
                f"'{row.key}': give it its own partition-id"
            )
        if row.key and row.key == member.key and row.number != member.number:
            raise FederationError(
                f"{member} joined this run as {hospital_label(row.number, row.name)}: give it "
                f"partition-id {row.number} again"
            )
        if row.name == member.name and row.number != member.number:
            raise FederationError(
                f"{member} has the name of another hospital: give its shard a unique name "
                "(fedgan data import --name)"
            )
        if row.number != member.number:
            continue
        renamed = row.name != member.name and (row.key or not member.key)
        if renamed or row.images != member.images:
            raise FederationError(
                f"{member} has {member.images} training images, and hospital {row.number + 1} "
                f"joined this run as '{row.name}' with {row.images}: give it the shard that it "
                "began with, or begin a new run"
            )


def refusals(names: Names, why: Mapping[int, str]) -> dict[int, dict[str, str]]:
    """By node the row of a round's line: name of its registered key ("": none), and why."""
    return {
        node: {"name": _name(names.get(node, "")), "why": printable(text)}
        for node, text in why.items()
    }


def online_nodes(grid: Grid, expected: int, keyed: bool) -> dict[int, str]:
    """The online nodes, sorted, with the names of their registered keys in a deployment (`keyed`).

    Raises `ConfigError` where the nodes of a simulation are more than `expected`.
    """
    if keyed:
        nodes = {int(node.node_id): str(node.name) for node in retry_on_5xx(grid.get_nodes)}
        return dict(sorted(nodes.items()))
    nodes = dict.fromkeys(sorted(retry_on_5xx(grid.get_node_ids)), "")
    if len(nodes) > expected:
        raise ConfigError(
            f"{len(nodes)} nodes for federation.hospitals = {expected}: start as many, "
            f"e.g. flwr run . --federation-config 'num-supernodes={expected}'"
        )
    return nodes
