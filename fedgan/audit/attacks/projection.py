"""Latent projection of real images, and the gap between training and held-out images.

A generator that has memorised reproduces its training images more exactly than other images of the
same distribution. Method of StyleGAN2 (arXiv 1912.04958, section 5 and appendix D), in batches with
one loss per image; arXiv 2208.11702 compares the distances of real images to their projections.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from fedgan.audit.attacks.roc import roc_figures
from fedgan.data.dataset import ImageArray
from fedgan.errors import DataError, FedganError
from fedgan.evaluation.metrics.bootstrap import group_numbers, two_sample_resamples
from fedgan.evaluation.metrics.intervals import LEVEL, Interval, percentile_interval
from fedgan.models.stylegan2.generator import Generator

CANDIDATES = 128  # random w of the image's labels; the best is the start
CANDIDATE_BATCH = 32  # fixed, so that starts do not depend on the batch of images
CANDIDATE_SIDE = 64  # maximum resolution at which candidates are compared
CACHED_VECTORS = 32  # label vectors whose candidates stay in memory
LEARNING_RATE = 0.1  # of Adam, in units of the spread of w
RAMP_UP, RAMP_DOWN = 0.05, 0.25  # shares of the steps (arXiv 1912.04958, appendix D)


@dataclass(frozen=True)
class ProjectionFindings:
    """Distances of held-out images to their projections minus those of training images.

    Above 0, training images are nearer. `gap` of means and `median_gap` of medians, in the unit of
    the distances, `…_ci` their intervals. `auc`: probability that a training image is nearer to its
    projection than a held-out one; 0.5 is chance. `images`: (training, held-out).
    """

    gap: float
    gap_ci: Interval
    median_gap: float
    median_gap_ci: Interval
    auc: float
    auc_ci: Interval
    train_mean: float
    held_out_mean: float
    images: tuple[int, int]


def project(
    generator: Generator,
    images: ImageArray,
    labels: np.ndarray,
    *,
    steps: int = 200,
    batch: int = 64,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Project images (N, C, H, W) uint8 → distances (N,) float64, ws (N, num_ws, w_dim) float32.

    Minimises ‖G(ws) - x‖² over ws by `steps` steps of Adam, from the nearest of 128 random w of the
    image's labels (N, K) or their mean, and returns the best ws found. One w for all layers, as the
    generator itself uses: one per layer fits almost any image and distinguishes training images
    less. The distance is the RMS in grey levels (0 to 255) of the image as released (clamped,
    constant noise). Images are independent: `batch` changes rounding only. The generator's
    parameters and torch's global random state do not change. Raises `FedganError` for images that
    are not finite or of another size.
    """
    labels, count = np.asarray(labels), images.shape[0]
    _check(generator, images, labels, steps, batch)
    distances, found = (
        np.empty(count),
        np.empty((count, generator.synthesis.num_ws, generator.w_dim), np.float32),
    )
    with _frozen(generator.to(device)):
        starts = _Starts(generator, seed, device)
        for first in range(0, count, batch):
            rows = np.arange(first, min(first + batch, count))
            target = (
                torch.from_numpy(np.ascontiguousarray(images[rows])).to(device).float() / 127.5
                - 1.0
            )
            start, spread = starts.of(target, labels[rows])
            ws = _descend(generator, target, start, spread, steps)
            with torch.no_grad():
                squared = _squared(_image(generator, ws), target)
            distances[rows] = 127.5 * squared.double().sqrt().cpu().numpy()
            found[rows] = ws.expand(-1, generator.synthesis.num_ws, -1).cpu().numpy()
    if not np.isfinite(distances).all():
        raise FedganError(
            "the generator gives images that are not finite numbers: training has diverged; "
            "audit an earlier checkpoint"
        )
    return distances, found


