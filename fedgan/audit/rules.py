"""Rules for figures of an audit that exceed those of held-out images; the format of audit.json.

Shared by the command, the report and the cards; needs numpy and scipy only, because a report is
written without torch. A figure is a pair of value and interval, None where it was not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import betaincinv, gammainc
from scipy.stats import binom

from fedgan.evaluation.metrics.intervals import Interval, newcombe_interval

FORMAT = "fedgan-audit-3"
CHANCE = 0.5  # AUC of a random score
FEW_PATIENTS = 60  # held-out: with fewer than about 20 per side bootstrap intervals are too narrow
POWERFUL = 0.95  # chance to find a leak with which it is said to be found
Measured = tuple[float, Interval]


def above(figure: Measured, other: Measured) -> bool:
    """Whether `figure` exceeds `other` significantly (Newcombe 1998, method 10)."""
    return newcombe_interval(*figure, *other)[0] > 0


def copies_stand_out(
    excess_ci: Interval, near_training: Measured | None, near_held_out: Measured | None
) -> bool:
    """Whether synthetic images are copies: more than held-out ones, and nearer to training images.

    Blurred or typical images are near to all real images and copy none. `near_training` and
    `near_held_out`: shares of synthetic images near to a training image, and to a held-out one,
    among equally many of each.
    """
    favours = near_training is None or near_held_out is None or above(near_training, near_held_out)
    return excess_ci[0] > 0 and favours


def outliers_stand_out(outliers: int, images: int, real_outliers: int, real_images: int) -> bool:
    """Whether `outliers` of `images` synthetic ones are copies (fedgan/audit/attacks/tail.py).

    One is enough where no held-out image is an outlier. Else there must be more than the 99 % upper
    bound of the held-out images' share explains (Clopper and Pearson 1934; Poisson, at 1 %).
    """
    if not outliers or not real_outliers or real_outliers >= real_images:
        return bool(outliers and not real_outliers)
    share = betaincinv(real_outliers + 1, real_images - real_outliers, 0.99)
    return bool(gammainc(outliers, images * share) < 0.01)


def chance_to_find(
    copies: int, found_share: float, images: int, real_outliers: int, real_images: int
) -> float:
    """Probability that `copies` copies among `images` stand out; each is an outlier by itself.

    `found_share`: probability that a copy is an outlier.
    """
    counts = np.arange(copies + 1)
    stand_out = [
        outliers_stand_out(int(count), images, real_outliers, real_images) for count in counts
    ]
    return min(1.0, float(binom.pmf(counts, copies, found_share)[stand_out].sum()))


def attack_stands_out(auc: Measured, null: Measured | None) -> bool:
    """Whether an attack's AUC exceeds chance and that of held-out images as pseudo-members."""
    return auc[1][0] > CHANCE and (null is None or above(auc, null))


def projection_stands_out(gap_ci: Interval, auc_ci: Interval) -> bool:
    """Whether training images are projected more exactly than held-out ones, mean and ranks."""
    return gap_ci[0] > 0 and auc_ci[0] > CHANCE


def exceeded_claim(found: Mapping[str, Any]) -> str:
    """The sign of a hospital's entry of `canaries`, whose bounds exceed the ledger; or empty."""
    stated, kinds = found.get("epsilon"), found.get("kinds")
    if not isinstance(stated, float) or not isinstance(kinds, dict):
        return ""  # infinite, or no such entry
    lows = {kind: one.get("epsilon_low") for kind, one in kinds.items() if isinstance(one, dict)}
    above = [
        f"{low:.2f} by canary {kind}"
        for kind, low in lows.items()
        if isinstance(low, float) and low > stated
    ]
    return f"ε is at least {' and '.join(above)}, the ledger states {stated:.2f}" if above else ""
