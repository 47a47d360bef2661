"""Membership inference: can somebody tell from the model, or from what it releases, who was in the training set?

An attack gives every image a score, higher for a suspected member; `score_attack` says what the scores are worth on images
whose membership is known. Members and non-members come from one hospital, split by patient, so that nothing but the
training tells them apart. Whether that is so is itself tested: `null_findings` (held-out images posing as members) and
`blind_scores` (an attack that sees no model) must be at chance, and `judge_controls` asks of every attack that it find
a planted leak and nothing in fresh data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedgan.errors import DataError, FedganError
from fedgan.privacy.attacks.density import density_ratio_scores, density_scores
from fedgan.privacy.attacks.logan import discriminator_scores
from fedgan.privacy.attacks.nearest import nearest
from fedgan.privacy.attacks.roc import (
    LEVEL,
    Interval,
    group_numbers,
    percentile_interval,
    resamples,
    roc_figures,
    wilson_interval,
)
from fedgan.privacy.attacks.shadow import calibrated_scores, deal_shadows, likelihood_ratio_scores

__all__ = [
    "ControlFindings",
    "MembershipFindings",
    "blind_scores",
    "calibrated_scores",
    "deal_shadows",
    "density_ratio_scores",
    "density_scores",
    "discriminator_scores",
    "distance_scores",
    "judge_controls",
    "likelihood_ratio_scores",
    "null_findings",
    "score_attack",
]

RATES = (0.01, 0.001)  # false-positive rates at which true-positive rates are told
LEAK_AUC = 0.9  # what an attack must reach on a planted leak


@dataclass(frozen=True)
class MembershipFindings:
    """What one attack found, each figure in [0, 1] with its interval.

    `auc` 0.5 is chance. `tpr_at_1`, `tpr_at_01`: share of members found at a false-positive rate of 1 % and of 0.1 %; chance
    is that rate. They are None, and `note` says why, where there are too few non-members to measure such a rate.
    `members`, `non_members`: images that were compared.
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


