"""Train, validation and test splits by patient, never by image.

A hash of (seed, patient) within strata (institution and label) determines the split of a patient,
independent of the row order. Each stratum is divided in proportion, up to whole patients.
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
    institutions: np.ndarray | None = None,
    classes: np.ndarray | None = None,
    given: np.ndarray | None = None,
    seed: int = 0,
    val: float = 0.1,
    test: float = 0.2,
) -> np.ndarray:
    """The split of each row, (N,) str.

    `given` (N,) str is kept; if it has no 'val', the share `val` of the training patients becomes
    val. Without `given`, shares of the patients become test and val, the rest train. Each
    institution is divided separately, its `classes` (N,) int in proportion; a patient belongs to
    its first institution and class in sorted order. A requested split gets at least one patient as
    long as train keeps one; the only patient of a class in an institution stays in train. Raises
    `SplitError` if `given` puts a patient into two splits.
    """
    check_shares(val, test)
    count = len(patients)
    institutions = np.full(count, "") if institutions is None else institutions.astype(str)
    classes = np.zeros(count, np.int64) if classes is None else classes
    codes, institution_codes, groups = _patients(patients, institutions, classes)
    if given is None:
        splits = np.full(count, "train", dtype="<U5")
        testing = _chosen(
            np.arange(len(institution_codes)),
            institution_codes,
            groups,
            patients,
            codes,
            test,
            seed,
            "test",
        )
        splits[np.isin(codes, testing)] = "test"
        share = val / (1 - test)
    else:
        splits = given.astype("<U5")
        check_splits(patients, splits, "the source's own split")
        share = 0.0 if (splits == "val").any() else val
    training = np.unique(codes[splits == "train"])
    splits[
        np.isin(
            codes, _chosen(training, institution_codes, groups, patients, codes, share, seed, "val")
        )
    ] = "val"
    return splits


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends only on the text of `parts`."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _patients(
    patients: np.ndarray, institutions: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patient number per row (N,), institution number and class per patient (P,)."""
    names, codes = np.unique(patients.astype(str), return_inverse=True)
    institution_codes = np.unique(institutions, return_inverse=True)[1]
    order = np.lexsort((classes, institution_codes, codes))
    first = order[np.searchsorted(codes[order], np.arange(len(names)))]
    return codes, institution_codes[first], classes[first]


def _chosen(
    members: np.ndarray,
    institution_codes: np.ndarray,
    groups: np.ndarray,
    patients: np.ndarray,
    codes: np.ndarray,
    share: float,
    seed: int,
    purpose: str,
) -> np.ndarray:
    """About `share` of the patients `members` per institution, in proportion to classes."""
    if share <= 0 or not len(members):
        return np.empty(0, np.int64)
    names = np.empty(len(institution_codes), patients.astype(str).dtype)
    names[codes] = patients
    picked: list[int] = []
    for institution in np.unique(institution_codes[members]):
        here = members[institution_codes[members] == institution]
        kinds, sizes = np.unique(groups[here], return_counts=True)
        several = here[np.isin(groups[here], kinds[sizes > 1])] if len(kinds) > 1 else here
        # Systematic sampling of the list sorted by class: exact shares up to one patient.
        line = sorted(
            several.tolist(),
            key=lambda code: (groups[code], unit_hash(seed, purpose, names[code]), names[code]),
        )
        wanted = min(max(1, round(share * len(here))), len(line), len(here) - 1)
        picked += [line[int((i + 0.5) * len(line) / wanted)] for i in range(wanted)]
    return np.array(picked, np.int64)
