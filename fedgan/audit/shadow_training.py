"""Shadow models of one hospital: the run's training, shortened, on random halves of its images.

The score of a shadow that was not trained on an image measures how easy the image is. Shadows are
fitted to real images: they stay in memory inside the hospital and are discarded after scoring.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedgan.audit.attacks.logan import discriminator_scores
from fedgan.audit.attacks.nearest import nearest
from fedgan.audit.attacks.shadow import assign_shadows
from fedgan.audit.subject import (
    AuditedModel,
    AuditSettings,
    OnProgress,
    Roles,
    Space,
    companion_images,
    local_settings,
)
from fedgan.config import Settings
from fedgan.data.dataset import ImageDataset, pool
from fedgan.evaluation.sampling import generate_images, synthetic_labels
from fedgan.privacy.ledger import JointLedger, Ledger
from fedgan.training.start import begin_training
from fedgan.training.trainer import Trainer

DISCRIMINATOR, DISTANCE = "discriminator", "distance"


@dataclass(frozen=True)
class ShadowScores:
    """Scores of J shadows on N images: members, non-members, pseudo-members.

    `scores`: (J, N) per attack; `inside` (J, N): whether the shadow was trained on the image.
    """

    scores: dict[str, np.ndarray]
    inside: np.ndarray


def train_shadows(
    audited: AuditedModel, roles: Roles, space: Space, audit: AuditSettings, on_progress: OnProgress
) -> ShadowScores:
    """Train `audit.shadows` shadows, each on half of the hospital's patients, and score the images.

    The reference images are in no shadow. Shadows start from scratch, also where the run had a warm
    start.
    """
    held_out = np.concatenate([roles.non_members, roles.pseudo_members])
    images = pool([roles.train, roles.held_out.take(held_out)], roles.name)
    patients = np.concatenate(
        [roles.train_patients, roles.held_out_patients[held_out] + roles.train_patients.max() + 1]
    )
    inside = assign_shadows(len(images), audit.shadows, audit.seed, patients)
    scored = np.concatenate([roles.members, len(roles.train) + np.arange(len(held_out))])
    part = images.take(scored)
    points = space.rows(part.images)
    companions = companion_images(roles, audited.settings.model.minibatch_std_group)
    scores: dict[str, list[np.ndarray]] = {DISCRIMINATOR: [], DISTANCE: []}
    for number, chosen in enumerate(inside):
        on_progress(f"{roles.name}: training shadow {number + 1} of {audit.shadows}")
        own = images.take(np.flatnonzero(chosen))
        shadow = _train(shadow_settings(audited, roles.name, len(own), audit, number), own, number)
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
        made = generate_images(shadow.ema, labels, audit.seed, audit.psi, device=audited.device)
        scores[DISTANCE].append(-nearest(points, space.rows(made), moves=space.moves)[0])
    return ShadowScores(
        {name: np.stack(values) for name, values in scores.items()}, inside[:, scored]
    )


def _train(settings: Settings, dataset: ImageDataset, number: int) -> Trainer:
    """One shadow; private if the run was private, with a temporary ledger.

    Only the shadow's share in figures leaves the audit, and no ledger covers those.
    """
    images = round(settings.training.kimg * 1000)
    with tempfile.TemporaryDirectory() as folder:
        ledger = JointLedger([Ledger(Path(folder) / "ledger.jsonl")])
        trainer = begin_training(
            settings, dataset, planned_images=images, ledger=ledger, run=f"shadow-{number}"
        )
        trainer.train(images)
    trainer.parts["discriminator"].float()
    return trainer


def shortened(audited: AuditedModel, hospital: str, audit: AuditSettings) -> str:
    """What distinguishes the shadows from the run, as a note of the audit."""
    run = f"{audited.settings.training.kimg:g} kimg"
    if known := audited.trainings.get(hospital):
        run += f", {known.planned / 1000:g} of this hospital's images"
    return (
        f"{audit.shadows} shadow models stand for the run: each on half of this hospital's "
        f"patients alone, from scratch, for {audit.shadow_kimg:g} kimg (the run: {run})."
    )


def shadow_settings(
    audited: AuditedModel, hospital: str, images: int, audit: AuditSettings, number: int
) -> Settings:
    """The run's settings with another seed, for a shadow of `images` images.

    The batch is the hospital's share in the run, at most all images.
    """
    known, run = audited.trainings.get(hospital), audited.settings
    batch = known.batch if known else run.training.batch_size
    alone = local_settings(run, min(batch, images))
    return dataclasses.replace(
        alone,
        seed=run.seed + 1000 + audit.seed + number,
        training=dataclasses.replace(alone.training, kimg=audit.shadow_kimg),
    )
