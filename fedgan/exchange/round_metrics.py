"""Metrics of a round: the one table of the numbers that a hospital sends beside its update.

The client's allow-list, the reply, the server's checks and means and the table of the documentation
are made from `ROUND_METRICS`. A number that the Trainer measures but that is not in the table never
leaves a hospital.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from fedgan.config import Settings


class Disclosure(Enum):
    """Privacy settings under which a metric leaves a hospital, in the words of the docs."""

    ALWAYS = "always"
    # From settings and the ledger; exists only with privacy.
    LEDGER = "with `privacy`"
    # Post-processing of noisy releases: measured on generated images, by a discriminator trained
    # with noise.
    NOISY = "not with `privacy.client_level`"
    # Measured on real images; with image- or patient-level privacy only with noise of its own.
    NOISY_R_T = "not with `privacy.client_level`; with `privacy` only by `privacy.r_t_noise`"
    # Measured on real images or on this machine. Times and memory depend on the size of each
    # Poisson sample, which the accountant assumes to be secret.
    OPEN = "not with `privacy`, nor `privacy.client_level`"


@dataclass(frozen=True)
class RoundMetric:
    """One number of a reply. `is_count`: every reply must hold it as a whole number ≥ 0.

    `mean_rank`: position among the means over hospitals in metrics.jsonl; 0: no mean is reported.
    """

    name: str
    meaning: str
    unit: str
    disclosure: Disclosure
    kind: type = float
    is_count: bool = False
    mean_rank: int = 0

    def may_leave(self, settings: Settings) -> bool:
        """Whether the metric may leave a hospital under these settings."""
        privacy = settings.privacy
        if self.disclosure in (Disclosure.ALWAYS, Disclosure.LEDGER):
            return True
        if privacy.client_level != "none":
            return False
        if not privacy.on or self.disclosure is Disclosure.NOISY:
            return True
        return self.disclosure is Disclosure.NOISY_R_T and bool(privacy.r_t_noise)


_ALWAYS, _LEDGER, _NOISY, _NOISY_R_T, _OPEN = Disclosure
ROUND_METRICS = (  # in the order of the reply
    RoundMetric("round", "number of the round", "", _ALWAYS, int, is_count=True),
    RoundMetric("images_seen", "images seen since round 1", "images", _ALWAYS, int, is_count=True),
    RoundMetric("images", "images seen in this round", "images", _ALWAYS, is_count=True),
    RoundMetric("threads", "CPU threads", "threads", _ALWAYS, int, is_count=True),
    RoundMetric("exhausted", "1 when the privacy budget is spent", "", _ALWAYS),
    RoundMetric(
        "continued_from",
        "where its own state was lost, the round of the older one that it continued; 0: none",
        "",
        _ALWAYS,
    ),
    RoundMetric("loss_g", "loss of the generator", "", _NOISY, mean_rank=1),
    RoundMetric("d_accuracy", "share of fakes that D classifies as fake", "", _NOISY, mean_rank=3),
    RoundMetric("path_length", "mean path length of the generator", "", _NOISY, mean_rank=7),
    RoundMetric("p", "augmentation probability", "", _NOISY, mean_rank=5),
    RoundMetric("r_t", "mean sign of D's output on real images", "", _NOISY_R_T, mean_rank=4),
    RoundMetric("epsilon", "spent ε of the privacy ledger", "", _LEDGER),
    RoundMetric("delta", "δ of epsilon", "", _LEDGER),
    RoundMetric("noise_multiplier", "noise multiplier of DP-SGD", "", _LEDGER),
    RoundMetric("sample_rate", "Poisson sampling rate of DP-SGD", "", _LEDGER),
    RoundMetric("loss_d", "loss of the discriminator", "", _OPEN, mean_rank=2),
    RoundMetric("r1", "gradient penalty at real images", "", _OPEN, mean_rank=6),
    RoundMetric("seconds", "wall time of the training", "s", _OPEN),
    RoundMetric("core_seconds", "CPU time of the training", "s", _OPEN),
    RoundMetric("peak_memory_bytes", "peak memory of the process", "bytes", _OPEN),
)

COUNTS = tuple(metric.name for metric in ROUND_METRICS if metric.is_count)
MEANS = tuple(
    metric.name
    for metric in sorted(ROUND_METRICS, key=lambda metric: metric.mean_rank)
    if metric.mean_rank
)


def allowed_metrics(settings: Settings) -> dict[str, type]:
    """Names and types of the metrics that may leave a hospital under these settings."""
    return {metric.name: metric.kind for metric in ROUND_METRICS if metric.may_leave(settings)}


def reported_metrics(settings: Settings, measured: Mapping[str, float]) -> dict[str, float]:
    """The measured metrics that may leave, in the order of the table."""
    return {name: float(measured[name]) for name in allowed_metrics(settings) if name in measured}
