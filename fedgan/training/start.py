"""How a Trainer begins: with the ledger that privacy needs, and from the model that `training.warm_start` names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedgan.config import Settings
from fedgan.data.dataset import ImageDataset
from fedgan.privacy.ledger import JointLedger, Ledger
from fedgan.privacy.step import PrivateStep
from fedgan.privacy.validator import check_modules, check_private
from fedgan.training.trainer import Trainer, resolve_device


def begin_training(
    settings: Settings,
    dataset: ImageDataset,
    *,
    stream: int = 0,
    planned_images: float,
    ledgers: Sequence[Path],
    run: str,
    secret: int | None = None,
    least_noise: float = 0.0,
    places: np.ndarray | None = None,
) -> Trainer:
    """A Trainer for `dataset`, private where `settings.privacy` is on.

    `planned_images`: real images that this Trainer will be shown in the whole run; the noise follows from it. `ledgers`: the
    ledger file of each shard that the dataset's images come from. `run`: the run's id, for the ledger's lines.
    `least_noise`: a noise multiplier that the hospital's own is raised to (`privacy.noise_split = "equal"`). `places`: as of
    `Trainer`. Raises `ConfigError` for settings that void the guarantee.
    """
    check_private(settings)
    device = settings.training.device
    private = None
    if settings.privacy.on:
        ledger = JointLedger([Ledger(path) for path in ledgers])
        batch = settings.training.batch_size
        private = PrivateStep(
            settings,
            dataset,
            batch,
            planned_images,
            ledger,
            run,
            resolve_device(device),
            secret,
            least_noise,
        )
    trainer = Trainer(settings, dataset, device, stream, private, places)
    if private is not None:
        check_modules(trainer.discriminator, dataset)
    return trainer
