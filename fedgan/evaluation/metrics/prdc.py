"""Precision, recall, density and coverage (arXiv 1904.06991, 2002.09797).

Each set is approximated by balls around its images, which reach to the k-th nearest neighbour in
the same set. One pass over blocks of pairwise distances gives all four figures. Distances are
computed in float32 by matrix products. A pair close enough to a radius that float32 could be wrong
is computed again in float64, so every decision is the float64 one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 5
BLOCK = 1024  # rows of one block of distances
SPARE = 2  # float32 candidates beyond the k nearest, from which float64 chooses
PAIRS = 8192  # pairs per float64 batch: bounds the memory
UNIT = 2.0**-24  # unit roundoff of float32


def prdc(
    real: np.ndarray, synthetic: np.ndarray, k: int = NEIGHBOURS, block: int = BLOCK
) -> dict[str, float]:
    """Precision, recall, density, coverage of real (N, D), synthetic (M, D) features; N, M > k ≥ 1.

    With B(x) the closed ball around x up to its k-th nearest neighbour in its own set, x not
    counted:
    - precision: share of synthetic y in some real B(x) (arXiv 1904.06991, eq. 1), in [0, 1];
    - recall: share of real x in some synthetic B(y) (eq. 2), in [0, 1];
    - density: mean over y of |{x: y in B(x)}| / k (arXiv 2002.09797, eq. 3), ≥ 0; 1 is expected for
      equal distributions, larger values are possible;
    - coverage: share of real x whose B(x) contains some y (eq. 4), in [0, 1].
    All depend on N, M, k and the extractor: compare at equal sizes only. `block` rows at a time
    bound the memory (three buffers of 4 · block · max(N, M) bytes) and change nothing. Raises
    `ValueError` for sets of k images or fewer.
    """
    x64, y64 = _centered(real, synthetic, k)
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


def _centered(real: np.ndarray, synthetic: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    """Both sets in float64 about their mean: short vectors lose least in |x|² + |y|² - 2 x·y."""
    sets = [
        torch.from_numpy(np.ascontiguousarray(features, np.float64))
        for features in (real, synthetic)
    ]
    for features in sets:
        if features.ndim != 2 or len(features) <= k or k < 1 or not bool(features.isfinite().all()):
            raise ValueError(
                f"features must be (N, D), finite, N above k = {k} and k at least 1; "
                f"got {tuple(features.shape)}"
            )
    middle = (sets[0].mean(0) + sets[1].mean(0)) / 2
    return sets[0] - middle, sets[1] - middle


def _blocks(x: Tensor, y: Tensor, block: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield (rows of x, |y|² - 2 x·y (b, M), |x|² (b,), error bound of their sum (b,)), float32.

    The bound is that of a dot product of D terms, D u |x| |y| with unit roundoff u (Higham 2002,
    section 3.1), plus roundings of the sums and of a radius. The first array is valid until the
    next iteration.
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
        # Lower bound of the distance of all other rows: below the radius, they have to be checked.
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
    """Rows and columns (P,) of the pairs within a radius.

    Pairs have partial (b, M) ≤ limits (b,); within `slack` of the limit float64 decides. radii (b,
    1) or (1, M) float64 are the squared radii.
    """
    slack = slack + 4 * UNIT * (slack + radii.max().float())  # radii are rounded to float32 too
    rows, columns = (partial <= (limits + slack).float()[:, None]).nonzero().unbind(1)
    doubtful = (partial[rows, columns] > (limits - slack).float()[rows]).nonzero()[:, 0]
    r, c = rows[doubtful], columns[doubtful]
    inside = torch.ones(len(rows), dtype=torch.bool)
    inside[doubtful] = _exact(x64, y64, r, c) <= radii.expand(partial.shape)[r, c]
    return rows[inside], columns[inside]


def _exact(x64: Tensor, y64: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances (P,) float64 of the pairs (x[rows], y[columns]), `PAIRS` at a time."""
    pairs = zip(rows.split(PAIRS), columns.split(PAIRS), strict=True)
    return torch.cat([(x64[r] - y64[c]).square().sum(1) for r, c in pairs])
