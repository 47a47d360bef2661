"""The budget: how many real images each hospital's discriminator is shown in each round."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def round_totals(kimg: float, rounds: int) -> list[int]:
    """Images of each round, summed over hospitals: `rounds` numbers that add up to 1000 * `kimg` exactly.

    Two rounds differ by one image at most.
    """
    budget = round(kimg * 1000)
    ends = [budget * number // rounds for number in range(rounds + 1)]
    return [after - before for before, after in itertools.pairwise(ends)]


def deal_images(sizes: Sequence[int], totals: Sequence[int], equal: bool = False) -> list[list[int]]:
    """Images of each round (row) for each hospital (column); row r sums to `totals[r]`.

    Shares follow `sizes` (training images of a hospital) or are the same for each (`equal`). Rounding
    is carried over: after any round a hospital is less than two images from its exact share, and no
    entry is negative, so a hospital's chunks add up without drift.
    """
    weights = [1] * len(sizes) if equal else list(sizes)
    everything = sum(weights)
    dealt = [0] * len(sizes)
    rows = []
    until_now = 0
    for total in totals:
        until_now += total
        owed = [until_now * weight / everything - done for weight, done in zip(weights, dealt, strict=True)]
        row = [max(0, math.floor(share)) for share in owed]
        for _ in range(total - sum(row)):  # the remainder goes to whom most is owed, the first of equals
            row[max(range(len(row)), key=lambda index: owed[index] - row[index])] += 1
        for _ in range(sum(row) - total):  # one image too many was handed out: take it where most was granted
            row[max(range(len(row)), key=lambda index: row[index])] -= 1
        dealt = [done + images for done, images in zip(dealt, row, strict=True)]
        rows.append(row)
    return rows
