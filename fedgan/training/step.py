"""The training step of a generator family: what the Trainer needs of it.

A family's step lives in fedgan/training/FAMILY_step.py as `STEP`. It owns the networks, the
optimisers, the phases of a step and their state. The Trainer owns data, budget, randomness, the
generator's average, checkpoints and the exchange.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from fedgan.config import Settings
from fedgan.privacy.step import PrivateStep
from fedgan.training.batches import Batches, Streams
from fedgan.training.proximal import ProximalTerm

Measured = dict[str, list[Tensor]]  # by metric name, one scalar per measurement


class TrainingStep(Protocol):
    """One step on one batch of real images.

    `networks`: by part name; 'generator' always. Parts that `federation.exchange` does not know
    stay local. `images_per_update`: real images shown per update of the generator. `state_keys`:
    plain values that `load_state_dict` needs.
    """

    networks: dict[str, Any]
    images_per_update: int
    state_keys: tuple[str, ...]

    def run(self, measured: Measured) -> bool:
        """Show one batch; return whether the generator was updated."""

    def metrics(self) -> dict[str, float]:
        """State that a round reports, beside the means of what was measured."""

    def restore_progress(self, images_seen: int, p: float | None) -> None:
        """Continue a schedule after `images_seen` images, with augmentation strength `p`."""

    def parameters_loaded(self, part: str, before: Sequence[Tensor]) -> None:
        """React to new parameters in `part`; `before`: the parameters until then."""

    def reset_averages(self) -> None:
        """Restart averages that the step keeps from the present networks."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """(tensors, plain values) that the next step depends on, without the networks."""

    def load_state_dict(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def build_step(
    settings: Settings,
    batches: Batches,
    streams: Streams,
    proximal: ProximalTerm,
    private: PrivateStep | None,
) -> TrainingStep:
    """The step of `model.family`."""
    module = import_module(f"fedgan.training.{settings.model.family}_step")
    step: TrainingStep = module.STEP(settings, batches, streams, proximal, private)
    return step
