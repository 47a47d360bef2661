"""The four files of a shard: content, reading, checks and writing."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedgan import files
from fedgan.data.dataset import ImageArray
from fedgan.data.splits import SPLITS
from fedgan.errors import DataError
from fedgan.redact import is_printable, printable

FORMAT = "fedgan-shard-1"
COLUMNS = ("row", "patient", "institution", "split", "source")
PHANTOMS = re.compile(r"procedural \w+ phantoms\b")  # `source` of phantoms (phantoms/writer.py)
HEADER_BYTES = 128
CHUNK_ROWS = 256


@dataclass(frozen=True)
class Samples:
    """Columns of samples.csv: four arrays of N strings."""

    patients: np.ndarray
    institutions: np.ndarray
    splits: np.ndarray
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.patients)


@dataclass(frozen=True)
class Card:
    """Content of card.json. `counts`: {split: {label: images}}; `institutions`: counts of each."""

    name: str
    label_names: tuple[str, ...]
    exclusive: bool
    channels: int
    resolution: int
    images: Mapping[str, int] = field(default_factory=dict)
    patients: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    institutions: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    source: str = ""
    licence: str = ""
    resize: str = ""
    skipped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    content_hash: str = ""


def count_samples(
    labels: np.ndarray, samples: Samples, label_names: Sequence[str]
) -> dict[str, Any]:
    """Fields `images`, `patients`, `counts` and `institutions` of the card.

    An image with several labels counts for each.
    """

    def per_split(rows: np.ndarray) -> dict[str, dict[str, int]]:
        table = {}
        for split in SPLITS:
            positives = labels[rows & (samples.splits == split)].sum(axis=0, dtype=np.int64)
            table[split] = {label: int(n) for label, n in zip(label_names, positives, strict=True)}
        return table

    everything = np.ones(len(labels), bool)
    return {
        "images": {split: int((samples.splits == split).sum()) for split in SPLITS},
        "patients": {
            split: len(np.unique(samples.patients[samples.splits == split])) for split in SPLITS
        },
        "counts": per_split(everything),
        "institutions": {
            str(i): per_split(samples.institutions == i) for i in np.unique(samples.institutions)
        },
    }


def folder_name(name: str) -> str:
    """`name` as a portable folder name of letters, digits, ".", "-", "_"; not empty or hidden."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-")[:64].rstrip(".-") or "hospital"


def check_shard_resolution(resolution: int, where: str) -> None:
    """Raise `DataError` unless `resolution` is a power of two of at least 16."""
    if resolution < 16 or resolution & (resolution - 1):
        raise DataError(
            f"{where}: the resolution {resolution} is no power of two of at least 16: import with "
            "e.g. --resolution 64"
        )


def read_card(path: Path) -> Card:
    """Read `card.json` of the shard in folder `path`. Raises `DataError`."""
    if not path.is_dir():
        raise DataError(
            f"no shard at {path}: give a folder written by `fedgan data import` or "
            "`fedgan data phantoms`"
        )
    file = path / "card.json"
    try:
        tree = files.parse_json(files.read_bytes(file))
        if tree["format"] != FORMAT:
            raise DataError(
                f"{file} has the format '{tree['format']}', this version reads '{FORMAT}': import "
                "the shard again"
            )
        known = {item.name for item in dataclasses.fields(Card)}
        card = Card(**{key: value for key, value in tree.items() if key in known})
        card = dataclasses.replace(
            card, label_names=tuple(map(str, card.label_names)), notes=tuple(card.notes)
        )
        check_shard_resolution(int(card.resolution), str(file))
        if card.name != folder_name(card.name):  # the name becomes a folder of a run
            raise DataError(
                f"{file}: the name must be letters, digits, '.', '-' or '_', e.g. "
                f"'{folder_name(card.name)}'"
            )
    except FileNotFoundError:
        raise DataError(f"{path} is no shard: it has no card.json") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{file} is damaged ({type(error).__name__}): import the shard again"
        ) from None
    return card


