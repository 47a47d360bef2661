"""Colour transforms: one affine map of the channels per image (appendix B, "color")."""

from __future__ import annotations

import math

import torch

from fedgan.errors import ConfigError

Quantities = dict[str, torch.Tensor]


def color_map(values: Quantities, batch: int) -> torch.Tensor:
    """(B, 3, 4) float64: the affine map of RGB of all colour transforms, in the paper's order.

    `values`: those of `brightness contrast lumaflip hue saturation` in the pipe, each (B,). The
    grey axis is v = (1, 1, 1) / √3: the luma flip mirrors it, hue rotates about it, saturation
    scales the orthogonal part.
    """
    eye = torch.eye(3, dtype=torch.float64)
    grey = torch.full((3, 3), 1 / 3, dtype=torch.float64)  # v v^T
    linear = eye.repeat(batch, 1, 1)
    offset = torch.zeros(batch, 3, dtype=torch.float64)
    if "brightness" in values:
        offset = offset + values["brightness"][:, None]
    if "contrast" in values:
        linear = linear * values["contrast"][:, None, None]
        offset = offset * values["contrast"][:, None]
    steps = []
    if "lumaflip" in values:
        steps.append(eye - 2 * grey * torch.round(values["lumaflip"])[:, None, None])
    if "hue" in values:
        steps.append(_rotate_about_grey(values["hue"], eye, grey))
    if "saturation" in values:
        steps.append(grey + (eye - grey) * values["saturation"][:, None, None])
    for step in steps:
        linear = step @ linear
        offset = (step @ offset[:, :, None])[:, :, 0]
    return torch.cat([linear, offset[:, :, None]], dim=2)


def check_channels(channels: int) -> None:
    """Raise `ConfigError` unless `channels` is 1 (grey) or 3 (RGB)."""
    if channels not in (1, 3):
        raise ConfigError(
            f"colour augmentation takes 1 or 3 channels, not {channels}: "
            "set augment.pipe to blit, geom or bg"
        )


def recolor(images: torch.Tensor, colors: torch.Tensor) -> torch.Tensor:
    """Apply `colors` (B, 3, 4) to `images` (B, 1 or 3, H, W), on any device.

    A grey image is RGB with three equal channels, and the mean is kept: hue and saturation have no
    effect, the luma flip negates it. Raises `ConfigError` for other numbers of channels.
    """
    batch, channels, height, width = images.shape
    check_channels(channels)
    if channels == 1:
        scale = colors[:, :, :3].sum(dim=2).mean(dim=1).to(images, non_blocking=True)
        offset = colors[:, :, 3].mean(dim=1).to(images, non_blocking=True)
        return torch.addcmul(offset[:, None, None, None], images, scale[:, None, None, None])
    colors = colors.to(images, non_blocking=True)
    return torch.baddbmm(colors[:, :, 3:], colors[:, :, :3], images.reshape(batch, 3, -1)).reshape(
        batch, 3, height, width
    )


def _rotate_about_grey(angle: torch.Tensor, eye: torch.Tensor, grey: torch.Tensor) -> torch.Tensor:
    """(B, 3, 3): rotation by `angle` radians about the grey axis (Rodrigues)."""
    unit = 1 / math.sqrt(3)
    cross = torch.tensor(
        [[0.0, -unit, unit], [unit, 0.0, -unit], [-unit, unit, 0.0]], dtype=torch.float64
    )
    cosine, sine = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    return cosine * eye + sine * cross + (1 - cosine) * grey
