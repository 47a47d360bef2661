"""Preparation of a run folder: everything that a resumed run needs.

`environment.json` is written last; a folder with a `config.toml` but no `environment.json` stopped
during its preparation and is prepared again.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgan import files
from fedgan.config import Settings, lasting, settings_hash, to_dict
from fedgan.data.federation import (
    Hospital,
    describe_hospitals,
    find_shards,
    open_hospital,
    open_hospitals,
    partition_record,
)
from fedgan.data.phantoms import write_phantoms
from fedgan.data.splits import check_disjoint_patients
from fedgan.errors import CheckpointError, ConfigError, DataError, FederationError
from fedgan.evaluation.features import REFERENCE, check_features
from fedgan.evaluation.reference import merged, pool_hospitals
from fedgan.privacy.dry_run import check_can_begin
from fedgan.privacy.register import ledger_of
from fedgan.privacy.validator import check_private, check_shown
from fedgan.run_folder import RunFolder
from fedgan.runs.budget import Plan
from fedgan.runs.compatibility import check_compatibility, check_deployable
from fedgan.runs.environment import environment
from fedgan.runs.participants import Participant
from fedgan.training.trainer import resolve_device

# environment variable: a deployment's evaluation.root where the scenario names none
REFERENCE_ROOT = "FEDGAN_REFERENCE"

MOST_CHANGES = 5  # changed settings in an error message
OnEvent = Callable[[dict[str, Any]], None]


def prepare_deployed(settings: Settings, run: RunFolder) -> None:
    """Check the scenario and write config and environment of a deployment; no shard is opened.

    `data.root` is removed: each hospital names its own shard. `evaluation.root` names the
    evaluator's real images. hospitals.json follows after the introductions. Raises as
    `prepare_run`.
    """
    check_deployable(settings)
    settings = as_deployed(settings)
    if not settings.evaluation.root:
        raise ConfigError(
            "evaluation.root is empty: in a deployment the server opens no hospital's shard, so "
            "name the evaluator's real images, e.g. --set evaluation.root=/reference, or "
            f"{REFERENCE_ROOT} in the ServerApp's environment"
        )
    resolve_device(settings.training.device)
    if settings.evaluation.features != REFERENCE:
        check_features(settings.evaluation.features)
    merged(open_evaluation_root(settings)[0].train, settings.evaluation.label_map)
    run.write_settings(settings)
    files.write_json(run.environment, environment(settings, []) | {"deployed": True})


def as_deployed(settings: Settings) -> Settings:
    """The settings that a deployed run keeps: no `data.root`, and paths of this machine."""
    evaluation = settings.evaluation
    if not evaluation.root:
        evaluation = dataclasses.replace(evaluation, root=os.environ.get(REFERENCE_ROOT, ""))
    data = dataclasses.replace(settings.data, root="")
    return with_absolute_paths(dataclasses.replace(settings, data=data, evaluation=evaluation))


def is_deployed(run: RunFolder) -> bool:
    """Whether a prepared run is a deployment, whose hospitals hold their own shards."""
    return (run.read_json(run.environment) or {}).get("deployed") is True


def prepare_run(
    settings: Settings,
    run: RunFolder,
    on_event: OnEvent = lambda event: None,
    simulated: bool = False,
) -> list[Hospital]:
    """Check the scenario, generate phantoms without `data.root`, and write the run's files.

    The files are config, hospitals, partition and environment. `simulated`: the hospitals opened
    here are also those that train, so that a private run is refused now and not in its first round.
    Raises `ConfigError`, `DataError` or `MachineError` and restores the folder; an existing
    config.toml stays, so that the run can be resumed later.
    """
    check_compatibility(settings)
    check_private(settings)
    resolve_device(settings.training.device)
    settings = with_absolute_paths(settings)
    if settings.evaluation.features != REFERENCE:
        check_features(settings.evaluation.features)
    reference = open_evaluation_root(settings)
    begun = run.config.is_file()
    try:
        if settings.data.root:
            on_event({"event": "preparing", "what": "hospitals"})
            hospitals = open_hospitals(settings)
            check_evaluation(settings, hospitals, reference)
            run.write_settings(settings)
        else:
            run.write_settings(settings)
            on_event({"event": "preparing", "what": "phantoms"})
            write_run_phantoms(settings, run)
            hospitals = open_hospitals(settings, shards_of(settings, run))
            check_evaluation(settings, hospitals, reference)
        if simulated:
            check_private_hospitals(settings, hospitals)
        key = write_key(run) if settings.privacy.on else ""
        files.write_json(run.hospitals, describe_hospitals(hospitals, key))
        if record := partition_record(hospitals):
            files.write_json(run.partition, record)
        files.write_json(
            run.environment, environment(settings, find_shards(shards_of(settings, run)))
        )
    except BaseException:
        for path in (
            run.hospitals,
            run.data_key,
            run.partition,
            run.environment,
            *([] if begun else [run.config]),
        ):
            path.unlink(missing_ok=True)
        shutil.rmtree(run.path / "shards", ignore_errors=True)
        raise
    return hospitals


def check_private_hospitals(settings: Settings, hospitals: Sequence[Hospital]) -> None:
    """Raise the `ConfigError` that would end a hospital's private training in its first round."""
    if not settings.privacy.on:
        return
    plan = Plan(
        settings,
        [
            Participant(number, hospital.name, len(hospital.train))
            for number, hospital in enumerate(hospitals)
        ],
    )
    for number, hospital in enumerate(hospitals):
        ledger = ledger_of(settings, [hospital])
        check_can_begin(
            settings, hospital.train, plan.batches[number], plan.planned(number), ledger
        )


