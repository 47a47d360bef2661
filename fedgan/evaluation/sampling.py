"""Sampling from a generator: seeded latents, labels in real proportions, uint8 images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedgan.apportion import apportion
from fedgan.data.dataset import ImageDataset
from fedgan.errors import FedganError

MAX_BATCH_PIXELS = 64 * 64**2


def synthetic_labels(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` label vectors (count, K) uint8 in the proportions of real ones (N, K), shuffled.

    Stratified over whole label vectors, so combinations of findings keep their frequency: each
    vector gets its share by largest remainder and at least one image. With more distinct vectors
    than images, vectors are drawn with replacement.

    The real counts are used without noise and no epsilon of a private run covers them: for
    evaluation inside the run only, not for a set that is released.
    """
    rng = np.random.default_rng(seed)
    labels = np.asarray(labels, np.uint8)
    if labels.shape[1] == 0 or len(labels) == 0:
        return np.zeros((count, labels.shape[1]), np.uint8)
    vectors, counts = np.unique(labels, axis=0, return_counts=True)
    if len(vectors) > count:
        return labels[rng.integers(len(labels), size=count)]
    share = counts / counts.sum() * count
    quota = apportion(share.tolist(), count, minimum=1)
    return rng.permutation(np.repeat(vectors, quota, axis=0))


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images in [-1, 1] to uint8 (same shape): x * 127.5 + 127.5, rounded and clamped."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 images to float32 in [-1, 1]; the inverse of `to_uint8`."""
    return images.float() / 127.5 - 1.0


def draw_latents(count: int, z_dim: int, seed: int) -> torch.Tensor:
    """Latents (count, z_dim), drawn at once on the CPU: equal for any batch size and device."""
    return torch.randn(count, z_dim, generator=torch.Generator("cpu").manual_seed(seed))


def generate_images(
    generator: Any,
    labels: np.ndarray,
    seed: int,
    psi: float = 1.0,
    batch: int = 64,
    device: str = "cpu",
    latents: torch.Tensor | None = None,
) -> np.ndarray:
    """One image (N, C, H, W) uint8 per label vector of `labels` (N, K).

    `generator(z, c, psi=…, noise="const")` gives images in about [-1, 1]; it is moved to `device`
    and its mode (train or eval) is restored. Latents come from `seed` or are given, (N, z_dim), so
    they do not depend on batch size or device; rounding may differ by one grey level between batch
    sizes. Raises `FedganError` for an image that is not finite and for labels that do not fit the
    generator.
    """
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.shape[1] != generator.label_dim:
        raise FedganError(
            f"labels of shape {labels.shape} do not fit a generator of {generator.label_dim} "
            "labels: give one vector per image"
        )
    if len(labels) == 0:
        raise FedganError("no images were requested: give at least one label vector")
    z = draw_latents(len(labels), generator.z_dim, seed) if latents is None else latents
    c = torch.from_numpy(labels.astype(np.float32))
    was_training = generator.training
    generator.to(device).eval()
    # Large images in smaller batches, directly into the result: memory for one batch and the set.
    batch = max(1, min(batch, MAX_BATCH_PIXELS // getattr(generator, "resolution", 1) ** 2))
    made: np.ndarray | None = None
    try:
        with torch.inference_mode():
            for start in range(0, len(labels), batch):
                rows = slice(start, start + batch)
                images = generator(z[rows].to(device), c[rows].to(device), psi=psi, noise="const")
                if not torch.isfinite(images).all():
                    raise FedganError(
                        "the generator gives images that are not finite numbers: training has "
                        "diverged; lower training.learning_rate or use an earlier checkpoint"
                    )
                if made is None:
                    made = np.empty((len(labels), *images.shape[1:]), np.uint8)
                made[rows] = to_uint8(images)
    finally:
        generator.train(was_training)
    assert made is not None
    return made


def synthetic_dataset(
    generator: Any,
    train: ImageDataset,
    count: int,
    seed: int,
    psi: float = 1.0,
    batch: int = 64,
    device: str = "cpu",
) -> ImageDataset:
    """`count` generated images with label vectors in the proportions of the real images `train`."""
    labels = synthetic_labels(train.labels, count, seed)
    images = generate_images(generator, labels, seed, psi, batch, device)
    if images.shape[1:] != tuple(train.images.shape[1:]):
        raise FedganError(
            f"the generator gives images of {images.shape[1:]} (channels, height, width), the real "
            f"ones are {tuple(train.images.shape[1:])}: evaluate with the run's settings"
        )
    return ImageDataset("synthetic", images, labels, train.label_names, train.exclusive)
