"""The federation's loop: send the model, collect the hospitals' models, aggregate, write down, look at it.

Flower's strategies say what is sent and how answers become one model; the loop round them is our own,
so that every wait is bounded, a missing hospital fails the round by name, and a run can go on from
any round. Answers are sorted by the hospital's number first: the order of a sum is its value.

A hospital whose privacy budget is spent says so (`exhausted`) and is asked no more; when fewer are left than the strategy
needs, the run is over with the rounds that it has.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedgan.config import Settings, to_dict
from fedgan.errors import FederationError
from fedgan.run_folder import RunFolder
from fedgan.training.checkpoint import load_generator
from server.checkpoints import State, has_line, initial_state, is_evaluated, load_state, save_state, write_line
from server.hospital_privacy import charge, even, remark
from server.records import ARRAYS, METRICS, WEIGHT, array_bytes, check_reply, personal, to_record
from server.roster import Member, Roster, gather, introduce, require_all
from server.rounds import Deal, deal, least_noise
from server.strategies import expect, fewest, make_strategy, restore_strategy, strategy_state
from server.wire import inward, outward, outward_bytes

Event = dict[str, Any]
Arrays = dict[str, np.ndarray]
MEANS = ("loss_g", "loss_d", "d_accuracy", "r_t", "p", "r1", "path_length")


class Judge(Protocol):
    """What the loop needs of the central evaluator (server/evaluator.py)."""

    def start(self) -> None:
        """Draw the pictures of real images."""

    def during(self, generator: Any, round_number: int, images_seen: int) -> dict[str, Any]:
        """Look at the generator after a round; the result joins the round's line."""

    def final(self, generator: Any, facts: dict[str, Any]) -> dict[str, Any]:
        """Look at the finished generator and write evaluation.json."""


