"""Controls of copy detection: it must find planted copies, and nothing where nothing was copied.

"No copies found" is evidence only if both controls pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgan.audit.attacks.copies import CopyFindings, compare
from fedgan.audit.attacks.nearest import Moves, nearest
from fedgan.data.dataset import ImageArray
from fedgan.evaluation.metrics.bootstrap import group_numbers
from fedgan.evaluation.metrics.intervals import Interval, newcombe_interval, wilson_interval
from fedgan.evaluation.metrics.ranking import weighted_auc

MIN_AUC = 0.9
MIN_COVERED = 0.8  # share of splits whose interval contains 0; 0.95 is expected


def plant_copies(
    synthetic: np.ndarray,
    training: ImageArray,
    share: float,
    rng: np.random.Generator,
    *,
    grey_levels: int = 2,
    shift: int = 1,
    mirrored: float = 0.25,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Replace a `share` of `synthetic` (S, C, H, W) uint8 by slightly changed training images.

    A planted image is moved by up to `shift` pixels in both directions (the edge repeated),
    mirrored with probability `mirrored`, and gets uniform noise of ± `grey_levels`. Returns the
    images, a flag (S,) bool and the training row (S,) int64 of each, -1 for others. No training row
    is planted twice if there are enough.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, not {share}")
    count, available = round(share * len(synthetic)), training.shape[0]
    positions = np.sort(rng.choice(len(synthetic), count, replace=False))
    sources = rng.choice(available, count, replace=count > available)
    planted, rows = np.zeros(len(synthetic), bool), np.full(len(synthetic), -1, np.int64)
    planted[positions], rows[positions] = True, sources
    images = np.array(synthetic)
    for position, source in zip(positions, sources, strict=True):
        images[position] = _changed(
            np.asarray(training[np.array([source])])[0], rng, grey_levels, shift, mirrored
        )
    return images, planted, rows


@dataclass(frozen=True)
class Recovery:
    """How well planted copies were found. Shares are of all synthetic images; intervals have 95 %.

    `auc`: of minus the distance, planted images against the others. `found_share`: estimated from
    the flagged share, corrected for what is flagged without a leak. `right_row`: share of the
    planted images whose nearest training image is their source.
    """

    auc: float
    planted_share: float
    found_share: float
    found_ci: Interval
    right_row: float | None
    passed: bool


def recovered(
    findings: CopyFindings,
    planted: np.ndarray,
    clean: CopyFindings | None = None,
    rows: np.ndarray | None = None,
) -> Recovery:
    """Positive control: whether `findings` on the images of `plant_copies` show the leak.

    `planted` (S,) bool and `rows` (S,): results of `plant_copies`. `clean`: findings of the same
    images before planting; without it the held-out share is what is flagged without a leak. With f
    the flagged share and c that without a leak, the leak is estimated as (f - c) / (1 - c) (Rogan
    and Gladen 1978, for a test that misses no copy; misses lower the estimate and fail the
    control). Passes when the AUC is at least 0.9 and the planted share is in the estimate's
    interval.
    """
    planted = np.asarray(planted, bool)
    if planted.shape != findings.distances.shape or planted.all() or not planted.any():
        raise ValueError(
            "a positive control needs a planted flag per synthetic image, and images of both kinds"
        )
    base, base_ci = (
        (clean.copying_share, clean.copying_ci)
        if clean
        else (findings.held_out_share, findings.held_out_ci)
    )
    flags = findings.distances <= findings.threshold
    share = float(flags.mean())
    low, high = newcombe_interval(share, wilson_interval(share, len(flags)), base, base_ci)
    rest = max(1 - base, 1e-12)
    found_ci = (max(0.0, low / rest), min(1.0, high / rest))
    auc = float(weighted_auc(-findings.distances, planted, np.ones((1, len(planted))))[0])
    planted_share = float(planted.mean())
    return Recovery(
        auc=auc,
        planted_share=planted_share,
        found_share=max(0.0, (share - base) / rest),
        found_ci=found_ci,
        right_row=None
        if rows is None
        else float((findings.rows[planted] == np.asarray(rows)[planted]).mean()),
        passed=auc >= MIN_AUC and found_ci[0] <= planted_share <= found_ci[1],
    )


@dataclass(frozen=True)
class NegativeControl:
    """Result of copy detection on real images that cannot be copies.

    `excess` of the first split, `mean_excess` over all; `covered`: share of splits whose interval
    contains 0.
    """

    excess: float
    excess_ci: Interval
    mean_excess: float
    covered: float
    splits: int
    passed: bool


def negative_control(
    training: np.ndarray,
    held_out: np.ndarray,
    *,
    seed: int,
    percentile: float = 5.0,
    splits: int = 100,
    moves: Moves | None = None,
    held_out_groups: np.ndarray | None = None,
) -> NegativeControl:
    """Half of `held_out` (H, F), by patient, replaces the synthetic images, `splits` times.

    The other half is held out. An interval of 95 % misses 0 in one of twenty cases, which would
    make one audit in twenty invalid (with several spaces and hospitals one in three). So the
    control passes when 0 is in the intervals of at least 80 % of the splits. `held_out_groups`
    (H,): the patient of each image.
    """
    distances = nearest(held_out, training, moves=moves)[0]
    patients = group_numbers(held_out_groups, len(distances))
    number = int(patients.max()) + 1
    if number < 4:
        raise ValueError(
            f"a negative control needs held-out images of four or more patients, not of {number}"
        )
    rng = np.random.default_rng(seed)
    results = []
    for _ in range(splits):
        first = np.isin(patients, rng.permutation(number)[: number // 2])
        groups = {"groups": patients[first], "real_groups": patients[~first]}
        results.append(compare(distances[first], distances[~first], percentile, **groups))
    covered = float(
        np.mean([result.excess_ci[0] <= 0 <= result.excess_ci[1] for result in results])
    )
    return NegativeControl(
        excess=results[0].excess,
        excess_ci=results[0].excess_ci,
        mean_excess=float(np.mean([result.excess for result in results])),
        covered=covered,
        splits=splits,
        passed=covered >= MIN_COVERED,
    )


def _changed(
    image: np.ndarray, rng: np.random.Generator, grey_levels: int, shift: int, mirrored: float
) -> np.ndarray:
    """An image (C, H, W) uint8, changed as in `plant_copies`."""
    _, height, width = image.shape
    if rng.random() < mirrored:
        image = image[..., ::-1]
    down, right = rng.integers(0, 2 * shift + 1, 2)
    padded = np.pad(image, ((0, 0), (shift, shift), (shift, shift)), mode="edge")
    moved = padded[:, down : down + height, right : right + width].astype(np.int64)
    return np.clip(moved + rng.integers(-grey_levels, grey_levels + 1, moved.shape), 0, 255).astype(
        np.uint8
    )
