"""A shard: the images of one hospital on its own disk.

    images.npy    (N, C, H, W) uint8, read through a memory map
    labels.npy    (N, K) uint8, multi-hot; one-hot when classes exclude each other; K = 0: unconditional
    samples.csv   row, patient, institution, split, source
    card.json     what the shard is: label names, counts, resolution, licence, content hash, skipped files

A shard appears whole or not at all: it is written into a hidden folder beside its place and renamed.
Images go to the disk in a stream, because a store to a memory map of a full disk ends the process
with SIGBUS where `write` gives an error that can be told to the user.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fedgan import files
from fedgan.data.dataset import ImageArray, ImageDataset, Rows
from fedgan.data.splits import SPLITS, check_splits
from fedgan.errors import DataError, FedganError

FORMAT = "fedgan-shard-1"
COLUMNS = ("row", "patient", "institution", "split", "source")
HEADER_BYTES = 128
CHUNK_ROWS = 256


@dataclass(frozen=True)
class Samples:
    """What is known of each image beside its labels: four columns of N strings."""

    patients: np.ndarray
    institutions: np.ndarray
    splits: np.ndarray
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.patients)

    def take(self, rows: np.ndarray) -> Samples:
        """The same columns for some rows."""
        return Samples(self.patients[rows], self.institutions[rows], self.splits[rows], self.sources[rows])


@dataclass(frozen=True)
class Card:
    """What `card.json` says. `counts`: {split: {label: images}}; `institutions`: the same for each institution."""

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


@dataclass(frozen=True)
class Shard:
    """One shard, opened. `images` is a read-only memory map (N, C, H, W) uint8, `labels` (N, K) uint8."""

    path: Path
    card: Card
    images: ImageArray
    labels: np.ndarray
    samples: Samples

    @staticmethod
    def open(path: str | Path, verify: bool = False) -> Shard:
        """Open the shard in folder `path` and check that its files fit together.

        `verify` also reads every image and compares the content hash. Raises `DataError` for a missing,
        truncated or damaged file, a label outside the card or a resolution that is no power of two, and
        `SplitError` for a patient in two splits.
        """
        path = Path(path)
        card = _read_card(path)
        images = _read_array(path / "images.npy", memory_map=True)
        labels = _read_array(path / "labels.npy")
        if images.dtype != np.uint8 or images.shape[1:] != (card.channels, card.resolution, card.resolution):
            raise DataError(
                f"{path / 'images.npy'} holds {images.dtype} of shape {images.shape}, but the card says uint8 of "
                f"(N, {card.channels}, {card.resolution}, {card.resolution}): import the shard again"
            )
        _check_labels(labels, len(images), card.label_names, card.exclusive, str(path))
        samples = _read_samples(path / "samples.csv", len(images))
        check_splits(samples.patients, samples.splits, str(path))
        shard = Shard(path, card, images, labels, samples)
        if verify and shard.hash_content() != card.content_hash:
            raise DataError(f"{path}: the images or labels are not those that the card was written for: import the shard again")
        return shard

    def __len__(self) -> int:
        return int(self.images.shape[0])

    @property
    def name(self) -> str:
        return self.card.name

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of one split, in order."""
        return np.flatnonzero(self.samples.splits == split)

    def dataset(self, split: str | None = None) -> ImageDataset:
        """The images of one split (all when None) as the Trainer sees them, without copying them."""
        rows = np.arange(len(self)) if split is None else self.rows(split)
        return ImageDataset(
            name=self.name,
            images=self.images if split is None else Rows(self.images, rows),
            labels=self.labels[rows],
            label_names=self.card.label_names,
            exclusive=self.card.exclusive,
            patients=self.samples.patients[rows],
            institutions=self.samples.institutions[rows],
            content_hash=self.card.content_hash,
        )

    def hash_content(self) -> str:
        """sha256 over images, labels, and the patient and split columns; paths and names do not enter."""
        digest = hashlib.sha256()
        for chunk in _chunks(self.images):
            digest.update(np.ascontiguousarray(chunk).tobytes())
        return _finish_hash(digest, self.images.shape, self.labels, self.samples)


