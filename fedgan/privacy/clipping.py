"""Per-unit gradients, clipped and summed: DP-SGD before the noise (arXiv 1607.00133).

Norms, factors and the sum are float64. The gradient of a pair is float32 (bf16 where the training
is), and its rounding may depend on how many pairs are computed together, by about 10^-6 of its
length. On CUDA every chunk has the same number of pairs, blank ones included, so that the choice of
kernels is independent of the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import vmap

from fedgan.privacy.per_pair import PerPair

Loss = Callable[[Tensor, Tensor], Tensor]

# The relative error of a float64 norm of n numbers is at most n · 2^-53, that of a sum of n units
# n² · 2^-53 of the clip: both below this for 2^32 numbers and 2^16 units.
MARGIN = 2.0**-20
COLUMNS = 2**14  # parameters in float64 at once
FIXED_CHUNKS = ("cuda",)  # devices whose kernels depend most on the shape


@dataclass(frozen=True)
class ClippedSum:
    """`gradients`: by parameter name, the sum over units of their clipped gradients, float64.

    `norms` (U,): before clipping, float64. `real_logits` (B,): D on the real images. All of it is
    private until noise is added.
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
    """The sum over units of the gradient of a unit's mean loss, each clipped to `max_norm`.

    `fakes`, `reals`: images (B, C, H, W) and labels (B, K). Fake i and real i are one pair with one
    loss, `loss(fake_logits, real_logits)` of one logit each, plus `r1_weight` · |dD/dx|² at the
    real image (R1, arXiv 1801.04406, eq. 9), and one gradient. `units` (B,) int64: the image or
    patient of a pair, numbered from 0 without gaps, in increasing order. The pairs of a unit are
    averaged before clipping, so that a whole patient moves the sum by at most `max_norm` (Euclidean
    norm), rounding included. `chunk`: pairs whose gradients are in memory at once; the pairs of one
    unit are always together.
    """
    parameters = dict(discriminator.named_parameters())
    totals = [
        torch.zeros(value.numel(), dtype=torch.float64, device=value.device)
        for value in parameters.values()
    ]
    norms = [torch.zeros(0, dtype=torch.float64, device=units.device)]
    logits = [torch.zeros(0, device=units.device)]
    for start, end in _chunks(units, chunk):
        count = end - start
        blank = -count % chunk if units.device.type in FIXED_CHUNKS else 0
        fake, fake_c, real, real_c = (_padded(part[start:end], blank) for part in (*fakes, *reals))
        gradients, real_logits = pair_gradients(
            discriminator, loss, fake, fake_c, real, real_c, r1_weight
        )
        within = units[start:end] - units[start]
        rows = [_means(_rows(value)[:count], within) for value in gradients.values()]
        norms.append(_add_clipped(totals, rows, max_norm))
        logits.append(real_logits[:count])
    shaped = {
        name: _unrow(total, value.shape)
        for (name, value), total in zip(parameters.items(), totals, strict=True)
    }
    return ClippedSum(shaped, torch.cat(norms), torch.cat(logits))


def _add_clipped(totals: Sequence[Tensor], rows: Sequence[Tensor], max_norm: float) -> Tensor:
    """Add the units' clipped gradients, `rows` (U, n) by parameter, to `totals` (n,), in place.

    Returns the norms (U,) before clipping. Gradients that are not finite count as 0.
    """
    squares = [part.double().square().sum(dim=1) for row in rows for part in row.split(COLUMNS, 1)]
    norm = torch.stack(squares).sum(dim=0).sqrt()
    finite = norm.isfinite()
    if not bool(finite.all()):  # ∞ · 0 is NaN
        rows = [row.where(finite[:, None], 0.0) for row in rows]
    limit = max_norm * (1 - MARGIN)
    factor = limit / norm.where(finite, limit).clamp(min=limit)
    for total, row in zip(totals, rows, strict=True):
        for sums, part in zip(total.split(COLUMNS), row.split(COLUMNS, 1), strict=True):
            sums += factor @ part.double()
    return norm


@contextmanager
def exact_kernels() -> Iterator[None]:
    """float32 without TF32 on CUDA, by kernels that do not depend on measured times."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    with torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False
    ):
        matmul.allow_tf32 = False
        try:
            yield
        finally:
            matmul.allow_tf32 = before


def pair_gradients(
    discriminator: nn.Module,
    loss: Loss,
    fake: Tensor,
    fake_c: Tensor,
    real: Tensor,
    real_c: Tensor,
    r1_weight: float = 0.0,
) -> tuple[dict[str, Tensor], Tensor]:
    """(gradients (B, ...) by parameter name, D on the real images (B,)), per pair, not clipped."""
    parameters = dict(discriminator.named_parameters())
    with torch.enable_grad(), PerPair(len(real)) as each:
        fake_logits, real_logits = discriminator(
            torch.cat([fake, real]), torch.cat([fake_c, real_c])
        ).chunk(2)
        value = vmap(loss)(fake_logits.unsqueeze(1), real_logits.unsqueeze(1)).sum()
        if r1_weight:
            x = real.detach().clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(discriminator(x, real_c).sum(), x, create_graph=True)
            value = value + r1_weight * slope.square().sum()
    return dict(
        zip(parameters, each.gradients(value, list(parameters.values())), strict=True)
    ), real_logits.detach()


def _padded(part: Tensor, count: int) -> Tensor:
    """`part` (B, ...) with `count` blank rows at its end."""
    return torch.cat([part, part.new_zeros(count, *part.shape[1:])]) if count else part


def _rows(value: Tensor) -> Tensor:
    """(U, ...) → (U, n), without a copy for convolution weights in `channels_last`."""
    return value.movedim(2, -1).flatten(1) if value.ndim == 5 else value.flatten(1)


def _unrow(row: Tensor, shape: torch.Size) -> Tensor:
    """One row of `_rows` in the shape of its parameter."""
    return (
        row.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        if len(shape) == 4
        else row.view(shape)
    )


def _means(rows: Tensor, units: Tensor) -> Tensor:
    """Rows of pairs (B, n) → means over the pairs of each unit (U, n).

    The rows of each unit are added separately: in a product with a matrix of shares, one NaN row
    times zero would make the rows of all other units NaN.
    """
    count = int(units[-1]) + 1
    if count == len(units):
        return rows
    sums = torch.zeros(count, rows.shape[1], dtype=rows.dtype, device=rows.device).index_add_(
        0, units, rows
    )
    return sums / torch.bincount(units, minlength=count)[:, None]


def _chunks(units: Tensor, chunk: int) -> Iterator[tuple[int, int]]:
    """Spans of about `chunk` pairs, at least one unit each; no unit is split."""
    ends = torch.bincount(units).cumsum(0).tolist() if len(units) else []
    start = end = 0
    for next_end in ends:
        if next_end - start > chunk and end > start:
            yield start, end
            start = end
        end = next_end
    if end > start:
        yield start, end
