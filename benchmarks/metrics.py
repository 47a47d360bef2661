"""Kernel distance and PRDC of two large feature sets, relative to bare matrix products.

    python -m benchmarks.metrics [IMAGES] [FEATURES]

Kernel distance, then precision, recall, density and coverage, of IMAGES × IMAGES × FEATURES (10000,
512). Prints one JSON object: seconds of each, peak memory beyond the features, and the fraction:
the time of the five distance matrices (two for the kernel, by symmetry, and three for PRDC) as bare
float32 products, measured in the same run, over the time of the metrics.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fedgan.evaluation.metrics.kernel_distance import kernel_distance
from fedgan.evaluation.metrics.prdc import prdc
from fedgan.machine import peak_memory

MATRICES = 5
ROWS = 1024  # of one reference product: enough for the best rate
REPEATS = 3


def features(images: int, width: int, shift: float, seed: int) -> np.ndarray:
    """Rectified random features (images, width) float64 near a 32-dimensional subspace."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(0).normal(size=(32, width)) / 6
    return np.maximum(rng.normal(size=(images, 32)) @ basis + 0.5 + shift, 0) + 0.05 * rng.normal(
        size=(images, width)
    )


def product_rate(images: int, width: int) -> float:
    """Operations per second of a float32 product (ROWS, width) × (width, images)."""
    a, b, out = torch.rand(ROWS, width), torch.rand(images, width), torch.empty(ROWS, images)
    torch.mm(a, b.t(), out=out)
    start = time.perf_counter()
    for _ in range(4):
        torch.mm(a, b.t(), out=out)
    return 4 * 2.0 * ROWS * images * width / (time.perf_counter() - start)


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds of a call, and its result."""
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def measure(images: int = 10_000, width: int = 512) -> dict[str, Any]:
    """Medians over `REPEATS` alternations of bare products and metrics."""
    real, synthetic = features(images, width, 0.0, 1), features(images, width, 0.03, 2)
    product_rate(256, width)  # exclude the memory of the libraries' first use
    before = peak_memory()
    kernel_times, prdc_times, rates = [], [], []
    scores: dict[str, float] = {}
    for repeat in range(REPEATS):
        seconds, value = timed(kernel_distance, real, synthetic)
        kernel_times.append(seconds)
        seconds, scores = timed(prdc, real, synthetic)
        prdc_times.append(seconds)
        if repeat == 0:
            memory = (peak_memory() - before) / 2**20
        rates.append(product_rate(images, width))
    total = statistics.median(map(sum, zip(kernel_times, prdc_times, strict=True)))
    rate = statistics.median(rates)
    return {
        "images": images,
        "features": width,
        "threads": torch.get_num_threads(),
        "kernel_seconds": statistics.median(kernel_times),
        "prdc_seconds": statistics.median(prdc_times),
        "seconds": total,
        "memory_mb": memory,
        "product_gflops": rate / 1e9,
        "fraction": MATRICES * 2.0 * images**2 * width / rate / total,
        "scores": {"kernel": value, **scores},
    }


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:3]))))
