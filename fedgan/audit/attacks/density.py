"""Membership by density: does the generator put more mass at an image than the population does?

All densities are Gaussian kernel estimates in a reduced space: the leading principal axes, scaled to unit variance. In
hundreds of dimensions all distances are alike and a kernel density is noise. The axes are fitted to synthetic and reference
images, both of which an outsider has, and never to members: axes that follow the members' own noise would describe
members better than anybody else, and an attack would "find" what the auditor had put there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgan.errors import DataError

DIMS = 16
FITTED_ROWS = 1000  # of each set, evenly spaced: enough for a few leading axes, whatever the number of features
BANDWIDTH_ROWS = 2000
BANDWIDTHS = np.geomspace(0.05, 2.0, 16)  # in standard deviations of the reduced space
BLOCK = 1024  # images of one block of distances
FLAT = 1e-10  # an axis with less than this share of the first one's variance is none


@dataclass(frozen=True)
class Reduction:
    """`middle` (F,), `axes` (F, D): centre, then project; the sets that it was fitted to have unit variance on each axis."""

    middle: np.ndarray
    axes: np.ndarray

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Features (N, F) → (N, D) float64."""
        reduced: np.ndarray = (np.asarray(features, np.float64) - self.middle) @ self.axes
        return reduced


def fit_reduction(*sets: np.ndarray, dims: int = DIMS) -> Reduction:
    """The `dims` leading principal axes (fewer where the sets have fewer) of feature sets (N, F), each set with equal weight.

    Raises `DataError` for a set of fewer than two images and for sets in which all images are the same.
    """
    for features in sets:
        if len(features) < 2:
            raise DataError(
                f"a density needs at least two images in each set, here are {len(features)}: generate or keep more"
            )
    parts = [
        np.asarray(features[_evenly(len(features), FITTED_ROWS)], np.float64) for features in sets
    ]
    middle = np.mean([part.mean(0) for part in parts], 0)
    rows = np.concatenate([(part - middle) / np.sqrt(len(parts) * len(part)) for part in parts])
    # Of the two matrices with the same spectrum, the smaller one: features of pixels are far more than images.
    wide = rows.shape[1] > len(rows)
    variances, vectors = np.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    kept = np.flatnonzero(variances > FLAT * max(float(variances[-1]), 0.0))[::-1][:dims]
    if variances[-1] <= 0 or len(kept) == 0:
        raise DataError(
            "all images have the same features, so they have no density: the generator may have collapsed"
        )
    variances, vectors = variances[kept], vectors[:, kept]
    axes = rows.T @ vectors / np.sqrt(variances) if wide else vectors
    return Reduction(middle, axes / np.sqrt(variances))


def log_density(points: np.ndarray, base: np.ndarray, bandwidth: float) -> np.ndarray:
    """log of the Gaussian kernel density of `base` (S, D) at `points` (N, D), (N,) float64; finite however far away."""
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
    """The bandwidth under which each image of `base` (S, D) is likeliest given all others (leave-one-out likelihood).

    It adapts to size and dimension, where rules of thumb for densities blur a copy away. At most 2,000 evenly spaced
    images take part. Of unit-variance data; looked for between 0.05 and 2.
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

    The Monte-Carlo attack of Hilprecht et al. (arXiv 1906.03006) counts synthetic images in a ball round x; a
    Gaussian kernel is the same count with a soft edge, which needs no radius beyond which all images score alike.
    `features` (N, F), `synthetic_features` (S, F); `reference_features` (R, F), if there are any, help to fit the axes only.
    It ranks typical images before rare ones whoever is a member; `density_ratio_scores` does not.
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
    """log p_synthetic(x) - log p_reference(x), (N,): higher for a suspected member (DOMIAS, arXiv 2302.12580).

    `reference_features` (R, F): real images that are neither members nor tested. What is typical is dense in both, so that
    only mass in excess of the population's counts. Both densities have one bandwidth (the reference's), or the difference of
    their blur would be a score. Sizes may differ: densities are normalised.
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
    """Squared distances (A, B); float64 and few dimensions of unit variance, so nothing is lost by multiplying out."""
    squared = np.einsum("nd,nd->n", a, a)[:, None] + np.einsum("nd,nd->n", b, b) - 2 * (a @ b.T)
    return np.maximum(squared, 0, out=squared)


def _log_sum_exp(values: np.ndarray) -> np.ndarray:
    """log Σ exp over the columns of (N, S), without underflow; `values` is used up."""
    top = values.max(1, keepdims=True)
    values -= top
    np.exp(values, out=values)
    total: np.ndarray = np.log(values.sum(1)) + top[:, 0]
    return total
