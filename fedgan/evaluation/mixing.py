"""Label mixes: real sets extended by synthetic images, and rows sampled in proportion to labels."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from fedgan.apportion import apportion
from fedgan.data.dataset import ImageDataset, pool
from fedgan.errors import DataError

Share = float | Literal["all"]
SHARES: tuple[Share, ...] = (0.5, 1, "all")  # synthetic images per real one, in the evaluation
MIN_MIXED = 100  # rows in a hospital's label mix; below it the mix deviates before the number falls
SYNTHETIC = "synthetic"  # institution of the synthetic images of a mix


def mixed_count(real: int, synthetic: int, share: Share) -> int:
    """Number of synthetic images in a mix of `share` × `real`; 'all' takes every one.

    Raises `DataError` for a share of 0 or less and for fewer synthetic images than the mix needs.
    """
    if share == "all":
        return synthetic
    if not float(share) > 0:
        raise DataError(f"a mix needs a share of synthetic images above 0, or 'all', not {share}")
    needed = max(1, round(float(share) * real))
    if needed > synthetic:
        raise DataError(
            f"real + {share:g} × synthetic needs {needed} synthetic images, there are {synthetic}: "
            "raise evaluation.images"
        )
    return needed


def mixed_set(real: ImageDataset, synthetic: ImageDataset, share: Share, seed: int) -> ImageDataset:
    """All real images and `share` × as many synthetic ones ('all': every one), as one dataset.

    Images are not copied.

    The synthetic part keeps the proportions of the label vectors of `synthetic`. Its images have no
    patient and the institution 'synthetic'. Raises `DataError` as `mixed_count` does, and where
    labels or sizes of the two sets differ.
    """
    count = mixed_count(len(real), len(synthetic), share)
    part = synthetic.take(stratified_rows(synthetic.labels, count, seed), SYNTHETIC)
    return pool([_with_columns(real), _with_columns(part)], f"{real.name} + {count} synthetic")


def stratified_rows(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` different rows of `labels` (N, K), ascending, in proportion to the label vectors.

    Systematic sampling: every (N / count)-th row of the list sorted by label vector, with rows of
    one vector in random order, from a random start. Each vector has its share to within one row,
    and every row is equally likely, also for rare vectors. Raises `DataError` for fewer than
    `count` rows.
    """
    if count > len(labels):
        raise DataError(f"{count} of {len(labels)} images were requested: request fewer")
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(labels)), *labels.T))
    positions = (np.arange(count) + rng.random()) * len(labels) / max(count, 1)
    return np.sort(order[np.minimum(positions.astype(np.int64), len(labels) - 1)])


def _with_columns(dataset: ImageDataset) -> ImageDataset:
    """The dataset with a patient (blank where unknown) and an institution per image."""
    count = len(dataset)
    patients = dataset.patients if len(dataset.patients) == count else np.full(count, "")
    institutions = (
        dataset.institutions if len(dataset.institutions) == count else np.full(count, dataset.name)
    )
    return dataclasses.replace(
        dataset, patients=np.asarray(patients, str), institutions=np.asarray(institutions, str)
    )


class LabelMix(NamedTuple):
    """Different rows of a synthetic set in a hospital's label mix.

    `rows` (R,), shuffled. `deviation` in [0, 1]: share of the rows that would need other labels for
    the mix to equal the hospital's.
    """

    rows: np.ndarray
    deviation: float


def label_mix_rows(synthetic_labels: np.ndarray, target_labels: np.ndarray, seed: int) -> LabelMix:
    """Different rows of a synthetic set in the proportions of the label vectors of target_labels.

    synthetic_labels (M, K), target_labels (N, K), multi-hot; whole vectors count. The number of
    rows is the largest for which the rarest vector suffices (its supply over its share), by largest
    remainder. Where this is below min(`MIN_MIXED`, N), quotas are those of that many rows and a
    vector that is too rare gives all its rows: fewer rows, and a mix that differs by `deviation`.
    No row is repeated, because a copy is its own neighbour at distance 0. Vectors of the target
    without a synthetic image are left out and the others keep their proportions (`missing_share`
    measures this); no row at all where none occurs.
    """
    rng = np.random.default_rng(seed)
    made, target = _vector_numbers(synthetic_labels, target_labels)
    counts = np.bincount(
        target, minlength=int(max(made.max(initial=0), target.max(initial=0))) + 1
    ).astype(float)
    supply = np.bincount(made, minlength=len(counts))
    counts[supply == 0] = 0
    if counts.sum() == 0:
        return LabelMix(np.empty(0, np.int64), 0.0)
    share = counts / counts.sum()
    wanted = share > 0
    exact = int(np.floor((supply[wanted] / share[wanted]).min() + 1e-9))
    total = max(exact, min(MIN_MIXED, len(target)))
    quota = np.zeros(len(share), np.int64)
    quota[wanted] = apportion((share[wanted] * total).tolist(), total, tolerance=1e-9)
    quota = np.minimum(quota, supply)
    rows = [
        rng.permutation(np.flatnonzero(made == vector))[: quota[vector]]
        for vector in np.flatnonzero(quota)
    ]
    return LabelMix(
        rng.permutation(np.concatenate(rows)), float(np.abs(quota / quota.sum() - share).sum() / 2)
    )


def missing_share(synthetic_labels: np.ndarray, target_labels: np.ndarray) -> float:
    """Share of the target's images, in [0, 1], whose label vector no synthetic image has."""
    made, target = _vector_numbers(synthetic_labels, target_labels)
    return float(1.0 - np.isin(target, made).mean()) if len(target) else 0.0


def _vector_numbers(made: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One number per row: equal for equal vectors."""
    stacked = np.concatenate([np.asarray(made), np.asarray(target)]).astype(np.uint8)
    if stacked.shape[1] == 0:
        numbers = np.zeros(len(stacked), np.int64)
    else:
        numbers = np.unique(stacked, axis=0, return_inverse=True)[1].reshape(-1)
    return numbers[: len(made)], numbers[len(made) :]
