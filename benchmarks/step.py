"""Training step as a fraction of the best convolution rate of this machine.

    python -m benchmarks.step RESOLUTION PRECISION [THREADS]

Hospitals of a simulation train with one thread each, one per core: THREADS = 1.

Prints one JSON object: images_per_second, gflop_per_image, conv_gflops (the best of several
convolutions of the same precision, measured between the training runs), fraction, and peak memory
of this process.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.flops import FlopCounter
from fedgan.config import from_dict
from fedgan.data.dataset import ImageDataset
from fedgan.training.trainer import Trainer

CONVOLUTIONS = ((16, 64, 32), (16, 64, 64), (16, 128, 32), (32, 256, 16))  # batch, channels, side
REPEATS = 7
LONGEST_SECONDS = 60  # fewer repeats where a precision is slow; at least one
CYCLE = 16  # steps with the right share of every regulariser


def make_trainer(resolution: int, precision: str) -> Trainer:
    """Channel base 2048, at most 64, batch 16, 7 classes, ADA `bgc` at p = 0.3, random images."""
    rng = np.random.default_rng(0)
    labels = np.eye(7, dtype=np.uint8)[rng.integers(0, 7, 512)]
    images = rng.integers(0, 256, (512, 3, resolution, resolution), dtype=np.uint8)
    dataset = ImageDataset("benchmark", images, labels, tuple("abcdefg"))
    keys = [
        f"data.resolution={resolution}",
        f"training.precision={precision}",
        "augment.mode=fixed",
        "augment.p=0.3",
    ]
    return Trainer(
        from_dict(
            {}, [*keys, "model.channel_base=2048", "model.channel_max=64", "training.batch_size=16"]
        ),
        dataset,
    )


def convolution_rate(precision: str) -> float:
    """Best forward rate of 3 × 3 convolutions in operations per second."""
    dtype, best = torch.bfloat16 if precision == "bf16" else torch.float32, 0.0
    with torch.no_grad():
        for batch, channels, side in CONVOLUTIONS:
            x = (
                torch.randn(batch, channels, side, side)
                .to(dtype)
                .contiguous(memory_format=torch.channels_last)
            )
            weight = (
                torch.randn(channels, channels, 3, 3)
                .to(dtype)
                .contiguous(memory_format=torch.channels_last)
            )
            F.conv2d(x, weight, padding=1)
            for _ in range(4):
                begun = time.perf_counter()
                F.conv2d(x, weight, padding=1)
                best = max(
                    best, 2 * 9 * channels**2 * side**2 * batch / (time.perf_counter() - begun)
                )
    return best


def peak_megabytes() -> float:
    """Peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(resolution: int, precision: str) -> dict[str, float]:
    """Medians over up to `REPEATS` alternations of convolutions and training."""
    imported = peak_megabytes()
    trainer = make_trainer(resolution, precision)
    images = CYCLE * trainer.batch_size
    with FlopCounter() as counter:  # the warm-up as well
        trainer.train(images)
    training_peak = peak_megabytes()
    per_image = counter.total / images
    speeds: list[float] = []
    rates: list[float] = []
    begun = time.perf_counter()
    while len(speeds) < REPEATS and (not speeds or time.perf_counter() - begun < LONGEST_SECONDS):
        rates.append(convolution_rate(precision))
        speeds.append(images / trainer.train(images)["seconds"])
    speed, rate = statistics.median(speeds), statistics.median(rates)
    return {
        "resolution": resolution,
        "threads": torch.get_num_threads(),
        "images_per_second": speed,
        "gflop_per_image": per_image / 1e9,
        "conv_gflops": rate / 1e9,
        "fraction": speed * per_image / rate,
        "fraction_low": min(speeds) * per_image / max(rates),
        "fraction_high": max(speeds) * per_image / min(rates),
        "memory_of_imports_mb": imported,
        "memory_of_step_mb": training_peak - imported,
    }


if __name__ == "__main__":
    if len(sys.argv) > 3:
        torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps({"precision": sys.argv[2], **measure(int(sys.argv[1]), sys.argv[2])}))
