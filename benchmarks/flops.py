"""Counts the floating-point operations of convolutions and matrix products that PyTorch really dispatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class FlopCounter(TorchDispatchMode):
    """`total`: a multiplication and an addition count as two. Everything that is no convolution or product counts as none.

    Backward and double-backward passes are counted as they are dispatched, so that lazy regularisation is in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = (
            function.overloadpacket.__name__
            if hasattr(function, "overloadpacket")
            else str(function)
        )
        self.total += flops(name, args, result)
        return result


def flops(name: str, args: Sequence[Any], result: Any) -> int:
    """Operations of one dispatched call, by its ATen name."""
    if name == "convolution":
        image, weight, transposed = args[0], args[1], args[6]
        return convolution_flops(image if transposed else result, weight)
    if name == "convolution_backward":
        gradient, image, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
        return convolution_flops(image if transposed else gradient, weight) * (
            int(wanted[0]) + int(wanted[1])
        )
    if name in ("mm", "bmm"):
        return 2 * int(args[0].numel()) * int(args[1].shape[-1])
    if name in ("addmm", "baddbmm"):
        return 2 * int(args[1].numel()) * int(args[2].shape[-1])
    return 0


def convolution_flops(places: Tensor, weight: Tensor) -> int:
    """Every place of the smaller grid meets the whole kernel once: 2 · weights · places."""
    return 2 * int(weight.numel()) * int(places.shape[0] * places.shape[2] * places.shape[3])
