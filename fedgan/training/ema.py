"""Exponential moving average (EMA) of the generator (arXiv 1710.10196, 2006.06676)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from fedgan.config import TrainingSettings

AVERAGE, SOURCE = "ema/", "generator/"


def ema_decay(batch_size: int, half_life_kimg: float, rampup: float, images_seen: int) -> float:
    """Share of the average that stays after one batch: 0.5 to the power of batch / half-life.

    The half-life in images is 1000 · `half_life_kimg`, at most `rampup` · `images_seen` (`rampup`
    0: no limit), so that the average follows quickly at first.
    """
    half_life = half_life_kimg * 1000
    if rampup > 0:
        half_life = min(half_life, images_seen * rampup)
    return 0.5 ** (batch_size / max(half_life, 1e-8))


@torch.no_grad()
def ema_update(average: nn.Module, source: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 - decay) · source; buffers (w_avg) are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(source.parameters()), 1 - decay)
    for old, new in zip(average.buffers(), source.buffers(), strict=True):
        old.copy_(new)


def half_life_kimg(training: TrainingSettings, batch_size: int) -> float:
    """`training.ema_half_life_kimg`, or its default for steps of `batch_size` images."""
    given = training.ema_half_life_kimg
    return batch_size * 10 / 32 if given < 0 else given


def average_of_rounds(
    average: Mapping[str, np.ndarray],
    model: Mapping[str, np.ndarray],
    training: TrainingSettings,
    shown: int,
    images_seen: int,
) -> dict[str, np.ndarray]:
    """The server's average after a round: `average` (`ema/…`) moved towards `model`.

    For a federation in which the average does not travel. `shown`: images of the round;
    `images_seen`: images before it. A round counts as one step of that many images: over short
    rounds the result is a Trainer's average, over long ones the last generator.
    """
    decay = ema_decay(
        shown, half_life_kimg(training, training.batch_size), training.ema_rampup, images_seen
    )
    moved = {}
    for key, before in average.items():
        now = model[SOURCE + key.removeprefix(AVERAGE)]
        moved[key] = (
            now.copy()
            if key.endswith("w_avg")
            else (decay * before + (1 - decay) * now).astype(np.float32)
        )
    return moved
