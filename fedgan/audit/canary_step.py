"""Canaries in a private run, and the private step that observes what it releases about them.

Two kinds, each canary a unit of its own, included by a fair coin:

* images of random blocks with a random label, scored by D's logits during the run, as another
  hospital or the server can;
* gradients of the length of the clip, each in a direction of its own, scored by the noisy gradients
  of all steps: the worst-case server, which sends a discriminator with one more input (Nasr et al.,
  arXiv 2302.07956; Andrew et al., arXiv 2302.03098).

An excluded canary is a blank row, and its unit adds nothing to any sum: n is public, so neighbours
differ by zeroing a unit out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedgan.audit.attacks.logan import discriminator_scores
from fedgan.data.dataset import UNKNOWN_PATIENT, ImageDataset, pool
from fedgan.privacy.accounting import Mechanism
from fedgan.privacy.clipping import Loss
from fedgan.privacy.step import Draw, PrivateStep
from fedgan.training.trainer import Trainer

BLOCKS = 8  # blocks per side of an image canary
LOUD = 1e9  # input of a gradient canary: its gradient exceeds any clip, nearly all in its direction


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
            # a unit each
            np.array([f"{UNKNOWN_PATIENT}canary-{number}" for number in range(2 * count)]),
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


# --- the data -----------------------------------------------------------------------------------


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
