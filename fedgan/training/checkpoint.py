"""Checkpoints: tensors in one `.safetensors`, their meaning in the `.json` beside it. No pickle.

The JSON is written last and holds the hash of the tensors: a checkpoint without its JSON, or with another
hash, does not count.
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
from fedgan.models.stylegan2.generator import Generator

FORMAT = 2


class FormatError(CheckpointError):
    """A checkpoint that another version of fedgan wrote."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write `tensors` to `path` (.safetensors) and `meta` to the .json beside it, atomically, JSON last."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    data = format_tensors(plain)
    side = path.with_suffix(".json")
    if side.exists():
        side.unlink()  # the old pair ends before the new one begins
    files.write_bytes(path, data)
    files.write_json(side, {"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest(), **meta})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: (tensors on the CPU, meta).

    Raises `CheckpointError` when a file is missing, truncated or does not belong to the other.
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
                f"checkpoint {path} is damaged: its hash differs from {side.name}; use an earlier one"
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
    """The tensors whose name starts with `prefix`, without it."""
    return {
        name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)
    }


def numbered(lists: Mapping[str, Sequence[Tensor]], prefix: str) -> dict[str, Tensor]:
    """Lists of tensors, one for each part of the model, under names that `lists_of` reads: `prefix` part/number."""
    return {
        f"{prefix}{part}/{number:03d}": tensor
        for part, row in lists.items()
        for number, tensor in enumerate(row)
    }


def lists_of(
    tensors: Mapping[str, Tensor], prefix: str, device: torch.device
) -> dict[str, list[Tensor]]:
    """What was given to `numbered`, copied to `device`; other names are left alone."""
    lists: dict[str, list[Tensor]] = {}
    for name, tensor in sorted(with_prefix(tensors, prefix).items()):
        lists.setdefault(name.partition("/")[0], []).append(tensor.to(device, copy=True))
    return lists


@torch.no_grad()
def load_into(
    module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str, check_only: bool = False
) -> None:
    """Copy tensors into a module's parameters and persistent buffers by name.

    Raises `CheckpointError` when a name or a shape differs; the module is untouched then. `check_only`: copy nothing.
    """
    own = module.state_dict()
    if missing := sorted(own.keys() ^ tensors.keys()):
        raise CheckpointError(
            f"{where} is of another model: '{missing[0]}' and {len(missing) - 1} more names differ; check model.* settings"
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


def load_generator(path: Path, device: str = "cpu") -> tuple[Generator, dict[str, Any]]:
    """The generator to sample from: the average where it travels, else the generator itself; and the meta.

    Where it tells hospitals apart it draws from those whose answers are in it: the column of another is as the seed gave it.
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
            f"{path} is no checkpoint of a round (it lacks '{missing[0]}'): give one of RUN/checkpoints"
        )
    settings = from_dict(meta["settings"], source=str(path.with_suffix(".json")))
    generator = Generator(
        settings.model, meta["resolution"], meta["channels"], len(meta["label_names"])
    )
    load_into(generator, weights, f"checkpoint {path}")
    if settings.model.hospitals:
        shares, labels = meta.get("shares", []), len(meta["label_names"])
        if not shares or any(len(share.get("label_counts", ())) != labels for share in shares):
            raise CheckpointError(
                f"{path} does not tell the hospitals' shares of the labels, by which model.hospitals draws: give a checkpoint "
                "of a round as the run left it"
            )
        answered = {int(number) for number in meta.get("since", {})} or {
            share["number"] for share in shares
        }
        known = {
            share["number"]: (share["images"], share["label_counts"])
            for share in shares
            if share["number"] in answered
        }
        generator.mapping.hospital_condition.set_label_counts(known, meta.get("exclusive", True))
    return generator.eval().requires_grad_(False).to(device), meta
