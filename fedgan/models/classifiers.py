"""Classifiers of the central evaluator: a small CNN for small images on a CPU, and three networks of torchvision.

All take images (B, C, H, W) float in [-1, 1] and offer `features(images)` → (B, D), the penultimate
layer after global average pooling, and `forward(images)` → logits (B, K).

torchvision's networks are made for 224 pixels and shrink an image 32 times. Below 64 pixels one halving of their stem is
left out (ResNet-18 and DenseNet-121: the max-pool; EfficientNet-B2: the stride of the first convolution), so that a
32-pixel image goes through the same map sizes as one of 64 pixels. From 64 pixels on they are torchvision's own. None is
pretrained, and none draws random numbers in its forward pass: a training is determined by its seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

from fedgan.config import CLASSIFIERS
from fedgan.errors import ConfigError

SMALL = 64  # pixels a side; below, the stem of torchvision's networks halves the image once less
WIDTHS = (24, 48, 96, 128)  # of the small CNN: at 32², 16², 8², 4²


class Classifier(nn.Module):
    """A body that gives features (B, D) and one linear layer on top."""

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
    """Repeat a single channel three times; leave three channels as they are."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def small_cnn(channels: int, resolution: int, label_dim: int) -> Classifier:
    """Four convolutions with batch norm, 128 features; about 165,000 weights and 8 million multiply-adds an image.

    Above 32×32 the first convolution strides, so that the rest of the network works at 32×32 whatever the resolution.
    Maps are pooled before they are normalised: batch norm and ReLU then work on a quarter of the pixels.
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
    """torchvision's ResNet-18 (arXiv 1512.03385) without pretrained weights, 512 features; grey images are repeated to RGB.

    Below 64 pixels without the stem's max-pool. Raises `ConfigError` for other than one or three channels.
    """
    from torchvision.models import resnet18 as torchvision_resnet18

    _check_channels("resnet18", channels)
    network = torchvision_resnet18(weights=None)
    if resolution < SMALL:
        network.maxpool = nn.Identity()
    network.fc = nn.Identity()
    return Classifier("resnet18", nn.Sequential(_GreyToColour(), network), 512, label_dim)


def densenet121(channels: int, resolution: int, label_dim: int) -> Classifier:
    """torchvision's DenseNet-121 (arXiv 1608.06993) without pretrained weights, 1024 features; grey is repeated to RGB.

    Below 64 pixels without the stem's max-pool. Raises `ConfigError` for other than one or three channels.
    """
    from torchvision.models import densenet121 as torchvision_densenet121

    _check_channels("densenet121", channels)
    network = torchvision_densenet121(weights=None)
    if resolution < SMALL:
        network.features.pool0 = nn.Identity()
    network.classifier = nn.Identity()
    return Classifier("densenet121", nn.Sequential(_GreyToColour(), network), 1024, label_dim)


def efficientnet_b2(channels: int, resolution: int, label_dim: int) -> Classifier:
    """torchvision's EfficientNet-B2 (arXiv 1905.11946) without pretrained weights, 1408 features; grey is repeated to RGB.

    Without dropout and stochastic depth, which would draw from torch's global generator in every step. Below 64 pixels the
    first convolution has stride 1. Raises `ConfigError` for other than one or three channels.
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
    """The classifier called `name`, freshly initialised from torch's global generator.

    Raises `ConfigError` for another name, and for channels that the network does not take.
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
