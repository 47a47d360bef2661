"""Labels for the generator that are not those of single images: drawn from frequencies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_labels(
    weights: Sequence[float], label_dim: int, exclusive: bool, count: int, host: torch.Generator
) -> Tensor:
    """Label vectors (count, label_dim) float32.

    `weights` (label_dim,): probabilities of the classes where exactly one label holds (`exclusive`), else of each label by
    itself. Empty: uniform over the classes; over the single labels and none of them where labels do not exclude each other.
    """
    if not label_dim or not count:
        return torch.zeros(count, label_dim)
    if weights and not exclusive:
        return (torch.rand(count, label_dim, generator=host) < torch.tensor(weights)).float()
    choices = label_dim if exclusive else label_dim + 1
    odds = torch.tensor(weights) if weights else torch.ones(choices)
    chosen = (
        torch.multinomial(odds.float(), count, replacement=True, generator=host)
        if count
        else torch.zeros(0, dtype=torch.int64)
    )
    return torch.nn.functional.one_hot(chosen, choices)[:, :label_dim].float()
