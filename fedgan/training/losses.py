"""Losses and regularisers of StyleGAN2 as functions of tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss, mean of -log sigmoid(D(G(z))) (arXiv 1406.2661, section 3)."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """Mean of -log sigmoid(D(x)) - log(1 - sigmoid(D(G(z)))) (arXiv 1406.2661, eq. 1)."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()


def r1_penalty(real_logits: Tensor, images: Tensor) -> Tensor:
    """Squared norm of dD(x)/dx per image (B,), before the factor γ/2 (arXiv 1801.04406, eq. 9).

    `images` (B, C, H, W) must require gradients and be what D saw: after augmentation.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3))


def path_lengths(images: Tensor, ws: Tensor, noise: Tensor) -> Tensor:
    """|Jᵀy| per image (B,): y = `noise` / √(H·W), J = d images / d ws (arXiv 1912.04958, eq. 4).

    `images` (B, C, H, W) made from `ws` (B, L, w_dim); the square is averaged over the L layers.
    """
    y = noise / math.sqrt(images.shape[2] * images.shape[3])
    (gradient,) = torch.autograd.grad((images * y).sum(), ws, create_graph=True)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()


def lazy_adam(
    learning_rate: float, betas: tuple[float, float], interval: int
) -> tuple[float, tuple[float, float]]:
    """Adam's settings for a regulariser that takes a step of its own every `interval` steps.

    With c = k / (k + 1): learning rate · c and β to the power c, so that the k + 1 steps of an
    interval move and decay as k steps do (arXiv 1912.04958, appendix B, "lazy regularization").
    """
    c = interval / (interval + 1)
    return learning_rate * c, (betas[0] ** c, betas[1] ** c)


def default_r1_gamma(resolution: int, batch_size: int) -> float:
    """γ = 0.0002 · pixels / batch (arXiv 2006.06676, appendix C)."""
    return 0.0002 * resolution**2 / batch_size