@dataclass(frozen=True)
class ControlFindings:
    """Whether an attack's figures count: `leaked` members must be found, `fresh` images must not. `reason` when not `passed`."""

    leaked: MembershipFindings
    fresh: MembershipFindings
    passed: bool
    reason: str = ""


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
    """What scores (M,) of members and (M',) of non-members are worth; higher means a suspected member.

    With `match` the larger side is cut to the size of the smaller one by a seeded draw without replacement, so that figures of
    several attacks and of their controls rest on equal numbers. Without, all images count: right where a few leaked
    members stand against many others, for a rate of 1 in 1,000 needs 1,000 non-members.
    Intervals: percentile bootstrap of both sides with `bootstrap` resamples, by `…_groups` (M,) (patients) where given;
    those of rates are widened to Wilson's, because a bootstrap of no hits at all has no width.
    Raises `DataError` for fewer than two images on a side, `FedganError` for scores that are not numbers.
    """
    sides = [_side(attack, scores) for scores in (member_scores, non_member_scores)]
    groups = [group_numbers(given, len(side)) for given, side in zip((member_groups, non_member_groups), sides, strict=True)]
    if match:
        sides, groups = _matched(sides, groups, seed)
    members, others = sides
    auc, shares = roc_figures(members, others, (np.ones((1, len(members))), np.ones((1, len(others)))), RATES)
    drawn = [roc_figures(members, others, weights, RATES) for weights in resamples(groups[0], groups[1], bootstrap, seed)]
    rates = np.concatenate([part[1] for part in drawn])
    at_1, at_01 = (
        _rate(float(shares[0, number]), rates[:, number], rate, members, others, level) for number, rate in enumerate(RATES)
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


def null_findings(
    attack: str,
    non_member_scores: np.ndarray,
    *,
    seed: int,
    bootstrap: int = 1000,
    level: float = LEVEL,
    groups: np.ndarray | None = None,
) -> MembershipFindings:
    """The same attack where nobody is a member: held-out images (N,), half of them drawn to pose as members.

    Halves are drawn by `groups` (N,) (patients) where given. Its interval must hold 0.5. For an attack's figure at the
    very same size, give `score_attack` as many members as there are here.
    """
    scores = _side(attack, non_member_scores)
    numbers = group_numbers(groups, len(scores))
    total = int(numbers.max()) + 1
    if total < 2:
        raise DataError(f"{attack}: all held-out images are of one patient, so they cannot be halved: hold out more patients")
    poses = np.zeros(total, bool)
    poses[np.random.default_rng((seed, 2)).permutation(total)[: total // 2]] = True
    member = poses[numbers]
    found = score_attack(
        attack,
        scores[member],
        scores[~member],
        seed=seed,
        bootstrap=bootstrap,
        level=level,
        member_groups=numbers[member],
        non_member_groups=numbers[~member],
    )
    return replace(found, note="; ".join(part for part in ("held-out images pose as members", found.note) if part))


def judge_controls(
    attack: str,
    leaked_scores: np.ndarray,
    fresh_scores: np.ndarray,
    non_member_scores: np.ndarray,
    *,
    seed: int,
    bootstrap: int = 1000,
    attacks: int = 1,
) -> ControlFindings:
    """Does the attack see a planted leak (AUC ≥ 0.9), and nothing in fresh data (the interval holds 0.5)?

    `leaked_scores` (L,): members that a generator leaks on purpose, `fresh_scores` (F,): images of the same distribution
    that it never saw, `non_member_scores` (N,); all scored against that generator. `attacks`: negative controls that are judged
    together; each then has an interval of level 1 - 0.05 / attacks, or one in twenty would fail where nothing is wrong.
    """
    leaked = score_attack(attack, leaked_scores, non_member_scores, seed=seed, bootstrap=bootstrap, match=False)
    level = 1 - (1 - LEVEL) / max(attacks, 1)
    fresh = score_attack(attack, fresh_scores, non_member_scores, seed=seed, bootstrap=bootstrap, level=level, match=False)
    reasons = []
    if leaked.auc < LEAK_AUC:
        reasons.append(f"{attack} finds planted members with an AUC of {leaked.auc:.3f}, below {LEAK_AUC}")
    if not fresh.auc_ci[0] <= 0.5 <= fresh.auc_ci[1]:
        reasons.append(f"{attack} tells fresh images from held-out ones (AUC {fresh.auc:.3f}): the two sets are not alike")
    return ControlFindings(leaked, fresh, not reasons, "; ".join(reasons))


def distance_scores(features: np.ndarray, synthetic_features: np.ndarray) -> np.ndarray:
    """Minus the distance (N,) to the nearest synthetic image (GAN-Leaks, arXiv 1909.03935, full black-box attack).

    `features` (N, F), `synthetic_features` (S, F). Also scores of a shadow's or a reference generator's images, for
    `calibrated_scores`.
    """
    return -nearest(features, synthetic_features)[0]


def blind_scores(features: np.ndarray, reference_features: np.ndarray) -> np.ndarray:
    """An attack that looks at no model: minus the distance (N,) to the nearest reference image, real and never trained on.

    Above or below chance it says that members and non-members were not drawn alike (another year, another scanner), and that
    no other attack's figure on them is evidence of a leak (arXiv 2406.16201).
    """
    return -nearest(features, reference_features)[0]


def _side(attack: str, scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or len(scores) < 2:
        raise DataError(
            f"{attack}: scores of shape {scores.shape}; an attack is judged on two members and two non-members at least"
        )
    if np.isnan(scores).any():
        raise FedganError(f"{attack}: {int(np.isnan(scores).sum())} scores are not numbers; look at the model or the features")
    return scores


def _matched(sides: list[np.ndarray], groups: list[np.ndarray], seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Both sides at the size of the smaller one, the larger by a draw without replacement; groups numbered again."""
    size, rng = min(len(side) for side in sides), np.random.default_rng((seed, 1))
    rows = [np.arange(size) if len(side) == size else np.sort(rng.choice(len(side), size, replace=False)) for side in sides]
    return (
        [side[kept] for side, kept in zip(sides, rows, strict=True)],
        [group_numbers(numbers[kept], size) for numbers, kept in zip(groups, rows, strict=True)],
    )


def _rate(
    share: float, resampled: np.ndarray, rate: float, members: np.ndarray, others: np.ndarray, level: float
) -> tuple[float | None, Interval | None, str]:
    """The share of members found at a false-positive `rate`, its interval, and '' or why there is none."""
    needed = round(1 / rate)
    if len(others) < needed:
        return None, None, f"a false-positive rate of {rate:.1%} needs {needed:,} non-members, here are {len(others):,}"
    low, high = percentile_interval(resampled, level)
    wilson = wilson_interval(share, len(members), level)
    return share, (min(low, wilson[0]), max(high, wilson[1])), ""
