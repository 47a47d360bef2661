"""Full evaluation of one arm: 6,300 synthetic images of 64 × 64, six classes, three seeds.

    python -m benchmarks.evaluation [THREADS ...]

Runs once per number of threads; by default with one, as a comparison evaluates an arm (several arms
in parallel), and with all cores, as `fedgan evaluate` does. The images are noise with a class
signal, as many as three real institutions had (5,608 for training, 593 for validation, 1,235 for
tests).

Prints one JSON object: `images`, and in `runs` per number of `threads` the seconds of the real side
(once per comparison) and of one arm, and the rate of classifier training as a share of the same
network's rate on one repeated batch.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from fedgan.config import EvaluationSettings, ModelSettings
from fedgan.data.dataset import ImageDataset
from fedgan.evaluation.classification import BATCH, classification_loss, train_classifier
from fedgan.evaluation.evaluate import evaluate_synthetic
from fedgan.evaluation.reference import RealReference
from fedgan.evaluation.sampling import synthetic_dataset, to_float
from fedgan.machine import usable_cores
from fedgan.models.classifiers import build_classifier
from fedgan.models.stylegan2.generator import Generator

RESOLUTION, IMAGES = 64, 6300
SIZES = {"train": 5608, "val": 593, "test": 1235}
LABELS = tuple(f"class {number}" for number in range(6))
INSTITUTIONS = ("one", "two", "three")
SETTINGS = EvaluationSettings(suite="full", images=IMAGES, seeds=3, epochs=8, bootstrap=1000)
STEPS = 60


def noise(count: int, seed: int) -> ImageDataset:
    """Grey noise whose brightness depends slightly on the class; two images per patient."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(len(LABELS), size=count)
    images = (
        rng.integers(0, 200, (count, 1, RESOLUTION, RESOLUTION), np.uint8)
        + (5 * kind).astype(np.uint8)[:, None, None, None]
    )
    patients = np.array([f"{seed}-{row // 2}" for row in range(count)])
    institutions = np.array(INSTITUTIONS)[np.arange(count) // 2 % len(INSTITUTIONS)]
    return ImageDataset(
        "noise",
        images,
        np.eye(len(LABELS), dtype=np.uint8)[kind],
        LABELS,
        True,
        patients,
        institutions,
    )


def training_share(data: ImageDataset) -> float:
    """Rate of `train_classifier` over the rate of bare steps on one prepared batch."""
    classifier = (
        build_classifier("small-cnn", 1, RESOLUTION, len(LABELS))
        .to(memory_format=torch.channels_last)
        .train()
    )
    images, labels = data.batch(np.arange(BATCH))
    ready, weights = (
        to_float(images).contiguous(memory_format=torch.channels_last),
        torch.ones(len(LABELS)),
    )
    optimizer = torch.optim.AdamW(classifier.parameters(), fused=True)

    def bare() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            classification_loss(classifier(ready), labels, weights, True).backward()
            optimizer.step()

    def whole() -> None:
        train_classifier(data, STEPS, 0)

    return median_ratio(bare, whole)


def bf16_gain(data: ImageDataset) -> float:
    """Speed of `train_classifier` with bf16 over that with fp32."""
    fp32, bf16 = (
        partial(train_classifier, data, STEPS, 0, precision=precision)
        for precision in ("fp32", "bf16")
    )
    return median_ratio(fp32, bf16)


def median_ratio(one: Any, other: Any) -> float:
    """Seconds of `one()` over seconds of `other()`: median of three pairs after a warm-up."""
    rounds = [(seconds(one), seconds(other)) for _ in range(4)][1:]
    return float(np.median([first / second for first, second in rounds]))


def seconds(work: Any) -> float:
    """Wall seconds of `work()`."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def measure(threads: int, data: dict[str, ImageDataset]) -> dict[str, Any]:
    """Seconds of the real side and of one arm with `threads` threads, without caches."""
    torch.set_num_threads(threads)
    reference = RealReference(data["train"], data["val"], data["test"], SETTINGS)
    generator = Generator(ModelSettings(channel_base=1024), RESOLUTION, 1, len(LABELS))
    real = seconds(lambda: (reference.metrics, reference.held_out_features))
    arm = seconds(
        lambda: evaluate_synthetic(
            reference, synthetic_dataset(generator, data["train"], IMAGES, seed=0), generator
        )
    )
    rates = {
        "classifier_share": training_share(data["train"]),
        "bf16_gain": bf16_gain(data["train"]),
    }
    return {"threads": threads, "real_seconds": real, "arm_seconds": arm, **rates}


def main() -> None:
    data = {split: noise(count, number) for number, (split, count) in enumerate(SIZES.items())}
    threads = [int(text) for text in sys.argv[1:]] or sorted({1, usable_cores()})
    print(json.dumps({"images": IMAGES, "runs": [measure(count, data) for count in threads]}))


if __name__ == "__main__":
    main()
