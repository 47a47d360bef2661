"""Classifiers of the central evaluator: a small CNN for small images on a CPU, and ResNet-18.

Both take images (B, C, H, W) float in [-1, 1] and offer `features(images)` → (B, D), the penultimate
layer after global average pooling, and `forward(images)` → logits (B, K).
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from fedgan.errors import ConfigError

CLASSIFIERS = ("small-cnn", "resnet18")
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
    """
    stride = max(1, resolution // 32)
    layers: list[nn.Module] = [_block(channels, WIDTHS[0], kernel=3 if stride == 1 else 2 * stride + 1, stride=stride)]
    for inputs, outputs in itertools.pairwise(WIDTHS):
        layers += [nn.MaxPool2d(2), _block(inputs, outputs)]
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Classifier("small-cnn", body, WIDTHS[-1], label_dim)


def resnet18(channels: int, label_dim: int) -> Classifier:
    """torchvision's ResNet-18 (arXiv 1512.03385) without pretrained weights, 512 features; grey images are repeated to RGB.

    Raises `ConfigError` for other than one or three channels.
    """
    from torchvision.models import resnet18 as torchvision_resnet18

    if channels not in (1, 3):
        raise ConfigError(f"classifier 'resnet18' takes 1 or 3 channels, not {channels}: use 'small-cnn'")
    network = torchvision_resnet18(weights=None)
    network.fc = nn.Identity()
    return Classifier("resnet18", nn.Sequential(_GreyToColour(), network), 512, label_dim)


def build_classifier(name: str, channels: int, resolution: int, label_dim: int) -> Classifier:
    """The classifier called `name`, freshly initialised from torch's global generator. Raises `ConfigError` for another name."""
    if name == "small-cnn":
        return small_cnn(channels, resolution, label_dim)
    if name == "resnet18":
        return resnet18(channels, label_dim)
    raise ConfigError(f"no classifier called '{name}': choose one of {', '.join(CLASSIFIERS)}")


def _block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
