"""Compare arms: train what is not trained, evaluate all with one evaluator, write comparison.json.

Each stage reads the files of the stage before, so a second call continues where the first was
stopped and does nothing twice.

Events, each a dict, go to `on_event`:

    {"event": "preparing", "what": "phantoms" | "hospitals"}
    {"event": "plan", "stage": "training" | "evaluating" | "comparing", "tasks": {name: weight},
     "done": [name]}
    {"event": "task_start" | "task_end", "task": name, "failure": "" or a sentence}
    {"event": "step", "task": name, "share": 0 to 1, "text": current step}     of an evaluation
    {"event": …, "task": name, …}                events of a training (simulations/runner.py)
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
from fedgan.runs.lock import locked, remove_temporary_files
from fedgan.runs.preparation import (
    check_evaluation,
    data_key,
    is_prepared,
    open_evaluation_root,
    open_prepared,
    prepare_run,
    with_absolute_paths,
)
from fedgan.runs.round_state import restore_lines
from simulations.comparison.arm import FEDERATION, Arm, Job, Outcome, check_arm, read_job, write_job
from simulations.comparison.evaluate import (
    is_arm_evaluated,
    open_evaluation_context,
    write_real_grid,
)
from simulations.comparison.plan import plan, plan_of
from simulations.comparison.results import assemble
from simulations.comparison.scheduler import Task, core_groups, run_tasks
from simulations.comparison.standalone import is_trained_standalone
from simulations.runner import REPOSITORY, is_trained

OnEvent = Callable[[dict[str, Any]], None]
WORKER = "simulations.comparison.worker"
# These may change between two calls: no training depends on them.
FREE_SECTIONS = ("evaluation", "comparison", "name", "description")


def compare(
    settings: Settings,
    folder: ComparisonFolder,
    on_event: OnEvent | None = None,
    jobs: int | None = None,
) -> dict[str, Any]:
    """Do what is left of a comparison in `folder` and return the content of comparison.json.

    `jobs`: most trainings at once, by default as many as the cores hold. A failed arm is reported
    and the others continue. Raises `ConfigError` for a scenario that does not fit the folder,
    `KeyboardInterrupt` on Ctrl-C.
    """
    on_event = on_event or (lambda event: None)
    # find an impossible arm before anything is written
    sizes = {f"hospital-{number + 1}": 1 for number in range(settings.federation.hospitals)}
    plan(settings, folder, sizes, Path())
    with locked(folder):
        remove_temporary_files(folder)
        settings = prepare(settings, folder, on_event)
        arms, hospitals = plan_of(settings, folder), open_prepared(settings, folder)
        for arm in arms:
            check_arm(arm, hospitals)
        # data that cannot be evaluated fail before the training, not after it
        write_real_grid(open_evaluation_context(folder))
        failures = train_arms(arms, folder, jobs, on_event)
        trained = [arm for arm in arms if not any(job.folder in failures for job in arm.jobs)]
        failures |= evaluate_arms(trained, folder, settings, jobs, on_event)
        on_event(_plan_event("comparing", []))
        torch.set_num_threads(1)  # as in the workers that trained the classifiers
        found = assemble(
            open_evaluation_context(folder),
            [Outcome(arm, failure_reason(arm, failures, folder, settings)) for arm in arms],
        )
        files.write_json(folder.comparison, found)
    return found


def prepare(settings: Settings, folder: ComparisonFolder, on_event: OnEvent) -> Settings:
    """Write config.toml, hospitals.json and environment.json, or check that they fit the scenario.

    Raises `ConfigError` when the folder holds a comparison of another format, with other settings
    or on other data.
    """
    settings = with_absolute_paths(settings)
    if folder.checkpoints.exists() or folder.evaluated_run.exists():
        raise ConfigError(f"{folder.path} holds a run, not a comparison: give another --output")
    folder.check_format()
    if folder.config.is_file() and (change := _first_change(folder.settings(), settings)):
        raise ConfigError(
            f"{folder.path} holds arms that were trained with {change}: give another --output, "
            "or remove it"
        )
    if is_prepared(folder):
        check_features(settings.evaluation.features)
        hospitals = open_prepared(settings, folder)
        check_evaluation(settings, hospitals, open_evaluation_root(settings))
        if describe_hospitals(hospitals, data_key(folder)) != folder.hospital_rows():
            raise ConfigError(
                f"{folder.path} was prepared with other images than its shards hold now: give "
                "another --output"
            )
    else:
        prepare_run(settings, folder, on_event)
    folder.write_settings(settings)
    return settings


# --- training ------------------------------------------------------------------------------------


def train_arms(
    arms: Sequence[Arm], folder: ComparisonFolder, slots: int | None, on_event: OnEvent
) -> dict[Path, str]:
    """Train every job that is not trained, in parallel; return failure reasons by folder."""
    # several variants may share one pretraining
    pretraining = {arm.pretraining.folder: arm.pretraining for arm in arms if arm.pretraining}
    jobs = [*pretraining.values(), *(job for arm in arms for job in arm.jobs)]
    for job in jobs:
        if job.kind == FEDERATION:
            check_compatibility(job.settings)
        _check_same_training(job)
    names = {job.folder: str(job.folder.relative_to(folder.arms)) for job in jobs}
    tasks = [_training_task(job, folder, names) for job in jobs]
    for job, task in zip(jobs, tasks, strict=True):
        if task.done:
            _restore_lines(job, task.name, on_event)
    on_event(_plan_event("training", tasks))
    settings = jobs[0].settings
    run_tasks(tasks, _core_groups(settings, settings.federation.threads, slots), on_event)
    return {job.folder: task.failure for job, task in zip(jobs, tasks, strict=True) if task.failure}


def _restore_lines(job: Job, name: str, on_event: OnEvent) -> None:
    """Complete the metrics of a finished training, of which the comparison reads all rounds."""
    newest = job.run.last_round() or 0
    restore_lines(job.run, newest, lambda event: on_event({**event, "task": name}))


def is_job_done(job: Job) -> bool:
    """Whether a job has no round left to train."""
    if job.kind == FEDERATION:
        return is_trained(job.run, job.settings)
    return is_trained_standalone(job)


def _training_task(job: Job, folder: ComparisonFolder, names: dict[Path, str]) -> Task:
    name = names[job.folder]
    path = folder.path / "jobs" / f"{name.replace('/', '_')}.json"
    is_done = is_job_done(job)
    if path.is_file() and job.run.config.is_file():
        planned = read_job(path)
        if (planned.images, planned.start) != (job.images, job.start):
            raise ConfigError(
                f"{job.folder} was planned with other rounds or another start "
                "(comparison.finetune_share?): remove that folder, or restore the setting"
            )
    if not is_done:
        write_job(job, path)
    images = sum(job.images) if job.images else job.settings.training.kimg * 1000
    before = [job.start.folder if job.start else None, job.pretraining]
    after = tuple(names[folder] for folder in before if folder)
    log = path.with_suffix(".log")
    return Task(name, WORKER, ("train", str(path)), log, images, after, done=is_done)


def _check_same_training(job: Job) -> None:
    """Raise `ConfigError` when the job's folder holds a training with other settings."""
    if not job.run.config.is_file():
        return
    # data.root may differ: the hash of the data was compared
    wanted = with_absolute_paths(job.settings)
    if change := _first_change(job.run.settings(), wanted, ignored="data.root"):
        raise ConfigError(
            f"{job.folder} was trained with {change}: remove that folder, or give the arm another "
            "name"
        )


