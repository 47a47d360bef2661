"""The federation's loop: send the model, collect the hospitals' models, aggregate, write down, look at it.

Flower's strategies say what is sent and how answers become one model; the loop round them is our own,
so that every wait is bounded, a missing hospital fails the round by name, and a run can go on from
any round. Answers are sorted by the hospital's number first: the order of a sum is its value.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedgan.config import Settings, to_dict
from fedgan.errors import FederationError
from fedgan.run_folder import RunFolder
from fedgan.training.checkpoint import load_generator
from server.checkpoints import State, has_line, initial_state, is_evaluated, load_state, save_state, write_line
from server.roster import Member, Roster, gather, introduce, require_all
from server.rounds import Deal, deal
from server.strategies import ARRAYS, make_strategy, restore_strategy, strategy_state

Event = dict[str, Any]
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
        if state is not None and state.round == self.settings.federation.rounds:
            return
        members = introduce(grid, self.settings, self._order())
        if state is None:
            state = initial_state(self.settings, members)
            save_state(self.run, self.settings, state, self.experiment)
        elif state.line is not None:
            self._look(state)  # in case the run was stopped between the checkpoint and its line
        if not (self.run.samples / "real.png").is_file():
            self.judge.start()
        strategy = make_strategy(self.settings)
        restore_strategy(strategy, state.moments)
        federation = self.settings.federation
        dealt = deal(self.settings, [member.images for member in members])
        self.tell(
            {
                "event": "start",
                "hospitals": [member.name for member in members],
                "rounds": federation.rounds,
                "first_round": state.round + 1,
                "images": sum(dealt.totals),
                "images_seen": state.images_seen,
            }
        )
        while state.round < federation.rounds:
            state = self._round(grid, strategy, members, state, dealt)
            self._look(state)

    def conclude(self) -> None:
        """The final evaluation, of the last round's generator. Can be repeated."""
        newest = self.run.last_round()
        if newest is None or newest < self.settings.federation.rounds:
            raise FederationError(
                f"round {newest or 0} of {self.settings.federation.rounds} is the last that is complete: resume the run"
            )
        state = cast(State, load_state(self.run, self.experiment))
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

    def _round(self, grid: Grid, strategy: FedAvg, members: Sequence[Member], state: State, dealt: Deal) -> State:
        """Train and aggregate one round; the state after it, already on the disk."""
        number, begun = state.round + 1, time.perf_counter()
        names, images = [member.name for member in members], dealt.images[state.round]
        self.tell(
            {
                "event": "round_start",
                "round": number,
                "rounds": self.settings.federation.rounds,
                "images": dict(zip(names, images, strict=True)),
            }
        )
        order = self._order() | {"round": number, "since": state.round}
        timeout = self.settings.federation.round_timeout
        configured = strategy.configure_train(number, to_record(state.arrays), ConfigRecord(order), cast(Grid, Roster(members)))
        by_node = {
            member.node: {"images": images[place], "planned": dealt.planned(place), "batch": dealt.batches[place]}
            for place, member in enumerate(members)
        }
        # in the order of the hospitals, the largest first: with fewer cores than hospitals the long work begins at once
        places = {member.node: member.number for member in members}
        messages = sorted(configured, key=lambda message: places[message.metadata.dst_node_id])
        answers = gather(grid, [personal(message, by_node) for message in messages], timeout)
        replies = require_all(members, answers, timeout, f"in round {number}")
        for member, reply in zip(members, replies, strict=True):
            check_reply(member, reply, state.arrays)
        facts = [hospital_line(member, reply) for member, reply in zip(members, replies, strict=True)]
        up = sum(array_bytes(reply.content.array_records[ARRAYS]) for reply in replies)
        down = len(members) * sum(array.nbytes for array in state.arrays.values())

        record, _ = strategy.aggregate_train(number, replies)
        if record is None:
            raise FederationError(f"the strategy made no model of the answers of round {number}: see flower.log")
        arrays = {key: np.asarray(record[key].numpy(), dtype=np.float32) for key in sorted(state.arrays)}
        after = State(
            round=number,
            arrays=arrays,
            moments=strategy_state(strategy),
            images_seen=sum(int(row["images_seen"]) for row in facts),
            bytes_exchanged=state.bytes_exchanged + up + down,
            wall_seconds=state.wall_seconds + time.perf_counter() - begun,
            label_names=state.label_names,
            exclusive=state.exclusive,
            channels=state.channels,
            resolution=state.resolution,
        )
        after.line = {
            "round": number,
            "images_seen": after.images_seen,
            "wall_seconds": after.wall_seconds,
            "bytes_exchanged": after.bytes_exchanged,
            "mean": mean_of(facts),
            "hospitals": facts,
        }
        save_state(self.run, self.settings, after, self.experiment)
        return after

    def _look(self, state: State) -> None:
        """Let the evaluator look where it is due, and write the round's line, unless that is done already."""
        if state.line is None or has_line(self.run, state.round):
            return
        line = dict(state.line)
        if is_evaluated(self.settings, state.round):
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


# --- arrays and answers ----------------------------------------------------------------------------


def to_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """One ArrayRecord of all arrays, by sorted key."""
    return ArrayRecord({key: Array(arrays[key]) for key in sorted(arrays)})


def array_bytes(record: Mapping[str, Array]) -> int:
    """Bytes of the numbers in a record (no headers)."""
    return sum(int(array.numpy().nbytes) for array in record.values())


def personal(message: Message, numbers: Mapping[int, Mapping[str, int]]) -> Message:
    """The strategy's message with the hospital's own numbers of images in a ConfigRecord of its own."""
    node = message.metadata.dst_node_id
    records = dict(message.content.items())
    config = {**message.content.config_records["config"], **numbers[node]}
    return Message(RecordDict(records | {"config": ConfigRecord(config)}), node, message.metadata.message_type)


def check_reply(member: Member, reply: Message, sent: Mapping[str, np.ndarray]) -> None:
    """Raise `FederationError` when an answer does not hold the very arrays that were sent, as finite float32."""
    record = reply.content.array_records.get(ARRAYS)
    if record is None or set(record) != set(sent):
        raise FederationError(f"{member} answered with other arrays than were sent: its model or federation.exchange differs")
    for key, array in record.items():
        value = array.numpy()
        if value.shape != sent[key].shape or value.dtype != np.float32:
            raise FederationError(f"{member} answered '{key}' as {value.dtype} {value.shape}, sent was float32 {sent[key].shape}")
        if not np.isfinite(value).all():
            raise FederationError(
                f"{member} answered '{key}' with values that are not finite: its training diverged; lower training.learning_rate"
            )


def hospital_line(member: Member, reply: Message) -> dict[str, Any]:
    """The hospital's part of the round's line: name, num_examples, images_seen, seconds, threads and its means."""
    facts = dict(reply.content.config_records["facts"])
    weight = reply.content.metric_records["metrics"]["num_examples"]
    row: dict[str, Any] = {"name": member.name, "num_examples": weight}
    for key in ("images_seen", "images", "threads"):
        row[key] = int(facts.pop(key))
    return row | {key: value for key, value in facts.items() if isinstance(value, float) and math.isfinite(value)}


def mean_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the hospitals, weighted by the images that each showed in this round; keys that nobody measured are absent."""
    means = {}
    for key in MEANS:
        known = [(row[key], row["images"]) for row in rows if key in row and row["images"] > 0]
        if known:
            means[key] = sum(value * images for value, images in known) / sum(images for _, images in known)
    return means
