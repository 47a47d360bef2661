"""What an audit looks at: the model, one hospital's images by their roles, and the spaces in which images are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fedgan.audit.attacks.contrastive import train_embedding
from fedgan.audit.attacks.nearest import Moves, pixels
from fedgan.config import Settings
from fedgan.data.dataset import HospitalData, ImageArray, ImageDataset, pool
from fedgan.data.federation import Downsampled
from fedgan.data.splits import check_disjoint_patients
from fedgan.errors import FedganError
from fedgan.evaluation.features import ReferenceExtractor
from fedgan.evaluation.metrics.bootstrap import clusters
from fedgan.evaluation.reference import RealReference
from fedgan.evaluation.sampling import generate_images, synthetic_labels
from fedgan.models.stylegan2.discriminator import Discriminator

OnProgress = Callable[[str], None]
FEWEST = (
    30  # held-out images: with fewer, a threshold that 5 % of them fall below is one image's luck
)
FEWEST_PATIENTS = 12  # held-out ones, who are divided into three parts
PIXEL_SIDE = 32  # larger images are averaged down to this side before their pixels are compared
MOST_TRAINING = (
    20_000  # training images of one hospital that are looked up; a seeded sample of more
)
BLOCK = 1024  # images in memory at once while their pixels are read


@dataclass(frozen=True)
class AuditSettings:
    """How thoroughly a run is audited. The same settings give the same numbers, whatever was audited before."""

    seed: int = 0
    images: int = 2000  # synthetic images drawn for each hospital
    projected: int = 64  # training images, and as many held-out ones, that are projected onto the generator; 0: none
    projection_steps: int = 100
    embedding_steps: int = 300
    shadows: int = 0  # shadow models a hospital, an even number; 0: none
    shadow_kimg: float = 2.0  # real images that each of them is shown, in thousands
    bootstrap: int = 1000
    psi: float = 1.0  # truncation of the synthetic images: that of the release


@dataclass(frozen=True)
class AuditedModel:
    """The model under audit: the run's settings, its generator, and its discriminator where that travels.

    `generator`: anything that `generate_images` draws from; the projection needs fedgan's own `Generator`.
    `numbers`: by name those of the hospitals that the networks know and tell apart (`model.hospitals`), else empty.
    """

    settings: Settings
    generator: Any
    discriminator: Discriminator | None = None
    device: str = "cpu"
    numbers: Mapping[str, int] = field(default_factory=dict)

    @contextmanager
    def conditioned_on(self, hospital: str) -> Iterator[bool]:
        """Inside, networks that tell hospitals apart speak of `hospital` alone, which is more of an attack than a mixture is.

        → whether they do.
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
    """One hospital's images by what they do in the audit.

    `train`: what the generator may have memorised. `held`: validation and test images, of other patients. Rows of `held`, in
    three parts of about one size and with no patient in common: `tested` are the non-members, `posing` are held out too and
    pose as members (the same figure for held-out images), `reference` are neither and serve the attacks that need images of the
    population. `members`: rows of `train`, as many as there are `tested`. `playing` and `judging`: two halves of `held`, again by
    patient, for the positive control of copies. `train_patients`, `held_patients`: a number an image, the same for images of one
    patient.
    """

    name: str
    train: ImageDataset
    held: ImageDataset
    train_patients: np.ndarray
    held_patients: np.ndarray
    members: np.ndarray
    tested: np.ndarray
    pseudo_members: np.ndarray
    reference: np.ndarray
    query_half: np.ndarray
    reference_half: np.ndarray
    whole_training: int  # images of the training split, of which `train` is a sample when there are more than 20,000


def held_out_count(hospital: HospitalData) -> int:
    """Number of validation and test images."""
    return len(hospital.val) + len(hospital.test)


def too_few(hospital: HospitalData) -> str:
    """Why a hospital has too few images for an audit; empty where it has enough."""
    held, train = held_out_count(hospital), len(hospital.train)
    if min(held, train) < FEWEST:
        return f"{train} training and {held} held-out images are too few to measure anything: {FEWEST} of each are needed."
    parts = [data for data in (hospital.val, hospital.test) if len(data)]
    patients = sum(
        int(clusters(data.patients, data.institutions, len(data)).max()) + 1 for data in parts
    )
    if patients < FEWEST_PATIENTS:
        return f"Held-out images of {patients} patients are too few to divide: {FEWEST_PATIENTS} patients are needed."
    return ""


