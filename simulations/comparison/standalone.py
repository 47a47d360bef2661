"""Training at home: one Trainer over the pooled images of its members, in the rounds of the federation it is compared with.

No Flower here, because nothing travels; all else is the federation's own: the Trainer, the run folder, the checkpoints
and the lines of metrics.jsonl. A stopped training goes on from its last whole round, bit for bit. One whose privacy budget
is spent ends with the round in which that happened.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgan import files
from fedgan.config import Settings
from fedgan.data.federation import Hospital
from fedgan.machine import peak_memory, usable_cores
from fedgan.run_folder import RunFolder
from fedgan.runs.lock import locked, sweep
from fedgan.runs.participants import Participant
from fedgan.runs.preparation import (
    experiment_of,
    is_prepared,
    ledger_of,
    open_prepared,
    prepare_run,
)
from fedgan.runs.round_state import (
    STRATEGY_STATE,
    State,
    exhausted_in,
    has_line,
    load_state,
    save_state,
    write_line,
)
from fedgan.training.checkpoint import load_tensors
from fedgan.training.start import begin_training
from fedgan.training.trainer import Trainer
from fedgan.training.warm_start import warm_start
from server.metrics import mean_of, plain_numbers
from simulations.comparison.arm import pooled
from simulations.comparison.plan import EVERYBODY, Job, Start

OnEvent = Callable[[dict[str, Any]], None]
PARTS = ("generator", "ema")
KEEP_STATES = 2
PROGRESS_SECONDS = 0.5


def train_standalone(job: Job, on_event: OnEvent) -> None:
    """Do all rounds of a job that are left. Raises what the Trainer raises; whatever is whole on the disk stays."""
    run = job.run
    with locked(run):
        sweep(run)
        if not is_prepared(run):
            prepare_run(job.settings, run, on_event)
        settings = run.settings()
        torch.set_num_threads(settings.federation.threads or usable_cores())
        hospitals = open_prepared(settings, run)
        data = pooled(hospitals)
        trainer = begin_training(
            settings,
            data,
            planned_images=sum(job.images),
            ledgers=[ledger_of(hospital, run).path for hospital in hospitals],
            run=experiment_of(run),
            hospital_of_row=np.repeat(
                np.arange(len(hospitals)), [len(hospital.train) for hospital in hospitals]
            ),
        )
        state = _restore(job, run, trainer, hospitals, on_event)
        _tell_start(job, state, on_event)
        while state.round < len(job.images) and not state.exhausted:
            state = _round(job, run, trainer, state, state.round + 1, on_event)


def is_trained_standalone(job: Job) -> bool:
    """Whether the job's last round is done, or its privacy budget spent, and the line of that round is written."""
    newest = job.run.last_round()
    over = newest is not None and (newest == len(job.images) or bool(exhausted_in(job.run)))
    return over and newest is not None and has_line(job.run, newest)


# --- rounds ----------------------------------------------------------------------------------------


def _restore(
    job: Job, run: RunFolder, trainer: Trainer, hospitals: Sequence[Hospital], on_event: OnEvent
) -> State:
    """The Trainer and the totals as they were after the last whole round, or at the job's beginning."""
    experiment = experiment_of(run)
    state = load_state(run, experiment, on_event)
    if state is not None and state.round:
        trainer.load(_trainer_state(run, state.round))
        if (
            job.start is not None and state.participants
        ):  # none in a checkpoint of before they were kept
            trainer.set_hospital(state.participants[0].number)
        if state.line is not None and not has_line(run, state.round):
            write_line(run, state.line)
        return state
    warm_start(trainer)
    data, drawn = trainer.dataset, all(hospital.phantoms for hospital in hospitals)
    shares = [
        _share(number, hospital, trainer.settings) for number, hospital in enumerate(hospitals)
    ]
    if job.start is not None:
        drawn, shares = _take_over(job.start, job.members[0], trainer, drawn, shares)
    state = State(
        0,
        trainer.get_parameters(PARTS),
        {},
        trainer.images_seen,
        0,
        0.0,
        None,
        phantoms=drawn,
        participants=shares,
    )
    state.label_names, state.exclusive = tuple(data.label_names), data.exclusive
    state.channels, state.resolution = data.channels, data.resolution
    save_state(run, trainer.settings, state, experiment)
    return state


