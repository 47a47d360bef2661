"""The generator's exponential moving average (arXiv 1710.10196, section 4; ramp-up of arXiv 2006.06676)."""

from __future__ import annotations

import torch
from torch import nn

from fedgan.models.generator import Generator


def ema_decay(batch_size: int, half_life_kimg: float, rampup: float, images_seen: int) -> float:
    """Share of the average that stays after one batch: 0.5 to the power of batch / half-life.

    The half-life in images is 1000 · `half_life_kimg`, but at most `rampup` · `images_seen` (0: no limit),
    so that the average follows quickly in the beginning.
    """
    half_life = half_life_kimg * 1000
    if rampup > 0:
        half_life = min(half_life, images_seen * rampup)
    return 0.5 ** (batch_size / max(half_life, 1e-8))


@torch.no_grad()
def ema_update(average: nn.Module, source: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 - decay) · source; a mapping's w_avg, an average already, is copied."""
    torch._foreach_lerp_(list(average.parameters()), list(source.parameters()), 1 - decay)
    if isinstance(average, Generator) and isinstance(source, Generator):
        average.mapping.w_avg.copy_(source.mapping.w_avg)
