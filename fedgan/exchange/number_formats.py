"""Number formats of the arrays that travel: float32 or 16 bits, whole weights or their change in a
round.

The server's model M stays float32 (the master weights). With u the rounding to the travelling
format, one round is

    down    S = u(M)          every hospital receives S and trains it to X_i
    up      A_i = u(X_i - S)  with `delta`, in float32;  A_i = u(X_i)         without
    server  Y_i = M + A_i     with `delta`;              Y_i = A_i + (M - S)  without
    then    M' = aggregate(Y_1 … Y_n), by a strategy that treats M as the model that was sent

Updates are added to M, not to S. The residual M - S of the rounding on the way down, which float32
holds exactly, stays in the master: a hospital that changes nothing gives Y_i = M, and M does not
drift over any number of rounds. An update smaller than the gap between two 16-bit numbers still
moves M, and S follows once enough of them add up. This is training with 16-bit weights and float32
master weights (arXiv 1710.03740), with gradients taken at S.

This is correct for every strategy, because Y_i = X_i + (M - S) + (rounding on the way up): all
hospitals are shifted alike.

* Mean, median, trimmed mean (number by number) and krum (distances between models) give the
  aggregate of the X_i with the same shift: M + aggregate(X_i - S).
* fedadam and fedyogi step along mean(Y_i) - M = mean(X_i - S), the change of the hospitals.
* Clipping at the server (`privacy.client_level = "server"`) measures Y_i - M, again the change of
  the hospital.

Rounding on the way up loses information. With `delta` it is a share of each change, at most 2^-11
with fp16 and 2^-8 with bf16 (fp16 has no step below 2^-24). Without `delta` it is every change
below half a gap of the weight itself (2^-11 or 2^-8 of its size). Use 16 bits with `delta`: the
mean over hospitals is then off by at most that share of the mean change.

fp16 ends at 65504: a larger number is an error. bf16 has float32's range; it travels as its bits in
uint16, because Flower's arrays have no bfloat16.
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
    """Round float32 arrays to nearest in the format `wire`, same shapes; 'fp32' returns them
    unchanged.

    Raises `FederationError` with the array's name for a number that is not finite or does not fit
    into 16 bits.
    """
    return (
        dict(arrays)
        if wire == "fp32"
        else {key: _round(key, array, wire) for key, array in arrays.items()}
    )


def unpack(arrays: Mapping[str, np.ndarray], wire: str) -> Arrays:
    """Arrays of `pack` → float32, exactly. Raises `FederationError` for another dtype."""
    for key, array in arrays.items():
        if array.dtype != DTYPES[wire]:
            raise FederationError(
                f"'{key}' arrived as {array.dtype}, "
                f"but federation.wire = '{wire}' sends {DTYPES[wire]}"
            )
    return {key: widen(array, wire) for key, array in arrays.items()}


def widen(array: np.ndarray, wire: str) -> np.ndarray:
    """One array in the format `wire` → float32 of the same values."""
    if wire == "bf16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32, copy=False)


def make_update(
    after: Mapping[str, np.ndarray], received: Mapping[str, np.ndarray], wire: str, delta: bool
) -> Arrays:
    """A_i: the update of a hospital that trained S (`received`, float32) to X_i (`after`)."""
    return pack(
        {key: array - received[key] for key, array in after.items()} if delta else after, wire
    )


def restore(
    update: Mapping[str, np.ndarray],
    master: Mapping[str, np.ndarray],
    received: Mapping[str, np.ndarray],
    wire: str,
    delta: bool,
) -> Arrays:
    """Y_i: the float32 model of an update A_i. `received`: S, the model that was sent, after
    `unpack`.

    With 'fp32' and without `delta` this is the update itself, bit for bit.
    """
    arrived = unpack(update, wire)
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
        wider = "'bf16' or 'fp32'" if wire == "fp16" else "'fp32'"
        raise FederationError(
            f"'{key}' holds a number beyond the range of {wire}: set federation.wire = {wider}"
        )
    return packed.reshape(array.shape)
