"""What noise that hides whole hospitals is worth where few take part; the noise itself is the server's (arXiv 1710.06963)."""

from __future__ import annotations

import math


def noise_statement(hospitals: int, noise_multiplier: float, numbers: int | None = None) -> str:
    """Sentences: how loud the noise on the mean of `hospitals` updates is, and why delta = 1 / `hospitals` promises nothing.

    `numbers`: how many numbers travel, d; None where that is not known. The noise on d of them is about z √d times as long as
    the most that one hospital's update moves the mean, z the noise multiplier.
    """
    longer = "times as long as the largest share of one hospital in the mean"
    if numbers is None:
        length = f"over d numbers the noise is {noise_multiplier:g} √d {longer}, over a million {1000 * noise_multiplier:,.0f} times"
    else:
        length = f"over {numbers:,} numbers the noise is {noise_multiplier * math.sqrt(numbers):,.0f} {longer}"
    return (
        f"To hide one of {hospitals} hospitals is to drown 1/{hospitals} of each round: {length}. "
        f"delta = 1/{hospitals} would allow one hospital to be given away whole."
    )
