"""Adam as StyleGAN2 uses it, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedgan.training.losses import lazy_adam

BETAS = (0.0, 0.99)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def adam(network: nn.Module, learning_rate: float, lazy_interval: int) -> torch.optim.Adam:
    """Adam(0, 0.99), corrected for a regulariser every `lazy_interval` steps (0: none)."""
    betas = BETAS
    if lazy_interval:
        learning_rate, betas = lazy_adam(learning_rate, betas, lazy_interval)
    return torch.optim.Adam(
        network.parameters(), lr=learning_rate, betas=betas, eps=1e-8, fused=True
    )


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, network: nn.Module, prefix: str
) -> dict[str, Tensor]:
    """Adam's state by parameter name; empty before the first step."""
    return {
        f"{prefix}{name}/{moment}": optimizer.state[parameter][moment]
        for name, parameter in network.named_parameters()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, network: nn.Module, tensors: Mapping[str, Tensor], prefix: str
) -> None:
    """Restore what `optimizer_tensors` returned."""
    optimizer.state.clear()
    for name, parameter in network.named_parameters():
        if f"{prefix}{name}/step" not in tensors:
            continue
        step, average, square = (tensors[f"{prefix}{name}/{moment}"] for moment in MOMENTS)
        optimizer.state[parameter] = {
            "step": step.to(parameter.device, torch.float32).reshape(()).clone(),
            # The fused step needs the memory layout of the parameter.
            "exp_avg": torch.empty_like(parameter).copy_(average),
            "exp_avg_sq": torch.empty_like(parameter).copy_(square),
        }
