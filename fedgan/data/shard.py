"""A shard: the images of one hospital on its own disk.

    images.npy    (N, C, H, W) uint8, read through a memory map
    labels.npy    (N, K) uint8, multi-hot; one-hot if classes are exclusive; K = 0: unconditional
    samples.csv   row, patient, institution, split, source
    card.json     label names, counts, resolution, licence, content hash, skipped files

Shards are written atomically: into a hidden folder beside the target, which is then renamed. Images
are written as a stream: on a full disk, `write` raises an error, while a store to a memory map ends
the process with SIGBUS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from fedgan import files
from fedgan.data.dataset import ImageArray, ImageDataset, Rows
from fedgan.data.shard_files import (
    FORMAT,
    Card,
    Samples,
    check_labels,
    check_shard_resolution,
    chunks,
    count_samples,
    finish_hash,
    folder_name,
    npy_header,
    read_array,
    read_card,
    read_samples,
    write_samples,
)
from fedgan.data.splits import check_splits
from fedgan.errors import DataError, FedganError

__all__ = [
    "Card",
    "Samples",
    "Shard",
    "ShardWriter",
    "check_shard_resolution",
    "folder_name",
    "staged_folder",
    "write_shard",
]


@dataclass(frozen=True)
class Shard:
    """An open shard: `images` (N, C, H, W) uint8 as read-only memory map, `labels` (N, K) uint8."""

    path: Path
    card: Card
    images: ImageArray
    labels: np.ndarray
    samples: Samples

    @staticmethod
    def open(path: str | Path, verify: bool = False) -> Shard:
        """Open the shard in folder `path` and check that its files match.

        `verify` also reads every image and compares the content hash. Raises `DataError` for a
        missing, truncated or damaged file, a label outside the card or a resolution that is no
        power of two, and `SplitError` for a patient in two splits.
        """
        path = Path(path)
        card = read_card(path)
        images = read_array(path / "images.npy", memory_map=True)
        labels = read_array(path / "labels.npy")
        if images.dtype != np.uint8 or images.shape[1:] != (
            card.channels,
            card.resolution,
            card.resolution,
        ):
            raise DataError(
                f"{path / 'images.npy'} holds {images.dtype} of shape {images.shape}, but the card "
                f"requires uint8 of (N, {card.channels}, {card.resolution}, {card.resolution}): "
                "import the shard again"
            )
        check_labels(labels, len(images), card.label_names, card.exclusive, str(path))
        samples = read_samples(path / "samples.csv", len(images))
        check_splits(samples.patients, samples.splits, str(path))
        shard = Shard(path, card, images, labels, samples)
        if verify and shard.hash_content() != card.content_hash:
            raise DataError(
                f"{path}: images or labels do not match the content hash of the card: import the "
                "shard again"
            )
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
        """Dataset of one split, or of all images if None; images are not copied."""
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
        """sha256 of images, labels, and the patient and split columns, without paths and names."""
        digest = hashlib.sha256()
        for chunk in chunks(self.images):
            digest.update(np.ascontiguousarray(chunk).tobytes())
        return finish_hash(digest, self.images.shape, self.labels, self.samples)


class ShardWriter:
    """Write a shard in chunks of images; `finish` creates the folder.

        with ShardWriter(path, channels=1, resolution=64) as writer:
            writer.append(images)               # (n, 1, 64, 64) uint8, repeatedly
            shard = writer.finish(labels, samples, name="north", label_names=("normal", "abnormal"))

    Raises `DataError` if `path` exists (unless `overwrite`), `StorageError` if the disk is full.
    """

    def __init__(
        self, path: str | Path, channels: int, resolution: int, overwrite: bool = False
    ) -> None:
        self.path, self.channels, self.resolution, self.overwrite = (
            Path(path),
            channels,
            resolution,
            overwrite,
        )
        check_shard_resolution(resolution, str(path))
        if self.path.exists() and not overwrite:
            raise DataError(
                f"{self.path} exists already: choose another --output or remove it first"
            )
        self.count = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> ShardWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(
                tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".part")
            )
            self._stream = open(self.folder / "images.npy", "wb")
            self._stream.write(npy_header((0, self.channels, self.resolution, self.resolution)))
        except OSError as error:
            raise files.storage_error(self.path, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._stream.close()
        except OSError as problem:  # flushing the buffer fails again on a full disk
            if kind is None:
                raise files.storage_error(self.path, problem) from problem
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def append(self, images: np.ndarray) -> None:
        """Append images (n, C, H, W) uint8."""
        images = np.ascontiguousarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != (
            self.channels,
            self.resolution,
            self.resolution,
        ):
            raise DataError(
                f"{self.path}: images of {images.dtype} {images.shape} do not match a shard of "
                f"uint8 (n, {self.channels}, {self.resolution}, {self.resolution})"
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
        """Write labels, samples and card, move the folder to its path and open it."""
        labels = np.ascontiguousarray(labels, dtype=np.uint8).reshape(len(labels), len(label_names))
        if not self.count:
            raise DataError(
                f"{self.path}: there is no image to write; see the reasons of the skipped files"
            )
        if len(samples) != self.count:
            raise DataError(
                f"{self.path}: {self.count} images and {len(samples)} samples do not match"
            )
        check_labels(labels, self.count, tuple(label_names), exclusive, str(self.path))
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
            content_hash=finish_hash(self._digest, shape, labels, samples),
        )
        try:
            self._stream.seek(0)
            self._stream.write(npy_header(shape))
            self._stream.flush()
            os.fsync(self._stream.fileno())
            np.save(self.folder / "labels.npy", labels, allow_pickle=False)
            write_samples(self.folder / "samples.csv", samples)
            files.write_json(
                self.folder / "card.json", {"format": FORMAT, **dataclasses.asdict(card)}
            )
            self._publish()
        except OSError as error:
            raise files.storage_error(self.path, error) from error
        return Shard.open(self.path)

    def _publish(self) -> None:
        files.publish(self.folder)
        if self.overwrite and self.path.exists():
            _copy_other_files(self.path, self.folder)
            old = self.folder.with_suffix(".old")
            os.rename(self.path, old)
            os.rename(self.folder, self.path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(self.folder, self.path)


def _copy_other_files(old: Path, new: Path) -> None:
    """Copy files of the hospital that are not part of a shard, such as its ledger."""
    for path in old.iterdir():
        if (new / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, new / path.name)
        else:
            shutil.copy2(path, new / path.name)


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

    `images`: (N, C, H, W) uint8, an array indexed by rows or an iterable of chunks of rows; at most
    one chunk is in memory. `labels` (N, K) of 0 and 1; the columns have N entries. `name` defaults
    to the folder name, `institutions` to `name`. Raises `DataError`, `SplitError`, `StorageError`.
    """
    path = Path(path)
    name = folder_name(name or path.name)
    count = len(labels)
    blank = np.full(count, "", dtype=str)
    samples = Samples(
        patients=np.asarray(patients).astype(str),
        institutions=np.full(count, name)
        if institutions is None
        else np.asarray(institutions).astype(str),
        splits=np.asarray(splits).astype(str),
        sources=blank if sources is None else np.asarray(sources).astype(str),
    )
    stream = chunks(images) if hasattr(images, "shape") else iter(images)  # type: ignore[arg-type]
    first = next(stream, None)
    if first is None or first.ndim != 4:
        raise DataError(f"{path}: images must be (N, C, H, W) uint8, at least one")
    with ShardWriter(path, first.shape[1], first.shape[2], overwrite) as writer:
        writer.append(first)
        for chunk in stream:
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


@contextlib.contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output`, renamed to it on success and removed on failure.

    Raises `DataError` if `output` exists and is not empty, `StorageError` if writing fails.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(
            f"{output} exists and is not empty: choose another --output or remove it first"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.", suffix=".part"))
    except OSError as error:
        raise files.storage_error(output, error) from error
    try:
        yield stage
        try:
            files.publish(stage)
            os.rename(stage, output)
        except OSError as error:
            raise files.storage_error(output, error) from error
    except FedganError as error:  # errors name the output, not the hidden folder
        raise type(error)(str(error).replace(str(stage), str(output))) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
