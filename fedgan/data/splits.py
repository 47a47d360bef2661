"""Train, validation and test splits by patient, never by image.

A patient's place is decided by a hash of (seed, patient) within strata (institution and label), so it does not
depend on the order of the rows, and each stratum is divided as nearly in proportion as whole patients allow.
"""

from __future__ import annotations

import hashlib

import numpy as np

from fedgan.data.dataset import OWN_PATIENT, ImageDataset
from fedgan.errors import DataError, SplitError

SPLITS = ("train", "val", "test")


def check_splits(patients: np.ndarray, splits: np.ndarray, where: str) -> None:
    """Raise `SplitError` when a patient is in two splits, `DataError` for a split of another name."""
    unknown = sorted(set(np.unique(splits).tolist()) - set(SPLITS))
    if unknown:
        raise DataError(f"{where}: '{unknown[0]}' is no split: use {', '.join(SPLITS)}")
    pairs = np.unique(np.stack([patients.astype(str), splits.astype(str)]), axis=1)
    _, places = np.unique(pairs[0], return_counts=True)
    twice = int((places > 1).sum())
    if twice:
        raise SplitError(
            f"{where}: {twice} {'patient is' if twice == 1 else 'patients are'} in more than one split: "
            "put all images of a patient into one split, or leave the split out and let the import make it"
        )


def check_patients_apart(train: ImageDataset, *held: ImageDataset) -> None:
    """Raise `SplitError` when a known patient of `train` is also in a held-out set. No patient is named.

    For sets that come from several shards: within a shard `check_splits` has seen to it. A patient id is told apart by the
    image's institution; images whose patient is not known stand for themselves.
    """
    trained = _known_patients(train)
    for other in held:
        if shared := len(trained & _known_patients(other)):
            raise SplitError(
                f"{shared} {'patient' if shared == 1 else 'patients'} of the training images {'is' if shared == 1 else 'are'} "
                f"also in '{other.name}': a figure on those images would be of images that were learnt; "
                "split by patient over all shards before they are imported, or give another evaluation.root"
            )


def _known_patients(dataset: ImageDataset) -> set[tuple[str, str]]:
    count = len(dataset)
    if len(dataset.patients) != count:
        return set()
    places = dataset.institutions if len(dataset.institutions) == count else np.full(count, "")
    pairs = zip(
        np.asarray(places, str).tolist(), np.asarray(dataset.patients, str).tolist(), strict=True
    )
    return {
        (place, patient)
        for place, patient in pairs
        if patient and not patient.startswith(OWN_PATIENT)
    }


def check_shares(val: float, test: float) -> None:
    """Raise `DataError` unless both shares are at least 0 and leave something for train."""
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
        raise DataError(
            f"the split shares val = {val:g} and test = {test:g} must be at least 0 and below 1 together"
        )


def make_splits(
    patients: np.ndarray,
    institutions: np.ndarray | None = None,
    classes: np.ndarray | None = None,
    given: np.ndarray | None = None,
    seed: int = 0,
    val: float = 0.1,
    test: float = 0.2,
) -> np.ndarray:
    """The split of each row, (N,) str.

    `given` (N,) str is kept: test stays test; where it has no 'val', the share `val` of the training patients becomes it.
    Without `given`, shares of the patients: `test`, then `val`, the rest train. Each institution is divided for itself, its
    `classes` (N,) int in proportion; a patient counts for its first institution and class in sorted order. A wanted split gets
    at least one patient as long as train keeps one, and the only patient of a class in an institution stays in train.
    Raises `SplitError` when `given` puts a patient into two splits.
    """
    check_shares(val, test)
    count = len(patients)
    institutions = np.full(count, "") if institutions is None else institutions.astype(str)
    classes = np.zeros(count, np.int64) if classes is None else classes
    codes, homes, groups = _patients(patients, institutions, classes)
    if given is None:
        splits = np.full(count, "train", dtype="<U5")
        testing = _chosen(np.arange(len(homes)), homes, groups, patients, codes, test, seed, "test")
        splits[np.isin(codes, testing)] = "test"
        share = val / (1 - test)
    else:
        splits = given.astype("<U5")
        check_splits(patients, splits, "the source's own split")
        share = 0.0 if (splits == "val").any() else val
    training = np.unique(codes[splits == "train"])
    splits[
        np.isin(codes, _chosen(training, homes, groups, patients, codes, share, seed, "val"))
    ] = "val"
    return splits


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends on the text of `parts` alone."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _patients(
    patients: np.ndarray, institutions: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patient number of each row (N,), and each patient's institution number and class (P,)."""
    names, codes = np.unique(patients.astype(str), return_inverse=True)
    homes = np.unique(institutions, return_inverse=True)[1]
    order = np.lexsort((classes, homes, codes))
    first = order[np.searchsorted(codes[order], np.arange(len(names)))]
    return codes, homes[first], classes[first]


def _chosen(
    members: np.ndarray,
    homes: np.ndarray,
    groups: np.ndarray,
    patients: np.ndarray,
    codes: np.ndarray,
    share: float,
    seed: int,
    purpose: str,
) -> np.ndarray:
    """About `share` of the patients `members` (numbers), institution by institution, spread evenly over classes."""
    if share <= 0 or not len(members):
        return np.empty(0, np.int64)
    names = np.empty(len(homes), patients.astype(str).dtype)
    names[codes] = patients
    picked: list[int] = []
    for home in np.unique(homes[members]):
        here = members[homes[members] == home]
        kinds, sizes = np.unique(groups[here], return_counts=True)
        several = here[np.isin(groups[here], kinds[sizes > 1])] if len(kinds) > 1 else here
        # systematic sampling: every (n / wanted)-th of the list sorted by class gives each class its share to within one patient
        line = sorted(
            several.tolist(),
            key=lambda code: (groups[code], unit_hash(seed, purpose, names[code]), names[code]),
        )
        wanted = min(max(1, round(share * len(here))), len(line), len(here) - 1)
        picked += [line[int((i + 0.5) * len(line) / wanted)] for i in range(wanted)]
    return np.array(picked, np.int64)
