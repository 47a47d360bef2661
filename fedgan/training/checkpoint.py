"""Checkpoints: tensors in a `.safetensors`, their meaning in the `.json` beside it. No pickle.

The JSON is written last and holds the hash of the tensors: without it, or with another hash, a
checkpoint is invalid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as format_tensors
from torch import Tensor

from fedgan import files
from fedgan.config import Settings, check_resolution, from_dict
from fedgan.errors import CheckpointError, ConfigError
from fedgan.models.families import network_classes
from fedgan.models.hospital_condition import set_label_counts

FORMAT = 2  # of the JSON
MOST_CHANNELS = 4  # of an image
# what a value of another type or a tensor of another kind raises
WRONG = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError)


class FormatError(CheckpointError):
    """A checkpoint of another format."""


class ForeignStateError(CheckpointError):
    """A training state of other images or another device, which are not lost."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write `tensors` to `path` (.safetensors), then `meta` to the .json beside it, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    data = format_tensors(plain)
    side = path.with_suffix(".json")
    if side.exists():
        side.unlink()  # invalidates the old pair before the new one is written
    files.write_bytes(path, data)
    files.write_json(side, {"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest(), **meta})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: (tensors on the CPU, meta).

    Raises `CheckpointError` when a file is missing or damaged, or the two do not belong together.
    The tensors are read only where their hash is right.
    """
    side = path.with_suffix(".json")
    for file in (path, side):
        if not file.is_file():
            raise CheckpointError(f"no checkpoint at {path}: {file.name} is missing")
    try:
        meta = files.parse_json(files.read_bytes(side))
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if not isinstance(meta, dict) or meta.get("sha256") != digest:
            raise CheckpointError(
                f"checkpoint {path} is damaged: its hash differs from {side.name}; "
                "use an earlier one"
            )
        if meta.get("format") != FORMAT:
            raise FormatError(
                f"checkpoint {path} has the format {meta.get('format')!r:.40}, this version reads "
                f"{FORMAT}: use the version of fedgan that wrote it, or train again"
            )
        return parse_tensors(path.read_bytes()), meta
    except (SafetensorError, OSError, *WRONG) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged ({error}); use an earlier one"
        ) from None


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, by the rest of their names."""
    return {
        name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)
    }


def numbered(lists: Mapping[str, Sequence[Tensor]], prefix: str) -> dict[str, Tensor]:
    """Lists of tensors by part, as named tensors `prefix` part/number for `lists_of`."""
    return {
        f"{prefix}{part}/{number:03d}": tensor
        for part, row in lists.items()
        for number, tensor in enumerate(row)
    }


def lists_of(
    tensors: Mapping[str, Tensor], prefix: str, device: torch.device
) -> dict[str, list[Tensor]]:
    """The lists that `numbered` named, copied to `device`; other names are ignored."""
    lists: dict[str, list[Tensor]] = {}
    for name, tensor in sorted(with_prefix(tensors, prefix).items()):
        lists.setdefault(name.partition("/")[0], []).append(tensor.to(device, copy=True))
    return lists


@torch.no_grad()
def load_into(
    module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str, check_only: bool = False
) -> None:
    """Copy tensors into the parameters and persistent buffers of a module, by name.

    Raises `CheckpointError` when a name, shape or type differs; then nothing changes.
    """
    own = module.state_dict()
    if missing := sorted(own.keys() ^ tensors.keys()):
        raise CheckpointError(
            f"{where} is of another model: '{missing[0]}' and {len(missing) - 1} more names "
            "differ; check model.* settings"
        )
    for name, target in own.items():
        if target.shape != tensors[name].shape:
            raise CheckpointError(
                f"{where} is of another model: '{name}' is {tuple(tensors[name].shape)} there, "
                f"{tuple(target.shape)} here; check model.* settings"
            )
        if target.dtype != tensors[name].dtype:
            raise CheckpointError(
                f"{where} is damaged: '{name}' is {tensors[name].dtype}, not {target.dtype}; use "
                "an earlier one"
            )
    if not check_only:
        for name, target in own.items():
            target.copy_(tensors[name])


def load_generator(path: Path, device: str = "cpu") -> tuple[Any, dict[str, Any]]:
    """The generator of a round's checkpoint (the average where it travels) and its meta.

    With `model.hospitals` it samples from the hospitals whose updates are in it: the column of
    another hospital is still its initialisation. Raises `CheckpointError` for any other file; the
    network is made only where its shapes are those of the file.
    """
    tensors, meta = load_tensors(path)
    weights = with_prefix(tensors, "ema/") or with_prefix(tensors, "generator/")
    if not weights:
        raise CheckpointError(
            f"checkpoint {path} holds no generator: federation.exchange kept it in the hospitals"
        )
    if missing := [
        key for key in ("settings", "resolution", "channels", "label_names") if key not in meta
    ]:
        raise CheckpointError(
            f"{path} is no checkpoint of a round (it lacks '{missing[0]}'): "
            "give one of RUN/checkpoints"
        )
    settings = settings_of_round(path, meta)
    make, labels = network_classes(settings.model.family)["generator"], len(meta["label_names"])
    shape = (settings.model, meta["resolution"], meta["channels"], labels)
    with torch.device("meta"):  # without memory: a damaged JSON may name huge networks
        load_into(make(*shape), weights, f"checkpoint {path}", check_only=True)
    generator = make(*shape)
    load_into(generator, weights, f"checkpoint {path}")
    if settings.model.hospitals:
        try:
            _set_hospitals(generator, meta, labels)
        except WRONG:
            raise CheckpointError(
                f"{path} lacks the hospitals' label counts, from which model.hospitals samples: "
                "give a checkpoint of a round as the run wrote it"
            ) from None
    return generator.eval().requires_grad_(False).to(device), meta


def settings_of_round(path: Path, meta: Mapping[str, Any]) -> Settings:
    """The settings in the meta of a round's checkpoint, whose shape of the images is valid too.

    Raises `CheckpointError` where either is not.
    """
    side, names = path.with_suffix(".json"), meta.get("label_names")
    try:
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ConfigError("its label_names are no list of names")
        if type(meta.get("channels")) is not int or not 1 <= meta["channels"] <= MOST_CHANNELS:
            raise ConfigError(f"its channels are no number from 1 to {MOST_CHANNELS}")
        if type(meta.get("resolution")) is not int:
            raise ConfigError("its resolution is no number")
        check_resolution(meta["resolution"], "its resolution")
        return from_dict(meta.get("settings", {}), source=str(side))
    except ConfigError as error:
        raise CheckpointError(f"{side} is damaged ({error}): use an earlier one") from None


def _set_hospitals(generator: torch.nn.Module, meta: Mapping[str, Any], labels: int) -> None:
    """Set the hospitals' label counts. Raises one of `WRONG` where the meta has none."""
    participants = meta["participants"]
    if not participants or any(len(row["label_counts"]) != labels for row in participants):
        raise ValueError("no label counts")
    numbers = {int(number) for number in meta.get("since", {})}
    counts = {
        row["number"]: (row["images"], row["label_counts"])
        for row in participants
        if not numbers or row["number"] in numbers
    }
    set_label_counts(generator, counts, meta.get("exclusive", True))
