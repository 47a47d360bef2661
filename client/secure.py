"""A hospital's side of secure aggregation: Flower's SecAgg+ mod around the training, applied to the
round's change.

A round is four messages: public keys (`setup`), shares of the secrets for the others
(`share_keys`), the training and its masked result (`collect_masked_vectors`), shares that remove
the masks from the sum (`unmask`). Between messages the secrets stay in Flower's `context.state`,
which is the SuperNode's memory; the last message deletes them. docs/explanation/secure.md says what
secure aggregation hides.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import Code, FitRes, Status, bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import (
    RECORD_KEY_CONFIGS,
    RECORD_KEY_STATE,
    Key,
    Stage,
)
from flwr.compat.common import recorddict_compat as compat

from client.allow_list import MASKED, WEIGHT
from client.hospital import TrainRequest, log, log_folder
from client.key_agreement import KEYS
from fedgan.errors import ConfigError
from fedgan.exchange.masking import (
    CLIPPED,
    FACTOR,
    MIN_HOSPITALS,
    MODULUS,
    levels,
    mask_numbers,
    mask_weight,
    ranges,
    scale,
)

_flower: Any = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
_flower.pseudo_rand_gen = mask_numbers  # server/aggregation/secure.py does the same


class _TrainingFailed(Exception):
    """The training replied with an error, which becomes the reply."""

    def __init__(self, reply: Message) -> None:
        self.reply = reply


def mask_update(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower mod: handle one of the four messages with `federation.secure`; otherwise only train.

    Raises `ConfigError` where the server's parameters weaken the protocol, and the errors of
    Flower's mod.
    """
    request = TrainRequest.read(message.content.config_records["config"])
    if not request.settings.federation.secure:
        return call_next(message, context)
    config = dict(message.content.config_records[RECORD_KEY_CONFIGS])
    stage = str(config.get(Key.STAGE))
    check_request(stage, config, message.metadata.dst_node_id)

    def train(inner: Message, context: Context) -> Message:
        reply = call_next(inner, context)
        if reply.has_error():
            raise _TrainingFailed(reply)
        result.update({name: reply.content[name] for name in ("metrics", "facts")})
        return Message(_scaled(message, reply, request, context.node_config), reply_to=inner)

    result = RecordDict()
    # Flower's mod modifies its request: it gets a copy, because the gate checks against the
    # original
    inner = copy.copy(message)
    inner.content = RecordDict(
        dict(message.content.items()) | {RECORD_KEY_CONFIGS: ConfigRecord(config)}
    )
    try:
        reply = secaggplus_mod(inner, context, train)
    except _TrainingFailed as failed:
        return failed.reply
    output = reply.content.config_records[RECORD_KEY_CONFIGS]
    if stage == Stage.COLLECT_MASKED_VECTORS:
        result[MASKED] = _masked(output, message)
    else:
        result[KEYS] = ConfigRecord(dict(output))
    if stage == Stage.UNMASK:
        del context.state[RECORD_KEY_STATE]
    return Message(result, reply_to=message)


def check_request(stage: str, config: Mapping[str, Any], node: int) -> None:
    """Raise `ConfigError` for a request that would reveal a single hospital's change.

    Those are sums of fewer than three hospitals, a threshold that two disjoint groups of hospitals
    can reach, parameters under which numbers overflow, and an `unmask` that requests both secrets
    of a hospital, or lists this one as lost although it has sent its masked change.
    """
    if stage == Stage.SETUP:
        hospitals = config[Key.SAMPLE_NUMBER]
        if (
            hospitals < MIN_HOSPITALS
            or config[Key.SHARE_NUMBER] != hospitals
            or 2 * config[Key.THRESHOLD] <= hospitals
        ):
            raise ConfigError(
                f"the server requests secure aggregation of {hospitals} hospitals "
                f"with a threshold of {config[Key.THRESHOLD]}"
            )
        numbers = (config[Key.CLIPPING_RANGE], config[Key.TARGET_RANGE], config[Key.MOD_RANGE])
        if numbers != (1.0, levels(hospitals), MODULUS):
            raise ConfigError("the server's ranges of secure aggregation differ from fedgan's")
    elif stage == Stage.SHARE_KEYS and len(config) - 1 < MIN_HOSPITALS:
        raise ConfigError(
            f"the server lists {len(config) - 1} hospitals for secure aggregation, "
            f"fewer than {MIN_HOSPITALS}"
        )
    elif stage == Stage.UNMASK:
        active, dead = config[Key.ACTIVE_NODE_ID_LIST], config[Key.DEAD_NODE_ID_LIST]
        if (
            set(active) & set(dead)
            or len({*active, *dead}) < len([*active, *dead])
            or node not in active
        ):
            raise ConfigError(
                "the server requests both secrets of a hospital, or lists this one as lost"
            )


def _scaled(
    message: Message, reply: Message, request: TrainRequest, node: Mapping[str, Any]
) -> RecordDict:
    """Scaled change of the training for Flower's mod; client.log counts clipped values."""
    sent = {key: array.numpy() for key, array in message.content.array_records["arrays"].items()}
    change = {key: array.numpy() for key, array in reply.content.array_records["arrays"].items()}
    if set(change) != set(sent):
        raise ConfigError("this hospital's model has other arrays than the server's")
    scaled, clipped = scale(change, ranges(sent, request.settings.federation.secure_range))
    if clipped:
        text = f"{clipped} numbers changed by more than federation.secure_range: clipped"
        log(log_folder(request, node), f"round {request.round}: {text}")
    weight = mask_weight(
        request.settings.federation.weights, int(reply.content.metric_records["metrics"][WEIGHT])
    )
    result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(scaled), weight, {})
    return compat.fitres_to_recorddict(result, keep_input=False)


def _masked(output: Mapping[str, Any], message: Message) -> ArrayRecord:
    """Masked arrays by name, as uint32 in an ArrayRecord: half the size of Flower's int64 lists."""
    names = [FACTOR, *sorted(message.content.array_records["arrays"]), CLIPPED]
    arrays = (bytes_to_ndarray(data) for data in output[Key.MASKED_PARAMETERS])
    return ArrayRecord(
        {name: Array(array.astype(np.uint32)) for name, array in zip(names, arrays, strict=True)}
    )
