"""The way that all sources share: rows of a table and a stream of pictures become shards.

Every row ends in a shard or in a count with its reason. The output folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedgan.data.dataset import OWN_PATIENT
from fedgan.data.importers.pixels import fit_square
from fedgan.data.labels import LabelMap
from fedgan.data.partitions import row_classes
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

MOST_INSTITUTIONS = 256
SPELLINGS = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
    **{"test": "test", "testing": "test"},
}


@dataclass(frozen=True)
class Skipped:
    """Stands in the stream of pictures for one that cannot be used."""

    reason: str


@dataclass(frozen=True)
class Source:
    """N rows of a source. `patients` and `institutions` may hold "" (unknown); `given` is the source's own split or None.

    `pictures()` gives N pictures in order, (H, W) or (H, W, 3) uint8 or `Skipped`. `size` (width, height) and `colour` are
    those of the first pictures. `skipped` counts what never became a row.
    """

    title: str
    labels: np.ndarray
    label_names: tuple[str, ...]
    exclusive: bool
    patients: np.ndarray
    institutions: np.ndarray
    given: np.ndarray | None
    names: np.ndarray
    pictures: Callable[[], Iterator[np.ndarray | Skipped]]
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
    """What the user may choose for every source. `resolution` 0: as the source; `channels`: auto, grey or rgb."""

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
    """Write one shard for each institution of `source` into the folder `output` and open them, by folder name.

    `on_image(done, total)` is called after each picture. Raises `DataError` when `output` exists and is not empty, for a label
    without a rule and when nothing is left; `SplitError` for a patient in two splits; `StorageError` for a full disk.
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
        taken = _copy_pictures(source, labels, institutions, writers, options, on_image)
        kept = taken.kept
        if not len(kept):
            raise DataError(
                f"no image of {source.title} could be used: {_reasons(source.skipped, taken.skipped)}"
            )
        patients, unknown = _patients(source, taken.twins)
        splits = np.full(len(source), "", dtype="<U5")
        given = None if source.given is None else source.given[kept]
        classes = row_classes(
            source.labels, source.exclusive
        )  # before the map: it must not move the split
        splits[kept] = make_splits(
            patients[kept],
            institutions[kept],
            classes[kept],
            given,
            options.seed,
            options.val,
            options.test,
        )
        shared = _notes(source, splits, taken)
        for name, writer in writers.items():
            rows = kept[institutions[kept] == name]
            if not len(rows):
                continue  # _notes says so
            own = int(unknown[rows].sum())
            skipped = taken.skipped.get(name, Counter()) + (
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
                resize=_resize_text(resolution, options.crop, taken.resized),
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


# --- the pictures --------------------------------------------------------------------------------


@dataclass
class _Taken:
    """What the stream of pictures gave: rows kept, reasons for each institution, and what the card must tell."""

    kept: np.ndarray
    skipped: dict[str, Counter[str]]
    twins: list[tuple[int, int]]  # (row, earlier row with the same pixels), both kept
    resized: int


def _copy_pictures(
    source: Source,
    labels: np.ndarray,
    institutions: np.ndarray,
    writers: Mapping[str, ShardWriter],
    options: ImportOptions,
    on_image: Callable[[int, int], None] | None,
) -> _Taken:
    skip_repeated = (
        source.skip_duplicates if options.duplicates == "auto" else options.duplicates == "skip"
    )
    seen: dict[bytes, tuple[bytes, int]] = {}
    kept: list[int] = []
    taken = _Taken(np.empty(0, np.int64), {name: Counter() for name in writers}, [], 0)
    for row, picture in enumerate(source.pictures()):
        name = str(institutions[row])
        if on_image:
            on_image(row + 1, len(source))
        if isinstance(picture, Skipped):
            taken.skipped[name][picture.reason] += 1
            continue
        digest = hashlib.blake2b(
            repr(picture.shape).encode() + picture.tobytes(), digest_size=16
        ).digest()
        label = labels[row].tobytes()
        if digest in seen:
            if skip_repeated:
                same = seen[digest][0] == label
                taken.skipped[name][
                    "identical pixels" if same else "identical pixels with another label"
                ] += 1
                continue
            taken.twins.append((row, seen[digest][1]))
        seen.setdefault(digest, (label, row))
        writer = writers[name]
        taken.resized += picture.shape[:2] != (writer.resolution, writer.resolution)
        writer.append(fit_square(picture, writer.resolution, writer.channels, options.crop)[None])
        kept.append(row)
    taken.kept = np.array(kept, np.int64)
    return taken


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
            f"the pictures of {source.title} are {width}×{height}, no square of a power of two: "
            f"choose a size, e.g. --resolution {near}"
        )
    return width, channels


# --- the columns ---------------------------------------------------------------------------------


def read_split(text: str) -> str:
    """'train', 'val' or 'test' for the usual spellings, "" for an empty cell. Raises `DataError` for another word."""
    word = text.strip().lower()
    if word and word not in SPELLINGS:
        raise DataError(
            f"'{text[:30]}' is no split: use {', '.join(SPLITS)}, or name another split column"
        )
    return SPELLINGS.get(word, "")


def _patients(source: Source, twins: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Patient of each row (an image without one is its own, together with its copies) and the mask of those without."""
    unknown = source.patients == ""
    numbers = np.arange(len(source))
    for row, first in twins:
        if unknown[row] and unknown[first] and source.given is None:
            numbers[row] = numbers[first]  # copies must not part when the rows are split
    own = np.char.add(OWN_PATIENT, numbers.astype(str))
    return np.where(unknown, own, source.patients), unknown


def _notes(source: Source, splits: np.ndarray, taken: _Taken) -> tuple[str, ...]:
    notes = list(source.notes)
    cut = (
        ""
        if source.given is not None and (source.given == "val").any()
        else "; val was cut from train by patient"
    )
    notes.append(
        "split by patient at import"
        if source.given is None
        else f"the source's own split was kept{cut}"
    )
    notes += [
        f"no image is in the {split} split" for split in SPLITS if not (splits == split).any()
    ]
    if taken.twins:
        notes.append(
            f"images of the source with the pixels of an earlier one, kept: {len(taken.twins)}"
        )
    if apart := sum(bool(splits[row] != splits[first]) for row, first in taken.twins):
        notes.append(
            f"of these, images whose copy is in another split: {apart}; import with --duplicates skip to leave them out"
        )
    used = set(source.institutions[taken.kept].tolist())
    for name, reasons in taken.skipped.items():
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


# --- the place -----------------------------------------------------------------------------------


def _folders(names: list[str]) -> dict[str, str]:
    """A folder name for each institution, distinct even where the letters left over are the same."""
    if len(names) > MOST_INSTITUTIONS:
        raise DataError(
            f"the institution column has {len(names)} values, more than {MOST_INSTITUTIONS}: name another column"
        )
    folders: dict[str, str] = {}
    for name in names:
        plain, number = folder_name(name), 1
        while (folder := plain if number == 1 else f"{plain}-{number}") in folders.values():
            number += 1
        folders[name] = folder
    return folders
