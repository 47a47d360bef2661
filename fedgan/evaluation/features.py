"""Feature extractors by the name or file of `evaluation.features`.

Each has a name, which is printed with every figure, a key for the cache of real features, and a
flag whether a Fréchet distance on its features may be called FID. The networks are in
`fedgan/evaluation/extractors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from fedgan.data.dataset import ImageArray
from fedgan.errors import DataError
from fedgan.evaluation.classification import penultimate
from fedgan.evaluation.extractors import inception, xray
from fedgan.evaluation.extractors.inception import InceptionExtractor
from fedgan.evaluation.extractors.squeezenet import (
    FIRES,
    SqueezeNetExtractor,
    load_squeezenet,
    squeezenet_shapes,
)
from fedgan.evaluation.extractors.weights import (
    INCEPTION_FILE,
    existing_file,
    is_numpy_archive,
    read_weights,
    weights_digest,
)
from fedgan.evaluation.extractors.xray import XrayExtractor
from fedgan.models.classifiers import Classifier

__all__ = [
    "FIRES",
    "Extractor",
    "InceptionExtractor",
    "ReferenceExtractor",
    "SqueezeNetExtractor",
    "XrayExtractor",
    "check_features",
    "extractor_from",
    "load_squeezenet",
    "squeezenet_shapes",
]

REFERENCE = "reference"


class Extractor(Protocol):
    """Images (N, C, H, W) uint8 in, features (N, D) float64 out."""

    @property
    def name(self) -> str:
        """Printed with every figure based on these features."""
        ...

    @property
    def key(self) -> str:
        """Name and sha256 of the weights: equal keys give equal features."""
        ...

    @property
    def is_fid(self) -> bool:
        """Whether a Fréchet distance on these features is an FID; True for Inception-v3 only."""
        ...

    def __call__(self, images: ImageArray) -> np.ndarray: ...


@dataclass(frozen=True)
class ReferenceExtractor:
    """Penultimate features of the classifier trained on the real training images."""

    classifier: Classifier
    device: str = "cpu"
    is_fid: ClassVar[bool] = False

    @property
    def name(self) -> str:
        network = self.classifier
        return f"reference classifier ({network.name}, penultimate, {network.feature_dim})"

    @property
    def key(self) -> str:
        return f"{self.name} sha256:{weights_digest(self.classifier.state_dict())}"

    def __call__(self, images: ImageArray) -> np.ndarray:
        return penultimate(self.classifier, images, self.device)


def extractor_from(spec: str | Path, device: str = "cpu") -> Extractor:
    """The extractor of the weights file `spec`; its content identifies the network.

    SqueezeNet v1.0 as `.npz`; torchvision's Inception-v3 or torchxrayvision's DenseNet-121 as a
    state dict of torch or safetensors. Nothing is downloaded. Raises `ConfigError` for a missing
    file, `DataError` for a damaged file or another network, `MachineError` where the network's
    package is not installed.
    """
    path = existing_file(spec)
    if is_numpy_archive(path):
        return SqueezeNetExtractor(path, device)
    weights = read_weights(path)
    if inception.MARK in weights:
        return InceptionExtractor(weights, path, device)
    if xray.MARK in weights:
        return XrayExtractor(weights, path, device)
    raise DataError(
        f"{path} is none of the networks of evaluation.features (its first weight is "
        f"'{next(iter(weights))}'): give torchvision's Inception-v3 ({INCEPTION_FILE}), "
        "a SqueezeNet .npz, or a torchxrayvision DenseNet-121"
    )


def check_features(spec: str | Path) -> None:
    """Check the file of `evaluation.features` before a training starts. Raises as `extractor_from`.

    'reference' always passes: its classifier is trained later.
    """
    if str(spec) != REFERENCE:
        extractor_from(spec)
