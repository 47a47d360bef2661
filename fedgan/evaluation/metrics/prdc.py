"""Precision, recall, density and coverage: where synthetic features lie in the neighbourhoods of real ones, and the reverse.

Both sets are approximated by balls: round each image, a ball that reaches to its k-th nearest neighbour in its own set.
One pass over the blocks of pairwise distances gives all four scores. Distances are found in float32 by matrix products
and decided in float64: a pair so close to a radius that float32 might be wrong about it is computed again, so that
every decision is the one that float64 takes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 5
BLOCK = 1024  # rows of one block of distances
SPARE = 2  # candidates beyond the k nearest of float32, among which float64 chooses
PAIRS = 8192  # pairs computed again at once in float64: bounds the memory
UNIT = 2.0**-24  # unit roundoff of float32


def manifold_scores(
    real: np.ndarray, synthetic: np.ndarray, k: int = NEIGHBOURS, block: int = BLOCK
) -> dict[str, float]:
    """{"precision", "recall", "density", "coverage"} of features real (N, D) and synthetic (M, D); N, M > k ≥ 1.

    With B(x) the closed ball round x up to its k-th nearest neighbour in its own set, itself not counted:
    - precision: share of synthetic images in some real B(x) (arXiv 1904.06991, eqs. 1, 2), recall: share of real images
      in some synthetic B(y); both in [0, 1];
    - density: the number of real balls that hold a synthetic image, over k, mean over the synthetic ones
      (arXiv 2002.09797, eq. 3), ≥ 0; 1 is expected for equal distributions, and it may exceed 1;
    - coverage: share of real images whose own B(x) holds a synthetic image (eq. 4), in [0, 1].
    All four depend on N, M, k and the extractor: compare them at equal sizes only. `block` rows at a time bound the
    memory (4 · block · max(N, M) bytes a buffer, three of them) and change nothing. Raises `ValueError` for sets of k
    images or fewer.
    """
    x64, y64 = _centred(real, synthetic, k)
    x, y = x64.float(), y64.float()
    real_radii, synthetic_radii = (_radii(a, a64, k, block) for a, a64 in ((x, x64), (y, y64)))
    in_real = torch.zeros(len(y), dtype=torch.int64)  # real balls that hold each synthetic image
    recalled, covered = (torch.zeros(len(x), dtype=torch.bool) for _ in range(2))
    for rows, partial, norms, slack in _blocks(x, y, block):
        near, far = _inside(
            partial, real_radii[rows] - norms, slack, x64[rows], y64, real_radii[rows, None]
        )
        in_real += torch.bincount(far, minlength=len(y))
        covered[rows.start + near] = True
        partial -= synthetic_radii.float()
        near, _ = _inside(partial, -norms, slack, x64[rows], y64, synthetic_radii[None])
        recalled[rows.start + near] = True
    return {
        "precision": float((in_real > 0).double().mean()),
        "recall": float(recalled.double().mean()),
        "density": float(in_real.double().mean() / k),
        "coverage": float(covered.double().mean()),
    }


def _centred(real: np.ndarray, synthetic: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    """Both sets in float64 about their common mean: short vectors lose least in |x|² + |y|² - 2 x·y."""
    sets = [
        torch.from_numpy(np.ascontiguousarray(features, np.float64))
        for features in (real, synthetic)
    ]
    for features in sets:
        if features.ndim != 2 or len(features) <= k or k < 1 or not bool(features.isfinite().all()):
            raise ValueError(
                f"features must be (N, D), finite, N above k = {k} and k at least 1; got {tuple(features.shape)}"
            )
    middle = (sets[0].mean(0) + sets[1].mean(0)) / 2
    return sets[0] - middle, sets[1] - middle


def _blocks(x: Tensor, y: Tensor, block: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield (rows of x, |y|² - 2 x·y (b, M), |x|² (b,), how far their sum may be from the squared distance (b,)), float32.

    The bound is that of a dot product of D terms, D u |x| |y| with u the unit roundoff (Higham 2002, section 3.1), and a
    few roundings more for the sums and for a radius. The first array is the caller's until the next turn.
    """
    x_norms, y_norms = (torch.linalg.vecdot(a, a) for a in (x, y))
    share = (x.shape[1] + 16) * UNIT
    buffer = torch.empty(min(block, len(x)), len(y))
    for start in range(0, len(x), block):
        rows = slice(start, min(start + block, len(x)))
        partial = buffer[: rows.stop - start]
        torch.addmm(y_norms, x[rows], y.t(), alpha=-2.0, out=partial)
        yield rows, partial, x_norms[rows], share * (x_norms[rows] + y_norms.max())


def _radii(x: Tensor, x64: Tensor, k: int, block: int) -> Tensor:
    """Squared distance (N,) float64 of each row to its k-th nearest other row."""
    count = min(k + SPARE, len(x) - 1)
    radii = torch.empty(len(x), dtype=torch.float64)
    for rows, partial, norms, slack in _blocks(x, x, block):
        own = torch.arange(rows.start, rows.stop)
        partial[own - rows.start, own] = torch.inf
        found, candidates = partial.topk(count, dim=1, largest=False)
        exact = _exact(x64, x64, own.repeat_interleave(count), candidates.reshape(-1)).view(
            -1, count
        )
        radii[rows] = exact.kthvalue(k, dim=1).values
        # A row that is no candidate is at least this far: may it still be nearer than the radius found?
        beyond = (found[:, -1] + norms - slack).clamp_min(0.0)
        if count < len(x) - 1:
            for row in own[radii[rows] > beyond].tolist():
                everyone = (x64 - x64[row]).square().sum(1)
                everyone[row] = torch.inf
                radii[row] = everyone.kthvalue(k).values
    return radii


def _inside(
    partial: Tensor, limits: Tensor, slack: Tensor, x64: Tensor, y64: Tensor, radii: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows and columns (P,) of the pairs within a radius: partial (b, M) ≤ limits (b,), decided in float64 where they are
    within `slack`; radii (b, 1) or (1, M) float64 are the squared radii themselves.
    """
    slack = slack + 4 * UNIT * (
        slack + radii.max().float()
    )  # the radii were rounded to float32 as well
    rows, columns = (partial <= (limits + slack).float()[:, None]).nonzero().unbind(1)
    doubtful = (partial[rows, columns] > (limits - slack).float()[rows]).nonzero()[:, 0]
    r, c = rows[doubtful], columns[doubtful]
    inside = torch.ones(len(rows), dtype=torch.bool)
    inside[doubtful] = _exact(x64, y64, r, c) <= radii.expand(partial.shape)[r, c]
    return rows[inside], columns[inside]


def _exact(x64: Tensor, y64: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances (P,) float64 of the pairs (x[rows], y[columns]), by differences, `PAIRS` at a time."""
    pairs = zip(rows.split(PAIRS), columns.split(PAIRS), strict=True)
    return torch.cat([(x64[r] - y64[c]).square().sum(1) for r, c in pairs])
