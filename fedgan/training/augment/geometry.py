"""Pixel blitting and geometry: one affine map an image, executed at twice the resolution (appendix B.1 and B.2).

Coordinates are pixels relative to the image's centre, x to the right and y down. The composite map of all transforms is
kept as its inverse, from an output place to the place where it is read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fedgan.training.augment.wavelets import CENTRE_TAP, SYM6, axis_matrix

Quantities = dict[str, torch.Tensor]


def inverse_map(values: Quantities, batch: int, height: int, width: int) -> torch.Tensor:
    """(B, 2, 3) float64: the affine map from output to input places of all transforms in the paper's order.

    `values` holds for each transform that takes part its quantity for each image: `xflip rotate90 scale rotate aniso
    rotate_after` (B,), `xint xfrac` (B, 2).
    """
    size = torch.tensor([width, height], dtype=torch.float64)
    linear = torch.eye(2, dtype=torch.float64).repeat(batch, 1, 1)
    offset = torch.zeros(batch, 2, dtype=torch.float64)
    # y = A x + t after G has the inverse G^-1 (A^-1 (y - t)): each later transform goes to the right.
    if "xflip" in values:
        linear[:, 0, 0] -= 2 * values["xflip"]
    if "rotate90" in values:
        linear = linear @ _quarter_turns(values["rotate90"])
    if "xint" in values:
        offset = offset - _apply(linear, torch.round(values["xint"] * size))
    if "scale" in values:
        linear = linear / values["scale"][:, None, None]
    if "rotate" in values:
        linear = linear @ _rotation(values["rotate"])
    if "aniso" in values:
        linear = linear * torch.stack([1 / values["aniso"], values["aniso"]], dim=1)[:, None, :]
    if "rotate_after" in values:
        linear = linear @ _rotation(values["rotate_after"])
    if "xfrac" in values:
        offset = offset - _apply(linear, values["xfrac"] * size)
    return torch.cat([linear, offset[:, :, None]], dim=2)


def warp(images: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`images` (B, C, H, W) read through `inverse` (B, 2, 3): up by sym6, bilinear sampling, down by sym6.

    Beyond the border the image is mirrored without end. The mirrored image, and so its upsampling, repeats itself: one
    period is computed and places are folded into it, so no margin has to be guessed and one image's map never changes
    another image's result.
    """
    _, _, height, width = images.shape
    kind = (images.dtype, images.device)
    up_y, up_x = axis_matrix("up", height, *kind), axis_matrix("up", width, *kind)
    down_y, down_x = axis_matrix("down", height, *kind), axis_matrix("down", width, *kind)
    fine = up_y @ (images @ up_x.T)
    grid = _reading_places(inverse, height, width).to(images, non_blocking=True)
    read = F.grid_sample(fine, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return down_y @ (read @ down_x.T)


def _reading_places(inverse: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, 2 H + 10, 2 W + 10, 2): where each fine output sample is read, in grid_sample's [-1, 1] over one period."""
    rows, columns = (torch.arange(2 * n + len(SYM6) - 2, dtype=torch.float64) for n in (height, width))
    y, x = ((places - CENTRE_TAP) / 2 - (n - 1) / 2 for places, n in ((rows, height), (columns, width)))
    axes = []
    for axis, n in ((0, width), (1, height)):
        source = (
            inverse[:, axis, 0, None, None] * x + inverse[:, axis, 1, None, None] * y[:, None] + inverse[:, axis, 2, None, None]
        )
        period = 4 * (n - 1)
        fine = torch.remainder(2 * source + ((n - 1) + CENTRE_TAP), period)
        axes.append(fine.mul_(2 / period).sub_(1))
    return torch.stack(axes, dim=3)


def _quarter_turns(turns: torch.Tensor) -> torch.Tensor:
    """(B, 2, 2): inverse map of `turns` quarter turns, exact."""
    index = torch.remainder(torch.round(turns), 4).long()
    cosine = torch.tensor([1.0, 0.0, -1.0, 0.0], dtype=torch.float64)[index]
    sine = torch.tensor([0.0, 1.0, 0.0, -1.0], dtype=torch.float64)[index]
    return _turn(cosine, sine)


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    """(B, 2, 2): inverse map of a rotation by `angle` radians."""
    return _turn(torch.cos(angle), torch.sin(angle))


def _turn(cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    return torch.stack([cosine, -sine, sine, cosine], dim=1).reshape(-1, 2, 2)


def _apply(linear: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (linear @ vector[:, :, None])[:, :, 0]
