"""Client-level differential privacy by Flower's wrappers (arXiv 1712.07557, 1710.06963).

Each hospital's update of a round (its reply minus the model that was sent) is clipped to the
Euclidean norm C, the updates are averaged with equal weights, and every number of the mean gets
Gaussian noise of standard deviation z C / n. Replacing one hospital's update by zero moves the mean
by at most C / n, so one round is one Gaussian mechanism of noise multiplier z, without sampling, as
every hospital takes part. It hides a hospital from everybody who sees the model and metrics.jsonl,
but not from the server, which sees each update before the noise. It is independent of
`privacy.epsilon`, which hides an image or a patient from everybody, including the server.

Preconditions of Flower's code, and where they are met: arrays without a dimension would escape the
clipping (`Trainer.get_parameters` has none, `equalize_weights` refuses them); arrays are paired by
position, not by name (`equalize_weights` sorts them); FedAvg's weights would raise one hospital's
influence above C / n (`equalize_weights` makes them equal); an update of zero divides by zero
(hospitals without images are left out); the noise depends on the expected number of hospitals
(server/aggregation/strategies.py:set_expected_hospitals).
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
from server.records import ARRAYS, METRICS, WEIGHT, model_of, to_record

LEDGER = "hospital-ledger.jsonl"
KIND, UNIT = "hospitals' updates", "hospital"


def with_client_level_dp(strategy: FedAvg, settings: Settings) -> Strategy:
    """The strategy in the wrapper of `privacy.client_level`; unchanged where that is 'none'."""
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
    """The replies with equal weights and arrays sorted by name, as the wrapper needs them.

    Raises `FederationError` for an array without a dimension.
    """
    for reply in replies:
        arrays = model_of(reply)
        if scalars := [key for key, array in arrays.items() if array.ndim == 0]:
            raise FederationError(
                f"'{scalars[0]}' has no dimension and would escape Flower's clipping: "
                "send it with the shape (1,)"
            )
        reply.content[ARRAYS] = to_record(arrays)
        reply.content[METRICS] = MetricRecord({WEIGHT: 1})
    # Flower draws the noise from numpy's global generator, which must not have a known seed
    np.random.seed()
    return list(replies)


def record_round(
    settings: Settings, run: RunFolder, experiment: str, hospitals: int
) -> dict[str, Any]:
    """Enter one release of the mean over `hospitals` updates in the run's ledger beforehand.

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
        "hospitals": hospitals,
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
