"""Partition a pool of images over hospitals: pure functions from columns to row numbers.

Each function returns one sorted array of rows per hospital. The arrays are disjoint and keep all
images of a patient together. They cover all rows, except those that `fixed_quantities` leaves out.

Each patient is assigned alone, by a hash of (seed, patient) and its own labels: removing one moves
no other (docs/explanation/privacy.md). Only `fixed_quantities` needs the whole table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedgan.data.splits import unit_hashes
from fedgan.errors import DataError

ATTEMPTS = 1000


def by_institution(institutions: np.ndarray) -> tuple[list[str], list[np.ndarray]]:
    """Natural partition: sorted names of the institutions and the rows of each."""
    names, codes = np.unique(institutions.astype(str), return_inverse=True)
    return names.tolist(), [np.flatnonzero(codes == code) for code in range(len(names))]


def iid(patients: np.ndarray, hospitals: int, seed: int) -> list[np.ndarray]:
    """IID partition: each patient in a random hospital, all equally likely."""
    _enough_patients(patients, hospitals)
    return partition_by_shares(
        patients, np.zeros(len(patients), np.int64), np.full((1, hospitals), 1 / hospitals), seed
    )


def dirichlet_shares(classes: int, hospitals: int, alpha: float, seed: int) -> np.ndarray:
    """Label skew: the shares (classes, hospitals) of each class from Dirichlet(alpha, …).

    See arXiv 1909.06335. Draws are repeated until the mean share of every hospital is at least
    1 / (4 `hospitals`). Data do not enter: with rare classes a hospital may still get few images.
    Raises `DataError` where no draw is enough.
    """
    rng = np.random.default_rng([seed, 1])
    for _ in range(ATTEMPTS):
        shares = rng.dirichlet(np.full(hospitals, alpha), size=classes)
        if np.isfinite(shares).all() and shares.mean(axis=0).min() >= 1 / (4 * hospitals):
            return shares
    raise DataError(
        f"Dirichlet(alpha = {alpha:g}) leaves one of {hospitals} hospitals under a quarter of an "
        f"equal share of {classes} classes in {ATTEMPTS} draws: raise data.alpha or lower "
        "federation.hospitals"
    )


def partition_by_shares(
    patients: np.ndarray, classes: np.ndarray, shares: np.ndarray, seed: int
) -> list[np.ndarray]:
    """Divide the patients of each class at random by `shares` (G, hospitals), in expectation.

    The hash of a patient in [0, 1) lies in the interval of its hospital.
    """
    codes, _, groups = patient_table(patients, classes)
    draws = unit_hashes(np.unique(patients.astype(str)), seed, "partition")
    hospital = (draws[:, None] >= np.cumsum(shares, axis=1)[groups, :-1]).sum(axis=1)
    return [np.flatnonzero(hospital[codes] == number) for number in range(shares.shape[1])]


def fixed_quantities(
    patients: np.ndarray, quantities: Sequence[int], seed: int
) -> list[np.ndarray]:
    """Hospitals of at most the given numbers of images; whole patients are added at random.

    Raises `DataError` if the pool is too small or a hospital stays empty.
    """
    if min(quantities, default=0) < 1 or sum(quantities) > len(patients):
        raise DataError(
            f"data.quantities requires {sum(quantities)} images "
            f"({', '.join(map(str, quantities))}), the training pool has {len(patients)}: each "
            "must be at least 1 and their sum no more than that"
        )
    codes, sizes, _ = patient_table(patients, np.zeros(len(patients), np.int64))
    hospital = np.full(len(sizes), -1, np.int64)
    order = np.random.default_rng([seed, 3]).permutation(len(sizes))
    # The largest first: it has room for patients with many images that fit no small hospital.
    for number in sorted(range(len(quantities)), key=lambda number: -quantities[number]):
        room = quantities[number]
        for patient in order[hospital[order] < 0]:
            if sizes[patient] <= room:
                hospital[patient] = number
                room -= int(sizes[patient])
            if not room:
                break
    parts = [np.flatnonzero(hospital[codes] == number) for number in range(len(quantities))]
    if not all(len(rows) for rows in parts):
        raise DataError(
            "data.quantities leaves a hospital empty: no patient has so few images; raise the "
            "smallest quantity"
        )
    return parts


def row_classes(labels: np.ndarray) -> np.ndarray:
    """Class of each row of `labels` (N, K): its first label, K for a row without; (N,) int64."""
    label_dim = labels.shape[1]
    if not label_dim:
        return np.zeros(len(labels), np.int64)
    return np.where(labels.any(axis=1), labels.argmax(axis=1), label_dim).astype(np.int64)


def patient_table(
    patients: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patient number per row (N,), images and most frequent class per patient (P,)."""
    names, codes = np.unique(patients.astype(str), return_inverse=True)
    sizes = np.bincount(codes, minlength=len(names))
    # Sort (patient, class) pairs by count: the last pair of a patient is its most frequent class.
    pairs, times = np.unique(
        np.stack([codes, classes.astype(np.int64)]), axis=1, return_counts=True
    )
    order = np.lexsort((-pairs[1], times, pairs[0]))
    groups = np.zeros(len(names), np.int64)
    groups[pairs[0][order]] = pairs[1][order]
    return codes, sizes, groups


def _enough_patients(patients: np.ndarray, hospitals: int) -> None:
    found = len(np.unique(patients.astype(str)))
    if found < hospitals:
        raise DataError(
            f"{found} patients cannot be divided over {hospitals} hospitals: lower "
            "federation.hospitals"
        )
