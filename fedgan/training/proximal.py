"""FedProx's proximal term μ/2 · |w - w_t|² (arXiv 1812.06127, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedgan.training.checkpoint import lists_of, numbered

PREFIX = "anchor/"


class ProximalTerm:
    """`anchors`: the parameters w_t that the server sent, by part; other parts get no term."""

    def __init__(self, mu: float) -> None:
        self.mu = mu
        self.anchors: dict[str, list[Tensor]] = {}

    def set_anchor(self, part: str, network: nn.Module) -> None:
        """Anchor a part at its present parameters; nothing where μ = 0."""
        if self.mu:
            self.anchors[part] = [weight.detach().clone() for weight in network.parameters()]

    @torch.no_grad()
    def add_gradient(self, part: str, network: nn.Module) -> None:
        """Add μ · (w - w_t) to the gradients of a part."""
        if part not in self.anchors:
            return
        for weight, anchor in zip(network.parameters(), self.anchors[part], strict=True):
            if weight.grad is not None:
                weight.grad.add_(weight - anchor, alpha=self.mu)

    def tensors(self) -> dict[str, Tensor]:
        """The anchors by name, for `load`."""
        return numbered(self.anchors, PREFIX)

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Restore the anchors from `tensors()`; other names are ignored."""
        self.anchors = lists_of(tensors, PREFIX, device)
