"""Release filter: synthetic images too near to a training image are dropped and redrawn.

Distances are of pixels (averaged down to 32 per side, mirrored, moved by one pixel): this space is
fitted to nothing, so dropping reveals as little as possible about the real images, and it finds
planted copies where class features do not. The threshold of each hospital is the distance of the
closest 1 % of its held-out images: a generator that copies nothing loses about this share, too.
Rotated or redrawn copies pass this filter; the audit searches those as well.

Dropping depends on private images without noise: a filtered set is no longer mere post-processing
of a private model, and its epsilon does not cover it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedgan.audit.attacks.copies import release_threshold
from fedgan.audit.attacks.nearest import nearest
from fedgan.audit.subject import Space, held_out_count, pixel_space
from fedgan.config import Settings
from fedgan.data.dataset import HospitalData, ImageDataset
from fedgan.errors import ConfigError, DataError, FedganError
from fedgan.evaluation.evaluate import MIN_TEST_IMAGES, synthetic_only
from fedgan.evaluation.reference import OnProgress, RealReference, merged

PERCENTILE = 1.0  # of the held-out images' distances
MAX_DRAWS = 20  # of one image, including the first: a generator that always copies is refused

# (label vectors (n, K), seed, positions (n,) in the set) → images (n, C, H, W) uint8
Draw = Callable[[np.ndarray, int, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class DistanceThreshold:
    """One hospital's training images in pixel space and the distance of release. Private."""

    hospital: str
    space: Space
    training: np.ndarray
    threshold: float

    def within(self, rows: np.ndarray) -> np.ndarray:
        """Whether each row (n, F) is at most `threshold` from a training image, (n,) bool."""
        near: np.ndarray = nearest(rows, self.training, moves=self.space.moves)[0] <= self.threshold
        return near


def distance_thresholds(
    hospitals: Sequence[HospitalData], percentile: float = PERCENTILE
) -> list[DistanceThreshold]:
    """One threshold per hospital. Raises `DataError` for a hospital without held-out images."""
    thresholds = []
    for hospital in hospitals:
        if not held_out_count(hospital):
            raise DataError(
                f"hospital '{hospital.name}' has no held-out image to derive a distance threshold "
                "from: import it with a validation or a test split"
            )
        space = pixel_space(hospital.train.images.shape[1:])
        training = space.rows(hospital.train.images)
        held_out = np.concatenate(
            [space.rows(part.images) for part in (hospital.val, hospital.test) if len(part)]
        )
        threshold = release_threshold(training, held_out, percentile, moves=space.moves)
        thresholds.append(DistanceThreshold(hospital.name, space, training, threshold))
    return thresholds


@dataclass
class ReleaseFilter:
    """Draws images outside all distance thresholds, and counts what it drops.

    `drawn`: images drawn in total; `dropped`: of these, the number within each hospital's threshold
    (one image may count for several); `redrawn`: positions of the set whose first image was
    dropped.
    """

    thresholds: Sequence[DistanceThreshold]
    draw: Draw
    seed: int
    drawn: int = 0
    redrawn: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def images(
        self, labels: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images (n, C, H, W) for labels (n, K) at positions (n,), seeds (n,), first images.

        An image is redrawn with the same labels and another seed until it is outside. Raises
        `FedganError` for a position that 20 draws do not fill.
        """
        first = self.draw(labels, self.seed, positions)
        images, seeds = first, np.full(len(labels), self.seed, np.int64)
        near = self._near(first)
        self.redrawn += len(near)
        if len(near):
            images = first.copy()
        for attempt in range(1, MAX_DRAWS):
            if not len(near):
                break
            seed = redraw_seed(self.seed, attempt)
            images[near] = self.draw(labels[near], seed, positions[near])
            seeds[near] = seed
            near = near[self._near(images[near])]
        if len(near):
            raise FedganError(
                f"{len(near)} of {len(labels)} images came too near to a training image "
                f"{MAX_DRAWS} times in a row: this generator copies; check fedgan audit, raise "
                "--psi, or release an earlier round"
            )
        return images, seeds, first

    def _near(self, images: np.ndarray) -> np.ndarray:
        """Rows of the images within a threshold; counts all images as drawn."""
        self.drawn += len(images)
        near = np.zeros(len(images), bool)
        for threshold in self.thresholds:
            within = threshold.within(threshold.space.rows(images))
            count = self.dropped.get(threshold.hospital, 0) + int(within.sum())
            self.dropped[threshold.hospital] = count
            near |= within
        return np.flatnonzero(near)


def redraw_seed(seed: int, attempt: int) -> int:
    """Seed of the latents of draw number `attempt`, also usable as `fedgan generate --seed`."""
    return int(np.random.SeedSequence([seed, attempt]).generate_state(1, np.uint32)[0])


def check_release_filter(settings: Settings) -> None:
    """Raise `ConfigError` where the filter would void the privacy guarantee of the training."""
    if settings.privacy.on and settings.privacy.noise_multiplier != 0:
        raise ConfigError(
            "--release-filter reads private images without noise, so the set would no longer be "
            "covered by the epsilon of this run (privacy.* is on): release without it, or state no "
            "epsilon"
        )


# --- utility ------------------------------------------------------------------------------------


def utility_before_and_after(
    reference: RealReference,
    before: ImageDataset,
    after: ImageDataset,
    on_progress: OnProgress = lambda text: None,
) -> dict[str, Any] | None:
    """Macro AUC of classifiers trained on each set and tested on real images (TSTR).

    {"images", "seeds", "classifier", "test_images", "unfiltered": {macro_auc, macro_auc_ci},
    "filtered": the same}; None without classes or with too few real test images.
    """
    if not reference.has_classes or len(reference.test) < MIN_TEST_IMAGES:
        return None
    result: dict[str, Any] = {
        "images": len(after),
        "seeds": reference.settings.seeds,
        "classifier": reference.classifier_name,
        "test_images": len(reference.test),
    }
    for name, made in (("unfiltered", before), ("filtered", after)):
        on_progress(f"training classifiers on the {name} images")
        scores, _ = synthetic_only(reference, merged(made, reference.settings.label_map))
        figures = reference.utility(scores, institutions=False)
        result[name] = {key: figures[key] for key in ("macro_auc", "macro_auc_ci")}
    return result


def in_chunks(
    release_filter: ReleaseFilter, labels: np.ndarray, chunk: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(first position, images, seeds, first images) of `chunk` positions at a time."""
    for start in range(0, len(labels), chunk):
        positions = np.arange(start, min(start + chunk, len(labels)))
        yield (start, *release_filter.images(labels[positions], positions))
