"""Before the first round: the run folder with everything that a resumed run needs to know.

`environment.json` is written last; a folder that has a `config.toml` but no `environment.json` was
stopped while being prepared and is prepared again.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import secrets
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fedgan import files
from fedgan.config import Settings
from fedgan.data.federation import (
    Hospital,
    describe_hospitals,
    find_shards,
    open_hospital,
    open_hospitals,
    partition_record,
)
from fedgan.data.phantoms import write_phantoms
from fedgan.data.shard import Shard
from fedgan.data.shard_files import is_phantom_source
from fedgan.data.splits import check_disjoint_patients
from fedgan.errors import ConfigError, DataError, FederationError
from fedgan.evaluation.features import REFERENCE, check_features
from fedgan.evaluation.reference import merged, pool_hospitals
from fedgan.machine import usable_cores
from fedgan.privacy.dry_run import check_can_begin
from fedgan.privacy.ledger import NAME as LEDGER
from fedgan.privacy.ledger import Ledger
from fedgan.privacy.validator import check_private
from fedgan.run_folder import RunFolder
from fedgan.runs.budget import Plan
from fedgan.runs.compatibility import check_compatibility, check_deployable
from fedgan.runs.participants import Participant
from fedgan.training.trainer import resolve_device

PACKAGES = ("flwr", "ray", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "safetensors")

REFERENCE_ROOT = (
    "FEDGAN_REFERENCE"  # environment: a deployment's evaluation.root, where the scenario names none
)

OnEvent = Callable[[dict[str, Any]], None]


def prepare_deployed(settings: Settings, run: RunFolder) -> None:
    """Check the scenario and write config and environment of a federation whose hospitals are elsewhere: none is opened here.

    The hospitals hold their own shards, so `data.root` is theirs to name and is left out; `evaluation.root` names the real images
    of the evaluator. hospitals.json follows when they have introduced themselves. Raises as `prepare_run` does.
    """
    check_deployable(settings)
    settings = as_deployed(settings)
    if not settings.evaluation.root:
        raise ConfigError(
            "evaluation.root is empty: in a deployment the server opens no hospital's shard, so name the real images that "
            f"the evaluator tests on, e.g. --set evaluation.root=/reference, or {REFERENCE_ROOT} in the ServerApp's environment"
        )
    resolve_device(settings.training.device)
    if settings.evaluation.features != REFERENCE:
        check_features(settings.evaluation.features)
    merged(evaluation_guests(settings)[0].train, settings.evaluation.label_map)
    run.write_settings(settings)
    files.write_json(run.environment, environment(settings, []) | {"deployed": True})


def as_deployed(settings: Settings) -> Settings:
    """The settings that a deployed run keeps: hospitals name their own data, and paths are this machine's."""
    evaluation = settings.evaluation
    if not evaluation.root:
        evaluation = dataclasses.replace(evaluation, root=os.environ.get(REFERENCE_ROOT, ""))
    data = dataclasses.replace(settings.data, root="")
    return with_absolute_paths(dataclasses.replace(settings, data=data, evaluation=evaluation))


def is_deployed(run: RunFolder) -> bool:
    """Whether the hospitals of a prepared run are elsewhere."""
    return (run.read_json(run.environment) or {}).get("deployed") is True


def prepare_run(
    settings: Settings,
    run: RunFolder,
    on_event: OnEvent = lambda event: None,
    simulated: bool = False,
) -> list[Hospital]:
    """Check the scenario, draw phantoms where no data is named, and write config, hospitals, partition and environment.

    `simulated`: a federation of the very hospitals that are opened here follows, so that what a private one would refuse
    can be told in its own words.
    Raises `ConfigError`, `DataError` or `MachineError` and leaves the folder as it was: a config.toml that was there
    stays, so that what cannot be prepared now can be resumed later.
    """
    check_compatibility(settings)
    check_private(settings)
    resolve_device(settings.training.device)
    settings = with_absolute_paths(settings)
    if settings.evaluation.features != REFERENCE:
        check_features(settings.evaluation.features)
    guests = evaluation_guests(settings)
    begun = run.config.is_file()
    try:
        if settings.data.root:
            on_event({"event": "preparing", "what": "hospitals"})
            hospitals = open_hospitals(settings)
            check_evaluation(settings, hospitals, guests)
            run.write_settings(settings)
        else:
            run.write_settings(settings)
            on_event({"event": "preparing", "what": "phantoms"})
            write_run_phantoms(settings, run)
            hospitals = open_hospitals(settings, shards_of(settings, run))
            check_evaluation(settings, hospitals, guests)
        if simulated:
            check_private_hospitals(settings, hospitals, run)
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


