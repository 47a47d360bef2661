"""The augmentation pipe: sample transforms per image and apply them (arXiv 2006.06676, B)."""

from __future__ import annotations

import math

import torch
from torch import nn

from fedgan.errors import ConfigError
from fedgan.training.augment.color import check_channels, color_map, recolor
from fedgan.training.augment.corruptions import band_gains, cut_out, filtered, noisy
from fedgan.training.augment.geometry import inverse_map, warp

Quantities = dict[str, torch.Tensor]

BLIT = ("xflip", "rotate90", "xint")
GEOM = ("scale", "rotate", "aniso", "rotate_after", "xfrac")
COLOR = ("brightness", "contrast", "lumaflip", "hue", "saturation")
FILTER, NOISE, CUTOUT = ("filter",), ("noise",), ("cutout",)
PIPES: dict[str, tuple[str, ...]] = {
    "blit": BLIT,
    "geom": GEOM,
    "color": COLOR,
    "filter": FILTER,
    "noise": NOISE,
    "cutout": CUTOUT,
    "b": BLIT,
    "bg": BLIT + GEOM,
    "bgc": BLIT + GEOM + COLOR,
    "bgcf": BLIT + GEOM + COLOR + FILTER,
    "bgcfn": BLIT + GEOM + COLOR + FILTER + NOISE,
    "bgcfnc": BLIT + GEOM + COLOR + FILTER + NOISE + CUTOUT,
}

# Numbers per image of a transform (default 1; cut-out: active, x, y), and its neutral value.
WIDTH = {"xint": 2, "xfrac": 2, "filter": 4, "cutout": 3}
NEUTRAL = {"scale": 1.0, "aniso": 1.0, "contrast": 1.0, "saturation": 1.0, "filter": 1.0}

# Strengths of the paper: shares of the image size, log2 of factors, standard deviations.
INTEGER_SHIFT = 0.125
FRACTIONAL_SHIFT = 0.125
SCALE_LOG2 = 0.2
BRIGHTNESS = 0.2
CONTRAST_LOG2 = 0.5
SATURATION_LOG2 = 1.0
BAND_LOG2 = 1.0
NOISE_SIGMA = 0.1


