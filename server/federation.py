"""The federation's loop: send the model, collect updates, aggregate, save, evaluate.

Flower's strategies define what is sent and how replies become one model. The loop around them is
fedgan's own, so that every wait is bounded, every missing or rejected hospital is named, and a run
can resume at any round. Replies are sorted by the hospital's number: the order of a sum determines
its floating-point value.

A round counts with the replies of `federation.min_hospitals`, or fails. A hospital that missed it
receives the current model in the next one and continues from its own state of its last reply that
counted; later training is discarded. A hospital whose privacy budget is spent reports `exhausted`
and trains no more; when fewer are left than the strategy needs, the run ends early.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedgan.apportion import limit_shares
from fedgan.config import Settings, to_dict
from fedgan.errors import FederationError
from fedgan.redact import printable
from fedgan.run_folder import RunFolder
from fedgan.runs.budget import Plan
from fedgan.runs.compatibility import min_updates
from fedgan.runs.evaluator import RoundEvaluator
from fedgan.runs.participants import Member, Participant, hospital_label
from fedgan.runs.round_state import (
    State,
    has_line,
    initial_state,
    is_evaluated,
    keeps_average,
    load_state,
    restore_lines,
    save_state,
    write_line,
)
from fedgan.training.checkpoint import load_generator
from fedgan.training.ema import average_of_rounds
from server.aggregation.client_level_dp import noise_statement, private_mean, record_round
from server.aggregation.secure import (
    MaskedReplies,
    SecureRound,
    check_masked,
    check_plan,
    disclosure_note,
    send_and_receive_masked,
)
from server.aggregation.strategies import (
    aggregate,
    make_strategy,
    restore_strategy,
    set_expected_hospitals,
    strategy_state,
)
from server.aggregation.update_checks import (
    check_exhausted,
    check_facts,
    check_update,
    find_too_long,
    update_length,
)
from server.aggregation.weights import limit_weights
from server.metrics import (
    absence_note,
    describe_absence,
    exhausted_status,
    hospital_metrics,
    lost_states,
    mean_metrics,
    newly_exhausted,
)
from server.records import (
    array_bytes,
    decode_replies,
    encode_messages,
    encoded_bytes,
    model_of,
    personalize,
    to_record,
)
from server.requests import NOT_AWAITED, OFFLINE, Replies, send_and_receive
from server.roster import MemberGrid, Roster, kind_of, wait_for_members

Event = dict[str, Any]
Arrays = dict[str, np.ndarray]


class Federation:
    """One run: settings, folder, evaluator, and the experiment id of the hospitals' states.

    `reconnecting`: hospitals are machines that reconnect. A request whose connection fails is sent
    again, and an absent hospital may join between two rounds. Simulated hospitals never return.
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
        self.settings, self.run, self.experiment = settings, run, experiment
        self.evaluator, self.on_event, self.reconnecting = evaluator, on_event, reconnecting
        self.notes: dict[int, str] = {}  # by hospital number: why its last reply did not count

    def train(self, grid: Grid) -> None:
        """Train all remaining rounds. Raises `FederationError` when too few hospitals reply."""
        state = load_state(self.run, self.experiment, self.on_event)
        if state is not None and state.is_over(self.settings):
            return
        state = self._join(grid, state)
        if not (self.run.samples / "real.png").is_file():
            self.evaluator.write_real_samples()
        plan, noise = self._plan(state)
        strategy = make_strategy(self.settings)
        restore_strategy(strategy, state.moments)
        self.on_event(
            {
                "event": "start",
                "hospitals": [member.name for member in self.roster.active_members(state)],
                "rounds": self.settings.federation.rounds,
                "first_round": state.round + 1,
                "images": plan.total,
                "images_seen": state.images_seen,
            }
        )
        if self.settings.privacy.client_level != "none":
            parameters = sum(array.size for array in state.arrays.values())
            self._note(noise_statement(self.settings, parameters))
        if self.settings.federation.secure:
            self._note(disclosure_note(self.settings))
        while not state.is_over(self.settings):
            state = self._round(grid, strategy, state, plan, noise)
            self._evaluate_and_log(state, is_new=True)
            if self.reconnecting and not state.is_over(self.settings):
                known = len(state.participants)
                self.roster.admit_late_joiners(grid, state)
                if len(state.participants) > known:
                    plan, noise = self._plan(state)
                    # their plans hold from now on, also where the next round fails
                    save_state(self.run, self.settings, state, self.experiment)

    def evaluate_final(self) -> None:
        """Evaluate the last round's generator. Can be repeated."""
        newest, state = self.run.last_round() or 0, load_state(self.run, self.experiment)
        if state is None or not state.is_over(self.settings):
            raise FederationError(
                f"round {newest} of {self.settings.federation.rounds} is the last complete one: "
                "resume the run"
            )
        self._log_again(state)
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
        generator, _ = load_generator(self.run.checkpoint(newest))
        result = self.evaluator.evaluate_final(generator, facts)
        self.on_event({"event": "evaluated", "round": newest, "final": True, "result": result})

    def _note(self, text: str) -> None:
        self.on_event({"event": "note", "text": text})

    # --- before the first round ------------------------------------------------------------------

    def _join(self, grid: Grid, state: State | None) -> State:
        """Wait for the hospitals; the state to continue from, on disk and in metrics.jsonl."""
        members, refused = wait_for_members(
            grid, self.settings, self._request_config(), state, self.reconnecting, self._check_kind
        )
        self.roster = Roster(
            self.settings,
            self.run,
            self._request_config(),
            members,
            self.on_event,
            self.reconnecting,
            self._check_kind,
            refused,
        )
        known = 0
        if state is None:
            state = initial_state(self.settings, members)
        else:
            known = len(state.participants)
            state = self.roster.rejoin(state)
        if len(state.participants) > known:
            save_state(self.run, self.settings, state, self.experiment)
        self.roster.write_hospitals(state)
        if state.line is not None:
            self.notes = {
                row["number"]: absence_note(row, state.round)
                for row in state.line.get("absent", [])
            }
            self._log_again(state)
        return state

    def _check_kind(self, member: Member) -> None:
        """Raise `DataError` where the evaluator cannot use images of this kind."""
        self.evaluator.check_compatible(*kind_of(member))

    def _plan(self, state: State) -> tuple[Plan, float]:
        """The images of all rounds and the lower bound of the noise; its search takes seconds."""
        plan = Plan(self.settings, state.participants)
        sizes = [row.images for row in state.participants]
        for row, limit in zip(
            state.participants, limit_shares(sizes, self.settings.federation.max_share), strict=True
        ):
            if limit < row.images:
                self._note(
                    f"{hospital_label(row.number, row.name)} has {row.images} of {sum(sizes)} "
                    f"training images and counts as {limit}: federation.max_share"
                )
        check_plan(self.settings, plan, state.round)
        return plan, plan.least_noise(self.settings, len(state.label_names))

    def _request_config(self) -> dict[str, Any]:
        """The ConfigRecord of every request: scenario, experiment, run folder (for simulations)."""
        return {
            "settings": json.dumps(to_dict(self.settings)),
            "experiment": self.experiment,
            "run": str(self.run.path),
        }

    # --- one round -------------------------------------------------------------------------------

    def _round(
        self, grid: Grid, strategy: Strategy, state: State, plan: Plan, noise: float
    ) -> State:
        """Train and aggregate one round; the state after it, saved to disk."""
        number, begun = state.round + 1, time.perf_counter()
        members = self.roster.active_members(state)
        images = {member.number: plan.images(state.round, member.number) for member in members}
        self.on_event(
            {
                "event": "round_start",
                "round": number,
                "rounds": self.settings.federation.rounds,
                "images": {member.name: images[member.number] for member in members},
            }
        )

        # train at the hospitals
        replies = self._train_hospitals(grid, strategy, members, state, plan, noise)
        up = sum(array_bytes(reply) for reply in replies.received.values())
        down = len(members) * encoded_bytes(self.settings, state.arrays)

        # validate
        valid, absences = self._validate_replies(members, replies, state, images)
        self._require_enough(valid, absences, state, number)
        members = [member for member in members if member.number in valid]
        rows = [hospital_metrics(member, valid[member.number]) for member in members]
        for text in lost_states(rows):
            self._note(f"in round {number} {text}")

        # aggregate
        counted = [
            valid[member.number]
            for member, row in zip(members, rows, strict=True)
            if self._is_aggregated(row)
        ]
        arrays, privacy_cost = self._aggregate(strategy, number, counted, state, replies)
        after = dataclasses.replace(
            state,
            round=number,
            arrays=arrays,
            moments=strategy_state(strategy),
            images_seen=state.images_seen + sum(row["images"] for row in rows),
            bytes_exchanged=state.bytes_exchanged + up + down,
            wall_seconds=state.wall_seconds + time.perf_counter() - begun,
            exhausted=state.exhausted + newly_exhausted(members, rows, number),
            since=state.since | dict.fromkeys(valid, number),
        )
        if keeps_average(self.settings):
            seen = after.images_seen - state.images_seen
            after.average = average_of_rounds(
                state.average, arrays, self.settings.training, seen, state.images_seen
            )

        # save
        after.line = {
            "round": number,
            "images_seen": after.images_seen,
            "wall_seconds": after.wall_seconds,
            "bytes_exchanged": after.bytes_exchanged,
            "mean": mean_metrics(rows),
            "hospitals": rows,
            **({"absent": absences} if absences else {}),
            **({"refused": list(refused.values())} if (refused := self.roster.refused) else {}),
            **privacy_cost,
            **exhausted_status(after, self.settings),
        }
        save_state(self.run, self.settings, after, self.experiment)
        return after

    def _train_hospitals(
        self,
        grid: Grid,
        strategy: Strategy,
        members: Sequence[Member],
        state: State,
        plan: Plan,
        noise: float,
    ) -> Replies:
        """Send each hospital the model and its request, and wait for the replies."""
        number = state.round + 1
        config = ConfigRecord(self._request_config() | {"round": number, "least_noise": noise})
        set_expected_hospitals(strategy, len(members))
        configured = strategy.configure_train(
            number, to_record(state.arrays), config, cast(Grid, MemberGrid(members))
        )
        messages = {
            message.metadata.dst_node_id: message
            for message in encode_messages(self.settings, configured, state.arrays)
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

        def make_request(node: int, seconds: float) -> Message:
            return personalize(messages[node], own[node], seconds)

        def on_reply(node: int) -> None:
            if self.reconnecting:  # simulated hospitals report their progress themselves
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
            task = self._secure_round(members, state, plan, make_request, on_reply)
            return send_and_receive_masked(grid, task)
        # by number, the largest hospital first: with fewer cores than hospitals it starts at once
        return send_and_receive(
            grid,
            [member.node for member in members],
            make_request,
            self.settings.federation.round_timeout,
            self._min_replies(state),
            self.reconnecting,
            on_reply,
        )

    def _secure_round(
        self,
        members: Sequence[Member],
        state: State,
        plan: Plan,
        make_request: Callable[[int, float], Message],
        on_reply: Callable[[int], None],
    ) -> SecureRound:
        """The inputs of secure aggregation in this round."""

        def check(member: Member, reply: Message) -> None:
            self._check(member, reply, state, plan.images(state.round, member.number))

        def is_aggregated(member: Member, reply: Message) -> bool:
            return self._is_aggregated(hospital_metrics(member, reply))

        return SecureRound(
            self.settings,
            members,
            state.arrays,
            self._min_replies(state),
            self.reconnecting,
            make_request,
            check,
            is_aggregated,
            on_reply,
        )

    def _min_replies(self, state: State) -> int:
        """How many replies a round needs: `federation.min_hospitals`, or all that may train."""
        active = self.settings.federation.participants - len(state.exhausted)
        return min(self.settings.federation.min_hospitals or active, active)

    def _validate_replies(
        self, members: Sequence[Member], replies: Replies, state: State, images: Mapping[int, int]
    ) -> tuple[dict[int, Message], list[dict[str, Any]]]:
        """By number the replies that count, and a row for each other hospital.

        A row has name and number, what happened (missing, rejected) and why.
        """
        absences, valid, number = list[dict[str, Any]](), dict[int, Message](), state.round + 1
        is_secure = self.settings.federation.secure

        def leave_out(hospital: Member | Participant, what: str, why: str) -> None:
            row = {"name": hospital.name, "number": hospital.number, "what": what}
            row["why"] = printable(why)  # a reason may quote the reply
            absences.append(row)
            self.notes[hospital.number] = absence_note(row, number)

        for member in members:
            if (reply := replies.received.get(member.node)) is None:
                leave_out(member, "missing", replies.failures[member.node])
                continue
            try:
                self._check(member, reply, state, images[member.number])
                (valid[member.number],) = (
                    [reply] if is_secure else decode_replies(self.settings, [reply], state.arrays)
                )
            except FederationError as error:
                leave_out(member, "rejected", str(error))
        # masked updates have no length
        lengths = [
            0.0 if is_secure else update_length(reply, state.arrays, images[index])
            for index, reply in valid.items()
        ]
        too_long = find_too_long(self.settings, lengths)
        for index, is_too_long in zip(list(valid), too_long, strict=True):
            if is_too_long:
                del valid[index]
                member = self.roster.members[index]
                why = (
                    f"{member} replied with an update more than "
                    f"{self.settings.federation.max_update_ratio:g} times as long as the round's "
                    "median: see federation.max_update_ratio"
                )
                leave_out(member, "rejected", why)
        exhausted = {row["number"] for row in state.exhausted}
        for participant in state.participants:  # joined before a restart and not connected since
            if participant.number not in self.roster.members.keys() | exhausted:
                leave_out(participant, "missing", OFFLINE)
        return valid, absences

    def _check(self, member: Member, reply: Message, state: State, images: int) -> None:
        """Raise `FederationError` for a reply that must not count."""
        number = state.round + 1
        if self.settings.federation.secure:
            check_masked(member, reply, state.arrays)
            check_facts(member, reply, number, images)
        else:
            check_update(member, reply, state.arrays, number, images, self.settings.federation.wire)
        check_exhausted(self.settings, member, reply)

    def _require_enough(
        self,
        valid: Mapping[int, Message],
        absences: Sequence[Mapping[str, Any]],
        state: State,
        number: int,
    ) -> None:
        """Report absent hospitals; raise `FederationError` when too few replies count."""
        texts = [
            describe_absence(row, number, self.settings)
            for row in absences
            if row["why"] != NOT_AWAITED
        ]
        if len(valid) < self._min_replies(state):
            raise FederationError(
                "; ".join(texts) or f"round {number}: too few hospitals have joined"
            )
        for text in texts:
            self._note(f"{text}; the round continues without it")

    def _is_aggregated(self, row: Mapping[str, Any]) -> bool:
        """Whether a reply is aggregated: not that of a hospital without budget for one step.

        A hospital without images in this round counts with the model that it was sent.
        """
        return row["images"] > 0 or "exhausted" not in row

    def _aggregate(
        self,
        strategy: Strategy,
        number: int,
        counted: list[Message],
        state: State,
        replies: Replies,
    ) -> tuple[Arrays, dict[str, dict[str, Any]]]:
        """The model of these replies and its privacy cost; the old model where they are too few."""
        if isinstance(replies, MaskedReplies):
            return self._masked_model(replies, number), {}
        if self.settings.privacy.client_level != "none":
            entry = record_round(self.settings, self.run, self.experiment)
            models = [model_of(reply) for reply in counted]
            mean = private_mean(self.settings, state.arrays, models)
            return mean, {"client_level_dp": entry}
        if len(counted) < min_updates(self.settings):
            return state.arrays, {}
        set_expected_hospitals(strategy, len(counted))
        limit_weights(self.settings, counted)
        arrays = aggregate(strategy, self.settings, number, counted, state.arrays)
        if arrays is None:
            raise FederationError(
                f"the strategy made no model of the replies of round {number}: see flower.log"
            )
        return arrays, {}

    def _masked_model(self, replies: MaskedReplies, number: int) -> Arrays:
        """The model from the sum of masked replies."""
        if replies.model is None:
            raise FederationError(
                f"secure aggregation made no model of the replies of round {number}: see flower.log"
            )
        if replies.clipped > 0.5:
            self._note(
                f"in round {number} about {replies.clipped:.0f} numbers of a hospital's change "
                "were clipped, on average: raise federation.secure_range"
            )
        return replies.model

    def _log_again(self, state: State) -> None:
        """Complete metrics.jsonl: the run may have stopped before it wrote the round's line."""

        def complete(number: int, line: dict[str, Any]) -> dict[str, Any]:
            if not is_evaluated(self.settings, number):
                return line
            generator, _ = load_generator(self.run.checkpoint(number))
            return line | self.evaluator.evaluate_round(generator, number, line["images_seen"])

        restore_lines(self.run, state.round, self.on_event, complete)
        self._evaluate_and_log(state)

    def _evaluate_and_log(self, state: State, is_new: bool = False) -> None:
        """Evaluate the round where it is due and write its line, unless that is done already.

        `is_new`: the round was just trained, so an existing line belongs to an earlier attempt;
        with privacy its epsilon is too low.
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
