"""Five seconds of training, to tell how long a scenario will take on this machine.

As many processes as would train at once run side by side, because they share caches and memory bandwidth.
Each is `python -m fedgan.cli.probe`: it reads a `Probe` as JSON from stdin and writes what it measured to stdout.
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

SECONDS = 5.0
CLASSIFIER_SECONDS = 1.5
TIMEOUT = 180.0
IMAGES = 64
START_SECONDS = 20.0  # Flower and Ray, from the command to the first round
TYPICAL_P = 0.3  # ADA augments most of the time, so the probe must too


@dataclass(frozen=True)
class Probe:
    """What the scenario's images look like; their content does not matter to speed."""

    settings: dict[str, Any]
    channels: int
    labels: int
    exclusive: bool
    threads: int


@dataclass(frozen=True)
class Measured:
    """Rates of one hospital (while the others train too) and of the classifiers of all processes; bytes of a process."""

    images_per_second: float
    classifier_images_per_second: float
    memory: int
    device: str


def measure(
    settings: Settings, channels: int, labels: int, exclusive: bool, at_once: int, threads: int
) -> Measured:
    """Train `at_once` hospitals side by side for five seconds. Raises `MachineError` when a process fails."""
    question = json.dumps(
        dataclasses.asdict(Probe(to_dict(settings), channels, labels, exclusive, threads))
    )
    command = [sys.executable, "-m", "fedgan.cli.probe"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    children = [subprocess.Popen(command, text=True, **pipes) for _ in range(at_once)]  # type: ignore[call-overload]
    try:
        for child in children:  # all begin before the first is waited for
            with contextlib.suppress(
                BrokenPipeError
            ):  # it is dead already: its exit status tells below
                child.stdin.write(question)
                child.stdin.close()
            child.stdin = None
        answers = []
        for child in children:
            out, complaint = child.communicate(timeout=TIMEOUT)
            if child.returncode:
                raise MachineError(
                    f"the training probe failed: {(complaint.strip().splitlines() or ['killed'])[-1]}"
                )
            answers.append(json.loads(out))
    except subprocess.TimeoutExpired:
        raise MachineError(
            f"the training probe gave no answer in {TIMEOUT:.0f} s: lower model.* or data.resolution"
        ) from None
    finally:
        for child in children:
            child.kill()
            child.wait()
    return Measured(
        images_per_second=sum(answer["images_per_second"] for answer in answers) / at_once,
        classifier_images_per_second=sum(
            answer["classifier_images_per_second"] for answer in answers
        ),
        memory=max(answer["memory"] for answer in answers),
        device=answers[0]["device"],
    )


def busiest_share(shares: Sequence[float], slots: int) -> float:
    """Share of a round's images that the busiest of `slots` places works through; hospitals start in order as places get free."""
    loads = [0.0] * slots
    for share in shares:
        loads[loads.index(min(loads))] += share
    return max(loads)


def predict(
    settings: Settings, measured: Measured, sizes: Sequence[int], slots: int
) -> dict[str, float]:
    """Seconds that the scenario will take: `start`, `training`, `evaluation`, `all`. `sizes`: training images a hospital."""
    weights = (
        [1.0] * len(sizes)
        if settings.federation.local_images == "equal"
        else [float(size) for size in sizes]
    )
    share = busiest_share([weight / sum(weights) for weight in weights], slots)
    training = settings.training.kimg * 1000 * share / measured.images_per_second
    shown = (
        2 * settings.evaluation.seeds * settings.evaluation.epochs * sum(sizes)
    )  # a real and a synthetic classifier a seed
    evaluation = (
        shown / measured.classifier_images_per_second
        if measured.classifier_images_per_second
        else 0.0
    )
    return {
        "start": START_SECONDS,
        "training": training,
        "evaluation": evaluation,
        "all": START_SECONDS + training + evaluation,
    }


# --- the child -----------------------------------------------------------------------------------


def _answer(probe: Probe) -> dict[str, Any]:
    """Train on random images and measure. torch is imported here, so that only the child pays for it."""
    import resource

    import torch

    torch.set_num_threads(probe.threads)
    given = from_dict(probe.settings)
    p = max(given.augment.p, TYPICAL_P)
    settings = given if given.augment.mode == "none" else _with(given, "augment", mode="fixed", p=p)
    dataset = _random_images(probe, settings.data.resolution)

    from fedgan.training.trainer import Trainer, resolve_device

    trainer = Trainer(settings, dataset, resolve_device(settings.training.device).type)
    trainer.train(
        settings.training.batch_size
    )  # the first step is slow: memory, threads, oneDNN's kernels
    images, seconds, steps = 0.0, 0.0, 0
    whole = (
        settings.training.r1_interval
    )  # regularisation is lazy: only whole cycles show its true share
    while seconds < SECONDS or (steps % whole and seconds < 3 * SECONDS):
        done = trainer.train(settings.training.batch_size)
        images, seconds, steps = images + done["images"], seconds + done["seconds"], steps + 1
    return {
        "images_per_second": images / seconds,
        "classifier_images_per_second": _classifier_rate(dataset),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
        "device": trainer.device.type,
    }


def _classifier_rate(dataset: Any) -> float:
    """Images a second of the evaluator's classifier; 0 where there are no labels to train it on."""
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


def _with(settings: Settings, section: str, **values: Any) -> Settings:
    return dataclasses.replace(
        settings, **{section: dataclasses.replace(getattr(settings, section), **values)}
    )


if __name__ == "__main__":
    print(json.dumps(_answer(Probe(**json.load(sys.stdin)))))
