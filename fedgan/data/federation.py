"""From settings to hospitals: opens shards, applies label map and resolution, and deals them where asked.

data.root holds                   data.partition       hospitals
one folder a hospital             institution          one a shard, named as its card says
one shard                         institution          one, or one an institution of its samples
one shard or several              iid, dirichlet, …    hospital-1 …, each split dealt by patient
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
from fedgan.data.dataset import ImageArray, ImageDataset, pool
from fedgan.data.labels import LabelMap
from fedgan.data.shard import Shard, folder_name
from fedgan.data.shard_files import is_phantom_source
from fedgan.data.splits import SPLITS
from fedgan.errors import ConfigError, DataError

HELD_BYTES = 256 * 2**20
CHUNK_ROWS = 256


@dataclass(frozen=True)
class Hospital:
    """One hospital: its three splits. `dealt`: {split: {shard: rows}} where a pool was dealt, else None.

    `place`: the folder of its shard, where it is one; None for a dealt hospital, which has no place beyond its run.
    `phantoms`: by the cards of its shards all its images are drawn phantoms.
    """

    name: str
    train: ImageDataset
    val: ImageDataset
    test: ImageDataset
    dealt: Mapping[str, Mapping[str, np.ndarray]] | None = field(default=None, compare=False)
    place: Path | None = field(default=None, compare=False)
    phantoms: bool = field(default=False, compare=False)

    def split(self, name: str) -> ImageDataset:
        """The dataset 'train', 'val' or 'test'."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]


