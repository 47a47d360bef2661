"""Perceptual path length: mean feature distance of images for a small step of the latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgan.errors import FedganError

EPSILON = 1e-4
BATCH_PIXELS = 16 * 64**2  # per batch of pairs

Features = Callable[[Tensor], Tensor]


def perceptual_path_length(
    generator: Any,
    labels: np.ndarray,
    features: Features,
    samples: int,
    seed: int,
    epsilon: float = EPSILON,
    device: str = "cpu",
    space: str = "w",
) -> float:
    """Mean of |f(G(l(t))) - f(G(l(t + ε)))|² / ε² over random paths l (arXiv 1812.04948, sec. 4.1).

    t is uniform in [0, 1). `generator` has z_dim, label_dim, mapping(z, c) → w and synthesis(ws,
    noise="const") → images in about [-1, 1]. `labels` (N, K): each path has one random row from end
    to end. `space` "w": straight lines between two mapped latents (eq. 3); "z": great circles
    between two latents (eq. 2). No truncation; both images of a pair have the same noise. Lower is
    smoother. Comparable only with the same extractor.

    `features` maps float images (B, C, H, W) in [0, 255] on `device` to (B, D), for example
    `SqueezeNetExtractor.features`. An extractor of uint8 images is unusable because it measures the
    rounding: for a half-trained generator at 32² the value with rounding was 34, 574 and 6083 at ε
    = 1e-2, 1e-3 and 1e-4, without it 15.6, 17.0, 17.2 and, at 1e-5, 17.3. So images are clamped to
    [0, 255], as released images are, but not rounded.

    Raises `ValueError` for another `space`, no samples, or labels that do not fit, `FedganError`
    for a value that is not finite.
    """
    labels = np.asarray(labels)
    if space not in ("w", "z") or samples < 1 or epsilon <= 0:
        raise ValueError(
            "path length needs space 'w' or 'z', samples ≥ 1 and epsilon > 0; "
            f"got {space}, {samples}, {epsilon}"
        )
    if labels.ndim != 2 or labels.shape[1] != generator.label_dim or len(labels) == 0:
        raise ValueError(
            f"labels of shape {labels.shape} do not fit a generator of {generator.label_dim} labels"
        )
    ends, t, rows = _draw(samples, generator.z_dim, len(labels), seed)
    c = torch.from_numpy(labels[rows].astype(np.float32))
    batch = max(1, BATCH_PIXELS // getattr(generator, "resolution", 64) ** 2)
    was_training = generator.training
    generator.to(device).eval()
    total = 0.0
    try:
        with torch.inference_mode():
            for start in range(0, samples, batch):
                part = slice(start, start + batch)
                first, second = (
                    _image(
                        generator,
                        ends[:, part].to(device),
                        c[part].to(device),
                        position[part].to(device),
                        space,
                    )
                    for position in (t, t + epsilon)
                )
                distance = (features(first).double() - features(second).double()).square().sum(1)
                total += float(distance.sum())
    finally:
        generator.train(was_training)
    if not np.isfinite(total):
        raise FedganError(
            "the path length is not finite: the generator has diverged; use an earlier checkpoint"
        )
    return total / (samples * epsilon**2)


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation: unit vector at share t (B, 1) of the arc from a to b (B, D).

    Linear where a and b are parallel.
    """
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    angle = (a * b).sum(1, keepdim=True).clamp(-1.0, 1.0).acos()
    sine = angle.sin()
    point = torch.where(
        sine > 1e-6,
        (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / sine,
        torch.lerp(a, b, t),
    )
    return point / point.norm(dim=1, keepdim=True)


def _draw(samples: int, z_dim: int, rows: int, seed: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Path ends (2, S, z_dim), positions t (S, 1) float64 and label rows (S,)."""
    rng = torch.Generator("cpu").manual_seed(seed)
    ends = torch.randn(2, samples, z_dim, generator=rng)
    t = torch.rand(samples, 1, generator=rng, dtype=torch.float64)
    return ends, t, torch.randint(rows, (samples,), generator=rng).numpy()


def _image(generator: Any, ends: Tensor, c: Tensor, t: Tensor, space: str) -> Tensor:
    """Images (B, C, H, W) float32 in [0, 255] at positions t (B, 1) between ends (2, B, z_dim).

    The position is computed in float64: its rounding would be part of a step of ε.
    """
    if space == "z":
        w = generator.mapping(slerp(ends[0].double(), ends[1].double(), t).float(), c)
    else:
        w = torch.lerp(
            generator.mapping(ends[0], c).double(), generator.mapping(ends[1], c).double(), t
        ).float()
    ws = w.unsqueeze(1).expand(-1, generator.synthesis.num_ws, -1)
    images: Tensor = generator.synthesis(ws, noise="const").float() * 127.5 + 127.5
    return images.clamp(0.0, 255.0)
