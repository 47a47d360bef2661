"""The server's part in secure aggregation: Flower's SecAgg+ workflow between the hospitals and the loop of rounds.

The workflow is one of Flower's older interface. It gets stand-ins for what it asks for there: a strategy that takes the mean, a
grid that is `server.requests.ask` (bounded, patient, failures known by name), and answers in its own shape. A hospital whose
masked answer is not fit to count is treated as one that was lost: the others' shares take its masks off the sum.

Masks are agreed on before the training, and a hospital that is lost until then would make every sum unreadable; so the agreement
is made anew without it where enough are left. `federation.min_hospitals` is the threshold of the protocol: so many
have to answer with a masked change, and so many have to help unmask the sum.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common import (
    Code,
    FitIns,
    FitRes,
    Parameters,
    Status,
    ndarray_to_bytes,
    parameters_to_ndarrays,
)
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common import recorddict_compat as compat
from flwr.server import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.serverapp import Grid

from fedgan.config import Settings
from fedgan.errors import ConfigError, FederationError
from fedgan.exchange.masking import (
    CLIPPED,
    FACTOR,
    MIN_HOSPITALS,
    MODULUS,
    apply_mean,
    levels,
    mask_numbers,
    mask_weight,
    ranges,
)
from fedgan.runs.budget import Plan
from fedgan.runs.compatibility import SUMS
from fedgan.runs.participants import Member
from server.aggregation.weights import is_average, weights_of
from server.records import ARRAYS, readable
from server.requests import UNASKED, Answers, send_and_receive
from server.roster import HELLO_WAIT

KEYS, MASKED = "keys", "masked"  # what hospitals answer with (client/allow_list.py)

_flower: Any = importlib.import_module(
    "flwr.server.workflow.secure_aggregation.secaggplus_workflow"
)
_flower.pseudo_rand_gen = mask_numbers  # see there; the hospital's end does the same


def check_plan(settings: Settings, plan: Plan, done: int) -> None:
    """Raise `ConfigError` where a round is planned in which too few hospitals train for one to be hidden among them."""
    if (
        not settings.federation.secure or len(plan.participants) < MIN_HOSPITALS
    ):  # so few are told that they have to wait
        return
    training, number = plan.fewest_training(done)
    if number and training < MIN_HOSPITALS:
        raise ConfigError(
            f"in round {number} {training} hospitals show images, the others none: with federation.secure each would learn the "
            f"other's change from the sum, which hides a hospital among {MIN_HOSPITALS}; lower federation.rounds, or set "
            "federation.local_images = 'equal' or federation.batch = 'shared'"
        )


def disclosure_note(settings: Settings) -> str:
    """What the secure aggregation of this run is worth, said once."""
    limit = settings.federation.max_update_ratio
    unseen = f"; federation.max_update_ratio = {limit:g} cannot see single updates" if limit else ""
    return (
        "federation.secure: this server sees the sum of the hospitals' changes alone, as long as it keeps to the protocol. It "
        f"cannot see a hostile update{unseen}. What it hides and what not: docs/federation.md"
    )


@dataclass
class Masked(Answers):
    """The answers of a round and the model that they make together, None where they make none; `clipped`: numbers cut off."""

    model: dict[str, np.ndarray] | None = None
    clipped: float = 0.0


@dataclass
class Round:
    """What a secure round needs to know.

    `question` and `heard`: as of `ask`; `check` raises `FederationError` for an answer that must not count, `counts` tells
    whether a fit one is to be in the sum.
    """

    settings: Settings
    members: Sequence[Member]
    sent: Mapping[str, np.ndarray]
    enough: int
    reconnecting: bool
    question: Callable[[int, float], Message]
    check: Callable[[Member, Message], None]
    counts: Callable[[Member, Message], bool]
    on_reply: Callable[[int], None]


def send_and_receive_masked(grid: Grid, task: Round) -> Masked:
    """Ask the hospitals for one round. Raises `FederationError` where they are too few, or do not fit the protocol."""
    if len(task.members) < MIN_HOSPITALS:
        raise FederationError(
            f"federation.secure takes {MIN_HOSPITALS} hospitals, and {len(task.members)} have joined: wait for the others, then resume"
        )
    lost: dict[int, str] = {}
    while True:
        members = [member for member in task.members if member.node not in lost]
        relay = Relay(grid, task, members)
        try:
            mean = _run(relay, members, task.enough)
        except _Halted:
            found = relay.answers
        else:
            found = relay.answers
            if mean is not None:
                check_mean(mean)
                if task.settings.federation.weights in SUMS:
                    total = weights_of(task.settings, np.array(relay.summed, float)).sum()
                    mean = summed(mean, sorted(task.sent), total)
                found.model, found.clipped = apply_mean(
                    task.sent, mean, ranges(task.sent, task.settings.federation.secure_range)
                )
        if relay.idle:  # too few were allowed a step: no sum, and the model stays as it was
            found.model = dict(task.sent)
        lost |= {node: why for node, why in relay.lost.items() if why != UNASKED}
        if not relay.lost or len(task.members) - len(lost) < max(task.enough, MIN_HOSPITALS):
            silent = (
                {member.node for member in task.members} - set(found.replies) - set(found.failures)
            )
            found.failures |= dict.fromkeys(silent, UNASKED) | relay.lost | lost
            return found


def summed(mean: Sequence[np.ndarray], keys: Sequence[str], total: float) -> list[np.ndarray]:
    """Changes that weigh `total` together, from their plain mean. Running averages keep it, and so does the count at the end."""
    sums = [
        np.asarray(array) * (1 if is_average(key) else total)
        for key, array in zip(keys, mean, strict=False)
    ]
    return [*sums, mean[-1]]


def check_mean(mean: Sequence[np.ndarray]) -> None:
    """Raise `FederationError` where no mean of numbers in [-1, 1] can be: then a mask is still on the sum."""
    if any(
        not np.isfinite(array).all() or np.abs(array).max(initial=0.0) > 1.001 for array in mean
    ):
        raise FederationError(
            "the sum of the masked changes is out of range: a hospital has sent a wrong share or numbers of no change; it cannot "
            "be told which"
        )


class _Halted(Exception):
    """Too few are left in this stage: ends Flower's workflow from within."""


