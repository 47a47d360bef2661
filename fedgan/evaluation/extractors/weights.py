"""Weights files of feature extractors: identified, checked, and read without unpickling objects.

Nothing is downloaded: a hospital's machine may have no network, and figures must be reproducible.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedgan.errors import ConfigError, DataError

INCEPTION_FILE = "inception_v3_google-0cc3c7bd.pth"
INCEPTION_SOURCE = f"download.pytorch.org/models/{INCEPTION_FILE}"
XRAY_WORDS = ("xrv", "xray", "torchxrayvision")
XRAY_EXPORT = (
    'python -c "import torch, torchxrayvision as xrv; '
    "torch.save(xrv.models.DenseNet(weights='densenet121-res224-all').state_dict(), 'xrv.pth')\""
)
COUNTER = "num_batches_tracked"  # of batch norm: absent in old files, no feature depends on it


def existing_file(spec: str | Path) -> Path:
    """The weights file of `evaluation.features`. Raises `ConfigError` with file and source."""
    path = Path(spec).expanduser()
    if path.is_file():
        return path
    if str(spec).lower() in XRAY_WORDS:
        raise ConfigError(
            f"evaluation.features: '{spec}' needs the path of a weights file, none is downloaded: "
            f"create one on a machine with a network and give its path:\n{XRAY_EXPORT}"
        )
    raise ConfigError(
        f"evaluation.features: no weights file at {path}, none is downloaded: give the path of "
        f"torchvision's Inception-v3 ({INCEPTION_SOURCE}), of a SqueezeNet .npz or of a "
        "torchxrayvision state dict, or 'reference'"
    )


def is_numpy_archive(path: Path) -> bool:
    """Whether the file is an `.npz`: by content if complete, by name if truncated."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return path.suffix.lower() == ".npz"


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a state dict by name, on the CPU.

    Reads `.safetensors` and whatever `torch.load(weights_only=True)` opens; of a training
    checkpoint its `state_dict`. Raises `DataError` for a damaged file and for pickled objects,
    which are never opened.
    """
    try:
        content = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "not an allowed global" in str(error):
            raise DataError(
                f"{path} holds pickled objects, which can run code and are not opened: save the "
                "network's state_dict() with torch.save instead (evaluation.features)"
            ) from None
        raise _damaged(path, error) from None
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        EOFError,
        AttributeError,
        TypeError,
        IndexError,
    ) as error:
        raise _damaged(path, error) from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors = (
        {str(name): value for name, value in content.items() if torch.is_tensor(value)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise DataError(
            f"{path} holds no state dict (names and tensors): "
            "save the network's state_dict() (evaluation.features)"
        )
    return tensors


def fill(
    network: nn.Module, weights: Mapping[str, torch.Tensor], path: Path, what: str
) -> nn.Module:
    """Load weights (float32) into a network built on torch's `meta` device, in evaluation mode.

    Additional weights of the file are ignored. Raises `DataError` for a weight that is absent, of
    another shape or not finite.
    """
    state = {}
    for name, expected in network.state_dict().items():
        value = weights.get(name)
        if name.endswith(COUNTER):
            state[name] = torch.zeros((), dtype=torch.long)
            continue
        if value is None or value.shape != expected.shape or not torch.isfinite(value).all():
            shape = tuple(expected.shape)
            raise DataError(
                f"{path} is no {what} weights file ('{name}' should be {shape} and finite): "
                "copy it again"
            )
        state[name] = value.float()
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """sha256 (hex) of names, types, shapes and values by name, independent of the file's format."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        if not name.endswith(COUNTER):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(
                value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


def _is_safetensors(path: Path) -> bool:
    """Whether the file starts with a length of eight bytes that fits, then a JSON header."""
    with open(path, "rb") as stream:
        head = stream.read(9)
    return (
        len(head) == 9
        and head[8:] == b"{"
        and int.from_bytes(head[:8], "little") <= path.stat().st_size
    )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(error) from None
    return tensors


def _read_torch(path: Path) -> Any:
    with warnings.catch_warnings(action="ignore"):  # about foreign protocols: the error suffices
        return torch.load(path, map_location="cpu", weights_only=True)


def _damaged(path: Path, error: Exception) -> DataError:
    reason = (
        str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
    )
    return DataError(
        f"{path} is damaged or not a weights file ({reason}): "
        "copy it again, or use 'reference' (evaluation.features)"
    )