class Federation:
    """One run: settings, folder, evaluator, and the experiment that the hospitals' states are keyed by."""

    def __init__(
        self,
        settings: Settings,
        run: RunFolder,
        experiment: str,
        judge: Judge,
        tell: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.settings, self.run, self.experiment, self.judge, self.tell = settings, run, experiment, judge, tell

    def train(self, grid: Grid) -> None:
        """All rounds that are not done yet. Raises `FederationError` when a hospital fails or is late."""
        state = load_state(self.run, self.experiment)
        if state is not None and state.is_over(self.settings):
            return
        gone = {row["number"]: (row["images"], row["units"]) for row in state.exhausted} if state else {}
        members = introduce(grid, self.settings, self._order(), gone)
        if state is None:
            state = initial_state(self.settings, members)
            save_state(self.run, self.settings, state, self.experiment)
        else:
            state.drawn = state.drawn and all(member.drawn for member in members)
        if state.line is not None:
            self._look(state)  # in case the run was stopped between the checkpoint and its line
        if not (self.run.samples / "real.png").is_file():
            self.judge.start()
        strategy = make_strategy(self.settings)
        restore_strategy(strategy, state.moments)
        # budgets stay as dealt when a hospital leaves
        sizes = gone | {member.number: (member.images, member.units) for member in members}
        images, units = zip(*(sizes[number] for number in sorted(sizes)), strict=True)
        dealt = deal(self.settings, images)
        noise = least_noise(self.settings, images, units, dealt, len(state.label_names))
        self.tell(
            {
                "event": "start",
                "hospitals": [member.name for member in left(members, state)],
                "rounds": self.settings.federation.rounds,
                "first_round": state.round + 1,
                "images": sum(dealt.totals),
                "images_seen": state.images_seen,
            }
        )
        if self.settings.privacy.hospital != "none":
            self.tell({"event": "remark", "text": remark(self.settings, sum(array.size for array in state.arrays.values()))})
        while not state.is_over(self.settings):
            state = self._round(grid, strategy, left(members, state), state, dealt, noise)
            self._look(state, anew=True)

    def conclude(self) -> None:
        """The final evaluation, of the last round's generator. Can be repeated."""
        newest, state = self.run.last_round() or 0, load_state(self.run, self.experiment)
        if state is None or not state.is_over(self.settings):
            raise FederationError(
                f"round {newest} of {self.settings.federation.rounds} is the last that is complete: resume the run"
            )
        self._look(state)
        self.tell({"event": "evaluation", "round": newest, "final": True})
        facts = {
            "arm": "federated",
            "name": self.settings.name,
            "round": newest,
            "images_seen": state.images_seen,
            "wall_seconds": state.wall_seconds,
            "bytes_exchanged": state.bytes_exchanged,
            "label_names": list(state.label_names),
        }
        result = self.judge.final(load_generator(self.run.checkpoint(newest))[0], facts)
        self.tell({"event": "evaluated", "round": newest, "final": True, "result": result})

    # --- one round -------------------------------------------------------------------------------

    def _round(self, grid: Grid, strategy: Strategy, members: Sequence[Member], state: State, dealt: Deal, noise: float) -> State:
        """Train and aggregate one round; the state after it, already on the disk."""
        number, begun = state.round + 1, time.perf_counter()
        images = {member.number: dealt.images[state.round][member.number] for member in members}
        self.tell(
            {
                "event": "round_start",
                "round": number,
                "rounds": self.settings.federation.rounds,
                "images": {member.name: images[member.number] for member in members},
            }
        )
        replies = self._ask(grid, strategy, members, state, dealt, noise)
        facts = [hospital_line(member, reply) for member, reply in zip(members, replies, strict=True)]
        up = sum(array_bytes(reply.content.array_records[ARRAYS]) for reply in replies)
        down = len(members) * outward_bytes(self.settings, state.arrays)
        counted = [reply for reply, row in zip(replies, facts, strict=True) if self._counts(row)]
        arrays, spent = self._aggregate(strategy, number, inward(self.settings, counted, state.arrays), state)
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
            drawn=state.drawn,
        )
        after.line = {
            "round": number,
            "images_seen": after.images_seen,
            "wall_seconds": after.wall_seconds,
            "bytes_exchanged": after.bytes_exchanged,
            "mean": mean_of(facts),
            "hospitals": facts,
            **spent,
            **ending(after, self.settings),
        }
        save_state(self.run, self.settings, after, self.experiment)
        return after

    def _ask(
        self, grid: Grid, strategy: Strategy, members: Sequence[Member], state: State, dealt: Deal, noise: float
    ) -> list[Message]:
        """Send each hospital the model and its own numbers of images; their answers, checked, in the order of the hospitals."""
        number, timeout = state.round + 1, self.settings.federation.round_timeout
        order = ConfigRecord(self._order() | {"round": number, "since": state.round, "least_noise": noise})
        expect(strategy, len(members))
        configured = strategy.configure_train(number, to_record(state.arrays), order, cast(Grid, Roster(members)))
        by_node = {
            member.node: {
                "images": dealt.images[state.round][member.number],
                "planned": dealt.planned(member.number),
                "batch": dealt.batches[member.number],
            }
            for member in members
        }
        # in the order of the hospitals, the largest first: with fewer cores than hospitals the long work begins at once
        places = {member.node: member.number for member in members}
        travelling = outward(self.settings, configured, state.arrays)
        messages = sorted(travelling, key=lambda message: places[message.metadata.dst_node_id])
        answers = gather(grid, [personal(message, by_node) for message in messages], timeout)
        replies = require_all(members, answers, timeout, f"in round {number}")
        for member, reply in zip(members, replies, strict=True):
            check_reply(member, reply, state.arrays, self.settings.federation.wire)
        return replies

    def _counts(self, row: Mapping[str, Any]) -> bool:
        """Whether an answer is aggregated: not that of a hospital that was not allowed a step.

        One that only idles in this round counts with the model that it was sent, but for Flower's clipping, which cannot
        clip an update of nothing.
        """
        return row["images"] > 0 or not ("exhausted" in row or self.settings.privacy.hospital != "none")

    def _aggregate(
        self, strategy: Strategy, number: int, replies: list[Message], state: State
    ) -> tuple[Arrays, dict[str, dict[str, Any]]]:
        """The model of these answers, and what it cost the hospitals' privacy; the model as it was where they are too few."""
        if len(replies) < fewest(self.settings):
            return state.arrays, {}
        expect(strategy, len(replies))
        spent = {}
        if self.settings.privacy.hospital != "none":
            replies = even(replies)
            spent = {"hospital_privacy": charge(self.settings, self.run, self.experiment, len(replies))}
        record, _ = strategy.aggregate_train(number, replies)
        if record is None:
            raise FederationError(f"the strategy made no model of the answers of round {number}: see flower.log")
        return {key: np.asarray(record[key].numpy(), dtype=np.float32) for key in sorted(state.arrays)}, spent

    def _look(self, state: State, anew: bool = False) -> None:
        """Let the evaluator look where it is due, and write the round's line, unless that is done already.

        `anew`: the round was just trained, so a line of it is an earlier try's; with privacy that one's epsilon is too low.
        """
        if state.line is None or (not anew and has_line(self.run, state.round)):
            return
        line = dict(state.line)
        if is_evaluated(self.settings, state.round) or (state.round and state.is_over(self.settings)):
            self.tell({"event": "evaluation", "round": state.round, "final": False})
            generator, _ = load_generator(self.run.checkpoint(state.round))
            result = self.judge.during(generator, state.round, state.images_seen)
            line |= result
            self.tell({"event": "evaluated", "round": state.round, "final": False, "result": result})
        write_line(self.run, line)
        self.tell({"event": "round_end", "round": state.round, "rounds": self.settings.federation.rounds, "line": line})

    def _order(self) -> dict[str, Any]:
        """What every message tells a hospital: the whole scenario, the experiment, and (for simulations) the run folder."""
        return {"settings": json.dumps(to_dict(self.settings)), "experiment": self.experiment, "run": str(self.run.path)}


