"""Bootstrap by patient (Efron and Tibshirani 1993, ch. 13). A resample is one weight per image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedgan.evaluation.metrics.intervals import LEVEL, percentile_interval

CHUNK = 4_000_000  # entries (resamples × images) of one block, about 32 MB
TWO_SAMPLE_CHUNK = 1_000_000  # entries of one pair of blocks, about 8 MB


def group_numbers(groups: np.ndarray | None, count: int) -> np.ndarray:
    """Number (N,) from 0 of each image's group (patient); without groups each image is its own.

    Raises `ValueError` for another number of groups than images.
    """
    if groups is None:
        return np.arange(count)
    if len(groups) != count:
        raise ValueError(f"{len(groups)} groups do not fit {count} scores: give one per image")
    return np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)


def resamples(
    groups: np.ndarray, count: int, rng: int | np.random.Generator
) -> Iterator[np.ndarray]:
    """Blocks of weights (b, N) float64, `count` resamples in all.

    A resample draws as many groups as there are, with replacement. `groups` (N,): group number of
    each image, from 0 without gaps. `rng`: a seed or a generator.
    """
    rng = np.random.default_rng(rng)
    step = max(1, CHUNK // max(len(groups), 1))
    for start in range(0, count, step):
        yield _weights(groups, min(step, count - start), rng)


def two_sample_resamples(
    groups: np.ndarray, other_groups: np.ndarray, count: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of weights (b, N) and (b, M), each sample drawn independently as in `resamples`."""
    rng = np.random.default_rng(seed)
    step = max(1, TWO_SAMPLE_CHUNK // (len(groups) + len(other_groups)))
    for start in range(0, count, step):
        size = min(step, count - start)
        yield _weights(groups, size, rng), _weights(other_groups, size, rng)


def interval(values: np.ndarray, level: float = LEVEL) -> list[float] | None:
    """Percentile interval of the finite values (B,); None where fewer than half are finite."""
    finite = values[np.isfinite(values)]
    if len(values) == 0 or 2 * len(finite) < len(values):
        return None
    return list(percentile_interval(finite, level))


def _weights(groups: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    total = int(groups.max()) + 1
    counts = rng.multinomial(total, np.full(total, 1.0 / total), size=size)
    weights: np.ndarray = counts[:, groups].astype(np.float64)
    return weights
