"""Conditioning on the hospital beside the label (`model.hospitals`).

Networks that see the label alone must blend the scanners and patients of all hospitals that hold
it, and averaging hospitals that pull one label apart (healthy children here, healthy adults there)
undoes what each has learnt. With `model.hospitals` = H the condition is the label vector followed
by one of H columns: each hospital trains a column of its own (embedding and projection of arXiv
2006.06676, with the hospital as one more attribute).

A condition without a hospital gets one by the hospitals' shares of the label, as in the pooled
images:

    P(i | c) ∝ n_i Π_k p_ik^c_k (1 - p_ik)^(1 - c_k),     p_ik = n_ik / n_i

(for labels that exclude each other without the second factor: P is n_ik / Σ n_jk exactly). The
hospital of an image follows from its latent, so that a latent and a label give one image in any
batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedgan.errors import FedganError

MIN_PROBABILITY = 1e-6  # of a label that a hospital does not hold
LATENT_SCALE = 1000.0  # the digits of a latent after this scale are independent of its place


class HospitalCondition(nn.Module):
    """Complete c (B, K) to (B, K + H). Complete c, and every c where H = 0, stays as it is.

    It has no weights.
    """

    def __init__(self, labels: int, hospitals: int) -> None:
        super().__init__()
        self.labels, self.hospitals = labels, hospitals
        self.exclusive = True
        self.counts: Tensor | None = None  # (H, K + 1): training images of each label, and of all

    def set_label_counts(
        self, counts: Mapping[int, tuple[int, Sequence[int]]], exclusive: bool
    ) -> None:
        """Set, by hospital number, the training images and those per label (K,)."""
        if not self.hospitals:
            return
        table = torch.zeros(self.hospitals, self.labels + 1, dtype=torch.float64)
        for number, (images, label_counts) in counts.items():
            table[number] = torch.tensor([*label_counts, images], dtype=torch.float64)
        self.counts, self.exclusive = table, exclusive

    @property
    def known(self) -> set[int]:
        """Numbers of the hospitals with images; empty before `set_label_counts`."""
        return set() if self.counts is None else set(self.counts[:, -1].nonzero()[:, 0].tolist())

    @contextmanager
    def restricted_to(self, hospital: int) -> Iterator[None]:
        """Complete every c with one hospital inside the context, as an attack on it does."""
        before = self.counts
        if before is not None:
            self.counts = torch.zeros_like(before)
            self.counts[hospital] = before[hospital].clamp_min(MIN_PROBABILITY)
        try:
            yield
        finally:
            self.counts = before

    def odds(self, c: Tensor) -> Tensor:
        """P(i | c), (B, H) float64 on the CPU, for label vectors c (B, K).

        Raises `FedganError` before `set_label_counts`.
        """
        if self.counts is None:
            raise FedganError(
                "this network has no label counts of the hospitals: name the hospital of each image"
            )
        c = c.detach().to("cpu", torch.float64)
        per_label, images = self.counts[:, :-1], self.counts[:, -1]
        if self.exclusive:
            held = c @ per_label.t()
            # A label that no hospital holds: by the number of images.
            held = torch.where(held.sum(1, keepdim=True) > 0, held, images)
            return held / held.sum(1, keepdim=True)
        share = (per_label / images.clamp_min(MIN_PROBABILITY)[:, None]).clamp(
            MIN_PROBABILITY, 1 - MIN_PROBABILITY
        )
        log = images.clamp_min(MIN_PROBABILITY).log()
        log = log + c @ share.log().t() + (1 - c) @ (1 - share).log().t()
        return log.masked_fill(images == 0, -torch.inf).softmax(1)

    def forward(self, c: Tensor, z: Tensor | None) -> Tensor:
        if not self.hospitals or c.shape[1] == self.labels + self.hospitals:
            return c
        odds = self.odds(c)
        if z is None:  # a discriminator weighs all hospitals
            return torch.cat([c, odds.to(c)], dim=1)
        uniform = (z[:, 0].detach().double() * LATENT_SCALE).remainder(1.0).cpu()
        chosen = (uniform[:, None] >= odds.cumsum(1)).sum(1).clamp_max(self.hospitals - 1)
        return torch.cat([c, nn.functional.one_hot(chosen, self.hospitals).to(c)], dim=1)


def set_label_counts(
    network: nn.Module, counts: Mapping[int, tuple[int, Sequence[int]]], exclusive: bool
) -> None:
    """Set the label counts in every `HospitalCondition` of a network."""
    for module in network.modules():
        if isinstance(module, HospitalCondition):
            module.set_label_counts(counts, exclusive)
