"""Multi-scale structural similarity (MS-SSIM), and its mean inside a class (mode collapse)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedgan.data.dataset import ImageArray
from fedgan.evaluation.metrics.utility import NO_FINDING, names_normal

# Of the five scales, fine to coarse (Wang et al. 2003, section 3.2).
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW, SIGMA = 11, 1.5  # Gaussian window
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
PIXELS = 64 * 64**2  # per batch of pairs: more exceeds the cache and is slower


def scales(height: int, width: int) -> int:
    """Number of the five scales that fit an image: those whose shorter side is at least 11 pixels.

    Five from 176 pixels, three at 64, two at 32. Raises `ValueError` below 11 pixels.
    """
    side = min(height, width)
    fitting = sum(side >> scale >= WINDOW for scale in range(len(WEIGHTS)))
    if fitting == 0:
        raise ValueError(
            f"MS-SSIM needs images of at least {WINDOW} × {WINDOW} pixels; got {height} × {width}"
        )
    return fitting


def ms_ssim(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> np.ndarray:
    """MS-SSIM (B,) float64 of images a and b (B, C, H, W), uint8 or float in [0, 255]; 1 if equal.

    l_M^w_M · Π_j cs_j^w_j over scales j (Wang, Simoncelli and Bovik 2003, eq. 7): luminance l at
    the coarsest scale M, contrast-structure cs at all; window 11 × 11, sigma 1.5, K = (0.01, 0.03);
    each scale is the 2 × 2 mean of the one before. Means run over channels and positions:
    contrast-structure where the window fits, the coarsest scale everywhere with mirrored borders
    (as in torchmetrics). A negative mean counts as 0.

    Small images have fewer scales (`scales`): the first ones, with weights that sum to 1. Figures
    with different numbers of scales are not comparable.
    """
    x, y = (torch.as_tensor(images).float() for images in (a, b))
    if x.ndim != 4 or x.shape != y.shape:
        raise ValueError(
            "MS-SSIM needs two equal shapes (B, C, H, W); "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    count = scales(*x.shape[2:])
    weights = np.array(WEIGHTS[:count]) / sum(WEIGHTS[:count])
    result = np.ones(len(x))
    with torch.inference_mode():
        for scale, weight in enumerate(weights):
            if scale:
                x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
            similarity, contrast = _ssim(x, y)
            term = similarity if scale == count - 1 else contrast
            result *= term.clamp_min(0.0).double().numpy() ** weight
    return result


def intra_class_ms_ssim(
    images: ImageArray,
    labels: np.ndarray,
    label_names: Sequence[str],
    exclusive: bool,
    pairs: int = 500,
    seed: int = 0,
) -> dict[str, float | None]:
    """{label: mean MS-SSIM of `pairs` random pairs of the class} (arXiv 1610.09585, section 4.2).

    images (N, C, H, W) uint8, labels (N, K) multi-hot. A value above that of real images means
    collapse. None for a class with fewer than two images. Where classes are not exclusive, images
    without a label form a class 'no finding' if there are two or more and no label means normal.
    """
    labels = np.asarray(labels).astype(bool)
    classes = {name: np.flatnonzero(labels[:, column]) for column, name in enumerate(label_names)}
    unlabelled = np.flatnonzero(~labels.any(1))
    if not exclusive and len(unlabelled) >= 2 and not names_normal(tuple(label_names)):
        classes[NO_FINDING] = unlabelled
    result: dict[str, float | None] = {}
    for number, (name, rows) in enumerate(classes.items()):
        if len(rows) < 2:
            result[name] = None
            continue
        rng = np.random.default_rng([seed, number])
        first = rng.integers(len(rows), size=pairs)
        offset = rng.integers(1, len(rows), size=pairs)  # any other image, equally likely
        second = (first + offset) % len(rows)
        result[name] = _mean_of_pairs(images, rows[first], rows[second])
    return result


def _mean_of_pairs(images: ImageArray, first: np.ndarray, second: np.ndarray) -> float:
    batch = max(1, PIXELS // (images.shape[2] * images.shape[3]))
    values = [
        ms_ssim(images[first[start : start + batch]], images[second[start : start + batch]])
        for start in range(0, len(first), batch)
    ]
    return float(np.concatenate(values).mean())


def _ssim(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-structure part, each (B,): means over channels and positions."""
    batch = len(x)
    # Variances are invariant to a shift; around mid-grey float32 is most exact.
    u, v = x - 127.5, y - 127.5
    means = _blur(torch.cat([u, v, u * u + v * v, u * v]))
    mu, mv, squares, uv = means.split(batch)
    variances = (squares - mu * mu - mv * mv).clamp_min(0.0)
    contrast = (2.0 * (uv - mu * mv) + C2) / (variances + C2)
    mx, my = mu + 127.5, mv + 127.5
    luminance = (2.0 * mx * my + C1) / (mx * mx + my * my + C1)
    edge = WINDOW // 2
    fits = contrast[..., edge:-edge, edge:-edge]
    return (luminance * contrast).flatten(1).mean(1), fits.flatten(1).mean(1)


def _blur(x: Tensor) -> Tensor:
    """Gaussian window over (B, C, H, W) with mirrored borders, separable; same shape."""
    height, width = x.shape[2:]
    return _window_matrix(height).to(x) @ x @ _window_matrix(width).to(x).t()


@cache
def _window_matrix(side: int) -> Tensor:
    """The window at each of `side` positions as a matrix (side, side).

    At these sides a matrix product is much faster than a convolution of one channel.
    """
    offsets = torch.arange(WINDOW) - WINDOW // 2
    window = torch.exp(-(offsets.double() ** 2) / (2 * SIGMA**2))
    columns = (torch.arange(side)[:, None] + offsets).abs()  # mirrored at the first pixel …
    columns = torch.where(columns >= side, 2 * (side - 1) - columns, columns)  # … and the last
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, columns, (window / window.sum()).expand(side, -1).contiguous())
