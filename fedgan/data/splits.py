"""Train, validation and test splits by patient, never by image.

Each patient is assigned alone, by a hash of (seed, purpose, patient): whoever else is in the table
changes nothing. Only so does ε speak about one patient (docs/explanation/privacy.md). The price:
shares are those of a random draw, and a small hospital may get no test patient.
"""

from __future__ import annotations

import hashlib

import numpy as np

from fedgan.data.dataset import UNKNOWN_PATIENT, ImageDataset
from fedgan.errors import DataError, SplitError

SPLITS = ("train", "val", "test")


def check_splits(patients: np.ndarray, splits: np.ndarray, where: str) -> None:
    """Raise `SplitError` if a patient is in two splits, `DataError` for another split name."""
    unknown = sorted(set(np.unique(splits).tolist()) - set(SPLITS))
    if unknown:
        raise DataError(f"{where}: '{unknown[0]}' is no split: use {', '.join(SPLITS)}")
    pairs = np.unique(np.stack([patients.astype(str), splits.astype(str)]), axis=1)
    _, counts = np.unique(pairs[0], return_counts=True)
    twice = int((counts > 1).sum())
    if twice:
        patients_are = "patient is" if twice == 1 else "patients are"
        raise SplitError(
            f"{where}: {twice} {patients_are} in more than one split: "
            "put all images of a patient into one split, or omit the split so that the import "
            "makes it"
        )


def check_disjoint_patients(train: ImageDataset, *held: ImageDataset) -> None:
    """Raise `SplitError` if a known patient of `train` is also in a held-out set.

    For sets from several shards; `check_splits` covers a single shard. Patients are identified by
    institution and patient id; images without a known patient are not compared. The message names
    no patient.
    """
    trained = _known_patients(train)
    for other in held:
        if shared := len(trained & _known_patients(other)):
            patients, are = ("patient", "is") if shared == 1 else ("patients", "are")
            raise SplitError(
                f"{shared} {patients} of the training images {are} also in '{other.name}', so "
                "figures would include training patients; split by patient over all shards before "
                "import, or give another evaluation.root"
            )


def _known_patients(dataset: ImageDataset) -> set[tuple[str, str]]:
    count = len(dataset)
    if len(dataset.patients) != count:
        return set()
    institutions = (
        dataset.institutions if len(dataset.institutions) == count else np.full(count, "")
    )
    pairs = zip(
        np.asarray(institutions, str).tolist(),
        np.asarray(dataset.patients, str).tolist(),
        strict=True,
    )
    return {
        (institution, patient)
        for institution, patient in pairs
        if patient and not patient.startswith(UNKNOWN_PATIENT)
    }


def check_shares(val: float, test: float) -> None:
    """Raise `DataError` unless both shares are at least 0 and their sum is below 1."""
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
        raise DataError(
            f"the split shares val = {val:g} and test = {test:g} must be at least 0 and their sum "
            "below 1"
        )


def make_splits(
    patients: np.ndarray,
    given: np.ndarray | None = None,
    seed: int = 0,
    val: float = 0.1,
    test: float = 0.2,
) -> np.ndarray:
    """The split of each row, (N,) str; it depends on the row's own patient and `given` alone.

    `given` (N,) str is kept; if it has no 'val', the share `val` of the training patients becomes
    val. Without `given`, the shares `test` and `val` of the patients, in expectation, become test
    and val, the rest train. Raises `SplitError` if `given` puts a patient into two splits.
    """
    check_shares(val, test)
    if given is None:
        splits = np.full(len(patients), "train", dtype="<U5")
        splits[unit_hashes(patients, seed, "test") < test] = "test"
        share = val / (1 - test)
    else:
        splits = given.astype("<U5")
        check_splits(patients, splits, "the source's own split")
        share = 0.0 if (splits == "val").any() else val
    splits[(splits == "train") & (unit_hashes(patients, seed, "val") < share)] = "val"
    return splits


def unit_hashes(names: np.ndarray, *key: object) -> np.ndarray:
    """`unit_hash` of `key` and each of `names` (N,) str, (N,) float64."""
    found, rows = np.unique(names.astype(str), return_inverse=True)
    return np.array([unit_hash(*key, name) for name in found.tolist()], float)[rows.reshape(-1)]


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends only on the text of `parts`."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
