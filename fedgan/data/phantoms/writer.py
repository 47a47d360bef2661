"""Phantom hospitals on disk: patients per hospital, label and split, one shard per hospital."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedgan import files
from fedgan.apportion import apportion
from fedgan.data.phantoms import scanners
from fedgan.data.phantoms.canvas import check_resolution
from fedgan.data.phantoms.chest import render_chest
from fedgan.data.phantoms.lesions import render_lesion
from fedgan.data.phantoms.scanners import CHEST_LABELS, LESION_LABELS
from fedgan.data.shard import write_shard
from fedgan.errors import ConfigError, DataError

KINDS = ("lesions", "chest")
TRUTH = "truth.jsonl"
SMALLEST_HOSPITAL = 5  # images
_CHUNK = 64
_SHARES = (0.5, 0.3, 0.2)
_SPLIT_CYCLE = (
    "train", "test", "val", "train", "train", "train", "test", "train", "train", "train"
)  # fmt: skip
_SECOND, _THIRD = 0.30, 0.08  # probability that a film with a finding has a second one, and a third


def write_phantoms(
    root: Path,
    kind: str,
    images: int,
    resolution: int,
    hospitals: int = 3,
    seed: int = 0,
    overwrite: bool = False,
    prefix: str = "",
) -> list[Path]:
    """Render `images` phantoms, write one shard per hospital under `root`, return their folders.

    `kind`: 'lesions' (RGB, one of 7 classes) or 'chest' (grey, any of 5 findings). Three hospitals
    hold exactly 50, 30 and 20 % (rounded to whole images), other numbers of hospitals decreasing
    shares, the largest first. About 70, 10 and 20 % of the patients are in train, val and test; the
    union has every class in each split. `truth.jsonl` beside the shard has the ground truth, one
    object per row. `prefix` begins the names of hospitals and patients, so that phantoms of two
    seeds are different patients. The same arguments give the same bytes; another resolution gives
    the same images. Raises `ConfigError` unless the resolution is a power of two from 16 to 1024
    and for too few images, `DataError` for an unknown kind or an existing shard (unless
    `overwrite`), `StorageError` when the disk is full.
    """
    if kind not in KINDS:
        raise DataError(f"there are no phantoms of kind '{kind}': choose from {', '.join(KINDS)}")
    check_resolution(resolution)
    sizes = hospital_sizes(images, hospitals)
    assigned = assign_patients(kind, sizes, seed)
    label_names = LESION_LABELS if kind == "lesions" else CHEST_LABELS
    names = [prefix + scanners.hospital_name(index) for index in range(hospitals)]
    for folder in (Path(root) / name for name in names):
        if folder.exists() and not overwrite:
            raise DataError(f"{folder} exists already: choose another --output or remove it first")
    shards = []
    for index, (name, patients) in enumerate(zip(names, assigned, strict=True)):
        rows = [
            (number, patient)
            for number, patient in enumerate(patients)
            for _ in range(patient["images"])
        ]
        labels = np.array(
            [[label in patient["labels"] for label in label_names] for _, patient in rows], np.uint8
        )
        truths: list[dict[str, Any]] = []
        shard = write_shard(
            Path(root) / name,
            _render_images(kind, index, rows, resolution, seed, truths),
            labels,
            patients=[f"{name}-{number:05d}" for number, _ in rows],
            splits=[patient["split"] for _, patient in rows],
            sources=[f"phantom:{seed}:{index}:{row}" for row in range(len(rows))],
            label_names=label_names,
            exclusive=kind == "lesions",
            name=name,
            source=f"procedural {kind} phantoms, seed {seed}, hospital {index + 1} of {hospitals}",
            licence="CC0-1.0",
            notes=("Procedural images; they show no person.",),
            overwrite=overwrite,
        )
        files.write_text(
            shard.path / TRUTH,
            "".join(json.dumps({"row": row, **t}) + "\n" for row, t in enumerate(truths)),
        )
        shards.append(shard.path)
    return shards


def hospital_sizes(images: int, hospitals: int) -> list[int]:
    """Images per hospital, decreasing; 50, 30 and 20 % for three.

    Raises `ConfigError` if one would hold too few.
    """
    if hospitals < 1:
        raise ConfigError(f"federation.hospitals = {hospitals}: at least one hospital is needed")
    shares = np.array(_SHARES if hospitals == len(_SHARES) else 0.8 ** np.arange(hospitals))
    exact = shares / shares.sum() * images
    sizes = apportion(exact.tolist(), images, tolerance=1e-9)
    if min(sizes) < SMALLEST_HOSPITAL:
        raise ConfigError(
            f"{images} phantom images are too few for {hospitals} hospitals: the smallest would "
            f"hold {min(sizes)}, it needs {SMALLEST_HOSPITAL}; raise data.phantom_images or lower "
            "federation.hospitals"
        )
    return sizes


def assign_patients(kind: str, sizes: list[int], seed: int) -> list[list[dict[str, Any]]]:
    """The patients of each hospital: `labels` (tuple of names), `images` (1 to 3), `split`.

    Each hospital has its share of each label (of each leading finding for chest films, "" for
    none), to the nearest image. Splits alternate within each label over all hospitals, so the union
    has every label in every split. Raises `ConfigError` if a label has too few patients.
    """
    hospitals: list[list[dict[str, Any]]] = []
    for index, size in enumerate(sizes):
        rng = np.random.default_rng([seed, 1, index])
        mix = scanners.label_mix(kind, index)
        patients = []
        exact = [share * size for share in mix.values()]
        for label, count in zip(mix, apportion(exact, size, tolerance=1e-9), strict=True):
            while count:
                several = min(
                    count, int(rng.choice((1, 2, 3), p=(0.72, 0.20, 0.08))) if count > 6 else 1
                )
                labels = (label,) if kind == "lesions" else _findings(rng, label, mix)
                patients.append({"leading": label, "labels": labels, "images": several})
                count -= several
        hospitals.append([patients[i] for i in rng.permutation(len(patients))])
    _split(hospitals, list(scanners.label_mix(kind, 0)))
    return hospitals


def _findings(rng: np.random.Generator, leading: str, mix: dict[str, float]) -> tuple[str, ...]:
    """The leading finding and, sometimes, other findings of the same patient."""
    chance = rng.random()
    extra = 0 if not leading or chance > _SECOND else 2 if chance < _THIRD else 1
    others = [name for name in mix if name not in ("", leading)]
    weights = np.array([mix[name] for name in others])
    chosen = rng.choice(len(others), extra, replace=False, p=weights / weights.sum())
    return tuple(sorted({leading, *(others[i] for i in chosen)} - {""}))


def _split(hospitals: list[list[dict[str, Any]]], leading: list[str]) -> None:
    """Assign each patient to a split: 7 of 10 to train, 1 to val, 2 to test, per label."""
    for label in leading:
        line = [
            patient for patients in hospitals for patient in patients if patient["leading"] == label
        ]
        if len(line) < 3:
            raise ConfigError(
                f"too few phantom images: a label has {len(line)} patients, but train, val and "
                "test need one each; raise data.phantom_images"
            )
        for patient, split in zip(line, itertools.cycle(_SPLIT_CYCLE)):
            patient["split"] = split
    # A small hospital may lack a split although it has enough patients.
    for patients in hospitals:
        for wanted in ("train", "test", "val"):
            present = [patient["split"] for patient in patients]
            if wanted in present:
                continue
            spare = max(set(present), key=present.count)
            mover = next(p for p in patients if p["split"] == spare and _can_move(hospitals, p))
            mover["split"] = wanted


def _can_move(hospitals: list[list[dict[str, Any]]], patient: dict[str, Any]) -> bool:
    """Whether another patient of the same leading label stays in the patient's split."""
    same = [p for patients in hospitals for p in patients if p["leading"] == patient["leading"]]
    return sum(p["split"] == patient["split"] for p in same) > 1


def _render_images(
    kind: str,
    hospital: int,
    rows: list[tuple[int, dict[str, Any]]],
    resolution: int,
    seed: int,
    truths: list[dict[str, Any]],
) -> Iterator[np.ndarray]:
    """Yield chunks (n, C, R, R) uint8 of one hospital's images; append their truth to `truths`."""
    lesion_look, chest_look = scanners.lesion_look(hospital), scanners.chest_look(hospital)
    chunk = []
    for row, (number, patient) in enumerate(rows):
        image_rng = np.random.default_rng([seed, 2, hospital, row])
        patient_rng = np.random.default_rng([seed, 3, hospital, number])
        if kind == "lesions":
            image, truth = render_lesion(
                patient["leading"], image_rng, resolution, lesion_look, patient_rng
            )
            chunk.append(image.transpose(2, 0, 1))
        else:
            image, truth = render_chest(
                patient["labels"], image_rng, resolution, chest_look, patient_rng
            )
            chunk.append(image[None])
        truths.append(
            {name: value for name, value in truth.items() if not isinstance(value, np.ndarray)}
        )
        if len(chunk) == _CHUNK:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk)
