"""What one arm is made of: a list of trainings, each in a run folder of its own, that one process does."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedgan.comparison_folder import ComparisonFolder
from fedgan.config import Settings, from_dict, to_dict
from fedgan.data.dataset import ImageDataset
from fedgan.data.federation import Hospital
from fedgan.errors import ConfigError
from fedgan.evaluation.reference import pool_hospitals
from fedgan.privacy.dry_run import check_can_begin
from fedgan.run_folder import RunFolder
from fedgan.runs.budget import images_per_round, make_budget
from fedgan.runs.preparation import check_private_hospitals, is_prepared, ledger_of

FEDERATION, STANDALONE = "federation", "home"
EVERYBODY = "everybody"


@dataclass(frozen=True)
class Start:
    """Where a training at home begins: at the model of a federation's round, which is another job."""

    folder: Path
    round: int
    images_seen: int  # what this hospital had seen in the federation by then


@dataclass(frozen=True)
class Job:
    """One training. `kind`: a federation of the members, or one Trainer at home over the members' pooled images.

    `images`: real images of each round at home (a federation deals for itself). `settings.seed` is the arm's seed.
    """

    folder: Path
    kind: str
    settings: Settings
    images: tuple[int, ...] = ()
    start: Start | None = None
    after: Path | None = None  # the folder of the training on public phantoms that it begins from

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def members(self) -> tuple[str, ...]:
        return self.settings.federation.members


@dataclass(frozen=True)
class Arm:
    """One arm with one seed. The generator of `jobs[0]` is the arm's, or each job's is one hospital's (`by_hospital`).

    Of a rung of an ablation: `parent`, the arm that it comes from, and `changes`, what it changes of that; `overrides` are all
    changes since the scenario. `public`: the training on phantoms that it begins from, which is no part of its budget.
    """

    kind: str
    name: str
    seed: int
    folder: Path
    jobs: tuple[Job, ...]
    hospital_images: Mapping[str, int]
    overrides: tuple[str, ...] = ()
    by_hospital: bool = False
    members: tuple[str, ...] = field(default=())
    parent: str = ""
    changes: tuple[str, ...] = ()
    public: Job | None = None

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """An arm and what became of it; `failure` is a sentence, or empty for an arm that was trained and judged."""

    arm: Arm
    failure: str = ""

    @property
    def done(self) -> bool:
        return not self.failure


# --- the two that other arms are made from ----------------------------------------------------------


def centralized(
    name: str, settings: Settings, folder: ComparisonFolder, sizes: Mapping[str, int]
) -> Arm:
    """One Trainer at home over the pooled images of all hospitals."""
    run = folder.arm(name, settings.seed)
    shown = tuple(totals(settings))
    job = Job(run.path, STANDALONE, standalone(settings, tuple(sizes)), shown)
    everybody = {EVERYBODY: sum(shown)}
    return Arm(
        "centralized", name, settings.seed, run.path, (job,), everybody, members=tuple(sizes)
    )


def federated(
    name: str,
    settings: Settings,
    folder: ComparisonFolder,
    sizes: Mapping[str, int],
    overrides: Sequence[str] = (),
    kind: str = "federated",
) -> Arm:
    """A federation of all hospitals in `sizes`."""
    run = folder.arm(name, settings.seed)
    own = with_members(
        from_dict(to_dict(settings), overrides, source=f"arm '{name}'"), tuple(sizes)
    )
    job = Job(run.path, FEDERATION, own)
    shown = {hospital: sum(images) for hospital, images in dealt(own, sizes).items()}
    return Arm(
        kind, name, settings.seed, run.path, (job,), shown, tuple(overrides), members=tuple(sizes)
    )


# --- checks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def named(arm: str) -> Iterator[None]:
    """Say in a `ConfigError` which arm it is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"arm '{arm}': {error}") from None


def check_arm(arm: Arm, hospitals: Sequence[Hospital]) -> None:
    """Raise the `ConfigError` with which a private training of the arm would not begin. Those that have begun are not asked.

    `hospitals`: all of the comparison, as they were opened.
    """
    for job in arm.jobs:
        if not job.settings.privacy.on or is_prepared(job.run):
            continue
        members = [hospital for hospital in hospitals if hospital.name in job.members]
        with named(arm.name):
            if job.kind == STANDALONE:
                ledgers = [ledger_of(hospital, job.run) for hospital in members]
                check_can_begin(
                    job.settings,
                    pooled(members),
                    job.settings.training.batch_size,
                    sum(job.images),
                    ledgers,
                )
            else:
                check_private_hospitals(job.settings, members, job.run)


def pooled(hospitals: Sequence[Hospital]) -> ImageDataset:
    """The training images of all hospitals as one dataset; those of a single hospital as they are."""
    if len(hospitals) == 1:
        return hospitals[0].train
    return pool_hospitals([(hospital.name, hospital.train) for hospital in hospitals], EVERYBODY)


# --- settings of a job -----------------------------------------------------------------------------


def with_members(settings: Settings, members: tuple[str, ...]) -> Settings:
    """The settings for some of the hospitals; training.kimg stays the budget of the whole arm."""
    return dataclasses.replace(
        settings, federation=dataclasses.replace(settings.federation, members=members)
    )


def standalone(settings: Settings, members: tuple[str, ...]) -> Settings:
    """The settings for a training without a server: no strategy, so no proximal term, no correction and no condition of one."""
    training = dataclasses.replace(settings.training, proximal_mu=0.0)
    federation = dataclasses.replace(
        settings.federation, strategy="fedavg", members=members, control_variates=False
    )
    return dataclasses.replace(settings, training=training, federation=federation)


def totals(settings: Settings) -> list[int]:
    """Images of each round, summed over hospitals."""
    return images_per_round(
        settings.training.kimg, settings.federation.rounds, settings.training.batch_size
    )


def dealt(settings: Settings, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Images of each round for each hospital, as the federation deals them."""
    rows = make_budget(settings, list(sizes.values())).images
    return {name: [row[number] for row in rows] for number, name in enumerate(sizes)}


def alone(settings: Settings, hospital: str, sizes: Mapping[str, int]) -> Settings:
    """The settings of one hospital at home, with the step that it has in the federation."""
    batch = dict(zip(sizes, make_budget(settings, list(sizes.values())).batches, strict=True))[
        hospital
    ]
    training = dataclasses.replace(settings.training, batch_size=batch)
    return standalone(dataclasses.replace(settings, training=training), (hospital,))
