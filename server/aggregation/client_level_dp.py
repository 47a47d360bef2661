"""Differential privacy of whole hospitals, by Flower's own wrappers (arXiv 1712.07557, 1710.06963).

Each hospital's update of a round (what it answers less what it was sent) is clipped to the Euclidean norm C, the updates
are averaged with equal weights, and every number of the mean gets Gaussian noise of standard deviation z C / n. Where a
hospital's update is replaced by none, the mean moves by C / n at most: one round is one Gaussian mechanism of noise
multiplier z, without sampling, because every hospital takes part. It hides that hospital from all who see the model and
metrics.jsonl, not from the server, which sees each update before the noise. It is independent of `privacy.epsilon`,
which hides an image or a patient from everybody, the server included.

What Flower's code asks of its callers, and who sees to it here: arrays without a dimension would escape the clip
(`Trainer.get_parameters` gives none, `even` refuses them); arrays are paired by place and not by name (`even` sorts them);
FedAvg's weights would raise one hospital's reach above C / n (`even` gives all the same); an update of nothing divides by
zero (who showed no image is not counted); noise is for as many hospitals as were told (server/aggregation/strategies.py:expect).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import Message, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)

from fedgan.config import Settings
from fedgan.errors import FederationError
from fedgan.privacy.accounting import Mechanism, epsilon_of
from fedgan.privacy.client_level import noise_statement as noise_statement_of
from fedgan.privacy.ledger import Ledger
from fedgan.run_folder import RunFolder
from server.records import ARRAYS, METRICS, WEIGHT, to_record

LEDGER = "hospital-ledger.jsonl"
KIND, UNIT = "hospitals' updates", "hospital"


def wrap(strategy: FedAvg, settings: Settings) -> Strategy:
    """The strategy in the wrapper that `privacy.client_level` names; as it is where that is 'none'."""
    privacy, hospitals = settings.privacy, settings.federation.participants
    match privacy.client_level:
        case "server":
            kind: type[Any] = DifferentialPrivacyServerSideFixedClipping
        case "client":
            kind = DifferentialPrivacyClientSideFixedClipping
        case _:
            return strategy
    wrapped: Strategy = kind(
        strategy, privacy.client_noise_multiplier, privacy.client_clip, hospitals
    )
    return wrapped


def equalize_weights(replies: Sequence[Message]) -> list[Message]:
    """The replies as the wrapper needs them: arrays in the order of their names, none without a dimension, equal weights."""
    for reply in replies:
        arrays = {key: array.numpy() for key, array in reply.content.array_records[ARRAYS].items()}
        if flat := [key for key, array in arrays.items() if array.ndim == 0]:
            raise FederationError(
                f"'{flat[0]}' has no dimension and would escape Flower's clipping: send it with the shape (1,)"
            )
        reply.content[ARRAYS] = to_record(arrays)
        reply.content[METRICS] = MetricRecord({WEIGHT: 1})
    # Flower draws the noise from numpy's global generator: nobody may have seeded it before.
    np.random.seed()
    return list(replies)


def record_round(
    settings: Settings, run: RunFolder, experiment: str, hospitals: int
) -> dict[str, Any]:
    """Enter one release of the mean over `hospitals` updates in the run's own ledger, before it happens.

    → what the round's line tells: epsilon (None: infinite) at delta over all releases, those of rounds that were done
    again included.
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
        "hospitals": hospitals,
    }


def noise_statement(settings: Settings, numbers: int) -> str:
    """What the guarantee of this run is worth, said once. `numbers`: how many numbers travel."""
    privacy, hospitals, rounds = (
        settings.privacy,
        settings.federation.participants,
        settings.federation.rounds,
    )
    noise = privacy.client_noise_multiplier
    epsilon = epsilon_of([Mechanism(noise, 1.0, rounds)], privacy.client_delta)
    return (
        f"privacy.client_level = '{privacy.client_level}': {rounds} rounds cost every hospital epsilon = {epsilon:.3g} at delta = "
        f"{privacy.client_delta:g}. {noise_statement_of(hospitals, noise, numbers)} For patients use privacy.epsilon."
    )
