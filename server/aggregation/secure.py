"""The server's side of secure aggregation: Flower's SecAgg+ workflow within the federation's loop.

The workflow belongs to Flower's older interface. It gets stand-ins here: a strategy that keeps the
mean, a grid that calls `server.requests.send_and_receive` (bounded waits, named failures), and
replies in its own format. A hospital whose masked reply is invalid is treated as lost: the other
hospitals' key shares remove its masks from the sum.

Masks are agreed on before the training, and a hospital that is lost until then would make every sum
unreadable, so the agreement is repeated without it while enough hospitals are left.
`federation.min_hospitals` is the protocol's threshold: so many hospitals have to reply with a
masked change, and so many have to help to unmask the sum.
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
from server.aggregation.weights import hospital_weights, is_average
from server.records import ARRAYS, decode_array
from server.requests import NOT_AWAITED, Replies, send_and_receive
from server.roster import JOIN_SECONDS

KEYS, MASKED = "keys", "masked"  # records of the hospitals' replies (client/allow_list.py)

_flower: Any = importlib.import_module(
    "flwr.server.workflow.secure_aggregation.secaggplus_workflow"
)
_flower.pseudo_rand_gen = mask_numbers  # as the hospital's side does; the reason is there


def check_plan(settings: Settings, plan: Plan, done: int) -> None:
    """Raise `ConfigError` for a round in which too few hospitals train to hide one among them."""
    # fewer participants than that wait for the others before any round
    if not settings.federation.secure or len(plan.participants) < MIN_HOSPITALS:
        return
    training, number = plan.fewest_training(done)
    if number and training < MIN_HOSPITALS:
        raise ConfigError(
            f"in round {number} {training} hospitals train, the others have no images: with "
            "federation.secure each would learn the other's change from the sum, which hides a "
            f"hospital among {MIN_HOSPITALS}; lower federation.rounds, or set "
            "federation.local_images = 'equal' or federation.batch = 'shared'"
        )


def disclosure_note(settings: Settings) -> str:
    """The guarantee of this run's secure aggregation and its cost."""
    limit = settings.federation.max_update_ratio
    limit_note = f"; federation.max_update_ratio = {limit:g} cannot check single updates"
    return (
        "federation.secure: this server sees only the sum of the hospitals' changes, as long as it "
        f"follows the protocol. It cannot detect a hostile update{limit_note if limit else ''}. "
        "What it hides and what not: docs/explanation/secure.md"
    )


@dataclass
class MaskedReplies(Replies):
    """The replies of a round and the model of their sum. `clipped`: count of clipped numbers."""

    model: dict[str, np.ndarray] | None = None
    clipped: float = 0.0


@dataclass
class SecureRound:
    """The inputs of a secure round.

    `make_request`, `min_replies`, `reconnecting`, `on_reply`: as in `send_and_receive`. `check`
    raises `FederationError` for an invalid reply, `is_aggregated` returns whether a valid one joins
    the sum.
    """

    settings: Settings
    members: Sequence[Member]
    sent: Mapping[str, np.ndarray]
    min_replies: int
    reconnecting: bool
    make_request: Callable[[int, float], Message]
    check: Callable[[Member, Message], None]
    is_aggregated: Callable[[Member, Message], bool]
    on_reply: Callable[[int], None]


def send_and_receive_masked(grid: Grid, task: SecureRound) -> MaskedReplies:
    """Run one secure round.

    Raises `FederationError` where hospitals are too few or violate the protocol.
    """
    if len(task.members) < MIN_HOSPITALS:
        raise FederationError(
            f"federation.secure needs {MIN_HOSPITALS} hospitals, and {len(task.members)} have "
            "joined: wait for the others, then resume"
        )
    lost: dict[int, str] = {}
    while True:
        members = [member for member in task.members if member.node not in lost]
        relay = Relay(grid, task, members)
        try:
            mean = _run_workflow(relay, members, task.min_replies)
        except _Halted:
            mean = None
        found = relay.replies
        if mean is not None:
            check_mean(mean)
            if task.settings.federation.weights in SUMS:
                sizes = np.array(relay.summed_images, float)
                total = hospital_weights(task.settings, sizes).sum()
                mean = mean_to_sum(mean, sorted(task.sent), total)
            spans = ranges(task.sent, task.settings.federation.secure_range)
            found.model, found.clipped = apply_mean(task.sent, mean, spans)
        if relay.is_idle:  # too few hospitals had a step: no sum, the model is unchanged
            found.model = dict(task.sent)
        lost |= {node: why for node, why in relay.lost.items() if why != NOT_AWAITED}
        left = len(task.members) - len(lost)
        if not relay.lost or left < max(task.min_replies, MIN_HOSPITALS):
            nodes = {member.node for member in task.members}
            silent = nodes - set(found.received) - set(found.failures)
            found.failures |= dict.fromkeys(silent, NOT_AWAITED) | relay.lost | lost
            return found


