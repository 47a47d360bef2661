"""Pixel blitting and geometry: one affine map per image, at twice the resolution (B.1 and B.2).

Coordinates are pixels relative to the image's centre, x to the right and y down. The composite map
of all transforms is kept as its inverse, from output to input coordinates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fedgan.training.augment.wavelets import CENTRE_TAP, SYM6, axis_matrix, resample

Quantities = dict[str, torch.Tensor]


def inverse_map(values: Quantities, batch: int, height: int, width: int) -> torch.Tensor:
    """(B, 2, 3) float64: the map from output to input coordinates, in the paper's order.

    `values`, per transform in the pipe: `xflip rotate90 scale rotate aniso rotate_after` (B,),
    `xint xfrac` (B, 2).
    """
    size = torch.tensor([width, height], dtype=torch.float64)
    linear = torch.eye(2, dtype=torch.float64).repeat(batch, 1, 1)
    offset = torch.zeros(batch, 2, dtype=torch.float64)
    # The inverse of y = A x + t after G is G^-1 (A^-1 (y - t)): later transforms go to the right.
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
    """Resample `images` (B, C, H, W) by `inverse` (B, 2, 3, CPU): sym6 up, bilinear, sym6 down.

    Images with the identity map stay bit-identical. Maps that keep rows and columns (no rotation
    except quarter turns: most maps at small p) are separable and use a much cheaper method.
    """
    a, b, c, d = inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 0], inverse[:, 1, 1]
    still = (inverse == torch.eye(2, 3, dtype=torch.float64)).flatten(1).all(dim=1)
    straight = (b == 0) & (c == 0)
    turned = (a == 0) & (d == 0) & (images.shape[2] == images.shape[3])
    aligned = (straight | turned) & ~still
    for group, read in ((aligned, warp_aligned), (~(aligned | still), warp_any)):
        if group.all():
            return read(images, inverse)
        if group.any():
            rows = group.nonzero()[:, 0]
            index = rows.to(images.device, non_blocking=True)
            images = images.index_copy(0, index, read(images[index], inverse[rows]))
    return images


def warp_any(images: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`warp` for any affine maps.

    The image is mirrored at its borders without end. The mirrored image, and so its upsampling, is
    periodic: one period is computed and coordinates are folded into it. So no margin is needed, and
    the map of one image never changes the result of another.
    """
    _, _, height, width = images.shape
    fine = resample(resample(images, "up", width, 3), "up", height, 2)
    grid = _grid(inverse.to(images.device, non_blocking=True), height, width).to(images.dtype)
    read = F.grid_sample(fine, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return resample(resample(read, "down", width, 3), "down", height, 2)


def warp_aligned(images: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`warp` for maps that keep or exchange the axes: Y = A X Bᵀ, two small matrices per image."""
    _, _, height, width = images.shape
    turned = inverse[:, 0, 0] == 0  # rows are read along columns
    from_y = torch.where(turned[:, None], inverse[:, 0, 1:], inverse[:, 1, 1:])
    from_x = torch.where(turned[:, None], inverse[:, 1, 0::2], inverse[:, 0, 0::2])
    rows = _axis_reading(from_y, height, images)
    columns = _axis_reading(from_x, width, images)
    if turned.any():
        turned = turned.to(images.device, non_blocking=True)
        images = torch.where(turned[:, None, None, None], images.transpose(2, 3), images)
    return rows @ (images @ columns.transpose(2, 3))


def _axis_reading(line: torch.Tensor, n: int, images: torch.Tensor) -> torch.Tensor:
    """(B, 1, n, n): up, linear interpolation and down along one axis.

    The output at t is read at line @ (t, 1).
    """
    up, down = (axis_matrix(kind, n, images.dtype, images.device) for kind in ("up", "down"))
    fine = _folded(line[:, :1] * _places(n, line.device) + line[:, 1:], n)
    before = fine.floor().clamp_(max=4 * (n - 1) - 1)
    share = (fine - before)[:, :, None].to(images, non_blocking=True)
    index = before.long().to(images.device, non_blocking=True)
    return (down @ torch.lerp(up[index], up[index + 1], share))[:, None]


def _grid(inverse: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, 2H + 10, 2W + 10, 2): coordinates of the fine output samples for grid_sample."""
    y, x = _places(height, inverse.device)[:, None], _places(width, inverse.device)
    axes = []
    for axis, n in ((0, width), (1, height)):
        source = inverse[:, axis, 0, None, None] * x + (
            inverse[:, axis, 1, None, None] * y + inverse[:, axis, 2, None, None]
        )
        axes.append(_folded(source, n).mul_(2 / (4 * (n - 1))).sub_(1))
    return torch.stack(axes, dim=3)


def _places(n: int, device: torch.device) -> torch.Tensor:
    """(2n + 10,) float64: the fine output samples of an axis of n pixels, from its centre."""
    samples = torch.arange(2 * n + len(SYM6) - 2, dtype=torch.float64, device=device)
    return (samples - CENTRE_TAP) / 2 - (n - 1) / 2


def _folded(source: torch.Tensor, n: int) -> torch.Tensor:
    """Index in one period of the upsampled axis, for `source` in pixels from the centre."""
    return torch.remainder(2 * source + ((n - 1) + CENTRE_TAP), 4 * (n - 1))


def _quarter_turns(turns: torch.Tensor) -> torch.Tensor:
    """(B, 2, 2): inverse map of `turns` quarter turns, exact."""
    index = torch.remainder(torch.round(turns), 4).long()
    cosine = torch.tensor([1.0, 0.0, -1.0, 0.0], dtype=torch.float64)[index]
    sine = torch.tensor([0.0, 1.0, 0.0, -1.0], dtype=torch.float64)[index]
    return _rotation_matrix(cosine, sine)


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    """(B, 2, 2): inverse map of a rotation by `angle` radians."""
    return _rotation_matrix(torch.cos(angle), torch.sin(angle))


def _rotation_matrix(cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    return torch.stack([cosine, -sine, sine, cosine], dim=1).reshape(-1, 2, 2)


def _apply(linear: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (linear @ vector[:, :, None])[:, :, 0]
