"""A copy detector of the hospital's own: an embedding trained on its images so that an image and a changed version of it meet.

NT-Xent (arXiv 2002.05709, eq. 1) with the changes that a copy may have gone through: mirrored, a little turned, shifted,
scaled, brighter, of more contrast, noisier. Distances in this space find copies that pixels and class features miss
(arXiv 2402.01054 detects copies so). The network is fitted to private images without any privacy mechanism: neither it
nor its features may leave the hospital; shares and areas that are counted with it may.
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

BATCH = 128  # images of a step, each seen twice
STEPS = 400
TEMPERATURE = 0.1
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-4
WARM_UP = 0.1  # share of the steps
WIDTHS = (
    24,
    48,
    96,
)  # of the convolutions; the first brings every side down to 16 pixels, the others halve it
DIMENSION = 64  # of the embedding
LARGEST = 64  # pixels a side that the network sees; larger images are averaged down
SMALLEST_MAP = 4  # pixels a side of the last map: what lies where tells two patients apart
FORWARD = 512  # images at once when nothing is learnt
STEP_ASIDE = 1 / 32  # of the side: how far an image is moved for the mean of its versions

# How far a copy may be changed and still be recognised.
TURN = 10.0  # degrees, either way
SHIFT = 1 / 16  # of the side
SCALE = 0.06
BRIGHTNESS = 0.1  # of the grey range, which is 2
CONTRAST = 0.15
NOISE = 0.03


@dataclass(frozen=True)
class Embedding:
    """A trained network; `device` is where it lies. Private: see the module."""

    network: nn.Module
    side: int
    device: str

    @torch.no_grad()
    def features(self, images: ImageArray) -> np.ndarray:
        """Unit rows (N, 64) float32 of images (N, C, H, W) uint8; the same for an image and its mirror image."""
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
    """An embedding of one hospital's training images (N, C, H, W) uint8, N ≥ 2, H = W ≥ 8; the same for the same seed.

    On the CPU the same bit for bit at the same number of threads. Torch's global generator is left as it was.
    """
    count, channels, height, width = images.shape
    if count < 2 or height != width or height < 2 * SMALLEST_MAP:
        raise ValueError(
            f"an embedding needs two or more square images of 8 pixels a side at least, not {images.shape}"
        )
    side = min(height, LARGEST)
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
    """The mean loss of eq. 1 of arXiv 2002.05709 over all 2B ordered positive pairs; a scalar.

    `first`, `second` (B, F) unit rows: row i of both is the same image, changed differently. For a view, its partner is
    the right answer among all 2B - 1 other views, by cosine similarity over `temperature`.
    """
    views = torch.cat([first, second])
    similarity = views @ views.t() / temperature
    similarity = similarity.masked_fill(
        torch.eye(len(views), dtype=torch.bool, device=views.device), -torch.inf
    )
    partners = torch.arange(len(views), device=views.device).roll(len(first))
    return functional.cross_entropy(similarity, partners)


def change(images: Tensor, draws: torch.Generator) -> Tensor:
    """Each image (B, C, H, W) in [-1, 1] as a copy might show it; `draws` is a generator on the CPU. The edge is repeated."""
    count, device = len(images), images.device

    def uniform(most: float) -> Tensor:
        return (2 * torch.rand(count, generator=draws) - 1) * most

    angle, scale = uniform(math.radians(TURN)), 1 + uniform(SCALE)
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
    """Convolutions down to a map of 4 × 4 (for sides from 16 pixels on), then a linear layer on all of that map.

    The first convolution brings every side to about 16 pixels, so that large images cost little more than small ones.
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
    """Unit rows (B, F): the mean over an image, its mirror image, and both moved a little in 8 directions.

    Mirrored images are then one by construction, and strided convolutions, which a shift of one pixel upsets, are evened out.
    """
    most, height, width = max(1, round(STEP_ASIDE * images.shape[-1])), *images.shape[-2:]
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
    """Rows of uint8 images as float32 in [-1, 1] of `side` pixels, averaged down where they are larger."""
    batch = torch.from_numpy(np.ascontiguousarray(images[rows])).to(device).float() / 127.5 - 1
    return functional.adaptive_avg_pool2d(batch, side) if batch.shape[-1] != side else batch


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, then half a cosine down to nothing."""
    warm = max(1, round(WARM_UP * steps))
    return (
        (step + 1) / warm
        if step < warm
        else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    )
