"""The release filter: synthetic images that lie too near to a training image are dropped and drawn again.

Distances are of pixels (averaged down to 32 a side, mirrored and moved by a pixel): that space is fitted to nothing, so
that dropping tells as little as possible of the real images, and it finds planted copies where the features of a
classifier do not. The threshold of each hospital is the distance that only the closest 1 % of its held-out images come
within: of a generator that copies nothing about that share is dropped, too. A copy that was turned or drawn otherwise passes this
filter; the audit looks for those as well.

What is dropped depends on private images without noise: a set that was filtered so is no longer mere post-processing of a
private model, and its epsilon does not cover it.
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
from fedgan.evaluation.reference import RealReference, merged

PERCENTILE = 1.0  # of the held-out images' distances
MOST_DRAWS = 20  # drawings of one image, the first one counted: a generator that copies so often cannot be released so

# (label vectors (n, K), seed, their places (n,) in the set) → images (n, C, H, W) uint8
Draw = Callable[[np.ndarray, int, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class DistanceThreshold:
    """One hospital's training images in pixel space, and the distance within which nothing is released. Private."""

    hospital: str
    space: Space
    training: np.ndarray
    threshold: float

    def within(self, rows: np.ndarray) -> np.ndarray:
        """Which rows (n, F) lie at the threshold or nearer to a training image, (n,) bool."""
        near: np.ndarray = nearest(rows, self.training, moves=self.space.moves)[0] <= self.threshold
        return near


def distance_thresholds(
    hospitals: Sequence[HospitalData], percentile: float = PERCENTILE
) -> list[DistanceThreshold]:
    """A fence a hospital. Raises `DataError` for a hospital without held-out images: it has nothing to measure by."""
    thresholds = []
    for hospital in hospitals:
        if not held_out_count(hospital):
            raise DataError(
                f"hospital '{hospital.name}' has no held-out image, so no distance can be called too near: "
                "import it with a validation or a test split"
            )
        space = pixel_space(hospital.train.images.shape[1:])
        training = space.rows(hospital.train.images)
        held = np.concatenate(
            [space.rows(part.images) for part in (hospital.val, hospital.test) if len(part)]
        )
        threshold = release_threshold(training, held, percentile, moves=space.moves)
        thresholds.append(DistanceThreshold(hospital.name, space, training, threshold))
    return thresholds


@dataclass
class ReleaseFilter:
    """Draws images that lie outside all fences, and counts what it drops.

    `drawn`: images drawn in all; `dropped`: of those, how many each hospital's fence kept back (one image may count for
    several); `redrawn`: places of the set whose first image was dropped.
    """

    thresholds: Sequence[DistanceThreshold]
    draw: Draw
    seed: int
    drawn: int = 0
    redrawn: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def images(
        self, labels: np.ndarray, places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """→ images (n, C, H, W) for labels (n, K) at places (n,) of the set, the seed (n,) of each, and the first images.

        An image is drawn again with the same labels and another seed until it lies outside. Raises `FedganError` for a
        place that 20 drawings did not fill.
        """
        first = self.draw(labels, self.seed, places)
        images, seeds = first, np.full(len(labels), self.seed, np.int64)
        wanting = self._near(first)
        self.redrawn += len(wanting)
        if len(wanting):
            images = first.copy()
        for attempt in range(1, MOST_DRAWS):
            if not len(wanting):
                break
            seed = redraw_seed(self.seed, attempt)
            images[wanting], seeds[wanting] = (
                self.draw(labels[wanting], seed, places[wanting]),
                seed,
            )
            wanting = wanting[self._near(images[wanting])]
        if len(wanting):
            raise FedganError(
                f"{len(wanting)} of {len(labels)} images came too near to a training image {MOST_DRAWS} times in a row: this "
                "generator copies; look at fedgan audit, raise --psi, or release an earlier round"
            )
        return images, seeds, first

    def _near(self, images: np.ndarray) -> np.ndarray:
        """Numbers of the images that lie within a fence; all are counted as drawn."""
        self.drawn += len(images)
        near = np.zeros(len(images), bool)
        for fence in self.thresholds:
            within = fence.within(fence.space.rows(images))
            self.dropped[fence.hospital] = self.dropped.get(fence.hospital, 0) + int(within.sum())
            near |= within
        return np.flatnonzero(near)


def redraw_seed(seed: int, attempt: int) -> int:
    """The seed of the latents of drawing number `attempt`; `fedgan generate --seed` takes it as well."""
    return int(np.random.SeedSequence([seed, attempt]).generate_state(1, np.uint32)[0])


def check_release_filter(settings: Settings) -> None:
    """Raise `ConfigError` where the filter would void the guarantee that the training gave."""
    if settings.privacy.on and settings.privacy.noise_multiplier != 0:
        raise ConfigError(
            "--release-filter looks at private images without noise, so that the set would no longer be covered by the epsilon of "
            "this run (privacy.* is on): release without it, or state no epsilon"
        )


# --- utility, measured again -------------------------------------------------------------------------


def utility_before_and_after(
    reference: RealReference,
    before: ImageDataset,
    after: ImageDataset,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Macro AUC of classifiers trained on each set alone and tested on real images, by the run's evaluator.

    {"images", "seeds", "classifier", "unfiltered": {macro_auc, macro_auc_ci}, "filtered": the same}; None where there are no
    classes or too few real test images.
    """
    if not reference.has_classes or len(reference.test) < MIN_TEST_IMAGES:
        return None
    found: dict[str, Any] = {
        "images": len(after),
        "seeds": reference.settings.seeds,
        "classifier": reference.classifier_name,
        "test_images": len(reference.test),
    }
    for name, made in (("unfiltered", before), ("filtered", after)):
        on_progress(f"training classifiers on the {name} images")
        scores, _ = synthetic_only(reference, merged(made, reference.settings.label_map))
        figures = reference.utility(scores, institutions=False)
        found[name] = {key: figures[key] for key in ("macro_auc", "macro_auc_ci")}
    return found


def in_chunks(
    release_filter: ReleaseFilter, labels: np.ndarray, chunk: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(number of the first, images, seeds, first images) of `chunk` places after `chunk` places."""
    for start in range(0, len(labels), chunk):
        places = np.arange(start, min(start + chunk, len(labels)))
        yield (start, *release_filter.images(labels[places], places))
