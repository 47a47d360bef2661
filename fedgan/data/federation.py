"""Open the hospitals of a scenario: shards, label map, resolution and partition.

data.root contains              data.partition       hospitals
one folder per hospital         institution          one per shard, with the name in its card
one shard                       institution          one, or one per institution of its samples
one shard or several            iid, dirichlet, …    hospital-1 …, each split partitioned by patient
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedgan.config import Settings
from fedgan.data import partitions
from fedgan.data.dataset import ImageArray, ImageDataset, pool, unit_names, unit_numbers
from fedgan.data.labels import LabelMap
from fedgan.data.shard import Shard, folder_name
from fedgan.data.shard_files import is_phantom_source
from fedgan.data.splits import SPLITS
from fedgan.errors import ConfigError, DataError

CACHE_BYTES = 256 * 2**20
CHUNK_ROWS = 256


@dataclass(frozen=True)
class Hospital:
    """One hospital with its three splits.

    `repartitioned`: {split: {shard: rows}} if it is a part of a pool, else None. `shards`: the
    folders of the shards that its images come from. `phantoms`: all its images are phantoms, by
    the cards of its shards.
    """

    name: str
    train: ImageDataset
    val: ImageDataset
    test: ImageDataset
    repartitioned: Mapping[str, Mapping[str, np.ndarray]] | None = field(
        default=None, compare=False
    )
    shards: tuple[Path, ...] = field(default=(), compare=False)
    phantoms: bool = field(default=False, compare=False)

    @property
    def shard_path(self) -> Path | None:
        """Its shard; None for a part of a pool, which exists only in its run."""
        return self.shards[0] if self.repartitioned is None and self.shards else None

    def split(self, name: str) -> ImageDataset:
        """The dataset 'train', 'val' or 'test'."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]


