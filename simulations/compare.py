"""Compares arms: `compare` trains what is not trained yet, judges all with one evaluator, and writes comparison.json.

Each stage reads what the one before left in the comparison folder, so a second call goes on where the first was stopped
and does nothing twice.

Events, each a dict, go to `on_event`:

    {"event": "preparing", "what": "phantoms" | "hospitals"}
    {"event": "plan", "stage": "training" | "judging", "tasks": {name: weight}, "done": [name]}
    {"event": "task_start" | "task_end", "task": name, "failure": "" or a sentence}
    {"event": …, "task": name, …}                            what the job itself says (simulations/runner.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fedgan.comparison_folder import ComparisonFolder
from fedgan.config import Settings, to_dict
from fedgan.errors import ConfigError
from server.preparation import is_prepared, prepare_run, with_absolute_paths
from server.strategies import check_strategy
from simulations.arms import FEDERATION, Arm, Job
from simulations.home import is_trained_at_home
from simulations.job import write_job
from simulations.runner import is_trained
from simulations.schedule import Task, core_groups, run_tasks

Tell = Callable[[dict[str, Any]], None]
FREE_SECTIONS = ("evaluation", "comparison")  # may change between two calls: nothing has to be trained again
FREE_KEYS = ("name", "description")


def prepare(settings: Settings, folder: ComparisonFolder, tell: Tell) -> Settings:
    """Write config.toml, hospitals.json and environment.json, or check that those there are of this very scenario.

    Raises `ConfigError` when the folder holds a comparison that was trained with other settings.
    """
    settings = with_absolute_paths(settings)
    if folder.config.is_file():
        check_same(folder.settings(), settings, folder)
    if not is_prepared(folder):
        prepare_run(settings, folder, tell)
    folder.write_settings(settings)
    return settings


def check_same(there: Settings, wanted: Settings, folder: ComparisonFolder) -> None:
    """Raise `ConfigError` when two scenarios differ in anything that the trained arms depend on."""
    old, new = _trained(there), _trained(wanted)
    if changed := [key for key in new if old.get(key) != new[key]]:
        key = changed[0]
        raise ConfigError(
            f"{folder.path} holds arms that were trained with {key} = {old.get(key)!r}, not {new[key]!r}: "
            "give another --output, or remove it"
        )


def hospital_sizes(folder: ComparisonFolder) -> dict[str, int]:
    """Training images of each hospital, in the federation's order."""
    return {row["name"]: row["images"]["train"] for row in folder.read_json(folder.hospitals)}


def train_arms(arms: Sequence[Arm], folder: ComparisonFolder, slots: int | None, tell: Tell) -> dict[Path, str]:
    """Train every job that is not trained yet, side by side; the reasons of those that failed, by folder."""
    jobs = [job for arm in arms for job in arm.jobs]
    for job in jobs:
        check_strategy(job.settings)
        _check_trained_alike(job)
    names = {job.folder: str(job.folder.relative_to(folder.arms)) for job in jobs}
    tasks = [_training_task(job, folder, names) for job in jobs]
    tell(
        {
            "event": "plan",
            "stage": "training",
            "tasks": {task.name: task.weight for task in tasks},
            "done": [task.name for task in tasks if task.done],
        }
    )
    settings = jobs[0].settings
    if settings.training.device != "cpu" and torch.cuda.is_available():
        groups = core_groups(0) * min(slots or torch.cuda.device_count(), torch.cuda.device_count())
    else:
        groups = core_groups(settings.federation.threads, slots)
    run_tasks(tasks, groups, tell)
    return {job.folder: task.failure for job, task in zip(jobs, tasks, strict=True) if task.failure}


def job_is_done(job: Job) -> bool:
    """Whether a job has nothing left to train."""
    return is_trained(job.run, job.settings) if job.kind == FEDERATION else is_trained_at_home(job)


# --- parts -----------------------------------------------------------------------------------------


def _training_task(job: Job, folder: ComparisonFolder, names: dict[Path, str]) -> Task:
    name = names[job.folder]
    order = folder.path / "jobs" / f"{name.replace('/', '_')}.json"
    done = job_is_done(job)
    if not done:
        write_job(job, order)
    images = sum(job.images) if job.images else job.settings.training.kimg * 1000
    after = (names[job.start.folder],) if job.start is not None else ()
    return Task(name, "simulations.job", (str(order),), order.with_suffix(".log"), images, after, done=done)


def _check_trained_alike(job: Job) -> None:
    """Raise `ConfigError` when the job's folder holds a training with other settings."""
    if not job.run.config.is_file():
        return
    old, new = _trained(job.run.settings()), _trained(with_absolute_paths(job.settings))
    if changed := [key for key in new if old.get(key) != new[key]]:
        raise ConfigError(
            f"{job.folder} was trained with {changed[0]} = {old.get(changed[0])!r}, not {new[changed[0]]!r}: "
            "remove that folder, or give the arm another name"
        )


def _trained(settings: Settings) -> dict[str, Any]:
    """The settings that a training depends on, by dotted key."""
    flat: dict[str, Any] = {}
    for section, value in to_dict(settings).items():
        if section in FREE_SECTIONS or section in FREE_KEYS:
            continue
        flat |= {f"{section}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {section: value}
    flat["evaluation.every"] = settings.evaluation.every  # says which checkpoints were kept
    return flat