class ShardWriter:
    """Writes one shard image by image; the folder appears at its place only when `finish` was called.

        with ShardWriter(path, channels=1, resolution=64) as writer:
            writer.append(images)               # (n, 1, 64, 64) uint8, as often as wanted
            shard = writer.finish(labels, samples, name="north", label_names=("normal", "abnormal"))

    Raises `DataError` when `path` exists already (unless `overwrite`) and `StorageError` when the disk is full.
    """

    def __init__(self, path: str | Path, channels: int, resolution: int, overwrite: bool = False) -> None:
        self.path, self.channels, self.resolution, self.overwrite = Path(path), channels, resolution, overwrite
        check_shard_resolution(resolution, str(path))
        if self.path.exists() and not overwrite:
            raise DataError(f"{self.path} exists already: choose another --output or remove it first")
        self.count = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> ShardWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".part"))
            self._stream = open(self.folder / "images.npy", "wb")
            self._stream.write(_npy_header((0, self.channels, self.resolution, self.resolution)))
        except OSError as error:
            raise files.storage_error(self.path, error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._stream.close()
        except OSError as problem:  # what was buffered finds the disk full a second time
            if kind is None:
                raise files.storage_error(self.path, problem) from problem
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def append(self, images: np.ndarray) -> None:
        """Add images (n, C, H, W) uint8 at the end."""
        images = np.ascontiguousarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != (self.channels, self.resolution, self.resolution):
            raise DataError(
                f"{self.path}: images of {images.dtype} {images.shape} do not fit a shard of uint8 "
                f"(n, {self.channels}, {self.resolution}, {self.resolution})"
            )
        data = images.tobytes()
        try:
            self._stream.write(data)
        except OSError as error:
            raise files.storage_error(self.path, error) from error
        self._digest.update(data)
        self.count += len(images)

    def finish(
        self,
        labels: np.ndarray,
        samples: Samples,
        *,
        name: str,
        label_names: Sequence[str],
        exclusive: bool = True,
        source: str = "",
        licence: str = "",
        resize: str = "",
        skipped: Mapping[str, int] | None = None,
        notes: Sequence[str] = (),
    ) -> Shard:
        """Write labels, samples and card, put the folder in its place and open it."""
        labels = np.ascontiguousarray(labels, dtype=np.uint8).reshape(len(labels), len(label_names))
        if not self.count:
            raise DataError(f"{self.path}: no image is left to write; see the reasons of the skipped files")
        if len(samples) != self.count:
            raise DataError(f"{self.path}: {self.count} images and {len(samples)} samples do not fit together")
        _check_labels(labels, self.count, tuple(label_names), exclusive, str(self.path))
        check_splits(samples.patients, samples.splits, str(self.path))
        shape = (self.count, self.channels, self.resolution, self.resolution)
        card = Card(
            name=name,
            label_names=tuple(label_names),
            exclusive=exclusive,
            channels=self.channels,
            resolution=self.resolution,
            **count_samples(labels, samples, label_names),
            source=source,
            licence=licence,
            resize=resize,
            skipped=dict(skipped or {}),
            notes=tuple(notes),
            content_hash=_finish_hash(self._digest, shape, labels, samples),
        )
        try:
            self._stream.seek(0)
            self._stream.write(_npy_header(shape))
            self._stream.flush()
            os.fsync(self._stream.fileno())
            np.save(self.folder / "labels.npy", labels, allow_pickle=False)
            _write_samples(self.folder / "samples.csv", samples)
            files.write_json(self.folder / "card.json", {"format": FORMAT, **dataclasses.asdict(card)})
            self._move_in_place()
        except OSError as error:
            raise files.storage_error(self.path, error) from error
        return Shard.open(self.path)

    def _move_in_place(self) -> None:
        os.chmod(self.folder, 0o755)
        if self.overwrite and self.path.exists():
            old = self.folder.with_suffix(".old")
            os.rename(self.path, old)
            os.rename(self.folder, self.path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(self.folder, self.path)


def write_shard(
    path: str | Path,
    images: ImageArray | Iterable[np.ndarray],
    labels: np.ndarray,
    *,
    patients: Sequence[str] | np.ndarray,
    splits: Sequence[str] | np.ndarray,
    institutions: Sequence[str] | np.ndarray | None = None,
    sources: Sequence[str] | np.ndarray | None = None,
    label_names: Sequence[str],
    exclusive: bool = True,
    name: str | None = None,
    source: str = "",
    licence: str = "",
    resize: str = "",
    skipped: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
    overwrite: bool = False,
) -> Shard:
    """Write a shard to the folder `path` and open it.

    `images`: (N, C, H, W) uint8, anything that gives rows by index, or an iterable of chunks of such rows;
    never more than a chunk is in memory. `labels` (N, K) of 0 and 1; the columns have N entries.
    `name` defaults to the folder's name, `institutions` to `name`. Raises `DataError`, `SplitError`, `StorageError`.
    """
    path = Path(path)
    name = folder_name(name or path.name)
    count = len(labels)
    blank = np.full(count, "", dtype=str)
    samples = Samples(
        patients=np.asarray(patients).astype(str),
        institutions=np.full(count, name) if institutions is None else np.asarray(institutions).astype(str),
        splits=np.asarray(splits).astype(str),
        sources=blank if sources is None else np.asarray(sources).astype(str),
    )
    chunks = _chunks(images) if hasattr(images, "shape") else iter(images)  # type: ignore[arg-type]
    first = next(chunks, None)
    if first is None or first.ndim != 4:
        raise DataError(f"{path}: images must be (N, C, H, W) uint8, at least one")
    with ShardWriter(path, first.shape[1], first.shape[2], overwrite) as writer:
        writer.append(first)
        for chunk in chunks:
            writer.append(chunk)
        return writer.finish(
            labels,
            samples,
            name=name,
            label_names=label_names,
            exclusive=exclusive,
            source=source,
            licence=licence,
            resize=resize,
            skipped=skipped,
            notes=notes,
        )


def count_samples(labels: np.ndarray, samples: Samples, label_names: Sequence[str]) -> dict[str, Any]:
    """The card's `images`, `patients`, `counts` and `institutions`. With several labels an image counts for each."""

    def per_split(rows: np.ndarray) -> dict[str, dict[str, int]]:
        table = {}
        for split in SPLITS:
            positives = labels[rows & (samples.splits == split)].sum(axis=0, dtype=np.int64)
            table[split] = {label: int(n) for label, n in zip(label_names, positives, strict=True)}
        return table

    everything = np.ones(len(labels), bool)
    return {
        "images": {split: int((samples.splits == split).sum()) for split in SPLITS},
        "patients": {split: len(np.unique(samples.patients[samples.splits == split])) for split in SPLITS},
        "counts": per_split(everything),
        "institutions": {str(i): per_split(samples.institutions == i) for i in np.unique(samples.institutions)},
    }


@contextlib.contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` that takes its place when all went well and is removed when not.

    Raises `DataError` when `output` exists and is not empty, and `StorageError` when the disk refuses.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} exists and is not empty: choose another --output or remove it first")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.", suffix=".part"))
    except OSError as error:
        raise files.storage_error(output, error) from error
    try:
        yield stage
        try:
            os.chmod(stage, 0o755)
            os.rename(stage, output)
        except OSError as error:
            raise files.storage_error(output, error) from error
    except FedganError as error:  # the user knows the output, not the folder beside it
        raise type(error)(str(error).replace(str(stage), str(output))) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def folder_name(name: str) -> str:
    """`name` as a folder can be called on any system: letters, digits, dot, dash and underscore; never empty or hidden."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:64] or "hospital"


def check_shard_resolution(resolution: int, where: str) -> None:
    """Raise `DataError` unless `resolution` is a power of two of at least 16."""
    if resolution < 16 or resolution & (resolution - 1):
        raise DataError(
            f"{where}: the resolution {resolution} is no power of two from 16 on: import with --resolution 64 or alike"
        )


# --- the four files ------------------------------------------------------------------------------


def _read_card(path: Path) -> Card:
    if not path.is_dir():
        raise DataError(f"no shard at {path}: give a folder that `fedgan data import` or `fedgan data phantoms` wrote")
    file = path / "card.json"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise DataError(f"{file} has the format '{tree['format']}', this version reads '{FORMAT}': import the shard again")
        known = {item.name for item in dataclasses.fields(Card)}
        card = Card(**{key: value for key, value in tree.items() if key in known})
        card = dataclasses.replace(card, label_names=tuple(map(str, card.label_names)), notes=tuple(card.notes))
        check_shard_resolution(int(card.resolution), str(file))
        if card.name != folder_name(card.name):  # it names folders of a run
            raise DataError(f"{file}: the name must be letters, digits, '.', '-' or '_', e.g. '{folder_name(card.name)}'")
    except FileNotFoundError:
        raise DataError(f"{path} is no shard: it has no card.json") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file} is damaged ({type(error).__name__}): import the shard again") from None
    return card


def _read_array(file: Path, memory_map: bool = False) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r" if memory_map else None, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{file} is missing: import the shard again") from None
    except (OSError, ValueError, EOFError):
        raise DataError(f"{file} is truncated or damaged: import the shard again") from None


def _check_labels(labels: np.ndarray, count: int, label_names: Sequence[str], exclusive: bool, where: str) -> None:
    if labels.dtype != np.uint8 or labels.shape != (count, len(label_names)):
        raise DataError(
            f"{where}: labels of {labels.dtype} {labels.shape} for {count} images and {len(label_names)} label names: "
            "a label stands outside the card, or the file is truncated; import the shard again"
        )
    if len(set(label_names)) != len(label_names):
        raise DataError(f"{where}: the card names a label twice: give each label its own name")
    if labels.size and labels.max() > 1:
        raise DataError(f"{where}: labels must be 0 or 1 (multi-hot), one holds {labels.max()}: import the shard again")
    if exclusive and label_names:
        wrong = int((labels.sum(axis=1) != 1).sum())
        if wrong:
            raise DataError(f"{where}: {wrong} images have not exactly one label, but the card calls labels exclusive")


def _read_samples(file: Path, count: int) -> Samples:
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
        raise DataError(f"{file} must have the columns {', '.join(COLUMNS)}: import the shard again")
    if len(rows) != count or any(len(row) != len(COLUMNS) or row[0] != str(i) for i, row in enumerate(rows)):
        raise DataError(f"{file} has {len(rows)} rows for {count} images, or rows out of order: import the shard again")
    _, patients, institutions, splits, sources = (np.array(column, dtype=str) for column in zip(*rows, strict=True))
    return Samples(patients, institutions, splits, sources)


def _write_samples(file: Path, samples: Samples) -> None:
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        columns = (samples.patients, samples.institutions, samples.splits, samples.sources)
        writer.writerows(zip(range(len(samples)), *columns, strict=True))


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """A .npy header (format 1.0) of always the same length, so that the count can be set after the last image."""
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode("latin1")
    return b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + text.ljust(HEADER_BYTES - 11) + b"\n"


def _chunks(images: ImageArray) -> Iterator[np.ndarray]:
    for start in range(0, images.shape[0], CHUNK_ROWS):
        yield np.asarray(images[np.arange(start, min(start + CHUNK_ROWS, images.shape[0]))])


def _finish_hash(digest: Any, shape: tuple[int, ...], labels: np.ndarray, samples: Samples) -> str:
    digest = digest.copy()
    digest.update(json.dumps([list(shape), list(labels.shape)]).encode())
    digest.update(np.ascontiguousarray(labels).tobytes())
    digest.update(json.dumps([samples.patients.tolist(), samples.splits.tolist()]).encode())
    return str(digest.hexdigest())
