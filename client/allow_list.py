"""All that may leave a hospital, and the check of an answer against it.

Two kinds of messages have an answer: an introduction (`query.hello`) and a round (`train`); with `federation.secure` a round is
four messages, and what the three that train nothing may hold stands in client/allow_list_keys.py. Each may hold the records below
and no other; each record the names below and no other; every value has one type. Arrays are those that the server sent,
`federation.exchange` names and this hospital's own model has, in its own shapes. An introduction holds this hospital's own
values and nothing else. An error is one line in words that stand here. docs/deployment.md shows `rows()` as a table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage

from client import allow_list_keys as allowed_keys
from client.allow_list_keys import KEYS, checked_keys
from client.error_messages import (
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
from client.hospital import LocalHospital, TrainRequest
from client.sent import HIDDEN, OPEN, PRIVATE, allowed_metrics
from fedgan.config import ModelSettings, Settings
from fedgan.exchange.masking import CLIPPED, FACTOR
from fedgan.exchange.number_formats import DTYPES
from fedgan.models.stylegan2.discriminator import Discriminator
from fedgan.models.stylegan2.generator import Generator

HELLO, TRAIN = "query.hello", "train"
MASKED = "masked"  # the record of a masked change


# --- the introduction --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """One value of the introduction. `own`: what this hospital says; `asked`: whether the settings ask for it."""

    kind: str
    meaning: str
    own: Callable[[TrainRequest, LocalHospital], object]
    asked: Callable[[Settings], bool] = lambda settings: True
    when: str = "always"


def _units(request: TrainRequest, local: LocalHospital) -> int:
    data = local.hospital.train
    return (
        len(set(data.patients.tolist()))
        if request.settings.privacy.unit == "patient"
        else len(data)
    )


INTRODUCTION: dict[str, Fact] = {
    "number": Fact("whole number", "its partition-id", lambda request, local: local.number),
    "name": Fact("text", "its name", lambda request, local: local.hospital.name),
    "images": Fact(
        "whole number", "training images", lambda request, local: len(local.hospital.train)
    ),
    "label_names": Fact(
        "texts", "the labels' names", lambda request, local: list(local.hospital.train.label_names)
    ),
    "exclusive": Fact(
        "yes or no",
        "whether labels exclude each other",
        lambda request, local: local.hospital.train.exclusive,
    ),
    "channels": Fact(
        "whole number", "channels of an image", lambda request, local: local.hospital.train.channels
    ),
    "resolution": Fact(
        "whole number",
        "side of an image in pixels",
        lambda request, local: local.hospital.train.resolution,
    ),
    "phantoms": Fact(
        "yes or no",
        "whether all images are phantoms",
        lambda request, local: local.hospital.phantoms,
    ),
    "units": Fact(
        "whole number",
        "training images, or patients of them: what `privacy.unit` says",
        _units,
        lambda settings: settings.privacy.on and settings.privacy.noise_split == "equal",
        "with `privacy` and `privacy.noise_split = equal`",
    ),
    "label_counts": Fact(
        "whole numbers",
        "training images of each label",
        lambda request, local: [
            int(count) for count in local.hospital.train.labels.sum(axis=0, dtype=int)
        ],
        lambda settings: settings.federation.share_label_counts and not settings.privacy.on,
        "with `federation.share_label_counts`, never with `privacy`",
    ),
}


def introduction(request: TrainRequest, local: LocalHospital) -> dict[str, Any]:
    """What this hospital says of itself."""
    return {
        name: fact.own(request, local)
        for name, fact in INTRODUCTION.items()
        if fact.asked(request.settings)
    }


# --- a round -----------------------------------------------------------------------------------------

NUMBERS: dict[str, tuple[type, str]] = {  # told of every round, beside its means
    "round": (int, "the round that it answers"),
    "images_seen": (int, "images shown since the first round"),
    "threads": (int, "CPU threads"),
    "exhausted": (float, "1 where the privacy budget is spent"),
}
MEANINGS = {  # of the means (client/sent.py)
    "images": "images shown in this round",
    "loss_g": "loss of the generator",
    "loss_d": "loss of the discriminator",
    "d_accuracy": "share of generated images that the discriminator finds out",
    "path_length": "mean path length of the generator",
    "p": "strength of augmentation",
    "r_t": "mean sign of the discriminator on real images",
    "r1": "gradient penalty at real images",
    "epsilon": "what the privacy ledger holds",
    "delta": "of epsilon",
    "noise_multiplier": "of a private step",
    "sample_rate": "of a private step",
    "seconds": "time of the training",
    "core_seconds": "CPU time of the training",
    "peak_memory_bytes": "memory of the process",
}
WEIGHT = "num_examples"


def travelling(
    settings: Settings, sent: Mapping[str, Any], channels: int, label_dim: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The arrays that may leave in a round: name → (dtype, shape). `sent`: what arrived, by name."""
    own = model_arrays(settings.model, settings.data.resolution, channels, label_dim)
    parts = tuple(f"{part}/" for part in settings.federation.exchange)
    dtype, more = str(DTYPES[settings.federation.wire]), dict[str, tuple[str, tuple[int, ...]]]()
    if settings.federation.secure:
        dtype, more = "uint32", dict.fromkeys((FACTOR, CLIPPED), ("uint32", (1,)))
    return more | {
        name: (dtype, shape)
        for name, shape in own.items()
        if name in sent and name.startswith(parts)
    }


