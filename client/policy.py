"""A hospital's own policy: limits in its node-config that no request of the server exceeds.

`POLICY` is the one table of the keys: the check, `fedgan doctor` and the documentation are made
from it. A key that is neither here nor in `PLACES` refuses every request, because a misspelled
limit would be none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.hospital import STATES, TrainRequest
from fedgan import files
from fedgan.config import FAMILIES, PARTS
from fedgan.errors import ConfigError
from fedgan.machine import usable_cores
from fedgan.privacy.step import PrivateStep

PLACES = ("partition-id", "num-partitions", "data-root", "state-dir")  # keys that limit nothing
GIB = 2**30


# --- values --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """How a value is written, and its parser, which raises `ValueError`."""

    text: str
    parse: Callable[[Any], Any]


def _number(value: Any) -> float:
    number = math.nan if isinstance(value, bool) else float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError
    return number


def _whole(value: Any) -> int:
    if (number := _number(value)) != int(number):
        raise ValueError
    return int(number)


def _flag(value: Any) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


def _unit(value: Any) -> str:
    return {"patient": "patient", "image": "image"}[value]


def _names(choices: Sequence[str]) -> Kind:
    def parse(value: Any) -> tuple[str, ...]:
        names = tuple(name.strip() for name in str(value).split(","))
        if not set(names) <= set(choices):
            raise ValueError
        return names

    return Kind(f"names with commas in quotes, of: {', '.join(choices)}", parse)


NUMBER, WHOLE = Kind("a number above 0", _number), Kind("a whole number above 0", _whole)
FLAG, UNIT = Kind("true or false", _flag), Kind('"patient" or "image"', _unit)


# --- keys ----------------------------------------------------------------------------------------


def _nothing(limited: TrainRequest | PrivateStep, value: Any) -> str:
    return ""


def _unchanged(request: TrainRequest, value: Any) -> TrainRequest:
    return request


@dataclass(frozen=True)
class Key:
    """One limit. `refusal`: what in a request exceeds it, else ''; `lowered`: the request under it.

    `refused_step`: what in the private step, which depends on the images, exceeds it. A key with
    none of them is applied during the training (client/app.py).
    """

    name: str
    kind: Kind
    meaning: str
    refusal: Callable[[TrainRequest, Any], str] = _nothing
    lowered: Callable[[TrainRequest, Any], TrainRequest] = _unchanged
    refused_step: Callable[[PrivateStep, Any], str] = _nothing


def _without_privacy(request: TrainRequest, value: Any) -> str:
    return "" if request.settings.privacy.on else "the run has no privacy (privacy.epsilon)"


def _with_smaller_epsilon(request: TrainRequest, value: float) -> TrainRequest:
    smaller = min(value, request.settings.privacy.max_epsilon or value)
    return _with(request, "privacy", max_epsilon=smaller)


def _in_clear(request: TrainRequest, required: bool) -> str:
    is_refused = required and not request.settings.federation.secure
    return "the run has no secure aggregation (federation.secure)" if is_refused else ""


def _smaller_unit(request: TrainRequest, unit: str) -> str:
    if why := _without_privacy(request, unit):
        return why
    is_smaller = unit == "patient" and request.settings.privacy.unit == "image"
    return "the run has privacy.unit = 'image'" if is_smaller else ""


def _large_delta(private: PrivateStep, most: float) -> str:
    return f"the run has delta = {private.delta:g} here" if private.delta > most else ""


def _little_noise(private: PrivateStep, least: float) -> str:
    noise = private.noise_multiplier
    return f"the run has a noise multiplier of {noise:.4g} here" if noise < least else ""


def _few_images(request: TrainRequest, least: int) -> str:
    # a round without images returns the received model
    return f"the request is for {request.images}" if 0 < request.images < least else ""


def _many_images(request: TrainRequest, most: int) -> str:
    return f"the request is for {request.images}" if request.images > most else ""


def _small_batch(request: TrainRequest, least: int) -> str:
    batch = request.batch or request.settings.training.batch_size
    return f"the request is for {batch} images per step" if batch < least else ""


def _with_fewer_threads(request: TrainRequest, most: int) -> TrainRequest:
    threads = request.settings.federation.threads or usable_cores()
    return _with(request, "federation", threads=min(threads, most))


def _other_family(request: TrainRequest, allowed: Sequence[str]) -> str:
    family = request.settings.model.family
    return "" if family in allowed else f"the run has model.family = '{family}'"


def _other_parts(request: TrainRequest, allowed: Sequence[str]) -> str:
    parts = [part for part in request.settings.federation.exchange if part not in allowed]
    return f"the run has '{parts[0]}' in federation.exchange" if parts else ""


def _with(request: TrainRequest, section: str, **values: Any) -> TrainRequest:
    changed = dataclasses.replace(getattr(request.settings, section), **values)
    settings = dataclasses.replace(request.settings, **{section: changed})
    return dataclasses.replace(request, settings=settings)


POLICY = (
    Key(
        "max-epsilon",
        NUMBER,
        "most ε that its privacy ledger holds over all runs; refuses runs without privacy",
        _without_privacy,
        _with_smaller_epsilon,
    ),
    Key(
        "max-delta",
        NUMBER,
        "largest δ of a run here (`privacy.delta`); refuses runs without privacy",
        _without_privacy,
        refused_step=_large_delta,
    ),
    Key(
        "min-noise",
        NUMBER,
        "least noise multiplier of the gradient here, whatever sets it; refuses runs without "
        "privacy",
        _without_privacy,
        refused_step=_little_noise,
    ),
    Key(
        "unit",
        UNIT,
        "smallest unit of privacy (`privacy.unit`), of which `patient` is the larger; refuses runs "
        "without privacy",
        _smaller_unit,
    ),
    Key("require-secure", FLAG, "refuses runs without `federation.secure`", _in_clear),
    Key("min-images", WHOLE, "fewest images of a round in which it trains", _few_images),
    Key("min-batch", WHOLE, "fewest images per step", _small_batch),
    Key("max-images", WHOLE, "most images per round", _many_images),
    Key("max-seconds", NUMBER, "most seconds of training per round; then it ends with an error"),
    Key(
        "max-threads",
        WHOLE,
        "most CPU threads; a larger request is lowered to it",
        lowered=_with_fewer_threads,
    ),
    Key(
        "state-quota",
        NUMBER,
        "GiB for the states of all experiments: the oldest are removed, never those of the present "
        "one, which is refused beyond it",
    ),
    Key("allow-families", _names(FAMILIES), "generator families (`model.family`)", _other_family),
    Key("allow-exchange", _names(PARTS), "parts of `federation.exchange`", _other_parts),
)


# --- use -----------------------------------------------------------------------------------------


def read_policy(node: Mapping[str, Any]) -> dict[str, Any]:
    """The limits that the node-config sets, by key.

    Raises `ConfigError` for an unknown key and for a value that is none of its kind.
    """
    known = {key.name: key for key in POLICY}
    values = {}
    for name, value in node.items():
        if name in PLACES:
            continue
        if name not in known:
            raise ConfigError(_unknown(str(name), [*PLACES, *known]))
        try:
            values[name] = known[name].kind.parse(value)
        except (ValueError, TypeError, KeyError, OverflowError):
            text = f"{name} = {value} in this node's config: give {known[name].kind.text}"
            raise ConfigError(text) from None
    return {name: values[name] for name in known if name in values}


def _unknown(name: str, names: Sequence[str]) -> str:
    if (written := name.lower().replace("_", "-")) in names:
        return f"this node's config has {name}: it is written {written}"
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
    return f"this node's config has {name}, which is no key: {hint}"


def apply_policy(
    request: TrainRequest,
    node: Mapping[str, Any],
    at_step: Callable[[str], None] = lambda step: None,
) -> TrainRequest:
    """The request, lowered to this node's policy. `at_step` gets each step before it begins.

    Raises `ConfigError` for a request that exceeds it.
    """
    at_step("reading its node-config")
    values = read_policy(node)
    for key in POLICY:
        if key.name not in values:
            continue
        at_step(f"applying its {key.name}")
        _refuse(key, values[key.name], key.refusal(request, values[key.name]))
        request = key.lowered(request, values[key.name])
    return request


def apply_policy_to_step(
    private: PrivateStep, values: Mapping[str, Any], at_step: Callable[[str], None]
) -> None:
    """Compare δ and noise, which depend on the number of images, with `values` (`read_policy`).

    Call it before the training, which enters steps in the ledger. Raises `ConfigError` where they
    exceed a limit.
    """
    for key in POLICY:
        if key.name in values and (why := key.refused_step(private, values[key.name])):
            at_step(f"applying its {key.name}")
            _refuse(key, values[key.name], why)


def _refuse(key: Key, value: Any, why: str) -> None:
    if why:
        raise ConfigError(
            f"this node's config has {key.name} = {shown(value)}, and {why}: refused; the run "
            f"needs other settings, or this node another {key.name}"
        )


def apply_state_quota(state_dir: Path, own: Path, quota: float) -> None:
    """Remove states of other experiments, the oldest first, until all states fit into `quota` GiB.

    `own`: folder of the present experiment. Only states are removed: no ledger, log or pins.
    Experiments that train now are left. Raises `ConfigError` where that is not enough.
    """
    folders = {path.parent for path in state_dir.glob(f"*/{STATES}")}
    sizes = {folder: _bytes(folder) for folder in folders | {own}}
    others = sorted(folders - {own}, key=_newest)
    while sum(sizes.values()) > quota * GIB and others:
        folder = others.pop(0)
        with contextlib.suppress(ConfigError), files.locked(folder, 0.0):
            for path in folder.glob(STATES):
                path.unlink(missing_ok=True)
            sizes[folder] = 0
    if (total := sum(sizes.values())) > quota * GIB:
        raise ConfigError(
            f"this node's config has state-quota = {quota:g}, and the states need "
            f"{total / GIB:.3g} GiB: refused; raise it, or give smaller networks"
        )


def _bytes(folder: Path) -> int:
    return sum(status.st_size for status in _statuses(folder))


def _newest(folder: Path) -> float:
    return max((status.st_mtime for status in _statuses(folder)), default=0.0)


def _statuses(folder: Path) -> Iterator[os.stat_result]:
    """Those of the states; another process may remove one at any time."""
    for path in folder.glob(STATES):
        with contextlib.suppress(FileNotFoundError):
            yield path.stat()


# --- documentation -------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value as the node-config writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return (
        ",".join(value)
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def reference_markdown() -> str:
    """`POLICY` as a Markdown table."""
    rows = [f"| `{key.name}` | {key.kind.text} | {key.meaning} |" for key in POLICY]
    return "\n".join(["| key | value | meaning |", "|---|---|---|", *rows])
