"""Training and use of the evaluator's classifiers: one recipe for real and synthetic images.

The recipe is fixed beforehand: AdamW, one cosine cycle with warm-up, class-weighted loss, flips and small shifts, the
network after the last step. Nothing is selected on any split, so nothing can leak from the test images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn import functional

from fedgan.data.dataset import ImageArray, ImageDataset
from fedgan.errors import DataError
from fedgan.evaluation.sampling import to_float
from fedgan.models.classifiers import Classifier, build_classifier

BATCH = 64
FORWARD_PIXELS = 256 * 64**2  # pixels that go through a classifier at once when nothing is learnt
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
WARM_UP = 0.2  # share of the steps
MOST_WEIGHT = 100.0  # of a class: keeps a class of two or three images from ruling every batch that it is in
SELECTION = "none: the network after the last step"


def class_weights(labels: np.ndarray, exclusive: bool) -> torch.Tensor:
    """Weights (K,) float32 from the training labels (N, K) of one arm, at most 100.

    Exclusive: N / (classes present × images of the class), for cross-entropy. Otherwise negatives / positives, the
    `pos_weight` of binary cross-entropy. A class without images (or without positives) gets 1; no image carries it.
    """
    positives = labels.sum(0).astype(np.float64)
    present = positives > 0
    if exclusive:
        weights = len(labels) / (max(present.sum(), 1) * np.maximum(positives, 1))
    else:
        weights = (len(labels) - positives) / np.maximum(positives, 1)
    return torch.from_numpy(np.where(present, np.minimum(weights, MOST_WEIGHT), 1.0)).float()


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, exclusive: bool) -> torch.Tensor:
    """Weighted cross-entropy (exclusive) or binary cross-entropy of logits and labels (B, K) with weights (K,); a scalar."""
    if exclusive:
        return functional.cross_entropy(logits, labels.argmax(1), weight=weights)
    return functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights)


def augment(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Flip left to right with probability 1/2 and shift by up to 1/16 of the side, edges repeated; (B, C, H, W) uint8.

    The result lies in memory as channels_last.
    """
    count, _, height, width = images.shape
    most = max(1, height // 16)
    shift = rng.integers(-most, most + 1, size=(2, count, 1))
    rows = np.clip(np.arange(height) + shift[0], 0, height - 1)
    columns = np.clip(np.arange(width) + shift[1], 0, width - 1)
    flipped = rng.random(count) < 0.5
    columns[flipped] = columns[flipped, ::-1]
    pick = torch.arange(count)[:, None, None], torch.from_numpy(rows)[:, :, None], torch.from_numpy(columns)[:, None, :]
    return images.permute(0, 2, 3, 1)[pick].permute(0, 3, 1, 2)


def training_steps(images: int, epochs: int) -> int:
    """Steps of every classifier of an evaluation: `epochs` passes over the `images` of the real training split."""
    return max(1, math.ceil(images * epochs / BATCH))


def train_classifier(
    dataset: ImageDataset,
    steps: int,
    seed: int,
    name: str = "small-cnn",
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Classifier:
    """Train the classifier called `name` for `steps` steps of 64 images; deterministic by `seed` for one thread count.

    Images are shown in random order, each as often as the others. `progress(step, steps)` is called after each step.
    torch's global random state is left as it was. Raises `DataError` for a dataset without images.
    """
    if len(dataset) == 0:
        raise DataError(f"'{dataset.name}' has no image to train a classifier on: check its splits")
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = build_classifier(name, dataset.channels, dataset.resolution, dataset.label_dim)
    classifier = classifier.to(device=torch.device(device), memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    weights = class_weights(dataset.labels, dataset.exclusive).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for step, index in enumerate(_index_stream(len(dataset), steps, rng)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cycle(step / steps)
        images, labels = dataset.batch(index)
        logits = classifier(to_float(augment(images, rng).to(device)))
        loss = classification_loss(logits, labels.to(device), weights, dataset.exclusive)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, steps)
    return classifier.eval()


def cycle(share: float) -> float:
    """Factor of the learning rate after `share` in [0, 1) of the steps: linear warm-up, then half a cosine down to 0."""
    if share < WARM_UP:
        return 0.05 + 0.95 * share / WARM_UP
    return 0.5 * (1.0 + math.cos(math.pi * (share - WARM_UP) / (1.0 - WARM_UP)))


def probabilities(classifier: Classifier, dataset: ImageDataset, device: str = "cpu") -> np.ndarray:
    """Probabilities (N, K) float64 of all images: softmax for exclusive classes, else a sigmoid a label."""
    logits = _forward(classifier.forward, dataset.images, device).double()
    return (logits.softmax(1) if dataset.exclusive else logits.sigmoid()).numpy()


def penultimate(classifier: Classifier, images: ImageArray, device: str = "cpu") -> np.ndarray:
    """Penultimate features (N, D) float64 of images (N, C, H, W) uint8."""
    return _forward(classifier.features, images, device).double().numpy()


def _forward(function: Callable[[torch.Tensor], torch.Tensor], images: ImageArray, device: str) -> torch.Tensor:
    parts = []
    with torch.inference_mode():
        step = max(1, min(256, FORWARD_PIXELS // images.shape[2] ** 2))
        for start in range(0, images.shape[0], step):
            block = torch.from_numpy(np.ascontiguousarray(images[np.arange(start, min(start + step, images.shape[0]))]))
            parts.append(function(to_float(block.to(device)).contiguous(memory_format=torch.channels_last)).float().cpu())
    return torch.cat(parts)


def _index_stream(count: int, steps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`steps` index arrays (64,) cut from one permutation after another."""
    rest = np.empty(0, np.int64)
    for _ in range(steps):
        while len(rest) < BATCH:
            rest = np.concatenate([rest, rng.permutation(count)])
        index, rest = rest[:BATCH], rest[BATCH:]
        yield index