def read_array(file: Path, memory_map: bool = False) -> np.ndarray:
    """Read an array file without pickle. Raises `DataError` if missing, truncated or damaged."""
    try:
        return np.load(file, mmap_mode="r" if memory_map else None, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{file} is missing: import the shard again") from None
    except Exception:  # NumPy's parser of headers raises many kinds
        raise DataError(f"{file} is truncated or damaged: import the shard again") from None


def check_labels(
    labels: np.ndarray, count: int, label_names: Sequence[str], exclusive: bool, where: str
) -> None:
    """Raise `DataError` unless `labels` are (count, K) of 0 and 1 that match the card."""
    if labels.dtype != np.uint8 or labels.shape != (count, len(label_names)):
        raise DataError(
            f"{where}: labels of {labels.dtype} {labels.shape} for {count} images and "
            f"{len(label_names)} label names: a label is outside the card, or the file is "
            "truncated; import the shard again"
        )
    if unsafe := [name for name in label_names if not is_printable(name)]:
        raise DataError(
            f"{where}: the label '{printable(unsafe[0])}' has a control, bidi or zero-width "
            "character: rename the label"
        )
    if len(set(label_names)) != len(label_names):
        raise DataError(f"{where}: the card names a label twice: give each label its own name")
    if labels.size and labels.max() > 1:
        raise DataError(
            f"{where}: labels must be 0 or 1 (multi-hot), but one is {labels.max()}: import the "
            "shard again"
        )
    if exclusive and label_names:
        wrong = int((labels.sum(axis=1) != 1).sum())
        if wrong:
            raise DataError(
                f"{where}: {wrong} images do not have exactly one label, but the labels are "
                "exclusive by the card"
            )


def is_phantom_source(source: Any) -> bool:
    """Whether the `source` of a card is a phantom generator."""
    return bool(PHANTOMS.match(str(source)))


def read_samples(file: Path, count: int) -> Samples:
    """Read `samples.csv` with `count` rows in order. Raises `DataError`."""
    try:
        with open(file, newline="", encoding="utf-8") as stream:
            reader = csv.reader(stream)
            header = next(reader, [])
            rows = [row for row in reader if row]
    except FileNotFoundError:
        raise DataError(f"{file} is missing: import the shard again") from None
    except (OSError, UnicodeDecodeError, csv.Error):
        raise DataError(f"{file} is damaged: import the shard again") from None
    if tuple(header) != COLUMNS:
        raise DataError(
            f"{file} must have the columns {', '.join(COLUMNS)}: import the shard again"
        )
    if len(rows) != count or any(
        len(row) != len(COLUMNS) or row[0] != str(i) for i, row in enumerate(rows)
    ):
        raise DataError(
            f"{file} has {len(rows)} rows for {count} images, or rows out of order: import the "
            "shard again"
        )
    _, patients, institutions, splits, sources = (
        np.array(column, dtype=str) for column in zip(*rows, strict=True)
    )
    return Samples(patients, institutions, splits, sources)


def write_samples(file: Path, samples: Samples) -> None:
    """Write `samples.csv`."""
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        columns = (samples.patients, samples.institutions, samples.splits, samples.sources)
        writer.writerows(zip(range(len(samples)), *columns, strict=True))


def npy_header(shape: tuple[int, ...]) -> bytes:
    """A .npy header (format 1.0) of fixed length, so that the final count can replace it."""
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode("latin1")
    return (
        b"\x93NUMPY\x01\x00"
        + (HEADER_BYTES - 10).to_bytes(2, "little")
        + text.ljust(HEADER_BYTES - 11)
        + b"\n"
    )


def chunks(images: ImageArray) -> Iterator[np.ndarray]:
    """The rows of `images` in order, `CHUNK_ROWS` at a time."""
    for start in range(0, images.shape[0], CHUNK_ROWS):
        yield np.asarray(images[np.arange(start, min(start + CHUNK_ROWS, images.shape[0]))])


def finish_hash(digest: Any, shape: tuple[int, ...], labels: np.ndarray, samples: Samples) -> str:
    """Content hash from the `digest` of all image bytes."""
    digest = digest.copy()
    digest.update(json.dumps([list(shape), list(labels.shape)]).encode())
    digest.update(np.ascontiguousarray(labels).tobytes())
    digest.update(json.dumps([samples.patients.tolist(), samples.splits.tolist()]).encode())
    return str(digest.hexdigest())
