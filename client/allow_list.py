"""Allow-list: everything that may leave a hospital, and the check of a reply against it.

Two kinds of messages have a reply: an introduction (`query.hello`) and a round (`train`). With
`federation.secure` a round is four messages; client/key_agreement.py lists the contents of the
three without training. A message may hold the records below and no other, a record the names below
and no other, and every value has one type. Arrays are those that the server sent, that
`federation.exchange` names and that this hospital's own model has, in its own shapes. An
introduction holds this hospital's own values and nothing else. An error is one line of listed texts
(fedgan/exchange/error_messages.py). `reference_markdown` renders the list for the docs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage

from client.hospital import LocalHospital, TrainRequest
from client.key_agreement import ALLOWED, KEYS, check_keys
from fedgan.config import ModelSettings, Settings
from fedgan.exchange.error_messages import (
    ARRAY,
    FAILED,
    FOREIGN,
    MESSAGE,
    RECORD,
    SHAPE,
    TYPE,
    VALUE,
    Refused,
)
from fedgan.exchange.masking import CLIPPED, FACTOR
from fedgan.exchange.number_formats import DTYPES
from fedgan.exchange.round_metrics import ROUND_METRICS, allowed_metrics
from fedgan.models.families import network_classes
from fedgan.privacy.step import units_of

HELLO, TRAIN = "`query.hello`", "`train`"  # as the documentation shows them
MASKED = "masked"  # the record of a masked change
WEIGHT = "num_examples"
Layout = tuple[str, tuple[int, ...]]  # dtype and shape of an array


# --- introduction -------------------------------------------------------------------------------


WITH_UNITS = "with `privacy` and `privacy.noise_split = equal`"
WITH_LABEL_COUNTS = "with `federation.share_label_counts`, never with `privacy`"
INTRODUCTION = {  # name → type, when, meaning
    "number": ("whole number", "always", "its partition-id"),
    "name": ("text", "always", "its name"),
    "images": ("whole number", "always", "number of training images"),
    "label_names": ("texts", "always", "names of the labels"),
    "exclusive": ("yes or no", "always", "whether labels exclude each other"),
    "channels": ("whole number", "always", "channels of an image"),
    "resolution": ("whole number", "always", "side of an image in pixels"),
    "phantoms": ("yes or no", "always", "whether all images are phantoms"),
    "units": ("whole number", WITH_UNITS, "training images or their patients, by `privacy.unit`"),
    "label_counts": ("whole numbers", WITH_LABEL_COUNTS, "training images of each label"),
}


def introduction(request: TrainRequest, local: LocalHospital) -> dict[str, Any]:
    """This hospital's values of the introduction."""
    data, privacy = local.hospital.train, request.settings.privacy
    values: dict[str, Any] = {
        "number": local.number,
        "name": local.hospital.name,
        "images": len(data),
        "label_names": list(data.label_names),
        "exclusive": data.exclusive,
        "channels": data.channels,
        "resolution": data.resolution,
        "phantoms": local.hospital.phantoms,
    }
    if privacy.on and privacy.noise_split == "equal":
        _, values["units"] = units_of(data, privacy.unit)
    if request.settings.federation.share_label_counts and not privacy.on:
        values["label_counts"] = [int(count) for count in data.labels.sum(axis=0, dtype=int)]
    return values


# --- arrays of a round --------------------------------------------------------------------------


def allowed_arrays(
    settings: Settings, sent: Mapping[str, Any], channels: int, label_dim: int
) -> dict[str, Layout]:
    """Arrays that may leave in a round, by name. `sent`: the arrays of the request, by name."""
    own = model_arrays(settings.model, settings.data.resolution, channels, label_dim)
    parts = tuple(f"{part}/" for part in settings.federation.exchange)
    dtype, masked = str(DTYPES[settings.federation.wire]), dict[str, Layout]()
    if settings.federation.secure:
        dtype, masked = "uint32", dict.fromkeys((FACTOR, CLIPPED), ("uint32", (1,)))
    return masked | {
        name: (dtype, shape)
        for name, shape in own.items()
        if name in sent and name.startswith(parts)
    }


