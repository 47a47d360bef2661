"""Contrastive copy detector: an embedding that maps an image and its changed versions together.

NT-Xent (arXiv 2002.05709, eq. 1) with the changes of a possible copy: mirrored, rotated, shifted,
scaled, brighter, with more contrast or noise. Distances in this space find copies that pixels and
class features miss (as in arXiv 2402.01054). Each hospital trains it on its own images without a
privacy mechanism: network and features stay in the hospital; shares and AUCs computed with them may
leave it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedgan.data.dataset import ImageArray

BATCH = 128  # images per step, two views each
STEPS = 400
TEMPERATURE = 0.1
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-4
WARM_UP = 0.1  # share of the steps
WIDTHS = (
    24,
    48,
    96,
)  # of the convolutions; the first reduces the side to 16 pixels, others halve it
DIMENSION = 64  # of the embedding
MAX_SIDE = 64  # pixels; larger images are averaged down
MIN_MAP_SIDE = 4  # pixels of the last map: positions distinguish two patients
FORWARD = 512  # images per batch of inference
VERSION_SHIFT = 1 / 32  # of the side, between the averaged versions of an image

# Range of changes under which a copy is recognised.
ROTATION = 10.0  # degrees, either way
SHIFT = 1 / 16  # of the side
SCALE = 0.06
BRIGHTNESS = 0.1  # of the grey range, which is 2
CONTRAST = 0.15
NOISE = 0.03


@dataclass(frozen=True)
class Embedding:
    """A trained network on `device`. Private: see the module."""

    network: nn.Module
    side: int
    device: str

    @torch.no_grad()
    def features(self, images: ImageArray) -> np.ndarray:
        """Unit rows (N, 64) float32 of images (N, C, H, W) uint8, invariant to mirroring."""
        self.network.eval()
        rows = [np.empty((0, DIMENSION), np.float32)]
        for start in range(0, images.shape[0], FORWARD):
            batch = _to_float(
                images,
                np.arange(start, min(start + FORWARD, images.shape[0])),
                self.side,
                self.device,
            )
            rows.append(_embed(self.network, batch).cpu().numpy())
        return np.concatenate(rows)


def train_embedding(
    images: ImageArray, *, seed: int, steps: int = STEPS, device: str = "cpu"
) -> Embedding:
    """Train an embedding of images (N, C, H, W) uint8, N ≥ 2, H = W ≥ 8; deterministic by seed.

    On the CPU bit-identical for one number of threads. torch's global generator is restored.
    """
    count, channels, height, width = images.shape
    if count < 2 or height != width or height < 2 * MIN_MAP_SIDE:
        raise ValueError(
            "an embedding needs two or more square images of at least 8 pixels per side, "
            f"not {images.shape}"
        )
    side = min(height, MAX_SIDE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(channels, side).to(device)
    rng, draws = np.random.default_rng([seed, 1]), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps))
    network.train()
    for _ in range(steps):
        rows = rng.choice(count, min(BATCH, count), replace=False)
        batch = _to_float(images, rows, side, device)
        views = torch.cat([change(batch, draws), change(batch, draws)])
        first, second = functional.normalize(
            network(views.contiguous(memory_format=torch.channels_last)), dim=1
        ).chunk(2)
        optimizer.zero_grad(set_to_none=True)
        nt_xent(first, second).backward()
        optimizer.step()
        rate.step()
    return Embedding(network.eval(), side, device)


def nt_xent(first: Tensor, second: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """NT-Xent: mean loss over all 2B ordered positive pairs (arXiv 2002.05709, eq. 1); a scalar.

    `first`, `second` (B, F) unit rows: row i of both is the same image, changed differently. For
    each view the partner is the correct answer among the 2B - 1 other views, by cosine similarity
    over `temperature`.
    """
    views = torch.cat([first, second])
    similarity = views @ views.t() / temperature
    similarity = similarity.masked_fill(
        torch.eye(len(views), dtype=torch.bool, device=views.device), -torch.inf
    )
    partners = torch.arange(len(views), device=views.device).roll(len(first))
    return functional.cross_entropy(similarity, partners)


def change(images: Tensor, draws: torch.Generator) -> Tensor:
    """Randomly change each image (B, C, H, W) in [-1, 1] like a copy; edges repeated.

    `draws`: a generator on the CPU.
    """
    count, device = len(images), images.device

    def uniform(most: float) -> Tensor:
        return (2 * torch.rand(count, generator=draws) - 1) * most

    angle, scale = uniform(math.radians(ROTATION)), 1 + uniform(SCALE)
    flip = torch.where(torch.rand(count, generator=draws) < 0.5, -1.0, 1.0)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    shift_x, shift_y = uniform(2 * SHIFT), uniform(2 * SHIFT)  # the side is 2 in these coordinates
    affine = torch.stack(
        [
            torch.stack([flip * cosine, -sine, shift_x], 1),
            torch.stack([flip * sine, cosine, shift_y], 1),
        ],
        1,
    )
    grid = functional.affine_grid(affine.to(device), list(images.shape), align_corners=False)
    moved = functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    contrast, brightness = (
        v.to(device)[:, None, None, None] for v in (1 + uniform(CONTRAST), uniform(2 * BRIGHTNESS))
    )
    noise = torch.randn(images.shape, generator=draws).to(device) * NOISE
    return moved * contrast + brightness + noise


def build_network(channels: int, side: int) -> nn.Sequential:
    """Convolutions down to a map of 4 × 4 (for sides from 16 pixels), then a linear layer.

    The first convolution reduces every side to about 16 pixels, so large images cost little more.
    """
    stride = max(1, side // 16)
    layers: list[nn.Module] = [
        *_block(channels, WIDTHS[0], 2 * stride - 1 if stride > 1 else 3, stride)
    ]
    for inputs, outputs in itertools.pairwise(WIDTHS):
        layers += _block(inputs, outputs, 3, 2)
    cells = math.ceil(math.ceil(math.ceil(side / stride) / 2) / 2) ** 2
    layers += [nn.Flatten(), nn.Linear(WIDTHS[-1] * cells, DIMENSION)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def _embed(network: nn.Module, images: Tensor) -> Tensor:
    """Unit rows (B, F): mean over an image, its mirror image, and both shifted in 8 directions.

    Mirror images are equal by construction, and the sensitivity of strided convolutions to a shift
    of one pixel is averaged out.
    """
    most, height, width = max(1, round(VERSION_SHIFT * images.shape[-1])), *images.shape[-2:]
    padded = functional.pad(images, (most, most, most, most), mode="replicate")
    offsets = (0, most, 2 * most)
    total = torch.zeros(len(images), DIMENSION, device=images.device)
    for version in (padded, padded.flip(3)):
        for down in offsets:
            for right in offsets:
                moved = version[:, :, down : down + height, right : right + width]
                total += functional.normalize(
                    network(moved.contiguous(memory_format=torch.channels_last)), dim=1
                )
    return functional.normalize(total, dim=1)


def _block(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _to_float(images: ImageArray, rows: np.ndarray, side: int, device: str) -> Tensor:
    """Rows of uint8 images as float32 in [-1, 1], averaged down to `side` pixels if larger."""
    batch = torch.from_numpy(np.ascontiguousarray(images[rows])).to(device).float() / 127.5 - 1
    return functional.adaptive_avg_pool2d(batch, side) if batch.shape[-1] != side else batch


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, then half a cosine to 0."""
    warm = max(1, round(WARM_UP * steps))
    return (
        (step + 1) / warm
        if step < warm
        else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    )
