"""Standalone training: one Trainer on the pooled images of its members, without Flower.

It has the rounds of the federation that it is compared with, and the federation's own Trainer, run
folder, checkpoints and lines of metrics.jsonl. A stopped training continues from its last whole
round, bit for bit. It ends with the round in which its privacy budget is spent.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgan.config import Settings
from fedgan.data.federation import Hospital
from fedgan.errors import CheckpointError
from fedgan.exchange.round_metrics import reported_metrics
from fedgan.machine import peak_memory, usable_cores
from fedgan.privacy.register import ledger_of
from fedgan.run_folder import RunFolder, read_lines
from fedgan.runs.lock import locked, remove_temporary_files
from fedgan.runs.participants import Participant
from fedgan.runs.preparation import (
    experiment_of,
    is_prepared,
    open_prepared,
    prepare_run,
)
from fedgan.runs.round_state import (
    STRATEGY_STATE,
    State,
    exhausted_in,
    has_line,
    load_state,
    restore_lines,
    save_state,
    write_line,
)
from fedgan.training.checkpoint import load_tensors
from fedgan.training.start import begin_training
from fedgan.training.trainer import Trainer
from fedgan.training.warm_start import warm_start
from server.metrics import finite_numbers, mean_metrics
from simulations.comparison.arm import POOLED, FederatedStart, Job, pool_training_images

OnEvent = Callable[[dict[str, Any]], None]
PARTS = ("generator", "ema")
KEEP_STATES = 2
PROGRESS_SECONDS = 0.5


def train_standalone(job: Job, on_event: OnEvent) -> None:
    """Do the remaining rounds of a job. Raises what the Trainer raises; whole rounds stay."""
    run = job.run
    with locked(run):
        remove_temporary_files(run)
        if not is_prepared(run):
            prepare_run(job.settings, run, on_event)
        settings = run.settings()
        torch.set_num_threads(settings.federation.threads or usable_cores())
        hospitals = open_prepared(settings, run)
        trainer = begin_training(
            settings,
            pool_training_images(hospitals),
            planned_images=sum(job.images),
            ledger=ledger_of(settings, hospitals),
            run=experiment_of(run),
            hospital_of_row=np.repeat(
                np.arange(len(hospitals)), [len(hospital.train) for hospital in hospitals]
            ),
        )
        state = _restore(job, trainer, hospitals, on_event)
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
        while state.round < len(job.images) and not state.exhausted:
            state = _train_round(job, trainer, state, on_event)


def is_trained_standalone(job: Job) -> bool:
    """Whether the last round is done, or the privacy budget spent, and its metrics are written."""
    newest = job.run.last_round()
    is_over = newest == len(job.images) or bool(exhausted_in(job.run))
    return newest is not None and is_over and has_line(job.run, newest)


# --- rounds --------------------------------------------------------------------------------------


def _restore(job: Job, trainer: Trainer, hospitals: Sequence[Hospital], on_event: OnEvent) -> State:
    """State after the last whole round, or of the job's start; the Trainer is set to it."""
    run, experiment = job.run, experiment_of(job.run)
    state = load_state(run, experiment, on_event)
    if state is not None and state.round:
        trainer.load(_trainer_state(run, state.round))
        if job.start is not None and state.participants:
            trainer.set_hospital(state.participants[0].number)
        restore_lines(run, state.round, on_event)
        if state.line is not None and not has_line(run, state.round):
            write_line(run, state.line)
        return state
    warm_start(trainer)
    data, has_only_phantoms = trainer.dataset, all(hospital.phantoms for hospital in hospitals)
    participants = [
        _participant(number, hospital, trainer.settings)
        for number, hospital in enumerate(hospitals)
    ]
    if job.start is not None:
        has_only_phantoms, participants = continue_federation(
            job.start, job.members[0], trainer, has_only_phantoms, participants
        )
    state = State(
        round=0,
        arrays=trainer.get_parameters(PARTS),
        images_seen=trainer.images_seen,
        label_names=tuple(data.label_names),
        exclusive=data.exclusive,
        channels=data.channels,
        resolution=data.resolution,
        phantoms=has_only_phantoms,
        participants=participants,
    )
    save_state(run, trainer.settings, state, experiment)
    return state