def write_key(run: RunFolder) -> str:
    """Write a random key for the hashes of a private run, readable by its owner only."""
    run.data_key.unlink(missing_ok=True)
    with open(
        run.data_key, "w", encoding="ascii", opener=lambda path, flags: os.open(path, flags, 0o600)
    ) as stream:
        stream.write(secrets.token_hex(32))
    return data_key(run)


def data_key(run: RunFolder) -> str:
    """The key of a private run's hashes of real images; empty without privacy."""
    try:
        return run.data_key.read_text(encoding="ascii") if run.data_key.is_file() else ""
    except ValueError:
        raise CheckpointError(f"{run.data_key} is damaged: restore it from a backup") from None


def open_prepared(settings: Settings, run: RunFolder) -> list[Hospital]:
    """The hospitals of a prepared run."""
    return open_hospitals(settings, shards_of(settings, run))


def evaluation_hospitals(settings: Settings, run: RunFolder) -> list[Hospital]:
    """The hospitals with the evaluator's images: under `evaluation.root`, or the run's own."""
    return open_evaluation_root(settings) or open_prepared(settings, run)


def open_evaluation_root(settings: Settings) -> list[Hospital]:
    """The hospitals under `evaluation.root`; none where it is empty."""
    root = settings.evaluation.root
    return [open_hospital(settings, path) for path in find_shards(root)] if root else []


def check_evaluation(
    settings: Settings, hospitals: Sequence[Hospital], reference: Sequence[Hospital]
) -> None:
    """Raise `ConfigError` or `DataError` for data that would fail in the evaluation.

    `reference` (of `evaluation.root`) must have the hospitals' labels, channels and resolution and
    no patient of the training; `evaluation.label_map` must have a rule for each label. The report
    of a private run must show no training image.
    """
    first = hospitals[0].train
    for other in (hospital.train for hospital in reference):
        is_same = (other.label_names, other.exclusive) == (first.label_names, first.exclusive)
        if not is_same or other.images.shape[1:] != first.images.shape[1:]:
            raise DataError(
                f"evaluation.root: '{other.name}' differs from the hospitals in labels, channels "
                "or resolution: import both with the same options"
            )
    merged(first, settings.evaluation.label_map)
    check_shown(
        settings,
        (hospital.train for hospital in hospitals),
        (other.train for other in reference),
    )
    if reference:
        trained = pool_hospitals(
            [(hospital.name, hospital.train) for hospital in hospitals], "train"
        )
        held = (
            pool_hospitals([(other.name, other.split(split)) for other in reference], split)
            for split in ("val", "test")
        )
        check_disjoint_patients(trained, *held)