@functools.lru_cache(maxsize=2)
def model_arrays(
    model: ModelSettings, resolution: int, channels: int, label_dim: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all arrays of a model that these settings make; a number alone has the shape (1,)."""
    rng = torch.Generator()  # its own: what is drawn here must not move anybody's training
    generator = Generator(model, resolution, channels, label_dim, rng)
    parts = {"generator": generator, "ema": generator}
    parts |= {"discriminator": Discriminator(model, resolution, channels, label_dim, rng)}  # type: ignore[dict-item]
    return {
        f"{part}/{name}": tuple(tensor.shape) or (1,)
        for part, network in parts.items()
        for name, tensor in network.state_dict().items()
    }


# --- the check ---------------------------------------------------------------------------------------


def checked(
    message: Message, reply: Message, request: TrainRequest, local: LocalHospital
) -> RecordDict:
    """The content of `reply` to `message`, record by record made anew, so that nothing hides in it.

    Raises `Refused` for the first thing in it that may not leave.
    """
    match message.metadata.message_type:
        case "query.hello":
            return RecordDict(dict(_checked_introduction(reply.content, request, local)))
        case "train":
            if (
                request.settings.federation.secure
                and (stage := stage_of(message)) != Stage.COLLECT_MASKED_VECTORS
            ):
                return RecordDict(dict(_checked_agreement(stage, message, reply.content)))
            return RecordDict(dict(_checked_round(message, reply.content, request.settings, local)))
    raise Refused(MESSAGE, f"an answer to '{message.metadata.message_type}'")


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
    """Which of the four messages of a secure round it is. Raises `Refused` where it is none."""
    stage = str((message.content.config_records.get(RECORD_KEY_CONFIGS) or {}).get(Key.STAGE))
    if stage not in Stage.all():
        raise Refused(
            MESSAGE,
            f"an answer to a round that does not say which message of secure aggregation it is ('{stage}')",
        )
    return stage


def _checked_agreement(
    stage: str, message: Message, content: RecordDict
) -> Iterator[tuple[str, ConfigRecord]]:
    asked = message.content.config_records[RECORD_KEY_CONFIGS]
    for name, record in content.items():
        if name != KEYS or not isinstance(record, ConfigRecord):
            raise Refused(RECORD, f"'{name}' in {stage}")
        yield name, ConfigRecord(checked_keys(stage, asked, record, message.metadata.dst_node_id))


def _checked_round(
    message: Message, content: RecordDict, settings: Settings, local: LocalHospital
) -> Iterator[tuple[str, ArrayRecord | MetricRecord | ConfigRecord]]:
    arrays = (
        MASKED if settings.federation.secure else "arrays"
    )  # never one in the place of the other
    numbers = {name: kind for name, (kind, _) in NUMBERS.items()} | dict.fromkeys(
        allowed_metrics(settings), float
    )
    for name, record in content.items():
        match name, record:
            case _, ArrayRecord() if name == arrays:
                sent = message.content.array_records.get("arrays") or {}
                data = local.hospital.train
                yield (
                    name,
                    _checked_arrays(
                        record, travelling(settings, sent, data.channels, data.label_dim)
                    ),
                )
            case "metrics", MetricRecord():
                yield name, MetricRecord(_checked_numbers(name, record, {WEIGHT: int}))
            case "facts", ConfigRecord():
                yield name, ConfigRecord(_checked_numbers(name, record, numbers))
            case _:
                raise Refused(RECORD, f"'{name}' ({type(record).__name__}) in a round")


def _checked_arrays(
    record: ArrayRecord, allowed: Mapping[str, tuple[str, tuple[int, ...]]]
) -> ArrayRecord:
    found = {}
    for name, array in record.items():
        if name not in allowed:
            raise Refused(ARRAY, f"'{name}'")
        try:
            values = array.numpy()
        except (TypeError, ValueError) as error:
            raise Refused(SHAPE, f"'{name}' is no array of numpy") from error
        if (str(values.dtype), values.shape) != allowed[name]:
            raise Refused(
                SHAPE, f"'{name}' as {values.dtype} {values.shape}, may be {allowed[name]}"
            )
        # anew: the bytes that arrived here may hold more than the numbers; in one order, and so with one hash, however made
        found[name] = Array(np.ascontiguousarray(values).reshape(values.shape))
    return ArrayRecord(found)


def _checked_numbers(
    where: str, record: Mapping[str, Any], allowed: Mapping[str, type]
) -> dict[str, Any]:
    for key, value in record.items():
        if key not in allowed:
            raise Refused(VALUE, f"'{key}' in {where}")
        if type(value) is not allowed[key]:
            raise Refused(
                TYPE,
                f"'{key}' in {where} as {type(value).__name__}, may be {allowed[key].__name__}",
            )
    return dict(record)


# --- for people --------------------------------------------------------------------------------------


def rows() -> list[tuple[str, str, str, str, str]]:
    """The table of docs/deployment.md: (message, record/name, type, when, meaning)."""
    table = [
        (HELLO, f"hospital/{name}", fact.kind, fact.when, fact.meaning)
        for name, fact in INTRODUCTION.items()
    ]
    table.append(
        (
            TRAIN,
            "arrays/NAME",
            "array, float32 or 16 bits by `federation.wire`",
            "parts in `federation.exchange`; not with `federation.secure`",
            "weights that the server sent and this model has; with `federation.delta` what the round changed of them",
        )
    )
    with_secure = "with `federation.secure`"
    kind = "array, uint32"
    table.append(
        (
            TRAIN,
            f"{MASKED}/NAME",
            kind,
            f"{with_secure}, instead of `arrays`",
            "what the round changed, under a mask",
        )
    )
    table.append(
        (
            TRAIN,
            f"{MASKED}/{FACTOR}",
            kind,
            with_secure,
            "its weight over the largest (images, or 1: `federation.weights`), under a mask",
        )
    )
    table.append(
        (TRAIN, f"{MASKED}/{CLIPPED}", kind, with_secure, "share of numbers cut off, under a mask")
    )
    for stage, names in allowed_keys.ALLOWED.items():
        table += [
            (TRAIN, f"{KEYS}/{name}", kind, f"{with_secure}, in its message `{stage}`", meaning)
            for name, (kind, meaning, _) in names.items()
        ]
    table.append(
        (
            TRAIN,
            f"metrics/{WEIGHT}",
            "whole number",
            "always",
            "training images, by which answers are weighed",
        )
    )
    kinds = {int: "whole number", float: "number"}
    table += [
        (TRAIN, f"facts/{name}", kinds[kind], "always", meaning)
        for name, (kind, meaning) in NUMBERS.items()
    ]
    for name in OPEN:
        if name == "r_t":
            when = "not with `privacy.client_level`; with `privacy` only by `privacy.r_t_noise`"
        elif name in HIDDEN:
            when = "always" if name == "images" else "with `privacy`"
        else:
            when = (
                "not with `privacy.client_level`"
                if name in PRIVATE
                else "not with `privacy`, nor `privacy.client_level`"
            )
        table.append((TRAIN, f"facts/{name}", "number", when, MEANINGS[name]))
    table.append(
        (
            "any",
            "error",
            f"code {FAILED}, one line",
            "instead of an answer",
            "kind of the error, and what was being done",
        )
    )
    return table