def _run(relay: Relay, members: Sequence[Member], threshold: int) -> list[np.ndarray] | None:
    """The mean of the scaled changes by Flower's workflow, in float64; None where it halted."""
    strategy, nodes = _Mean([member.node for member in members]), len(members)
    state = RecordDict(
        {
            MAIN_CONFIGS_RECORD: ConfigRecord(
                {WorkflowKey.CURRENT_ROUND: 1, WorkflowKey.START_TIME: 0.0}
            ),
            MAIN_PARAMS_RECORD: compat.parameters_to_arrayrecord(
                Parameters([], "numpy.ndarray"), keep_input=False
            ),
        }
    )
    context = LegacyContext(Context(0, 0, {}, state, {}), strategy=strategy)
    workflow = SecAggPlusWorkflow(
        num_shares=1.0,
        reconstruction_threshold=threshold / nodes,
        max_weight=float(max(_weight(relay.task, member) for member in members)),
        clipping_range=1.0,
        quantization_range=levels(nodes),
        modulus_range=MODULUS,
    )
    try:
        workflow(relay, context)
    except (_Halted, FederationError):
        raise
    except Exception as error:  # whatever a hospital's words make Flower's code say
        raise FederationError(
            f"secure aggregation failed ({type(error).__name__}): a hospital's answer does not fit the protocol; see flower.log"
        ) from error
    return strategy.mean


@dataclass
class _Mean:
    """What the workflow takes for a strategy: it names the nodes, and keeps the mean."""

    nodes: list[int]
    mean: list[np.ndarray] | None = None

    def configure_fit(self, *_: Any) -> list[tuple[Any, FitIns]]:
        nothing = Parameters([], "numpy.ndarray")
        return [(SimpleNamespace(node_id=node), FitIns(nothing, {})) for node in self.nodes]

    def aggregate_fit(
        self, server_round: int, results: list[Any], failures: list[Any]
    ) -> tuple[None, dict[str, Any]]:
        self.mean = parameters_to_ndarrays(results[0][1].parameters)
        return None, {}


@dataclass
class _Reply:
    """What the workflow takes for an answer."""

    metadata: SimpleNamespace
    content: RecordDict

    def has_error(self) -> bool:
        return False


