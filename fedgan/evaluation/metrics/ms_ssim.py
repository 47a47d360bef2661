"""Multi-scale structural similarity of images, and its mean inside a class: how alike a generator's images are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedgan.data.dataset import ImageArray
from fedgan.evaluation.metrics.utility import NO_FINDING, names_normal

WEIGHTS = (
    0.0448,
    0.2856,
    0.3001,
    0.2363,
    0.1333,
)  # of the five scales, fine to coarse (Wang et al. 2003, section 3.2)
WINDOW, SIGMA = 11, 1.5  # Gaussian window
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
PIXELS = 64 * 64**2  # of the pairs compared at once: more is slower, as it no longer fits the cache


def scales(height: int, width: int) -> int:
    """How many of the five scales fit an image: those whose shorter side is at least the window's 11 pixels.

    Five from 176 pixels on; three at 64, two at 32. Raises `ValueError` below 11 pixels, where none fits.
    """
    side = min(height, width)
    fitting = sum(side >> scale >= WINDOW for scale in range(len(WEIGHTS)))
    if fitting == 0:
        raise ValueError(
            f"MS-SSIM needs images of at least {WINDOW} × {WINDOW} pixels; got {height} × {width}"
        )
    return fitting


def ms_ssim(a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> np.ndarray:
    """MS-SSIM (B,) float64 of images a and b (B, C, H, W), uint8 or float in [0, 255]: ≤ 1, and 1 for equal images.

    Wang, Simoncelli and Bovik 2003, eq. 7: the product over the scales of contrast-structure, and of luminance at the
    coarsest, each to its weight; window 11 × 11, sigma 1.5, K = (0.01, 0.03); each scale is the 2 × 2 mean of the one
    before. Means run over channels and positions; contrast-structure counts where the window fits, the coarsest scale
    everywhere with mirrored borders (as torchmetrics does). A negative mean counts as 0, for it has no real power.

    Small images have fewer scales (`scales`): the first ones, with their weights divided by their sum. Figures with
    different numbers of scales are not comparable.
    """
    x, y = (torch.as_tensor(images).float() for images in (a, b))
    if x.ndim != 4 or x.shape != y.shape:
        raise ValueError(
            f"MS-SSIM needs two equal shapes (B, C, H, W); got {tuple(x.shape)} and {tuple(y.shape)}"
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
    """{label: mean MS-SSIM of `pairs` random pairs of different images of the class} (arXiv 1610.09585, section 4.2).

    images (N, C, H, W) uint8, labels (N, K) multi-hot. High: the images of a class are all alike (collapse); to be read
    beside the same figure for real images. None for a class with fewer than two images. Where classes do not exclude
    each other, images with no label at all form a class 'no finding', if there are two and no label itself says normal.
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
        second = (first + rng.integers(1, len(rows), size=pairs)) % len(
            rows
        )  # any other image, all equally likely
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
    # Variances do not move with a shift; about mid-grey they lose least in float32.
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
    """Gaussian window over (B, C, H, W) with mirrored borders: same shape. One axis after the other, as it is separable."""
    height, width = x.shape[2:]
    return _window_matrix(height).to(x) @ x @ _window_matrix(width).to(x).t()


@cache
def _window_matrix(side: int) -> Tensor:
    """The window at each of `side` places as a matrix (side, side): a matrix product is far faster than a convolution of
    one channel at the sides that matter here."""
    offsets = torch.arange(WINDOW) - WINDOW // 2
    window = torch.exp(-(offsets.double() ** 2) / (2 * SIGMA**2))
    places = (torch.arange(side)[:, None] + offsets).abs()
    places = torch.where(
        places >= side, 2 * (side - 1) - places, places
    )  # mirrored about the first and the last pixel
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, places, (window / window.sum()).expand(side, -1).contiguous())
