"""Integer parts of a total by the largest remainder method (Hamilton), and a limit on shares."""

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


def limit_shares(sizes: Sequence[int], max_share: float) -> list[int]:
    """Reduce the largest `sizes` until none exceeds its limit; the others stay as they are.

    Of n sizes each is limited to s / (s + (n - 1) (1 - s)) of their sum, s being `max_share` from
    0.5 to 1: to s of two, and to s / (1 - s) times the mean of the others. One size has no limit.
    """
    count = len(sizes)
    if count < 2 or max_share >= 1:
        return list(sizes)
    share = max_share / (max_share + (count - 1) * (1 - max_share))
    rest = sum(sizes)
    for reduced, size in enumerate(sorted(sizes, reverse=True)):
        # limit = share * (reduced * limit + rest)
        limit = math.floor(share * rest / (1 - reduced * share) + 1e-9)
        if size <= limit:
            break
        rest -= size
    return [min(size, max(1, limit)) for size in sizes]
