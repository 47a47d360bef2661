"""Sets made from sets: real images with synthetic ones beside them, and rows drawn in the proportions of the labels."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from fedgan.data.dataset import ImageDataset, pool
from fedgan.errors import DataError

Share = float | Literal["all"]
SHARES: tuple[Share, ...] = (
    0.5,
    1,
    "all",
)  # synthetic images for each real one, as the evaluation mixes them
SYNTHETIC = "synthetic"  # institution of the synthetic images of a mix


def mixed_count(real: int, synthetic: int, share: Share) -> int:
    """How many of `synthetic` images a mix of `share` × `real` takes; 'all' takes every one.

    Raises `DataError` for a share of 0 or less, and where there are fewer synthetic images than the mix needs.
    """
    if share == "all":
        return synthetic
    if not float(share) > 0:
        raise DataError(f"a mix needs a share of synthetic images above 0, or 'all', not {share}")
    needed = max(1, round(float(share) * real))
    if needed > synthetic:
        raise DataError(
            f"real + {share:g} × synthetic needs {needed} synthetic images and there are {synthetic}: raise evaluation.images"
        )
    return needed


def mixed_set(real: ImageDataset, synthetic: ImageDataset, share: Share, seed: int) -> ImageDataset:
    """All real images and `share` × as many synthetic ones ('all': every one), without copying images.

    The synthetic part keeps the proportions of the label vectors of `synthetic`. Its images have no patient and the
    institution 'synthetic'. Raises `DataError` as `mixed_count` does, and where labels or sizes of the two sets differ.
    """
    count = mixed_count(len(real), len(synthetic), share)
    part = synthetic.take(stratified_rows(synthetic.labels, count, seed), SYNTHETIC)
    return pool([_with_columns(real), _with_columns(part)], f"{real.name} + {count} synthetic")


def stratified_rows(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` different rows of `labels` (N, K), ascending: each label vector has its share of them to within one row.

    Systematic sampling: every (N / count)-th row of the list sorted by label vector, rows of one vector in an order drawn
    from `seed`, from a start drawn from it. Every row is as likely as any other, those of rare vectors too.
    Raises `DataError` when there are fewer than `count` rows.
    """
    if count > len(labels):
        raise DataError(f"{count} of {len(labels)} images were asked for: ask for fewer")
    rng = np.random.default_rng(seed)
    line = np.lexsort((rng.random(len(labels)), *labels.T))
    places = (np.arange(count) + rng.random()) * len(labels) / max(count, 1)
    return np.sort(line[np.minimum(places.astype(np.int64), len(labels) - 1)])


def _with_columns(dataset: ImageDataset) -> ImageDataset:
    """The dataset with a patient (blank where none is known) and an institution for each image: fit to be pooled."""
    count = len(dataset)
    patients = dataset.patients if len(dataset.patients) == count else np.full(count, "")
    institutions = (
        dataset.institutions if len(dataset.institutions) == count else np.full(count, dataset.name)
    )
    return dataclasses.replace(
        dataset, patients=np.asarray(patients, str), institutions=np.asarray(institutions, str)
    )