@dataclass
class Relay:
    """What the workflow takes for the grid: its questions go out in the loop's own messages, with the hospital's order."""

    grid: Grid
    task: Round
    members: Sequence[Member]
    answers: Masked = field(default_factory=Masked)
    lost: dict[int, str] = field(default_factory=dict)  # before the masks were agreed on
    idle: bool = False
    summed: list[int] = field(default_factory=list)  # images of those whose changes are in the sum

    def send_and_receive(
        self, messages: Sequence[Message], *, timeout: float | None = None
    ) -> list[_Reply]:
        """One stage. Raises `_Halted` where the protocol cannot go on, when `answers` or `lost` say who failed."""
        keys = {
            message.metadata.dst_node_id: message.content.config_records[RECORD_KEY_CONFIGS]
            for message in messages
        }
        nodes = [member.node for member in self.members if member.node in keys]
        stage = str(keys[nodes[0]][Key.STAGE])
        agreed = stage in (Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK)
        training = stage == Stage.COLLECT_MASKED_VECTORS

        def question(node: int, seconds: float) -> Message:
            message = self.task.question(node, seconds)
            records = dict(message.content.items()) | {
                RECORD_KEY_CONFIGS: ConfigRecord(dict(keys[node]))
            }
            if not training:
                del records[ARRAYS]
            return Message(RecordDict(records), node, message.metadata.message_type, ttl=seconds)

        wait = self.task.settings.federation.round_timeout
        limit, enough = (
            wait if training else min(wait, HELLO_WAIT),
            self.task.enough if agreed else len(nodes),
        )
        on_reply = self.task.on_reply if training else lambda node: None
        found = send_and_receive(
            self.grid, nodes, question, limit, enough, self.task.reconnecting, on_reply
        )
        if training:
            return self._collected(found)
        for node in [node for node, reply in found.replies.items() if not _fits(stage, reply)]:
            del found.replies[node]
            found.failures[node] = "its answer does not fit the protocol of secure aggregation"
        if not agreed and found.failures:
            self.lost = {node: _before(why) for node, why in found.failures.items()}
            raise _Halted
        if len(found.replies) < self.task.enough:
            why = {member: found.failures.get(member.node, UNASKED) for member in self.members}
            raise FederationError(
                f"the sum of the masked changes cannot be read: it takes {self.task.enough} hospitals to unmask it "
                f"({'; '.join(f'{member}: {text}' for member, text in why.items() if text != UNASKED)})"
            )
        return [
            _stand_in(node, found.replies[node].content.config_records[KEYS])
            for node in nodes
            if node in found.replies
        ]

    def _collected(self, found: Answers) -> list[_Reply]:
        """The masked changes of those whose answer is fit to count."""
        self.answers = Masked(found.replies, found.failures)
        fit = [
            member
            for member in self.members
            if member.node in found.replies and self._is_fit(member, found.replies)
        ]
        summed = [member for member in fit if self.task.counts(member, found.replies[member.node])]
        if len(summed) < self.task.enough:
            self.idle = len(fit) >= self.task.enough
            raise _Halted
        self.summed = [member.images for member in summed]
        return [
            _vector(member, _weight(self.task, member), found.replies[member.node], self.task.sent)
            for member in summed
        ]

    def _is_fit(self, member: Member, replies: Mapping[int, Message]) -> bool:
        try:
            self.task.check(member, replies[member.node])
        except FederationError:
            return False  # the loop's own check names it
        return True


NEEDED: dict[str, dict[str, type]] = {
    Stage.SETUP: {Key.PUBLIC_KEY_1: bytes, Key.PUBLIC_KEY_2: bytes},
    Stage.SHARE_KEYS: {Key.DESTINATION_LIST: list, Key.CIPHERTEXT_LIST: list},
    Stage.UNMASK: {Key.NODE_ID_LIST: list, Key.SHARE_LIST: list},
}


def _fits(stage: str, reply: Message) -> bool:
    keys = reply.content.config_records.get(KEYS) or {}
    lengths = {len(value) for value in keys.values() if isinstance(value, list)}
    return (
        all(isinstance(keys.get(name), kind) for name, kind in NEEDED[stage].items())
        and len(lengths) < 2
    )


def _before(why: str) -> str:
    return (
        why
        if why == UNASKED
        else f"{why} (while masks were agreed on, which takes all: federation.secure)"
    )


def _stand_in(node: int, keys: Mapping[str, Any], more: RecordDict | None = None) -> _Reply:
    content = more or RecordDict()
    content[RECORD_KEY_CONFIGS] = ConfigRecord(dict(keys))
    return _Reply(SimpleNamespace(src_node_id=node), content)


def _names(sent: Mapping[str, np.ndarray]) -> list[str]:
    return [FACTOR, *sorted(sent), CLIPPED]


def _weight(task: Round, member: Member) -> int:
    return mask_weight(task.settings.federation.weights, member.images)


def _vector(member: Member, weight: int, reply: Message, sent: Mapping[str, np.ndarray]) -> _Reply:
    """A masked answer as Flower's workflow reads it."""
    record = reply.content.array_records[MASKED]
    arrays = [ndarray_to_bytes(record[name].numpy().astype(np.int64)) for name in _names(sent)]
    nothing = FitRes(Status(Code.OK, ""), Parameters([], "numpy.ndarray"), weight, {})
    return _stand_in(
        member.node,
        {Key.MASKED_PARAMETERS: arrays},
        compat.fitres_to_recorddict(nothing, keep_input=False),
    )


def check_masked(member: Member, reply: Message, sent: Mapping[str, np.ndarray]) -> None:
    """Raise `FederationError` when an answer does not hold the arrays that were sent, masked. Their values cannot be judged."""
    record = reply.content.array_records.get(MASKED)
    shapes = {key: array.shape for key, array in sent.items()} | {FACTOR: (1,), CLIPPED: (1,)}
    if record is None or set(record) != set(shapes):
        raise FederationError(
            f"{member} answered with other masked arrays than were sent: its fedgan is of another version"
        )
    for key, array in record.items():
        value = readable(array)
        if value is None or value.dtype != np.uint32 or value.shape != shapes[key]:
            raise FederationError(
                f"{member} answered '{key}' as no masked array of the shape that was sent"
            )