def continue_federation(
    start: FederatedStart,
    hospital: str,
    trainer: Trainer,
    has_only_phantoms: bool,
    participants: list[Participant],
) -> tuple[bool, list[Participant]]:
    """Load the federated model of a round, with this hospital's image count and ADA strength.

    → whether that model and this training have seen phantoms only, and the hospital under
    its number in the federation, on which the model is conditioned.
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
    lines = [line for line in read_lines(run) if line["round"] <= start.round]
    rows = [row for line in lines for row in line["hospitals"] if row["name"] == hospital]
    if not rows:
        raise CheckpointError(
            f"{run.metrics} has no line of {hospital} up to round {start.round}: restore it from a "
            "backup, or remove this arm's folder"
        )
    row = rows[-1]  # of an earlier round where this hospital's privacy budget ended before
    trainer.restore_progress(row["images_seen"], row.get("p"))
    number = next(
        participant["number"]
        for participant in meta["participants"]
        if participant["name"] == hospital
    )
    trainer.set_hospital(number)
    return meta.get("phantoms") is True and has_only_phantoms, [
        dataclasses.replace(participant, number=number) for participant in participants
    ]


def _participant(number: int, hospital: Hospital, settings: Settings) -> Participant:
    """A hospital's entry in the checkpoint; with label counts where the networks know hospitals."""
    counts = (
        hospital.train.labels.sum(axis=0, dtype=int).tolist() if settings.model.hospitals else ()
    )
    return Participant(number, hospital.name, len(hospital.train), label_counts=tuple(counts))


def _train_round(job: Job, trainer: Trainer, before: State, on_event: OnEvent) -> State:
    """Train one round and save it; the Trainer's state first, so that a whole round has one."""
    run, number, rounds = job.run, before.round + 1, len(job.images)
    begun, seen, images = time.perf_counter(), trainer.images_seen, job.images[number - 1]
    name = job.members[0] if len(job.members) == 1 else POOLED
    event = {"round": number, "rounds": rounds}
    on_event({"event": "round_start", **event, "images": {name: images}})
    last_event = 0.0

    def on_step(now: Trainer) -> None:
        nonlocal last_event
        if time.monotonic() - last_event > PROGRESS_SECONDS:
            last_event = time.monotonic()
            shown = {"images": now.images_seen - seen, "of": images}
            on_event({"event": "progress", "round": number, "hospital": name, **shown})

    means = trainer.train(images, on_step=on_step)
    trainer.save(_trainer_state(run, number))
    row = {
        "name": name,
        "num_examples": len(trainer.dataset),
        "images_seen": trainer.images_seen,
        "threads": torch.get_num_threads(),
        **finite_numbers(_disclosed(trainer.settings, means)),
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
    after.line = {
        "round": number,
        "images_seen": after.images_seen,
        "wall_seconds": after.wall_seconds,
        "bytes_exchanged": 0,
        "mean": mean_metrics([row]),
        "hospitals": [row],
    }
    if trainer.exhausted:
        after.exhausted = [
            {"name": name, "number": 0, "images": len(trainer.dataset), "round": number}
        ]
        after.line |= {"exhausted": [name], "ended": "the privacy budget is spent"}
    save_state(run, trainer.settings, after, experiment_of(run))
    write_line(run, after.line)
    for path in (run.path / "trainer").glob("state-*"):
        if int(path.stem.removeprefix("state-")) <= number - KEEP_STATES:
            path.unlink(missing_ok=True)
    on_event({"event": "round_end", **event, "line": after.line})
    return after


def _disclosed(settings: Settings, means: Mapping[str, float]) -> dict[str, float]:
    """The metrics that a hospital of a federation would send; client-level DP hides none here."""
    privacy = dataclasses.replace(settings.privacy, client_level="none")
    return reported_metrics(
        dataclasses.replace(settings, privacy=privacy),
        {**means, "peak_memory_bytes": peak_memory()},
    )


def _trainer_state(run: RunFolder, number: int) -> Path:
    return run.path / "trainer" / f"state-{number:05d}.safetensors"
