"""Classifiers of the evaluator: a small CNN for a CPU and three networks of torchvision.

All take images (B, C, H, W) float in [-1, 1] and provide `features(images)` → (B, D), the
penultimate layer after global average pooling, and `forward(images)` → logits (B, K).

torchvision's networks are made for 224 pixels and reduce the side 32 times. Below 64 pixels the
stem halves once less (ResNet-18 and DenseNet-121: no max-pool; EfficientNet-B2: first convolution
with stride 1), so that 32 pixels give the same map sizes as 64. None is pretrained, and none draws
random numbers in its forward pass: the seed determines a training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

from fedgan.config import CLASSIFIERS
from fedgan.errors import ConfigError

SMALL = 64  # pixels per side; below, the stem of torchvision's networks halves once less
WIDTHS = (24, 48, 96, 128)  # of the small CNN: at 32², 16², 8², 4²


class Classifier(nn.Module):
    """A body with features (B, D), and one linear layer on top."""

    def __init__(self, name: str, body: nn.Module, feature_dim: int, label_dim: int) -> None:
        super().__init__()
        self.name, self.feature_dim, self.label_dim = name, feature_dim, label_dim
        self.body = body
        self.head = nn.Linear(feature_dim, label_dim)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features (B, D) of images (B, C, H, W) in [-1, 1]."""
        features: torch.Tensor = self.body(images)
        return features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, K) of images (B, C, H, W) in [-1, 1]."""
        logits: torch.Tensor = self.head(self.features(images))
        return logits


class _GreyToColour(nn.Module):
    """Repeat a single channel three times; keep three channels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def small_cnn(channels: int, resolution: int, label_dim: int) -> Classifier:
    """Four convolutions with batch norm: 128 features, 165,000 weights, 8 million multiply-adds.

    Above 32 × 32 the first convolution strides, so that the others work at 32 × 32. Maps are pooled
    before they are normalised: batch norm and ReLU work on a quarter of the pixels.
    """
    stride = max(1, resolution // 32)
    layers: list[nn.Module] = [
        _block(
            channels,
            WIDTHS[0],
            kernel=3 if stride == 1 else 2 * stride + 1,
            stride=stride,
            pool=True,
        )
    ]
    for inputs, outputs in itertools.pairwise(WIDTHS):
        layers.append(_block(inputs, outputs, pool=outputs != WIDTHS[-1]))
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Classifier("small-cnn", body, WIDTHS[-1], label_dim)


def resnet18(channels: int, resolution: int, label_dim: int) -> Classifier:
    """torchvision's ResNet-18 (arXiv 1512.03385), untrained, 512 features; grey becomes RGB.

    Raises `ConfigError` unless there are one or three channels.
    """
    from torchvision.models import resnet18 as torchvision_resnet18

    _check_channels("resnet18", channels)
    network = torchvision_resnet18(weights=None)
    if resolution < SMALL:
        network.maxpool = nn.Identity()
    network.fc = nn.Identity()
    return Classifier("resnet18", nn.Sequential(_GreyToColour(), network), 512, label_dim)


def densenet121(channels: int, resolution: int, label_dim: int) -> Classifier:
    """torchvision's DenseNet-121 (arXiv 1608.06993), untrained, 1024 features; grey becomes RGB.

    Raises `ConfigError` unless there are one or three channels.
    """
    from torchvision.models import densenet121 as torchvision_densenet121

    _check_channels("densenet121", channels)
    network = torchvision_densenet121(weights=None)
    if resolution < SMALL:
        network.features.pool0 = nn.Identity()
    network.classifier = nn.Identity()
    return Classifier("densenet121", nn.Sequential(_GreyToColour(), network), 1024, label_dim)


def efficientnet_b2(channels: int, resolution: int, label_dim: int) -> Classifier:
    """torchvision's EfficientNet-B2 (arXiv 1905.11946), untrained, 1408 features; grey is RGB.

    Without dropout and stochastic depth, which draw from torch's global generator. Raises
    `ConfigError` unless there are one or three channels.
    """
    from torchvision.models import efficientnet_b2 as torchvision_efficientnet_b2

    _check_channels("efficientnet-b2", channels)
    network = torchvision_efficientnet_b2(weights=None, stochastic_depth_prob=0.0)
    if resolution < SMALL:
        network.features[0][0].stride = (1, 1)
    network.classifier = nn.Identity()
    return Classifier("efficientnet-b2", nn.Sequential(_GreyToColour(), network), 1408, label_dim)


BUILDERS: dict[str, Callable[[int, int, int], Classifier]] = {
    "small-cnn": small_cnn,
    "resnet18": resnet18,
    "densenet121": densenet121,
    "efficientnet-b2": efficientnet_b2,
}


def build_classifier(name: str, channels: int, resolution: int, label_dim: int) -> Classifier:
    """The classifier called `name`, initialised from torch's global generator.

    Raises `ConfigError` for an unknown name and for channels that the network does not take.
    """
    if name not in BUILDERS:
        raise ConfigError(f"no classifier called '{name}': choose one of {', '.join(CLASSIFIERS)}")
    return BUILDERS[name](channels, resolution, label_dim)


def _check_channels(name: str, channels: int) -> None:
    if channels not in (1, 3):
        raise ConfigError(
            f"classifier '{name}' takes 1 or 3 channels, not {channels}: use 'small-cnn'"
        )


def _block(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, pool: bool = False
) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    halved = [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(convolution, *halved, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