@functools.lru_cache(maxsize=2)
def model_arrays(
    model: ModelSettings, resolution: int, channels: int, label_dim: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all arrays of the model under these settings; a scalar has shape (1,)."""
    rng = torch.Generator()  # separate, so that the training's random numbers do not change
    parts = {
        part: network(model, resolution, channels, label_dim, rng)
        for part, network in network_classes(model.family).items()
    }
    parts["ema"] = parts["generator"]
    return {
        f"{part}/{name}": tuple(tensor.shape) or (1,)
        for part, network in parts.items()
        for name, tensor in network.state_dict().items()
    }


# --- check --------------------------------------------------------------------------------------


def checked_content(
    message: Message, reply: Message, request: TrainRequest, local: LocalHospital
) -> RecordDict:
    """The content of `reply` to `message`, each record rebuilt so that nothing hides in it.

    Raises `Refused` for the first content that may not leave.
    """
    match message.metadata.message_type:
        case "query.hello":
            return RecordDict(dict(_checked_introduction(reply.content, request, local)))
        case "train":
            if (
                request.settings.federation.secure
                and (stage := stage_of(message)) != Stage.COLLECT_MASKED_VECTORS
            ):
                return RecordDict(dict(_checked_key_agreement(stage, message, reply.content)))
            return RecordDict(dict(_checked_round(message, reply.content, request.settings, local)))
    raise Refused(MESSAGE, f"a reply to '{message.metadata.message_type}'")


def _checked_introduction(
    content: RecordDict, request: TrainRequest, local: LocalHospital
) -> Iterator[tuple[str, ConfigRecord]]:
    own = introduction(request, local)
    for name, record in content.items():
        if name != "hospital" or not isinstance(record, ConfigRecord):
            raise Refused(RECORD, f"'{name}' in an introduction")
        for key, value in record.items():
            if key not in own:
                raise Refused(VALUE, f"'{key}' in an introduction")
            if type(value) is not type(own[key]) or value != own[key]:
                raise Refused(FOREIGN, f"'{key}' = {value!r} in an introduction")
        yield name, ConfigRecord({key: own[key] for key in record})


def stage_of(message: Message) -> str:
    """Stage of a secure round that a request belongs to. Raises `Refused` for an unknown one."""
    stage = str((message.content.config_records.get(RECORD_KEY_CONFIGS) or {}).get(Key.STAGE))
    if stage not in Stage.all():
        raise Refused(
            MESSAGE, f"a reply to a round without a known stage of secure aggregation ('{stage}')"
        )
    return stage


def _checked_key_agreement(
    stage: str, message: Message, content: RecordDict
) -> Iterator[tuple[str, ConfigRecord]]:
    config = message.content.config_records[RECORD_KEY_CONFIGS]
    for name, record in content.items():
        if name != KEYS or not isinstance(record, ConfigRecord):
            raise Refused(RECORD, f"'{name}' in {stage}")
        yield name, ConfigRecord(check_keys(stage, config, record, message.metadata.dst_node_id))


def _checked_round(
    message: Message, content: RecordDict, settings: Settings, local: LocalHospital
) -> Iterator[tuple[str, ArrayRecord | MetricRecord | ConfigRecord]]:
    arrays = MASKED if settings.federation.secure else "arrays"  # never both
    for name, record in content.items():
        match name, record:
            case _, ArrayRecord() if name == arrays:
                sent = message.content.array_records.get("arrays") or {}
                data = local.hospital.train
                allowed = allowed_arrays(settings, sent, data.channels, data.label_dim)
                yield name, _checked_arrays(record, allowed)
            case "metrics", MetricRecord():
                yield name, MetricRecord(_checked_numbers(name, record, {WEIGHT: int}))
            case "facts", ConfigRecord():
                numbers = _checked_numbers(name, record, allowed_metrics(settings))
                yield name, ConfigRecord(numbers)
            case _:
                raise Refused(RECORD, f"'{name}' ({type(record).__name__}) in a round")


def _checked_arrays(record: ArrayRecord, allowed: Mapping[str, Layout]) -> ArrayRecord:
    checked = {}
    for name, array in record.items():
        if name not in allowed:
            raise Refused(ARRAY, f"'{name}'")
        try:
            values = array.numpy()
        except (TypeError, ValueError) as error:
            raise Refused(SHAPE, f"'{name}' is no NumPy array") from error
        if (str(values.dtype), values.shape) != allowed[name]:
            raise Refused(
                SHAPE, f"'{name}' as {values.dtype} {values.shape}, allowed is {allowed[name]}"
            )
        # Rebuilt: the original bytes may hold more than the numbers. Contiguous: one hash for any
        # memory layout.
        checked[name] = Array(np.ascontiguousarray(values).reshape(values.shape))
    return ArrayRecord(checked)


def _checked_numbers(
    where: str, record: Mapping[str, Any], allowed: Mapping[str, type]
) -> dict[str, Any]:
    for key, value in record.items():
        if key not in allowed:
            raise Refused(VALUE, f"'{key}' in {where}")
        if type(value) is not allowed[key]:
            raise Refused(
                TYPE,
                f"'{key}' in {where} as {type(value).__name__}, allowed is {allowed[key].__name__}",
            )
    return dict(record)


# --- documentation ------------------------------------------------------------------------------


def table_rows() -> list[tuple[str, str, str, str, str]]:
    """Rows of the documentation's table: message, record/name, type, when, meaning."""
    secure, masked = "with `federation.secure`", "array, uint32"
    plain = "array, float32 or 16 bits by `federation.wire`"
    when = "parts in `federation.exchange`; not with `federation.secure`"
    weights = "weights that the server sent; with `federation.delta` their change in the round"
    weight = "its weight over the largest (images, or 1: `federation.weights`), masked"
    rows = [
        (HELLO, f"hospital/{name}", kind, when, meaning)
        for name, (kind, when, meaning) in INTRODUCTION.items()
    ]
    rows += [
        (TRAIN, "arrays/NAME", plain, when, weights),
        (TRAIN, f"{MASKED}/NAME", masked, f"{secure}, instead of `arrays`", "change, masked"),
        (TRAIN, f"{MASKED}/{FACTOR}", masked, secure, weight),
        (TRAIN, f"{MASKED}/{CLIPPED}", masked, secure, "share of clipped numbers, masked"),
    ]
    rows += [
        (TRAIN, f"{KEYS}/{name}", kind, f"{secure}, in its message `{stage}`", meaning)
        for stage, names in ALLOWED.items()
        for name, (kind, meaning, _) in names.items()
    ]
    meaning = "number of training images, the weight of the reply"
    rows.append((TRAIN, f"metrics/{WEIGHT}", "whole number", "always", meaning))
    rows += [
        (
            TRAIN,
            f"facts/{metric.name}",
            "whole number" if metric.kind is int else "number",
            metric.disclosure.value,
            f"{metric.meaning} ({metric.unit})" if metric.unit else metric.meaning,
        )
        for metric in ROUND_METRICS
    ]
    meaning = "kind of the error and the step that failed"
    return [*rows, ("any", "error", f"code {FAILED}, one line", "instead of a reply", meaning)]


def reference_markdown() -> str:
    """`table_rows` as a Markdown table."""
    head = "| message | record/name | type | when | meaning |\n|---|---|---|---|---|\n"
    return head + "\n".join(
        f"| {message} | `{name}` | {kind} | {when} | {meaning} |"
        for message, name, kind, when, meaning in table_rows()
    )
