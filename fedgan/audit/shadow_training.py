"""Shadow models of one hospital: the run's own training, shortened, on random halves of its images.

A shadow that never saw an image tells how high that image scores by itself. Shadows are fitted to real images: they live
in memory, inside the hospital, and are gone when they have scored.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedgan.audit.attacks.logan import discriminator_scores
from fedgan.audit.attacks.nearest import nearest
from fedgan.audit.attacks.shadow import deal_shadows
from fedgan.audit.subject import (
    AuditedModel,
    AuditSettings,
    OnProgress,
    Roles,
    Space,
    companions_of,
)
from fedgan.config import Settings
from fedgan.data.dataset import ImageDataset, pool
from fedgan.evaluation.sampling import generate_images, synthetic_labels
from fedgan.training.start import begin_training
from fedgan.training.trainer import Trainer

DISCRIMINATOR, DISTANCE = "discriminator", "distance"


@dataclass(frozen=True)
class ShadowScores:
    """`scores`: for each attack (J, N) of J shadows on members, tested and posing images; `inside` (J, N): who was trained on."""

    scores: dict[str, np.ndarray]
    inside: np.ndarray


def train_shadows(
    audited: AuditedModel, roles: Roles, space: Space, audit: AuditSettings, on_progress: OnProgress
) -> ShadowScores:
    """Train `audit.shadows` shadows, each on half of the hospital's patients, and let each score the images that are judged.

    The reference images are in none of them. Shadows begin from scratch, also where the run had a warm start.
    """
    judged_held = np.concatenate([roles.tested, roles.pseudo_members])
    everybody = pool([roles.train, roles.held.take(judged_held)], roles.name)
    patients = np.concatenate(
        [roles.train_patients, roles.held_patients[judged_held] + roles.train_patients.max() + 1]
    )
    inside = deal_shadows(len(everybody), audit.shadows, audit.seed, patients)
    judged = np.concatenate([roles.members, len(roles.train) + np.arange(len(judged_held))])
    part, points = everybody.take(judged), space.rows(everybody.take(judged).images)
    companions = companions_of(roles, audited.settings.model.minibatch_std_group)
    scores: dict[str, list[np.ndarray]] = {DISCRIMINATOR: [], DISTANCE: []}
    for number, chosen in enumerate(inside):
        on_progress(f"{roles.name}: training shadow {number + 1} of {audit.shadows}")
        shadow = _train(audited, everybody.take(np.flatnonzero(chosen)), audit, number)
        scores[DISCRIMINATOR].append(
            discriminator_scores(
                shadow.parts["discriminator"],
                part.images,
                part.labels,
                audited.device,
                companions=companions,
            )
        )
        labels = synthetic_labels(roles.train.labels, audit.images, audit.seed)
        images = generate_images(shadow.ema, labels, audit.seed, audit.psi, device=audited.device)
        scores[DISTANCE].append(-nearest(points, space.rows(images), moves=space.moves)[0])
    return ShadowScores(
        {name: np.stack(values) for name, values in scores.items()}, inside[:, judged]
    )


def _train(
    audited: AuditedModel, dataset: ImageDataset, audit: AuditSettings, number: int
) -> Trainer:
    """One shadow. Where the run was private the shadow is, too; its steps go to a ledger that is thrown away with it.

    That is right because nothing of a shadow leaves the audit but its share in figures, which no ledger covers anyway.
    """
    settings = shadow_settings(audited.settings, audit, number)
    images = round(audit.shadow_kimg * 1000)
    with tempfile.TemporaryDirectory() as folder:
        ledgers = [Path(folder) / "ledger.jsonl"]
        trainer = begin_training(
            settings, dataset, planned_images=images, ledgers=ledgers, run=f"shadow-{number}"
        )
        trainer.train(images)
    trainer.parts["discriminator"].float()
    return trainer


def shadow_settings(settings: Settings, audit: AuditSettings, number: int) -> Settings:
    """The run's settings with another seed, no warm start and no budget that an earlier run has spent."""
    return dataclasses.replace(
        settings,
        seed=settings.seed + 1000 + audit.seed + number,
        training=dataclasses.replace(settings.training, warm_start="", kimg=audit.shadow_kimg),
        privacy=dataclasses.replace(settings.privacy, max_epsilon=0.0),
    )
