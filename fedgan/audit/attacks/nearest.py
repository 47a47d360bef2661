"""Nearest neighbours by Euclidean distance: candidates in float32, decision in float64.

Privacy figures compare nearly equal distances, and distances of copies that are almost zero, where
|x|² + |y|² - 2 x·y in float32 is only rounding. So float32 selects candidates by matrix products,
and float64 measures those again by differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

PAIRS = 8192  # pairs per float64 batch: bounds the memory
ENTRIES = 32_000_000  # of one block of distances, 128 MB
UNIT = 2.0**-24  # unit roundoff of float32


@dataclass(frozen=True)
class Moves:
    """Transformations under which copies are searched: each query is tried in all of them.

    `shape` (C, H, W) of the rows, which are flattened images; `flips`: also mirrored; `shifts`:
    also moved by up to this number of pixels in both directions, the edge repeated. 2 · (2 · shifts
    + 1)² versions, and as many times the cost.
    """

    shape: tuple[int, int, int]
    flips: bool = True
    shifts: int = 0

    def versions(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """All versions of the flattened images (N, C·H·W), the unchanged one first."""
        if rows.shape[1] != int(np.prod(self.shape)):
            raise ValueError(f"rows of {rows.shape[1]} values are not images of shape {self.shape}")
        most, (_, height, width) = self.shifts, self.shape
        padded = np.pad(
            rows.reshape(-1, *self.shape), ((0, 0), (0, 0), (most, most), (most, most)), mode="edge"
        )
        offsets = sorted(range(2 * most + 1), key=lambda offset: abs(offset - most))
        for images in (padded, padded[..., ::-1]) if self.flips else (padded,):
            for down in offsets:
                for right in offsets:
                    yield images[:, :, down : down + height, right : right + width].reshape(
                        rows.shape
                    )


def nearest(
    queries: np.ndarray, base: np.ndarray, block: int = 1024, *, moves: Moves | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Distance (Q,) float64 of each query to its nearest row of `base`, and that row (Q,) int64.

    `queries` (Q, F) and `base` (N, F) float; N ≥ 1. Exact: the row that float64 finds by
    differences, the first of equals. `block` queries at a time bound the memory and change nothing.
    With `moves` each query counts in its nearest version. Raises `ValueError` for arrays that do
    not fit or are not finite.
    """
    queries, base = _matrix("queries", queries), _matrix("base", base)
    if queries.shape[1] != base.shape[1] or len(base) == 0:
        raise ValueError(
            f"queries {queries.shape} and base {base.shape} must have equally many columns, "
            "and base at least one row"
        )
    distances, rows = np.full(len(queries), np.inf), np.zeros(len(queries), np.int64)
    for version in moves.versions(queries) if moves else (queries,):
        others, other_rows = _nearest(version, base, block)
        closer = others < distances
        distances[closer], rows[closer] = others[closer], other_rows[closer]
    return distances, rows


def nearest_of_others(
    queries: np.ndarray,
    base: np.ndarray,
    groups: np.ndarray,
    own: np.ndarray,
    *,
    moves: Moves | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Distance (Q,) of each query to the nearest row of `base` (N, F) of no `own` group; its row.

    `groups` (N,) and `own` (Q, J) are numbers. In float32: for distances that are not almost zero.
    Infinite where no other group is left.
    """
    best, rows = np.full(len(queries), np.inf, np.float32), np.zeros(len(queries), np.int64)
    center = base.mean(0, dtype=np.float64).astype(base.dtype)
    y = (base - center).astype(np.float32)
    y_norms = np.einsum("nf,nf->n", y, y)
    step = max(1, ENTRIES // len(base))
    for version in moves.versions(queries) if moves else (queries,):
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            x = (version[part] - center).astype(np.float32)
            squared = x @ y.T
            squared *= -2.0
            squared += y_norms
            squared += np.einsum("bf,bf->b", x, x)[:, None]
            for excluded in own[part].T:
                squared[groups[None] == excluded[:, None]] = np.inf
            found = squared.argmin(1)
            values = squared[np.arange(len(x)), found]
            closer = values < best[part]
            best[part][closer], rows[part][closer] = values[closer], found[closer]
    return np.sqrt(np.maximum(best, 0.0)).astype(np.float64), rows


def pixels(images: np.ndarray) -> np.ndarray:
    """Images (N, C, H, W) uint8 as rows (N, C·H·W) float32; distances are RMS in grey levels.

    Each image's mean over channels and pixels is removed: a slightly brighter copy is a copy.
    Contrast is kept, because normalising it would amplify the noise of almost empty images.
    """
    flat = np.asarray(images).reshape(len(images), -1).astype(np.float32)
    flat -= flat.mean(1, keepdims=True, dtype=np.float64).astype(np.float32)
    flat /= np.float32(np.sqrt(max(flat.shape[1], 1)))
    return flat


def _matrix(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(
            f"{name} must be a finite matrix (rows, features), not of shape {values.shape}"
        )
    return values


def _nearest(queries: np.ndarray, base: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    # Short vectors lose least in |x|² + |y|² - 2 x·y.
    center = base.mean(0, dtype=np.float64).astype(base.dtype)
    y = (base - center).astype(np.float32)
    y_norms = np.einsum("nf,nf->n", y, y)
    # Error of a dot product ≤ F u |x| |y| (Higham 2002, section 3.1), plus sums and means.
    share, longest = (queries.shape[1] + 64) * UNIT, float(y_norms.max())
    distances, found = np.empty(len(queries)), np.empty(len(queries), np.int64)
    step = max(1, min(block, ENTRIES // len(base)))
    for start in range(0, len(queries), step):
        part = slice(start, min(start + step, len(queries)))
        x = (queries[part] - center).astype(np.float32)
        partial = x @ y.T
        partial *= -2.0
        partial += y_norms
        slack = share * (np.einsum("bf,bf->b", x, x) + longest)
        near, rows = np.nonzero(partial <= (partial.min(1) + 2 * slack)[:, None])  # `near` ascends
        exact = _exact(queries[part], base, near, rows)
        order = np.lexsort((rows, exact, near))
        first = order[np.searchsorted(near, np.arange(len(x)))]
        distances[part], found[part] = np.sqrt(exact[first]), rows[first]
    return distances, found


def _exact(queries: np.ndarray, base: np.ndarray, near: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Squared distances (P,) float64 of the pairs (queries[near], base[rows])."""
    squared = np.empty(len(rows))
    for start in range(0, len(rows), PAIRS):
        part = slice(start, start + PAIRS)
        difference = queries[near[part]].astype(np.float64) - base[rows[part]]
        squared[part] = np.einsum("pf,pf->p", difference, difference)
    return squared
