"""Check before a run whether each hospital's private training can begin.

A hospital reports only the kind of an error to the server. Where the shards are on the same machine
(a simulation, a comparison), this check gives the full message.
"""

from __future__ import annotations

from fedgan.config import Settings
from fedgan.data.dataset import ImageDataset
from fedgan.privacy.accounting import MAX_NOISE, Mechanism, epsilon_rdp
from fedgan.privacy.ledger import JointLedger
from fedgan.privacy.step import label_release, noise_multiplier, rate_and_delta, steps_of, units_of

FOUND_WITHIN = 1.02  # twice the relative error of `noise_for`


def check_can_begin(
    settings: Settings,
    dataset: ImageDataset,
    batch_size: int,
    planned_images: float,
    ledger: JointLedger,
) -> None:
    """Raise the `ConfigError` that `PrivateStep` or a first ledger entry would raise.

    Nothing is entered, and nothing is checked where privacy is off. Raises `DataError` for a
    damaged ledger. The search for the noise takes seconds; it runs only where Rényi's bound does
    not decide.
    """
    privacy = settings.privacy
    if not privacy.on:
        return
    _, units = units_of(dataset, privacy.unit)
    rate, delta = rate_and_delta(privacy, dataset, units, batch_size)
    ledger.check_unit(privacy.unit)
    if privacy.noise_multiplier >= 0:
        return
    most = privacy.r_t_noise / FOUND_WITHIN if privacy.r_t_noise else MAX_NOISE
    parts = [
        *label_release(settings, dataset.label_dim),
        Mechanism(most, rate, steps_of(planned_images, batch_size)),
    ]
    if epsilon_rdp(parts, delta) > privacy.epsilon:
        noise_multiplier(
            settings, dataset.label_dim, len(dataset), units, batch_size, planned_images
        )
