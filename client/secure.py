"""A hospital's part in secure aggregation: Flower's SecAgg+ mod round the training, on what the round changed.

A round is four messages: public keys (`setup`), shares of the secrets for the others (`share_keys`), the training and its
masked result (`collect_masked_vectors`), shares that take the masks off the sum (`unmask`). Secrets wait for the next message
in Flower's `context.state`, which is the SuperNode's memory, and are forgotten with the last one. What it hides stands in
docs/federation.md.
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
from client.allow_list_keys import KEYS
from client.hospital import TrainRequest, log, log_folder
from fedgan.errors import ConfigError
from fedgan.exchange.masking import (
    CLIPPED,
    FACTOR,
    FEWEST,
    MODULUS,
    levels,
    mask_numbers,
    mask_weight,
    ranges,
    scale,
)

_flower: Any = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
_flower.pseudo_rand_gen = mask_numbers  # see there; the server's end does the same


class _Failed(Exception):
    """The training answered with an error, which is on its way out."""

    def __init__(self, answer: Message) -> None:
        self.answer = answer


def mask_update(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """One of the four messages, where `federation.secure` asks for them; else nothing but the training.

    Raises `ConfigError` where the server's numbers would hide less than they should, and what Flower's mod raises.
    """
    request = TrainRequest.read(message.content.config_records["config"])
    if not request.settings.federation.secure:
        return call_next(message, context)
    asked = dict(message.content.config_records[RECORD_KEY_CONFIGS])
    stage = str(asked.get(Key.STAGE))
    check_question(stage, asked, message.metadata.dst_node_id)

    def train(inner: Message, context: Context) -> Message:
        answer = call_next(inner, context)
        if answer.has_error():
            raise _Failed(answer)
        result.update({name: answer.content[name] for name in ("metrics", "facts")})
        return Message(_scaled(message, answer, request, context.node_config), reply_to=inner)

    result = RecordDict()
    # Flower's mod takes its question apart: it gets a copy, because the gate has to see the question as it came
    inner = copy.copy(message)
    inner.content = RecordDict(
        dict(message.content.items()) | {RECORD_KEY_CONFIGS: ConfigRecord(asked)}
    )
    try:
        answer = secaggplus_mod(inner, context, train)
    except _Failed as failed:
        return failed.answer
    said = answer.content.config_records[RECORD_KEY_CONFIGS]
    if stage == Stage.COLLECT_MASKED_VECTORS:
        result[MASKED] = _masked(said, message)
    else:
        result[KEYS] = ConfigRecord(dict(said))
    if stage == Stage.UNMASK:
        del context.state[RECORD_KEY_STATE]
    return Message(result, reply_to=message)


def check_question(stage: str, asked: Mapping[str, Any], node: int) -> None:
    """Raise `ConfigError` for a question under which one hospital's change would not be hidden.

    That are sums of fewer than three, a threshold that two halves of the hospitals could reach apart, numbers that leave their
    range, and an `unmask` that asks for both secrets of a hospital, or takes for lost one that has sent its masked change.
    """
    if stage == Stage.SETUP:
        hospitals = asked[Key.SAMPLE_NUMBER]
        if (
            hospitals < FEWEST
            or asked[Key.SHARE_NUMBER] != hospitals
            or 2 * asked[Key.THRESHOLD] <= hospitals
        ):
            raise ConfigError(
                f"the server asks for secure aggregation of {hospitals} with a threshold of {asked[Key.THRESHOLD]}"
            )
        numbers = (asked[Key.CLIPPING_RANGE], asked[Key.TARGET_RANGE], asked[Key.MOD_RANGE])
        if numbers != (1.0, levels(hospitals), MODULUS):
            raise ConfigError(
                "the server asks for secure aggregation in other numbers than fedgan's"
            )
    elif stage == Stage.SHARE_KEYS and len(asked) - 1 < FEWEST:
        raise ConfigError(
            f"the server names {len(asked) - 1} hospitals for secure aggregation, fewer than {FEWEST}"
        )
    elif stage == Stage.UNMASK:
        active, dead = asked[Key.ACTIVE_NODE_ID_LIST], asked[Key.DEAD_NODE_ID_LIST]
        if (
            set(active) & set(dead)
            or len({*active, *dead}) < len([*active, *dead])
            or node not in active
        ):
            raise ConfigError(
                "the server asks for both secrets of a hospital, or takes this one for lost"
            )


def _scaled(
    message: Message, answer: Message, request: TrainRequest, node: Mapping[str, Any]
) -> RecordDict:
    """What the training changed, scaled, as Flower's mod reads it; the numbers that were cut off stand in client.log."""
    sent = {key: array.numpy() for key, array in message.content.array_records["arrays"].items()}
    change = {key: array.numpy() for key, array in answer.content.array_records["arrays"].items()}
    if set(change) != set(sent):
        raise ConfigError("the model of this hospital has other arrays than the server's")
    scaled, clipped = scale(change, ranges(sent, request.settings.federation.secure_range))
    if clipped:
        text = f"{clipped} numbers changed by more than federation.secure_range: cut off"
        log(log_folder(request, node), f"round {request.round}: {text}")
    weight = mask_weight(
        request.settings.federation.weights, int(answer.content.metric_records["metrics"][WEIGHT])
    )
    result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(scaled), weight, {})
    return compat.fitres_to_recorddict(result, keep_input=False)


def _masked(said: Mapping[str, Any], message: Message) -> ArrayRecord:
    """The masked numbers by name, as uint32: Flower's list of int64 would be twice as long, and a ConfigRecord travels whole."""
    names = [FACTOR, *sorted(message.content.array_records["arrays"]), CLIPPED]
    arrays = (bytes_to_ndarray(data) for data in said[Key.MASKED_PARAMETERS])
    return ArrayRecord(
        {name: Array(array.astype(np.uint32)) for name, array in zip(names, arrays, strict=True)}
    )
