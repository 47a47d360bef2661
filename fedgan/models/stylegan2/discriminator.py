"""StyleGAN2's residual discriminator with projection (arXiv 1912.04958, 2006.06676)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fedgan.config import ModelSettings
from fedgan.models.stylegan2.generator import Mapping
from fedgan.models.stylegan2.layers import GAIN, Conv, Linear, activate, channels_at, minibatch_std

CLASS_MAPPING_LAYERS = 8


class ResidualBlock(nn.Module):
    """(B, in, H, W) → (B, out, H/2, W/2); both branches are scaled by √½.

    The input is an activation without its √2 (`input_gain`), or a sum of branches (no gain).
    """

    def __init__(
        self, inputs: int, outputs: int, image_channels: int, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.fromrgb = Conv(image_channels, inputs, 1, rng) if image_channels else None
        gain = GAIN if image_channels else 1.0
        self.conv0 = Conv(inputs, inputs, 3, rng, input_gain=gain)
        # √2 of the activation times √½ of the branch is 1: conv1's activation is not scaled.
        self.conv1 = Conv(inputs, outputs, 3, rng, down=True, input_gain=GAIN)
        self.skip = Conv(
            inputs,
            outputs,
            1,
            rng,
            bias=False,
            down=True,
            input_gain=gain,
            output_gain=math.sqrt(0.5),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.fromrgb is not None:
            x = activate(self.fromrgb(x))
        return self.skip(x) + activate(self.conv1(activate(self.conv0(x))))


class Head(nn.Module):
    """4 × 4 head: minibatch-std, convolution, two linear layers → features (B, outputs)."""

    def __init__(self, channels: int, outputs: int, group: int, rng: torch.Generator) -> None:
        super().__init__()
        self.group = group
        self.conv = Conv(channels + (1 if group else 0), channels, 3, rng)
        self.fc = Linear(channels * 16, channels, rng, input_gain=GAIN)
        self.out = Linear(channels, outputs, rng, input_gain=GAIN)

    def forward(self, x: Tensor, halves: int) -> Tensor:
        if self.group:
            x = minibatch_std(x, self.group, halves)
        x = activate(self.conv(x)).to(self.fc.weight.dtype)
        return self.out(activate(self.fc(x.flatten(1))))


class Discriminator(nn.Module):
    """D(x, c): images (B, C, H, W) in [-1, 1], c (B, label_dim) multi-hot → logits (B,).

    With `model.hospitals`, c may end with the hospital, one-hot; else every hospital counts by its
    share of the label. `halves` = 2: fake images, then as many real ones, in one pass; groups of
    minibatch-std stay within a half, so that the logits equal those of two passes.
    """

    def __init__(
        self,
        model: ModelSettings,
        resolution: int,
        channels: int,
        label_dim: int,
        rng: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        rng = rng or torch.Generator().manual_seed(1)
        self.label_dim = label_dim
        self.dtype = (
            torch.float32
        )  # of the convolutions; bfloat16 too. The linear layers stay float32
        base, most = (
            model.d_channel_base or model.channel_base,
            model.d_channel_max or model.channel_max,
        )
        self.resolutions = [2**power for power in range(int(math.log2(resolution)), 2, -1)]
        for number, side in enumerate(self.resolutions):
            here = channels_at(side, base, most)
            after = channels_at(side // 2, base, most)
            self.add_module(
                f"b{side}", ResidualBlock(here, after, channels if number == 0 else 0, rng)
            )
        width = channels_at(4, base, most)
        known = label_dim + model.hospitals
        more: dict[str, Any] = {"track": False, "hospitals": model.hospitals}
        self.mapping = (
            Mapping(0, label_dim, width, CLASS_MAPPING_LAYERS, rng, **more) if known else None
        )
        self.b4 = Head(width, width if known else 1, model.minibatch_std_group, rng)

    def forward(self, images: Tensor, c: Tensor, halves: int = 1) -> Tensor:
        x = images.to(self.dtype).contiguous(memory_format=torch.channels_last)
        for side in self.resolutions:
            x = getattr(self, f"b{side}")(x)
        x = self.b4(x, halves)
        if self.mapping is None:
            return x[:, 0]
        return (x * self.mapping(None, c)).sum(dim=1) / math.sqrt(x.shape[1])
