"""Flower's strategy classes by name, and the state of theirs that checkpoints keep.

fedavg (arXiv 1602.05629), fedprox (1812.06127), fedavgm (1909.06335), fedadam and fedyogi
(2003.00295), fedmedian and fedtrimmedavg (1803.01498), krum and multikrum (1703.02757). All work on
one ArrayRecord with prefixed keys. `federation.weights` (server/aggregation/weights.py) scales the
hospitals' changes before; `privacy.client_level` replaces the aggregation
(server/aggregation/client_level_dp.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp.strategy import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
    Strategy,
)

from fedgan.config import Settings
from fedgan.errors import CheckpointError, ConfigError
from fedgan.runs.compatibility import KRUMS, check_compatibility
from fedgan.runs.round_state import STRATEGY_STATE
from server.aggregation.weights import apply_weights, plain_averages
from server.records import ARRAYS, CONFIG, WEIGHT, model_of, to_record

OPTIMISERS = ("fedavgm", "fedadam", "fedyogi")


def make_strategy(settings: Settings) -> FedAvg:
    """The Flower strategy of `federation.strategy`, in which every hospital joins every round."""
    check_compatibility(settings)
    return _plain_strategy(settings)


def set_expected_hospitals(strategy: FedAvg, hospitals: int) -> None:
    """Set the number of hospitals in a strategy.

    A strategy with an outdated number waits for absent hospitals, or takes the mean of all where it
    should leave some out.
    """
    strategy.min_train_nodes = strategy.min_available_nodes = hospitals
    if type(strategy) is MultiKrum:  # its base class Krum selects one
        strategy.num_nodes_to_select = hospitals - strategy.num_malicious_nodes


def aggregate(
    strategy: Strategy,
    settings: Settings,
    number: int,
    replies: Sequence[Message],
    sent: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray] | None:
    """The model of round `number` from whole models, replies to `sent`; None where it fails.

    krum and multikrum aggregate changes instead of models: Flower computes a distance as
    |x|² + |y|² - 2 xy in float32, and with mapping networks' weights of about 100, the distances of
    whole models are mostly rounding error.
    """
    apply_weights(settings, replies, sent)
    uses_changes = settings.federation.strategy in KRUMS
    if uses_changes:
        for reply in replies:
            model = model_of(reply)
            reply.content[ARRAYS] = to_record(
                {key: model[key] - array for key, array in sent.items()}
            )
    record, _ = strategy.aggregate_train(number, replies)
    if record is None:
        return None
    result = {key: np.asarray(record[key].numpy(), dtype=np.float32) for key in sorted(sent)}
    if settings.federation.strategy in OPTIMISERS:  # no optimiser on running averages
        result |= plain_averages(replies, sent)
    if isinstance(strategy, FedAvgM):  # it steps from its own copy, the others from what is sent
        strategy.current_arrays = to_record(result)
    return {key: sent[key] + array for key, array in result.items()} if uses_changes else result


def strategy_state(strategy: Strategy) -> dict[str, np.ndarray]:
    """The moments of the server's optimiser as `strategy/m/KEY` and `strategy/v/KEY`, if any."""
    moments = {"m": getattr(strategy, "m_t", None) or {}, "v": getattr(strategy, "v_t", None) or {}}
    if isinstance(strategy, FedAvgM) and strategy.momentum_vector is not None:
        moments["m"] = dict(
            zip(strategy.current_arrays or {}, strategy.momentum_vector, strict=True)
        )
    return {
        f"{STRATEGY_STATE}{moment}/{key}": np.asarray(value)
        for moment, arrays in moments.items()
        for key, value in arrays.items()
    }


def restore_strategy(strategy: Strategy, tensors: Mapping[str, np.ndarray]) -> None:
    """Restore the moments of `strategy_state` into a new strategy.

    Raises `CheckpointError` for moments that this strategy does not have.
    """
    first, second = (
        {
            key.removeprefix(prefix): tensors[key]
            for key in sorted(tensors)
            if key.startswith(prefix)
        }
        for prefix in (f"{STRATEGY_STATE}m/", f"{STRATEGY_STATE}v/")
    )
    if not first and not second:
        return
    if isinstance(strategy, FedAvgM) and not second:
        strategy.momentum_vector = list(first.values())  # by sorted name, as arrays travel
    elif hasattr(strategy, "m_t") and second:
        strategy.m_t, strategy.v_t = first, second
    else:
        raise CheckpointError(
            f"the checkpoint has moments of a server optimiser that {type(strategy).__name__} does "
            "not have: was config.toml changed?"
        )


def _plain_strategy(settings: Settings) -> FedAvg:
    federation, hospitals = settings.federation, settings.federation.participants
    common: dict[str, Any] = {
        "min_train_nodes": hospitals,
        "min_available_nodes": hospitals,
        "weighted_by_key": WEIGHT,
        "arrayrecord_key": ARRAYS,
        "configrecord_key": CONFIG,
    }
    match federation.strategy:
        case "fedavg":
            return FedAvg(**common)
        case "fedprox":
            return FedProx(**common, proximal_mu=settings.training.proximal_mu)
        case "fedavgm":
            return FedAvgM(**common, server_momentum=federation.server_momentum)
        case "fedadam":
            return FedAdam(**common, eta=federation.server_learning_rate)
        case "fedyogi":
            return FedYogi(**common, eta=federation.server_learning_rate)
        case "fedmedian":
            return FedMedian(**common)
        case "fedtrimmedavg":
            return FedTrimmedAvg(**common, beta=federation.trim)
        case "krum":
            return Krum(**common, num_malicious_nodes=federation.malicious)
        case "multikrum":  # section 4 of the paper: the mean of n - f models
            return MultiKrum(
                **common,
                num_malicious_nodes=federation.malicious,
                num_nodes_to_select=hospitals - federation.malicious,
            )
    raise ConfigError(f"federation.strategy = '{federation.strategy}' is not known")
