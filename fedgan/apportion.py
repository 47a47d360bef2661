"""Integer parts of a total by the largest remainder method (Hamilton)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction


def apportion(
    exact: Sequence[float | Fraction],
    total: int,
    minimum: int = 0,
    tolerance: float = 0,
    reduce_largest: bool = False,
) -> list[int]:
    """Round `exact` shares, which add up to `total`, to integers that add up to `total`.

    Every share is rounded down, and the largest remainders get one more; of equal ones, the first.
    No count is below `minimum`: where that, or a negative share, makes the sum too large, the count
    that exceeds its share most is reduced (`reduce_largest`: the largest count), until all are at
    the minimum. `tolerance` is added before rounding down, for shares just below an integer.
    """
    counts = [max(minimum, math.floor(share + tolerance)) for share in exact]
    missing = total - sum(counts)
    by_remainder = sorted(range(len(counts)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: max(missing, 0)]:
        counts[index] += 1

    def priority(index: int) -> tuple[float | Fraction, int]:
        return -counts[index] if reduce_largest else exact[index] - counts[index], index

    reducible = [priority(index) for index, count in enumerate(counts) if count > minimum]
    heapq.heapify(reducible)
    while missing < 0 and reducible:
        _, index = heapq.heappop(reducible)
        counts[index] -= 1
        missing += 1
        if counts[index] > minimum:
            heapq.heappush(reducible, priority(index))
    return counts
