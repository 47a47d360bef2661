"""Checkpoints: tensors in a `.safetensors`, their meaning in the `.json` beside it. No pickle.

The JSON is written last and holds the hash of the tensors: without it, or with another hash, a
checkpoint is invalid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as format_tensors
from torch import Tensor

from fedgan import files
from fedgan.config import from_dict
from fedgan.errors import CheckpointError
from fedgan.models.families import network_classes
from fedgan.models.hospital_condition import set_label_counts

FORMAT = 2  # of the JSON


class FormatError(CheckpointError):
    """A checkpoint of another format."""


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

    Raises `CheckpointError` when a file is missing or truncated, or the two do not belong together.
    """
    side = path.with_suffix(".json")
    for file in (path, side):
        if not file.is_file():
            raise CheckpointError(f"no checkpoint at {path}: {file.name} is missing")
    try:
        meta = json.loads(side.read_text(encoding="utf-8"))
        data = path.read_bytes()
        if not isinstance(meta, dict) or meta.get("sha256") != hashlib.sha256(data).hexdigest():
            raise CheckpointError(
                f"checkpoint {path} is damaged: its hash differs from {side.name}; "
                "use an earlier one"
            )
        if meta.get("format") != FORMAT:
            raise FormatError(
                f"checkpoint {path} has the format {meta.get('format')}, and this version reads "
                f"{FORMAT}: use the version of fedgan that wrote it, or train again"
            )
        return parse_tensors(data), meta
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, OSError) as error:
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

    Raises `CheckpointError` when a name or a shape differs; then nothing changes.
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
    if not check_only:
        for name, target in own.items():
            target.copy_(tensors[name])


def load_generator(path: Path, device: str = "cpu") -> tuple[Any, dict[str, Any]]:
    """The generator of a round's checkpoint (the average where it travels) and its meta.

    With `model.hospitals` it samples from the hospitals whose updates are in it: the column of
    another hospital is still its initialisation.
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
    settings = from_dict(meta["settings"], source=str(path.with_suffix(".json")))
    labels = len(meta["label_names"])
    generator = network_classes(settings.model.family)["generator"](
        settings.model, meta["resolution"], meta["channels"], labels
    )
    load_into(generator, weights, f"checkpoint {path}")
    if settings.model.hospitals:
        participants = meta.get("participants", [])
        if not participants or any(
            len(participant.get("label_counts", ())) != labels for participant in participants
        ):
            raise CheckpointError(
                f"{path} lacks the hospitals' label counts, from which model.hospitals samples: "
                "give a checkpoint of a round as the run wrote it"
            )
        numbers = {int(number) for number in meta.get("since", {})}
        counts = {
            participant["number"]: (participant["images"], participant["label_counts"])
            for participant in participants
            if not numbers or participant["number"] in numbers
        }
        set_label_counts(generator, counts, meta.get("exclusive", True))
    return generator.eval().requires_grad_(False).to(device), meta
