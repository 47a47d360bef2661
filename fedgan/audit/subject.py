"""Subject of an audit: the model, one hospital's images by role, the spaces of comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fedgan.audit.attacks.contrastive import train_embedding
from fedgan.audit.attacks.nearest import Moves, pixels
from fedgan.config import Settings
from fedgan.data.dataset import HospitalData, ImageArray, ImageDataset, pool, unit_numbers
from fedgan.data.federation import Downsampled
from fedgan.data.splits import check_disjoint_patients
from fedgan.errors import FedganError
from fedgan.evaluation.features import ReferenceExtractor
from fedgan.evaluation.reference import OnProgress as OnProgress
from fedgan.evaluation.reference import RealReference
from fedgan.evaluation.sampling import generate_images, synthetic_labels
from fedgan.models.stylegan2.discriminator import Discriminator

MIN_IMAGES = 30  # training and held-out: with fewer, the 5 % threshold rests on one image
MIN_PATIENTS = 12  # held-out, divided into three parts
PIXEL_SIDE = 32  # side to which larger images are averaged down for pixel distances
MAX_TRAINING_IMAGES = 20_000  # per hospital; of more, a seeded sample is searched
BLOCK = 1024  # images per batch of pixel rows


@dataclass(frozen=True)
class AuditSettings:
    """Settings of an audit. The same settings give the same numbers."""

    seed: int = 0
    images: int = 2000  # synthetic images per hospital
    projected: int = 64  # training images, and as many held-out ones, to project; 0: none
    projection_steps: int = 100
    embedding_steps: int = 300
    shadows: int = 0  # shadow models per hospital, an even number; 0: none
    shadow_kimg: float = 2.0  # images seen by each shadow model, in thousands
    canaries: int = 0  # canaries of each kind per hospital; 0: none
    canary_kimg: float = 0.0  # images seen by the training with canaries; 0: as in the run
    bootstrap: int = 1000
    psi: float = 1.0  # truncation of the synthetic images, as in the release


@dataclass(frozen=True)
class LocalTraining:
    """One hospital's training in a run: number, images per step, images of all rounds.

    `least_noise`: lower bound of its noise multiplier (`privacy.noise_split = "equal"`).
    """

    number: int
    batch: int
    planned: int
    least_noise: float = 0.0


def local_settings(settings: Settings, batch: int) -> Settings:
    """The run's settings for a training of one hospital: from scratch, without a limit of ε."""
    return dataclasses.replace(
        settings,
        training=dataclasses.replace(settings.training, batch_size=batch, warm_start=""),
        privacy=dataclasses.replace(settings.privacy, max_epsilon=0.0),
    )


@dataclass(frozen=True)
class AuditedModel:
    """The model under audit: the run's settings, its generator, and its discriminator if exchanged.

    `generator`: anything that `generate_images` accepts; the projection needs fedgan's own
    `Generator`. `numbers`: number by name of the hospitals that the networks are conditioned on
    (`model.hospitals`). `trainings`: each hospital's own training in the run, by name.
    """

    settings: Settings
    generator: Any
    discriminator: Discriminator | None = None
    device: str = "cpu"
    numbers: Mapping[str, int] = field(default_factory=dict)
    trainings: Mapping[str, LocalTraining] = field(default_factory=dict)

    @contextmanager
    def conditioned_on(self, hospital: str) -> Iterator[bool]:
        """Condition the networks on `hospital` alone, a stronger attack than the mixture.

        Yields whether the networks are conditioned on it.
        """
        mappings = [
            getattr(network, "mapping", None) for network in (self.generator, self.discriminator)
        ]
        with ExitStack() as stack:
            for mapping in mappings if hospital in self.numbers else ():
                if mapping is not None:
                    stack.enter_context(
                        mapping.hospital_condition.restricted_to(self.numbers[hospital])
                    )
            yield hospital in self.numbers


@dataclass(frozen=True)
class Roles:
    """One hospital's images by role in the audit.

    `train`: training images, which the generator may have memorised. `held_out`: validation and
    test images, of other patients. Rows of `held_out`, in three parts of about equal size without
    common patients: `non_members`; `pseudo_members`, in the place of members (the same figure for
    held-out images); `reference`, for attacks that need images of the population. `members`: rows
    of `train`, as many as `non_members`. `query_half`, `reference_half`: two halves of `held_out`,
    also by patient, for the positive control of copies. `…_patients`: one number per image, equal
    for images of one patient. `training_images`: size of the training split, of which `train` is a
    sample above 20,000 images.
    """

    name: str
    train: ImageDataset
    held_out: ImageDataset
    train_patients: np.ndarray
    held_out_patients: np.ndarray
    members: np.ndarray
    non_members: np.ndarray
    pseudo_members: np.ndarray
    reference: np.ndarray
    query_half: np.ndarray
    reference_half: np.ndarray
    training_images: int


def held_out_count(hospital: HospitalData) -> int:
    """Number of validation and test images."""
    return len(hospital.val) + len(hospital.test)


def reason_unauditable(hospital: HospitalData) -> str:
    """Why a hospital has too few images or patients for an audit; empty if it has enough."""
    held_out, train = held_out_count(hospital), len(hospital.train)
    if min(held_out, train) < MIN_IMAGES:
        return (
            f"{train} training and {held_out} held-out images are too few to measure anything: "
            f"{MIN_IMAGES} of each are needed."
        )
    parts = [data for data in (hospital.val, hospital.test) if len(data)]
    patients = sum(int(unit_numbers(data).max()) + 1 for data in parts)
    if patients < MIN_PATIENTS:
        return (
            f"Held-out images of {patients} patients are too few to divide: "
            f"{MIN_PATIENTS} patients are needed."
        )
    return ""