def _first_change(old: Settings, new: Settings, ignored: str = "") -> str:
    """The first key in which two trainings differ, 'key = old, not new'; empty where they agree."""
    before, after = _training_settings(old), _training_settings(new)
    changed = (key for key in after if before.get(key) != after[key] and key != ignored)
    return next((f"{key} = {before.get(key)!r}, not {after[key]!r}" for key in changed), "")


def _training_settings(settings: Settings) -> dict[str, Any]:
    """The settings that a training depends on, by dotted key."""
    flat: dict[str, Any] = {}
    for section, value in to_dict(settings).items():
        if section not in FREE_SECTIONS:
            is_section = isinstance(value, dict)
            flat |= (
                {f"{section}.{k}": v for k, v in value.items()} if is_section else {section: value}
            )
    flat["evaluation.every"] = settings.evaluation.every  # which checkpoints were kept
    flat["training.warm_start"] = Path(settings.training.warm_start).name  # the folder may move
    return flat


# --- evaluation ----------------------------------------------------------------------------------


def evaluate_arms(
    arms: Sequence[Arm],
    folder: ComparisonFolder,
    settings: Settings,
    slots: int | None,
    on_event: OnEvent,
) -> dict[Path, str]:
    """Evaluate every arm that is not evaluated, in parallel; return failure reasons by folder.

    The classifiers on real images, which all arms share, are trained first.
    """
    logs = folder.path / "jobs"

    def task(name: str, part: str, log: str, weight: float, **more: Any) -> Task:
        arguments = ("evaluate", str(folder.path), part)
        return Task(name, WORKER, arguments, logs / f"evaluate-{log}.log", weight, **more)

    first = [
        task(f"real classifier {number + 1}", f"reference:{number}", "real", 0.3)
        for number in range(settings.evaluation.seeds)
    ]
    tasks = [
        task(
            arm.label,
            f"arm:{arm.folder.name}",
            arm.folder.name,
            1.0 + 0.5 * (len(arm.jobs) - 1),
            after=tuple(one.name for one in first),
            done=is_arm_evaluated(settings, arm, folder),
        )
        for arm in arms
    ]
    if all(task.done for task in tasks):
        return {}
    on_event(_plan_event("evaluating", [*first, *tasks]))
    run_tasks([*first, *tasks], _core_groups(settings, 1, slots), on_event)
    return {arm.folder: task.failure for arm, task in zip(arms, tasks, strict=True) if task.failure}


# --- both ----------------------------------------------------------------------------------------


def _core_groups(settings: Settings, threads: int, slots: int | None) -> list[tuple[int, ...]]:
    """Cores of each task that may run at once; on a GPU `slots` (default 1) times all cores."""
    on_gpu = evaluation_device(settings) == "cuda"
    return core_groups(0) * (slots or 1) if on_gpu else core_groups(threads, slots)


def _plan_event(stage: str, tasks: Sequence[Task]) -> dict[str, Any]:
    return {
        "event": "plan",
        "stage": stage,
        "tasks": {task.name: task.weight for task in tasks},
        "done": [task.name for task in tasks if task.done],
    }


def failure_reason(
    arm: Arm, failures: dict[Path, str], folder: ComparisonFolder, settings: Settings
) -> str:
    """Why an arm has no figures, in one sentence; empty where it has.

    Paths in the comparison's folder are relative to it, so that a damaged file can be found; other
    paths of this machine are redacted.
    """
    reasons = {
        (f"{job.members[0]}: " if arm.is_per_hospital else "") + failures[job.folder]: None
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
