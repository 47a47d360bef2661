"""The federation's loop: send the model, collect the hospitals' models, aggregate, write down, look at it.

Flower's strategies say what is sent and how answers become one model; the loop round them is our own,
so that every wait is bounded, a hospital that is missing or whose answer is rejected is named, and a run can go on from
any round. Answers are sorted by the hospital's number first: the order of a sum is its value.

A round counts with the answers of `federation.min_hospitals`, or fails. Who missed it gets the current model in the next one,
and goes on from its own state of its last answer that counted: what it trained for an answer that came too late is forgotten.
A hospital whose privacy budget is spent says so (`exhausted`) and is asked no more; when fewer are left than the strategy
needs, the run is over with the rounds that it has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedgan.config import Settings, to_dict
from fedgan.errors import FederationError
from fedgan.run_folder import RunFolder
from fedgan.runs.budget import Plan
from fedgan.runs.compatibility import min_updates
from fedgan.runs.evaluator import RoundEvaluator
from fedgan.runs.participants import Member, Participant
from fedgan.runs.round_state import (
    State,
    has_line,
    initial_state,
    is_evaluated,
    keeps_average,
    load_state,
    save_state,
    write_line,
)
from fedgan.training.checkpoint import load_generator
from fedgan.training.ema import average_of_rounds
from server.aggregation.client_level_dp import equalize_weights, noise_statement, record_round
from server.aggregation.secure import (
    Masked,
    Round,
    check_masked,
    check_plan,
    disclosure_note,
    send_and_receive_masked,
)
from server.aggregation.strategies import (
    aggregate,
    expect,
    make_strategy,
    restore_strategy,
    strategy_state,
)
from server.aggregation.update_checks import check_answer, check_facts, length_for_images, too_long
from server.attendance import Attendance
from server.metrics import (
    absence_note,
    describe_absence,
    exhausted_now,
    exhausted_status,
    hospital_line,
    mean_of,
)
from server.records import array_bytes, personal, to_record
from server.requests import AWAY, UNASKED, Answers, send_and_receive
from server.roster import Roster, introduce
from server.wire import inward, outward, outward_bytes

Event = dict[str, Any]
Arrays = dict[str, np.ndarray]


class Federation:
    """One run: settings, folder, evaluator, and the experiment that the hospitals' states are keyed by.

    `patient`: hospitals are machines that come back. One whose connection fails is asked again, and one that was absent may
    join between two rounds; in a simulation it never comes back.
    """

    def __init__(
        self,
        settings: Settings,
        run: RunFolder,
        experiment: str,
        evaluator: RoundEvaluator,
        on_event: Callable[[Event], None] = lambda event: None,
        reconnecting: bool = False,
    ) -> None:
        self.settings, self.run, self.experiment, self.evaluator, self.on_event = (
            settings,
            run,
            experiment,
            evaluator,
            on_event,
        )
        self.reconnecting = reconnecting
        self.notes: dict[
            int, str
        ] = {}  # by number: what its next order tells a hospital about its last answer

    def train(self, grid: Grid) -> None:
        """All rounds that are not done yet. Raises `FederationError` when too few hospitals answer."""
        state = load_state(self.run, self.experiment, self.on_event)
        if state is not None and state.is_over(self.settings):
            return
        gone = {row["number"] for row in state.exhausted} if state else set()
        members, absent = introduce(grid, self.settings, self._order(), gone, self.reconnecting)
        self.there = Attendance(
            self.settings, self.run, self._order(), members, self.on_event, self.reconnecting
        )
        self.evaluator.check_compatible(
            members[0].label_names, members[0].exclusive, members[0].channels, members[0].resolution
        )
        for why in absent:
            self.on_event({"event": "note", "text": f"a hospital did not join: {why}"})
        state = initial_state(self.settings, members) if state is None else self.there.rejoin(state)
        if not self.run.checkpoint(state.round).is_file():
            save_state(self.run, self.settings, state, self.experiment)
        self.there.describe(state)
        if state.line is not None:
            self.notes = {
                row["number"]: absence_note(row, state.round)
                for row in state.line.get("absent", [])
            }
            self._evaluate_and_log(
                state
            )  # in case the run was stopped between the checkpoint and its line
        if not (self.run.samples / "real.png").is_file():
            self.evaluator.write_real_samples()
        plan, noise = self._plan(state)
        strategy = make_strategy(self.settings)
        restore_strategy(strategy, state.moments)
        self.on_event(
            {
                "event": "start",
                "hospitals": [member.name for member in self.there.active_members(state)],
                "rounds": self.settings.federation.rounds,
                "first_round": state.round + 1,
                "images": plan.total,
                "images_seen": state.images_seen,
            }
        )
        if self.settings.privacy.client_level != "none":
            self.on_event(
                {
                    "event": "note",
                    "text": noise_statement(
                        self.settings, sum(array.size for array in state.arrays.values())
                    ),
                }
            )
        if self.settings.federation.secure:
            self.on_event({"event": "note", "text": disclosure_note(self.settings)})
        while not state.is_over(self.settings):
            state = self._round(grid, strategy, state, plan, noise)
            self._evaluate_and_log(state, is_new=True)
            if self.reconnecting and not state.is_over(self.settings):
                known = len(state.participants)
                self.there.admit_late_joiners(grid, state)
                if len(state.participants) > known:
                    plan, noise = self._plan(state)

    def conclude(self) -> None:
        """The final evaluation, of the last round's generator. Can be repeated."""
        newest, state = self.run.last_round() or 0, load_state(self.run, self.experiment)
        if state is None or not state.is_over(self.settings):
            raise FederationError(
                f"round {newest} of {self.settings.federation.rounds} is the last that is complete: resume the run"
            )
        self._evaluate_and_log(state)
        self.on_event({"event": "evaluation", "round": newest, "final": True})
        facts = {
            "arm": "federated",
            "name": self.settings.name,
            "round": newest,
            "images_seen": state.images_seen,
            "wall_seconds": state.wall_seconds,
            "bytes_exchanged": state.bytes_exchanged,
            "label_names": list(state.label_names),
        }
        result = self.evaluator.evaluate_final(
            load_generator(self.run.checkpoint(newest))[0], facts
        )
        self.on_event({"event": "evaluated", "round": newest, "final": True, "result": result})

    # --- one round -------------------------------------------------------------------------------

    def _plan(self, state: State) -> tuple[Plan, float]:
        """Who shows how many images, and the least noise of all: the search for it takes seconds, so once for these shares."""
        plan = Plan(self.settings, state.participants)
        check_plan(self.settings, plan, state.round)
        return plan, plan.least_noise(self.settings, len(state.label_names))

    def _round(
        self, grid: Grid, strategy: Strategy, state: State, plan: Plan, noise: float
    ) -> State:
        """Train and aggregate one round; the state after it, already on the disk."""
        number, begun, members = (
            state.round + 1,
            time.perf_counter(),
            self.there.active_members(state),
        )
        images = {member.number: plan.images(state.round, member.number) for member in members}
        self.on_event(
            {
                "event": "round_start",
                "round": number,
                "rounds": self.settings.federation.rounds,
                "images": {member.name: images[member.number] for member in members},
            }
        )
        answers = self._ask(grid, strategy, members, state, plan, noise)
        up = sum(array_bytes(reply) for reply in answers.replies.values())
        down = len(members) * outward_bytes(self.settings, state.arrays)
        replies, absences = self._validate_replies(members, answers, state, images)
        self._require(replies, absences, state, number)
        members = [member for member in members if member.number in replies]
        facts = [hospital_line(member, replies[member.number]) for member in members]
        counted = [
            replies[member.number]
            for member, row in zip(members, facts, strict=True)
            if self._counts(row)
        ]
        arrays, spent = self._aggregate(strategy, number, counted, state, answers)
        after = State(
            round=number,
            arrays=arrays,
            moments=strategy_state(strategy),
            images_seen=state.images_seen + sum(row["images"] for row in facts),
            bytes_exchanged=state.bytes_exchanged + up + down,
            wall_seconds=state.wall_seconds + time.perf_counter() - begun,
            label_names=state.label_names,
            exclusive=state.exclusive,
            channels=state.channels,
            resolution=state.resolution,
            exhausted=state.exhausted + exhausted_now(members, facts, number),
            phantoms=state.phantoms,
            participants=state.participants,
            since=state.since | dict.fromkeys(replies, number),
        )
        if keeps_average(self.settings):
            shown = after.images_seen - state.images_seen
            after.average = average_of_rounds(
                state.average, arrays, self.settings.training, shown, state.images_seen
            )
        after.line = {
            "round": number,
            "images_seen": after.images_seen,
            "wall_seconds": after.wall_seconds,
            "bytes_exchanged": after.bytes_exchanged,
            "mean": mean_of(facts),
            "hospitals": facts,
            **({"absent": absences} if absences else {}),
            **spent,
            **exhausted_status(after, self.settings),
        }
        save_state(self.run, self.settings, after, self.experiment)
        return after

    def _ask(
        self,
        grid: Grid,
        strategy: Strategy,
        members: Sequence[Member],
        state: State,
        plan: Plan,
        noise: float,
    ) -> Answers:
        """Send each hospital the model and its own order, and wait until enough have answered or no more can."""
        number = state.round + 1
        order = ConfigRecord(self._order() | {"round": number, "least_noise": noise})
        expect(strategy, len(members))
        configured = strategy.configure_train(
            number, to_record(state.arrays), order, cast(Grid, Roster(members))
        )
        messages = {
            message.metadata.dst_node_id: message
            for message in outward(self.settings, configured, state.arrays)
        }
        own: dict[int, dict[str, int | str]] = {
            member.node: {
                "images": plan.images(state.round, member.number),
                "planned": plan.planned(member.number),
                "batch": plan.batches[member.number],
                "since": state.since.get(member.number, 0),
                "note": self.notes.pop(member.number, ""),
            }
            for member in members
        }
        by_node = {member.node: member for member in members}

        def question(node: int, seconds: float) -> Message:
            return personal(messages[node], own[node], seconds)

        def on_reply(node: int) -> None:  # a simulation tells more: how far each hospital is
            if self.reconnecting:
                name, images = by_node[node].name, int(own[node]["images"])
                self.on_event(
                    {
                        "event": "progress",
                        "round": number,
                        "hospital": name,
                        "images": images,
                        "of": images,
                    }
                )

        if self.settings.federation.secure:
            return send_and_receive_masked(
                grid, self._masked_round(members, state, plan, question, on_reply)
            )
        # in the order of the hospitals, the largest first: with fewer cores than hospitals the long work begins at once
        nodes, limit = [member.node for member in members], self.settings.federation.round_timeout
        return send_and_receive(
            grid, nodes, question, limit, self._enough(state), self.reconnecting, on_reply
        )

    def _masked_round(
        self,
        members: Sequence[Member],
        state: State,
        plan: Plan,
        question: Callable[[int, float], Message],
        on_reply: Callable[[int], None],
    ) -> Round:
        """What secure aggregation needs to know of a round."""

        def check(member: Member, reply: Message) -> None:
            self._check(member, reply, state, plan.images(state.round, member.number))

        def counts(member: Member, reply: Message) -> bool:
            return self._counts(hospital_line(member, reply))

        enough = self._enough(state)
        return Round(
            self.settings,
            members,
            state.arrays,
            enough,
            self.reconnecting,
            question,
            check,
            counts,
            on_reply,
        )

    def _enough(self, state: State) -> int:
        """How many answers a round needs: `federation.min_hospitals`, or those of all that may still train."""
        active_members = self.settings.federation.participants - len(state.exhausted)
        return min(self.settings.federation.min_hospitals or active_members, active_members)

    def _validate_replies(
        self, members: Sequence[Member], answers: Answers, state: State, images: Mapping[int, int]
    ) -> tuple[dict[int, Message], list[dict[str, Any]]]:
        """By number the answers that count, and of each other hospital its name, what happened (missing, rejected) and why."""
        absences, good, number = list[dict[str, Any]](), dict[int, Message](), state.round + 1
        secure = self.settings.federation.secure

        def leave_out(share: Member | Participant, what: str, why: str) -> None:
            absences.append({"name": share.name, "number": share.number, "what": what, "why": why})
            self.notes[share.number] = absence_note(absences[-1], number)

        for member in members:
            if (reply := answers.replies.get(member.node)) is None:
                leave_out(member, "missing", answers.failures[member.node])
                continue
            try:
                self._check(member, reply, state, images[member.number])
                (good[member.number],) = (
                    [reply] if secure else inward(self.settings, [reply], state.arrays)
                )
            except FederationError as error:
                leave_out(member, "rejected", str(error))
        # no length can be seen under a mask
        lengths = [
            0.0 if secure else length_for_images(reply, state.arrays, images[place])
            for place, reply in good.items()
        ]
        for place, long in zip(list(good), too_long(self.settings, lengths), strict=True):
            if long:
                del good[place]
                limit = self.settings.federation.max_update_ratio
                whose = self.there.members[place]
                why = f"answered with an update more than {limit:g} times as long as the round's median: see"
                leave_out(whose, "rejected", f"{whose} {why} federation.max_update_ratio")
        gone = {row["number"] for row in state.exhausted}
        for share in state.participants:  # who joined before a restart and has not come back
            if share.number not in self.there.members and share.number not in gone:
                leave_out(share, "missing", AWAY)
        return good, absences

    def _check(self, member: Member, reply: Message, state: State, images: int) -> None:
        """Raise `FederationError` for an answer that must not count."""
        number = state.round + 1
        if self.settings.federation.secure:
            check_masked(member, reply, state.arrays)
            check_facts(member, reply, number, images)
        else:
            check_answer(member, reply, state.arrays, number, images, self.settings.federation.wire)

    def _require(
        self,
        replies: Mapping[int, Message],
        absences: Sequence[Mapping[str, Any]],
        state: State,
        number: int,
    ) -> None:
        """Say who is left out of this round; raise `FederationError` where the answers that count are too few."""
        told = [
            describe_absence(row, number, self.settings)
            for row in absences
            if row["why"] != UNASKED
        ]
        if len(replies) < self._enough(state):
            raise FederationError(
                "; ".join(told) or f"round {number}: too few hospitals have joined"
            )
        for text in told:
            self.on_event({"event": "note", "text": f"{text}; the round goes on without it"})

    def _counts(self, row: Mapping[str, Any]) -> bool:
        """Whether an answer is aggregated: not that of a hospital that was not allowed a step.

        One that only idles in this round counts with the model that it was sent, but for Flower's clipping, which cannot
        clip an update of nothing.
        """
        return row["images"] > 0 or not (
            "exhausted" in row or self.settings.privacy.client_level != "none"
        )

    def _unmask(self, answers: Masked, number: int) -> Arrays:
        """The model that masked answers make together."""
        if answers.model is None:
            raise FederationError(
                f"secure aggregation made no model of the answers of round {number}: see flower.log"
            )
        if answers.clipped > 0.5:
            self.on_event(
                {
                    "event": "note",
                    "text": f"in round {number} about {answers.clipped:.0f} numbers of a hospital's change were cut off, on "
                    "average: raise federation.secure_range",
                }
            )
        return answers.model

    def _aggregate(
        self,
        strategy: Strategy,
        number: int,
        replies: list[Message],
        state: State,
        answers: Answers,
    ) -> tuple[Arrays, dict[str, dict[str, Any]]]:
        """The model of these answers, and what it cost the hospitals' privacy; the model as it was where they are too few."""
        if isinstance(answers, Masked):
            return self._unmask(answers, number), {}
        if len(replies) < min_updates(self.settings):
            return state.arrays, {}
        expect(strategy, len(replies))
        spent = {}
        if self.settings.privacy.client_level != "none":
            replies = equalize_weights(replies)
            spent = {
                "client_level_dp": record_round(
                    self.settings, self.run, self.experiment, len(replies)
                )
            }
        made = aggregate(strategy, self.settings, number, replies, state.arrays)
        if made is None:
            raise FederationError(
                f"the strategy made no model of the answers of round {number}: see flower.log"
            )
        return made, spent

    def _evaluate_and_log(self, state: State, is_new: bool = False) -> None:
        """Let the evaluator look where it is due, and write the round's line, unless that is done already.

        `anew`: the round was just trained, so a line of it is an earlier try's; with privacy that one's epsilon is too low.
        """
        if state.line is None or (not is_new and has_line(self.run, state.round)):
            return
        line = dict(state.line)
        if is_evaluated(self.settings, state.round) or (
            state.round and state.is_over(self.settings)
        ):
            self.on_event({"event": "evaluation", "round": state.round, "final": False})
            generator, _ = load_generator(self.run.checkpoint(state.round))
            result = self.evaluator.evaluate_round(generator, state.round, state.images_seen)
            line |= result
            self.on_event(
                {"event": "evaluated", "round": state.round, "final": False, "result": result}
            )
        write_line(self.run, line)
        self.on_event(
            {
                "event": "round_end",
                "round": state.round,
                "rounds": self.settings.federation.rounds,
                "line": line,
            }
        )

    def _order(self) -> dict[str, Any]:
        """What every message tells a hospital: the whole scenario, the experiment, and (for simulations) the run folder."""
        return {
            "settings": json.dumps(to_dict(self.settings)),
            "experiment": self.experiment,
            "run": str(self.run.path),
        }
