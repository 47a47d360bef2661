"""Conditioning on the hospital beside the label: which hospital a generated image is from.

Networks that know the label alone must blend the scanners and the patients of all hospitals that hold it, and averaging
hospitals that pull one label apart (normal children here, normal adults there) undoes what each has learnt. With
`model.hospitals` = H the condition is the label vector and, behind it, one of H columns, so that each hospital trains
a column of its own: embedding and projection of arXiv 2006.06676, with the hospital as one more attribute.

Who asks for a label alone gets the hospitals by their shares of it, as the pooled images have them:

    P(i | c) ∝ n_i Π_k p_ik^c_k (1 - p_ik)^(1 - c_k),     p_ik = n_ik / n_i

(for labels that exclude each other the second factor is left out, and P is n_ik / Σ n_jk exactly). The hospital of an
image follows from its latent, so that a latent and a label are one image, in whatever batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedgan.errors import FedganError

LEAST = 1e-6  # probability of a label that a hospital does not hold
FINE = 1000.0  # digits of a latent behind these say nothing about where it lies


class HospitalCondition(nn.Module):
    """Completes c (B, K) to (B, K + H); c that is complete, and every c where H = 0, stays as it is. No part of the weights."""

    def __init__(self, labels: int, hospitals: int) -> None:
        super().__init__()
        self.labels, self.hospitals = labels, hospitals
        self.exclusive = True
        self.counts: Tensor | None = None  # (H, K + 1): training images of each label, and of all

    def set_label_counts(
        self, shares: Mapping[int, tuple[int, Sequence[int]]], exclusive: bool
    ) -> None:
        """Take the hospitals' shares: by number, training images and training images of each label (K,). Others have none."""
        if not self.hospitals:
            return
        counts = torch.zeros(self.hospitals, self.labels + 1, dtype=torch.float64)
        for number, (images, label_counts) in shares.items():
            counts[number] = torch.tensor([*label_counts, images], dtype=torch.float64)
        self.counts, self.exclusive = counts, exclusive

    @property
    def known(self) -> set[int]:
        """The hospitals with images, by number; none before `know`."""
        return set() if self.counts is None else set(self.counts[:, -1].nonzero()[:, 0].tolist())

    @contextmanager
    def restricted_to(self, hospital: int) -> Iterator[None]:
        """Inside, who asks for a label alone gets hospital `hospital`'s, as somebody would who is after its images."""
        before = self.counts
        if before is not None:
            self.counts = torch.zeros_like(before)
            self.counts[hospital] = before[hospital].clamp_min(LEAST)
        try:
            yield
        finally:
            self.counts = before

    def odds(self, c: Tensor) -> Tensor:
        """P(i | c), (B, H) float64 on the CPU, for label vectors c (B, K). Raises `FedganError` before `know`."""
        if self.counts is None:
            raise FedganError(
                "this generator does not know the hospitals' shares of the labels: name the hospital of each image"
            )
        c = c.detach().to("cpu", torch.float64)
        labelled, images = self.counts[:, :-1], self.counts[:, -1]
        if self.exclusive:
            held = c @ labelled.t()
            held = torch.where(
                held.sum(1, keepdim=True) > 0, held, images
            )  # a label that nobody holds: by size
            return held / held.sum(1, keepdim=True)
        share = (labelled / images.clamp_min(LEAST)[:, None]).clamp(LEAST, 1 - LEAST)
        log = images.clamp_min(LEAST).log() + c @ share.log().t() + (1 - c) @ (1 - share).log().t()
        return log.masked_fill(images == 0, -torch.inf).softmax(1)

    def forward(self, c: Tensor, z: Tensor | None) -> Tensor:
        if not self.hospitals or c.shape[1] == self.labels + self.hospitals:
            return c
        odds = self.odds(c)
        if z is None:  # a discriminator that is asked about a label alone
            return torch.cat([c, odds.to(c)], dim=1)
        place = (z[:, 0].detach().double() * FINE).remainder(1.0).cpu()
        chosen = (place[:, None] >= odds.cumsum(1)).sum(1).clamp_max(self.hospitals - 1)
        return torch.cat([c, nn.functional.one_hot(chosen, self.hospitals).to(c)], dim=1)
