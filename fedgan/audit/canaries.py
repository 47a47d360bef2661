"""One private run with canaries: an empirical lower bound of ε beside the ledger's ε.

The run repeats one hospital's own training (arXiv 2305.08846): the real Trainer, clip, noise and
ledger, with the audited run's noise multiplier, sampling rate and δ, and with canaries
(fedgan/audit/canary_step.py). Neither its model nor its ledger is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fedgan.audit.attacks.one_run import CanaryFindings, score_canaries
from fedgan.audit.canary_step import Canaries, CanaryStep, Claim
from fedgan.audit.subject import LocalTraining, OnProgress, local_settings
from fedgan.config import Settings
from fedgan.data.dataset import ImageDataset
from fedgan.errors import ConfigError
from fedgan.privacy.ledger import NAME as LEDGER
from fedgan.privacy.ledger import JointLedger, Ledger
from fedgan.privacy.step import PrivateStep
from fedgan.training.start import begin_training
from fedgan.training.trainer import resolve_device

LOOKS = 5  # how often image canaries are scored, at equal distances, the last time at the end
EVIDENCE = (
    "The lower bounds of epsilon by canaries are evidence about two attacks on one run: a bound "
    "above the ledger's epsilon shows a fault, a bound below it proves no guarantee."
)


def check_has_claim(settings: Settings) -> None:
    """Raise `ConfigError` for a run without differential privacy: it claims no ε."""
    if not settings.privacy.on:
        raise ConfigError(
            "--canaries: the run has no differential privacy, so there is no ε to test; attack it "
            "with --shadows"
        )


def audit_canaries(
    settings: Settings,
    data: ImageDataset,
    training: LocalTraining,
    count: int,
    kimg: float = 0.0,
    on_progress: OnProgress = lambda text: None,
    rng: np.random.Generator | None = None,
) -> dict[str, Any]:
    """Train one hospital's private run with `count` canaries of each kind; its entry of audit.json.

    `kimg`: thousands of images seen; 0: as in the run. The noise stays that of the whole run. From
    scratch, also where the run had a warm start. Raises `ConfigError` for a run without privacy.
    """
    check_has_claim(settings)
    with tempfile.TemporaryDirectory() as folder:
        settings = local_settings(settings, training.batch)
        claim = claim_of(settings, data, training, Path(folder) / LEDGER)
        canaries = Canaries(data, count, claim, rng)
        images = round(kimg * 1000) or training.planned
        trainer = begin_training(
            _with_noise(settings, claim.noise_multiplier),
            canaries.dataset,
            stream=training.number,
            planned_images=images,
            ledger=JointLedger([Ledger(Path(folder) / LEDGER)]),
            run="canaries",
            private_step=functools.partial(CanaryStep, canaries),
        )
        assert trainer.private is not None
        scores = -canaries.image_scores(trainer)
        for look in range(LOOKS):
            on_progress(f"{data.name}: training with canaries, part {look + 1} of {LOOKS}")
            trainer.train(images * (look + 1) // LOOKS - images * look // LOOKS)
            scores += canaries.image_scores(trainer) / LOOKS
        epsilon = trainer.private.epsilon()
    steps = trainer.images_seen // training.batch
    return {"name": data.name, **canary_report(canaries, scores, claim, steps, epsilon)}


def canary_report(
    canaries: Canaries, scores: np.ndarray, claim: Claim, steps: int, epsilon: float
) -> dict[str, Any]:
    """The figures of one run: `scores` (N,) of image canaries, the ledger's `epsilon`."""
    n = canaries.count
    kinds: dict[str, CanaryFindings] = {
        "images": score_canaries(scores, canaries.included[:n], claim.delta),
        "gradients": score_canaries(canaries.evidence, canaries.included[n:], claim.delta),
    }
    return {
        **dataclasses.asdict(claim),
        "steps": steps,
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "kinds": {kind: dataclasses.asdict(found) for kind, found in kinds.items()},
    }


def claim_of(settings: Settings, data: ImageDataset, training: LocalTraining, path: Path) -> Claim:
    """The mechanism of the hospital's training in the run; `path`: of a ledger, not written."""
    step = PrivateStep(
        settings,
        data,
        training.batch,
        training.planned,
        JointLedger([Ledger(path)]),
        "canaries",
        resolve_device(settings.training.device),
        least_noise=training.least_noise,
    )
    return Claim(step.noise_multiplier, step.sample_rate, step.delta)


def _with_noise(settings: Settings, noise_multiplier: float) -> Settings:
    """Settings with a fixed noise multiplier, and δ by the number of units."""
    privacy = dataclasses.replace(
        settings.privacy, epsilon=0.0, noise_multiplier=noise_multiplier, delta=0.0
    )
    return dataclasses.replace(settings, privacy=privacy)
