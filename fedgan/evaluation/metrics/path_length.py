"""Perceptual path length: how far an image moves, to a feature extractor, for a small step of the latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgan.errors import FedganError

EPSILON = 1e-4
BATCH_PIXELS = 16 * 64**2  # of the pairs that are made at once

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
    """Mean of |f(G(l(t))) - f(G(l(t + ε)))|² / ε² over random paths, t uniform in [0, 1) (arXiv 1812.04948, section 4.1).

    `generator` has z_dim, label_dim, mapping(z, c) → w and synthesis(ws, noise="const") → images in about [-1, 1];
    `labels` (N, K): each path holds one of its rows, drawn at random, from end to end. `space` "w": straight lines
    between two mapped latents (eq. 3); "z": great circles between two latents (eq. 2). No truncation. Both images of a
    pair have the same noise. Lower is smoother; the figure depends on the extractor and is comparable within it alone.

    `features` takes float images (B, C, H, W) in [0, 255] on `device` and gives (B, D): `SqueezeNetExtractor.features`
    for one. An extractor of uint8 images will not do, for it measures the rounding: with a half-trained generator at 32²
    the value with rounding was 34, 574 and 6083 at ε = 1e-2, 1e-3 and 1e-4, without it 15.6, 17.0, 17.2 and, at 1e-5,
    17.3. So images are clamped to [0, 255], as those are that leave the house, but never rounded.

    Raises `ValueError` for another `space`, no samples, or labels that do not fit, `FedganError` when a value is not finite.
    """
    labels = np.asarray(labels)
    if space not in ("w", "z") or samples < 1 or epsilon <= 0:
        raise ValueError(
            f"path length needs space 'w' or 'z', samples ≥ 1 and epsilon > 0; got {space}, {samples}, {epsilon}"
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
                        place[part].to(device),
                        space,
                    )
                    for place in (t, t + epsilon)
                )
                distance = (features(first).double() - features(second).double()).square().sum(1)
                total += float(distance.sum())
    finally:
        generator.train(was_training)
    if not np.isfinite(total):
        raise FedganError(
            "the path length is not finite: the generator has diverged; go back to an earlier checkpoint"
        )
    return total / (samples * epsilon**2)


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """The point at share t (B, 1) of the great circle from a to b (B, D), of unit length; along b - a where they are parallel."""
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
    """Both ends (2, S, z_dim), places t (S, 1) float64 on the path, and the row of the label: the same for any batch size."""
    rng = torch.Generator("cpu").manual_seed(seed)
    ends = torch.randn(2, samples, z_dim, generator=rng)
    t = torch.rand(samples, 1, generator=rng, dtype=torch.float64)
    return ends, t, torch.randint(rows, (samples,), generator=rng).numpy()


def _image(generator: Any, ends: Tensor, c: Tensor, t: Tensor, space: str) -> Tensor:
    """Images (B, C, H, W) float32 in [0, 255] at the places t (B, 1) of the paths between ends (2, B, z_dim).

    The place is computed in float64, or its rounding would be a part of a step of ε.
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
