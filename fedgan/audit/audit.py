"""Audit of a run: does the generator, or its release, reveal who was trained on?

Each hospital is audited with its own images: copies in three spaces, membership, projection, each
figure beside the same figure for held-out real images. The controls come first: a planted leak must
be found, and held-out images in the place of synthetic ones must not be called a leak. Otherwise
the audit is not valid.

A space that does not find the planted copies is insensitive; the audit stays valid if another one
finds them. Class features, for example, are alike for two images of one class and no copy detector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fedgan.audit.copy_search import CopySearch, pairs_picture, plant, search_copies
from fedgan.audit.membership_inference import (
    CONTROLLED,
    Membership,
    measure_membership,
    measure_projection,
)
from fedgan.audit.rules import (
    FEW_PATIENTS,
    FORMAT,
    Measured,
    attack_stands_out,
    copies_stand_out,
    exceeded_claim,
    outliers_stand_out,
    projection_stands_out,
)
from fedgan.audit.subject import (
    AuditedModel,
    AuditSettings,
    OnProgress,
    Roles,
    Space,
    Spaces,
    assign_roles,
    draw_synthetic,
    held_out_count,
    reason_unauditable,
)
from fedgan.data.dataset import HospitalData
from fedgan.models.stylegan2.generator import Generator

EVIDENCE = (
    "These figures are evidence about the attacks that were tried, not proof that no other attack "
    "would find more."
)
NO_SHADOWS = (
    "No shadow models were trained (--shadows 0): the strongest known membership attacks were not "
    "tried."
)
NOT_COVERED = (
    "The audit reads private images without noise: the epsilon of the training does not cover its "
    "figures. Publishing them is an additional release."
)
CONDITIONED = (
    "The networks were conditioned on this hospital alone, which everyone with the networks can do "
    "(model.hospitals); in a released set its images are mixed with the others'."
)
NOT_IN_FEDERATION = (
    "The model contains no update of this hospital: the figures are those of a non-participant."
)


@dataclass(frozen=True)
class HospitalAudit:
    """One hospital: `numbers`, its entry of audit.json; `pictures` by space, which stay there."""

    numbers: dict[str, Any]
    pictures: dict[str, Image.Image]


def audit_hospitals(
    audited: AuditedModel,
    hospitals: Sequence[HospitalData],
    audit: AuditSettings,
    on_progress: OnProgress = lambda text: None,
) -> list[HospitalAudit]:
    """Audit each hospital separately.

    Raises `FedganError` for a generator that does not fit the images or gives images that are not
    finite, `ConfigError` for an unusable number of shadows.
    """
    joint_controls = len(hospitals) * len(CONTROLLED)
    return [
        audit_hospital(audited, hospital, audit, joint_controls, on_progress)
        for hospital in hospitals
    ]


def audit_hospital(
    audited: AuditedModel,
    hospital: HospitalData,
    audit: AuditSettings,
    joint_controls: int = len(CONTROLLED),
    on_progress: OnProgress = lambda text: None,
) -> HospitalAudit:
    """Audit one hospital.

    `joint_controls`: number of negative controls of membership over all hospitals of the audit.
    """
    if reason := reason_unauditable(hospital):
        return HospitalAudit(_unmeasured(hospital, reason), {})
    with audited.conditioned_on(hospital.name) as alone:
        note = [CONDITIONED] if alone else [NOT_IN_FEDERATION] if audited.numbers else []
        return _audit(audited, hospital, audit, joint_controls, on_progress, note)


def _audit(
    audited: AuditedModel,
    hospital: HospitalData,
    audit: AuditSettings,
    joint_controls: int,
    on_progress: OnProgress,
    notes: list[str],
) -> HospitalAudit:
    name = hospital.name
    roles = assign_roles(hospital, audit.seed)
    on_progress(f"{name}: drawing {audit.images} synthetic images")
    synthetic = draw_synthetic(audited, roles.train, audit.images, audit.seed, audit.psi)
    planted = plant(synthetic, roles.train, audit.seed)
    spaces = Spaces(hospital, roles, audited.settings, audit, audited.device)
    if roles.training_images > len(roles.train):
        notes.append(
            f"A sample of {len(roles.train)} of {roles.training_images} training images was "
            "searched."
        )
    patients = int(roles.held_out_patients.max()) + 1
    if patients < FEW_PATIENTS:
        each = len(np.unique(roles.held_out_patients[roles.non_members]))
        notes.append(
            f"Few patients: {patients} are held out, and an attack is tested on {each} of them. "
            "Their intervals can be too narrow, and only a gross leak would show."
        )
    searches = _copies(spaces, roles, synthetic, audit, notes, on_progress)
    on_progress(f"{name}: attacking membership")
    membership = measure_membership(
        audited, roles, spaces.pixels, synthetic, planted, audit, joint_controls, on_progress
    )
    projection = _projection(audited, roles, audit, notes, on_progress)
    controls = _controls(searches, membership)
    notes += membership.notes
    numbers = {
        "name": name,
        "members": len(roles.train),
        "held_out": len(roles.held_out),
        "held_out_patients": patients,
        "synthetic": len(synthetic),
        "copies": {space: search.figures if search else None for space, search in searches.items()},
        "membership": membership.rows,
        "projection": projection,
        "controls": controls,
        "valid": all(control["passed"] for control in controls.values()),
        "notes": notes,
    }
    pictures = {
        space: pairs_picture(search, synthetic, roles.train)
        for space, search in searches.items()
        if search
    }
    return HospitalAudit({**numbers, "signs": signs(numbers)}, pictures)


def audit_report(
    audits: Sequence[HospitalAudit],
    audited: AuditedModel,
    audit: AuditSettings,
    round_number: int | None,
    checkpoint_sha256: str,
) -> dict[str, Any]:
    """The content of audit.json: numbers only, no path, patient or image; deterministic."""
    hospitals = [found.numbers for found in audits]
    notes = [
        EVIDENCE,
        *([] if audit.shadows else [NO_SHADOWS]),
        *([NOT_COVERED] if audited.settings.privacy.on else []),
    ]
    return {
        "format": FORMAT,
        "round": round_number,
        "checkpoint_sha256": checkpoint_sha256,
        "valid": bool(hospitals) and all(hospital["valid"] for hospital in hospitals),
        "settings": dataclasses.asdict(audit),
        "hospitals": hospitals,
        "notes": notes,
    }


def headline(report: dict[str, Any]) -> str:
    """The verdict: a line per invalid hospital, sign of a leak or broken claim; or one for all."""
    lines = []
    for hospital in report["hospitals"]:
        if not hospital["valid"]:
            lines.append(f"not valid at {hospital['name']}: {'; '.join(invalid_reasons(hospital))}")
        elif hospital["signs"]:
            lines.append(
                f"evidence of a leak at {hospital['name']}: {'; '.join(hospital['signs'])}"
            )
    for found in report.get("canaries", []):
        if sign := exceeded_claim(found):
            lines.append(f"the guarantee does not hold at {found['name']}: {sign}")
    if not lines:
        lines = ["valid, and no figure stands out from the same figure for held-out images"]
    return "\n".join(lines)


def invalid_reasons(hospital: dict[str, Any]) -> list[str]:
    """Why one hospital's entry of audit.json is not valid."""
    if hospital["controls"] is None:
        return list(hospital["notes"])
    failed = [
        (name, control) for name, control in hospital["controls"].items() if not control["passed"]
    ]
    return [f"the {name} control failed ({control['reason']})" for name, control in failed]


