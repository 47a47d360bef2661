"""Flower's own strategy classes, chosen by name, and what of them must survive a restart.

fedavg (arXiv 1602.05629), fedprox (1812.06127), fedavgm (1909.06335), fedadam and fedyogi (2003.00295), fedmedian and
fedtrimmedavg (1803.01498), krum and multikrum (1703.02757). All work on one ArrayRecord with prefixed keys; how far each
hospital's change counts is `federation.weights` (server/aggregation/weights.py).
`privacy.client_level` wraps them in Flower's differential privacy of hospitals (server/aggregation/client_level_dp.py).
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
from server.aggregation.client_level_dp import wrap
from server.aggregation.weights import plain_averages, weigh
from server.records import ARRAYS, CONFIG, WEIGHT, to_record

OPTIMISERS = ("fedavgm", "fedadam", "fedyogi")


def expect(strategy: Strategy, hospitals: int) -> None:
    """Tell a strategy how many hospitals there are now.

    Else it waits for those that have left, or adds too little noise, or takes the mean of all where it was to leave some out.
    """
    inner = getattr(strategy, "strategy", strategy)
    inner.min_train_nodes = inner.min_available_nodes = hospitals
    if type(inner) is MultiKrum:  # Krum is one too, and takes one
        inner.num_nodes_to_select = hospitals - inner.num_malicious_nodes
    if inner is not strategy:
        strategy.num_sampled_clients = hospitals


def make_strategy(settings: Settings) -> Strategy:
    """The Flower strategy that `settings.federation.strategy` names; every hospital takes part in every round."""
    check_compatibility(settings)
    return wrap(_plain(settings), settings)


def _plain(settings: Settings) -> FedAvg:
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
        case "multikrum":  # section 4 of the paper: the mean of the models that could all be honest
            return MultiKrum(
                **common,
                num_malicious_nodes=federation.malicious,
                num_nodes_to_select=hospitals - federation.malicious,
            )
    raise ConfigError(f"federation.strategy = '{federation.strategy}' is not known")


def aggregate(
    strategy: Strategy,
    settings: Settings,
    number: int,
    replies: Sequence[Message],
    sent: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray] | None:
    """The model that the strategy makes of whole models, answers to `sent`, in round `number`; None where it makes none.

    krum and multikrum get what was changed instead. Flower takes a distance as |x|² + |y|² - 2 xy in float32, and the mapping
    networks' weights are about 100: of whole models, what is left of a round's change is rounding, and anybody may be chosen.
    """
    weigh(settings, replies, sent)
    by_distance = settings.federation.strategy in KRUMS
    if by_distance:
        for reply in replies:
            answered = reply.content.array_records[ARRAYS]
            reply.content[ARRAYS] = to_record(
                {key: answered[key].numpy() - array for key, array in sent.items()}
            )
    record, _ = strategy.aggregate_train(number, replies)
    if record is None:
        return None
    made = {key: np.asarray(record[key].numpy(), dtype=np.float32) for key in sorted(sent)}
    if settings.federation.strategy in OPTIMISERS:  # no momentum on what is an average already
        made |= plain_averages(replies, sent)
    if isinstance(
        strategy, FedAvgM
    ):  # it steps from what it remembers, the others from what is sent
        strategy.current_arrays = to_record(made)
    return {key: sent[key] + array for key, array in made.items()} if by_distance else made


def strategy_state(strategy: Strategy) -> dict[str, np.ndarray]:
    """The moments of the server's optimiser as `strategy/m/KEY` and `strategy/v/KEY`; empty for strategies without memory."""
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


def restore_strategy(strategy: Strategy, tensors: dict[str, np.ndarray]) -> None:
    """Give a fresh strategy the moments that `strategy_state` took from another.

    Raises `CheckpointError` when the checkpoint holds moments that this strategy has no place for.
    """
    found = {key: value for key, value in tensors.items() if key.startswith(STRATEGY_STATE)}
    if not found:
        return
    first, second = (
        {
            key.removeprefix(f"{STRATEGY_STATE}{moment}/"): found[key]
            for key in sorted(found)
            if key.startswith(f"{STRATEGY_STATE}{moment}/")
        }
        for moment in ("m", "v")
    )
    if isinstance(strategy, FedAvgM) and not second:
        strategy.momentum_vector = list(first.values())  # by sorted name, as arrays travel
    elif hasattr(strategy, "m_t") and second:
        strategy.m_t, strategy.v_t = first, second
    else:
        raise CheckpointError(
            f"the checkpoint holds moments of a server optimiser, but {type(strategy).__name__} has none like them: "
            "was config.toml changed?"
        )
