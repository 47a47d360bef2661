"""Client-level DP (arXiv 1710.06963): the clip of an update, and the noise with few hospitals."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fedgan.privacy.clipping import MARGIN


def clipped_change(
    after: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray], clip: float
) -> dict[str, np.ndarray]:
    """The change from `before` to `after`, float64, of a Euclidean norm of at most `clip`.

    All arrays together have one norm.
    """
    change = {key: after[key].astype(np.float64) - array for key, array in before.items()}
    norm = math.sqrt(sum(float(np.square(part).sum()) for part in change.values()))
    limit = clip * (1 - MARGIN)
    return {key: part * (limit / max(norm, limit)) for key, part in change.items()}


def noise_statement(hospitals: int, noise_multiplier: float, numbers: int | None = None) -> str:
    """Sentences on the noise in the mean of `hospitals` updates, and on delta = 1 / `hospitals`.

    `numbers`: d, how many numbers travel; None where unknown. The noise on d numbers is about z √d
    times as long as the largest contribution of one update to the mean; z: the noise multiplier.
    """
    times = "times as long as the largest share of one hospital in the mean"
    if numbers is None:
        length = (
            f"over d numbers the noise is {noise_multiplier:g} √d {times}, "
            f"over a million {1000 * noise_multiplier:,.0f} times"
        )
    else:
        ratio = noise_multiplier * math.sqrt(numbers)
        length = f"over {numbers:,} numbers the noise is {ratio:,.0f} {times}"
    return (
        f"Hiding one of {hospitals} hospitals means hiding 1/{hospitals} of each round: {length}. "
        f"delta = 1/{hospitals} would allow the full disclosure of one hospital."
    )
