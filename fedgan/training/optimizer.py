"""Adam as StyleGAN2 uses it, its state as named tensors, and FedProx's pull."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedgan.training.losses import lazy_adam

BETAS = (0.0, 0.99)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def adam(network: nn.Module, learning_rate: float, lazy_interval: int) -> torch.optim.Adam:
    """Adam(0, 0.99) over a network, corrected for a regulariser every `lazy_interval` steps (0: none)."""
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
    """Put back what `optimizer_tensors` gave."""
    optimizer.state.clear()
    for name, parameter in network.named_parameters():
        if f"{prefix}{name}/step" not in tensors:
            continue
        step, average, square = (tensors[f"{prefix}{name}/{moment}"] for moment in MOMENTS)
        optimizer.state[parameter] = {
            "step": step.to(parameter.device, torch.float32).reshape(()).clone(),
            # Laid out in memory as the parameter is, which the fused step asks for.
            "exp_avg": torch.empty_like(parameter).copy_(average),
            "exp_avg_sq": torch.empty_like(parameter).copy_(square),
        }


@torch.no_grad()
def pull_towards(optimizer: torch.optim.Optimizer, anchor: Sequence[Tensor], mu: float) -> None:
    """Add the gradient mu · (w - anchor) of FedProx's proximal term (arXiv 1812.06127, eq. 2)."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, target in zip(parameters, anchor, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter - target, alpha=mu)
