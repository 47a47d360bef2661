"""Per-pair gradients from one forward and one backward pass over the whole batch.

Where layers multiply by weights (`conv2d`, `linear`), every pair gets its own copy of the weights;
the backward pass then leaves one gradient per pair instead of their sum. The rest, from a parameter
to its scaled weights, is differentiated pair by pair. The cost is that of a plain step and a little
more for the weights' gradients; `torch.func.vmap` gives the same numbers through grouped
convolutions, which are slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.overrides import TorchFunctionMode

from fedgan.errors import FedganError

SMALL_MAP = 256  # output pixels up to which a product of windows is faster than convolutions


class PerPair(TorchFunctionMode):
    """While active, `conv2d` and `linear` use separate, equal weights for each of `pairs` pairs.

    Row r of every batch belongs to pair r modulo `pairs`. `gradients(loss, parameters)` then
    returns the contribution of each pair. Layers must keep rows independent (`check_modules` in
    fedgan/privacy/validator.py): else a gradient is not that of one pair.
    """

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.pairs = pairs
        self._weights: list[Tensor] = []  # as the layers computed them from parameters
        self._copies: list[Tensor] = []  # (pairs, ...) of each, expanded without memory

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.linear and args[1].requires_grad:
            return self._linear(*args, **kwargs)
        if func is F.conv2d and args[1].requires_grad:
            return self._conv(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _Linear.apply(x, self._copy(weight), None if bias is None else self._copy(bias))

    def _conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int = 1,
        padding: int = 0,
        **others: Any,
    ) -> Tensor:
        if others:
            raise FedganError(
                f"no per-image gradient is implemented for a convolution with {', '.join(others)}"
            )
        copy = None if bias is None else self._copy(bias)
        return _Conv.apply(x, self._copy(weight), copy, _one(stride), _one(padding))

    def _copy(self, weight: Tensor) -> Tensor:
        copy = weight.detach().expand(self.pairs, *weight.shape).requires_grad_(True)
        self._weights.append(weight)
        self._copies.append(copy)
        return copy

    def gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """(pairs, ...) per parameter: the gradient of each pair's part of `loss`, a sum over pairs.

        Raises `FedganError` for a parameter that is not the weight or bias of a convolution or
        linear layer.
        """
        found = torch.autograd.grad(loss, [*self._copies, *parameters], allow_unused=True)
        if any(part is not None for part in found[len(self._copies) :]):
            raise FedganError(
                "a parameter of D is in no convolution or linear layer: no per-image gradient"
            )
        used = [
            (weight, part)
            for weight, part in zip(self._weights, found, strict=False)
            if part is not None
        ]
        chained = torch.autograd.grad(
            [weight for weight, _ in used],
            parameters,
            [part for _, part in used],
            allow_unused=True,
            is_grads_batched=True,
        )
        return [
            parameter.new_zeros(self.pairs, *parameter.shape) if part is None else part
            for parameter, part in zip(parameters, chained, strict=True)
        ]


class _Linear(Function):
    """x (N, in), weight (P, out, in), bias (P, out) → (N, out). Can be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight[0], None if bias is None else bias[0])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        pairs, (needs_x, needs_weight, needs_bias) = len(weight), ctx.needs_input_grad
        dx = _Linear.apply(slope, weight.transpose(1, 2), None) if needs_x else None
        dw = (
            torch.einsum("mpo,mpi->poi", _by_pair(slope, pairs), _by_pair(x, pairs))
            if needs_weight
            else None
        )
        return dx, dw, _by_pair(slope, pairs).sum(dim=0) if needs_bias else None


class _Conv(Function):
    """x (N, in, H, W), weight (P, out, in, k, k), bias (P, out) → (N, out, h, w)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight[0], None if bias is None else bias[0], stride, padding)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx = _ConvBack.apply(slope, weight, x.shape, ctx.stride, ctx.padding) if needs_x else None
        dw = _weight_gradients(x, slope, weight, ctx.stride, ctx.padding) if needs_weight else None
        db = _by_pair(slope.sum(dim=(2, 3)), len(weight)).sum(dim=0) if needs_bias else None
        return dx, dw, db, None, None


class _ConvBack(Function):
    """Transpose of `_Conv`: gradient of its output (N, out, h, w) → of its input (`shape`)."""

    @staticmethod
    def forward(
        ctx: Any, slope: Tensor, weight: Tensor, shape: torch.Size, stride: int, padding: int
    ) -> Tensor:
        ctx.save_for_backward(slope, weight)
        ctx.stride, ctx.padding = stride, padding
        return conv2d_input(shape, weight[0], slope, stride, padding)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Any:
        slope, weight = ctx.saved_tensors
        needs_slope, needs_weight, *_ = ctx.needs_input_grad
        dslope = _Conv.apply(x, weight, None, ctx.stride, ctx.padding) if needs_slope else None
        dw = _weight_gradients(x, slope, weight, ctx.stride, ctx.padding) if needs_weight else None
        return dslope, dw, None, None, None


@torch.no_grad()
def _weight_gradients(
    x: Tensor, slope: Tensor, weight: Tensor, stride: int, padding: int
) -> Tensor:
    """(P, out, in, k, k) in `channels_last`: gradient of a convolution's weights per pair.

    x (N, in, H, W): its input; slope (N, out, h, w): the gradient of its output.
    """
    pairs, outputs, inputs, k, _ = weight.shape
    found = torch.empty(pairs, outputs, k, k, inputs, dtype=x.dtype, device=x.device)
    x, slope = (t.contiguous(memory_format=torch.channels_last) for t in (x, slope))
    if x.device.type == "cpu" and stride == 1 and slope[0, 0].numel() > SMALL_MAP:
        for pair in range(pairs):
            found[pair] = conv2d_weight(
                x[pair::pairs], weight.shape[1:], slope[pair::pairs], stride, padding
            ).permute(0, 2, 3, 1)
        return found.permute(0, 1, 4, 2, 3)
    # The slopes (out, pixels) times the windows of the output pixels (pixels, k · k · in).
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
    rows, down, right, channel = padded.stride()
    windows = padded.as_strided(
        (len(x), *slope.shape[2:], k, k, inputs),
        (rows, down * stride, right * stride, down, right, channel),
    )
    slope = slope.permute(0, 2, 3, 1)
    size = 1 if x.device.type == "cpu" else pairs  # windows of one pair fit into a CPU's cache
    for start in range(0, pairs, size):
        group = range(start, start + size)
        inside = torch.stack([windows[pair::pairs].reshape(-1, k * k * inputs) for pair in group])
        outside = torch.stack([slope[pair::pairs].reshape(-1, outputs) for pair in group])
        torch.bmm(
            outside.transpose(1, 2),
            inside,
            out=found[start : start + size].view(size, outputs, -1),
        )
    return found.permute(0, 1, 4, 2, 3)


def _by_pair(x: Tensor, pairs: int) -> Tensor:
    """(m · P, n) → (m, P, n)."""
    return x.reshape(-1, pairs, x.shape[-1])


def _one(size: int | Sequence[int]) -> int:
    """A stride or padding as one number."""
    return size if isinstance(size, int) else size[0]
