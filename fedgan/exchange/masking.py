"""Integers and masks of secure aggregation: changes as integers of a known range, and the masks
that hide them.

SecAgg+ (arXiv 1611.04482, 2012.05432) sums integers modulo 2^32. A round's change is divided, array
by array, by a power of two that server and hospital both derive from the model that was sent,
clipped to ±1, and rounded to `levels` steps. StyleGAN2's mapping networks store weights of standard
deviation 100, other layers of 1; a change is a few thousandths of either, and the steps are about
as fine as float32's own gaps at the largest weight of the array.

The power of two comes from the array's largest number and not from its mean square: a sum may
differ in its last bit from machine to machine, and a scale that differs between the two sides would
double one hospital's change unnoticed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedgan.errors import FederationError

MODULUS = 2**32
MIN_HOSPITALS = 3  # with two, each could compute the other's change from the mean
MIN_RANGE = 4.0  # smallest scale of an array: biases start at 0 and move like weights of std 1
FACTOR, CLIPPED = "factor", "clipped"  # also masked: the weight, and the share of clipped numbers


def levels(hospitals: int) -> int:
    """Steps of a number's range: a power of two; the sum over `hospitals` stays below 2^31."""
    return int(2 ** (31 - math.ceil(math.log2(hospitals))))


def ranges(sent: Mapping[str, np.ndarray], secure_range: float) -> dict[str, float]:
    """Largest change of a number in one round, by array.

    `secure_range` times the next power of two at or above the array's largest number, at least
    times `MIN_RANGE`.
    """
    return {
        key: secure_range * max(MIN_RANGE, _power(float(np.max(np.abs(array), initial=0.0))))
        for key, array in sent.items()
    }


def mask_weight(rule: str, images: int) -> int:
    """Masked weight of a hospital with `images` training images, by `federation.weights`."""
    return images if rule == "size" else 1


def _power(value: float) -> float:
    """The smallest power of two at or above `value`; 0 for 0."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent) if value else 0.0


def scale(
    change: Mapping[str, np.ndarray], spans: Mapping[str, float]
) -> tuple[list[np.ndarray], int]:
    """Scale a change to float64 in [-1, 1] for masking: the arrays by sorted name, and the number
    of clipped values.

    The last array holds the share of clipped values. Raises `FederationError` with the array's name
    for values that are not finite, because the server cannot detect them under a mask.
    """
    scaled, clipped = list[np.ndarray](), 0
    for key in sorted(change):
        if not np.isfinite(change[key]).all():
            raise FederationError(
                f"'{key}' is not finite: the training diverged; lower training.learning_rate"
            )
        values = change[key].astype(np.float64) / spans[key]
        clipped += int(np.count_nonzero(np.abs(values) > 1))
        scaled.append(np.clip(values, -1, 1))
    return [*scaled, np.array([clipped / max(1, sum(array.size for array in scaled))])], clipped


def apply_mean(
    master: Mapping[str, np.ndarray], mean: Sequence[np.ndarray], spans: Mapping[str, float]
) -> tuple[dict[str, np.ndarray], float]:
    """The float32 model from the mean of `scale`'s arrays, and the clipped values per hospital."""
    keys = sorted(master)
    model = {
        key: (master[key].astype(np.float64) + np.asarray(change) * spans[key]).astype(np.float32)
        for key, change in zip(keys, mean[:-1], strict=True)
    }
    return model, float(mean[-1][0]) * sum(array.size for array in master.values())


def mask_numbers(
    seed: bytes, num_range: int, dimensions_list: Sequence[tuple[int, ...]]
) -> list[np.ndarray]:
    """Uniform integers below 2^32 from a secret: ChaCha20's key stream under the secret's SHA-256,
    int64, in these shapes.

    Replaces Flower's generator, a Mersenne Twister whose seed is folded to 32 bits (28 of a shared
    key): a server could try all of them and find the mask.
    """
    if num_range != MODULUS:
        raise ValueError("masks are 32-bit numbers")
    stream = Cipher(
        algorithms.ChaCha20(hashlib.sha256(b"fedgan mask" + seed).digest(), bytes(16)), mode=None
    ).encryptor()
    return [
        np.frombuffer(stream.update(bytes(4 * math.prod(shape))), dtype="<u4")
        .astype(np.int64)
        .reshape(shape)
        for shape in dimensions_list
    ]
