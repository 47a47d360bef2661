"""One arm of a comparison: a list of jobs, each a training in its own run folder and process."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedgan import files
from fedgan.comparison_folder import ComparisonFolder
from fedgan.config import Settings, from_dict, to_dict
from fedgan.data.dataset import ImageDataset
from fedgan.data.federation import Hospital
from fedgan.errors import CheckpointError, ConfigError
from fedgan.evaluation.reference import pool_hospitals
from fedgan.privacy.dry_run import check_can_begin
from fedgan.privacy.register import ledger_of
from fedgan.run_folder import RunFolder
from fedgan.runs import budget
from fedgan.runs.preparation import check_private_hospitals, is_prepared

FEDERATION, STANDALONE = "federation", "standalone"
POOLED = "pooled"  # stands for a hospital's name where one Trainer has the images of several


@dataclass(frozen=True)
class FederatedStart:
    """The federated model from which a standalone training continues: a round of another job."""

    folder: Path
    round: int
    images_seen: int  # by this hospital, in the federation, up to that round


@dataclass(frozen=True)
class Job:
    """One training. `kind`: a federation of the members, or one Trainer on their pooled images.

    `images`: real images per round of a standalone training (a federation apportions its own).
    `settings.seed` is the arm's seed. `pretraining`: folder of the training on public phantoms
    whose model this job starts from.
    """

    folder: Path
    kind: str
    settings: Settings
    images: tuple[int, ...] = ()
    start: FederatedStart | None = None
    pretraining: Path | None = None

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def members(self) -> tuple[str, ...]:
        return self.settings.federation.members


@dataclass(frozen=True)
class Arm:
    """One arm with one seed. `is_per_hospital`: each job's generator belongs to one hospital;
    else the arm's generator is that of `jobs[0]`.

    Variant of an ablation: `parent` is the arm that it modifies, `changes` its own keys,
    `overrides` all keys that differ from the scenario. `pretraining`: the training on public
    phantoms that it starts from, which is no part of its budget.
    """

    kind: str
    name: str
    seed: int
    folder: Path
    jobs: tuple[Job, ...]
    hospital_images: Mapping[str, int]
    overrides: tuple[str, ...] = ()
    is_per_hospital: bool = False
    members: tuple[str, ...] = ()
    parent: str = ""
    changes: tuple[str, ...] = ()
    pretraining: Job | None = None

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """An arm and its result: `failure` is a sentence, empty where it was trained and evaluated."""

    arm: Arm
    failure: str = ""

    @property
    def is_done(self) -> bool:
        return not self.failure


# --- arms ----------------------------------------------------------------------------------------


def centralized_arm(
    name: str, settings: Settings, folder: ComparisonFolder, sizes: Mapping[str, int]
) -> Arm:
    """One Trainer on the pooled images of all hospitals in `sizes`."""
    run, members = folder.arm(name, settings.seed), tuple(sizes)
    images = tuple(images_per_round(settings))
    job = Job(run.path, STANDALONE, standalone_settings(settings, members), images)
    seen = {POOLED: sum(images)}
    return Arm("centralized", name, settings.seed, run.path, (job,), seen, members=members)


def federated_arm(
    name: str,
    settings: Settings,
    folder: ComparisonFolder,
    sizes: Mapping[str, int],
    overrides: Sequence[str] = (),
    kind: str = "federated",
) -> Arm:
    """A federation of all hospitals in `sizes`."""
    run, members = folder.arm(name, settings.seed), tuple(sizes)
    own = from_dict(to_dict(settings), overrides, source=f"arm '{name}'")
    own = dataclasses.replace(own, federation=dataclasses.replace(own.federation, members=members))
    job = Job(run.path, FEDERATION, own)
    seen = {hospital: sum(images) for hospital, images in images_per_hospital(own, sizes).items()}
    return Arm(kind, name, settings.seed, run.path, (job,), seen, tuple(overrides), members=members)


# --- checks --------------------------------------------------------------------------------------


@contextlib.contextmanager
def arm_named_in_errors(arm: str) -> Iterator[None]:
    """Prefix a `ConfigError` with the name of the arm."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"arm '{arm}': {error}") from None


