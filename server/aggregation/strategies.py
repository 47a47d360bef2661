"""Flower's own strategy classes, chosen by name, and what of them must survive a restart.

fedavg (arXiv 1602.05629), fedprox (1812.06127), fedavgm (1909.06335), fedadam and fedyogi (2003.00295), fedmedian and
fedtrimmedavg (1803.01498), krum and multikrum (1703.02757). All work on one ArrayRecord with prefixed keys; how far each
hospital's change counts is `federation.weights` (server/aggregation/weights.py).
`privacy.client_level` wraps them in Flower's differential privacy of hospitals (server/aggregation/client_level_dp.py).
"""

from __future__ import annotations

import math
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
from fedgan.exchange.masking import FEWEST
from fedgan.runs.budget import round_totals
from server.aggregation.client_level_dp import check_hospital_privacy, wrap
from server.aggregation.secure import check_secure
from server.aggregation.weights import SUMS, check_weights, plain_averages, weigh
from server.records import ARRAYS, CONFIG, WEIGHT, to_record
from server.wire import check_wire

STATE = "strategy/"
KRUMS = ("krum", "multikrum")
OPTIMISERS = ("fedavgm", "fedadam", "fedyogi")


def check_control_variates(settings: Settings) -> None:
    """Raise `ConfigError` where hospitals' corrections would not cancel out, or answer nothing (fedgan/training/variates.py)."""
    federation = settings.federation
    if not federation.control_variates:
        return
    faults = (
        (
            federation.strategy not in ("fedavg", "fedprox"),
            f"federation.strategy = '{federation.strategy}' takes another mean",
        ),
        (
            federation.weights in SUMS,
            f"federation.weights = '{federation.weights}' takes no mean: choose 'size', 'root' or 'equal'",
        ),
        (
            federation.label_rows,
            "federation.label_rows takes another mean of some rows: leave it false",
        ),
        (
            not {"generator", "discriminator"} & set(federation.exchange),
            "federation.exchange has neither of the two networks",
        ),
        (
            federation.wire != "fp32",
            f"federation.wire = '{federation.wire}' rounds the mean: choose fp32",
        ),
        (
            federation.secure,
            "federation.secure rounds the mean, and cuts off what is out of range: leave it false",
        ),
        (
            not federation.equal_steps,
            "hospitals take different numbers of steps: set federation.local_images = 'equal' or federation.batch = 'shared'",
        ),
        (
            federation.batch != "shared" and _uneven(settings),
            f"some round's batches cannot be dealt evenly to {federation.participants} hospitals: change federation.rounds, "
            "training.kimg or training.batch_size",
        ),
        (
            federation.min_hospitals > 0,
            "federation.min_hospitals lets a round go on without some: set it to 0",
        ),
        (
            settings.privacy.on or settings.privacy.client_level != "none",
            "with privacy a hospital may stop, and means have noise",
        ),
    )
    for fault, why in faults:
        if fault:
            raise ConfigError(
                f"federation.control_variates corrects hospitals by the plain mean of all, after as many steps each: {why}"
            )


def _uneven(settings: Settings) -> bool:
    """Whether hospitals with equal `local_images` take different numbers of steps in some round."""
    training, federation = settings.training, settings.federation
    totals = round_totals(training.kimg, federation.rounds, training.batch_size)
    return any(total % (training.batch_size * federation.participants) for total in totals)


