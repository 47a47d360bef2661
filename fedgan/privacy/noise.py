"""Random numbers of a private release: ChaCha20's key stream, normal numbers, and their rounding.

The noise must be unpredictable, and the low bits of a noisy sum must not depend on its terms. The
last bits of float32 noise plus a float32 gradient show whether the gradient was zero (Mironov 2012;
arXiv 2207.10635). So sum and noise are float64, and the result is a multiple of a power of two that
depends on the noise's deviation alone. Rounding after the noise is post-processing.

Not covered: float64 is no real number. A cell of the grid holds more than 2^30 values of a normal
number, and a sum of clipped gradients is exact to less than 2^-20 of the clip
(fedgan/privacy/clipping.py).
"""

from __future__ import annotations

import math
import struct
from enum import IntEnum

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

GRID_BITS = 20
BLOCK = 2**17  # normal numbers that are made at once


class Purpose(IntEnum):
    """What a key stream is for: a part of its nonce."""

    SAMPLE = 1
    NOISE = 2
    SEEDS = 3
    LABELS = 4
    HOSPITALS = 5


class KeyStream:
    """ChaCha20's key stream (RFC 8439) as random numbers, for one step and purpose of a key.

    `key`: 32 secret bytes. `number` (64 bits) and `purpose` (32 bits) are the nonce: the same three
    give the same numbers, so no caller may use them twice.
    """

    def __init__(self, key: bytes, number: int, purpose: int) -> None:
        nonce = struct.pack("<IIQ", 0, purpose, number)  # the block counter comes first
        self._cipher = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()

    def words(self, count: int) -> Tensor:
        """64 random bits each, int64 (count,)."""
        found = np.frombuffer(bytearray(self._cipher.update(bytes(8 * count))), dtype="<i8")
        return torch.from_numpy(found)

    def uniform(self, count: int) -> Tensor:
        """Multiples of 2^-53 in [0, 1), float64 (count,)."""
        return ((self.words(count) >> 11) & (2**53 - 1)).double() * 2.0**-53

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers, float64, by the transform of Box and Muller.

        The radius comes from 106 bits: 53 would leave gaps wider than the grid beyond 6.5 standard
        deviations, and end at 8.6. The largest number is 12.2, exceeded once in 10^33.
        """
        count = math.prod(shape)
        found = torch.empty(count, dtype=torch.float64)
        for part in found.split(BLOCK):
            half = -(-len(part) // 2)
            coarse, fine, turn = self.uniform(3 * half).view(3, half)
            radius = (coarse + (fine + 2.0**-54) * 2.0**-53).log_().mul_(-2).sqrt_()
            angle = turn * (2 * math.pi)
            part[:half] = angle.cos() * radius
            part[half:] = (angle.sin() * radius)[: len(part) - half]
        return found.view(shape)


def grid(deviation: float) -> float:
    """The spacing of releases with noise of this standard deviation: a power of two.

    2^floor(log2(deviation · 2^-20)): a release of up to 8 deviations is exact in float32.
    """
    return math.ldexp(1.0, math.frexp(deviation)[1] - 1 - GRID_BITS)


def release(total: Tensor, draws: Tensor, deviation: float) -> Tensor:
    """The float64 `total` plus `deviation` · `draws`, rounded to the grid.

    Without noise (`deviation` = 0) there is nothing to hide: `total`.
    """
    if not deviation:
        return total
    spacing = grid(deviation)
    return torch.round((total + draws * deviation) / spacing) * spacing
