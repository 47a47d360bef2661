"""Import of any source: a table of rows and a stream of images become shards.

Every row is in a shard or in a count with its reason. The output folder is written atomically.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedgan.data.dataset import UNKNOWN_PATIENT
from fedgan.data.importers.pixels import fit_square
from fedgan.data.labels import LabelMap
from fedgan.data.shard import (
    Samples,
    Shard,
    ShardWriter,
    check_shard_resolution,
    folder_name,
    staged_folder,
)
from fedgan.data.splits import SPLITS, check_shares, make_splits
from fedgan.errors import DataError

MAX_INSTITUTIONS = 256
SPLIT_NAMES = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
    **{"test": "test", "testing": "test"},
}


@dataclass(frozen=True)
class Skipped:
    """Replaces an image that cannot be used in the stream of images."""

    reason: str


@dataclass(frozen=True)
class Source:
    """N rows of a source. `patients` and `institutions` may be "" (unknown).

    `given`: the split of the source or None. `images()` yields N images in order, (H, W) or (H, W,
    3) uint8 or `Skipped`. `size` (width, height) and `colour` describe the first images. `skipped`
    counts files without a row, by reason.
    """

    title: str
    labels: np.ndarray
    label_names: tuple[str, ...]
    exclusive: bool
    patients: np.ndarray
    institutions: np.ndarray
    given: np.ndarray | None
    names: np.ndarray
    images: Callable[[], Iterator[np.ndarray | Skipped]]
    size: tuple[int, int]
    colour: bool
    licences: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    skip_duplicates: bool = True

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImportOptions:
    """Options of an import. `resolution` 0: that of the source; `channels`: auto, grey or rgb."""

    resolution: int = 0
    channels: str = "auto"
    crop: bool = False
    label_map: str = ""
    duplicates: str = "auto"
    val: float = 0.1
    test: float = 0.2
    seed: int = 0
    licence: str = ""


def import_source(
    source: Source,
    output: str | Path,
    options: ImportOptions | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> list[Shard]:
    """Write one shard per institution of `source` into the folder `output`; return them by name.

    `on_image(done, total)` is called after each image. Raises `DataError` if `output` exists and is
    not empty, for a label without a rule and if no image is left; `SplitError` for a patient in two
    splits; `StorageError` for a full disk.
    """
    options, output = options or ImportOptions(), Path(output).expanduser()
    labels, label_names = LabelMap.parse(options.label_map).apply(source.labels, source.label_names)
    resolution, channels = _target(source, options)
    institutions = np.where(source.institutions == "", "unknown", source.institutions)
    folders = _folders(np.unique(institutions).tolist())
    with staged_folder(output) as stage, contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(ShardWriter(stage / folder, channels, resolution))
            for name, folder in folders.items()
        }
        copied = _copy_images(source, labels, institutions, writers, options, on_image)
        kept = copied.kept
        if not len(kept):
            raise DataError(
                f"no image of {source.title} could be used: "
                f"{_reasons(source.skipped, copied.skipped)}"
            )
        patients, unknown = _patients(source, copied.digests)
        splits = np.full(len(source), "", dtype="<U5")
        given = None if source.given is None else source.given[kept]
        splits[kept] = make_splits(patients[kept], given, options.seed, options.val, options.test)
        shared = _notes(source, splits, copied)
        for name, writer in writers.items():
            rows = kept[institutions[kept] == name]
            if not len(rows):
                continue  # recorded by _notes
            own = int(unknown[rows].sum())
            skipped = copied.skipped.get(name, Counter()) + (
                Counter(source.skipped) if len(writers) == 1 else Counter()
            )
            writer.finish(
                labels[rows],
                Samples(patients[rows], institutions[rows], splits[rows], source.names[rows]),
                name=folders[name],
                label_names=label_names,
                exclusive=source.exclusive,
                source=source.title,
                licence=options.licence or source.licences.get(name, ""),
                resize=_resize_text(resolution, options.crop, copied.resized),
                skipped=dict(sorted(skipped.items())),
                notes=(
                    *shared,
                    *([f"images without a patient id, each its own patient: {own}"] if own else []),
                ),
            )
    return [
        Shard.open(output / folder)
        for folder in sorted(folders.values())
        if (output / folder).is_dir()
    ]


# --- images --------------------------------------------------------------------------------------


@dataclass
class _Copied:
    """Result of copying the images: rows kept, skip reasons per institution, facts for the card.

    `digests` (N,) str: hash of each image's pixels, "" where it was skipped.
    """

    kept: np.ndarray
    digests: np.ndarray
    skipped: dict[str, Counter[str]]
    duplicates_kept: list[tuple[int, int]]  # (row, earlier row with the same pixels), both kept
    resized: int


def _copy_images(
    source: Source,
    labels: np.ndarray,
    institutions: np.ndarray,
    writers: Mapping[str, ShardWriter],
    options: ImportOptions,
    on_image: Callable[[int, int], None] | None,
) -> _Copied:
    skip_repeated = (
        source.skip_duplicates if options.duplicates == "auto" else options.duplicates == "skip"
    )
    seen: dict[bytes, tuple[bytes, int]] = {}
    kept: list[int] = []
    digests = np.full(len(source), "", dtype="<U32")
    copied = _Copied(np.empty(0, np.int64), digests, {name: Counter() for name in writers}, [], 0)
    for row, image in enumerate(source.images()):
        name = str(institutions[row])
        if on_image:
            on_image(row + 1, len(source))
        if isinstance(image, Skipped):
            copied.skipped[name][image.reason] += 1
            continue
        digest = hashlib.blake2b(
            repr(image.shape).encode() + image.tobytes(), digest_size=16
        ).digest()
        label = labels[row].tobytes()
        if digest in seen:
            if skip_repeated:
                is_same_label = seen[digest][0] == label
                copied.skipped[name][
                    "identical pixels" if is_same_label else "identical pixels with another label"
                ] += 1
                continue
            copied.duplicates_kept.append((row, seen[digest][1]))
        seen.setdefault(digest, (label, row))
        writer = writers[name]
        copied.resized += image.shape[:2] != (writer.resolution, writer.resolution)
        writer.append(fit_square(image, writer.resolution, writer.channels, options.crop)[None])
        digests[row] = digest.hex()
        kept.append(row)
    copied.kept = np.array(kept, np.int64)
    return copied


def _target(source: Source, options: ImportOptions) -> tuple[int, int]:
    """Resolution and channels of the shards."""
    if options.channels not in ("auto", "grey", "rgb"):
        raise DataError(f"channels = '{options.channels}' must be auto, grey or rgb")
    if options.duplicates not in ("auto", "skip", "keep"):
        raise DataError(f"duplicates = '{options.duplicates}' must be auto, skip or keep")
    check_shares(options.val, options.test)
    channels = (
        3 if options.channels == "rgb" or (options.channels == "auto" and source.colour) else 1
    )
    if options.resolution:
        check_shard_resolution(options.resolution, "--resolution")
        return options.resolution, channels
    width, height = source.size
    if width != height or width < 16 or width & (width - 1):
        near = 2 ** int(np.clip(round(np.log2(max(1, min(width, height)))), 4, 10))
        raise DataError(
            f"the images of {source.title} are {width}×{height}, not square with a power of two: "
            f"choose a size, e.g. --resolution {near}"
        )
    return width, channels


# --- columns -------------------------------------------------------------------------------------


def read_split(text: str) -> str:
    """Parse 'train', 'val' or 'test' in common spellings; "" if empty. Raises `DataError`."""
    word = text.strip().lower()
    if word and word not in SPLIT_NAMES:
        raise DataError(
            f"'{text[:30]}' is no split: use {', '.join(SPLITS)}, or name another split column"
        )
    return SPLIT_NAMES.get(word, "")


def _patients(source: Source, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Patient per row, and the mask of unknown patients: an image and its copies are one.

    The id of an unknown patient is a hash of the pixels, not the row's number, which changes with
    the rows before it. Copies in different splits of the source are different patients.
    """
    unknown = source.patients == ""
    own = np.char.add(UNKNOWN_PATIENT, digests)
    if source.given is not None:
        own = np.char.add(np.char.add(own, ":"), source.given.astype(str))
    return np.where(unknown, own, source.patients), unknown


