"""Count the floating-point operations of convolutions and matrix products in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class FlopCounter(TorchDispatchMode):
    """`total`: a multiplication and an addition count as two; other operations count as none.

    Backward and double-backward passes are counted as dispatched, lazy regularisation included.
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
        gradient, image, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
        return convolution_flops(image if transposed else gradient, weight) * (
            int(mask[0]) + int(mask[1])
        )
    if name in ("mm", "bmm"):
        return 2 * int(args[0].numel()) * int(args[1].shape[-1])
    if name in ("addmm", "baddbmm"):
        return 2 * int(args[1].numel()) * int(args[2].shape[-1])
    return 0


def convolution_flops(pixels: Tensor, weight: Tensor) -> int:
    """Every pixel of the smaller map meets the whole kernel once: 2 · weights · pixels."""
    return 2 * int(weight.numel()) * int(pixels.shape[0] * pixels.shape[2] * pixels.shape[3])
