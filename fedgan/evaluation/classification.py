"""Training and inference of the evaluator's classifiers, one recipe for real and synthetic images.

AdamW, one cosine cycle with warm-up, class-weighted loss, flips and small shifts, equally many
steps for synthetic and real images. With a validation split the result is the best of a few fixed
points of the schedule, otherwise the network after the last step. The caller provides the split:
real validation images for real training images, held-back synthetic ones (`split_for_validation`)
for synthetic training images, so no real image selects a synthetic-only classifier. Test images are
never used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional

from fedgan.data.dataset import UNKNOWN_PATIENT, ImageArray, ImageDataset
from fedgan.errors import DataError
from fedgan.evaluation.mixing import stratified_rows
from fedgan.evaluation.sampling import to_float
from fedgan.models.classifiers import Classifier, build_classifier

BATCH = 64
FORWARD_PIXELS = 256 * 64**2  # per batch of inference
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
WARM_UP = 0.2  # share of the steps
MAX_CLASS_WEIGHT = 100.0  # or a class of two or three images would dominate its batches
CHECKS = 8  # of the validation loss, evenly spaced over the second half of the steps
PATIENCE = 4  # checks without a lower loss after which training stops
SYNTHETIC_VALIDATION = 0.1  # share of a synthetic set that is held back for validation
SELECTION = "none: the network after the last step"
SELECTION_BY_VALIDATION = (
    f"the network with the lowest class-weighted loss on the validation images at {CHECKS} checks, "
    f"evenly spaced over the second half of the steps; training stops after {PATIENCE} checks "
    "without a lower one"
)


def class_weights(labels: np.ndarray, exclusive: bool) -> torch.Tensor:
    """Class weights (K,) float32 from training labels (N, K), at most 100.

    Exclusive: N / (classes present × images of the class), for cross-entropy. Otherwise negatives /
    positives, the `pos_weight` of binary cross-entropy. A class without images (or positives) gets
    1.
    """
    positives = labels.sum(0).astype(np.float64)
    present = positives > 0
    if exclusive:
        weights = len(labels) / (max(present.sum(), 1) * np.maximum(positives, 1))
    else:
        weights = (len(labels) - positives) / np.maximum(positives, 1)
    return torch.from_numpy(np.where(present, np.minimum(weights, MAX_CLASS_WEIGHT), 1.0)).float()


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, exclusive: bool
) -> torch.Tensor:
    """Weighted (binary) cross-entropy of logits and labels (B, K) with weights (K,)."""
    if exclusive:
        return functional.cross_entropy(logits, labels.argmax(1), weight=weights)
    return functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights)


def augment(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Random flip (p = 1/2), shift by up to 1/16 of the side, edges repeated; (B, C, H, W) uint8.

    The result is channels_last in memory.
    """
    count, channels, height, width = images.shape
    most = max(1, height // 16)
    shift = most + rng.integers(-most, most + 1, size=(2, count, 1))[:, :, 0]
    flipped = rng.random(count) < 0.5
    # Slices of the padded batch: several times as fast as a gather by index, also in one thread.
    padded = np.pad(
        images.numpy(), ((0, 0), (0, 0), (most, most), (most, most)), mode="edge"
    ).transpose(0, 2, 3, 1)
    out = np.empty((count, height, width, channels), np.uint8)
    for row, (top, left, flip) in enumerate(zip(*shift.tolist(), flipped.tolist(), strict=True)):
        window = padded[row, top : top + height, left : left + width]
        out[row] = window[:, ::-1] if flip else window
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def training_steps(images: int, epochs: int) -> int:
    """Steps of every classifier: `epochs` passes over the `images` of the real training split."""
    return max(1, math.ceil(images * epochs / BATCH))


def split_for_validation(
    dataset: ImageDataset, share: float = SYNTHETIC_VALIDATION, seed: int = 0
) -> tuple[ImageDataset, ImageDataset]:
    """A synthetic set divided into (training, validation), stratified by label vector, not copied.

    `share` in (0, 0.5] of the images whose label vector occurs more than once; the only image of a
    vector stays in training. Raises `DataError` for images with known patients (which are split by
    patient at import), for another share and for fewer than two images.
    """
    patients = (str(patient) for patient in dataset.patients)
    if any(patient and not patient.startswith(UNKNOWN_PATIENT) for patient in patients):
        raise DataError(
            f"'{dataset.name}' has patients: a split by image would separate their images; "
            "use its validation split"
        )
    if not 0 < share <= 0.5 or len(dataset) < 2:
        raise DataError(
            f"a share of {share:g} of {len(dataset)} images cannot be held back: "
            "give at least two images and a share up to 0.5"
        )
    _, kind, counts = np.unique(dataset.labels, axis=0, return_inverse=True, return_counts=True)
    several = np.flatnonzero(counts[kind.reshape(-1)] > 1)
    if len(several) == 0:
        several = np.arange(len(dataset))
    kept = several[
        stratified_rows(dataset.labels[several], max(1, int(share * len(several))), seed)
    ]
    rest = np.setdiff1d(np.arange(len(dataset)), kept)
    return dataset.take(rest), dataset.take(kept, f"{dataset.name}, held back")


def train_classifier(
    dataset: ImageDataset,
    steps: int,
    seed: int,
    name: str = "small-cnn",
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    validation: ImageDataset | None = None,
    checks: int = CHECKS,
    precision: str = "fp32",
) -> Classifier:
    """Train the classifier `name` for `steps` steps of 64 images; deterministic per thread count.

    Images come in random order, equally often. With `validation` images the result is the network
    of the check with the lowest `validation_loss`, and training ends after `PATIENCE` checks
    without a lower one (`SELECTION_BY_VALIDATION`); the steps themselves do not change. `precision`
    "bf16": training activations in bfloat16 (autocast); weights, loss, validation and inference
    stay float32. `progress(step, steps)` is called after each step. torch's global random state is
    restored. Raises `DataError` for a dataset without images, and for validation images that are
    empty or have other labels.
    """
    if len(dataset) == 0:
        raise DataError(f"'{dataset.name}' has no image to train a classifier: check its splits")
    if validation is not None and (
        len(validation) == 0 or validation.label_names != dataset.label_names
    ):
        raise DataError(
            f"'{validation.name}' cannot validate a classifier of '{dataset.name}': "
            "give images with the same labels"
        )
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = build_classifier(name, dataset.channels, dataset.resolution, dataset.label_dim)
    classifier = classifier.to(
        device=torch.device(device), memory_format=torch.channels_last
    ).train()  # type: ignore[call-overload]
    weights = class_weights(dataset.labels, dataset.exclusive).to(device)
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    best, checked = _Best(), check_steps(steps, checks)
    for step, index in enumerate(_index_stream(len(dataset), steps, rng)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cycle(step / steps)
        images, labels = dataset.batch(index)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            logits = classifier(to_float(augment(images, rng).to(device)))
        logits = logits.float()
        loss = classification_loss(logits, labels.to(device), weights, dataset.exclusive)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, steps)
        if validation is not None and step + 1 in checked:
            best.update(validation_loss(classifier, validation, weights, device), classifier)
            if best.misses >= PATIENCE:
                break
    if best.weights:
        classifier.load_state_dict(best.weights)
    return classifier.eval()


def check_steps(steps: int, checks: int = CHECKS) -> frozenset[int]:
    """Steps (from 1) of the validation checks: `checks` in the second half, including the last."""
    return frozenset(round(steps * (0.5 + 0.5 * (check + 1) / checks)) for check in range(checks))


def validation_loss(
    classifier: Classifier, validation: ImageDataset, weights: torch.Tensor, device: str = "cpu"
) -> float:
    """Training loss with class weights (K,) over all validation images, not augmented."""
    classifier.eval()
    logits = _forward(classifier.forward, validation.images, device)
    classifier.train()
    labels = torch.from_numpy(validation.labels.astype(np.float32))
    return float(classification_loss(logits, labels, weights.cpu(), validation.exclusive))


@dataclass
class _Best:
    """The weights with the lowest loss so far, and the number of checks since."""

    loss: float = math.inf
    misses: int = 0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def update(self, loss: float, classifier: Classifier) -> None:
        if loss < self.loss:
            self.loss, self.misses = loss, 0
            self.weights = {
                key: value.detach().clone() for key, value in classifier.state_dict().items()
            }
        else:
            self.misses += 1


def cycle(share: float) -> float:
    """Factor of the learning rate at `share` in [0, 1) of the steps: warm-up, cosine to 0."""
    if share < WARM_UP:
        return 0.05 + 0.95 * share / WARM_UP
    return 0.5 * (1.0 + math.cos(math.pi * (share - WARM_UP) / (1.0 - WARM_UP)))


def probabilities(classifier: Classifier, dataset: ImageDataset, device: str = "cpu") -> np.ndarray:
    """Probabilities (N, K) float64: softmax if exclusive, else one sigmoid per label."""
    logits = _forward(classifier.forward, dataset.images, device).double()
    return (logits.softmax(1) if dataset.exclusive else logits.sigmoid()).numpy()


def penultimate(classifier: Classifier, images: ImageArray, device: str = "cpu") -> np.ndarray:
    """Penultimate features (N, D) float64 of images (N, C, H, W) uint8."""
    return _forward(classifier.features, images, device).double().numpy()


def _forward(
    function: Callable[[torch.Tensor], torch.Tensor], images: ImageArray, device: str
) -> torch.Tensor:
    parts = []
    with torch.inference_mode():
        step = max(1, min(256, FORWARD_PIXELS // images.shape[2] ** 2))
        for start in range(0, images.shape[0], step):
            block = torch.from_numpy(
                np.ascontiguousarray(images[np.arange(start, min(start + step, images.shape[0]))])
            )
            parts.append(
                function(to_float(block.to(device)).contiguous(memory_format=torch.channels_last))
                .float()
                .cpu()
            )
    return torch.cat(parts)


def _index_stream(count: int, steps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`steps` index arrays (64,), cut from consecutive permutations."""
    rest = np.empty(0, np.int64)
    for _ in range(steps):
        while len(rest) < BATCH:
            rest = np.concatenate([rest, rng.permutation(count)])
        index, rest = rest[:BATCH], rest[BATCH:]
        yield index