def check_private_hospitals(
    settings: Settings, hospitals: Sequence[Hospital], run: RunFolder
) -> None:
    """Raise the `ConfigError` that would end the private training of one of these hospitals in its first round."""
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
        ledgers = [ledger_of(hospital, run)]
        check_can_begin(
            settings, hospital.train, plan.batches[number], plan.planned(number), ledgers
        )


def ledger_of(hospital: Hospital, run: RunFolder) -> Ledger:
    """The ledger of a simulated hospital: beside its shard; in the run where it was dealt for this run."""
    return Ledger((hospital.shard_path or run.hospital_state(hospital.name)) / LEDGER)


def write_key(run: RunFolder) -> str:
    """Draw the key of a private run's hashes; only its owner may read it."""
    run.data_key.unlink(missing_ok=True)
    with open(
        run.data_key, "w", encoding="ascii", opener=lambda path, flags: os.open(path, flags, 0o600)
    ) as stream:
        stream.write(secrets.token_hex(32))
    return data_key(run)


def data_key(run: RunFolder) -> str:
    """What a private run's hashes of real images are keyed by; empty where the run is not private."""
    return run.data_key.read_text(encoding="ascii") if run.data_key.is_file() else ""


def open_prepared(settings: Settings, run: RunFolder) -> list[Hospital]:
    """The hospitals of a run that `prepare_run` has prepared."""
    return open_hospitals(settings, shards_of(settings, run))


def evaluation_hospitals(settings: Settings, run: RunFolder) -> list[Hospital]:
    """Whose real images the evaluator measures against: those under `evaluation.root`, or the hospitals' own."""
    return evaluation_guests(settings) or open_prepared(settings, run)


def evaluation_guests(settings: Settings) -> list[Hospital]:
    """The hospitals under `evaluation.root`, which need not take part in the training; none where it is empty."""
    root = settings.evaluation.root
    return [open_hospital(settings, path) for path in find_shards(root)] if root else []


def check_evaluation(
    settings: Settings, hospitals: Sequence[Hospital], guests: Sequence[Hospital]
) -> None:
    """Raise `ConfigError` or `DataError` for data that the evaluator would refuse only after the training.

    Guests must have the hospitals' labels, channels and resolution, and no patient that is in the training;
    `evaluation.label_map` must have a rule for each label.
    """
    first = hospitals[0].train
    for guest in (hospital.train for hospital in guests):
        same = (guest.label_names, guest.exclusive) == (first.label_names, first.exclusive)
        if not same or guest.images.shape[1:] != first.images.shape[1:]:
            raise DataError(
                f"evaluation.root: '{guest.name}' differs from the hospitals in labels, channels or resolution: import both alike"
            )
    merged(first, settings.evaluation.label_map)
    if guests:
        trained = pool_hospitals([(hospital.name, hospital.train) for hospital in hospitals], "train")
        held = (
            pool_hospitals([(guest.name, guest.split(split)) for guest in guests], split)
            for split in ("val", "test")
        )
        check_disjoint_patients(trained, *held)


def is_prepared(run: RunFolder) -> bool:
    """Whether `prepare_run` came to its end."""
    return run.environment.is_file()


def experiment_of(run: RunFolder) -> str:
    """The id that the hospitals' states are keyed by. Raises `FederationError` when the run was never prepared."""
    experiment = (run.read_json(run.environment) or {}).get("experiment")
    if not experiment:
        raise FederationError(
            f"{run.environment} names no experiment: this run was never prepared, start it again"
        )
    return str(experiment)


def shards_of(settings: Settings, run: RunFolder) -> Path:
    """Where the run's shards lie: `data.root`, or the phantoms in the run folder."""
    return Path(settings.data.root) if settings.data.root else run.path / "shards"


def write_run_phantoms(settings: Settings, run: RunFolder) -> None:
    """Draw the embedded default data into the run folder, a shard a hospital."""
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
    """Settings whose paths no longer depend on the working directory."""

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


def environment(settings: Settings, shards: Sequence[Path]) -> dict[str, Any]:
    """The content of environment.json: experiment id, versions, machine, threads, and where the data of `shards` comes from."""
    return {
        "experiment": uuid.uuid4().hex[:16],
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": {
            "processor": _processor(),
            "cores": usable_cores(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
            if hasattr(os, "sysconf")
            else None,
            "gpus": [
                torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
            ],
        },
        "threads_per_hospital": settings.federation.threads or usable_cores(),
        "sources": [
            {
                "hospital": card.name,
                "source": card.source,
                "licence": card.licence,
                "content_hash": None
                if settings.privacy.on and not is_phantom_source(card.source)
                else card.content_hash,
            }
            for card in (Shard.open(path).card for path in shards)
        ],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
