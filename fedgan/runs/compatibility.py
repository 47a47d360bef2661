"""Rules that join two or more settings, beyond those in `fedgan.config.validate`.

Each function reads nothing but settings and raises `ConfigError` with the keys to change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedgan.config import Settings
from fedgan.errors import ConfigError
from fedgan.exchange.masking import MIN_HOSPITALS
from fedgan.privacy.validator import check_private
from fedgan.runs.budget import images_per_round

PLAIN_MEANS = ("fedavg", "fedprox")  # strategies that return the plain mean of the models
WEIGHTED_MEANS = (*PLAIN_MEANS, "fedavgm", "fedadam", "fedyogi")  # strategies based on the mean
KRUMS = ("krum", "multikrum")
SUMS = ("sum", "damped")  # federation.weights that give each hospital the same weight, not a mean


def check_compatibility(settings: Settings) -> None:
    """Check that strategy, weights, wire, secure aggregation and client-level DP fit together."""
    federation, training = settings.federation, settings.training
    if not {"generator", "ema"} & set(federation.exchange):
        raise ConfigError(
            "federation.exchange has neither generator nor ema: without one of them no image can "
            "be generated; add one"
        )
    if federation.strategy == "fedprox" and training.proximal_mu <= 0:
        raise ConfigError(
            "federation.strategy = 'fedprox' needs training.proximal_mu > 0, e.g. 0.01; "
            "with 0 it is fedavg"
        )
    if federation.strategy != "fedprox" and training.proximal_mu > 0:
        raise ConfigError(
            f"training.proximal_mu = {training.proximal_mu:g} adds the proximal term of fedprox, "
            f"but federation.strategy = '{federation.strategy}': set it to 0 or choose "
            "federation.strategy = 'fedprox'"
        )
    if federation.strategy == "fedavgm" and federation.server_momentum <= 0:
        raise ConfigError(
            "federation.strategy = 'fedavgm' needs federation.server_momentum > 0, e.g. 0.5; "
            "with 0 it is fedavg"
        )
    if federation.strategy == "fedtrimmedavg" and federation.trim >= 0.5:
        raise ConfigError(
            f"federation.trim = {federation.trim:g} removes every hospital: give less than 0.5"
        )
    if federation.strategy == "fedtrimmedavg" and federation.trim <= 0:
        raise ConfigError(
            "federation.trim = 0 removes no hospital and gives no protection: raise it, e.g. to "
            "0.34 for one of three"
        )
    _check_control_variates(settings)
    _check_client_level_dp(settings)
    _check_wire(settings)
    _check_secure(settings)
    _check_weights(settings)
    _check_min_updates(settings)


def check_deployable(settings: Settings) -> None:
    """Check that a deployment, where the server opens no shard, can run these settings."""
    if settings.data.partition != "institution":
        raise ConfigError(
            f"data.partition = '{settings.data.partition}' partitions pooled data, and a server "
            "cannot partition data that stays at hospitals: set it to 'institution'"
        )
    check_compatibility(settings)
    check_private(settings)


def min_updates(settings: Settings) -> int:
    """The fewest updates that the strategy can aggregate with its guarantee.

    krum and multikrum: 2 f + 3 (arXiv 1703.02757: 2 f + 2 < n). fedtrimmedavg: enough to remove
    one from each end. All others: 1.
    """
    federation = settings.federation
    if federation.strategy in KRUMS:
        return 2 * federation.malicious + 3
    if federation.strategy == "fedtrimmedavg":
        least = math.ceil(1 / federation.trim)
        # Flower truncates the product, which may be just below 1
        return least if int(federation.trim * least) else least + 1
    return 1


def reason_to_end(settings: Settings, exhausted: Sequence[str]) -> str:
    """Why no further round is possible after `exhausted` hospitals spent their privacy budget.

    Empty where a further round is possible.
    """
    left = settings.federation.participants - len(exhausted)
    needed = MIN_HOSPITALS if settings.federation.secure else min_updates(settings)
    if left <= 0:
        return "the privacy budget of every hospital is spent"
    if left >= needed:
        return ""
    rule = "federation.secure" if settings.federation.secure else settings.federation.strategy
    return (
        f"{rule} needs {needed} hospitals, and {left} {'is' if left == 1 else 'are'} left: "
        f"the privacy budget of {', '.join(exhausted)} is spent"
    )


def _check_control_variates(settings: Settings) -> None:
    """Refuse control variates where hospitals' corrections do not sum to zero or have no effect."""
    federation = settings.federation
    if not federation.control_variates:
        return
    faults = (
        (
            federation.strategy not in PLAIN_MEANS,
            f"federation.strategy = '{federation.strategy}' takes another mean",
        ),
        (
            federation.weights in SUMS,
            f"federation.weights = '{federation.weights}' takes no mean: choose 'size', 'root' or "
            "'equal'",
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
            "federation.secure rounds the mean and clips values out of range: leave it false",
        ),
        (
            not federation.equal_steps,
            "hospitals take different numbers of steps: set federation.local_images = 'equal' or "
            "federation.batch = 'shared'",
        ),
        (
            federation.batch != "shared" and _has_uneven_rounds(settings),
            f"the batches of some round cannot be divided equally among {federation.participants} "
            "hospitals: change federation.rounds, training.kimg or training.batch_size",
        ),
        (
            federation.min_hospitals > 0,
            "federation.min_hospitals lets a round continue without some: set it to 0",
        ),
        (
            settings.privacy.on or settings.privacy.client_level != "none",
            "with privacy a hospital may stop, and means have noise",
        ),
    )
    for is_fault, why in faults:
        if is_fault:
            raise ConfigError(
                "federation.control_variates corrects hospitals by the plain mean of all, after "
                f"equally many steps of each: {why}"
            )