@dataclass(frozen=True)
class Reduced:
    """Images at a smaller resolution: the mean over `factor` × `factor` blocks, rounded to the nearest integer.

    What fits into 256 MiB is reduced once, when the first image is asked for; more is reduced batch by batch.
    """

    images: ImageArray
    factor: int

    @property
    def shape(self) -> tuple[int, ...]:
        count, channels, height, width = self.images.shape
        return (count, channels, height // self.factor, width // self.factor)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        if self._held is not None:
            return np.asarray(self._held[index])
        return area_mean(self.images[index], self.factor)

    @functools.cached_property
    def _held(self) -> np.ndarray | None:
        if int(np.prod(self.shape, dtype=np.int64)) > HELD_BYTES:
            return None
        out = np.empty(self.shape, np.uint8)
        for start in range(0, len(out), CHUNK_ROWS):
            rows = np.arange(start, min(start + CHUNK_ROWS, len(out)))
            out[rows] = area_mean(self.images[rows], self.factor)
        return out


def area_mean(images: np.ndarray, factor: int) -> np.ndarray:
    """Mean of `factor` × `factor` blocks of (n, C, H, W) uint8, rounded to nearest (halves up)."""
    n, channels, height, width = images.shape
    blocks = images.reshape(n, channels, height // factor, factor, width // factor, factor)
    sums = blocks.sum(axis=(3, 5), dtype=np.uint32)
    return ((sums + factor * factor // 2) // (factor * factor)).astype(np.uint8)


# --- opening -------------------------------------------------------------------------------------


def open_hospitals(settings: Settings, root: str | Path | None = None) -> list[Hospital]:
    """All hospitals of a scenario that take part (`federation.members`), the largest training split first, then by name.

    `root` takes the place of `settings.data.root`. Raises `ConfigError` when no root is given, `DataError` for shards
    that do not fit together or the settings, and for a class that no hospital holds in its training split.
    """
    shards = open_shards(settings, root)
    if settings.data.partition == "institution":
        hospitals = _natural(shards, settings.federation.hospitals)
        if len(hospitals) != settings.federation.hospitals:
            raise DataError(
                f"federation.hospitals = {settings.federation.hospitals}, but the data holds {len(hospitals)} hospitals: "
                f"add --set federation.hospitals={len(hospitals)}, or deal them anew with --set data.partition=iid"
            )
    else:
        hospitals = _dealt(shards, settings)
    names = [hospital.name for hospital in hospitals]
    if len(set(names)) != len(names):
        raise DataError("two shards carry the same hospital name in card.json: give each its own")
    hospitals.sort(key=lambda hospital: (-len(hospital.train), hospital.name))
    _check_training(hospitals)
    return _members(hospitals, settings.federation.members)


def _members(hospitals: list[Hospital], members: Sequence[str]) -> list[Hospital]:
    """The hospitals that are named, in the order of the list; all where none is. Raises `ConfigError` for an unknown name."""
    known = [hospital.name for hospital in hospitals]
    for name in members:
        if name not in known:
            raise ConfigError(
                f"federation.members names '{name}', but the hospitals are {', '.join(known)}"
            )
    return [hospital for hospital in hospitals if not members or hospital.name in members]


def open_shard(path: str | Path, settings: Settings) -> Shard:
    """One shard with the settings' label map and resolution applied: what a hospital on its own opens."""
    shard = Shard.open(path)
    labels, names = LabelMap.parse(settings.data.label_map).apply(
        shard.labels, shard.card.label_names
    )
    held, wanted = shard.card.resolution, settings.data.resolution
    images: Any = shard.images
    if wanted > held:
        raise DataError(
            f"hospital '{shard.name}' holds images of {held} pixels, data.resolution = {wanted} asks for more: "
            f"add --set data.resolution={held}, or import the source again with --resolution {wanted}"
        )
    if wanted < held:
        images = Reduced(shard.images, held // wanted)
    card = dataclasses.replace(shard.card, label_names=names, resolution=wanted)
    return dataclasses.replace(shard, images=images, labels=labels, card=card)


def open_shards(settings: Settings, root: str | Path | None = None) -> list[Shard]:
    """The shards under `root` (default `settings.data.root`), by folder name, mapped and resized, checked against each other."""
    place = root or settings.data.root
    if not place:
        raise ConfigError(
            "data.root is empty: add --set data.root=FOLDER, a folder that `fedgan data import` wrote"
        )
    shards = [open_shard(path, settings) for path in find_shards(place)]
    first = shards[0]
    for other in shards[1:]:
        for what in ("label_names", "exclusive", "channels"):
            if getattr(other.card, what) != getattr(first.card, what):
                raise DataError(
                    f"hospitals '{first.name}' and '{other.name}' differ in {what}: import both with the same labels and channels"
                )
    return shards


def open_hospital(settings: Settings, path: str | Path) -> Hospital:
    """The hospital of one shard folder, as its own client sees it. Raises `DataError` when it has no training image."""
    shard = open_shard(path, settings)
    hospital = _hospital(
        shard.name, [shard], {split: shard.rows(split) for split in SPLITS}, dealt=False
    )
    if not len(hospital.train):
        raise DataError(
            f"hospital '{hospital.name}' has no image in its training split: nothing can be trained"
        )
    return hospital


def find_shards(root: str | Path) -> list[Path]:
    """`root` itself if it is a shard, else its sub-folders that are, by name. Raises `DataError` when there is none."""
    root = Path(root).expanduser()
    if (root / "card.json").is_file():
        return [root]
    if not root.is_dir():
        raise DataError(
            f"no data at {root}: give a folder that `fedgan data import` or `fedgan data phantoms` wrote"
        )
    found = sorted(
        path.parent for path in root.glob("*/card.json") if not path.parent.name.startswith(".")
    )
    if not found:
        raise DataError(
            f"{root} holds no shard (no sub-folder with a card.json): run `fedgan data import` or `fedgan data phantoms`"
        )
    return found


# --- what is written about them ------------------------------------------------------------------


def describe_hospitals(hospitals: Sequence[Hospital], key: str = "") -> list[dict[str, Any]]:
    """The content of hospitals.json: name, images for each split and label, images, patients, content hash. No patient id.

    `key`: of a private run. Of images that are not drawn phantoms its counts of labels and its hash are null: both are exact
    functions of the images, and no epsilon covers them (who knows all images but one could try candidates for that one by
    the hash). `content_check`, a hash with the key, which is published nowhere, still tells whether the data have changed.
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
        hidden = bool(key) and not hospital.phantoms
        rows.append(
            {
                "name": hospital.name,
                "counts": {split: dict.fromkeys(labels) for split, labels in counts.items()}
                if hidden
                else counts,
                "images": {split: len(data) for split, data in splits.items()},
                "patients": {
                    split: len(np.unique(data.patients)) for split, data in splits.items()
                },
                "content_hash": None if hidden else content,
                **({"content_check": _keyed(key, content + repr(counts))} if hidden else {}),
            }
        )
    return rows


def _keyed(key: str, text: str) -> str:
    return hmac.new(key.encode(), text.encode(), "sha256").hexdigest()


def partition_record(hospitals: Sequence[Hospital]) -> list[dict[str, Any]]:
    """The content of partition.json: for each hospital and split the rows of each shard. Empty when each shard is a hospital."""
    return [
        {
            "name": hospital.name,
            "rows": {
                split: {shard: rows.tolist() for shard, rows in parts.items()}
                for split, parts in hospital.dealt.items()
            },
        }
        for hospital in hospitals
        if hospital.dealt is not None
    ]


# --- dealing -------------------------------------------------------------------------------------


def _natural(shards: Sequence[Shard], wanted: int) -> list[Hospital]:
    """A hospital a shard, or of a single shard one an institution where more than one is wanted."""
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
    return [
        _hospital(shard.name, [shard], {split: shard.rows(split) for split in SPLITS}, dealt=False)
        for shard in shards
    ]


def _dealt(shards: Sequence[Shard], settings: Settings) -> list[Hospital]:
    """One pool of all shards, each split dealt by patient with the same rule."""
    patients = _pooled_patients(shards)
    splits = np.concatenate([shard.samples.splits for shard in shards])
    labels = np.concatenate([shard.labels for shard in shards])
    classes = partitions.row_classes(labels, shards[0].card.exclusive)
    count, data, seed = settings.federation.hospitals, settings.data, settings.data_seed
    rows = {split: np.flatnonzero(splits == split) for split in SPLITS}
    train = rows["train"]
    if not len(train):
        raise DataError(
            "the data has no image in its training split: import it with a train split, or with none at all"
        )
    if data.partition == "iid":
        parts = partitions.iid(patients[train], count, seed)
        shares, groups = np.full((1, count), 1 / count), np.zeros_like(classes)
    elif data.partition == "dirichlet":
        # a hospital holds a batch at least, or a quarter of an even share where there are so few images
        minimum = max(1, min(settings.training.batch_size, len(train) // (4 * count)))
        parts_shares = partitions.dirichlet_shares(
            patients[train], classes[train], count, data.alpha, seed, minimum
        )
        parts = partitions.deal_by_shares(patients[train], classes[train], parts_shares, seed)
        # a class that train does not hold has no share of its own: it is dealt evenly
        missing = max(0, int(classes.max()) + 1 - len(parts_shares))
        shares, groups = (
            np.concatenate([parts_shares, np.full((missing, count), 1 / count)]),
            classes,
        )
    else:
        parts = partitions.fixed_quantities(patients[train], data.quantities, seed)
        shares = np.array([data.quantities], float) / sum(data.quantities)
        groups = np.zeros_like(classes)
    dealt = {"train": [train[part] for part in parts]}
    for split in ("val", "test"):
        held = rows[split]
        dealt[split] = [
            held[part]
            for part in partitions.deal_by_shares(patients[held], groups[held], shares, seed)
        ]
    return [
        _hospital(f"hospital-{n + 1}", shards, {split: dealt[split][n] for split in SPLITS})
        for n in range(count)
    ]


def _pooled_patients(shards: Sequence[Shard]) -> np.ndarray:
    """Patient ids over all shards. Where ids collide over two splits they are numbered per hospital: then the shard is added."""
    ids = np.concatenate([shard.samples.patients for shard in shards])
    splits = np.concatenate([shard.samples.splits for shard in shards])
    pairs = np.unique(np.stack([ids, splits]), axis=1)
    if len(np.unique(pairs[0])) == pairs.shape[1]:
        return ids
    return np.concatenate(
        [np.char.add(f"{number}/", shard.samples.patients) for number, shard in enumerate(shards)]
    )


def _hospital(
    name: str, shards: Sequence[Shard], rows: Mapping[str, np.ndarray], dealt: bool = True
) -> Hospital:
    """A hospital of some rows of the pool of `shards`."""
    pooled = pool([shard.dataset() for shard in shards], name)
    if len(shards) > 1:
        pooled = dataclasses.replace(pooled, patients=_pooled_patients(shards))
    starts = np.cumsum([0, *(len(shard) for shard in shards)])
    record: dict[str, dict[str, np.ndarray]] = {split: {} for split in rows}
    for split, taken in rows.items():
        for shard, start, end in zip(shards, starts[:-1], starts[1:], strict=True):
            inside = taken[(taken >= start) & (taken < end)] - start
            if len(inside):
                record[split][shard.name] = inside
    if dealt:
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
        record if dealt else None,
        None if dealt else shards[0].path,
        phantoms=all(is_phantom_source(shard.card.source) for shard in shards),
    )


def _check_training(hospitals: Sequence[Hospital]) -> None:
    for hospital in hospitals:
        if not len(hospital.train):
            raise DataError(
                f"hospital '{hospital.name}' has no image in its training split: leave it out or import it again"
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
            f"no hospital holds the class '{missing[0]}' in its training split ({len(missing)} in all): "
            "merge it by data.label_map, or import without it"
        )
