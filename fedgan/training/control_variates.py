"""Control variates (SCAFFOLD, arXiv 1910.06378): correct a hospital's drift from the mean update.

SCAFFOLD adds c - c_i to each gradient: c_i is the mean gradient of hospital i, c that of all
hospitals. Adam would rescale such a gradient, so here the correction is added to the weights. It is
measured as in SCAFFOLD's option II, by the change of the weights over a round. With x the model
that the server sent, y_i the model of hospital i after the round, r_i its correction and x' = Σ p_i
y_i:

    own change Δ_i = y_i - x - r_i,     r_i ← Σ p_j Δ_j - Δ_i = r_i + x' - y_i,

because Σ p_i r_i = 0 from the start, where all r_i are 0. Nothing but the model travels: a hospital
has its own y_i and receives x'. A round adds r_i to the weights in equal parts over its steps.

The sum stays 0 only if all hospitals reply in every round and x' is exactly that mean; the Δ_i are
comparable only if all hospitals take the same number of steps. server/aggregation/strategies.py
refuses settings that break this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedgan.training.checkpoint import lists_of, numbered

PREFIX = "variates/"


class ControlVariates:
    """The corrections r_i of one hospital: one tensor per parameter of each part that travels."""

    def __init__(self) -> None:
        self.corrections: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def update(self, part: str, own: Sequence[Tensor], network: nn.Module) -> None:
        """Add x' - y_i: `network` holds x', `own` the parameters y_i before it arrived.

        The first model that arrives follows from no update of this hospital: its correction is 0.
        """
        if part not in self.corrections:
            self.corrections[part] = [torch.zeros_like(parameter) for parameter in own]
            return
        for correction, y, x in zip(self.corrections[part], own, network.parameters(), strict=True):
            correction.add_(x - y)

    @torch.no_grad()
    def apply(self, parts: Mapping[str, nn.Module], share: float) -> None:
        """Add `share` of the corrections to the weights."""
        for part, corrections in self.corrections.items():
            for parameter, correction in zip(parts[part].parameters(), corrections, strict=True):
                parameter.add_(correction, alpha=share)

    def tensors(self) -> dict[str, Tensor]:
        """The corrections by name, for `load`."""
        return numbered(self.corrections, PREFIX)

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Restore the corrections from `tensors()`; other names are ignored."""
        self.corrections = lists_of(tensors, PREFIX, device)
