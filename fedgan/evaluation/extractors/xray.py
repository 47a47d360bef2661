"""torchxrayvision's DenseNet-121, trained on chest radiographs (`pip install 'fedgan[xray]'`)."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedgan.data.dataset import ImageArray
from fedgan.errors import DataError, MachineError
from fedgan.evaluation.extractors.batches import in_batches, resized
from fedgan.evaluation.extractors.weights import fill, weights_digest

SIDE = 224
MARK = "features.denseblock4.denselayer16.norm1.weight"  # a weight that only DenseNet-121 has


class XrayExtractor:
    """torchxrayvision's DenseNet-121 (arXiv 2111.00595): mean of the last block, 1024 features.

    Input: grey, resized (bilinear, antialiased) to 224×224, in [-1024, 1024]. A distance on these
    features is not an FID.
    """

    name = "DenseNet-121 (torchxrayvision, chest radiographs, 1024)"
    is_fid = False
    feature_dim = 1024

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        path: Path,
        device: str = "cpu",
        batch: int | None = None,
    ) -> None:
        """`weights`: the state dict read from `path`.

        Raises `MachineError` where the package is absent, `DataError` for the weights of another
        network.
        """
        self.device, self.batch = device, batch
        self.network = _network(weights, path).to(device)

    @cached_property
    def key(self) -> str:
        """Name, and sha256 of the weights: the key of cached features."""
        return f"{self.name} sha256:{weights_digest(self.network.state_dict())}"

    def __call__(self, images: ImageArray) -> np.ndarray:
        """Features (N, 1024) float64 of images (N, C, H, W) uint8."""
        return in_batches(self.features, images, self.feature_dim, self.device, self.batch)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, 1024) of images (B, C, H, W) uint8, C = 1 or 3, on `device`."""
        x = (resized(images, SIDE, 1) / 127.5 - 1.0) * 1024.0
        features: torch.Tensor = self.network.features2(
            x.contiguous(memory_format=torch.channels_last)
        )  # type: ignore[operator]
        return features


def _network(weights: Mapping[str, torch.Tensor], path: Path) -> nn.Module:
    stem, head = weights.get("features.conv0.weight"), weights.get("classifier.weight")
    if stem is None or stem.shape[1] != 1 or head is None:
        raise DataError(
            f"{path} holds a DenseNet-121, but not torchxrayvision's, which takes one grey "
            "channel: give one of its networks, or 'reference' (evaluation.features)"
        )
    package = _torchxrayvision(path)
    with torch.device("meta"):
        network: nn.Module = package.models.DenseNet(
            weights=None, in_channels=1, num_classes=head.shape[0]
        )
    return fill(network, weights, path, "torchxrayvision DenseNet-121")


def _torchxrayvision(path: Path) -> Any:
    try:
        with warnings.catch_warnings():  # its import turns off all warnings of the process
            return importlib.import_module("torchxrayvision")
    except ImportError as error:
        raise MachineError(
            f"{path} holds a network of torchxrayvision, which cannot be imported ({error}): "
            "pip install 'fedgan[xray]', or set another evaluation.features"
        ) from None
