"""Control variates: each hospital's steps are corrected by how its changes differ from everybody's.

SCAFFOLD (arXiv 1910.06378) adds c - c_i to a gradient, where c_i is the mean gradient of hospital i and c that of all, so that
many steps at home do not carry a hospital towards an optimum of its own. Adam would rescale such a gradient (and walk where a
hospital has none of its own), so the correction is kept here in what SCAFFOLD's option II measures it by, the change of the
weights over a round: with x the model that was sent, y_i what hospital i made of it, r_i its correction and x' = Σ p_i y_i,

    own change Δ_i = y_i - x - r_i,     r_i ← Σ p_j Δ_j - Δ_i = r_i + x' - y_i,

because Σ p_i r_i = 0 from the start, when all are 0. So nothing more travels than the model: a hospital knows its own y_i
and is sent x'. A round adds r_i to the weights in equal parts over its steps.

That sum stays 0 only as long as all hospitals answer every round and x' is that mean to the bit, and Δ_i are of the same
pull only where all take the same number of steps: server/aggregation/strategies.py refuses settings in which it is otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedgan.training.checkpoint import lists_of, numbered

PREFIX = "variates/"


class ControlVariates:
    """The corrections of one hospital, a tensor for each parameter of each part that travels."""

    def __init__(self) -> None:
        self.corrections: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def arrived(self, part: str, made: Sequence[Tensor], network: nn.Module) -> None:
        """Take note of the model that `network` has just received; `made`: the parameters until then.

        The first model that arrives is nobody's answer to anything made here.
        """
        if part not in self.corrections:
            self.corrections[part] = [torch.zeros_like(parameter) for parameter in made]
            return
        for correction, own, sent in zip(
            self.corrections[part], made, network.parameters(), strict=True
        ):
            correction.add_(sent - own)

    @torch.no_grad()
    def apply(self, parts: Mapping[str, nn.Module], share: float) -> None:
        """Add the share of the corrections that is one step's."""
        for part, corrections in self.corrections.items():
            for parameter, correction in zip(parts[part].parameters(), corrections, strict=True):
                parameter.add_(correction, alpha=share)

    def tensors(self) -> dict[str, Tensor]:
        """What `load` takes."""
        return numbered(self.corrections, PREFIX)

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Put back what `tensors` gave; other names are left alone."""
        self.corrections = lists_of(tensors, PREFIX, device)
