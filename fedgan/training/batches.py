"""Batches of one hospital: real images with their labels, and labels for generated images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedgan.config import Settings
from fedgan.data.dataset import ImageDataset
from fedgan.training.sampler import PoissonSampler, Sampler


@dataclass(frozen=True)
class Streams:
    """Random generators: `host` for choices on the CPU, `noise` for noise on the device."""

    host: torch.Generator
    noise: torch.Generator


class Batches:
    """Real batches and generator labels of `dataset`, as tensors on `device`.

    `hospital_of_row` (N,): each image's hospital by number. `label_weights`: label frequencies for
    the generator, where they do not come from the images themselves; empty: uniform.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: ImageDataset,
        stream: int,
        hospital_of_row: np.ndarray | None,
        device: torch.device,
    ) -> None:
        self.settings, self.dataset, self.device = settings, dataset, device
        self.batch_size = settings.training.batch_size
        self.hospitals = settings.model.hospitals
        self.hospital_of_row = (
            np.full(len(dataset), stream) if hospital_of_row is None else hospital_of_row
        )
        self.uses_own_labels = settings.training.labels == "data" and not settings.privacy.on
        self.label_weights: list[float] = []
        kind = PoissonSampler if settings.training.sampling == "poisson" else Sampler
        self.sampler = kind(len(dataset), settings.seed, stream)

    def real(self, host: torch.Generator, rows: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) in [-1, 1] and condition c of the next rows, or of `rows`."""
        rows = self.sampler.take(self.batch_size) if rows is None else rows
        images, labels = self.dataset.batch(rows)
        x = images.to(self.device, non_blocking=True).float() / 127.5 - 1
        if self.settings.augment.mirror:
            flip = (torch.rand(len(x), 1, 1, 1, generator=host) < 0.5).to(self.device)
            x = torch.where(flip, x.flip(3), x)
        return x, self._condition(labels, rows).to(self.device, non_blocking=True)

    def generator_labels(self, count: int, host: torch.Generator) -> Tensor:
        """Condition c of `count` generated images, by `training.labels`."""
        if self.uses_own_labels:
            rows = torch.randint(len(self.dataset), (count,), generator=host).numpy()
            c = self._condition(
                torch.from_numpy(self.dataset.labels[rows].astype(np.float32)), rows
            )
        else:
            c = sample_labels(
                self.label_weights, self.dataset.label_dim, self.dataset.exclusive, count, host
            )
        return c.to(self.device, non_blocking=True)

    def label_shares(self) -> dict[int, tuple[int, list[int]]]:
        """By hospital number: images, and images of each label (K,)."""
        rows = {number: self.hospital_of_row == number for number in range(self.hospitals)}
        return {
            number: (int(own.sum()), self.dataset.labels[own].sum(0, dtype=int).tolist())
            for number, own in rows.items()
        }

    def _condition(self, labels: Tensor, rows: np.ndarray) -> Tensor:
        """Labels (B, K), then the hospital, one-hot (B, H), where `model.hospitals` = H > 0."""
        if not self.hospitals:
            return labels
        hospital = torch.from_numpy(self.hospital_of_row[rows]).long()
        return torch.cat([labels, nn.functional.one_hot(hospital, self.hospitals).float()], dim=1)


def sample_labels(
    weights: Sequence[float], label_dim: int, exclusive: bool, count: int, host: torch.Generator
) -> Tensor:
    """Label vectors (count, label_dim) float32, drawn by frequency.

    `weights` (label_dim,): probabilities of the classes (`exclusive`), or of each label on its own.
    Empty: uniform over the classes; where labels can occur together, over the single labels and no
    label.
    """
    if not label_dim or not count:
        return torch.zeros(count, label_dim)
    if weights and not exclusive:
        return (torch.rand(count, label_dim, generator=host) < torch.tensor(weights)).float()
    choices = label_dim if exclusive else label_dim + 1
    odds = torch.tensor(weights) if weights else torch.ones(choices)
    chosen = torch.multinomial(odds.float(), count, replacement=True, generator=host)
    return torch.nn.functional.one_hot(chosen, choices)[:, :label_dim].float()
