"""StyleGAN2's generator: mapping network and skip synthesis network (arXiv 1912.04958).

Class conditioning follows arXiv 2006.06676: the class vector is embedded linearly, normalised and
concatenated to the normalised z. `c` is multi-hot: one class, several findings or none.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedgan.config import ModelSettings
from fedgan.models.hospital_condition import HospitalCondition
from fedgan.models.stylegan2.layers import (
    GAIN,
    Linear,
    activate,
    channels_at,
    depthwise,
    fir_kernel,
    noise_constant,
    normalize_second_moment,
    upsample,
)

W_AVG_DECAY = 0.998


class Mapping(nn.Module):
    """f(z, c) → w: z (B, z_dim) and c (B, label_dim) → w (B, w_dim); z_dim = 0: f(c).

    With `hospitals` = H the embedding has H more columns: c is (B, label_dim + H), or (B,
    label_dim) and `HospitalCondition` adds the hospital.
    """

    def __init__(
        self,
        z_dim: int,
        label_dim: int,
        w_dim: int,
        layers: int,
        rng: torch.Generator,
        lr_multiplier: float = 0.01,
        track: bool = True,
        hospitals: int = 0,
    ) -> None:
        super().__init__()
        self.z_dim, self.label_dim, self.layers = z_dim, label_dim, layers
        self.hospital_condition = HospitalCondition(label_dim, hospitals)
        known = label_dim + hospitals
        self.embed = Linear(known, w_dim, rng) if known else None
        width = z_dim + (w_dim if known else 0)
        for number in range(layers):
            gain = GAIN if number else 1.0
            self.add_module(
                f"fc{number}",
                Linear(width if number == 0 else w_dim, w_dim, rng, 0.0, lr_multiplier, gain),
            )
        self.w_avg: Tensor
        if track:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: Tensor | None, c: Tensor) -> Tensor:
        parts, dtype = [], next(self.parameters()).dtype
        if z is not None and self.z_dim:
            parts.append(normalize_second_moment(z.to(dtype)))
        if self.embed is not None:
            parts.append(
                normalize_second_moment(self.embed(self.hospital_condition(c, z).to(dtype)))
            )
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        for number in range(self.layers):
            x = activate(getattr(self, f"fc{number}")(x))
        return x * GAIN

    @torch.no_grad()
    def track(self, w: Tensor, batches: int) -> None:
        """Move w_avg towards the mean of a batch of w, the one after `batches` others.

        At first a plain mean: else a short run would keep w_avg near its initial zero.
        """
        self.w_avg.lerp_(w.detach().mean(dim=0), max(1 - W_AVG_DECAY, 1 / (batches + 1)))


class ModulatedConv(nn.Module):
    """Convolution whose input channels are scaled by a style (arXiv 1912.04958, section 2.2).

    Scaling activations before and after one shared convolution equals scaling the weights per
    image (appendix B), and is several times faster on a CPU.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        w_dim: int,
        rng: torch.Generator,
        up: bool = False,
    ) -> None:
        super().__init__()
        self.affine = Linear(w_dim, inputs, rng, bias=1.0)
        weight = torch.randn(outputs, inputs, kernel, kernel, generator=rng)
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.gain = 1 / math.sqrt(inputs * kernel * kernel)
        self.up = up
        self.kernel = kernel
        self.fir: Tensor
        self.register_buffer(
            "fir",
            (4 * fir_kernel()).expand(outputs, 1, 4, 4).clone() if up else None,
            persistent=False,
        )

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H, W); with `up` twice the side, low-pass filtered."""
        weight = weight.to(x.dtype)
        if not self.up:
            return F.conv2d(x, weight, padding=self.kernel // 2)
        return depthwise(
            F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), self.fir, padding=1
        )


class SynthesisLayer(ModulatedConv):
    """Modulated and demodulated 3 × 3 convolution, noise, bias, leaky ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        resolution: int,
        layer: int,
        w_dim: int,
        rng: torch.Generator,
        up: bool,
        input_gain: float,
    ) -> None:
        super().__init__(inputs, outputs, 3, w_dim, rng, up)
        self.resolution = resolution
        self.input_gain = input_gain
        self.noise_strength = nn.Parameter(torch.zeros(1))
        self.noise_const: Tensor
        self.register_buffer("noise_const", noise_constant(resolution, layer), persistent=False)

    def forward(self, x: Tensor, w: Tensor, noise: str, rng: torch.Generator | None) -> Tensor:
        style = self.affine(w)  # (B, in)
        weight = self.weight * self.gain
        # Demodulation: unit variance per output channel for unit-variance input (eq. 3).
        power = weight.square().sum(dim=(2, 3))  # (out, in)
        demodulate = (style.square() @ power.t() + 1e-8).rsqrt() * self.input_gain
        x = self.convolve(x * style[:, :, None, None].to(x.dtype), weight)
        shift = self.bias[:, None, None]
        if noise == "random":
            random = torch.randn(
                x.shape[0], 1, self.resolution, self.resolution, generator=rng, device=x.device
            )
            shift = shift + random * self.noise_strength
        elif noise == "const":
            shift = shift + self.noise_const * self.noise_strength
        return activate(x * demodulate[:, :, None, None].to(x.dtype) + shift.to(x.dtype))


