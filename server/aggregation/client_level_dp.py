"""Client-level differential privacy (arXiv 1712.07557, 1710.06963).

Each hospital's update of a round (its reply minus the model that was sent) is clipped to the
Euclidean norm C; the sum of the updates gets Gaussian noise of standard deviation z C in every
number, and is divided by the number P of hospitals of the scenario (`federation.participants`). An
absent or rejected hospital, one without images, and one without privacy budget add zero: neither
the divisor nor the noise depends on who replied. So a hospital moves the sum by at most C, and one
round is one Gaussian mechanism of noise multiplier z, without sampling. Sum and noise are float64
and leave on a grid (fedgan/privacy/noise.py).

It hides a hospital's images from everybody who sees the model, but not from the server, which sees
each update before the noise; metrics.jsonl and the log name the hospitals that replied. It is
independent of `privacy.epsilon`, which hides an image or a patient from everybody, including the
server. `privacy.client_level = "client"`: the hospitals clip too.

Not covered: a round that fails because too few hospitals reply releases nothing.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedgan.config import Settings
from fedgan.privacy.accounting import Mechanism, epsilon_of
from fedgan.privacy.client_level import clipped_change
from fedgan.privacy.client_level import noise_statement as noise_statement_of
from fedgan.privacy.ledger import Ledger
from fedgan.privacy.noise import KeyStream, Purpose, release
from fedgan.run_folder import RunFolder

LEDGER = "hospital-ledger.jsonl"
KIND, UNIT = "hospitals' updates", "hospital"


def private_mean(
    settings: Settings, sent: Mapping[str, np.ndarray], models: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The model `sent` plus the noisy mean of the clipped updates to `models`, float32.

    Over `federation.participants` hospitals, of which those without a model add zero. Enter the
    release in the ledger first (`record_round`).
    """
    privacy, hospitals = settings.privacy, settings.federation.participants
    total = {key: np.zeros(sent[key].shape) for key in sorted(sent)}
    for model in models:
        for key, part in clipped_change(model, sent, privacy.client_clip).items():
            total[key] += part
    deviation = privacy.client_noise_multiplier * privacy.client_clip
    stream = KeyStream(secrets.token_bytes(32), 0, Purpose.HOSPITALS)  # one key per release
    noisy = {
        key: release(torch.from_numpy(part), stream.normal(part.shape), deviation).numpy()
        for key, part in total.items()
    }
    return {key: (sent[key] + part / hospitals).astype(np.float32) for key, part in noisy.items()}


def record_round(settings: Settings, run: RunFolder, experiment: str) -> dict[str, Any]:
    """Enter one release of the mean in the run's ledger beforehand.

    Returns the entry of the round's line: epsilon (None: infinite) at delta over all releases,
    repeated rounds included.
    """
    privacy = settings.privacy
    ledger = Ledger(run.path / LEDGER)
    step = Mechanism(privacy.client_noise_multiplier, 1.0, 1)
    ledger.reserve(
        step, 1, run=experiment, kind=KIND, unit=UNIT, delta=privacy.client_delta, data=experiment
    )
    spent = ledger.mechanisms()
    epsilon = ledger.epsilon(privacy.client_delta)
    return {
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "delta": privacy.client_delta,
        "noise_multiplier": privacy.client_noise_multiplier,
        "clip": privacy.client_clip,
        "releases": sum(part.steps for part in spent),
        "hospitals": settings.federation.participants,
    }


def noise_statement(settings: Settings, parameters: int) -> str:
    """The guarantee of the whole run and its noise on a model of so many parameters."""
    privacy, federation = settings.privacy, settings.federation
    noise = privacy.client_noise_multiplier
    epsilon = epsilon_of([Mechanism(noise, 1.0, federation.rounds)], privacy.client_delta)
    return (
        f"privacy.client_level = '{privacy.client_level}': {federation.rounds} rounds cost every "
        f"hospital epsilon = {epsilon:.3g} at delta = {privacy.client_delta:g}. "
        f"{noise_statement_of(federation.participants, noise, parameters)} "
        "For patients use privacy.epsilon."
    )