def _has_uneven_rounds(settings: Settings) -> bool:
    """Whether hospitals with equal `local_images` take different numbers of steps in some round."""
    training, federation = settings.training, settings.federation
    totals = images_per_round(training.kimg, federation.rounds, training.batch_size)
    return any(total % (training.batch_size * federation.participants) for total in totals)


def _check_client_level_dp(settings: Settings) -> None:
    """Refuse client-level DP where the strategy computes another result than a mean."""
    level = settings.privacy.client_level
    if level == "none":
        return
    if settings.federation.strategy not in PLAIN_MEANS:
        raise ConfigError(
            f"privacy.client_level = '{level}' needs a mean of clipped updates, and "
            f"federation.strategy = '{settings.federation.strategy}' computes another result: "
            f"choose {' or '.join(PLAIN_MEANS)}"
        )


def _check_wire(settings: Settings) -> None:
    """Refuse a wire format in which hospitals clip another model than they send."""
    federation = settings.federation
    if settings.privacy.client_level == "client" and (
        federation.wire != "fp32" or federation.delta
    ):
        raise ConfigError(
            "privacy.client_level = 'client' makes each hospital clip the float32 model that it "
            "sends against the float32 model that it received: leave federation.wire = 'fp32' and "
            "federation.delta = false, or choose privacy.client_level = 'server'"
        )


def _check_secure(settings: Settings) -> None:
    """Refuse secure aggregation together with settings that need the update of one hospital."""
    federation, hospitals = settings.federation, settings.federation.participants
    if not federation.secure:
        return
    if federation.strategy not in PLAIN_MEANS:
        raise ConfigError(
            "federation.secure shows the server a mean and no hospital's model, and "
            f"federation.strategy = '{federation.strategy}' needs more: choose "
            f"{' or '.join(PLAIN_MEANS)}, or leave federation.secure = false"
        )
    if federation.wire != "fp32":
        raise ConfigError(
            "federation.secure masks 32-bit integers, and federation.wire = "
            f"'{federation.wire}' has 16 bits: leave federation.wire = 'fp32'"
        )
    if settings.privacy.client_level != "none":
        raise ConfigError(
            f"privacy.client_level = '{settings.privacy.client_level}' clips single updates and "
            "averages them with equal weights, and federation.secure hides them: choose one of "
            "the two"
        )
    if hospitals < MIN_HOSPITALS:
        raise ConfigError(
            f"federation.secure hides a hospital among {MIN_HOSPITALS} or more, not {hospitals}: "
            "leave it false"
        )
    if federation.min_hospitals > 0 and 2 * federation.min_hospitals <= hospitals:
        raise ConfigError(
            f"federation.min_hospitals = {federation.min_hospitals} of {hospitals} is no majority: "
            "with federation.secure two halves could be unmasked separately; give at least "
            f"{hospitals // 2 + 1}, or 0 for all"
        )