@dataclass(frozen=True)
class Downsampled:
    """Images at a lower resolution: means of `factor` × `factor` blocks, rounded to nearest.

    Up to 256 MiB are computed once, at the first access; larger arrays are computed per batch.
    """

    images: ImageArray
    factor: int

    @property
    def shape(self) -> tuple[int, ...]:
        count, channels, height, width = self.images.shape
        return (count, channels, height // self.factor, width // self.factor)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        if self._cached is not None:
            return np.asarray(self._cached[index])
        return block_mean(self.images[index], self.factor)

    @functools.cached_property
    def _cached(self) -> np.ndarray | None:
        if int(np.prod(self.shape, dtype=np.int64)) > CACHE_BYTES:
            return None
        out = np.empty(self.shape, np.uint8)
        for start in range(0, len(out), CHUNK_ROWS):
            rows = np.arange(start, min(start + CHUNK_ROWS, len(out)))
            out[rows] = block_mean(self.images[rows], self.factor)
        return out


def block_mean(images: np.ndarray, factor: int) -> np.ndarray:
    """Mean of `factor` × `factor` blocks of (n, C, H, W) uint8, rounded to nearest (halves up)."""
    n, channels, height, width = images.shape
    blocks = images.reshape(n, channels, height // factor, factor, width // factor, factor)
    sums = blocks.sum(axis=(3, 5), dtype=np.uint32)
    return ((sums + factor * factor // 2) // (factor * factor)).astype(np.uint8)


# --- opening -------------------------------------------------------------------------------------


def open_hospitals(settings: Settings, root: str | Path | None = None) -> list[Hospital]:
    """Open the hospitals that take part (`federation.members`), the largest training split first.

    Equal sizes are sorted by name. `root` replaces `settings.data.root`. Raises `ConfigError` if no
    root is given, `DataError` for shards that do not match each other or the settings, and for a
    class without a training image in any hospital.
    """
    shards = open_shards(settings, root)
    if settings.data.partition == "institution":
        hospitals = _natural(shards, settings.federation.hospitals)
        if len(hospitals) != settings.federation.hospitals:
            raise DataError(
                f"federation.hospitals = {settings.federation.hospitals}, but the data has "
                f"{len(hospitals)} hospitals: add --set federation.hospitals={len(hospitals)}, or "
                "partition the pooled data with --set data.partition=iid"
            )
    else:
        hospitals = _repartition(shards, settings)
    names = [hospital.name for hospital in hospitals]
    if len(set(names)) != len(names):
        raise DataError(
            "two shards have the same hospital name in card.json: give each its own name"
        )
    hospitals.sort(key=lambda hospital: (-len(hospital.train), hospital.name))
    _check_training(hospitals)
    return _members(hospitals, settings.federation.members)


def _members(hospitals: list[Hospital], members: Sequence[str]) -> list[Hospital]:
    """The hospitals named in `members`; all if it is empty. Raises `ConfigError` if unknown."""
    known = [hospital.name for hospital in hospitals]
    for name in members:
        if name not in known:
            raise ConfigError(
                f"federation.members names '{name}', but the hospitals are {', '.join(known)}"
            )
    return [hospital for hospital in hospitals if not members or hospital.name in members]


def open_shard(path: str | Path, settings: Settings) -> Shard:
    """Open one shard and apply the label map and resolution of the settings."""
    shard = Shard.open(path)
    labels, names = LabelMap.parse(settings.data.label_map).apply(
        shard.labels, shard.card.label_names
    )
    held, wanted = shard.card.resolution, settings.data.resolution
    images: Any = shard.images
    if wanted > held:
        raise DataError(
            f"hospital '{shard.name}' has images of {held} pixels, fewer than data.resolution = "
            f"{wanted}: add --set data.resolution={held}, or import the source again with "
            f"--resolution {wanted}"
        )
    if wanted < held:
        images = Downsampled(shard.images, held // wanted)
    card = dataclasses.replace(shard.card, label_names=names, resolution=wanted)
    return dataclasses.replace(shard, images=images, labels=labels, card=card)


def open_shards(settings: Settings, root: str | Path | None = None) -> list[Shard]:
    """Open and compare the shards under `root` (default `settings.data.root`), by folder name."""
    folder = root or settings.data.root
    if not folder:
        raise ConfigError(
            "data.root is empty: add --set data.root=FOLDER, the output of `fedgan data import`"
        )
    shards = [open_shard(path, settings) for path in find_shards(folder)]
    first = shards[0]
    for other in shards[1:]:
        for what in ("label_names", "exclusive", "channels"):
            if getattr(other.card, what) != getattr(first.card, what):
                raise DataError(
                    f"hospitals '{first.name}' and '{other.name}' differ in {what}: import both "
                    "with the same labels and channels"
                )
    return shards


def open_hospital(settings: Settings, path: str | Path) -> Hospital:
    """Open the hospital of one shard folder. Raises `DataError` if it has no training image."""
    shard = open_shard(path, settings)
    hospital = _whole_shard(shard)
    if not len(hospital.train):
        raise DataError(
            f"hospital '{hospital.name}' has no image in its training split, so it cannot train"
        )
    return hospital


def find_shards(root: str | Path) -> list[Path]:
    """`root` if it is a shard, else its shard sub-folders by name. Raises `DataError` if none."""
    root = Path(root).expanduser()
    if (root / "card.json").is_file():
        return [root]
    if not root.is_dir():
        raise DataError(
            f"no data at {root}: give a folder written by `fedgan data import` or "
            "`fedgan data phantoms`"
        )
    found = sorted(
        path.parent for path in root.glob("*/card.json") if not path.parent.name.startswith(".")
    )
    if not found:
        raise DataError(
            f"{root} holds no shard (no sub-folder with a card.json): run `fedgan data import` or "
            "`fedgan data phantoms`"
        )
    return found


# --- hospitals.json and partition.json -----------------------------------------------------------


def describe_hospitals(hospitals: Sequence[Hospital], key: str = "") -> list[dict[str, Any]]:
    """Content of hospitals.json: name, counts per split and label, images, patients, content hash.

    `key`: secret of a private run; its label counts and hash are null unless all images are
    phantoms. Both are exact functions of the images that no epsilon covers: with the hash and all
    images but one, candidates for the last image can be tested. `content_check`, a hash with the
    unpublished key, detects changed data. No patient id is written.
    """
    rows = []
    for hospital in hospitals:
        splits = {split: hospital.split(split) for split in SPLITS}
        counts = {
            split: {
                label: int(n)
                for label, n in zip(
                    data.label_names, data.labels.sum(axis=0, dtype=np.int64), strict=True
                )
            }
            for split, data in splits.items()
        }
        content = hospital.train.content_hash
        check = hmac.new(key.encode(), (content + repr(counts)).encode(), "sha256")
        is_hidden = bool(key) and not hospital.phantoms
        rows.append(
            {
                "name": hospital.name,
                "counts": {split: dict.fromkeys(labels) for split, labels in counts.items()}
                if is_hidden
                else counts,
                "images": {split: len(data) for split, data in splits.items()},
                "patients": {
                    split: len(np.unique(unit_numbers(data))) for split, data in splits.items()
                },
                "content_hash": None if is_hidden else content,
                **({"content_check": check.hexdigest()} if is_hidden else {}),
            }
        )
    return rows


def partition_record(hospitals: Sequence[Hospital]) -> list[dict[str, Any]]:
    """Content of partition.json: rows per hospital, split and shard; empty for whole shards."""
    return [
        {
            "name": hospital.name,
            "rows": {
                split: {shard: rows.tolist() for shard, rows in parts.items()}
                for split, parts in hospital.repartitioned.items()
            },
        }
        for hospital in hospitals
        if hospital.repartitioned is not None
    ]


# --- partitioning --------------------------------------------------------------------------------


def _natural(shards: Sequence[Shard], wanted: int) -> list[Hospital]:
    """One hospital per shard; of a single shard one per institution if several are wanted."""
    if len(shards) == 1 and wanted > 1:
        shard = shards[0]
        names, parts = partitions.by_institution(shard.samples.institutions)
        if len(names) > 1:
            splits = shard.samples.splits
            return [
                _hospital(
                    folder_name(name),
                    [shard],
                    {split: rows[splits[rows] == split] for split in SPLITS},
                )
                for name, rows in zip(names, parts, strict=True)
            ]
    return [_whole_shard(shard) for shard in shards]


def _whole_shard(shard: Shard) -> Hospital:
    rows = {split: shard.rows(split) for split in SPLITS}
    return _hospital(shard.name, [shard], rows, repartitioned=False)


def _repartition(shards: Sequence[Shard], settings: Settings) -> list[Hospital]:
    """Pool all shards and partition each split by patient with the same rule."""
    patients = unit_names(pool([shard.dataset() for shard in shards]))
    splits = np.concatenate([shard.samples.splits for shard in shards])
    classes = partitions.row_classes(np.concatenate([shard.labels for shard in shards]))
    card = shards[0].card
    count, data, seed = settings.federation.hospitals, settings.data, settings.data_seed
    rows = {split: np.flatnonzero(splits == split) for split in SPLITS}
    train = rows["train"]
    if not len(train):
        raise DataError(
            "the data has no image in its training split: import it with a train split or without "
            "any split"
        )
    groups, shares = np.zeros_like(classes), np.full((1, count), 1 / count)
    if data.partition == "iid":
        parts = partitions.iid(patients[train], count, seed)
    elif data.partition == "dirichlet":
        with_none = 0 if card.exclusive else 1  # the class of images without a label
        kinds = max(1, len(card.label_names) + with_none)
        groups, shares = classes, partitions.dirichlet_shares(kinds, count, data.alpha, seed)
        parts = partitions.partition_by_shares(patients[train], groups[train], shares, seed)
    else:
        parts = partitions.fixed_quantities(patients[train], data.quantities, seed)
        shares = np.array([data.quantities], float) / sum(data.quantities)
    split_rows = {"train": [train[part] for part in parts]}
    for split in ("val", "test"):
        held = rows[split]
        split_rows[split] = [
            held[part]
            for part in partitions.partition_by_shares(patients[held], groups[held], shares, seed)
        ]
    return [
        _hospital(f"hospital-{n + 1}", shards, {split: split_rows[split][n] for split in SPLITS})
        for n in range(count)
    ]


def _hospital(
    name: str, shards: Sequence[Shard], rows: Mapping[str, np.ndarray], repartitioned: bool = True
) -> Hospital:
    """The hospital with some rows of the pool of `shards`."""
    pooled = pool([shard.dataset() for shard in shards], name)
    starts = np.cumsum([0, *(len(shard) for shard in shards)])
    record: dict[str, dict[str, np.ndarray]] = {split: {} for split in rows}
    for split, taken in rows.items():
        for shard, start, end in zip(shards, starts[:-1], starts[1:], strict=True):
            inside = taken[(taken >= start) & (taken < end)] - start
            if len(inside):
                record[split][shard.name] = inside
    if repartitioned:
        digest = hashlib.sha256(pooled.content_hash.encode())
        for split in SPLITS:
            digest.update(np.ascontiguousarray(rows[split], dtype="<i8").tobytes() + b"|")
        pooled = dataclasses.replace(pooled, content_hash=digest.hexdigest())
    parts = {split: pooled.take(rows[split], name) for split in SPLITS}
    return Hospital(
        name,
        parts["train"],
        parts["val"],
        parts["test"],
        record if repartitioned else None,
        tuple(shard.path for shard in shards),
        phantoms=all(is_phantom_source(shard.card.source) for shard in shards),
    )


def _check_training(hospitals: Sequence[Hospital]) -> None:
    for hospital in hospitals:
        if not len(hospital.train):
            raise DataError(
                f"hospital '{hospital.name}' has no image in its training split: leave it out or "
                "import it again; a hospital of a partition may get some by another data.seed"
            )
    held = np.sum(
        [hospital.train.labels.sum(axis=0, dtype=np.int64) for hospital in hospitals], axis=0
    )
    missing = [
        name
        for name, count in zip(hospitals[0].train.label_names, np.atleast_1d(held), strict=True)
        if not count
    ]
    if missing:
        raise DataError(
            f"no hospital holds the class '{missing[0]}' in its training split ({len(missing)} in "
            "all): merge it by data.label_map, or import without it"
        )
