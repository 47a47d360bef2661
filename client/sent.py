"""What a hospital tells of a round beside its model, and how much its model may move.

The lists below name all numbers of a training that may leave, so a figure that the Trainer learns to measure tomorrow stays
at home until somebody thinks about it. With `privacy` nothing measured on real images leaves without noise.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, Context, Message
from flwr.clientapp.mod import fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable

from fedgan.config import Settings

CLIP = "clipping_norm"  # Flower's key: the server's wrapper sends it
# Known to all before the training, or computed from noisy releases alone. loss_g, d_accuracy and path_length are G's, from
# its own images and the noisy D; r_t is there only with the noise of privacy.r_t_noise, p is fixed or follows that r_t.
PRIVATE = (
    "images",
    "loss_g",
    "d_accuracy",
    "path_length",
    "p",
    "r_t",
    "epsilon",
    "delta",
    "noise_multiplier",
    "sample_rate",
)
# A hospital that is hidden whole tells of its training what its settings and its ledger already say.
HIDDEN = ("images", "epsilon", "delta", "noise_multiplier", "sample_rate")

# Measured on real images, or on this machine.
OPEN = (*PRIVATE, "loss_d", "r1", "seconds", "core_seconds", "peak_memory_bytes")


def allowed_metrics(settings: Settings) -> tuple[str, ...]:
    """The names of a round's means that may leave under these settings.

    Times and memory go with the number of images in each Poisson sample, which the accountant takes to be secret, so they
    stay at home with privacy.
    """
    if settings.privacy.client_level != "none":
        return HIDDEN
    if not settings.privacy.on:
        return OPEN
    return tuple(name for name in PRIVATE if name != "r_t" or settings.privacy.r_t_noise)


def reported_metrics(
    settings: Settings, means: Mapping[str, float], peak_memory_bytes: int
) -> dict[str, float]:
    """The facts of a round that travel: those of its means that may be told."""
    measured = {**means, "peak_memory_bytes": peak_memory_bytes}
    return {key: float(measured[key]) for key in allowed_metrics(settings) if key in measured}


def clip_update(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower's clipping of what this hospital changed, where the server's strategy asks for it, else nothing.

    An answer that changed nothing stays as it is: Flower would divide by the length of the change.
    """
    asked = any(CLIP in config for config in message.content.config_records.values())
    before = {
        key: array.numpy()
        for sent in message.content.array_records.values()
        for key, array in sent.items()
    }
    answer = call_next(message, context)
    if (
        not asked
        or answer.has_error()
        or not _changed(before, next(iter(answer.content.array_records.values())))
    ):
        return answer
    return fixedclipping_mod(message, context, lambda *_: answer)


def _changed(before: Mapping[str, np.ndarray], after: Mapping[str, Array]) -> bool:
    return any(
        not np.array_equal(before.get(key, np.nan), array.numpy()) for key, array in after.items()
    )