class ToRGB(ModulatedConv):
    """Modulated 1 × 1 convolution to image channels, without demodulation."""

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w) * (self.gain * GAIN)
        image = self.convolve(x * style[:, :, None, None].to(x.dtype), self.weight)
        return image.to(self.bias.dtype) + self.bias[:, None, None]


class SynthesisBlock(nn.Module):
    """One resolution: two layers (one at 4 × 4) and the skip to RGB."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        resolution: int,
        channels: int,
        w_dim: int,
        rng: torch.Generator,
    ) -> None:
        super().__init__()
        self.first = resolution == 4
        if self.first:
            self.const = nn.Parameter(torch.randn(outputs, 4, 4, generator=rng))
        else:
            self.conv0 = SynthesisLayer(
                inputs, outputs, resolution, 0, w_dim, rng, up=True, input_gain=GAIN
            )
        # The constant is no activation: it has no gain to fold into the next layer.
        self.conv1 = SynthesisLayer(
            outputs,
            outputs,
            resolution,
            1,
            w_dim,
            rng,
            up=False,
            input_gain=1.0 if self.first else GAIN,
        )
        self.torgb = ToRGB(outputs, channels, 1, w_dim, rng)
        self.styles = 1 if self.first else 2

    def forward(
        self,
        x: Tensor | None,
        image: Tensor | None,
        ws: Tensor,
        noise: str,
        rng: torch.Generator | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """ws (B, styles + 1, w_dim) → activations (`dtype`) and the RGB image so far (float32)."""
        if x is None:
            x = (
                self.const.to(dtype)
                .expand(ws.shape[0], -1, -1, -1)
                .contiguous(memory_format=torch.channels_last)
            )
        else:
            x = self.conv0(x, ws[:, 0], noise, rng)
        x = self.conv1(x, ws[:, self.styles - 1], noise, rng)
        rgb = self.torgb(x, ws[:, self.styles])
        return x, rgb if image is None else upsample(image) + rgb


class Synthesis(nn.Module):
    """ws (B, num_ws, w_dim) → image (B, channels, resolution, resolution)."""

    def __init__(
        self, model: ModelSettings, resolution: int, channels: int, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.resolutions = [2**power for power in range(2, int(math.log2(resolution)) + 1)]
        self.num_ws = 2 * len(self.resolutions)
        self.dtype = torch.float32
        before = 0
        for side in self.resolutions:
            here = channels_at(side, model.channel_base, model.channel_max)
            self.add_module(
                f"b{side}", SynthesisBlock(before, here, side, channels, model.w_dim, rng)
            )
            before = here

    def forward(
        self, ws: Tensor, noise: str = "random", rng: torch.Generator | None = None
    ) -> Tensor:
        x: Tensor | None = None
        image: Tensor | None = None
        start = 0
        for side in self.resolutions:
            block = getattr(self, f"b{side}")
            # The RGB layer shares its w with the first layer of the next block.
            x, image = block(
                x, image, ws[:, start : start + block.styles + 1], noise, rng, self.dtype
            )
            start += block.styles
        assert image is not None
        return image


class Generator(nn.Module):
    """G(z, c): z (B, z_dim), c (B, label_dim) multi-hot → images (B, C, H, W) in about [-1, 1].

    With `model.hospitals`, c may end with the hospital, one-hot; else it is sampled by the
    hospitals' shares of the label (fedgan/models/hospital_condition.py). `psi` < 1 pulls w towards
    w_avg (truncation, arXiv 1812.04948, appendix B). `noise`: 'random' (from `rng`, a generator on
    the images' device), 'const' (fixed images) or 'none'.
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
        rng = rng or torch.Generator().manual_seed(0)
        self.z_dim, self.w_dim, self.label_dim = model.z_dim, model.w_dim, label_dim
        self.resolution, self.channels = resolution, channels
        self.mapping = Mapping(
            model.z_dim,
            label_dim,
            model.w_dim,
            model.mapping_layers,
            rng,
            hospitals=model.hospitals,
        )
        self.synthesis = Synthesis(model, resolution, channels, rng)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the convolutions, float32 or bfloat16; the rest stays float32."""
        return self.synthesis.dtype

    @dtype.setter
    def dtype(self, value: torch.dtype) -> None:
        self.synthesis.dtype = value

    def styles(self, z: Tensor, c: Tensor, psi: float = 1.0) -> Tensor:
        """ws (B, num_ws, w_dim): w for every layer."""
        w = self.mapping(z, c)
        if psi != 1.0:
            w = torch.lerp(self.mapping.w_avg, w, psi)
        return w.unsqueeze(1).expand(-1, self.synthesis.num_ws, -1)

    def forward(
        self,
        z: Tensor,
        c: Tensor,
        psi: float = 1.0,
        noise: str = "random",
        rng: torch.Generator | None = None,
    ) -> Tensor:
        return self.synthesis(self.styles(z, c, psi), noise, rng)