def check_strategy(settings: Settings) -> None:
    """Raise `ConfigError` for a combination of settings that the named strategy or the evaluator cannot serve."""
    federation, hospitals = settings.federation, settings.federation.participants
    if not {"generator", "ema"} & set(federation.exchange):
        raise ConfigError(
            "federation.exchange has neither generator nor ema: without one of them nothing can be generated; add one"
        )
    if federation.strategy == "fedprox" and settings.training.proximal_mu <= 0:
        raise ConfigError(
            "federation.strategy = 'fedprox' needs training.proximal_mu > 0, e.g. 0.01; with 0 it is fedavg"
        )
    if federation.strategy != "fedprox" and settings.training.proximal_mu > 0:
        raise ConfigError(
            f"training.proximal_mu = {settings.training.proximal_mu:g} pulls hospitals as fedprox does, but "
            f"federation.strategy = '{federation.strategy}': set it to 0 or choose federation.strategy = 'fedprox'"
        )
    if federation.strategy == "fedavgm" and federation.server_momentum <= 0:
        raise ConfigError(
            "federation.strategy = 'fedavgm' needs federation.server_momentum > 0, e.g. 0.5; with 0 it is fedavg"
        )
    if federation.strategy == "fedtrimmedavg" and federation.trim >= 0.5:
        raise ConfigError(
            f"federation.trim = {federation.trim:g} cuts every hospital away: give less than 0.5"
        )
    if federation.strategy == "fedtrimmedavg" and federation.trim <= 0:
        raise ConfigError(
            "federation.trim = 0 cuts nobody away, and guards against nobody: raise it, e.g. to 0.34 for one of three"
        )
    check_control_variates(settings)
    check_hospital_privacy(settings)
    check_wire(settings)
    check_secure(settings)
    check_weights(settings)
    if hospitals < (needed := fewest(settings)):
        if federation.strategy == "fedtrimmedavg" and hospitals < 3:
            raise ConfigError(
                f"fedtrimmedavg cuts one from each end, and {hospitals} hospitals leave nobody: choose fedavg"
            )
        if federation.strategy == "fedtrimmedavg":
            raise ConfigError(
                f"federation.trim = {federation.trim:g} cuts nobody away of {hospitals} hospitals, and guards against nobody: it "
                f"needs {needed}; raise it to 1 / {hospitals} or a little more, or choose fedmedian"
            )
        raise ConfigError(
            f"{federation.strategy} with federation.malicious = {federation.malicious} needs 2 f + 3 = {needed} hospitals, not "
            f"{hospitals}: raise federation.hospitals, lower federation.malicious or choose fedmedian"
        )
    if 0 < federation.min_hospitals < needed:
        raise ConfigError(
            f"federation.min_hospitals = {federation.min_hospitals}, but {federation.strategy} makes no model of fewer than "
            f"{needed} answers: raise it, or choose fedmedian"
        )


def fewest(settings: Settings) -> int:
    """The fewest models that the strategy can aggregate as it promises.

    krum's 2 f + 3 (arXiv 1703.02757: 2 f + 2 < n); as many as it takes for the trimmed mean to cut one from each end; else one.
    """
    federation = settings.federation
    if federation.strategy in KRUMS:
        return 2 * federation.malicious + 3
    if federation.strategy == "fedtrimmedavg":
        least = math.ceil(1 / federation.trim)
        return (
            least if int(federation.trim * least) else least + 1
        )  # as Flower counts, whose product may be just below 1
    return 1


def too_few(settings: Settings, exhausted: Sequence[str]) -> str:
    """Why no round can follow once the privacy budgets of `exhausted` are spent, in a sentence; empty where one can."""
    left = settings.federation.participants - len(exhausted)
    needed = FEWEST if settings.federation.secure else fewest(settings)
    if left <= 0:
        return "the privacy budget of every hospital is spent"
    if left >= needed:
        return ""
    verb, who = (
        "is" if left == 1 else "are",
        "federation.secure" if settings.federation.secure else settings.federation.strategy,
    )
    return f"{who} needs {needed} hospitals, and {left} {verb} left: the privacy budget of {', '.join(exhausted)} is spent"


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
    check_strategy(settings)
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
        f"{STATE}{moment}/{key}": np.asarray(value)
        for moment, arrays in moments.items()
        for key, value in arrays.items()
    }


def restore_strategy(strategy: Strategy, tensors: dict[str, np.ndarray]) -> None:
    """Give a fresh strategy the moments that `strategy_state` took from another.

    Raises `CheckpointError` when the checkpoint holds moments that this strategy has no place for.
    """
    found = {key: value for key, value in tensors.items() if key.startswith(STATE)}
    if not found:
        return
    first, second = (
        {
            key.removeprefix(f"{STATE}{moment}/"): found[key]
            for key in sorted(found)
            if key.startswith(f"{STATE}{moment}/")
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
