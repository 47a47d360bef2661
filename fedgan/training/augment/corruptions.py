"""Image-space filters, additive noise and cut-out (appendix B.3)."""

from __future__ import annotations

import torch

from fedgan.training.augment.wavelets import axis_matrix

# Expected power of natural images in the four bands.
BAND_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)
CUTOUT_SIZE = 0.5


def band_gains(amplification: torch.Tensor) -> torch.Tensor:
    """(B, 4): gain per band, where band i is amplified by `amplification[:, i]`.

    Each amplification is followed by a normalisation that keeps the expected power.
    """
    power = torch.tensor(BAND_POWER, dtype=torch.float64)
    gains = torch.ones_like(amplification)
    for band in range(len(BAND_POWER)):
        factor = torch.ones_like(amplification)
        factor[:, band] = amplification[:, band]
        gains = gains * factor / (power * factor.square()).sum(dim=1, keepdim=True).sqrt()
    return gains


def filtered(images: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """Scale each frequency band of `images` (B, C, H, W) by `gains` (B, 4); mirrored borders."""
    height, width = images.shape[2:]
    gains = gains.to(images, non_blocking=True)
    rows, columns = (
        torch.einsum("bk,kij->bij", gains, axis_matrix("bands", n, images.dtype, images.device))[
            :, None
        ]
        for n in (height, width)
    )
    return rows @ (images @ columns.transpose(2, 3))


def noisy(images: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """`images` + `sigma` (B,) · `noise` (B, C, H, W; unit normal)."""
    return images + (sigma[:, None, None, None] * noise).to(images, non_blocking=True)


def cut_out(images: torch.Tensor, active: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Set a rectangle of half the width and height to 0 where `active` (B,) is 1.

    `centre` (B, 2): x, y in [0, 1]. The image's border cuts the rectangle.
    """
    keep = []
    for axis, n in ((0, images.shape[3]), (1, images.shape[2])):
        first = torch.round((centre[:, axis] - CUTOUT_SIZE / 2) * n)[:, None]
        after = torch.round((centre[:, axis] + CUTOUT_SIZE / 2) * n)[:, None]
        pixel = torch.arange(n, dtype=torch.float64)
        keep.append((pixel < first) | (pixel >= after))
    mask = keep[0][:, None, :] | keep[1][:, :, None] | (active < 0.5)[:, None, None]
    return images * mask[:, None].to(images, non_blocking=True)