def signs(numbers: dict[str, Any]) -> list[str]:
    """Figures of one hospital above the same figure for held-out images, beyond both intervals."""
    found = []
    for space, copies in numbers["copies"].items():
        near = [
            _measured(copies or {}, f"near_{side}_share", f"near_{side}_ci")
            for side in ("training", "held_out")
        ]
        if copies and copies_stand_out(copies["excess_ci"], *near):
            share, real = copies["copying_share"], copies["held_out_share"]
            found.append(
                f"{share:.1%} of the synthetic images copy training images by {space}, "
                f"of held-out images {real:.1%}"
            )
        if copies and outliers_stand_out(
            copies["outliers"],
            copies["synthetic_images"],
            copies["held_out_outliers"],
            copies["held_out_images"],
        ):
            images = "image is" if copies["outliers"] == 1 else "images are"
            found.append(
                f"{copies['outliers']} synthetic {images} far nearer to one training patient than "
                f"to any other by {space}, of held-out images {copies['held_out_outliers']}"
            )
    for row in numbers["membership"]:
        if attack_stands_out(
            (row["auc"], row["auc_ci"]), _measured(row, "null_auc", "null_auc_ci")
        ):
            found.append(
                f"membership by {row['attack']} has an AUC of {row['auc']:.2f}, "
                f"held-out images {row['null_auc']:.2f}"
            )
    projection = numbers["projection"]
    if projection and projection_stands_out(projection["gap_ci"], projection["auc_ci"]):
        found.append(
            "training images are projected with an error smaller by "
            f"{projection['gap']:.2f} grey levels"
        )
    return found


