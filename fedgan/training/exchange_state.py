"""Exchange of parameters with the server, and what a hospital keeps of it between rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgan.config import Settings
from fedgan.errors import CheckpointError
from fedgan.training.checkpoint import load_into, with_prefix
from fedgan.training.control_variates import ControlVariates
from fedgan.training.proximal import ProximalTerm
from fedgan.training.step import TrainingStep


class ExchangeState:
    """Parts that travel, anchors of the proximal term and control variates of one hospital.

    `parts`: networks by the names of `federation.exchange`.
    """

    def __init__(
        self,
        settings: Settings,
        parts: dict[str, Any],
        step: TrainingStep,
        proximal: ProximalTerm,
    ) -> None:
        self.parts, self.step, self.proximal = parts, step, proximal
        self.uses_control_variates = settings.federation.control_variates
        self.control_variates = ControlVariates()

    def get_parameters(self, parts: Iterable[str]) -> dict[str, np.ndarray]:
        """Copies of parts: `part/name` → float32 array of at least one dimension, sorted by name.

        Constants (filters, noise images) do not travel.
        """
        arrays = {
            f"{part}/{name}": tensor.detach().cpu().numpy().copy()
            for part in parts
            for name, tensor in self.parts[part].state_dict().items()
        }
        return {
            name: np.ascontiguousarray(arrays[name], dtype=np.float32) for name in sorted(arrays)
        }

    def load_parameters(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Load the parts in `arrays`; other parts stay as they are.

        Raises `CheckpointError` for names or shapes of another model; then nothing changes.
        """
        tensors = {
            name: torch.from_numpy(np.array(array, dtype=np.float32))
            for name, array in arrays.items()
        }
        if unknown := [name for name in tensors if name.split("/")[0] not in self.parts]:
            raise CheckpointError(f"the received model has an unknown part '{unknown[0]}'")
        received = {
            part: weights for part in self.parts if (weights := with_prefix(tensors, f"{part}/"))
        }
        for part, weights in received.items():
            load_into(self.parts[part], weights, f"the received {part}", check_only=True)
        for part, weights in received.items():
            network = self.parts[part]
            before = [weight.detach().clone() for weight in network.parameters()]
            load_into(network, weights, f"the received {part}")
            if part == "ema":
                continue
            self.step.parameters_loaded(part, before)
            self.proximal.set_anchor(part, network)
            if self.uses_control_variates:
                self.control_variates.update(part, before, network)

    def apply_corrections(self, steps: int) -> None:
        """Add one step's share of the control variates, of a round of `steps` steps."""
        self.control_variates.apply(self.parts, 1 / steps)

    def tensors(self) -> dict[str, Tensor]:
        """Anchors and corrections by name, for `load`."""
        return self.proximal.tensors() | self.control_variates.tensors()

    def load(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Restore anchors, and corrections where `federation.control_variates` is on."""
        self.proximal.load(tensors, device)
        if self.uses_control_variates:
            self.control_variates.load(tensors, device)