def is_prepared(run: RunFolder) -> bool:
    """Whether the run's preparation is complete.

    Raises `CheckpointError` for a run that has rounds but no environment.json: to prepare it again
    would begin it anew in the same folder.
    """
    if run.environment.is_file():
        return True
    if run.last_round() is not None or run.metrics.exists() or any(run.arms.glob("*/config.toml")):
        raise CheckpointError(
            f"{run.environment} is missing, although rounds of this run are done: restore it from "
            "a backup, or start a new run in another folder"
        )
    return False


def experiment_of(run: RunFolder) -> str:
    """The experiment id of a run whose config.toml is as it was prepared: nothing trains without.

    Raises `FederationError` for a run that was never prepared, `ConfigError` where config.toml has
    other settings than were prepared, and `CheckpointError` for a damaged file.
    """
    found = run.read_json(run.environment) or {}
    experiment, expected = found.get("experiment"), found.get("settings_hash")
    if not experiment or not isinstance(experiment, str):
        raise FederationError(
            f"{run.environment} has no experiment id: this run was never prepared, start it again"
        )
    if not isinstance(expected, str):
        raise CheckpointError(
            f"{run.environment} has no settings_hash, with which config.toml is compared: restore "
            "it from a backup, use the version of fedgan that wrote it, or start a new run"
        )
    settings = run.settings()
    if settings_hash(settings) != expected:
        changed, source = changes_since(run, settings), "a backup"
        if changed:
            newest = run.checkpoint(run.last_round() or 0).with_suffix(".json").name
            source = f'"settings" of checkpoints/{newest}'
        raise ConfigError(
            f"{run.config} was changed after the run had begun"
            f"{': ' * bool(changed)}{changed}; restore it from {source}, or start a new run in "
            "another folder"
        )
    return experiment


def changes_since(run: RunFolder, settings: Settings, meta: Mapping[str, Any] | None = None) -> str:
    """The settings that differ from those of a checkpoint, 'key = new, not old; …'; '' for none.

    `meta`: of the checkpoint; None: of the newest, where it can be read.
    """
    if meta is None:
        try:
            path = run.checkpoint(run.last_round() or 0).with_suffix(".json")
            meta = run.read_json(path) or {}
        except CheckpointError:
            return ""
    before, now = meta.get("settings"), lasting(to_dict(settings))
    if not isinstance(before, dict):
        return ""
    old = lasting(before)
    texts = [
        f"{key} = {value!r:.60}, not {old.get(key)!r:.60}"
        for key, value in now.items()
        if key not in old or old[key] != value
    ]
    more = [f"{len(texts) - MOST_CHANGES} more"] if len(texts) > MOST_CHANGES else []
    return "; ".join([*texts[:MOST_CHANGES], *more])


def shards_of(settings: Settings, run: RunFolder) -> Path:
    """The folder of the run's shards: `data.root`, or the phantoms in the run folder."""
    return Path(settings.data.root) if settings.data.root else run.path / "shards"


def write_run_phantoms(settings: Settings, run: RunFolder) -> None:
    """Generate phantoms into the run folder, one shard per hospital."""
    data = settings.data
    shutil.rmtree(run.path / "shards", ignore_errors=True)
    write_phantoms(
        run.path / "shards",
        data.phantoms,
        data.phantom_images,
        data.resolution,
        settings.federation.hospitals,
        settings.data_seed,
    )


def with_absolute_paths(settings: Settings) -> Settings:
    """The settings with absolute paths."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().resolve()) if path else ""

    data = dataclasses.replace(settings.data, root=absolute(settings.data.root))
    training = dataclasses.replace(
        settings.training, warm_start=absolute(settings.training.warm_start)
    )
    evaluation = dataclasses.replace(settings.evaluation, root=absolute(settings.evaluation.root))
    if evaluation.features != REFERENCE:
        evaluation = dataclasses.replace(evaluation, features=absolute(evaluation.features))
    return dataclasses.replace(settings, data=data, training=training, evaluation=evaluation)
