"""SqueezeNet v1.0 with ImageNet weights from an `.npz`, six times as fast as Inception-v3."""

from __future__ import annotations

import zipfile
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from fedgan.data.dataset import ImageArray
from fedgan.errors import DataError
from fedgan.evaluation.extractors.batches import in_batches, resized
from fedgan.evaluation.extractors.weights import existing_file, weights_digest

FIRES = {
    2: (16, 64),
    3: (16, 64),
    4: (32, 128),
    5: (32, 128),
    6: (48, 192),
    7: (48, 192),
    8: (64, 256),
    9: (64, 256),
}
BGR_MEAN = (104.0, 117.0, 123.0)
SCALE = 100.0
SIDE = 227


class SqueezeNetExtractor:
    """SqueezeNet v1.0 (arXiv 1602.07360), ImageNet: mean of fire9 over positions, 512 features.

    Input: RGB resized (bilinear, antialiased) to 227×227, channels flipped to BGR, minus (104, 117,
    123). Features are divided by 100, or Fréchet distances would be in the thousands. A distance on
    these features is not an FID.
    """

    name = "SqueezeNet v1.0 ImageNet (fire9 mean / 100, 512)"
    is_fid = False
    feature_dim = 512

    def __init__(self, path: str | Path, device: str = "cpu", batch: int | None = None) -> None:
        """Raises `ConfigError` for a missing file, `DataError` for a damaged or another one."""
        self.device, self.batch = device, batch
        self.weights = {key: value.to(device) for key, value in load_squeezenet(path).items()}

    @cached_property
    def key(self) -> str:
        """Name, and sha256 of the weights: the key of cached features."""
        return f"{self.name} sha256:{weights_digest(self.weights)}"

    def __call__(self, images: ImageArray) -> np.ndarray:
        """Features (N, 512) float64 of images (N, C, H, W) uint8."""
        return in_batches(self.features, images, self.feature_dim, self.device, self.batch)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, 512) of images (B, C, H, W) uint8, C = 1 or 3."""
        x = resized(images, SIDE, 3)
        x = x.flip(1) - torch.tensor(BGR_MEAN, device=x.device).view(1, 3, 1, 1)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self._pool(self._convolve(x, "conv1", stride=2))
        for fire in FIRES:
            x = self._convolve(x, f"fire{fire}.squeeze")
            x = torch.cat(
                [
                    self._convolve(x, f"fire{fire}.expand1"),
                    self._convolve(x, f"fire{fire}.expand3", padding=1),
                ],
                1,
            )
            if fire in (4, 8):
                x = self._pool(x)
        return x.mean((2, 3)) / SCALE

    def _convolve(
        self, x: torch.Tensor, name: str, stride: int = 1, padding: int = 0
    ) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.conv2d(x, weight, bias, stride, padding).relu_()

    @staticmethod
    def _pool(x: torch.Tensor) -> torch.Tensor:
        return functional.max_pool2d(x, 3, 2, ceil_mode=True)


def squeezenet_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays that the extractor reads (no classification layer)."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (96, 3, 7, 7), "conv1.bias": (96,)}
    inputs = 96
    for fire, (squeeze, expand) in FIRES.items():
        for part, shape in (
            ("squeeze", (squeeze, inputs, 1, 1)),
            ("expand1", (expand, squeeze, 1, 1)),
            ("expand3", (expand, squeeze, 3, 3)),
        ):
            shapes[f"fire{fire}.{part}.weight"] = shape
            shapes[f"fire{fire}.{part}.bias"] = shape[:1]
        inputs = 2 * expand
    return shapes


def load_squeezenet(path: str | Path) -> dict[str, torch.Tensor]:
    """Read and check the weights.

    Raises `ConfigError` for a missing file, `DataError` for a damaged file or another network.
    """
    path = existing_file(path)
    weights = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name, shape in squeezenet_shapes().items():
                array = np.asarray(archive[name], np.float32)
                if array.shape != shape or not np.isfinite(array).all():
                    raise ValueError(f"'{name}' should be {shape} and finite")
                weights[name] = torch.from_numpy(array)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        zipfile.BadZipFile,
    ) as error:
        raise DataError(
            f"{path} is not a SqueezeNet v1.0 weights file ({error}): "
            "copy it again, or use 'reference'"
        ) from None
    return weights
