"""White-box membership attack on the discriminator (LOGAN, arXiv 1705.07663)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedgan.data.dataset import ImageArray
from fedgan.errors import DataError, FedganError
from fedgan.models.stylegan2.discriminator import Discriminator, Head

BATCH_PIXELS = 256 * 64**2
SINGLE_IMAGE_STD = 1e-4  # minibatch-std of one image: √1e-8


def discriminator_scores(
    discriminator: Discriminator,
    images: ImageArray,
    labels: np.ndarray,
    device: str = "cpu",
    batch: int = 256,
    companions: tuple[ImageArray, np.ndarray] | None = None,
) -> np.ndarray:
    """D's logit (N,) float64 for each image: an overfitted D gives members higher ones.

    `images` (N, C, H, W) uint8, `labels` (N, K). Minibatch-std would make a score depend on the
    other images of the batch, so its channel is fixed for all: the mean over groups of `companions`
    (images, labels; neither members nor non-members under test) or, without any, that of a single
    image. Neither `batch` nor the order of images changes a score, except by rounding. Raises
    `FedganError` for logits that are not finite.
    """
    count = images.shape[0]
    if np.shape(labels) != (count, discriminator.label_dim):
        raise ValueError(
            f"labels {np.shape(labels)} do not fit {count} images and a discriminator of "
            f"{discriminator.label_dim} labels"
        )
    batch = max(1, min(batch, BATCH_PIXELS // max(1, images.shape[2] * images.shape[3])))
    was_training = discriminator.training
    discriminator.to(device).eval()
    try:
        with torch.inference_mode():
            std = (
                _companions_std(discriminator, companions, device)
                if companions is not None
                else SINGLE_IMAGE_STD
            )
            with _fixed_minibatch_std(discriminator, std):
                logits = list(_logits(discriminator, images, labels, device, batch))
    finally:
        discriminator.train(was_training)
    scores = (
        np.concatenate([part.double().cpu().numpy() for part in logits]) if logits else np.zeros(0)
    )
    if not np.isfinite(scores).all():
        raise FedganError(
            "the discriminator gives logits that are not finite: training has diverged; "
            "audit an earlier checkpoint"
        )
    return scores


def _logits(
    discriminator: Discriminator, images: ImageArray, labels: np.ndarray, device: str, batch: int
) -> Iterator[Tensor]:
    """Logits in batches of `batch` images."""
    for start in range(0, images.shape[0], batch):
        rows = np.arange(start, min(start + batch, images.shape[0]))
        pixels = (
            torch.from_numpy(np.ascontiguousarray(images[rows])).to(device).float() / 127.5 - 1.0
        )
        c = torch.from_numpy(np.asarray(labels)[rows].astype(np.float32)).to(device)
        yield discriminator(pixels, c)


def _head(discriminator: Discriminator) -> Head | None:
    """The head with a minibatch-std layer; None if there is none (differential privacy)."""
    head = discriminator.b4
    return head if isinstance(head, Head) and head.group else None


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _fixed_minibatch_std(discriminator: Discriminator, std: float) -> Iterator[None]:
    """Set the channel that minibatch-std appends to `std` for every image."""
    head = _head(discriminator)
    if head is None:
        yield
        return

    def hold(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        x = arguments[0].clone()
        x[:, -1] = std
        return (x,)

    with _hooked(head.conv, hold):
        yield


def _companions_std(
    discriminator: Discriminator, companions: tuple[ImageArray, np.ndarray], device: str
) -> float:
    """Mean minibatch-std over whole groups of companions, 16 groups at once."""
    head = _head(discriminator)
    images, labels = companions
    if head is None:
        return SINGLE_IMAGE_STD
    if images.shape[0] < head.group:
        raise DataError(
            f"{images.shape[0]} companions are fewer than a group of {head.group}: "
            "give more images that were not trained on"
        )
    seen: list[float] = []
    rows = np.arange(images.shape[0] // head.group * head.group)
    with _hooked(
        head.conv, lambda _, arguments: seen.append(float(arguments[0][:, -1].float().mean()))
    ):
        for _ in _logits(
            discriminator, images[rows], np.asarray(labels)[rows], device, 16 * head.group
        ):
            pass
    return float(np.mean(seen))