def _take_over(
    start: Start, hospital: str, trainer: Trainer, drawn: bool, shares: list[Participant]
) -> tuple[bool, list[Participant]]:
    """Begin with a federation's model of a round, its image count and the strength of augmentation at this hospital.

    → whether that model and this training have seen nothing but drawn phantoms, and the hospital's share under the number
    that it has in the federation, by which the model knows it.
    """
    run = RunFolder(start.folder)
    tensors, meta = load_tensors(run.checkpoint(start.round))
    trainer.load_parameters(
        {
            name: tensor.numpy()
            for name, tensor in tensors.items()
            if not name.startswith(STRATEGY_STATE)
        }
    )
    lines = [line for line in files.read_json_lines(run.metrics) if line["round"] <= start.round]
    rows = [row for line in lines for row in line["hospitals"] if row["name"] == hospital]
    row = rows[
        -1
    ]  # of that round; of an earlier one where this hospital's privacy budget was spent before
    trainer.restore_progress(row["images_seen"], row.get("p"))
    number = next(share["number"] for share in meta["participants"] if share["name"] == hospital)
    trainer.set_hospital(number)
    return meta.get("phantoms") is True and drawn, [
        dataclasses.replace(share, number=number) for share in shares
    ]


def _share(number: int, hospital: Hospital, settings: Settings) -> Participant:
    """What a checkpoint keeps of a hospital that trains here; how often it has each label, only where that is drawn by."""
    counts = (
        hospital.train.labels.sum(axis=0, dtype=int).tolist() if settings.model.hospitals else ()
    )
    return Participant(number, hospital.name, len(hospital.train), label_counts=tuple(counts))


def _round(
    job: Job, run: RunFolder, trainer: Trainer, before: State, number: int, on_event: OnEvent
) -> State:
    """Train one round and write it down; the Trainer's state first, so that a whole round always has one."""
    begun, seen, images = time.perf_counter(), trainer.images_seen, job.images[number - 1]
    name = job.members[0] if len(job.members) == 1 else EVERYBODY
    on_event(
        {
            "event": "round_start",
            "round": number,
            "rounds": len(job.images),
            "images": {name: images},
        }
    )
    told = 0.0

    def progress(now: Trainer) -> None:
        nonlocal told
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            on_event(
                {
                    "event": "progress",
                    "round": number,
                    "hospital": name,
                    "images": now.images_seen - seen,
                    "of": images,
                }
            )

    means = trainer.train(images, on_step=progress)
    trainer.save(_trainer_state(run, number))
    row = {
        "name": name,
        "num_examples": len(trainer.dataset),
        "images_seen": trainer.images_seen,
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": float(peak_memory()),
        **plain_numbers(means),
        "images": int(means["images"]),
        **({"exhausted": 1.0} if trainer.exhausted else {}),
    }
    after = State(
        round=number,
        arrays=trainer.get_parameters(PARTS),
        images_seen=trainer.images_seen,
        wall_seconds=before.wall_seconds + time.perf_counter() - begun,
        label_names=before.label_names,
        exclusive=before.exclusive,
        channels=before.channels,
        resolution=before.resolution,
        phantoms=before.phantoms,
        participants=before.participants,
    )
    if trainer.exhausted:
        after.exhausted = [
            {"name": name, "number": 0, "images": len(trainer.dataset), "round": number}
        ]
    after.line = {
        "round": number,
        "images_seen": after.images_seen,
        "wall_seconds": after.wall_seconds,
        "bytes_exchanged": 0,
        "mean": mean_of([row]),
        "hospitals": [row],
        **(
            {"exhausted": [name], "ended": "the privacy budget is spent"}
            if trainer.exhausted
            else {}
        ),
    }
    save_state(run, trainer.settings, after, experiment_of(run))
    write_line(run, after.line)
    for path in _states(run):
        if int(path.stem.removeprefix("state-")) <= number - KEEP_STATES:
            path.unlink(missing_ok=True)
    on_event({"event": "round_end", "round": number, "rounds": len(job.images), "line": after.line})
    return after


def _tell_start(job: Job, state: State, on_event: OnEvent) -> None:
    on_event(
        {
            "event": "start",
            "hospitals": list(job.members),
            "rounds": len(job.images),
            "first_round": state.round + 1,
            "images": sum(job.images) + (job.start.images_seen if job.start else 0),
            "images_seen": state.images_seen,
        }
    )


def _trainer_state(run: RunFolder, number: int) -> Path:
    return run.path / "trainer" / f"state-{number:05d}.safetensors"


def _states(run: RunFolder) -> list[Path]:
    return sorted((run.path / "trainer").glob("state-*"))
