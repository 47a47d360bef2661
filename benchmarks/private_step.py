"""A DP-SGD step of D relative to a step without privacy, on the same networks and data.

    python -m benchmarks.private_step RESOLUTION [PRECISION]

One thread and its CPU time, so that other processes disturb the ratio least. Channel base 2048, at
most 64, batch 64. A step draws the batch, synthesises its fakes, computes D's gradient and updates
Adam; with privacy the gradient is per pair, clipped, summed and noised. Neither uses R1,
minibatch-std or augmentation. The Poisson samples have 64 images on average. `gradient_ratio`
compares D's gradient of 64 pairs alone.

Prints one JSON object: medians over alternations of seconds per step (`plain_seconds`,
`private_seconds`), and of the ratio of neighbouring measurements (`ratio`, with its interquartile
range `ratio_low`, `ratio_high`).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fedgan.config import from_dict
from fedgan.data.dataset import ImageDataset
from fedgan.privacy.clipping import clipped_sum
from fedgan.training.losses import discriminator_loss
from fedgan.training.start import begin_training
from fedgan.training.trainer import Trainer

BATCH, IMAGES, CLASSES = 64, 1024, 7
WARM_UP, ALTERNATIONS, LONGEST_SECONDS = 2, 31, 40
SHARED = (
    *(
        "model.channel_base=2048",
        "model.channel_max=64",
        "model.minibatch_std_group=0",
        f"training.batch_size={BATCH}",
    ),
    *("training.r1_gamma=0", "training.labels=uniform", "augment.mode=none"),
)


def make_trainers(resolution: int, precision: str, folder: Path) -> tuple[Trainer, Trainer]:
    """(without privacy, with it), on the same random images. The ledger is in `folder`."""
    rng = np.random.default_rng(0)
    labels = np.eye(CLASSES, dtype=np.uint8)[rng.integers(0, CLASSES, IMAGES)]
    images = rng.integers(0, 256, (IMAGES, 3, resolution, resolution), dtype=np.uint8)
    dataset = ImageDataset("benchmark", images, labels, tuple("abcdefg"))
    keys = [
        *SHARED,
        f"data.resolution={resolution}",
        f"training.precision={precision}",
        "training.device=cpu",
    ]

    def begin(*more: str) -> Trainer:
        settings = from_dict({}, [*keys, *more])
        return begin_training(
            settings,
            dataset,
            planned_images=1e5,
            ledgers=[folder / "ledger.jsonl"],
            run="benchmark",
        )

    return begin(), begin("privacy.noise_multiplier=1")


def plain_step(trainer: Trainer) -> None:
    """One step of D on a shuffled batch."""
    trainer.step._d_main(defaultdict(list))
    trainer.step.steps += 1


def private_step(trainer: Trainer) -> None:
    """One step of D on a Poisson sample."""
    trainer.step._d_main_private(trainer.private)
    trainer.step.steps += 1


def gradients(trainer: Trainer) -> tuple[Callable[[], object], Callable[[], object]]:
    """(D's gradient of one batch, the clipped sum of its pairs' gradients), for the same images."""
    step, streams = trainer.step, trainer.streams
    network = step.discriminator
    real, real_c = trainer.batches.real(streams.host)
    with torch.no_grad():
        fake_c = trainer.batches.generator_labels(len(real), streams.host)
        fake = step._synthesize(step._map(fake_c, streams), streams)
    parameters, units = list(network.parameters()), torch.arange(len(real))

    def plain() -> object:
        fake_logits, real_logits = network(
            torch.cat([fake, real]), torch.cat([fake_c, real_c])
        ).chunk(2)
        return torch.autograd.grad(discriminator_loss(fake_logits, real_logits), parameters)

    def private() -> object:
        return clipped_sum(
            network, discriminator_loss, (fake, fake_c), (real, real_c), units, 1.0, BATCH
        )

    return plain, private


def alternate(one: Callable[[], object], other: Callable[[], object]) -> list[tuple[float, float]]:
    """Seconds of both, alternating which is first; up to `ALTERNATIONS` after a warm-up."""
    found: list[tuple[float, float]] = []
    begun = time.perf_counter()
    while len(found) < WARM_UP + ALTERNATIONS and (
        len(found) < WARM_UP + 3 or time.perf_counter() - begun < LONGEST_SECONDS
    ):
        if len(found) % 2:
            second, first = seconds(other), seconds(one)
        else:
            first, second = seconds(one), seconds(other)
        found.append((first, second))
    return found[WARM_UP:]


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of `work()`."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def measure(resolution: int, precision: str) -> dict[str, float | int | str]:
    """Both comparisons."""
    with tempfile.TemporaryDirectory() as folder:
        plain, private = make_trainers(resolution, precision, Path(folder))
        assert private.private is not None
        private.private.reserve(WARM_UP + ALTERNATIONS)
        steps = alternate(lambda: plain_step(plain), lambda: private_step(private))
    alone = alternate(*gradients(plain))
    ratios = [second / first for first, second in steps]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return {
        "resolution": resolution,
        "precision": precision,
        "batch": BATCH,
        "alternations": len(steps),
        "plain_seconds": statistics.median(first for first, _ in steps),
        "private_seconds": statistics.median(second for _, second in steps),
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "gradient_ratio": statistics.median(second / first for first, second in alone),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "fp32")))
