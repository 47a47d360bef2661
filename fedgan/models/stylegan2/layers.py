"""Layers of StyleGAN2 (arXiv 1912.04958): equalised layers and [1, 3, 3, 1] resampling.

Parameters are stored as initialised (unit normal over the layer's learning-rate multiplier) and
scaled at run time, so that all layers learn at the same speed (arXiv 1710.10196, section 4.1).
Activations are leaky ReLU 0.2 times √2. The √2 is folded into the next linear operation, its
`input_gain`, which saves a pass over the activations.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2
GAIN = math.sqrt(2.0)


def activate(x: Tensor) -> Tensor:
    """Leaky ReLU 0.2, without the √2 (the next layer's `input_gain`)."""
    return F.leaky_relu(x, SLOPE)


def normalize_second_moment(x: Tensor) -> Tensor:
    """Scale each row of (B, D) to unit mean square."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


class Linear(nn.Module):
    """Equalised fully connected layer: (B, in) → (B, out)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rng: torch.Generator,
        bias: float = 0.0,
        lr_multiplier: float = 1.0,
        input_gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, generator=rng) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((outputs,), bias / lr_multiplier))
        self.weight_gain = input_gain * lr_multiplier / math.sqrt(inputs)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)


class Conv(nn.Module):
    """Equalised convolution of D: (B, in, H, W) → (B, out, H, W), or half the side with `down`.

    `output_gain` scales the result (√½ of a residual branch); it must be 1 with a bias.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        rng: torch.Generator,
        bias: bool = True,
        down: bool = False,
        input_gain: float = 1.0,
        output_gain: float = 1.0,
    ) -> None:
        super().__init__()
        weight = torch.randn(outputs, inputs, kernel, kernel, generator=rng)
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.gain = input_gain * output_gain / math.sqrt(inputs * kernel * kernel)
        self.down = down
        self.kernel = kernel
        self.fir: Tensor
        self.register_buffer(
            "fir", fir_kernel().expand(inputs, 1, 4, 4).clone() if down else None, persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight * self.gain).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not self.down:
            return F.conv2d(x, weight, bias, padding=self.kernel // 2)
        # Blur, then stride. A 1 × 1 kernel needs every second blurred pixel only; a 3 × 3 kernel
        # needs all, and the convolution's padding is added to the filter's.
        if self.kernel == 1:
            return F.conv2d(depthwise(x, self.fir, stride=2, padding=1), weight, bias)
        return F.conv2d(
            depthwise(x, self.fir, padding=1 + self.kernel // 2), weight, bias, stride=2
        )


def fir_kernel() -> Tensor:
    """The 4 × 4 low-pass filter [1, 3, 3, 1] ⊗ [1, 3, 3, 1], unit sum."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8.0
    return torch.outer(taps, taps)


def depthwise(x: Tensor, fir: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """Filter every channel of (B, C, H, W) with `fir` (C, 1, 4, 4)."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        # Depthwise bfloat16 kernels are tens of times slower than float32 on a CPU.
        return F.conv2d(x.float(), fir, stride=stride, padding=padding, groups=x.shape[1]).to(
            x.dtype
        )
    return F.conv2d(x, fir.to(x.dtype), stride=stride, padding=padding, groups=x.shape[1])


def upsample(x: Tensor) -> Tensor:
    """Double the side of (B, C, H, W): [1, 3, 3, 1] filter, gain 4 (bilinear, border of zeros)."""
    size = (2 * x.shape[2] + 4, 2 * x.shape[3] + 4)
    doubled = F.interpolate(F.pad(x, (1, 1, 1, 1)), size=size, mode="bilinear", align_corners=False)
    return doubled[:, :, 2:-2, 2:-2]


def minibatch_std(x: Tensor, group: int, halves: int = 1) -> Tensor:
    """Append one channel: the mean standard deviation over groups (arXiv 1710.10196, section 3).

    x (N, C, H, W) → (N, C + 1, H, W). With n = N / halves, image i is grouped with i + n/group,
    i + 2n/group, …; images of different halves (fake, real) never share a group. `group` is reduced
    to n for a smaller half, and to the largest divisor of n otherwise.
    """
    n = x.shape[0] // halves
    group = min(group, n)
    while n % group:
        group -= 1
    y = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(
        halves, group, n // group, *x.shape[1:]
    )
    y = y - y.mean(dim=1, keepdim=True)
    deviation = (y.square().mean(dim=1) + 1e-8).sqrt().mean(dim=(2, 3, 4))  # (halves, n / group)
    channel = (
        deviation.to(x.dtype).unsqueeze(1).expand(halves, group, n // group).reshape(-1, 1, 1, 1)
    )
    return torch.cat([x, channel.expand(-1, 1, x.shape[2], x.shape[3])], dim=1)


def noise_constant(resolution: int, layer: int) -> Tensor:
    """Fixed noise image of a layer: a constant of the architecture that never travels."""
    draw = np.random.Generator(np.random.PCG64([resolution, layer]))
    return torch.from_numpy(draw.standard_normal((resolution, resolution), dtype=np.float32))


def channels_at(resolution: int, base: int, most: int) -> int:
    """Channels of the layers at `resolution`."""
    return max(1, min(base // resolution, most))
