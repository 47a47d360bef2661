"""Helpers of the federation's tests: shards of a few images, tiny settings, a grid without Ray."""

from __future__ import annotations

import copy
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

from client.hospital import SIMULATION
from fedgan.config import Settings, from_dict
from fedgan.data.shard import write_shard
from fedgan.privacy.ledger import Ledger
from fedgan.privacy.register import Register
from fedgan.run_folder import RunFolder
from fedgan.runs.preparation import experiment_of, is_prepared, prepare_run
from server.federation import Federation

NAMES = ("alpha", "beta", "gamma", "delta", "epsilon")
LABELS = ("dark", "bright")


def write_shards(
    root: Path, sizes: Sequence[int], resolution: int = 16, names: Sequence[str] = NAMES
) -> Path:
    """Write one shard per size: dark and bright noise; half of each class is held out."""
    for number, size in enumerate(sizes):
        rng = np.random.default_rng(number)
        labels = np.eye(2, dtype=np.uint8)[np.arange(size) % 2]
        images = (
            rng.integers(0, 128, (size, 1, resolution, resolution))
            + 100 * labels[:, 1, None, None, None]
        )
        splits = np.array(["train", "train", "test", "test", "train", "train", "val", "val"])[
            np.arange(size) % 8
        ]
        write_shard(
            root / names[number],
            images.astype(np.uint8),
            labels,
            patients=[f"{names[number]}-{row}" for row in range(size)],
            splits=splits,
            label_names=LABELS,
            name=names[number],
        )
    return root


def tiny(
    root: Path, *overrides: str, hospitals: int = 3, rounds: int = 3, kimg: float = 0.2
) -> Settings:
    """Settings of a federation that trains within seconds."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "data": {"root": str(root), "resolution": 16},
        "model": {
            "z_dim": 4,
            "w_dim": 8,
            "channel_base": 64,
            "channel_max": 8,
            "mapping_layers": 1,
        },
        "augment": {"p": 0.2, "mode": "ada"},
        "training": {"kimg": kimg, "batch_size": 4, "device": "cpu"},
        "federation": {
            "hospitals": hospitals,
            "rounds": rounds,
            "threads": 1,
            "round_timeout": 180.0,
        },
        "evaluation": {"every": 0, "images": 16, "seeds": 1, "epochs": 1, "bootstrap": 10},
    }
    return from_dict(tree, overrides)


class NoEvaluator:
    """An evaluator that only records the evaluated rounds."""

    def __init__(self) -> None:
        self.evaluated_rounds: list[int] = []

    def check_compatible(self, *shape: Any) -> None:
        pass

    def write_real_samples(self) -> None:
        pass

    def evaluate_round(self, generator: Any, round_number: int, images_seen: int) -> dict[str, Any]:
        self.evaluated_rounds.append(round_number)
        return {}

    def evaluate_final(self, generator: Any, facts: dict[str, Any]) -> dict[str, Any]:
        return facts


class LocalGrid:
    """Flower's Grid in one process: the ClientApp handles each message at once.

    `node_config(number)` is a deployed hospital's node-config; without it hospitals are simulated
    on the server's machine. `fault(number, message)` may return a reply that replaces the
    hospital's, or raise `LookupError` for no reply. Replies arrive in the reverse order of the
    hospitals.
    """

    def __init__(
        self,
        hospitals: int,
        app: ClientApp,
        fault: Callable[[int, Message], Message | None] | None = None,
        node_config: Callable[[int], dict[str, str]] | None = None,
    ) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self.node_config = node_config
        self.nodes = {1000 - number: number for number in range(hospitals)}
        self.names: dict[int, str] = {}  # by node: the name that it is registered with
        self.app, self.fault = app, fault
        self.replies: dict[str, Message] = {}
        self.sent: list[Message] = []
        # the state that a SuperNode keeps between two messages
        self.states = {node: RecordDict() for node in self.nodes}

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node, name=self.names.get(node, "")) for node in self.nodes]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(str(uuid.uuid4()))
            message.metadata.__dict__["_message_id"] = ids[-1]
            self.sent.append(message)
            self._deliver(copy.deepcopy(message), ids[-1])
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.replies.pop(key) for key in reversed(list(message_ids)) if key in self.replies]

    def _deliver(self, message: Message, key: str) -> None:
        number = self.nodes[message.metadata.dst_node_id]
        node: Any = {"partition-id": number, "num-partitions": len(self.nodes)} | (
            self.node_config(number) if self.node_config else {}
        )
        state = self.states[message.metadata.dst_node_id]
        context = Context(
            run_id=1,
            node_id=message.metadata.dst_node_id,
            node_config=node,
            state=state,
            run_config={},
        )
        try:
            reply = self.fault(number, message) if self.fault else None
        except LookupError:
            return
        with mock.patch.dict(os.environ, {SIMULATION: "0" if self.node_config else "1"}):
            self.replies[key] = reply or self.app(message, context)


def error_reply(message: Message, reason: str, code: int = 0) -> Message:
    """The error reply of a node that failed with `reason`."""
    return Message(Error(code, reason), reply_to=message)


def federate(settings: Settings, run: RunFolder, app: ClientApp, fault: Any = None) -> Federation:
    """Train the remaining rounds in this process."""
    if not is_prepared(run):
        prepare_run(settings, run)
    federation = Federation(run.settings(), run, experiment_of(run), NoEvaluator())
    federation.train(LocalGrid(settings.federation.hospitals, app, fault))  # type: ignore[arg-type]
    return federation


def processes_of(run: Path) -> set[int]:
    """Session ids of the engines that work on `run`; each leads its own session."""
    return {
        pid
        for pid, arguments, _ in _processes()
        if "simulations.engine" in arguments and str(run) in arguments
    }


def alive_in(sessions: set[int]) -> list[int]:
    """Running processes of these sessions."""
    return [pid for pid, _, session in _processes() if session in sessions]


def _processes() -> list[tuple[int, list[str], int]]:
    """(pid, command line, session id) of all processes except zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            state, _, _, session = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue
        if state != "Z" and int(entry.name) != os.getpid():
            found.append((int(entry.name), arguments, int(session)))
    return found


def ledger_in(shard: Path) -> Ledger:
    """The ledger of a shard, with the key of the register beside it."""
    return Register.of(shard).ledger(shard)
