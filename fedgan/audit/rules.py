"""When a figure of an audit stands out from the same figure for held-out images: one rule for command, page and cards.

numpy and scipy only: a page is written without torch.

A figure is a pair of its value and its interval. What was not measured is None, and then it excuses nothing.
"""

from __future__ import annotations

from fedgan.evaluation.metrics.intervals import Interval, newcombe_interval

CHANCE = 0.5  # of an area under the curve
FEW_PATIENTS = 60  # held-out ones: with fewer than about twenty on a side the bootstrap's intervals are too narrow
Measured = tuple[float, Interval]


def above(figure: Measured, other: Measured) -> bool:
    """Whether `figure` lies above `other` by more than both intervals allow (Newcombe 1998, method 10)."""
    return newcombe_interval(*figure, *other)[0] > 0


def copies_stand_out(
    excess_ci: Interval, near_training: Measured | None, near_held_out: Measured | None
) -> bool:
    """Whether more synthetic than held-out images are as near as copies, and nearer to training than to other images.

    Images that are blurred or typical are near to every real image and copy none: `near_training` and `near_held_out` are the
    shares of synthetic images that are near to a training image, and to a held-out one, among as many of each.
    """
    favours = near_training is None or near_held_out is None or above(near_training, near_held_out)
    return excess_ci[0] > 0 and favours


def attack_stands_out(auc: Measured, null: Measured | None) -> bool:
    """Whether an attack's area is above chance and above that of held-out images in the place of members."""
    return auc[1][0] > CHANCE and (null is None or above(auc, null))


def projection_stands_out(gap_ci: Interval, auc_ci: Interval) -> bool:
    """Whether training images are drawn more exactly than held-out ones, by the mean and by the ranks."""
    return gap_ci[0] > 0 and auc_ci[0] > CHANCE
