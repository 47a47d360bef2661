"""Which labels the images of `fedgan generate` get: named, as vectors, or in the proportions of real ones."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import numpy as np

from fedgan.errors import ConfigError, DataError


def named_vectors(names: Sequence[str], label_names: Sequence[str]) -> np.ndarray:
    """One-hot vectors (len(names), K) uint8 of label names. Raises `DataError` with the nearest name for an unknown one."""
    vectors = np.zeros((len(names), len(label_names)), np.uint8)
    for row, name in enumerate(names):
        if name not in label_names:
            near = difflib.get_close_matches(name, label_names, n=1, cutoff=0.5)
            advice = f"did you mean '{near[0]}'?" if near else f"it knows {', '.join(label_names) or 'no labels'}"
            raise DataError(f"the model knows no label '{name}'; {advice}")
        vectors[row, list(label_names).index(name)] = 1
    return vectors


def parsed_vectors(texts: Sequence[str], label_names: Sequence[str], exclusive: bool) -> np.ndarray:
    """Vectors (len(texts), K) uint8 of texts such as `1,0,1`. Raises `ConfigError` unless each fits the model's labels."""
    vectors = np.zeros((len(texts), len(label_names)), np.uint8)
    for row, text in enumerate(texts):
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != len(label_names) or any(part not in ("0", "1") for part in parts):
            raise ConfigError(
                f"--vector {text}: give {len(label_names)} numbers 0 or 1 with commas, in the order {', '.join(label_names) or '(none)'}"
            )
        vectors[row] = [int(part) for part in parts]
        if exclusive and vectors[row].sum() != 1:
            raise ConfigError(f"--vector {text}: this model's classes exclude each other, so exactly one number must be 1")
    return vectors


def spread_evenly(vectors: np.ndarray, images: int) -> np.ndarray:
    """`images` rows (images, K), each vector equally often; the first ones get the remainder. In the order of the vectors."""
    times = np.full(len(vectors), images // len(vectors))
    times[: images % len(vectors)] += 1
    return np.repeat(vectors, times, axis=0)


def from_counts(counts: Mapping[str, int], label_names: Sequence[str], images: int) -> np.ndarray:
    """`images` one-hot rows in the proportions of `counts` (largest remainders), in the order of the labels.

    Raises `DataError` when the counts are all zero.
    """
    numbers = np.array([counts.get(name, 0) for name in label_names], float)
    if numbers.sum() <= 0:
        raise DataError("the run's training images have no labels to take proportions from: use --label or --vector")
    exact = numbers / numbers.sum() * images
    times = np.floor(exact).astype(int)
    missing = images - int(times.sum())
    times[np.argsort(times - exact, kind="stable")[:missing]] += 1
    return np.repeat(np.eye(len(label_names), dtype=np.uint8), times, axis=0)


def from_rows(labels: np.ndarray, images: int, seed: int) -> np.ndarray:
    """`images` label vectors of real images: each row of `labels` (N, K) equally often, the rest drawn without replacement."""
    if not len(labels):
        raise DataError("the shard holds no images to take labels from")
    draw = np.random.default_rng(seed).permutation(len(labels))[: images % len(labels)]
    rows = np.concatenate([np.tile(np.arange(len(labels)), images // len(labels)), np.sort(draw)])
    return np.asarray(labels[rows], np.uint8)