def projection_gap(
    train_distances: np.ndarray,
    held_out_distances: np.ndarray,
    seed: int,
    *,
    bootstrap: int = 1000,
    level: float = LEVEL,
    train_groups: np.ndarray | None = None,
    held_out_groups: np.ndarray | None = None,
) -> ProjectionFindings:
    """Gap between the projection distances of training (N,) and held-out images (M,).

    Both must be of one hospital, split by patient, and projected with the same settings. Intervals:
    percentile bootstrap of both sides, by `…_groups` (patients) if given. Sizes may differ. Raises
    `DataError` for fewer than two distances per side or values that are not finite.
    """
    train, held_out = (
        np.asarray(side, np.float64) for side in (train_distances, held_out_distances)
    )
    for side in (train, held_out):
        if side.ndim != 1 or len(side) < 2 or not np.isfinite(side).all():
            raise DataError(
                "a projection gap needs at least two finite distances on each side; "
                f"one side has shape {side.shape}"
            )
    groups = group_numbers(train_groups, len(train)), group_numbers(held_out_groups, len(held_out))
    point = _gaps(train, held_out, (np.ones((1, len(train))), np.ones((1, len(held_out)))))[0]
    drawn = np.concatenate(
        [
            _gaps(train, held_out, weights)
            for weights in two_sample_resamples(*groups, bootstrap, seed)
        ]
    )
    gap_ci, median_gap_ci, auc_ci = (
        percentile_interval(drawn[:, column], level) for column in range(3)
    )
    return ProjectionFindings(
        gap=float(point[0]),
        gap_ci=gap_ci,
        median_gap=float(point[1]),
        median_gap_ci=median_gap_ci,
        auc=float(point[2]),
        auc_ci=auc_ci,
        train_mean=float(train.mean()),
        held_out_mean=float(held_out.mean()),
        images=(len(train), len(held_out)),
    )


