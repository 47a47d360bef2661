"""Orthogonal wavelet filters as dense matrices over one image axis, with mirrored borders.

Image axes are short here (16 to 1024, mostly 32 or 64 pixels): a matrix product that contains the
border rule is faster than padding and a strided convolution, and has no edge cases. Long axes skip
the zeros far from the band.

Conventions: pixel k of an axis of n pixels is at k; the axis is mirrored about its first and last
pixel without end, so that it repeats after 2 (n - 1) pixels. Filter taps h are orthonormal:
Σ h = √2, Σ h² = 1.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

# Least asymmetric Daubechies wavelets with 6 and 2 vanishing moments, low-pass, orthonormal.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
CENTRE_TAP = 5  # the tap nearest to the centre of mass of sym6 (5.1): the pixel itself
SYM2 = (-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025)


def mirrored(index: np.ndarray, n: int) -> np.ndarray:
    """Pixel in [0, n) at any integer `index` of the mirrored axis."""
    period = max(2 * (n - 1), 1)
    folded = np.mod(index, period)
    return np.minimum(folded, period - folded) if n > 1 else np.zeros_like(folded)


def upsampling_matrix(n: int) -> np.ndarray:
    """(4 (n - 1) + 1, n): one period, and one sample to close it, of the axis upsampled by sym6.

    Row u is at pixel (u - CENTRE_TAP) / 2. A constant stays itself.
    """
    rows = 4 * (n - 1) + 1
    matrix = np.zeros((rows, n))
    for tap, weight in enumerate(SYM6):
        reached = np.arange(tap % 2, rows, 2)  # rows in which this tap meets a pixel
        np.add.at(matrix, (reached, mirrored((reached - tap) // 2, n)), np.sqrt(2) * weight)
    return matrix


def downsampling_matrix(n: int) -> np.ndarray:
    """(n, 2n + 10): downsampling by sym6; column u is at pixel (u - CENTRE_TAP) / 2.

    It inverts the upsampling.
    """
    matrix = np.zeros((n, 2 * n + len(SYM6) - 2))
    for row in range(n):
        matrix[row, 2 * row : 2 * row + len(SYM6)] = np.array(SYM6) / np.sqrt(2)
    return matrix


def band_filters() -> list[np.ndarray]:
    """Zero-phase filters (odd lengths, centred) of the bands up to π/8, π/4, π/2 and π.

    Their sum is 1. P0(z) = H(z) H(1/z) / 2 and P1(z) = P0(-z) split the axis into a lower and an
    upper half, P0 + P1 = 1; P0(z²) splits the lower half again, and so on (appendix B.3).
    """
    taps = np.array(SYM2)
    low = np.convolve(taps, taps[::-1]) / 2
    high = low * np.array([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    bands: list[np.ndarray] = []
    below = np.ones(1)
    for level in range(3):
        bands.insert(0, np.convolve(below, _dilated(high, 2**level)))
        below = np.convolve(below, _dilated(low, 2**level))
    return [below, *bands]


def band_matrices(n: int) -> np.ndarray:
    """(4, n, n): each band filter over an axis of n pixels with mirrored borders."""
    matrices = np.zeros((4, n, n))
    for matrix, taps in zip(matrices, band_filters(), strict=True):
        reach = len(taps) // 2
        for row in range(n):
            np.add.at(matrix[row], mirrored(np.arange(row - reach, row + reach + 1), n), taps)
    return matrices


def _dilated(taps: np.ndarray, step: int) -> np.ndarray:
    """`taps` with step - 1 zeros between two neighbours: H(z^step)."""
    wide = np.zeros((len(taps) - 1) * step + 1)
    wide[::step] = taps
    return wide


_BUILDERS = {"up": upsampling_matrix, "down": downsampling_matrix, "bands": band_matrices}


@functools.lru_cache(maxsize=64)
def axis_matrix(kind: str, n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The matrix `up`, `down` or `bands` for an axis of n pixels as a tensor, cached."""
    with torch.inference_mode(False):  # a cached tensor may be saved for a backward pass
        return torch.from_numpy(_BUILDERS[kind](n)).to(device=device, dtype=dtype)


DENSE = 64  # axes up to this size use one matrix product
BLOCK = 64  # rows per block of longer axes


def resample(images: torch.Tensor, kind: str, n: int, axis: int) -> torch.Tensor:
    """Apply matrix `up` or `down` for n pixels along `axis` (2 or 3) of `images` (B, C, H, W)."""
    matrix = axis_matrix(kind, n, images.dtype, images.device)
    if n <= DENSE:
        return matrix @ images if axis == 2 else images @ matrix.T
    parts = []
    for rows, columns in _blocks(kind, n):
        part = images.narrow(axis, columns.start, columns.stop - columns.start)
        block = matrix[rows, columns]
        parts.append(block @ part if axis == 2 else part @ block.T)
    return torch.cat(parts, dim=axis)


@functools.lru_cache(maxsize=64)
def _blocks(kind: str, n: int) -> tuple[tuple[slice, slice], ...]:
    """Blocks of rows of a matrix, with the columns in which they are not all zero."""
    matrix = _BUILDERS[kind](n)
    blocks = []
    for start in range(0, len(matrix), BLOCK):
        rows = slice(start, min(start + BLOCK, len(matrix)))
        used = np.flatnonzero(np.any(matrix[rows] != 0, axis=0))
        blocks.append((rows, slice(int(used[0]), int(used[-1]) + 1)))
    return tuple(blocks)
