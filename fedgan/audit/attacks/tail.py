"""Single copies: synthetic images far nearer to one patient than to any other.

The share of copies sees no single copy. This test looks at each synthetic image alone: r = d1 / d2,
d1 the distance to its nearest training image, d2 to the nearest one of *another* patient. Where
images of k intrinsic dimensions are locally uniform, rᵏ is uniform on [0, 1] for an image that
copies nothing, whatever the density (Facco et al. 2017, arXiv 1803.06992, equation 5). k comes from
real images and the training images of others, so rᵏ is the chance that an image that nobody was
trained on comes so much nearer to one patient. An outlier has a chance below `LEVEL` divided by the
number of images and of spaces, and is nearer than all but the closest 5 % of held-out images. A
held-out image that is an outlier (a patient with two ids, say) shows that this chance is wrong;
then outliers must be more frequent among synthetic images (`outliers_stand_out` in
fedgan/audit/rules.py).

Typical and blurred images are near to many patients: r is near 1. A changed copy is found while it
is far nearer to its source than others are; a mixture of several patients is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgan.audit.attacks.nearest import Moves, nearest, nearest_of_others
from fedgan.evaluation.metrics.intervals import effective_size

LEVEL = 0.01  # of all spaces of one hospital together: chance of a false alarm
SPACES = 3
SAMPLE = 500  # images from which k is estimated
SIGMAS = 1.645  # k is its lower bound at 95 %


@dataclass(frozen=True)
class Outliers:
    """Result of `find_outliers`.

    `count` of `images` synthetic ones and `held_out_count` of `held_out_images`; `dimension`: k;
    `found_share`: share of the planted copies that are outliers. `flags` (S,) bool and `chances`
    (S,) stay in the hospital.
    """

    count: int
    images: int
    held_out_count: int
    held_out_images: int
    dimension: float
    found_share: float
    flags: np.ndarray
    chances: np.ndarray


@dataclass(frozen=True)
class Neighbours:
    """Images (Q, F) with distance (Q,) and row (Q,) of the nearest training image of each."""

    images: np.ndarray
    distances: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray, training: np.ndarray, moves: Moves | None) -> Neighbours:
        """Search them."""
        return cls(images, *nearest(images, training, moves=moves))


def find_outliers(
    synthetic: Neighbours,
    held_out: Neighbours,
    planted: Neighbours,
    training: np.ndarray,
    patients: np.ndarray,
    held_out_patients: np.ndarray,
    threshold: float,
    *,
    seed: int,
    moves: Moves | None = None,
    fitted: bool = False,
) -> Outliers:
    """Count the synthetic and held-out images that are outliers, at distances up to `threshold`.

    `training` (N, F) of `patients` (N,), numbers from 0; `held_out_patients` (H,) too. `planted`:
    copies of training images, each judged as if it were one of the synthetic images. k is the
    smaller of two estimates: of real images, as a lower bound over patients, and of the farther
    half of the synthetic images' ratios, which at most as many copies cannot move. Real images are
    the held-out ones and, unless the space is `fitted` to them, training images without their own
    patient.
    """
    rng = np.random.default_rng([seed, 23])

    def second(of: Neighbours, chosen: np.ndarray) -> np.ndarray:
        """Ratios of the `chosen` images."""
        own = patients[of.rows[chosen]][:, None]
        found, _ = nearest_of_others(of.images[chosen], training, patients, own, moves=moves)
        return _ratio(of.distances[chosen], found)

    def sample(count: int) -> np.ndarray:
        return np.sort(rng.permutation(count)[:SAMPLE])

    # --- intrinsic dimension ---
    rows = sample(len(held_out.distances))
    real, groups = [second(held_out, rows)], [held_out_patients[rows]]
    if not fitted:
        rows = sample(len(training))
        own = patients[rows][:, None]
        first, near = nearest_of_others(training[rows], training, patients, own, moves=moves)
        own = np.stack([patients[rows], patients[near]], axis=1)
        other, _ = nearest_of_others(training[rows], training, patients, own, moves=moves)
        real.append(_ratio(first, other))
        groups.append(patients[rows] + held_out_patients.max() + 1)
    ratios = np.concatenate(real)
    size = effective_size(len(ratios), np.concatenate(groups))
    dimension = min(
        intrinsic_dimension(ratios, 0.05) * max(0.0, 1 - SIGMAS / size**0.5),
        intrinsic_dimension(second(synthetic, sample(len(synthetic.distances))), 0.5),
    )

    # --- outliers ---
    level = LEVEL / SPACES / len(synthetic.distances)

    def chances(of: Neighbours) -> np.ndarray:
        """Chance (Q,) of a ratio so small; 1 beyond the threshold."""
        near = np.flatnonzero(of.distances <= threshold)
        found = np.ones(len(of.distances))
        found[near] = second(of, near) ** dimension
        return found

    made = chances(synthetic)
    return Outliers(
        count=int((made <= level).sum()),
        images=len(made),
        held_out_count=int((chances(held_out) <= level).sum()),
        held_out_images=len(held_out.distances),
        dimension=dimension,
        found_share=float((chances(planted) <= level).mean()),
        flags=made <= level,
        chances=made,
    )


def _ratio(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """r (Q,) in [0, 1]; 1 where there is no second patient to compare with."""
    found = np.minimum(first / np.maximum(second, 1e-12), 1.0)
    return np.where(np.isfinite(second), found, 1.0)


def intrinsic_dimension(ratios: np.ndarray, trimmed: float) -> float:
    """k of ratios (n,) in [0, 1] whose k-th powers are uniform, without the smallest `trimmed`.

    -log r is exponential with rate k. The estimate is that of maximum likelihood with the largest
    share `trimmed` in [0, 1) of -log r censored (Epstein and Sobel 1953), so that as many copies
    cannot lower it. At least 1e-9.
    """
    logs = np.sort(-np.log(np.clip(ratios, 1e-12, 1 - 1e-12)))
    kept = max(1, int(len(logs) * (1 - trimmed)))
    total = logs[:kept].sum() + (len(logs) - kept) * logs[kept - 1]
    return max(1e-9, float(kept / total))
