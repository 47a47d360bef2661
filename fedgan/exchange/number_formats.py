"""How the arrays of a model travel: as float32, or rounded to 16 bits, and whole or as what a round has changed.

The server's model M is float32 and stays so (the master). With u the rounding to the wire's numbers, one round is

    down    S = u(M)          what every hospital receives, and trains from to X_i
    up      A_i = u(X_i - S)  with `delta`, the difference taken in float32;   A_i = u(X_i)  without
    server  Y_i = M + A_i     with `delta`;                                    Y_i = A_i + (M - S)  without
    then    M' = aggregate(Y_1 … Y_n), by a strategy that was told that it sent M

M, not S, is what updates are added to. So what rounding took away on the way down (the residual M - S, which float32 holds
exactly) stays in the master and is never lost: a hospital that changed nothing gives Y_i = M, and M does not drift, however
many rounds. An update that is smaller than the gap between two numbers of the wire moves M all the same, and S follows once
enough have come together. It is what training with 16-bit weights and float32 master weights does (arXiv 1710.03740), with
gradients that are taken at S.

Why that is right for every strategy. Y_i = X_i + (M - S) + (rounding on the way up), the same shift for all hospitals:

* a mean, a median, a trimmed mean, each number for itself, and krum, which looks at distances between models alone,
  give the aggregate of the X_i, shifted by M - S too: M + aggregate(X_i - S);
* fedadam and fedyogi step along mean(Y_i) - M = mean(X_i - S), which is what the hospitals changed;
* clipping at the server (`privacy.client_level = "server"`) measures Y_i - M, again what the hospital changed.

What rounding takes away on the way up is lost: with `delta` a share of each change (at most 2^-11 of it with fp16, 2^-8 with
bf16; fp16 knows no step below 2^-24), without it whole changes, those below half a gap of the weight itself (2^-11 or 2^-8
of its size). So 16 bits go with `delta`: the mean over hospitals is then off by that share of the mean size of the changes
at most.

fp16 ends at 65504: a number beyond it is an error. bf16 has float32's range; it travels as its bits in uint16, because
Flower's arrays know no bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fedgan.errors import FederationError

Arrays = dict[str, np.ndarray]
DTYPES: dict[str, np.dtype] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
}


def pack(arrays: Mapping[str, np.ndarray], wire: str) -> Arrays:
    """float32 arrays → arrays of the wire's dtype and the same shapes, rounded to nearest; as they are with 'fp32'.

    Raises `FederationError`, which names the array, for a number that is not finite or that 16 bits cannot hold.
    """
    return (
        dict(arrays)
        if wire == "fp32"
        else {key: _round(key, array, wire) for key, array in arrays.items()}
    )


def unpack(arrays: Mapping[str, np.ndarray], wire: str) -> Arrays:
    """What `pack` made → float32, exactly. Raises `FederationError` for an array of another dtype than the wire's."""
    for key, array in arrays.items():
        if array.dtype != DTYPES[wire]:
            raise FederationError(
                f"'{key}' came as {array.dtype}, and federation.wire = '{wire}' travels as {DTYPES[wire]}"
            )
    return {key: widen(array, wire) for key, array in arrays.items()}


def widen(array: np.ndarray, wire: str) -> np.ndarray:
    """One array off the wire as float32 of the same values."""
    if wire == "bf16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32, copy=False)


def answer(
    after: Mapping[str, np.ndarray], received: Mapping[str, np.ndarray], wire: str, delta: bool
) -> Arrays:
    """A_i: what a hospital sends that received S (`received`, float32) and has trained it to X (`after`)."""
    return pack(
        {key: array - received[key] for key, array in after.items()} if delta else after, wire
    )


def restore(
    answer: Mapping[str, np.ndarray],
    master: Mapping[str, np.ndarray],
    received: Mapping[str, np.ndarray],
    wire: str,
    delta: bool,
) -> Arrays:
    """Y_i: the model, float32, that an answer A stands for. `received`: S, what the hospital was sent, off the wire.

    With wire 'fp32' and without `delta` it is the answer itself, to the bit.
    """
    arrived = unpack(answer, wire)
    if delta:
        return {key: master[key] + array for key, array in arrived.items()}
    return (
        arrived
        if wire == "fp32"
        else {key: array + (master[key] - received[key]) for key, array in arrived.items()}
    )


def _round(key: str, array: np.ndarray, wire: str) -> np.ndarray:
    if not np.isfinite(array).all():
        raise FederationError(
            f"'{key}' is not finite: the training diverged; lower training.learning_rate"
        )
    if wire == "fp16":
        with np.errstate(over="ignore"):
            packed = array.astype(np.float16)
    else:
        packed = (
            torch.from_numpy(np.ascontiguousarray(array))
            .to(torch.bfloat16)
            .view(torch.int16)
            .numpy()
            .view(np.uint16)
        )
    if not np.isfinite(widen(packed, wire)).all():
        others = "'bf16' or 'fp32'" if wire == "fp16" else "'fp32'"
        raise FederationError(
            f"'{key}' holds a number beyond what {wire} can: set federation.wire = {others}"
        )
    return packed.reshape(array.shape)
