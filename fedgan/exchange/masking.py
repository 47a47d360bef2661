"""The numbers of secure aggregation: what hospitals changed as whole numbers of a known range, and the masks over them.

SecAgg+ (arXiv 1611.04482, 2012.05432) sums whole numbers modulo 2^32. So what a round changed is divided, array by array, by
a power of two that server and hospital both read off the model that was sent, cut off at ±1, and rounded to `levels` steps.
StyleGAN2's mapping networks store weights of standard deviation 100, others of 1; a change is a few thousandths of either, and
the steps are about as fine as float32's own gaps at the largest weight of the array.

The power of two comes from the array's largest number and not from its mean square: a sum may differ in its last bit from
one machine to another, and a scale that two sides do not share would double one hospital's change without anybody seeing it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedgan.errors import FederationError

MODULUS = 2**32
FEWEST = 3  # hospitals: of two, each would learn the other's change from the mean
FLOOR = 4.0  # no array is taken for smaller: biases begin at 0 and move like weights of standard deviation 1
FACTOR, CLIPPED = (
    "factor",
    "clipped",
)  # numbers of their own under the mask: the weight, and how many were cut off


def levels(hospitals: int) -> int:
    """Steps of a number's range: a power of two, so many that the sum over `hospitals` stays below 2^31."""
    return int(2 ** (31 - math.ceil(math.log2(hospitals))))


def ranges(sent: Mapping[str, np.ndarray], reach: float) -> dict[str, float]:
    """By array how far a number of it may move in one round.

    `reach` (`federation.secure_range`) times the power of two that is not below the largest number in it, and `FLOOR` at least.
    """
    return {
        key: reach * max(FLOOR, _power(float(np.max(np.abs(array), initial=0.0))))
        for key, array in sent.items()
    }


def mask_weight(rule: str, images: int) -> int:
    """What a hospital of so many training images weighs under the mask by `federation.weights`."""
    return images if rule == "size" else 1


def _power(value: float) -> float:
    mantissa, exponent = math.frexp(value)
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent) if value else 0.0


def scale(
    change: Mapping[str, np.ndarray], spans: Mapping[str, float]
) -> tuple[list[np.ndarray], int]:
    """What a hospital puts under its mask: the arrays by sorted name, float64 in [-1, 1], and how many were cut off.

    The last array holds that count, over the count of all numbers. Raises `FederationError`, which names the array, for numbers
    that are not finite: under a mask nobody else could see them.
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
    """The model after a round, float32, from the mean of what `scale` gave; and how many numbers a hospital has cut off."""
    keys = sorted(master)
    model = {
        key: (master[key].astype(np.float64) + np.asarray(change) * spans[key]).astype(np.float32)
        for key, change in zip(keys, mean[:-1], strict=True)
    }
    return model, float(mean[-1][0]) * sum(array.size for array in master.values())


def mask_numbers(
    seed: bytes, num_range: int, dimensions_list: Sequence[tuple[int, ...]]
) -> list[np.ndarray]:
    """Uniform numbers below 2^32 from a secret: ChaCha20's key stream under the secret's SHA-256, int64, in these shapes.

    It takes the place of Flower's generator, a Mersenne Twister from a seed that is folded to 32 bits (28 of a shared key's):
    a server can try all of those, and find the mask.
    """
    if num_range != MODULUS:
        raise ValueError("masks are numbers of 32 bits")
    stream = Cipher(
        algorithms.ChaCha20(hashlib.sha256(b"fedgan mask" + seed).digest(), bytes(16)), mode=None
    ).encryptor()
    return [
        np.frombuffer(stream.update(bytes(4 * math.prod(shape))), dtype="<u4")
        .astype(np.int64)
        .reshape(shape)
        for shape in dimensions_list
    ]
