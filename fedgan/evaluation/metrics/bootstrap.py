"""Percentile bootstrap (Efron and Tibshirani 1993, ch. 13) by counts: a resample is a weight for each image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

CHUNK = 4_000_000  # most entries of one block of resamples × images, about 32 MB


def clusters(patients: np.ndarray, institutions: np.ndarray, count: int) -> np.ndarray:
    """Cluster number (N,) of each image: its patient, told apart by institution; an image without a patient is its own.

    Images of one patient are not independent, so a resample takes or leaves all of them together.
    """
    if len(patients) != count:
        return np.arange(count)
    where = institutions if len(institutions) == count else np.full(count, "")
    keys = [
        f"{place}\x00{patient}" if patient else f"\x01{row}"
        for row, (place, patient) in enumerate(zip(where, patients, strict=True))
    ]
    return np.unique(keys, return_inverse=True)[1].reshape(-1)


def resamples(groups: np.ndarray, count: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (b, N) float64 of how often each image occurs in a resample; `count` resamples in all.

    A resample draws as many clusters as there are, with replacement; `groups` (N,) gives each image's cluster.
    """
    rng = np.random.default_rng(seed)
    total = int(groups.max()) + 1
    even = np.full(total, 1.0 / total)
    step = max(1, CHUNK // max(len(groups), 1))
    for start in range(0, count, step):
        drawn = rng.multinomial(total, even, size=min(step, count - start))
        yield drawn[:, groups].astype(np.float64)


def interval(values: np.ndarray, level: float = 0.95) -> list[float] | None:
    """Percentile interval [low, high] of the finite values (B,); None when fewer than half are finite."""
    finite = values[np.isfinite(values)]
    if len(values) == 0 or 2 * len(finite) < len(values):
        return None
    tail = 100.0 * (1.0 - level) / 2.0
    low, high = np.percentile(finite, [tail, 100.0 - tail])
    return [float(low), float(high)]
