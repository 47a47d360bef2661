"""Inception-v3 with torchvision's ImageNet weights: the extractor of FID."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedgan.data.dataset import ImageArray
from fedgan.errors import DataError
from fedgan.evaluation.extractors.batches import in_batches, resized
from fedgan.evaluation.extractors.weights import INCEPTION_SOURCE, fill, weights_digest

SIDE = 299
CLASSES = 1000
MARK = "Mixed_7c.branch1x1.conv.weight"  # a weight that only Inception-v3 has


class InceptionExtractor:
    """torchvision's Inception-v3 (arXiv 1512.00567): mean of the last block (pool3), 2048 features.

    Input: RGB resized (bilinear, antialiased) to 299×299 in [-1, 1], equal to ImageNet
    normalisation followed by torchvision's `transform_input`. Only with this extractor a Fréchet
    distance is an FID (arXiv 1706.08500). torchvision's weights and pooling differ slightly from
    the TensorFlow network of the original FID: values compare with other torchvision-based FIDs,
    not exactly with published TensorFlow ones.
    """

    name = "Inception-v3 (torchvision, ImageNet, pool3, 2048)"
    is_fid = True
    feature_dim = 2048

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        path: Path,
        device: str = "cpu",
        batch: int | None = None,
    ) -> None:
        """`weights`: the state dict read from `path`. Raises `DataError` for another network."""
        self.device, self.batch = device, batch
        self.network = _network(weights, path).to(device)

    @cached_property
    def key(self) -> str:
        """Name, and sha256 of the weights: the key of cached features."""
        return f"{self.name} sha256:{weights_digest(self.network.state_dict())}"

    def __call__(self, images: ImageArray) -> np.ndarray:
        """Features (N, 2048) float64 of images (N, C, H, W) uint8."""
        return in_batches(self.features, images, self.feature_dim, self.device, self.batch)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, 2048) of images (B, C, H, W) uint8, C = 1 or 3, on `device`."""
        x = resized(images, SIDE, 3) / 127.5 - 1.0
        features: torch.Tensor = self.network(x.contiguous(memory_format=torch.channels_last))
        return features


def _network(weights: Mapping[str, torch.Tensor], path: Path) -> nn.Module:
    from torchvision.models import inception_v3

    head = weights.get("fc.weight")
    if head is None or head.shape[0] != CLASSES:
        found = "no classes" if head is None else f"{head.shape[0]} classes"
        why = (
            "the TensorFlow network of FID, with another pooling"
            if found == "1008 classes"
            else "another network"
        )
        raise DataError(
            f"{path} holds an Inception-v3 with {found} instead of {CLASSES} ({why}): "
            f"get {INCEPTION_SOURCE}"
        )
    with torch.device("meta"):  # no initialization: the weights come from the file
        network = inception_v3(
            weights=None, init_weights=False, aux_logits=False, transform_input=False
        )
    network.fc = nn.Identity()
    return fill(network, weights, path, "Inception-v3")
