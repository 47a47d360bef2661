"""Build a Trainer, with the ledgers that a private training needs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedgan.config import Settings
from fedgan.data.dataset import ImageDataset
from fedgan.privacy.ledger import JointLedger
from fedgan.privacy.step import PrivateStep
from fedgan.privacy.validator import check_private
from fedgan.training.trainer import Trainer, resolve_device


def begin_training(
    settings: Settings,
    dataset: ImageDataset,
    *,
    stream: int = 0,
    planned_images: float,
    ledger: JointLedger,
    run: str,
    secret: int | None = None,
    least_noise: float = 0.0,
    hospital_of_row: np.ndarray | None = None,
    private_step: Callable[..., PrivateStep] = PrivateStep,
) -> Trainer:
    """A Trainer for `dataset`, private where `settings.privacy` is on.

    `planned_images`: real images that it will see in the whole run; the noise follows from it.
    `ledger`: of the images (fedgan/privacy/register.py); `run`: the run's id in it. `least_noise`:
    lower bound of the noise multiplier (`privacy.noise_split = "equal"`). `stream`,
    `hospital_of_row`: see `Trainer`. `private_step`: class of the private step; an audit observes
    it (fedgan/audit/canaries.py). Raises `ConfigError` for settings that void the guarantee.
    """
    check_private(settings)
    device = settings.training.device
    private = None
    if settings.privacy.on:
        private = private_step(
            settings,
            dataset,
            settings.training.batch_size,
            planned_images,
            ledger,
            run,
            resolve_device(device),
            secret,
            least_noise,
        )
    return Trainer(settings, dataset, device, stream, private, hospital_of_row)