def assign_roles(hospital: HospitalData, seed: int) -> Roles:
    """Assign one hospital's images to their roles by `seed`; it needs held-out images.

    Raises `SplitError` for a patient both in training and held out.
    """
    parts = [data for data in (hospital.val, hospital.test) if len(data)]
    check_disjoint_patients(hospital.train, *parts)
    held_out = pool(parts, "held out") if len(parts) > 1 else parts[0]
    rng = np.random.default_rng([seed, 11])
    count = len(hospital.train)
    rows = (
        np.sort(rng.choice(count, MAX_TRAINING_IMAGES, replace=False))
        if count > MAX_TRAINING_IMAGES
        else np.arange(count)
    )
    train = hospital.train.take(rows) if count > MAX_TRAINING_IMAGES else hospital.train
    patients = unit_numbers(held_out)
    non_members, pseudo_members, reference = _parts(patients, 3, rng)
    query_half, reference_half = _parts(patients, 2, rng)
    members = np.sort(rng.choice(len(train), min(len(train), len(non_members)), replace=False))
    return Roles(
        name=hospital.name,
        train=train,
        held_out=held_out,
        train_patients=unit_numbers(train),
        held_out_patients=patients,
        members=members,
        non_members=non_members,
        pseudo_members=pseudo_members,
        reference=reference,
        query_half=query_half,
        reference_half=reference_half,
        training_images=count,
    )


def _parts(patients: np.ndarray, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Divide all rows into `count` parts, no patient in two.

    Patients come in random order, each into the part with the fewest images so far.
    """
    sizes = np.bincount(patients)
    part_of, filled = np.zeros(len(sizes), np.int64), np.zeros(count)
    for patient in rng.permutation(len(sizes)):
        part_of[patient] = int(filled.argmin())
        filled[part_of[patient]] += sizes[patient]
    return [np.flatnonzero(part_of[patients] == part) for part in range(count)]


def companion_images(roles: Roles, group: int) -> tuple[Any, np.ndarray] | None:
    """Companions for minibatch-std in `discriminator_scores`; None if too few or not needed."""
    reference = roles.held_out.take(roles.reference)
    return (reference.images, reference.labels) if group and len(reference) >= group else None


def draw_synthetic(
    audited: AuditedModel, train: ImageDataset, count: int, seed: int, psi: float
) -> np.ndarray:
    """`count` images (count, C, H, W) uint8 in this hospital's label mix.

    Raises `FedganError` for images of another size.
    """
    labels = synthetic_labels(train.labels, count, seed)
    images = generate_images(audited.generator, labels, seed, psi, device=audited.device)
    if images.shape[1:] != tuple(train.images.shape[1:]):
        raise FedganError(
            f"the generator gives images of {images.shape[1:]} (channels, height, width), those of "
            f"'{train.name}' are {tuple(train.images.shape[1:])}: audit with the shards of the run"
        )
    return images


@dataclass(frozen=True)
class Space:
    """A space of comparison: `rows` maps images (N, C, H, W) uint8 to rows (N, F) float32.

    `moves`: transformations under which copies are searched. `fitted`: whether the space was fitted
    to the training images. Then only synthetic and held-out images are comparable, not training and
    held-out ones, because the network was trained on the former.
    """

    name: str
    rows: Callable[[ImageArray], np.ndarray]
    moves: Moves | None = None
    fitted: bool = False


def pixel_space(shape: tuple[int, ...]) -> Space:
    """Pixels of images of `shape` (C, H, W), averaged down to 32 per side at most.

    Copies are also found mirrored and moved by one such pixel. Nothing is fitted, so training and
    held-out images are comparable.
    """
    channels, height, width = shape
    factor = max(1, height // PIXEL_SIDE)

    def rows(images: ImageArray) -> np.ndarray:
        small = Downsampled(images, factor) if factor > 1 else images
        starts = range(0, images.shape[0], BLOCK)
        blocks = [
            pixels(small[np.arange(start, min(start + BLOCK, images.shape[0]))]) for start in starts
        ]
        return (
            np.concatenate(blocks)
            if blocks
            else np.empty((0, channels * (height // factor) * (width // factor)), np.float32)
        )

    return Space(
        "pixels", rows, Moves((channels, height // factor, width // factor), flips=True, shifts=1)
    )


class Spaces:
    """The three spaces of one hospital. Networks are trained on first use and stay here."""

    def __init__(
        self,
        hospital: HospitalData,
        roles: Roles,
        settings: Settings,
        audit: AuditSettings,
        device: str,
    ) -> None:
        self.roles, self.audit, self.device = roles, audit, device
        evaluation = settings.evaluation
        self._reference = RealReference(
            hospital.train, hospital.val, hospital.test, evaluation, audit.seed, device
        )

    @cached_property
    def pixels(self) -> Space:
        return pixel_space(self.roles.train.images.shape[1:])

    @cached_property
    def features(self) -> Space | None:
        """Features of `evaluation.features`, with a reference classifier of this hospital only.

        None where there are no classes to train it on.
        """
        if not self._reference.can_extract:
            return None
        extractor = self._reference.extractor
        fitted = isinstance(extractor, ReferenceExtractor)
        return Space(
            "features", lambda images: np.asarray(extractor(images), np.float32), fitted=fitted
        )

    @cached_property
    def embedding(self) -> Space:
        """The contrastive embedding, trained on this hospital's training images."""
        trained = train_embedding(
            self.roles.train.images,
            seed=self.audit.seed,
            steps=self.audit.embedding_steps,
            device=self.device,
        )
        return Space("embedding", trained.features, fitted=True)
