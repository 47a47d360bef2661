"""Membership by density: a generator that memorised has more mass at a member than the population.

Densities are Gaussian kernel estimates in a reduced space, the leading principal axes scaled to
unit variance: in hundreds of dimensions all distances are alike and a kernel density is noise. The
axes are fitted to synthetic and reference images, which an outsider has, never to members: axes
that follow the members' noise would describe members better than other images and create a spurious
attack.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgan.errors import DataError

DIMS = 16
FITTED_ROWS = 1000  # of each set, evenly spaced: enough for a few leading axes
BANDWIDTH_ROWS = 2000
BANDWIDTHS = np.geomspace(0.05, 2.0, 16)  # in standard deviations of the reduced space
BLOCK = 1024  # images per block of distances
MIN_VARIANCE = 1e-10  # of an axis, as a share of the first axis's variance


@dataclass(frozen=True)
class Reduction:
    """Affine projection by `center` (F,) and `axes` (F, D); unit variance on each axis."""

    center: np.ndarray
    axes: np.ndarray

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Features (N, F) → (N, D) float64."""
        reduced: np.ndarray = (np.asarray(features, np.float64) - self.center) @ self.axes
        return reduced


def fit_reduction(*sets: np.ndarray, dims: int = DIMS) -> Reduction:
    """The `dims` leading principal axes of feature sets (N, F), each set with equal weight.

    Fewer axes where the sets have fewer. Raises `DataError` for a set of fewer than two images and
    for sets in which all images are equal.
    """
    for features in sets:
        if len(features) < 2:
            raise DataError(
                f"a density needs at least two images in each set, here are {len(features)}: "
                "generate or keep more"
            )
    parts = [
        np.asarray(features[_evenly(len(features), FITTED_ROWS)], np.float64) for features in sets
    ]
    center = np.mean([part.mean(0) for part in parts], 0)
    rows = np.concatenate([(part - center) / np.sqrt(len(parts) * len(part)) for part in parts])
    # The smaller of two matrices with the same spectrum: pixel features outnumber the images.
    wide = rows.shape[1] > len(rows)
    variances, vectors = np.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    kept = np.flatnonzero(variances > MIN_VARIANCE * max(float(variances[-1]), 0.0))[::-1][:dims]
    if variances[-1] <= 0 or len(kept) == 0:
        raise DataError(
            "all images have the same features, so they have no density: "
            "the generator may have collapsed"
        )
    variances, vectors = variances[kept], vectors[:, kept]
    axes = rows.T @ vectors / np.sqrt(variances) if wide else vectors
    return Reduction(center, axes / np.sqrt(variances))


def log_density(points: np.ndarray, base: np.ndarray, bandwidth: float) -> np.ndarray:
    """Log of the Gaussian kernel density of `base` (S, D) at `points` (N, D): (N,), finite."""
    points, base = np.asarray(points, np.float64), np.asarray(base, np.float64)
    constant = np.log(len(base)) + base.shape[1] * np.log(bandwidth * np.sqrt(2 * np.pi))
    return np.concatenate(
        [
            _log_sum_exp(_squared(points[start : start + BLOCK], base) / (-2 * bandwidth**2))
            - constant
            for start in range(0, len(points), BLOCK)
        ]
    )


def choose_bandwidth(base: np.ndarray) -> float:
    """Bandwidth by leave-one-out likelihood of `base` (S, D), of unit variance.

    It adapts to size and dimension; rules of thumb blur a copy. Uses at most 2,000 evenly spaced
    images; the range is 0.05 to 2.
    """
    part = np.asarray(base[_evenly(len(base), BANDWIDTH_ROWS)], np.float64)
    squared = _squared(part, part)
    np.fill_diagonal(squared, np.inf)
    fits = [
        _log_sum_exp(squared / (-2 * h * h)).mean() - part.shape[1] * np.log(h) for h in BANDWIDTHS
    ]
    return float(BANDWIDTHS[int(np.argmax(fits))])


def density_scores(
    features: np.ndarray,
    synthetic_features: np.ndarray,
    *,
    reference_features: np.ndarray | None = None,
    bandwidth: float | None = None,
    dims: int = DIMS,
) -> np.ndarray:
    """log density of the synthetic images at each image, (N,): higher for a suspected member.

    The Monte-Carlo attack of arXiv 1906.03006 counts synthetic images in a ball around x; a
    Gaussian kernel is the same count with a soft edge and without a radius beyond which all images
    score alike. `features` (N, F), `synthetic_features` (S, F); `reference_features` (R, F) only
    help to fit the axes. Typical images score higher than rare ones, members or not;
    `density_ratio_scores` corrects this.
    """
    sets = (
        [synthetic_features]
        if reference_features is None
        else [synthetic_features, reference_features]
    )
    reduction = fit_reduction(*sets, dims=dims)
    base = reduction.apply(synthetic_features)
    return log_density(reduction.apply(features), base, bandwidth or choose_bandwidth(base))


def density_ratio_scores(
    features: np.ndarray,
    synthetic_features: np.ndarray,
    reference_features: np.ndarray,
    *,
    bandwidth: float | None = None,
    dims: int = DIMS,
) -> np.ndarray:
    """log p_synthetic(x) - log p_reference(x), (N,): higher for a suspected member (2302.12580).

    DOMIAS: `reference_features` (R, F) are real images, neither members nor non-members under test.
    Typical images are dense in both, so only mass in excess of the population counts. Both
    densities have one bandwidth (the reference's), or their different blur would be a score. Sizes
    may differ.
    """
    reduction = fit_reduction(synthetic_features, reference_features, dims=dims)
    points, synthetic, reference = (
        reduction.apply(part) for part in (features, synthetic_features, reference_features)
    )
    bandwidth = bandwidth or choose_bandwidth(reference)
    return log_density(points, synthetic, bandwidth) - log_density(points, reference, bandwidth)


def _evenly(count: int, most: int) -> np.ndarray:
    """At most `most` rows of `count`, evenly spaced: sets may be sorted by class."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(np.int64)


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances (A, B); exact enough in float64 with few dimensions of unit variance."""
    squared = np.einsum("nd,nd->n", a, a)[:, None] + np.einsum("nd,nd->n", b, b) - 2 * (a @ b.T)
    return np.maximum(squared, 0, out=squared)


def _log_sum_exp(values: np.ndarray) -> np.ndarray:
    """log Σ exp over the columns of (N, S), without underflow; overwrites `values`."""
    top = values.max(1, keepdims=True)
    values -= top
    np.exp(values, out=values)
    total: np.ndarray = np.log(values.sum(1)) + top[:, 0]
    return total
