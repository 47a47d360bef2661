"""Image datasets of the Trainer and the evaluator: rows of images with labels."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from fedgan.errors import DataError

UNKNOWN_PATIENT = "image:"  # prefix of the patient id of an image whose patient is not known


class ImageArray(Protocol):
    """Array that returns (n, C, H, W) uint8 for an index array: ndarray, memory map, row view."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Rows:
    """A view of some rows of an image array, read on access."""

    images: ImageArray
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.images.shape[1:])

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return np.asarray(self.images[self.rows[index]])


@dataclass(frozen=True)
class Stacked:
    """Several image arrays, concatenated."""

    parts: Sequence[ImageArray]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        index = np.asarray(index)
        out = np.empty((len(index), *self.shape[1:]), np.uint8)
        start = 0
        for part in self.parts:
            inside = (index >= start) & (index < start + part.shape[0])
            if inside.any():
                out[inside] = part[index[inside] - start]
            start += part.shape[0]
        return out


@dataclass(frozen=True)
class ImageDataset:
    """Images of one hospital (or of several, pooled) with their labels.

    `images` (N, C, H, W) uint8, `labels` (N, K) uint8 multi-hot (K = 0: unconditional),
    `patients` and `institutions` (N,) str. `exclusive`: exactly one label per image.
    """

    name: str
    images: ImageArray
    labels: np.ndarray
    label_names: tuple[str, ...]
    exclusive: bool = True
    patients: np.ndarray = field(default_factory=lambda: np.empty(0, str))
    institutions: np.ndarray = field(default_factory=lambda: np.empty(0, str))
    content_hash: str = ""

    def __post_init__(self) -> None:
        if len(self.labels) != self.images.shape[0] or self.labels.shape[1:] != (
            len(self.label_names),
        ):
            raise DataError(
                f"hospital '{self.name}': {self.images.shape[0]} images, labels of shape "
                f"{self.labels.shape} and {len(self.label_names)} label names do not match: import "
                "the shard again"
            )
        for column in (self.patients, self.institutions):
            if len(column) not in (0, len(self.labels)):
                raise DataError(
                    f"hospital '{self.name}': {len(self.labels)} images and {len(column)} patients "
                    "or institutions do not match: import the shard again"
                )

    def __len__(self) -> int:
        return int(self.images.shape[0])

    @property
    def channels(self) -> int:
        return int(self.images.shape[1])

    @property
    def resolution(self) -> int:
        return int(self.images.shape[2])

    @property
    def label_dim(self) -> int:
        return len(self.label_names)

    def batch(self, index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) uint8 and labels (B, K) float32 of the rows `index`."""
        images = np.ascontiguousarray(self.images[index])
        return torch.from_numpy(images), torch.from_numpy(self.labels[index].astype(np.float32))

    def take(self, rows: np.ndarray, name: str | None = None) -> ImageDataset:
        """A dataset of some rows; images are not copied."""
        return ImageDataset(
            name=name or self.name,
            images=Rows(self.images, np.asarray(rows)),
            labels=self.labels[rows],
            label_names=self.label_names,
            exclusive=self.exclusive,
            patients=self.patients[rows] if len(self.patients) else self.patients,
            institutions=self.institutions[rows] if len(self.institutions) else self.institutions,
            content_hash=self.content_hash,
        )


def pool(datasets: Sequence[ImageDataset], name: str = "pooled") -> ImageDataset:
    """Pool several hospitals into one dataset. Raises `DataError` if labels or sizes differ."""
    first = datasets[0]
    for other in datasets[1:]:
        if (
            other.label_names != first.label_names
            or other.images.shape[1:] != first.images.shape[1:]
        ):
            raise DataError(
                f"hospitals '{first.name}' and '{other.name}' differ in labels or image size: "
                "import both with the same label names, channels and resolution"
            )
    if len(datasets) == 1:
        return first
    return ImageDataset(
        name=name,
        images=Stacked([dataset.images for dataset in datasets]),
        labels=np.concatenate([dataset.labels for dataset in datasets]),
        label_names=first.label_names,
        exclusive=all(dataset.exclusive for dataset in datasets),
        patients=np.concatenate([_filled(each.patients, len(each)) for each in datasets]),
        institutions=np.concatenate([_filled(each.institutions, len(each)) for each in datasets]),
        content_hash="+".join(dataset.content_hash for dataset in datasets),
    )


def unit_names(dataset: ImageDataset) -> np.ndarray:
    """Name (N,) str of each image's unit of privacy: its patient within its institution.

    An image without a patient is a unit of its own, named by its pixels; equal ones are counted. A
    name depends on no other image but such copies. `UNKNOWN_PATIENT` ids are single already.
    """
    names, copies = _patient_names(dataset), Counter[str]()
    for row in np.flatnonzero(names == "").tolist():
        digest = hashlib.sha256(dataset.images[np.array([row])].tobytes()).hexdigest()
        names[row] = f"\x01{digest}:{copies[digest]}"
        copies[digest] += 1
    return names.astype(str)


def unit_numbers(dataset: ImageDataset) -> np.ndarray:
    """Number (N,) from 0 of each image's unit: `unit_names` without reading an image."""
    names = _patient_names(dataset)
    (unknown,) = np.nonzero(names == "")
    names[unknown] = [f"\x01{row}" for row in unknown.tolist()]
    return np.unique(names.astype(str), return_inverse=True)[1].reshape(-1)


def _patient_names(dataset: ImageDataset) -> np.ndarray:
    """Institution and patient (N,) object of each image; "" where the patient is not known."""
    count = len(dataset)
    pairs = zip(
        _filled(dataset.institutions, count).tolist(),
        _filled(dataset.patients, count).tolist(),
        strict=True,
    )
    names = [f"{institution}\x00{patient}" if patient else "" for institution, patient in pairs]
    return np.array(names, dtype=object)


def _filled(column: np.ndarray, count: int) -> np.ndarray:
    """`column` (N,) str, or empty strings where the dataset has none."""
    return column if len(column) == count else np.full(count, "")


class HospitalData(Protocol):
    """Interface of a hospital for evaluation and audit: its name and its splits."""

    @property
    def name(self) -> str: ...

    @property
    def train(self) -> ImageDataset: ...

    @property
    def val(self) -> ImageDataset: ...

    @property
    def test(self) -> ImageDataset: ...
