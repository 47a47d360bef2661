"""How near a generator can come to a real image: latent projection, and the gap between training and held-out images.

A generator that has memorised comes nearer to what it was trained on than to other images of the same distribution. The
method is StyleGAN2's (arXiv 1912.04958, section 5 and appendix D); arXiv 2208.11702 compares the distances of real images to
their projections. Here whole batches are projected at once, each image with a loss of its own.
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

CANDIDATES = 128  # random w of the image's labels, the best of which is the start
CANDIDATE_BATCH = (
    32  # of them at once: the same for any batch of images, so that starts are the same too
)
CANDIDATE_SIDE = 64  # they are compared with images at this resolution at most
REMEMBERED = 32  # label vectors whose candidates stay in memory
LEARNING_RATE = 0.1  # of Adam, in units of the spread of w
RAMP_UP, RAMP_DOWN = 0.05, 0.25  # shares of the steps (arXiv 1912.04958, appendix D)


@dataclass(frozen=True)
class ProjectionFindings:
    """Distances of held-out images to their projections minus those of training images; above 0: training images are nearer.

    `gap` of means and `median_gap` of medians, in the unit of the distances, `…_ci` their intervals. `auc`: probability that
    a training image is nearer to its projection than a held-out one; 0.5 is chance. `images`: (training, held-out).
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
    """Distances (N,) float64 of images (N, C, H, W) uint8 to their projections, and the latents ws (N, num_ws, w_dim) float32.

    Minimises ‖G(ws) - x‖² over ws by `steps` steps of Adam from the nearest of 128 random w of the image's labels (N, K) or
    their mean; the best ws met on the way is kept. It is one w for all layers, what the generator makes by itself: one a layer
    fits nearly anything and so tells training images apart less well.
    The distance is a root mean square in grey levels (0 to 255) of the image as it would be released (clamped, constant noise).
    Images do not influence each other: `batch` changes rounding only. The generator's parameters are never touched, and torch's
    global random state is left alone. Raises `FedganError` when the generator gives no finite images or another size.
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
            "the generator gives images that are not finite numbers: training has diverged; audit an earlier checkpoint"
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
    """Are training images (N,) nearer to their projections than held-out ones (M,) are?

    Both must come from one hospital, split by patient, and be projected with the same settings. Intervals: percentile
    bootstrap of both sides, by `…_groups` (patients) where given. Sizes may differ: neither a mean nor an AUC leans on them.
    Raises `DataError` for fewer than two distances on a side or such as are no numbers.
    """
    train, held_out = (
        np.asarray(side, np.float64) for side in (train_distances, held_out_distances)
    )
    for side in (train, held_out):
        if side.ndim != 1 or len(side) < 2 or not np.isfinite(side).all():
            raise DataError(
                f"a projection gap needs two finite distances on each side at least; one side has shape {side.shape}"
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
    """The gap between two random halves of the held-out images (N,), halved by `groups` (patients): must hold 0."""
    distances = np.asarray(held_out_distances, np.float64)
    numbers = group_numbers(groups, len(distances))
    total = int(numbers.max()) + 1 if len(numbers) else 0
    poses = np.zeros(total, bool)
    poses[np.random.default_rng((seed, 2)).permutation(total)[: total // 2]] = True
    half = poses[numbers]
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
            f"not steps ≥ 0, batch ≥ 1, a label vector an image: {steps}, {batch}, {labels.shape}"
        )
    if tuple(images.shape[1:]) != (generator.channels, generator.resolution, generator.resolution):
        raise FedganError(
            f"images of {tuple(images.shape[1:])} do not fit a generator of {generator.channels} × {generator.resolution}²"
        )


def _squared(images: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance (B,) over the pixels of images (B, C, H, W) in [-1, 1] to their targets."""
    return (images - target).square().mean(dim=(1, 2, 3))