def mean_to_sum(mean: Sequence[np.ndarray], keys: Sequence[str], total: float) -> list[np.ndarray]:
    """The plain mean of changes times their `total` weight.

    Running averages, and the count of clipped numbers at the end, keep the mean.
    """
    sums = [
        np.asarray(array) * (1 if is_average(key) else total)
        for key, array in zip(keys, mean, strict=False)
    ]
    return [*sums, mean[-1]]


def check_mean(mean: Sequence[np.ndarray]) -> None:
    """Raise `FederationError` for a mean out of [-1, 1]: a mask is still on the sum."""
    if any(
        not np.isfinite(array).all() or np.abs(array).max(initial=0.0) > 1.001 for array in mean
    ):
        raise FederationError(
            "the sum of the masked changes is out of range: a hospital has sent an invalid key "
            "share or invalid numbers; the protocol hides which one"
        )


class _Halted(Exception):
    """Ends Flower's workflow from within, when a stage has too few hospitals."""


def _run_workflow(
    relay: Relay, members: Sequence[Member], threshold: int
) -> list[np.ndarray] | None:
    """The mean of the scaled changes by Flower's workflow, in float64; None where it halted."""
    strategy, nodes = _MeanStrategy([member.node for member in members]), len(members)
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
    except Exception as error:  # Flower's code raises various types for a malformed reply
        raise FederationError(
            f"secure aggregation failed ({type(error).__name__}): a hospital's reply violates the "
            "protocol; see flower.log"
        ) from error
    return strategy.mean


@dataclass
class _MeanStrategy:
    """A strategy for the workflow that names the nodes and keeps the mean."""

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
class _WorkflowReply:
    """A reply in the format of the workflow."""

    metadata: SimpleNamespace
    content: RecordDict

    def has_error(self) -> bool:
        return False


@dataclass
class Relay:
    """A grid for the workflow: its messages travel inside the loop's requests.

    `lost`: failures before the masks were agreed on. `is_idle`: too few hospitals had a step.
    `summed_images`: training images of the hospitals in the sum.
    """

    grid: Grid
    task: SecureRound
    members: Sequence[Member]
    replies: MaskedReplies = field(default_factory=MaskedReplies)
    lost: dict[int, str] = field(default_factory=dict)
    is_idle: bool = False
    summed_images: list[int] = field(default_factory=list)

    def send_and_receive(
        self, messages: Sequence[Message], *, timeout: float | None = None
    ) -> list[_WorkflowReply]:
        """Run one stage of the protocol.

        Raises `_Halted` where it cannot continue; `replies` and `lost` then hold the failures.
        """
        keys = {
            message.metadata.dst_node_id: message.content.config_records[RECORD_KEY_CONFIGS]
            for message in messages
        }
        nodes = [member.node for member in self.members if member.node in keys]
        stage = str(keys[nodes[0]][Key.STAGE])
        has_masks = stage in (Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK)
        is_training = stage == Stage.COLLECT_MASKED_VECTORS

        def make_request(node: int, seconds: float) -> Message:
            message = self.task.make_request(node, seconds)
            records = dict(message.content.items()) | {
                RECORD_KEY_CONFIGS: ConfigRecord(dict(keys[node]))
            }
            if not is_training:
                del records[ARRAYS]
            return Message(RecordDict(records), node, message.metadata.message_type, ttl=seconds)

        timeout = self.task.settings.federation.round_timeout
        found = send_and_receive(
            self.grid,
            nodes,
            make_request,
            timeout if is_training else min(timeout, JOIN_SECONDS),
            self.task.min_replies if has_masks else len(nodes),
            self.task.reconnecting,
            self.task.on_reply if is_training else lambda node: None,
        )
        if is_training:
            return self._collect(found)
        for node in [
            node for node, reply in found.received.items() if not _follows_protocol(stage, reply)
        ]:
            del found.received[node]
            found.failures[node] = "its reply violates the protocol of secure aggregation"
        if not has_masks and found.failures:
            self.lost = {node: _before_masks(why) for node, why in found.failures.items()}
            raise _Halted
        if len(found.received) < self.task.min_replies:
            reasons = {
                member: found.failures.get(member.node, NOT_AWAITED) for member in self.members
            }
            listed = "; ".join(
                f"{who}: {why}" for who, why in reasons.items() if why != NOT_AWAITED
            )
            raise FederationError(
                "the sum of the masked changes cannot be read: unmasking takes "
                f"{self.task.min_replies} hospitals ({listed})"
            )
        return [
            _workflow_reply(node, found.received[node].content.config_records[KEYS])
            for node in nodes
            if node in found.received
        ]

    def _collect(self, found: Replies) -> list[_WorkflowReply]:
        """The masked changes of the hospitals with a valid reply."""
        task = self.task
        self.replies = MaskedReplies(found.received, found.failures)
        valid = [
            member
            for member in self.members
            if member.node in found.received and self._is_valid(member, found.received[member.node])
        ]
        summed = [
            member for member in valid if task.is_aggregated(member, found.received[member.node])
        ]
        if len(summed) < task.min_replies:
            self.is_idle = len(valid) >= task.min_replies
            raise _Halted
        self.summed_images = [member.images for member in summed]
        return [
            _masked_reply(member, _weight(task, member), found.received[member.node], task.sent)
            for member in summed
        ]

    def _is_valid(self, member: Member, reply: Message) -> bool:
        try:
            self.task.check(member, reply)
        except FederationError:
            return False  # the loop repeats the check and reports the reason
        return True