# --- answers ---------------------------------------------------------------------------------------


def left(members: Sequence[Member], state: State) -> list[Member]:
    """The hospitals that may still train."""
    gone = {row["number"] for row in state.exhausted}
    return [member for member in members if member.number not in gone]


def exhausted_now(members: Sequence[Member], facts: Sequence[Mapping[str, Any]], number: int) -> list[dict[str, Any]]:
    """The hospitals that said in round `number` that their privacy ledger allows no more."""
    return [
        {"name": member.name, "number": member.number, "images": member.images, "units": member.units, "round": number}
        for member, row in zip(members, facts, strict=True)
        if row.get("exhausted")
    ]


def ending(state: State, settings: Settings) -> dict[str, Any]:
    """What a round's line says of spent budgets: `exhausted`, the names until now, and `ended` where too few are left."""
    if not state.exhausted:
        return {}
    why = state.ended_early(settings) if state.round < settings.federation.rounds else ""
    names = sorted(row["name"] for row in state.exhausted)
    return {"exhausted": names} | ({"ended": why} if why else {})


def hospital_line(member: Member, reply: Message) -> dict[str, Any]:
    """The hospital's part of the round's line: name, num_examples, images_seen, seconds, threads and its means."""
    facts = dict(reply.content.config_records["facts"])
    row: dict[str, Any] = {"name": member.name, WEIGHT: reply.content.metric_records[METRICS][WEIGHT]}
    for key in ("images_seen", "images", "threads"):
        row[key] = int(facts.pop(key))
    return row | plain_numbers(facts)


def plain_numbers(facts: Mapping[str, Any]) -> dict[str, float | None]:
    """The finite numbers among the facts; an epsilon that is infinite (no noise) as None, because JSON knows no infinity."""
    found: dict[str, float | None] = {
        key: value for key, value in facts.items() if isinstance(value, float) and math.isfinite(value)
    }
    return found | ({"epsilon": None} if "epsilon" in facts and "epsilon" not in found else {})


def mean_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the hospitals, weighted by the images that each showed in this round; keys that nobody measured are absent."""
    means = {}
    for key in MEANS:
        known = [(row[key], row["images"]) for row in rows if key in row and row["images"] > 0]
        if known:
            means[key] = sum(value * images for value, images in known) / sum(images for _, images in known)
    return means
