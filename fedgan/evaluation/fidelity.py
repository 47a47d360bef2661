"""Distances between two sets of features: arrays in, a number out.

A distance means nothing without its extractor and its sample size: the Fréchet distance falls with the number of
images (arXiv 1911.07023), so the floor between two halves of the real images is taken at the same size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def frechet_gaussians(mean_x: ArrayLike, cov_x: ArrayLike, mean_y: ArrayLike, cov_y: ArrayLike) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians (Dowson and Landau 1982; arXiv 1706.08500, eq. 6).

    |m_x - m_y|² + tr(S_x + S_y - 2 (S_x S_y)^½), means (D,), covariances (D, D) symmetric and positive semi-definite.
    With S_x = A Aᵀ and S_y = B Bᵀ the trace of the root is the sum of the singular values of Aᵀ B: exact also for
    covariances without full rank, where an iterative matrix root breaks down. Never negative.
    """
    difference = np.asarray(mean_x, np.float64) - np.asarray(mean_y, np.float64)
    x, y = _factor(np.asarray(cov_x, np.float64)), _factor(np.asarray(cov_y, np.float64))
    root_trace = np.linalg.svd(x.T @ y, compute_uv=False).sum()
    return float(max(difference @ difference + (x * x).sum() + (y * y).sum() - 2.0 * root_trace, 0.0))


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance of Gaussians fitted to features x (N, D) and y (M, D), N, M ≥ 2 (arXiv 1706.08500)."""
    x, y = _checked(x), _checked(y)
    return frechet_gaussians(x.mean(0), _covariance(x), y.mean(0), _covariance(y))


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """k(x, y) = (x·y / D + 1)³ of all pairs, (N, D) and (M, D) → (N, M) (arXiv 1801.01401, section 4)."""
    kernel: np.ndarray = (x @ y.T / x.shape[1] + 1.0) ** 3
    return kernel


def kernel_distance(x: np.ndarray, y: np.ndarray, block: int = 512) -> float:
    """Unbiased estimate of MMD² with the polynomial kernel (Gretton et al. 2012, eq. 3; arXiv 1801.01401).

    Features x (N, D) and y (M, D), N, M ≥ 2. Around 0 for two samples of one distribution, and then as often negative
    as positive. All pairs count; `block` rows at a time bound the memory and change nothing but rounding.
    """
    x, y = _checked(x), _checked(y)
    n, m = len(x), len(y)
    within_x = (_kernel_sum(x, x, block) - _diagonal_sum(x)) / (n * (n - 1))
    within_y = (_kernel_sum(y, y, block) - _diagonal_sum(y)) / (m * (m - 1))
    return float(within_x + within_y - 2.0 * _kernel_sum(x, y, block) / (n * m))


def fidelity(real: np.ndarray, synthetic: np.ndarray, seed: int, splits: int = 4) -> dict[str, float | int]:
    """Fréchet and kernel distance of synthetic to real features, each beside its floor, all at one sample size.

    real (N, D), synthetic (M, D). Each of `splits` times the real images are cut at random into two disjoint halves of
    n = min(N // 2, M) images; the first half is compared with n synthetic images (`frechet`, `kernel`) and with the
    second half (`…_floor`); means over the splits. `images` = `floor_images` = n, on each side of a comparison.
    """
    real, synthetic = _checked(real), _checked(synthetic)
    n = min(len(real) // 2, len(synthetic))
    if n < 2:
        raise ValueError("fidelity needs at least four real and two synthetic images")
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(splits):
        order = rng.permutation(len(real))
        half, other = real[order[:n]], real[order[n : 2 * n]]
        sample = synthetic[rng.permutation(len(synthetic))[:n]]
        rows.append(
            [f(half, set_) for f in (frechet_distance, kernel_distance) for set_ in (sample, other)],
        )
    names = ("frechet", "frechet_floor", "kernel", "kernel_floor")
    means = np.mean(rows, axis=0)
    return {**{name: float(value) for name, value in zip(names, means, strict=True)}, "images": n, "floor_images": n}


def _checked(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2 or not np.isfinite(features).all():
        raise ValueError(f"features must be (N, D), finite, N at least 2; got {features.shape}")
    return features


def _covariance(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(0)
    covariance: np.ndarray = centred.T @ centred / (len(x) - 1)
    return covariance


def _factor(covariance: np.ndarray) -> np.ndarray:
    """A with A Aᵀ = covariance; eigenvalues that rounding made negative count as zero."""
    values, vectors = np.linalg.eigh(covariance)
    factor: np.ndarray = vectors * np.sqrt(np.maximum(values, 0.0))
    return factor


def _kernel_sum(x: np.ndarray, y: np.ndarray, block: int) -> float:
    return float(sum(polynomial_kernel(x[start : start + block], y).sum() for start in range(0, len(x), block)))


def _diagonal_sum(x: np.ndarray) -> float:
    return float(((np.einsum("nd,nd->n", x, x) / x.shape[1] + 1.0) ** 3).sum())