class _Starts:
    """Random w for each label vector that occurs, the same for every image with these labels and for any batch."""

    def __init__(self, generator: Generator, seed: int, device: str) -> None:
        self.generator = generator
        self.z = torch.randn(
            CANDIDATES, generator.z_dim, generator=torch.Generator("cpu").manual_seed(seed)
        ).to(device)
        self.known: dict[bytes, tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def of(self, target: Tensor, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        """The nearest candidates (B, 1, w_dim) of images (B, C, H, W), and the spread of w for their labels (B, 1, 1)."""
        chosen, spreads = [], []
        for image, vector in zip(_small(target), labels, strict=True):
            ws, images, spread = self._candidates(vector)
            chosen.append(ws[(images - image).square().mean(dim=(1, 2, 3)).argmin()])
            spreads.append(spread)
        return torch.stack(chosen).unsqueeze(1), torch.stack(spreads).reshape(-1, 1, 1)

    def _candidates(self, vector: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """w (R + 1, w_dim) of random z and their mean, the (small) images of these w, and the root mean square deviation of w."""
        key = np.asarray(vector, np.float32).tobytes()
        if key not in self.known:
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
            if len(self.known) >= REMEMBERED:
                self.known.pop(next(iter(self.known)))
            self.known[key] = ws, images, (w - middle).square().mean().sqrt()
        return self.known[key]


def _descend(
    generator: Generator, target: Tensor, start: Tensor, spread: Tensor, steps: int
) -> Tensor:
    """The best w (B, 1, w_dim) for images (B, C, H, W) met in `steps` steps from `start` (B, 1, w_dim).

    What Adam moves is the offset in units of `spread` (B, 1, 1), so that the learning rate fits any generator. Adam works by
    element and the sum of losses has no terms that two images share, so each image goes its own way.
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


def _ramp(place: float) -> float:
    """Share of the learning rate at `place` in [0, 1): up linearly, down along a cosine (arXiv 1912.04958, appendix D)."""
    down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1.0 - place) / RAMP_DOWN))
    return down * min(1.0, (place + 1e-3) / RAMP_UP)


def _small(images: Tensor) -> Tensor:
    """Images (B, C, H, W) at 64² at most, to choose among candidates."""
    return (
        adaptive_avg_pool2d(images, CANDIDATE_SIDE) if images.shape[-1] > CANDIDATE_SIDE else images
    )


def _image(generator: Generator, ws: Tensor) -> Tensor:
    """ws (B, 1 or num_ws, w_dim) → images (B, C, H, W) float32 as they are released: constant noise, clamped to [-1, 1].

    Gradients pass the clamp as if it were not there: a pixel beyond the range is drawn back where the target is inside and
    left alone where the target is black or white itself, as the background of a radiograph is.
    """
    images: Tensor = generator.synthesis(
        ws.expand(-1, generator.synthesis.num_ws, -1), noise="const"
    ).float()
    return images + (images.clamp(-1.0, 1.0) - images).detach()


def _gaps(
    train: np.ndarray, held_out: np.ndarray, weights: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """(B, 3): gap of means, gap of medians and AUC for weights (B, N) and (B, M) of the images."""
    means = [
        (part @ side) / part.sum(1) for side, part in zip((train, held_out), weights, strict=True)
    ]
    medians = [_medians(side, part) for side, part in zip((train, held_out), weights, strict=True)]
    auc, _ = roc_figures(-train, -held_out, weights, ())
    return np.stack([means[1] - means[0], medians[1] - medians[0], auc], 1)


def _medians(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Median (B,) of values (N,) that count `weights` (B, N) times each; the mean of both middle ones where there are two."""
    order = np.argsort(values, kind="stable")
    reached = weights[:, order].cumsum(1)
    half = reached[:, -1:] / 2
    low, high = (reached < half - 1e-9).sum(1), (reached < half + 1e-9).sum(1)
    middle: np.ndarray = (values[order][low] + values[order][np.minimum(high, len(values) - 1)]) / 2
    return middle


@contextmanager
def _frozen(generator: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient and the network is in evaluation mode; afterwards all is as before."""
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
