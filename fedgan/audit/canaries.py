"""One private run with canaries: an empirical lower bound of ε beside the ledger's ε.

The run repeats one hospital's own training (arXiv 2305.08846): the real Trainer, clip, noise and
ledger, with the audited run's noise multiplier, sampling rate and δ. Independent fair coins include
canaries of two kinds, each a unit of its own:

* images of random blocks with a random label, scored by D's logits during the run, as another
  hospital or the server can;
* gradients of the length of the clip, each in a direction of its own, scored by the noisy gradients
  of all steps: the worst-case server, which sends a discriminator with one more input (Nasr et al.,
  arXiv 2302.07956; Andrew et al., arXiv 2302.03098).

An excluded canary is a blank row, and its unit adds nothing to any sum: n is public, so neighbours
differ by zeroing a unit out. Neither the model nor the ledger of this run is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedgan.audit.attacks.logan import discriminator_scores
from fedgan.audit.attacks.one_run import CanaryFindings, score_canaries
from fedgan.audit.subject import OnProgress
from fedgan.config import Settings
from fedgan.data.dataset import UNKNOWN_PATIENT, ImageDataset, pool
from fedgan.errors import ConfigError
from fedgan.privacy.accounting import Mechanism
from fedgan.privacy.clipping import Loss
from fedgan.privacy.ledger import NAME as LEDGER
from fedgan.privacy.ledger import Ledger
from fedgan.privacy.step import Draw, PrivateStep
from fedgan.training.start import begin_training
from fedgan.training.trainer import Trainer, resolve_device

LOOKS = 5  # how often image canaries are scored, at equal distances, the last time at the end
BLOCKS = 8  # blocks per side of an image canary
LOUD = 1e9  # input of a gradient canary: its gradient exceeds any clip, nearly all in its direction
EVIDENCE = (
    "A lower bound of ε from one run with canaries is evidence about these attacks: a bound above "
    "the ledger's ε shows a fault, one below it proves no guarantee."
)


@dataclass(frozen=True)
class LocalTraining:
    """One hospital's training in a run: number, images per step, images of all rounds.

    `least_noise`: lower bound of its noise multiplier (`privacy.noise_split = "equal"`).
    """

    number: int
    batch: int
    planned: int
    least_noise: float = 0.0


@dataclass(frozen=True)
class Claim:
    """The mechanism that a run claims: noise multiplier of the gradient, sampling rate, δ."""

    noise_multiplier: float
    sample_rate: float
    delta: float


class Canaries:
    """Canaries at the end of `dataset`: N images, then N gradients; `included` (2N,): their coins.

    `claim`: the mechanism to run; None: as the private step computes it for `dataset`. `evidence`
    (N,): sum over the steps of the log-likelihood ratio of each gradient canary.
    """

    def __init__(
        self,
        data: ImageDataset,
        count: int,
        claim: Claim | None = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        rng = np.random.default_rng() if rng is None else rng  # the coins are the auditor's secret
        self.count, self.first, self.claim = count, len(data), claim
        self.included = rng.random(2 * count) < 0.5
        self.evidence = np.zeros(count)
        self.images, self.labels = _random_canaries(data, 2 * count, rng)
        shown = self.included.astype(np.uint8)
        row = ImageDataset(
            data.name,
            self.images * shown[:, None, None, None],
            self.labels * shown[:, None],
            data.label_names,
            data.exclusive,
            _names(data.patients, 2 * count),
            _names(data.institutions, 2 * count),
        )
        self.dataset = pool([data, row], data.name)

    def codes(self, rows: np.ndarray) -> np.ndarray:
        """(B, N) float32: `LOUD` where row b is gradient canary n."""
        codes = np.zeros((len(rows), self.count), np.float32)
        number = rows - self.first - self.count
        (at,) = np.nonzero(number >= 0)
        codes[at, number[at]] = LOUD
        return codes

    def image_scores(self, trainer: Trainer) -> np.ndarray:
        """D's logit (N,) of each image canary."""
        return discriminator_scores(
            trainer.parts["discriminator"],
            self.images[: self.count],
            self.labels[: self.count],
            trainer.device.type,
        )


