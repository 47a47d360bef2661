"""Partition a pool of images over hospitals: pure functions from columns to row numbers.

Each function returns one sorted array of rows per hospital. The arrays are disjoint and keep all
images of a patient together. They cover all rows, except those that `fixed_quantities` leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedgan.errors import DataError

ATTEMPTS = 1000


def by_institution(institutions: np.ndarray) -> tuple[list[str], list[np.ndarray]]:
    """Natural partition: sorted names of the institutions and the rows of each."""
    names, codes = np.unique(institutions.astype(str), return_inverse=True)
    return names.tolist(), [np.flatnonzero(codes == code) for code in range(len(names))]


def iid(patients: np.ndarray, hospitals: int, seed: int) -> list[np.ndarray]:
    """IID partition: random hospitals of equal size, up to whole patients."""
    _enough_patients(patients, hospitals)
    return partition_by_shares(
        patients, np.zeros(len(patients), np.int64), np.full((1, hospitals), 1 / hospitals), seed
    )


def dirichlet_shares(
    patients: np.ndarray,
    classes: np.ndarray,
    hospitals: int,
    alpha: float,
    seed: int,
    minimum: int = 1,
) -> np.ndarray:
    """Label skew: the shares (G, hospitals) of each class from Dirichlet(alpha, …).

    See arXiv 1909.06335. `classes` (N,) int from `row_classes`. Draws are repeated until every
    hospital has at least `minimum` images.
    """
    _enough_patients(patients, hospitals)
    rng = np.random.default_rng([seed, 1])
    groups = int(classes.max(initial=0)) + 1
    for _ in range(ATTEMPTS):
        shares = rng.dirichlet(np.full(hospitals, alpha), size=groups)
        if np.isfinite(shares).all() and all(
            len(rows) >= minimum for rows in partition_by_shares(patients, classes, shares, seed)
        ):
            return shares
    raise DataError(
        f"Dirichlet(alpha = {alpha:g}) leaves one of {hospitals} hospitals under {minimum} images "
        f"in {ATTEMPTS} draws: raise data.alpha or lower federation.hospitals"
    )


def partition_by_shares(
    patients: np.ndarray, classes: np.ndarray, shares: np.ndarray, seed: int
) -> list[np.ndarray]:
    """Divide the patients of each class, in random order, by `shares` (G, hospitals) of its images.

    The midpoint of a patient's images determines its hospital: shares are exact up to one patient.
    """
    codes, sizes, groups = patient_table(patients, classes)
    hospital = np.zeros(len(sizes), np.int64)
    rng = np.random.default_rng([seed, 2])
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        ends = np.cumsum(sizes[members])
        bounds = np.cumsum(shares[group])[:-1] * ends[-1]
        hospital[members] = np.searchsorted(bounds, ends - sizes[members] / 2, side="right")
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


def row_classes(labels: np.ndarray, exclusive: bool) -> np.ndarray:
    """Class of each row of `labels` (N, K): its rarest label over all rows, K for a row without."""
    count, label_dim = labels.shape
    if not label_dim:
        return np.zeros(count, np.int64)
    if exclusive:
        return labels.argmax(axis=1).astype(np.int64)
    frequency = labels.sum(axis=0, dtype=np.int64)
    rarity = np.where(labels > 0, frequency, count + 1)
    return np.where(labels.any(axis=1), rarity.argmin(axis=1), label_dim).astype(np.int64)


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
