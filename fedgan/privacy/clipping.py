"""One gradient a unit, clipped, summed: the part of DP-SGD that looks at private images (arXiv 1607.00133, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ClippedSum:
    """`gradients`: by parameter name, the sum over units of their clipped gradients. `norms` (U,): theirs before the clip.

    `real_logits` (B,): D on the real images. All of it is private until noise is added.
    """

    gradients: dict[str, Tensor]
    norms: Tensor
    real_logits: Tensor


def clipped_sum(
    discriminator: nn.Module,
    loss: Loss,
    fakes: tuple[Tensor, Tensor],
    reals: tuple[Tensor, Tensor],
    units: Tensor,
    max_norm: float,
    chunk: int,
    r1_weight: float = 0.0,
) -> ClippedSum:
    """The sum over units of the gradient of a unit's mean loss, each clipped to the Euclidean norm `max_norm`.

    `fakes`, `reals`: images (B, C, H, W) and labels (B, K). Fake i and real i are one pair with one loss, `loss(fake_logits,
    real_logits)` of one logit each, plus `r1_weight` · |dD/dx|² at the real image (R1, arXiv 1801.04406, eq. 9), and one
    gradient. `units` (B,) int64: the image or patient that a pair belongs to, numbered from 0 without gaps, in rising
    order. The pairs of a unit are averaged before the clip, so that a whole patient moves the sum by `max_norm` at most.
    `chunk`: pairs whose gradients are in memory at once; the pairs of one unit are always there together.
    """
    weights = {name: value.detach() for name, value in discriminator.named_parameters()}

    def judge(at: dict[str, Tensor], images: Tensor, c: Tensor) -> Tensor:
        return functional_call(discriminator, at, (images, c))

    def pair_loss(at: dict[str, Tensor], fake: Tensor, fake_c: Tensor, real: Tensor, real_c: Tensor) -> tuple[Tensor, Tensor]:
        logits = judge(at, torch.stack([fake, real]), torch.stack([fake_c, real_c]))
        value = loss(logits[:1], logits[1:])
        if r1_weight:
            slope = grad(lambda image: judge(at, image.unsqueeze(0), real_c.unsqueeze(0))[0])(real)
            value = value + r1_weight * slope.square().sum()
        return value, logits[1]

    gradients_of = vmap(grad(pair_loss, has_aux=True), in_dims=(None, 0, 0, 0, 0))
    total = {name: torch.zeros_like(value) for name, value in weights.items()}
    norms, logits = [torch.zeros(0, device=units.device)], [torch.zeros(0, device=units.device)]
    for start, end in _chunks(units, chunk):
        part = slice(start, end)
        gradients, real_logits = gradients_of(weights, fakes[0][part], fakes[1][part], reals[0][part], reals[1][part])
        gradients = _unit_means(gradients, units[part] - units[start])
        norm = torch.stack([value.flatten(1).float().square().sum(dim=1) for value in gradients.values()]).sum(dim=0).sqrt()
        factor = max_norm / norm.clamp(min=max_norm)
        for name, value in gradients.items():
            total[name] += torch.tensordot(factor, value, dims=1)
        norms.append(norm)
        logits.append(real_logits)
    return ClippedSum(total, torch.cat(norms), torch.cat(logits))


def _unit_means(gradients: dict[str, Tensor], units: Tensor) -> dict[str, Tensor]:
    """Gradients of pairs → of units: means over the pairs of each."""
    count = int(units[-1]) + 1
    if count == len(units):
        return gradients
    mean = torch.zeros(count, len(units), device=units.device)
    mean[units, torch.arange(len(units), device=units.device)] = 1
    mean /= mean.sum(dim=1, keepdim=True)
    return {name: torch.tensordot(mean, value, dims=1) for name, value in gradients.items()}


def _chunks(units: Tensor, chunk: int) -> Iterator[tuple[int, int]]:
    """Spans of about `chunk` pairs, at least one unit each, that cut no unit."""
    ends = torch.bincount(units).cumsum(0).tolist() if len(units) else []
    start = end = 0
    for next_end in ends:
        if next_end - start > chunk and end > start:
            yield start, end
            start = end
        end = next_end
    if end > start:
        yield start, end