def check_arm(arm: Arm, hospitals: Sequence[Hospital]) -> None:
    """Raise the `ConfigError` with which a private training of the arm would not start.

    Trainings that were prepared before are skipped. `hospitals`: all of the comparison.
    """
    for job in arm.jobs:
        if not job.settings.privacy.on or is_prepared(job.run):
            continue
        members = [hospital for hospital in hospitals if hospital.name in job.members]
        with arm_named_in_errors(arm.name):
            if job.kind == STANDALONE:
                ledger = ledger_of(job.settings, members)
                batch, images = job.settings.training.batch_size, sum(job.images)
                check_can_begin(job.settings, pool_training_images(members), batch, images, ledger)
            else:
                check_private_hospitals(job.settings, members)


def pool_training_images(hospitals: Sequence[Hospital]) -> ImageDataset:
    """The training images of all hospitals as one dataset; those of a single hospital unchanged."""
    if len(hospitals) == 1:
        return hospitals[0].train
    return pool_hospitals([(hospital.name, hospital.train) for hospital in hospitals], POOLED)


# --- settings and images of a job ----------------------------------------------------------------


def standalone_settings(settings: Settings, members: tuple[str, ...]) -> Settings:
    """Settings of a training without a server: no strategy, no proximal term, no correction."""
    training = dataclasses.replace(settings.training, proximal_mu=0.0)
    federation = dataclasses.replace(
        settings.federation, strategy="fedavg", members=members, control_variates=False
    )
    return dataclasses.replace(settings, training=training, federation=federation)


def local_settings(settings: Settings, hospital: str, sizes: Mapping[str, int]) -> Settings:
    """Settings of one hospital alone, with the batch that it has in the federation."""
    batches = budget.make_budget(settings, list(sizes.values())).batches
    batch = dict(zip(sizes, batches, strict=True))[hospital]
    training = dataclasses.replace(settings.training, batch_size=batch)
    return standalone_settings(dataclasses.replace(settings, training=training), (hospital,))


def images_per_round(settings: Settings) -> list[int]:
    """Images of each round, summed over hospitals."""
    return budget.images_per_round(
        settings.training.kimg, settings.federation.rounds, settings.training.batch_size
    )


def images_per_hospital(settings: Settings, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Images of each round for each hospital, as the federation apportions them."""
    rows = budget.make_budget(settings, list(sizes.values())).images
    return {name: [row[number] for row in rows] for number, name in enumerate(sizes)}


# --- job files -----------------------------------------------------------------------------------


def write_job(job: Job, path: Path) -> None:
    """Write the file from which a worker process reads its job."""
    start = job.start and dataclasses.asdict(job.start) | {"folder": str(job.start.folder)}
    files.write_json(
        path,
        {
            "folder": str(job.folder),
            "kind": job.kind,
            "settings": to_dict(job.settings),
            "images": list(job.images),
            "start": start,
            "pretraining": None if job.pretraining is None else str(job.pretraining),
        },
    )


def read_job(path: Path) -> Job:
    """Read what `write_job` wrote. Raises `CheckpointError` for anything else."""
    try:
        found = files.parse_json(files.read_bytes(path))
        start = found["start"]
        return Job(
            Path(found["folder"]),
            found["kind"],
            from_dict(found["settings"], source=str(path)),
            tuple(found["images"]),
            start and FederatedStart(Path(start["folder"]), start["round"], start["images_seen"]),
            Path(found["pretraining"]) if found["pretraining"] else None,
        )
    except (OSError, ValueError, TypeError, KeyError, ConfigError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): remove it, `fedgan compare` writes it again"
        ) from None
