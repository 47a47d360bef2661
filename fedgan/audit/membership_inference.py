"""Membership and projection of one hospital: attacks, pseudo-members, controls.

Images are compared by pixels: features fitted to the training images distinguish members without
any generator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedgan.audit.attacks.density import density_ratio_scores, density_scores
from fedgan.audit.attacks.logan import discriminator_scores
from fedgan.audit.attacks.membership import LEAK_AUC, score_attack
from fedgan.audit.attacks.nearest import nearest
from fedgan.audit.attacks.projection import null_projection_gap, project, projection_gap
from fedgan.audit.attacks.shadow import calibrated_scores, likelihood_ratio_scores
from fedgan.audit.copy_search import Planted
from fedgan.audit.shadow_training import (
    DISCRIMINATOR,
    DISTANCE,
    ShadowScores,
    shortened,
    train_shadows,
)
from fedgan.audit.subject import (
    AuditedModel,
    AuditSettings,
    OnProgress,
    Roles,
    Space,
    companion_images,
)
from fedgan.errors import DataError
from fedgan.evaluation.metrics.intervals import LEVEL
from fedgan.models.stylegan2.generator import Generator

DENSITY, RATIO = "density", "density ratio"
CONTROLLED = (DISTANCE, DENSITY, RATIO)  # use synthetic images only, so a leak can be planted
SHADOWS_FOR_RATIO = 4  # with two, an image is in one shadow only, which has no variance

# (points (N, F), synthetic (S, F), population (R, F)) → scores (N,), higher for suspected members
Attack = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Rows:
    """Pixel rows of the images of each role."""

    train: np.ndarray
    members: np.ndarray
    non_members: np.ndarray
    pseudo_members: np.ndarray
    reference: np.ndarray


@dataclass(frozen=True)
class Membership:
    """The rows of audit.json, and both controls."""

    rows: list[dict[str, Any]]
    positive: dict[str, Any]
    negative: dict[str, Any]
    notes: list[str]


def attack_functions(space: Space) -> dict[str, Attack]:
    """The attacks that need synthetic images only, by name."""
    return {
        DISTANCE: lambda points, synthetic, _: -nearest(points, synthetic, moves=space.moves)[0],
        DENSITY: lambda points, synthetic, population: density_scores(
            points, synthetic, reference_features=population
        ),
        RATIO: density_ratio_scores,
    }


def role_rows(space: Space, roles: Roles) -> Rows:
    """Rows of all roles in `space`."""
    train, held_out = space.rows(roles.train.images), space.rows(roles.held_out.images)
    return Rows(
        train,
        train[roles.members],
        held_out[roles.non_members],
        held_out[roles.pseudo_members],
        held_out[roles.reference],
    )


def measure_membership(
    audited: AuditedModel,
    roles: Roles,
    space: Space,
    synthetic: np.ndarray,
    planted: Planted,
    audit: AuditSettings,
    joint_controls: int,
    on_progress: OnProgress,
) -> Membership:
    """All attacks on one hospital.

    `joint_controls`: number of negative controls tested together, over all hospitals of the audit.
    """
    rows, attacks, notes = role_rows(space, roles), attack_functions(space), []
    made, leaked = space.rows(synthetic), space.rows(planted.images)
    positive = _positive(attacks, rows, leaked, planted, audit)
    negative = _negative(attacks, rows, roles, audit, joint_controls)
    found = []
    if audited.discriminator is None:
        notes.append(
            "The discriminator stays in the hospitals and is not in the checkpoint: "
            "it was not attacked."
        )
    else:
        by_d = _by_discriminator(audited, roles)
        found.append(_row(DISCRIMINATOR, by_d, roles, audit))
    scores = {
        name: tuple(
            attack(points, made, rows.reference)
            for points in (rows.members, rows.non_members, rows.pseudo_members)
        )
        for name, attack in attacks.items()
    }
    for name in CONTROLLED:
        row = _row(name, scores[name], roles, audit)
        leak = positive["attacks"][name]["auc"]
        row |= {"leak_auc": leak, "detects_leak": leak >= LEAK_AUC}
        if not row["detects_leak"]:
            insensitive = (
                f"insensitive: it finds planted members with an AUC of {leak:.2f} only, "
                "so a result at chance proves little"
            )
            row["note"] = "; ".join(part for part in (row["note"], insensitive) if part)
        found.append(row)
    if audit.shadows:
        shadows = train_shadows(audited, roles, space, audit, on_progress)
        notes.append(shortened(audited, roles.name, audit))
        target = {DISTANCE: np.concatenate(scores[DISTANCE])}
        if audited.discriminator is not None:
            target[DISCRIMINATOR] = np.concatenate(by_d)
        found += _calibrated(target, shadows, roles, audit)
    return Membership(found, positive, negative, notes)


def measure_projection(
    audited: AuditedModel, roles: Roles, audit: AuditSettings
) -> dict[str, Any] | None:
    """The gap between members and held-out images, and between halves of those.

    None where nothing can be projected.
    """
    if not isinstance(audited.generator, Generator) or min(audit.projected, len(roles.members)) < 2:
        return None
    rng = np.random.default_rng([audit.seed, 17])
    count = min(
        audit.projected, len(roles.members), len(roles.non_members) + len(roles.pseudo_members)
    )
    candidates = np.concatenate([roles.non_members, roles.pseudo_members])
    held_out = np.sort(rng.permutation(candidates)[:count])
    trained = np.sort(rng.permutation(roles.members)[:count])
    sides = roles.train.take(trained), roles.held_out.take(held_out)
    options: dict[str, Any] = {
        "steps": audit.projection_steps,
        "device": audited.device,
        "seed": audit.seed,
    }
    near, far = (
        project(audited.generator, side.images, side.labels, **options)[0] for side in sides
    )
    patients = roles.train_patients[trained], roles.held_out_patients[held_out]
    gap = projection_gap(
        near,
        far,
        audit.seed,
        bootstrap=audit.bootstrap,
        train_groups=patients[0],
        held_out_groups=patients[1],
    )
    null: dict[str, Any] = dict.fromkeys(("null_gap", "null_gap_ci", "null_auc", "null_auc_ci"))
    try:
        half = null_projection_gap(far, audit.seed, bootstrap=audit.bootstrap, groups=patients[1])
        null = {
            "null_gap": half.gap,
            "null_gap_ci": half.gap_ci,
            "null_auc": half.auc,
            "null_auc_ci": half.auc_ci,
        }
    except DataError:  # too few patients to halve
        pass
    return {**dataclasses.asdict(gap), **null, "steps": audit.projection_steps}


# --- one attack ---------------------------------------------------------------------------------


def _row(
    name: str, scores: tuple[np.ndarray, ...], roles: Roles, audit: AuditSettings
) -> dict[str, Any]:
    """One attack's entry of audit.json.

    `scores`: of members, non-members and pseudo-members.
    """
    members, non_members, pseudo_members = scores
    own, null = (
        score_attack(
            name,
            side,
            non_members,
            seed=audit.seed,
            bootstrap=audit.bootstrap,
            member_groups=groups,
            non_member_groups=roles.held_out_patients[roles.non_members],
        )
        for side, groups in (
            (members, roles.train_patients[roles.members]),
            (pseudo_members, roles.held_out_patients[roles.pseudo_members]),
        )
    )
    beside = {
        key: getattr(null, key)
        for key in ("auc", "auc_ci", "tpr_at_1", "tpr_at_1_ci", "tpr_at_01", "tpr_at_01_ci")
    }
    return {
        **dataclasses.asdict(own),
        **{f"null_{key}": value for key, value in beside.items()},
        "null_images": null.members,
    }


def _by_discriminator(audited: AuditedModel, roles: Roles) -> tuple[np.ndarray, ...]:
    assert audited.discriminator is not None
    sides = (
        roles.train.take(roles.members),
        roles.held_out.take(roles.non_members),
        roles.held_out.take(roles.pseudo_members),
    )
    companions = companion_images(roles, audited.settings.model.minibatch_std_group)
    return tuple(
        discriminator_scores(
            audited.discriminator, side.images, side.labels, audited.device, companions=companions
        )
        for side in sides
    )


def _calibrated(
    target: dict[str, np.ndarray], shadows: ShadowScores, roles: Roles, audit: AuditSettings
) -> list[dict[str, Any]]:
    """The entries of the attacks calibrated by shadow models."""
    ends = np.cumsum([len(roles.members), len(roles.non_members)])
    found = []
    for name, scores in target.items():
        kinds = {
            f"{name}, calibrated by shadows": calibrated_scores(
                scores, shadows.scores[name], shadows.inside
            )
        }
        if len(shadows.inside) >= SHADOWS_FOR_RATIO:
            ratios = likelihood_ratio_scores(scores, shadows.scores[name], shadows.inside)
            kinds[f"{name}, likelihood ratio of shadows"] = ratios
        for kind, values in kinds.items():
            found.append(_row(kind, tuple(np.split(values, ends)), roles, audit))
    return found


# --- controls -----------------------------------------------------------------------------------


def _positive(
    attacks: dict[str, Attack],
    rows: Rows,
    leaked: np.ndarray,
    planted: Planted,
    audit: AuditSettings,
) -> dict[str, Any]:
    """Positive control: planted members against non-members; the distance attack must find them."""
    found: dict[str, dict[str, Any]] = {}
    for name, attack in attacks.items():
        scores = (
            attack(points, leaked, rows.reference)
            for points in (rows.train[planted.sources], rows.non_members)
        )
        result = score_attack(
            name, *scores, seed=audit.seed, bootstrap=audit.bootstrap, match=False
        )
        found[name] = {
            "auc": result.auc,
            "auc_ci": result.auc_ci,
            "members": result.members,
            "non_members": result.non_members,
        }
    auc = found[DISTANCE]["auc"]
    passed = auc >= LEAK_AUC
    reason = (
        {}
        if passed
        else {
            "reason": f"the distance finds planted members with an AUC of {auc:.3f}, "
            f"{LEAK_AUC} is needed"
        }
    )
    return {"attacks": found, "passed": passed, **reason}


def _negative(
    attacks: dict[str, Attack], rows: Rows, roles: Roles, audit: AuditSettings, joint_controls: int
) -> dict[str, Any]:
    """Negative control: held-out images replace the synthetic set; attacks must be at chance.

    It fails where members and non-members differ in distribution (another year, another scanner);
    figures on them would be no evidence (arXiv 2406.16201). Intervals have the level 1 - 0.05 /
    `joint_controls` (Bonferroni), so at most one audit in twenty fails without a cause.
    """
    level = 1 - (1 - LEVEL) / joint_controls
    found: dict[str, dict[str, Any]] = {}
    reasons = []
    for name, attack in attacks.items():
        scores = (
            attack(points, rows.reference, rows.pseudo_members)
            for points in (rows.members, rows.non_members)
        )
        result = score_attack(
            name,
            *scores,
            seed=audit.seed,
            bootstrap=audit.bootstrap,
            level=level,
            member_groups=roles.train_patients[roles.members],
            non_member_groups=roles.held_out_patients[roles.non_members],
        )
        found[name] = {
            "auc": result.auc,
            "auc_ci": result.auc_ci,
            "members": result.members,
            "non_members": result.non_members,
        }
        if not result.auc_ci[0] <= 0.5 <= result.auc_ci[1]:
            reasons.append(
                f"by {name} training and held-out images differ without any generator "
                f"(AUC {result.auc:.3f})"
            )
    return {
        "attacks": found,
        "level": level,
        "passed": not reasons,
        **({"reason": "; ".join(reasons)} if reasons else {}),
    }