def _notes(source: Source, splits: np.ndarray, copied: _Copied) -> tuple[str, ...]:
    notes = list(source.notes)
    val_note = (
        ""
        if source.given is not None and (source.given == "val").any()
        else "; val was taken from train by patient"
    )
    notes.append(
        "split by patient at import"
        if source.given is None
        else f"the split of the source was kept{val_note}"
    )
    notes += [
        f"no image is in the {split} split" for split in SPLITS if not (splits == split).any()
    ]
    if copied.duplicates_kept:
        notes.append(
            f"images with the pixels of an earlier image, kept: {len(copied.duplicates_kept)}"
        )
    if separated := sum(
        bool(splits[row] != splits[first]) for row, first in copied.duplicates_kept
    ):
        notes.append(
            f"of these, images whose copy is in another split: {separated}; import with "
            "--duplicates skip to leave them out"
        )
    used = set(source.institutions[copied.kept].tolist())
    for name, reasons in copied.skipped.items():
        if reasons and name not in used and not (name == "unknown" and "" in used):
            notes.append(f"institution '{name}' has no usable image: {_reasons(reasons, {})}")
    return tuple(notes)


def _reasons(
    before: Mapping[str, int], during: Mapping[str, Mapping[str, int]] | Mapping[str, int]
) -> str:
    total = Counter(before)
    for reasons in during.values():
        total.update(reasons if isinstance(reasons, Mapping) else {})
    return (
        ", ".join(f"{reason} ({count})" for reason, count in total.most_common()) or "it has none"
    )


def _resize_text(resolution: int, crop: bool, resized: int) -> str:
    if not resized:
        return "none: the source has this size"
    shape = "central square" if crop else "aspect ratio not preserved"
    return f"LANCZOS (Pillow) to {resolution}×{resolution}, {shape}"


# --- folders -------------------------------------------------------------------------------------


def _folders(names: list[str]) -> dict[str, str]:
    """A unique folder name per institution."""
    if len(names) > MAX_INSTITUTIONS:
        raise DataError(
            f"the institution column has {len(names)} values, more than {MAX_INSTITUTIONS}: name "
            "another column"
        )
    folders: dict[str, str] = {}
    for name in names:
        plain, number = folder_name(name), 1
        while (folder := plain if number == 1 else f"{plain}-{number}") in folders.values():
            number += 1
        folders[name] = folder
    return folders