def roles_of(hospital: HospitalData, seed: int) -> Roles:
    """Deal one hospital's images to their roles by `seed`; it has held-out images.

    Raises `SplitError` when a patient is both in training and held out: such a figure would be of images that were learnt.
    """
    parts = [data for data in (hospital.val, hospital.test) if len(data)]
    check_disjoint_patients(hospital.train, *parts)
    held = pool(parts, "held out") if len(parts) > 1 else parts[0]
    rng = np.random.default_rng([seed, 11])
    count = len(hospital.train)
    rows = (
        np.sort(rng.choice(count, MOST_TRAINING, replace=False))
        if count > MOST_TRAINING
        else np.arange(count)
    )
    train = hospital.train.take(rows) if count > MOST_TRAINING else hospital.train
    patients = clusters(held.patients, held.institutions, len(held))
    tested, pseudo_members, reference = _parts(patients, 3, rng)
    query_half, reference_half = _parts(patients, 2, rng)
    members = np.sort(rng.choice(len(train), min(len(train), len(tested)), replace=False))
    return Roles(
        name=hospital.name,
        train=train,
        held=held,
        train_patients=clusters(train.patients, train.institutions, len(train)),
        held_patients=patients,
        members=members,
        tested=tested,
        pseudo_members=pseudo_members,
        reference=reference,
        query_half=query_half,
        reference_half=reference_half,
        whole_training=count,
    )


def _parts(patients: np.ndarray, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """`count` parts of all rows, no patient in two: patients in a drawn order, each to the part with the fewest images so far."""
    sizes = np.bincount(patients)
    part_of, filled = np.zeros(len(sizes), np.int64), np.zeros(count)
    for patient in rng.permutation(len(sizes)):
        part_of[patient] = int(filled.argmin())
        filled[part_of[patient]] += sizes[patient]
    return [np.flatnonzero(part_of[patients] == part) for part in range(count)]


def companions_of(roles: Roles, group: int) -> tuple[Any, np.ndarray] | None:
    """Images that stand for the rest of a batch where D has minibatch-std; None where there are too few or no need."""
    reference = roles.held.take(roles.reference)
    return (reference.images, reference.labels) if group and len(reference) >= group else None


def draw_synthetic(
    audited: AuditedModel, train: ImageDataset, count: int, seed: int, psi: float
) -> np.ndarray:
    """`count` images (count, C, H, W) uint8 in this hospital's own mix of labels. Raises `FedganError` for another size."""
    labels = synthetic_labels(train.labels, count, seed)
    images = generate_images(audited.generator, labels, seed, psi, device=audited.device)
    if images.shape[1:] != tuple(train.images.shape[1:]):
        raise FedganError(
            f"the generator gives images of {images.shape[1:]} (channels, height, width), those of '{train.name}' are "
            f"{tuple(train.images.shape[1:])}: audit with the shards that the run was trained on"
        )
    return images


@dataclass(frozen=True)
class Space:
    """Where images are compared: `rows` maps images (N, C, H, W) uint8 to rows (N, F) float32.

    `moves`: what a copy may have gone through and is still looked for. `fitted`: whether the space was fitted to the
    training images. Figures of such a space compare synthetic with held-out images, never training with held-out
    ones: a network knows the images that it learnt from.
    """

    name: str
    rows: Callable[[ImageArray], np.ndarray]
    moves: Moves | None = None
    fitted: bool = False


def pixel_space(shape: tuple[int, ...]) -> Space:
    """Pixels of images of `shape` (C, H, W), averaged down to 32 a side at most; mirrored and moved by one such pixel.

    Needs no training and is fitted to nothing, so that training and held-out images stand in it alike.
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
    """The three spaces of one hospital. Networks are trained when first asked for and never leave this object."""

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
        """The features that `evaluation.features` names; the reference classifier is trained on this hospital's images alone.

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