def _check_weights(settings: Settings) -> None:
    """Refuse `weights` and `label_rows` where the strategy has no weights or changes are hidden."""
    federation = settings.federation
    if federation.weights == "size" and not federation.label_rows:
        return
    key = (
        "label_rows = true" if federation.weights == "size" else f"weights = '{federation.weights}'"
    )
    if federation.label_rows and (reason := _why_label_rows_fail(settings)):
        raise ConfigError(
            "federation.label_rows = true averages a label's row over the hospitals that hold the "
            f"label, and {reason}: leave it false"
        )
    if federation.strategy not in WEIGHTED_MEANS:
        raise ConfigError(
            f"federation.{key} weights a mean, and federation.strategy = '{federation.strategy}' "
            "takes none: leave federation.weights = 'size' and label_rows = false, or choose one "
            f"of {', '.join(WEIGHTED_MEANS)}"
        )
    if federation.secure and (federation.label_rows or federation.weights == "root"):
        raise ConfigError(
            f"federation.{key} scales single changes, which federation.secure hides from the "
            "server: it supports federation.weights = 'size', 'equal', 'sum' and 'damped', "
            "without label_rows"
        )
    if settings.privacy.client_level != "none":
        raise ConfigError(
            f"federation.{key} would let one hospital move the mean further than the bound of "
            f"privacy.client_level = '{settings.privacy.client_level}': leave federation.weights "
            "= 'size' and label_rows = false"
        )


def _why_label_rows_fail(settings: Settings) -> str:
    """Why the holders of a label cannot be identified or do not matter; empty where they can."""
    if settings.federation.weights in SUMS:
        return (
            f"federation.weights = '{settings.federation.weights}' takes no mean: a hospital "
            "without the label adds nothing"
        )
    if settings.training.labels == "uniform":
        return "training.labels = 'uniform' moves the rows of labels that a hospital does not hold"
    return "privacy moves every row by its noise" if settings.privacy.on else ""


def _check_min_updates(settings: Settings) -> None:
    """Refuse fewer hospitals, or a lower `min_hospitals`, than the strategy can aggregate."""
    federation, hospitals = settings.federation, settings.federation.participants
    needed = min_updates(settings)
    if hospitals < needed:
        if federation.strategy == "fedtrimmedavg" and hospitals < 3:
            raise ConfigError(
                f"fedtrimmedavg removes one from each end, and {hospitals} hospitals leave none: "
                "choose fedavg"
            )
        if federation.strategy == "fedtrimmedavg":
            raise ConfigError(
                f"federation.trim = {federation.trim:g} removes none of {hospitals} hospitals and "
                f"gives no protection: it needs {needed}; raise it to 1 / {hospitals} or a little "
                "more, or choose fedmedian"
            )
        raise ConfigError(
            f"{federation.strategy} with federation.malicious = {federation.malicious} needs "
            f"2 f + 3 = {needed} hospitals, not {hospitals}: raise federation.hospitals, lower "
            "federation.malicious or choose fedmedian"
        )
    if 0 < federation.min_hospitals < needed:
        raise ConfigError(
            f"federation.min_hospitals = {federation.min_hospitals}, but {federation.strategy} "
            f"makes no model of fewer than {needed} updates: raise it, or choose fedmedian"
        )
