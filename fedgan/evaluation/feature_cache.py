"""Cache of real features on disk, by content of the images and by extractor.

An entry is a `.npy` of features and, written after it, a `.json` with its sha256. It holds no
image, patient or path. Features are computed from real images, so the folder must stay where those
images may be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

from fedgan import files
from fedgan.data.dataset import ImageArray
from fedgan.evaluation.features import Extractor

FORMAT = 1  # increase when an extractor changes its preprocessing
BLOCK_BYTES = 1 << 24  # of images that are hashed at once


def images_hash(images: ImageArray) -> str:
    """sha256 (hex) of shape and bytes of images (N, C, H, W) uint8, in blocks (memory maps)."""
    digest = hashlib.sha256(" ".join(map(str, images.shape)).encode())
    step = max(1, BLOCK_BYTES // max(1, int(np.prod(images.shape[1:]))))
    for start in range(0, images.shape[0], step):
        block = images[np.arange(start, min(start + step, images.shape[0]))]
        digest.update(np.ascontiguousarray(block, np.uint8).data)
    return digest.hexdigest()


class FeatureCache:
    """A folder of features, created with the first entry. Entries may be deleted at any time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def get(
        self, images_hash: str, extractor_key: str, compute: Callable[[], np.ndarray]
    ) -> np.ndarray:
        """Cached features (N, D) of these images and this extractor, else those of `compute()`.

        A damaged, partial or foreign entry is replaced. Raises `StorageError` where the folder
        cannot be written.
        """
        path = self.path(images_hash, extractor_key)
        kept = _read(path, images_hash, extractor_key)
        if kept is not None:
            return kept
        features = np.ascontiguousarray(compute(), np.float64)
        stream = BytesIO()
        np.save(stream, features, allow_pickle=False)
        data = stream.getvalue()
        files.write_bytes(path, data)
        files.write_json(path.with_suffix(".json"), _entry(data, images_hash, extractor_key))
        return features

    def features(self, images: ImageArray, extractor: Extractor) -> np.ndarray:
        """Features (N, D) float64 of images (N, C, H, W) uint8, cached or computed."""
        return self.get(images_hash(images), extractor.key, lambda: extractor(images))

    def path(self, images_hash: str, extractor_key: str) -> Path:
        """The `.npy` of an entry, whether it exists or not."""
        key = hashlib.sha256(f"{FORMAT} {images_hash} {extractor_key}".encode()).hexdigest()
        return self.folder / f"{key}.npy"


def _entry(data: bytes, images_hash: str, extractor_key: str) -> dict[str, object]:
    """The JSON beside the features `data`; an array that does not match it is ignored."""
    sha256 = hashlib.sha256(data).hexdigest()
    return {"format": FORMAT, "images": images_hash, "extractor": extractor_key, "sha256": sha256}


def _read(path: Path, images_hash: str, extractor_key: str) -> np.ndarray | None:
    """The features of an entry; None if absent, damaged, or of other images or extractor."""
    try:
        entry = files.parse_json(files.read_bytes(path.with_suffix(".json")))
        data = path.read_bytes()
        if entry != _entry(data, images_hash, extractor_key):
            return None
        features: np.ndarray = np.load(BytesIO(data), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return features
