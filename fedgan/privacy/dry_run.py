"""Whether a private training can begin, asked before anything has begun, by whoever has the shards at hand.

A hospital tells the server of a failure no more than its kind. Where the shards lie on the same machine (a simulation, a
comparison) the reason can be told in its own words.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedgan.config import Settings
from fedgan.data.dataset import ImageDataset
from fedgan.privacy.accounting import MOST_NOISE, Mechanism, epsilon_rdp
from fedgan.privacy.ledger import Ledger
from fedgan.privacy.step import label_release, noise_multiplier, rate_and_delta, steps_of, units_of

FOUND_WITHIN = 1.02  # how near to the least noise `noise_for` comes, and as much again


def check_can_begin(
    settings: Settings,
    dataset: ImageDataset,
    batch_size: int,
    planned_images: float,
    ledgers: Sequence[Ledger],
) -> None:
    """Raise the `ConfigError` with which `PrivateStep` or the first entry in one of the `ledgers` would refuse this training.

    Nothing is entered. Raises `DataError` for a damaged ledger; nothing where privacy is off. The noise itself is searched
    for, which takes seconds, only where Rényi's bound leaves it open whether there is any.
    """
    privacy = settings.privacy
    if not privacy.on:
        return
    _, units = units_of(dataset, privacy.unit)
    rate, delta = rate_and_delta(privacy, dataset, units, batch_size)
    for ledger in ledgers:
        ledger.check_unit(privacy.unit)
    if privacy.noise_multiplier >= 0:
        return
    most = privacy.r_t_noise / FOUND_WITHIN if privacy.r_t_noise else MOST_NOISE
    parts = [
        *label_release(settings, dataset.label_dim),
        Mechanism(most, rate, steps_of(planned_images, batch_size)),
    ]
    if epsilon_rdp(parts, delta) > privacy.epsilon:
        noise_multiplier(
            settings, dataset.label_dim, len(dataset), units, batch_size, planned_images
        )
