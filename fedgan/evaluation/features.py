"""Feature extractors for distances between image sets. Each carries the name that stands beside every number it gives."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from fedgan.data.dataset import ImageArray
from fedgan.errors import ConfigError, DataError
from fedgan.evaluation.classification import penultimate
from fedgan.models.classifiers import Classifier

FIRES = {2: (16, 64), 3: (16, 64), 4: (32, 128), 5: (32, 128), 6: (48, 192), 7: (48, 192), 8: (64, 256), 9: (64, 256)}
BGR_MEAN = (104.0, 117.0, 123.0)
SCALE = 100.0


class Extractor(Protocol):
    """Images (N, C, H, W) uint8 in, features (N, D) float64 out."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: ImageArray) -> np.ndarray: ...


@dataclass(frozen=True)
class ReferenceExtractor:
    """Penultimate features of the classifier trained on the real training images."""

    classifier: Classifier
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"reference classifier ({self.classifier.name}, penultimate, {self.classifier.feature_dim})"

    def __call__(self, images: ImageArray) -> np.ndarray:
        return penultimate(self.classifier, images, self.device)


class SqueezeNetExtractor:
    """SqueezeNet v1.0 (arXiv 1602.07360) with ImageNet weights from an `.npz`: mean of fire9 over positions, 512 features.

    Input: RGB resized (bilinear) to 227×227, channels flipped to BGR, minus (104, 117, 123). Features are divided by
    100, or Fréchet distances would be in the thousands. A distance on these features is no FID.
    """

    name = "SqueezeNet v1.0 ImageNet (fire9 mean / 100, 512)"

    def __init__(self, path: str | Path, device: str = "cpu", batch: int = 32) -> None:
        self.device, self.batch = device, batch
        self.weights = {key: value.to(device) for key, value in load_squeezenet(path).items()}

    def __call__(self, images: ImageArray) -> np.ndarray:
        parts = []
        with torch.inference_mode():
            for start in range(0, images.shape[0], self.batch):
                index = np.arange(start, min(start + self.batch, images.shape[0]))
                block = torch.from_numpy(np.ascontiguousarray(images[index])).to(self.device)
                parts.append(self.features(block).double().cpu().numpy())
        return np.concatenate(parts)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, 512) of images (B, C, H, W) uint8, C = 1 or 3."""
        x = images.float().expand(-1, 3, -1, -1)
        x = functional.interpolate(x, size=(227, 227), mode="bilinear", align_corners=False, antialias=True)
        x = x.flip(1) - torch.tensor(BGR_MEAN, device=x.device).view(1, 3, 1, 1)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self._pool(self._convolve(x, "conv1", stride=2))
        for fire in FIRES:
            x = self._convolve(x, f"fire{fire}.squeeze")
            x = torch.cat([self._convolve(x, f"fire{fire}.expand1"), self._convolve(x, f"fire{fire}.expand3", padding=1)], 1)
            if fire in (4, 8):
                x = self._pool(x)
        return x.mean((2, 3)) / SCALE

    def _convolve(self, x: torch.Tensor, name: str, stride: int = 1, padding: int = 0) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.conv2d(x, weight, bias, stride, padding).relu_()

    @staticmethod
    def _pool(x: torch.Tensor) -> torch.Tensor:
        return functional.max_pool2d(x, 3, 2, ceil_mode=True)


def squeezenet_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays that the extractor reads from the `.npz` (the classification layer is not used)."""
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
    """Read and check the weights. Raises `ConfigError` for a missing file, `DataError` for a damaged or other one."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"evaluation.features: no weights file at {path}: give the path of a SqueezeNet .npz, or 'reference'")
    weights = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name, shape in squeezenet_shapes().items():
                array = np.asarray(archive[name], np.float32)
                if array.shape != shape or not np.isfinite(array).all():
                    raise ValueError(f"'{name}' should be {shape} and finite")
                weights[name] = torch.from_numpy(array)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no SqueezeNet v1.0 weights file ({error}): copy it again, or use 'reference'") from None
    return weights
