"""Measure the speed of training for five seconds, and forecast the time of a scenario.

As many processes run in parallel as in the scenario, because they share caches and memory
bandwidth. Each is `python -m fedgan.cli.probe`: it reads a `Probe` as JSON from stdin and writes
its rates as JSON to stdout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedgan.config import Settings, from_dict, to_dict
from fedgan.errors import MachineError
from fedgan.machine import peak_memory

SECONDS = 5.0
CLASSIFIER_SECONDS = 1.5
TIMEOUT = 180.0
IMAGES = 64
START_SECONDS = 20.0  # Flower and Ray, from the command to the first round
TYPICAL_P = 0.3  # of ADA


@dataclass(frozen=True)
class Probe:
    """Settings and shape of the data; the speed does not depend on the images' content."""

    settings: dict[str, Any]
    channels: int
    labels: int
    exclusive: bool
    threads: int


@dataclass(frozen=True)
class Measured:
    """Rates and memory of training on this machine."""

    images_per_second: float  # of one hospital while the others train
    classifier_images_per_second: float  # of all processes together
    memory: int  # peak bytes of a process
    device: str
    update_bytes: int  # that a hospital sends per round


def measure(
    settings: Settings, channels: int, labels: int, exclusive: bool, parallel: int, threads: int
) -> Measured:
    """Train `parallel` hospitals in parallel for five seconds.

    Raises `MachineError` when a process fails.
    """
    request = json.dumps(
        dataclasses.asdict(Probe(to_dict(settings), channels, labels, exclusive, threads))
    )
    command = [sys.executable, "-m", "fedgan.cli.probe"]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    children = [subprocess.Popen(command, text=True, **pipes) for _ in range(parallel)]
    try:
        for child in children:  # all start before the first is awaited
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended; its exit code is read below
                child.stdin.write(request)
                child.stdin.close()
            child.stdin = None
        results = []
        for child in children:
            output, errors = child.communicate(timeout=TIMEOUT)
            if child.returncode:
                reason = (errors.strip().splitlines() or ["killed"])[-1]
                raise MachineError(f"the training probe failed: {reason}")
            results.append(json.loads(output))
    except subprocess.TimeoutExpired:
        raise MachineError(
            f"the training probe did not end within {TIMEOUT:.0f} s: "
            "lower model.* or data.resolution"
        ) from None
    finally:
        for child in children:
            child.kill()
            child.wait()
    return Measured(
        images_per_second=sum(row["images_per_second"] for row in results) / parallel,
        classifier_images_per_second=sum(row["classifier_images_per_second"] for row in results),
        memory=max(row["memory"] for row in results),
        device=results[0]["device"],
        update_bytes=results[0]["update_bytes"],
    )


def busiest_share(shares: Sequence[float], workers: int) -> float:
    """Share of a round's images of the busiest worker; each hospital goes to the first free one."""
    loads = [0.0] * workers
    for share in shares:
        loads[loads.index(min(loads))] += share
    return max(loads)


def predict(
    settings: Settings, measured: Measured, sizes: Sequence[int], parallel: int
) -> dict[str, float]:
    """Forecast a scenario's seconds: `start`, `training`, `evaluation`, `total`.

    `sizes`: training images per hospital.
    """
    weights = (
        [1.0] * len(sizes)
        if settings.federation.local_images == "equal"
        else [float(size) for size in sizes]
    )
    share = busiest_share([weight / sum(weights) for weight in weights], parallel)
    training = settings.training.kimg * 1000 * share / measured.images_per_second
    classifiers = 2 * settings.evaluation.seeds  # on real and on synthetic images
    images = classifiers * settings.evaluation.epochs * sum(sizes)
    rate = measured.classifier_images_per_second
    evaluation = images / rate if rate else 0.0
    return {
        "start": START_SECONDS,
        "training": training,
        "evaluation": evaluation,
        "total": START_SECONDS + training + evaluation,
    }


# --- one process of the probe ---


def _measure_one(probe: Probe) -> dict[str, Any]:
    """Train on random images and measure. Only this process imports torch."""
    import torch

    torch.set_num_threads(probe.threads)
    settings = from_dict(probe.settings)
    if settings.augment.mode != "none":
        p = max(settings.augment.p, TYPICAL_P)
        augment = dataclasses.replace(settings.augment, mode="fixed", p=p)
        settings = dataclasses.replace(settings, augment=augment)
    dataset = _random_images(probe, settings.data.resolution)

    from fedgan.training.trainer import Trainer, resolve_device

    trainer = Trainer(settings, dataset, resolve_device(settings.training.device).type)
    trainer.train(settings.training.batch_size)  # warm up memory, threads and oneDNN's kernels
    images, seconds, steps = 0.0, 0.0, 0
    cycle = settings.training.r1_interval  # lazy regularisation: measure complete cycles
    while seconds < SECONDS or (steps % cycle and seconds < 3 * SECONDS):
        done = trainer.train(settings.training.batch_size)
        images, seconds, steps = images + done["images"], seconds + done["seconds"], steps + 1
    return {
        "images_per_second": images / seconds,
        "classifier_images_per_second": _classifier_rate(dataset),
        "memory": peak_memory(),
        "device": trainer.device.type,
        "update_bytes": _update_bytes(trainer, settings),
    }


def _update_bytes(trainer: Any, settings: Settings) -> int:
    """Bytes of an update's numbers; masked ones have 4 each."""
    from fedgan.exchange.number_formats import DTYPES

    wire = "fp32" if settings.federation.secure else settings.federation.wire
    arrays = trainer.get_parameters(settings.federation.exchange).values()
    return sum(int(array.size) for array in arrays) * int(DTYPES[wire].itemsize)


def _classifier_rate(dataset: Any) -> float:
    """Images per second of the evaluator's classifier; 0 without labels."""
    if not dataset.label_dim:
        return 0.0
    from fedgan.evaluation.classification import BATCH, train_classifier

    train_classifier(dataset, 1, seed=0)
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < CLASSIFIER_SECONDS:
        train_classifier(dataset, 4, seed=0)
        steps += 4
    return steps * BATCH / (time.perf_counter() - start)


def _random_images(probe: Probe, resolution: int) -> Any:
    import numpy as np

    from fedgan.data.dataset import ImageDataset

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, probe.channels, resolution, resolution), dtype=np.uint8)
    if probe.exclusive and probe.labels:
        labels = np.eye(probe.labels, dtype=np.uint8)[np.arange(IMAGES) % probe.labels]
    else:
        labels = rng.integers(0, 2, (IMAGES, probe.labels), dtype=np.uint8)
    return ImageDataset(
        "probe", images, labels, tuple(f"label-{n}" for n in range(probe.labels)), probe.exclusive
    )


if __name__ == "__main__":
    print(json.dumps(_measure_one(Probe(**json.load(sys.stdin)))))