class CanaryStep(PrivateStep):
    """The private step of a run with canaries: observes what it releases, changes no release.

    Constructed like `PrivateStep`, after the canaries.
    """

    def __init__(self, canaries: Canaries, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.canaries = canaries
        if claim := canaries.claim:
            self.noise_multiplier = claim.noise_multiplier
            self.sample_rate, self.delta = claim.sample_rate, claim.delta
            self.step = Mechanism(self.joint_multiplier, self.sample_rate, 1)

    def draw(self, number: int) -> Draw:
        """The Poisson sample without excluded canaries."""
        draw, known = super().draw(number), self.canaries
        absent = known.first + np.flatnonzero(~known.included)
        (kept,) = np.nonzero(~np.isin(draw.rows, absent))
        units = draw.units[torch.from_numpy(kept).to(draw.units.device)]
        return dataclasses.replace(
            draw, rows=draw.rows[kept], units=torch.unique(units, return_inverse=True)[1]
        )

    def gradient(
        self,
        discriminator: nn.Module,
        loss: Loss,
        fakes: tuple[Tensor, Tensor],
        reals: tuple[Tensor, Tensor],
        draw: Draw,
        r1_weight: float = 0.0,
    ) -> tuple[float, int]:
        """The release of `PrivateStep.gradient`, with one more input of D per gradient canary."""
        codes = torch.from_numpy(self.canaries.codes(draw.rows)).to(reals[1].device)
        probed = _Probed(discriminator, self.canaries.count).to(codes.device)
        released = super().gradient(
            probed,
            loss,
            (fakes[0], torch.cat([fakes[1], torch.zeros_like(codes)], dim=1)),
            (reals[0], torch.cat([reals[1], codes], dim=1)),
            draw,
            r1_weight,
        )
        assert probed.probe.weight.grad is not None
        noisy = probed.probe.weight.grad.flatten().double().cpu().numpy()
        # D's gradient falls with the loss, so an included canary pulls its weight below zero.
        sums = -noisy * self.sample_rate * self.units / self.settings.max_grad_norm
        self.canaries.evidence += log_likelihood_ratio(
            sums, self.noise_multiplier, self.sample_rate
        )
        return released


def log_likelihood_ratio(sums: np.ndarray, noise: float, rate: float) -> np.ndarray:
    """ln [(1-q) N(0, σ²) + q N(1, σ²)] / N(0, σ²) at `sums`, over the clip; `sums` without noise.

    The best score of one step by Neyman and Pearson, where a canary is sampled with `rate` q.
    """
    if not noise:
        return sums
    with np.errstate(divide="ignore"):
        found = np.logaddexp(np.log1p(-rate), np.log(rate) + (2 * sums - 1) / (2 * noise**2))
    return np.asarray(found)


class _Probed(nn.Module):
    """D with one more linear input per gradient canary, whose weights are zero: same logits."""

    def __init__(self, discriminator: nn.Module, count: int) -> None:
        super().__init__()
        self.discriminator, self.count = discriminator, count
        self.probe = nn.Linear(count, 1, bias=False)
        nn.init.zeros_(self.probe.weight)

    def forward(self, images: Tensor, c: Tensor) -> Tensor:
        c, code = c[:, : -self.count], c[:, -self.count :]
        logits: Tensor = self.discriminator(images, c) + self.probe(code).flatten()
        return logits


# --- the audit ----------------------------------------------------------------------------------


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
    if not settings.privacy.on:
        raise ConfigError(
            "--canaries: the run has no differential privacy, so there is no ε to test; attack it "
            "with --shadows"
        )
    with tempfile.TemporaryDirectory() as folder:
        settings = _local_settings(settings, training)
        claim = claim_of(settings, data, training, Path(folder) / LEDGER)
        canaries = Canaries(data, count, claim, rng)
        images = round(kimg * 1000) or training.planned
        trainer = begin_training(
            _with_noise(settings, claim.noise_multiplier),
            canaries.dataset,
            stream=training.number,
            planned_images=images,
            ledgers=[Path(folder) / LEDGER],
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
    return canary_report(
        canaries, scores, claim, trainer.images_seen // training.batch, epsilon
    ) | {"name": data.name}


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
        "exceeded": [kind for kind, found in kinds.items() if found.epsilon_low > epsilon],
    }


def claim_of(settings: Settings, data: ImageDataset, training: LocalTraining, path: Path) -> Claim:
    """The mechanism of the hospital's training in the run; `path`: of a ledger, not written."""
    step = PrivateStep(
        settings,
        data,
        training.batch,
        training.planned,
        Ledger(path),
        "canaries",
        resolve_device(settings.training.device),
        least_noise=training.least_noise,
    )
    return Claim(step.noise_multiplier, step.sample_rate, step.delta)


def _local_settings(settings: Settings, training: LocalTraining) -> Settings:
    """The run's settings at this hospital, from scratch and without a limit of ε."""
    return dataclasses.replace(
        settings,
        training=dataclasses.replace(settings.training, batch_size=training.batch, warm_start=""),
        privacy=dataclasses.replace(settings.privacy, max_epsilon=0.0),
    )


def _with_noise(settings: Settings, noise_multiplier: float) -> Settings:
    """Settings with a fixed noise multiplier, and δ by the number of units."""
    privacy = dataclasses.replace(
        settings.privacy, epsilon=0.0, noise_multiplier=noise_multiplier, delta=0.0
    )
    return dataclasses.replace(settings, privacy=privacy)


def _random_canaries(
    data: ImageDataset, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, C, H, W) uint8 of random black and white blocks, and random labels (count, K).

    Where labels exclude each other one of them, else those of a random image.
    """
    blocks = min(BLOCKS, data.resolution)
    small = 255 * rng.integers(0, 2, (count, data.channels, blocks, blocks), np.uint8)
    side = data.resolution // blocks
    images = small.repeat(side, axis=2).repeat(side, axis=3)
    if data.exclusive and data.label_dim:
        labels = np.eye(data.label_dim, dtype=np.uint8)[rng.integers(0, data.label_dim, count)]
    else:
        labels = data.labels[rng.integers(0, len(data), count)]
    return images, labels


def _names(column: np.ndarray, count: int) -> np.ndarray:
    """Patients or institutions of canaries; empty where the data have none."""
    names = [f"{UNKNOWN_PATIENT}canary-{number}" for number in range(count)]
    return np.array(names if len(column) else [], str)