REQUIRED_KEYS: dict[str, dict[str, type]] = {
    Stage.SETUP: {Key.PUBLIC_KEY_1: bytes, Key.PUBLIC_KEY_2: bytes},
    Stage.SHARE_KEYS: {Key.DESTINATION_LIST: list, Key.CIPHERTEXT_LIST: list},
    Stage.UNMASK: {Key.NODE_ID_LIST: list, Key.SHARE_LIST: list},
}


def _follows_protocol(stage: str, reply: Message) -> bool:
    keys = reply.content.config_records.get(KEYS) or {}
    lengths = {len(value) for value in keys.values() if isinstance(value, list)}
    required = REQUIRED_KEYS[stage].items()
    return all(isinstance(keys.get(name), kind) for name, kind in required) and len(lengths) < 2


def _before_masks(why: str) -> str:
    if why == NOT_AWAITED:
        return why
    return f"{why} (during the agreement on masks, which federation.secure needs from all)"


def _workflow_reply(
    node: int, keys: Mapping[str, Any], content: RecordDict | None = None
) -> _WorkflowReply:
    content = content or RecordDict()
    content[RECORD_KEY_CONFIGS] = ConfigRecord(dict(keys))
    return _WorkflowReply(SimpleNamespace(src_node_id=node), content)


def _weight(task: SecureRound, member: Member) -> int:
    return mask_weight(task.settings.federation.weights, member.images)


def _masked_reply(
    member: Member, weight: int, reply: Message, sent: Mapping[str, np.ndarray]
) -> _WorkflowReply:
    """A masked reply in the format of the workflow."""
    record = reply.content.array_records[MASKED]
    names = [FACTOR, *sorted(sent), CLIPPED]
    arrays = [ndarray_to_bytes(record[name].numpy().astype(np.int64)) for name in names]
    empty = FitRes(Status(Code.OK, ""), Parameters([], "numpy.ndarray"), weight, {})
    return _workflow_reply(
        member.node,
        {Key.MASKED_PARAMETERS: arrays},
        compat.fitres_to_recorddict(empty, keep_input=False),
    )


def check_masked(member: Member, reply: Message, sent: Mapping[str, np.ndarray]) -> None:
    """Raise `FederationError` unless a reply holds the arrays of `sent`, masked.

    Masked values cannot be checked.
    """
    record = reply.content.array_records.get(MASKED)
    shapes = {key: array.shape for key, array in sent.items()} | {FACTOR: (1,), CLIPPED: (1,)}
    if record is None or set(record) != set(shapes):
        raise FederationError(
            f"{member} replied with other masked arrays than were sent: it runs another version of "
            "fedgan"
        )
    for key, array in record.items():
        value = decode_array(array)
        if value is None or value.dtype != np.uint32 or value.shape != shapes[key]:
            raise FederationError(
                f"{member} replied for '{key}' with no masked array of the expected shape"
            )
