"""Compares arms: `compare` trains what is not trained yet, judges all with one evaluator, and writes comparison.json.

Each stage reads what the one before left in the comparison folder, so a second call goes on where the first was stopped
and does nothing twice.

Events, each a dict, go to `on_event`:

    {"event": "preparing", "what": "phantoms" | "hospitals"}
    {"event": "plan", "stage": "training" | "judging", "tasks": {name: weight}, "done": [name]}
    {"event": "task_start" | "task_end", "task": name, "failure": "" or a sentence}
    {"event": "step", "task": name, "share": from 0 to 1, "text": what is done now}        a piece of the judgement
    {"event": …, "task": name, …}                            what a training says (simulations/runner.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fedgan import files
from fedgan.comparison_folder import ComparisonFolder
from fedgan.config import Settings, to_dict
from fedgan.data.federation import describe_hospitals
from fedgan.errors import ConfigError
from fedgan.evaluation.features import check_features
from fedgan.redact import redact
from fedgan.runs.compatibility import check_compatibility
from fedgan.runs.evaluator import evaluation_device
from fedgan.runs.lock import locked, sweep
from fedgan.runs.preparation import (
    check_evaluation,
    data_key,
    evaluation_guests,
    is_prepared,
    open_prepared,
    prepare_run,
    with_absolute_paths,
)
from simulations.comparison.arm import check_arm
from simulations.comparison.evaluate import (
    is_arm_evaluated,
    open_evaluation_context,
    write_real_grid,
)
from simulations.comparison.plan import FEDERATION, Arm, Job, plan, plan_of
from simulations.comparison.results import Outcome, assemble
from simulations.comparison.scheduler import Task, core_groups, run_tasks
from simulations.comparison.standalone import is_trained_standalone
from simulations.comparison.train_worker import read_job, write_job
from simulations.runner import REPOSITORY, is_trained

OnEvent = Callable[[dict[str, Any]], None]
FREE_SECTIONS = (
    "evaluation",
    "comparison",
)  # may change between two calls: nothing has to be trained again
FREE_NAMES = ("name", "description")


def compare(
    settings: Settings,
    folder: ComparisonFolder,
    on_event: OnEvent | None = None,
    jobs: int | None = None,
) -> dict[str, Any]:
    """Do what is left of a comparison in `folder` and return what comparison.json says.

    `jobs`: most trainings at once; by default as many as the cores hold. An arm that fails is reported as failed and the
    others go on. Raises `ConfigError` for a scenario that does not fit the folder, `KeyboardInterrupt` on Ctrl-C.
    """
    on_event = on_event or (lambda event: None)
    plan(
        settings,
        folder,
        {f"hospital-{n + 1}": 1 for n in range(settings.federation.hospitals)},
        Path(),
    )  # a wrong arm, at once
    with locked(folder):
        sweep(folder)
        settings = prepare(settings, folder, on_event)
        arms, hospitals = plan_of(settings, folder), open_prepared(settings, folder)
        for arm in arms:
            check_arm(arm, hospitals)
        write_real_grid(
            open_evaluation_context(folder)
        )  # data that cannot be judged fail before the training, not after it
        failures = train_arms(arms, folder, jobs, on_event)
        trained = [arm for arm in arms if not any(job.folder in failures for job in arm.jobs)]
        failures |= evaluate_arms(trained, folder, settings, jobs, on_event)
        on_event({"event": "plan", "stage": "comparing", "tasks": {}, "done": []})
        torch.set_num_threads(1)  # as the classifiers of the judgement were trained
        found = assemble(
            open_evaluation_context(folder),
            [Outcome(arm, _failure(arm, failures, folder, settings)) for arm in arms],
        )
        files.write_json(folder.comparison, found)
    return found


def prepare(settings: Settings, folder: ComparisonFolder, on_event: OnEvent) -> Settings:
    """Write config.toml, hospitals.json and environment.json, or check that those there are of this very scenario.

    Raises `ConfigError` when the folder holds a comparison that was trained with other settings or on other data.
    """
    settings = with_absolute_paths(settings)
    if folder.checkpoints.exists() or folder.look.exists():
        raise ConfigError(f"{folder.path} holds a run, not a comparison: give another --output")
    if folder.config.is_file():
        check_same(folder.settings(), settings, folder)
    if is_prepared(folder):
        check_features(settings.evaluation.features)
        hospitals = open_prepared(settings, folder)
        check_evaluation(settings, hospitals, evaluation_guests(settings))
        if describe_hospitals(hospitals, data_key(folder)) != folder.read_json(folder.hospitals):
            raise ConfigError(
                f"{folder.path} was prepared with other images than its shards hold now: give another --output"
            )
    else:
        prepare_run(settings, folder, on_event)
    folder.write_settings(settings)
    return settings


def check_same(there: Settings, wanted: Settings, folder: ComparisonFolder) -> None:
    """Raise `ConfigError` when two scenarios differ in anything that the trained arms depend on."""
    if change := _change(there, wanted):
        raise ConfigError(
            f"{folder.path} holds arms that were trained with {change}: give another --output, or remove it"
        )


def train_arms(
    arms: Sequence[Arm], folder: ComparisonFolder, slots: int | None, on_event: OnEvent
) -> dict[Path, str]:
    """Train every job that is not trained yet, side by side; the reasons of those that failed, by folder."""
    public = {
        arm.public.folder: arm.public for arm in arms if arm.public
    }  # shared by the rungs that begin from it
    jobs = [*public.values(), *(job for arm in arms for job in arm.jobs)]
    for job in jobs:
        if job.kind == FEDERATION:
            check_compatibility(job.settings)
        _check_trained_alike(job)
    names = {job.folder: str(job.folder.relative_to(folder.arms)) for job in jobs}
    tasks = [_training_task(job, folder, names) for job in jobs]
    on_event(_plan_event("training", tasks))
    settings = jobs[0].settings
    run_tasks(tasks, _groups(settings, settings.federation.threads, slots), on_event)
    return {job.folder: task.failure for job, task in zip(jobs, tasks, strict=True) if task.failure}


def evaluate_arms(
    arms: Sequence[Arm],
    folder: ComparisonFolder,
    settings: Settings,
    slots: int | None,
    on_event: OnEvent,
) -> dict[Path, str]:
    """Judge every arm that is not judged yet, side by side, after the real classifiers that all share."""
    first = [f"real classifier {number + 1}" for number in range(settings.evaluation.seeds)]
    logs = folder.path / "jobs"
    place = str(folder.path)
    tasks = [
        Task(
            name,
            "simulations.comparison.evaluate_worker",
            (place, f"reference:{number}"),
            logs / "judge-real.log",
            0.3,
        )
        for number, name in enumerate(first)
    ]
    tasks += [
        Task(
            f"{arm.name}, seed {arm.seed}",
            "simulations.comparison.evaluate_worker",
            (place, f"arm:{arm.folder.name}"),
            logs / f"judge-{arm.folder.name}.log",
            1.0 + 0.5 * (len(arm.jobs) - 1),
            tuple(first),
            done=is_arm_evaluated(settings, arm, folder),
        )
        for arm in arms
    ]
    judged = tasks[len(first) :]
    if all(task.done for task in judged):
        return {}
    on_event(_plan_event("judging", tasks))
    run_tasks(tasks, _groups(settings, 1, slots), on_event)
    return {
        arm.folder: task.failure for arm, task in zip(arms, judged, strict=True) if task.failure
    }


def job_is_done(job: Job) -> bool:
    """Whether a job has nothing left to train."""
    return (
        is_trained(job.run, job.settings) if job.kind == FEDERATION else is_trained_standalone(job)
    )


def _groups(settings: Settings, threads: int, slots: int | None) -> list[tuple[int, ...]]:
    """The cores of each job that may run at once; on a GPU one job, or as many as `--jobs` says, each with all cores."""
    on_gpu = evaluation_device(settings) == "cuda"
    return core_groups(0) * (slots or 1) if on_gpu else core_groups(threads, slots)


def _plan_event(stage: str, tasks: Sequence[Task]) -> dict[str, Any]:
    weights = {task.name: task.weight for task in tasks}
    return {
        "event": "plan",
        "stage": stage,
        "tasks": weights,
        "done": [task.name for task in tasks if task.done],
    }


def _failure(
    arm: Arm, failures: dict[Path, str], folder: ComparisonFolder, settings: Settings
) -> str:
    """Why an arm has no figures, in one sentence without a path of this machine; empty where it has.

    Places within the comparison's folder are named from there, so that a damaged file can be found.
    """
    reasons = {
        (f"{job.members[0]}: " if arm.by_hospital else "") + failures[job.folder]: None
        for job in arm.jobs
        if job.folder in failures
    }
    if arm.folder in failures:
        reasons[failures[arm.folder]] = None
    roots = (
        str(folder.path),
        settings.data.root,
        settings.evaluation.root,
        str(REPOSITORY),
        str(Path.home()),
    )
    text = "; ".join(reasons).replace(f"{folder.path}/", "")
    return str(redact(text, tuple(root for root in roots if root)))


# --- parts -----------------------------------------------------------------------------------------


def _training_task(job: Job, folder: ComparisonFolder, names: dict[Path, str]) -> Task:
    name = names[job.folder]
    order = folder.path / "jobs" / f"{name.replace('/', '_')}.json"
    done = job_is_done(job)
    if order.is_file() and job.run.config.is_file():
        planned = read_job(order)
        if (planned.images, planned.start) != (job.images, job.start):
            raise ConfigError(
                f"{job.folder} was planned with other rounds or another beginning (comparison.finetune_share?): "
                "remove that folder, or set it back"
            )
    if not done:
        write_job(job, order)
    images = sum(job.images) if job.images else job.settings.training.kimg * 1000
    before = [job.start.folder] if job.start else []
    after = tuple(names[folder] for folder in (*before, *([job.after] if job.after else [])))
    return Task(
        name,
        "simulations.comparison.train_worker",
        (str(order),),
        order.with_suffix(".log"),
        images,
        after,
        done=done,
    )


def _check_trained_alike(job: Job) -> None:
    """Raise `ConfigError` when the job's folder holds a training with other settings."""
    if not job.run.config.is_file():
        return
    # where the data lie is no matter here: their hash was compared
    if change := _change(job.run.settings(), with_absolute_paths(job.settings), but="data.root"):
        raise ConfigError(
            f"{job.folder} was trained with {change}: remove that folder, or give the arm another name"
        )


def _change(there: Settings, wanted: Settings, but: str = "") -> str:
    """The first key in which two trainings differ, as 'key = old, not new'; empty where they are alike. `but`: no such key."""
    old, new = _trained(there), _trained(wanted)
    changed = (key for key in new if old.get(key) != new[key] and key != but)
    return next((f"{key} = {old.get(key)!r}, not {new[key]!r}" for key in changed), "")


def _trained(settings: Settings) -> dict[str, Any]:
    """The settings that a training depends on, by dotted key."""
    flat: dict[str, Any] = {}
    for section, value in to_dict(settings).items():
        if section in FREE_SECTIONS or section in FREE_NAMES:
            continue
        flat |= (
            {f"{section}.{key}": inner for key, inner in value.items()}
            if isinstance(value, dict)
            else {section: value}
        )
    flat["evaluation.every"] = settings.evaluation.every  # says which checkpoints were kept
    flat["training.warm_start"] = Path(
        settings.training.warm_start
    ).name  # where it lies is no matter: a folder may move
    return flat