class AugmentPipe(nn.Module):
    """A pipe of the paper: `blit geom color filter noise cutout`, or `b bg bgc bgcf bgcfn bgcfnc`.

    It has no parameters and no buffers. Raises `ConfigError` for an unknown name.
    """

    def __init__(self, pipe: str) -> None:
        super().__init__()
        if pipe not in PIPES:
            raise ConfigError(f"augment.pipe = '{pipe}' must be one of {', '.join(PIPES)}")
        self.pipe = pipe
        self.transforms = PIPES[pipe]

    def forward(
        self,
        images: torch.Tensor,
        p: float,
        generator: torch.Generator | None = None,
        values: dict[str, float | torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Augment `images` (B, C, H, W; about [-1, 1]) differentiably; same shape, dtype, device.

        Computed in float32 (float64 for float64 images), also under autocast. `p` in [0, 1]: the
        probability of each transform. `generator`: a CPU generator (None: torch's own).

        At p = 0 the same tensor is returned and nothing is drawn. At p > 0 the number of draws
        depends on the pipe and the shape alone, never on p.

        `values` fixes quantities instead of sampling them (a noise image is still drawn; p has no
        effect; others are neutral). A quantity is one number for all images or a tensor (B,); those
        of several numbers are (B, n), or (n,) for all images: `xflip lumaflip` 0 or 1, `rotate90`
        quarter turns counter-clockwise, `xint xfrac` shift as a share of the size (x, y; positive:
        right, down), `scale aniso contrast saturation` factors, `rotate rotate_after` radians
        counter-clockwise, `hue` radians, `brightness` added, `filter` amplification of the 4 bands,
        `noise` standard deviation, `cutout` (active, x, y) with the centre in [0, 1].

        Raises `ConfigError` for p outside [0, 1], an unknown quantity, or channels that the colour
        transforms do not take.
        """
        if images.ndim != 4 or min(images.shape[2:]) < 2:
            raise ConfigError(
                "augmentation takes images of shape (B, C, H, W) with sides of 2 or more, "
                f"not {tuple(images.shape)}"
            )
        if not 0.0 <= p <= 1.0:
            raise ConfigError(f"augmentation probability p = {p} must be from 0 to 1")
        if any(name in COLOR for name in self.transforms):
            check_channels(images.shape[1])  # at once, not when p leaves 0 during a run
        if values is None and p == 0.0:
            return images
        quantities = (
            self.draw(images.shape[0], p, generator)
            if values is None
            else self._fixed(values, images.shape[0])
        )
        with torch.autocast(images.device.type, enabled=False):
            work = images if images.dtype == torch.float64 else images.float()
            return self.apply_quantities(work, quantities, generator).to(images.dtype)

    def draw(self, batch: int, p: float, generator: torch.Generator | None = None) -> Quantities:
        """Quantities of `batch` images: each transform is active with probability p, else neutral.

        Rotations before and after the anisotropic scaling are active with 1 - √(1 - p) each, so
        that one of them is with probability p. Values float64 on the CPU, (B,) or (B, width).
        """
        widths = [WIDTH.get(name, 1) for name in self.transforms]
        total = sum(widths)
        uniform = torch.rand(2, total, batch, dtype=torch.float64, generator=generator)
        normal = torch.randn(total, batch, dtype=torch.float64, generator=generator)
        p_rotate = 1 - math.sqrt(1 - p)
        quantities: Quantities = {}
        start = 0
        for name, width in zip(self.transforms, widths, strict=True):
            part = slice(start, start + width)
            start += width
            gate = uniform[0, part] < (p_rotate if name in ("rotate", "rotate_after") else p)
            if name != "filter":
                gate = gate[:1]  # one decision per image; the filter has one per band
            value = _sample(name, uniform[1, part], normal[part])
            value = torch.where(gate, value, NEUTRAL.get(name, 0.0))
            quantities[name] = value.T.contiguous() if name in WIDTH else value[0]
        return quantities

    def apply_quantities(
        self, images: torch.Tensor, values: Quantities, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Apply `values` (from `draw`) to `images` (B, C, H, W), float32 or float64.

        The noise image of the `noise` transform comes from `generator`.
        """
        batch, channels, height, width = images.shape
        if any(name in values for name in BLIT + GEOM):
            images = warp(images, inverse_map(values, batch, height, width))
        if any(name in values for name in COLOR):
            images = recolor(images, color_map(values, batch))
        if "filter" in values:
            images = filtered(images, band_gains(values["filter"]))
        if "noise" in values:
            noise = torch.randn(batch, channels, height, width, generator=generator)
            images = noisy(images, values["noise"], noise)
        if "cutout" in values:
            images = cut_out(images, values["cutout"][:, 0], values["cutout"][:, 1:])
        return images

    def _fixed(self, values: dict[str, float | torch.Tensor], batch: int) -> Quantities:
        """`values` in the form of `draw`."""
        fixed: Quantities = {}
        for name, value in values.items():
            if name not in self.transforms:
                raise ConfigError(
                    f"the pipe '{self.pipe}' has no quantity '{name}'; "
                    f"it has {', '.join(self.transforms)}"
                )
            tensor = torch.as_tensor(value, dtype=torch.float64).cpu()
            if name in WIDTH and tensor.ndim == 1 and len(tensor) != WIDTH[name]:
                tensor = tensor[:, None]  # one number per image, the same for both axes
            shape = (batch, WIDTH[name]) if name in WIDTH else (batch,)
            fixed[name] = tensor.expand(shape)
        return fixed


def _sample(name: str, uniform: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
    """Strength of an active transform, from uniform [0, 1) and standard normal numbers."""
    match name:
        case "xflip" | "lumaflip":
            return torch.floor(uniform * 2)
        case "rotate90":
            return torch.floor(uniform * 4)
        case "xint":
            return (uniform * 2 - 1) * INTEGER_SHIFT
        case "scale" | "aniso":
            return torch.exp2(normal * SCALE_LOG2)
        case "rotate" | "rotate_after" | "hue":
            return (uniform * 2 - 1) * math.pi
        case "xfrac":
            return normal * FRACTIONAL_SHIFT
        case "brightness":
            return normal * BRIGHTNESS
        case "contrast":
            return torch.exp2(normal * CONTRAST_LOG2)
        case "saturation":
            return torch.exp2(normal * SATURATION_LOG2)
        case "filter":
            return torch.exp2(normal * BAND_LOG2)
        case "noise":
            return normal.abs() * NOISE_SIGMA
        case "cutout":
            return torch.cat([torch.ones_like(uniform[:1]), uniform[1:]])
    raise AssertionError(name)