def _measured(row: dict[str, Any], key: str, ci: str) -> Measured | None:
    return (row[key], row[ci]) if key in row else None


# --- parts --------------------------------------------------------------------------------------


def _copies(
    spaces: Spaces,
    roles: Roles,
    synthetic: np.ndarray,
    audit: AuditSettings,
    notes: list[str],
    on_progress: OnProgress,
) -> dict[str, CopySearch | None]:
    """The search in each space, None for a space that is unavailable."""

    def search(space: Space) -> CopySearch:
        return search_copies(space, roles, synthetic, audit.seed, audit.bootstrap)

    on_progress(f"{roles.name}: searching copies by pixels")
    found: dict[str, CopySearch | None] = {"pixels": search(spaces.pixels)}
    on_progress(f"{roles.name}: searching copies by features")
    features = spaces.features
    found["features"] = search(features) if features else None
    if features is None:
        notes.append(
            "The images have no classes to train the reference extractor on: copies were not "
            "searched by features."
        )
    elif features.fitted:
        notes.append(
            "The features are of a classifier that was trained on this hospital's training images."
        )
    on_progress(f"{roles.name}: training the embedding and searching copies by it")
    found["embedding"] = search(spaces.embedding)
    for space, result in found.items():
        if result and not result.positive["passed"]:
            notes.append(
                f"Insensitive: by {space} the planted copies were not found as required, "
                "so few copies prove little."
            )
    return found


def _projection(
    audited: AuditedModel,
    roles: Roles,
    audit: AuditSettings,
    notes: list[str],
    on_progress: OnProgress,
) -> dict[str, Any] | None:
    if audit.projected and isinstance(audited.generator, Generator):
        on_progress(f"{roles.name}: projecting training and held-out images")
    found = measure_projection(audited, roles, audit)
    if found is None:
        notes.append(
            "No image was projected: none was requested, or the generator has no searchable latent "
            "space."
        )
    return found


def _controls(searches: dict[str, CopySearch | None], membership: Membership) -> dict[str, Any]:
    """Both controls of one hospital, each with `passed`, and a `reason` if it failed.

    Positive: a space finds planted copies, and the distance attack finds planted members. Negative:
    no sensitive space calls held-out images copies, and no attack finds members when held-out
    images replace the synthetic set.
    """
    positive = {space: search.positive for space, search in searches.items() if search}
    negative = {space: search.negative for space, search in searches.items() if search}
    sensitive = [space for space, control in positive.items() if control["passed"]]
    detected = bool(sensitive)
    no_false_alarm = all(negative[space]["passed"] for space in sensitive)
    reasons = {
        "positive": [] if detected else ["no space finds the planted copies"],
        "negative": [
            f"by {space} {negative[space]['reason']}"
            for space in sensitive
            if not negative[space]["passed"]
        ],
    }
    parts = {
        "positive": (
            {space: _without_none(control) for space, control in positive.items()},
            membership.positive,
            detected,
        ),
        "negative": (
            {space: _without_none(control) for space, control in negative.items()},
            membership.negative,
            no_false_alarm,
        ),
    }
    found = {}
    for name, (copies, attack, copies_passed) in parts.items():
        failures = [*reasons[name], *([attack["reason"]] if "reason" in attack else [])]
        reason = {"reason": "; ".join(failures)} if failures else {}
        found[name] = {
            "copies": copies,
            "membership": attack,
            "sensitive": sensitive,
            "passed": copies_passed and attack["passed"],
            **reason,
        }
    return found


def _without_none(control: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in control.items() if value is not None}


def _unmeasured(hospital: HospitalData, note: str) -> dict[str, Any]:
    """The entry of a hospital that cannot be audited: all figures null, and a note."""
    return {
        "name": hospital.name,
        "members": len(hospital.train),
        "held_out": held_out_count(hospital),
        "held_out_patients": None,
        "synthetic": 0,
        "copies": dict.fromkeys(("pixels", "features", "embedding")),
        "membership": [],
        "projection": None,
        "controls": None,
        "valid": False,
        "notes": [note],
        "signs": [],
    }
