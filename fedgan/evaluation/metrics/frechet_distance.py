"""Fréchet distance of Gaussians fitted to features (FID, with Inception-v3 features)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike


def frechet_gaussians(
    mean_x: ArrayLike, cov_x: ArrayLike, mean_y: ArrayLike, cov_y: ArrayLike
) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians (arXiv 1706.08500, eq. 6).

    |m_x - m_y|² + tr(S_x + S_y - 2 (S_x S_y)^½) (Dowson and Landau 1982), means (D,), covariances
    (D, D) symmetric and positive semi-definite. With S_x = A Aᵀ and S_y = B Bᵀ the trace of the
    root is the sum of the singular values of Aᵀ B: exact also for covariances without full rank,
    where an iterative matrix root breaks down. Never negative.
    """
    difference = np.asarray(mean_x, np.float64) - np.asarray(mean_y, np.float64)
    x, y = _factor(np.asarray(cov_x, np.float64)), _factor(np.asarray(cov_y, np.float64))
    root_trace = np.linalg.svd(x.T @ y, compute_uv=False).sum()
    return float(
        max(difference @ difference + (x * x).sum() + (y * y).sum() - 2.0 * root_trace, 0.0)
    )


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance of Gaussians fitted to features (N, D), (M, D) (arXiv 1706.08500); N, M ≥ 2.

    Equal to `frechet_gaussians` of means and covariances, but computed from the centered features:
    no covariance matrix is formed, which is faster, exact for fewer images than features, and does
    not square the condition number.
    """
    (mean_x, root_x), (mean_y, root_y) = _gaussian(x), _gaussian(y)
    difference = mean_x - mean_y
    nuclear = torch.linalg.svdvals(root_x @ root_y.T).sum()
    distance = (
        difference @ difference + root_x.square().sum() + root_y.square().sum() - 2.0 * nuclear
    )
    return float(distance.clamp_min(0.0))


def checked_features(features: np.ndarray) -> np.ndarray:
    """Features as float64. Raises `ValueError` unless (N, D), finite, N ≥ 2."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2 or not np.isfinite(features).all():
        raise ValueError(f"features must be (N, D), finite, N at least 2; got {features.shape}")
    return features


def _gaussian(features: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) and A (min(N, D), D) with Aᵀ A the covariance (denominator N - 1)."""
    x = torch.from_numpy(checked_features(features))
    centered = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return x.mean(0), torch.linalg.qr(centered, mode="r").R if len(x) > x.shape[1] else centered


def _factor(covariance: np.ndarray) -> np.ndarray:
    """A with A Aᵀ = covariance; eigenvalues that rounding made negative count as zero."""
    values, vectors = np.linalg.eigh(covariance)
    factor: np.ndarray = vectors * np.sqrt(np.maximum(values, 0.0))
    return factor
