"""Membership inference: evaluate attack scores on images with known membership.

An attack gives each image a score, higher for a suspected member. Members and non-members are of
one hospital, split by patient, so they differ only by the training. The controls of an audit test
this (fedgan/audit/membership_inference.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgan.audit.attacks.roc import roc_figures
from fedgan.errors import DataError, FedganError
from fedgan.evaluation.metrics.bootstrap import group_numbers, two_sample_resamples
from fedgan.evaluation.metrics.intervals import (
    LEVEL,
    Interval,
    percentile_interval,
    wilson_interval,
)

RATES = (0.01, 0.001)  # false-positive rates of the reported true-positive rates
LEAK_AUC = 0.9  # required of an attack on a planted leak


@dataclass(frozen=True)
class MembershipFindings:
    """Result of one attack, each figure in [0, 1] with its interval.

    `auc` 0.5 is chance. `tpr_at_1`, `tpr_at_01`: share of members found at a false-positive rate of
    1 % and 0.1 %; chance is that rate. They are None, and `note` gives the reason, with too few
    non-members for such a rate. `members`, `non_members`: images compared.
    """

    attack: str
    auc: float
    auc_ci: Interval
    tpr_at_1: float | None
    tpr_at_1_ci: Interval | None
    tpr_at_01: float | None
    tpr_at_01_ci: Interval | None
    members: int
    non_members: int
    note: str = ""


def score_attack(
    attack: str,
    member_scores: np.ndarray,
    non_member_scores: np.ndarray,
    *,
    seed: int,
    bootstrap: int = 1000,
    level: float = LEVEL,
    match: bool = True,
    member_groups: np.ndarray | None = None,
    non_member_groups: np.ndarray | None = None,
) -> MembershipFindings:
    """Evaluate scores (M,) of members and (N,) of non-members; higher means a suspected member.

    With `match` the larger side is reduced to the smaller one by a seeded draw without replacement,
    so figures of several attacks and their controls rest on equal numbers. Without, all images
    count: for few leaked members against many others, because a rate of 1 in 1,000 needs 1,000
    non-members. Intervals: percentile bootstrap of both sides with `bootstrap` resamples, by
    `…_groups` (patients) if given; those of rates are widened to Wilson's, because a bootstrap
    without hits has no width. Raises `DataError` for fewer than two images per side, `FedganError`
    for scores that are NaN.
    """
    sides = [_side(attack, scores) for scores in (member_scores, non_member_scores)]
    groups = [
        group_numbers(given, len(side))
        for given, side in zip((member_groups, non_member_groups), sides, strict=True)
    ]
    if match:
        sides, groups = _matched(sides, groups, seed)
    members, others = sides
    auc, shares = roc_figures(
        members, others, (np.ones((1, len(members))), np.ones((1, len(others)))), RATES
    )
    drawn = [
        roc_figures(members, others, weights, RATES)
        for weights in two_sample_resamples(groups[0], groups[1], bootstrap, seed)
    ]
    rates = np.concatenate([part[1] for part in drawn])
    at_1, at_01 = (
        _rate(float(shares[0, number]), rates[:, number], rate, members, others, level)
        for number, rate in enumerate(RATES)
    )
    return MembershipFindings(
        attack=attack,
        auc=float(auc[0]),
        auc_ci=percentile_interval(np.concatenate([part[0] for part in drawn]), level),
        tpr_at_1=at_1[0],
        tpr_at_1_ci=at_1[1],
        tpr_at_01=at_01[0],
        tpr_at_01_ci=at_01[1],
        members=len(members),
        non_members=len(others),
        note="; ".join(note for note in (at_1[2], at_01[2]) if note),
    )


def _side(attack: str, scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or len(scores) < 2:
        raise DataError(
            f"{attack}: scores of shape {scores.shape}; "
            "an attack needs at least two members and two non-members"
        )
    if np.isnan(scores).any():
        raise FedganError(
            f"{attack}: {int(np.isnan(scores).sum())} scores are not numbers; "
            "check the model or the features"
        )
    return scores


def _matched(
    sides: list[np.ndarray], groups: list[np.ndarray], seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Both sides at the size of the smaller one, by a seeded draw, and renumbered groups."""
    size, rng = min(len(side) for side in sides), np.random.default_rng((seed, 1))
    rows = [
        np.arange(size)
        if len(side) == size
        else np.sort(rng.choice(len(side), size, replace=False))
        for side in sides
    ]
    return (
        [side[kept] for side, kept in zip(sides, rows, strict=True)],
        [group_numbers(numbers[kept], size) for numbers, kept in zip(groups, rows, strict=True)],
    )


def _rate(
    share: float,
    resampled: np.ndarray,
    rate: float,
    members: np.ndarray,
    others: np.ndarray,
    level: float,
) -> tuple[float | None, Interval | None, str]:
    """True-positive rate at a false-positive `rate`, its interval; else the reason for none."""
    needed = round(1 / rate)
    if len(others) < needed:
        return (
            None,
            None,
            f"a false-positive rate of {rate:.1%} needs {needed:,} non-members, "
            f"here are {len(others):,}",
        )
    low, high = percentile_interval(resampled, level)
    wilson = wilson_interval(share, len(members), level)
    return share, (min(low, wilson[0]), max(high, wilson[1])), ""
