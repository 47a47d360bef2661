"""Image-space filtering, additive noise and cut-out (appendix B.3 and "additional augmentations")."""

from __future__ import annotations

import torch

from fedgan.training.augment.wavelets import axis_matrix

# Expected power of natural images in the four bands: most of it is in the lowest.
BAND_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)
CUTOUT_SIZE = 0.5


def band_gains(amplification: torch.Tensor) -> torch.Tensor:
    """(B, 4): gain of each band where band i is amplified by `amplification[:, i]`, and all of them renormalised after
    each amplification so that the expected power stays."""
    power = torch.tensor(BAND_POWER, dtype=torch.float64)
    gains = torch.ones_like(amplification)
    for band in range(len(BAND_POWER)):
        factor = torch.ones_like(amplification)
        factor[:, band] = amplification[:, band]
        gains = gains * factor / (power * factor.square()).sum(dim=1, keepdim=True).sqrt()
    return gains


def filtered(images: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """`images` (B, C, H, W) with each frequency band scaled by `gains` (B, 4), along both axes, mirrored borders."""
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
    """`images` plus `noise` (B, C, H, W, unit normal) times `sigma` (B,)."""
    return images + (sigma[:, None, None, None] * noise).to(images, non_blocking=True)


def cut_out(images: torch.Tensor, active: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """`images` with a rectangle of half the width and height about `centre` (B, 2 as x, y in [0, 1]) set to 0 where
    `active` (B,) is 1. The rectangle ends at the image's border."""
    keep = []
    for axis, n in ((0, images.shape[3]), (1, images.shape[2])):
        first = torch.round((centre[:, axis] - CUTOUT_SIZE / 2) * n)[:, None]
        after = torch.round((centre[:, axis] + CUTOUT_SIZE / 2) * n)[:, None]
        place = torch.arange(n, dtype=torch.float64)
        keep.append((place < first) | (place >= after))
    mask = keep[0][:, None, :] | keep[1][:, :, None] | (active < 0.5)[:, None, None]
    return images * mask[:, None].to(images, non_blocking=True)