def null_projection_gap(
    held_out_distances: np.ndarray,
    seed: int,
    *,
    bootstrap: int = 1000,
    level: float = LEVEL,
    groups: np.ndarray | None = None,
) -> ProjectionFindings:
    """Gap between two random halves of the held-out images (N,), by `groups` (patients)."""
    distances = np.asarray(held_out_distances, np.float64)
    numbers = group_numbers(groups, len(distances))
    total = int(numbers.max()) + 1 if len(numbers) else 0
    pseudo_member = np.zeros(total, bool)
    pseudo_member[np.random.default_rng((seed, 2)).permutation(total)[: total // 2]] = True
    half = pseudo_member[numbers]
    return projection_gap(
        distances[half],
        distances[~half],
        seed,
        bootstrap=bootstrap,
        level=level,
        train_groups=numbers[half],
        held_out_groups=numbers[~half],
    )


def _check(
    generator: Generator, images: ImageArray, labels: np.ndarray, steps: int, batch: int
) -> None:
    if steps < 0 or batch < 1 or labels.shape != (images.shape[0], generator.label_dim):
        raise ValueError(
            "not steps ≥ 0, batch ≥ 1, one label vector per image: "
            f"{steps}, {batch}, {labels.shape}"
        )
    if tuple(images.shape[1:]) != (generator.channels, generator.resolution, generator.resolution):
        raise FedganError(
            f"images of {tuple(images.shape[1:])} do not fit a generator of "
            f"{generator.channels} × {generator.resolution}²"
        )


def _squared(images: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance (B,) over pixels of images (B, C, H, W) in [-1, 1] to their targets."""
    return (images - target).square().mean(dim=(1, 2, 3))


class _Starts:
    """Random w per label vector, equal for all images with these labels and any batch."""

    def __init__(self, generator: Generator, seed: int, device: str) -> None:
        self.generator = generator
        self.z = torch.randn(
            CANDIDATES, generator.z_dim, generator=torch.Generator("cpu").manual_seed(seed)
        ).to(device)
        self.cache: dict[bytes, tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def of(self, target: Tensor, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        """Nearest candidates (B, 1, w_dim) of images (B, C, H, W), spread of w (B, 1, 1)."""
        chosen, spreads = [], []
        for image, vector in zip(_small(target), labels, strict=True):
            ws, images, spread = self._candidates(vector)
            chosen.append(ws[(images - image).square().mean(dim=(1, 2, 3)).argmin()])
            spreads.append(spread)
        return torch.stack(chosen).unsqueeze(1), torch.stack(spreads).reshape(-1, 1, 1)

    def _candidates(self, vector: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """w (R + 1, w_dim) of random z and their mean, their images, RMS deviation of w."""
        key = np.asarray(vector, np.float32).tobytes()
        if key not in self.cache:
            c = (
                torch.from_numpy(np.asarray(vector, np.float32))
                .to(self.z.device)
                .expand(len(self.z), -1)
            )
            w = self.generator.mapping(self.z, c)
            middle = w.mean(0, keepdim=True)
            ws = torch.cat([w, middle])
            images = torch.cat(
                [
                    _small(_image(self.generator, part.unsqueeze(1)))
                    for part in ws.split(CANDIDATE_BATCH)
                ]
            )
            if len(self.cache) >= CACHED_VECTORS:
                self.cache.pop(next(iter(self.cache)))
            self.cache[key] = ws, images, (w - middle).square().mean().sqrt()
        return self.cache[key]


def _descend(
    generator: Generator, target: Tensor, start: Tensor, spread: Tensor, steps: int
) -> Tensor:
    """The best w (B, 1, w_dim) for images (B, C, H, W) in `steps` steps of Adam from `start`.

    Adam optimises the offset in units of `spread` (B, 1, 1), so the learning rate suits any
    generator. Adam is elementwise and the sum of losses has no terms shared by two images, so
    images are independent.
    """
    offset = torch.zeros_like(start).requires_grad_()
    optimizer = torch.optim.Adam([offset], lr=LEARNING_RATE, betas=(0.9, 0.999))
    best, lowest = start.clone(), torch.full((len(start),), torch.inf, device=start.device)
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            ws = start + offset * spread
            losses = _squared(_image(generator, ws), target)
        with torch.no_grad():
            better = losses < lowest
            lowest = torch.where(better, losses, lowest)
            best = torch.where(better[:, None, None], ws, best)
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _ramp(step / steps)
        (offset.grad,) = torch.autograd.grad(losses.sum(), offset)
        optimizer.step()
    return best.detach()


def _ramp(progress: float) -> float:
    """Share of the learning rate at `progress` in [0, 1): linear up, cosine down (appendix D)."""
    down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1.0 - progress) / RAMP_DOWN))
    return down * min(1.0, (progress + 1e-3) / RAMP_UP)


def _small(images: Tensor) -> Tensor:
    """Images (B, C, H, W) at 64² at most, to compare candidates."""
    return (
        adaptive_avg_pool2d(images, CANDIDATE_SIDE) if images.shape[-1] > CANDIDATE_SIDE else images
    )


def _image(generator: Generator, ws: Tensor) -> Tensor:
    """ws (B, 1 or num_ws, w_dim) → images (B, C, H, W) as released: constant noise, clamped.

    Gradients pass the clamp: a pixel outside the range is pulled back where the target is inside,
    and left where the target is black or white, as the background of a radiograph.
    """
    images: Tensor = generator.synthesis(
        ws.expand(-1, generator.synthesis.num_ws, -1), noise="const"
    ).float()
    return images + (images.clamp(-1.0, 1.0) - images).detach()


def _gaps(
    train: np.ndarray, held_out: np.ndarray, weights: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """(B, 3): gap of means, gap of medians, AUC for image weights (B, N) and (B, M)."""
    means = [
        (part @ side) / part.sum(1) for side, part in zip((train, held_out), weights, strict=True)
    ]
    medians = [_medians(side, part) for side, part in zip((train, held_out), weights, strict=True)]
    auc, _ = roc_figures(-train, -held_out, weights, ())
    return np.stack([means[1] - means[0], medians[1] - medians[0], auc], 1)


def _medians(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Median (B,) of values (N,) with `weights` (B, N), mean of the two middle values."""
    order = np.argsort(values, kind="stable")
    reached = weights[:, order].cumsum(1)
    half = reached[:, -1:] / 2
    low, high = (reached < half - 1e-9).sum(1), (reached < half + 1e-9).sum(1)
    middle: np.ndarray = (values[order][low] + values[order][np.minimum(high, len(values) - 1)]) / 2
    return middle


@contextmanager
def _frozen(generator: nn.Module) -> Iterator[None]:
    """Freeze the parameters and set evaluation mode; restore both on exit."""
    was_training, wanted = (
        generator.training,
        [parameter.requires_grad for parameter in generator.parameters()],
    )
    generator.eval().requires_grad_(False)
    try:
        yield
    finally:
        generator.train(was_training)
        for parameter, want in zip(generator.parameters(), wanted, strict=True):
            parameter.requires_grad_(want)
