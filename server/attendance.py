"""Who takes part in a run as it goes on: who has joined, who comes back, who comes late."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.serverapp import Grid

from fedgan import files
from fedgan.config import Settings
from fedgan.errors import FederationError
from fedgan.run_folder import RunFolder
from fedgan.runs.participants import Member, Participant
from fedgan.runs.round_state import State
from server.roster import RETURN_WAIT, check_alike, online, request_introductions


class Attendance:
    """The hospitals that are introduced, by their number. `order`: what a message tells them; `patient`: as in Federation."""

    def __init__(
        self,
        settings: Settings,
        run: RunFolder,
        order: Mapping[str, Any],
        members: Sequence[Member],
        on_event: Callable[[dict[str, Any]], None],
        reconnecting: bool,
    ) -> None:
        self.settings, self.run, self.order, self.on_event, self.reconnecting = (
            settings,
            run,
            order,
            on_event,
            reconnecting,
        )
        self.members = {member.number: member for member in members}

    def rejoin(self, state: State) -> State:
        """The state of a run that goes on, with those among its hospitals who have come for the first time."""
        if not state.participants:  # written before shares were kept: all had joined
            rows = [
                Participant(row["number"], row["name"], row["images"], row["units"])
                for row in state.exhausted
            ]
            state.participants = rows + [
                member.participant(0)
                for number, member in self.members.items()
                if number not in {r.number for r in rows}
            ]
            state.since = {share.number: state.round for share in state.participants if state.round}
        for member in list(self.members.values()):
            self._admit(member, state)
        return state

    def _admit(self, member: Member, state: State) -> None:
        """Enter a hospital that has come. Raises `FederationError` when it is not the one that joined before."""
        known = next((share for share in state.participants if share.number == member.number), None)
        if any(
            share.name == member.name and share.number != member.number
            for share in state.participants
        ):
            raise FederationError(
                f"{member} has the name of another hospital: give its shard one of its own (fedgan data import --name)"
            )
        if known is None:
            state.participants.append(member.participant(state.round))
        elif (known.name, known.images) != (member.name, member.images):
            raise FederationError(
                f"{member} came with {member.images} training images, and hospital {known.number + 1} joined this run as "
                f"'{known.name}' with {known.images}: give it the shard that it began with, or begin a new run"
            )
        state.phantoms = state.phantoms and member.phantoms
        self.members[member.number] = member

    def admit_late_joiners(self, grid: Grid, state: State) -> None:
        """Introduce who has come online since the last look."""
        known = {member.node for member in self.members.values()}
        new = [
            node
            for node in online(grid, self.settings.federation.participants)
            if node not in known
        ]
        members, problems = (
            request_introductions(grid, self.settings, self.order, new, RETURN_WAIT)
            if new
            else ([], [])
        )
        pattern = next(iter(self.members.values()))
        for member in members:
            try:
                check_alike(pattern, member)
                self._admit(member, state)
                self.on_event(
                    {"event": "note", "text": f"{member} has joined after round {state.round}"}
                )
            except FederationError as error:
                problems.append(str(error))
        for why in problems:
            self.on_event({"event": "note", "text": f"a hospital did not join: {why}"})
        if members:
            self.describe(state)

    def active_members(self, state: State) -> list[Member]:
        """The hospitals that are introduced and may still train, in the order of their numbers."""
        gone = {row["number"] for row in state.exhausted}
        return [self.members[number] for number in sorted(self.members) if number not in gone]

    def describe(self, state: State) -> None:
        """Write hospitals.json where nobody else can: a deployed server opens no hospital's shard."""
        if self.reconnecting:
            counts = {
                member.number: {
                    "train": dict(zip(member.label_names, member.label_counts, strict=True))
                }
                for member in self.members.values()
                if member.label_counts
            }
            rows = [
                {
                    "name": share.name,
                    "counts": counts.get(share.number, {}),
                    "images": {"train": share.images},
                }
                for share in sorted(state.participants, key=lambda share: share.number)
            ]
            files.write_json(self.run.hospitals, rows)
