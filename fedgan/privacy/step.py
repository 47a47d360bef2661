"""DP-SGD for the discriminator: the Poisson sample and the noisy gradient of a step.

Only D sees real images, so only D's gradient gets noise. The generator learns from D and from its
own images: all that is derived from it is post-processing (arXiv 1607.00133, section 3).

The secret. `settings.seed` is public: the server sends it. Noise that can be computed can be
subtracted, and a known sample gives no amplification. So the Poisson sample, the noise and all
other draws of D's step come from a secret of this process (the system's entropy), which is never
stored, sent or reused: a restored checkpoint gets new noise. The generators are not cryptographic
(the report says so), but the noise uses all 128 bits of the secret: PyTorch's CPU generator keeps
32 bits of a seed, few enough to try each.

Not covered: the duration of a step (it grows with the sample), and the rounding of floating-point
sums, by which a unit may move a sum slightly more than the clip (arXiv 2207.10635); the noise is
larger by many orders of magnitude.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedgan.config import PrivacySettings, Settings
from fedgan.data.dataset import ImageDataset
from fedgan.errors import ConfigError, FedganError
from fedgan.privacy.accounting import Mechanism, joint_noise, noise_for
from fedgan.privacy.clipping import Loss, clipped_sum

STEPS, LABELS = "discriminator steps", "label counts"


class LedgerLike(Protocol):
    """The part of a ledger that training needs (fedgan/privacy/ledger.py)."""

    def epsilon(self, delta: float) -> float: ...

    def reserve(
        self,
        step: Mechanism,
        steps: int,
        *,
        run: str,
        kind: str,
        unit: str,
        delta: float,
        data: str,
        max_epsilon: float = 0.0,
    ) -> int: ...


@dataclass(frozen=True)
class Draw:
    """The Poisson sample of one step of D: rows (B,), the unit of each (B,), and its generators.

    `host` and `device` serve all other draws of the step; `noise` only the noise of DP-SGD.
    """

    rows: np.ndarray
    units: Tensor
    host: torch.Generator
    device: torch.Generator
    noise: np.random.Generator

    def normal(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Noise of standard deviation 1, float32."""
        if device.type == "cpu":
            return torch.from_numpy(
                self.noise.standard_normal(shape or (1,), dtype=np.float32)
            ).reshape(shape)
        seeded = torch.Generator(device).manual_seed(
            int(self.noise.integers(2**63))
        )  # CUDA's generator keeps all 63 bits
        return torch.randn(shape, generator=seeded, device=device)


class PrivateStep:
    """DP-SGD for one hospital's discriminator.

    `planned_images`: real images in this hospital's whole run, which determine the noise for
    `privacy.epsilon`. `least_noise`: lower bound of the noise multiplier
    (`privacy.noise_split = "equal"`). `secret`: for tests only, to repeat the noise.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: ImageDataset,
        batch_size: int,
        planned_images: float,
        ledger: LedgerLike,
        run: str,
        device: torch.device,
        secret: int | None = None,
        least_noise: float = 0.0,
    ) -> None:
        self.settings, self.ledger, self.run, self.device = settings.privacy, ledger, run, device
        self.data = dataset.content_hash
        self.batch_size = batch_size
        self.unit_of_row, self.units = units_of(dataset, self.settings.unit)
        self.rows_of_unit = _rows_of(self.unit_of_row, self.units)
        self.sample_rate, self.delta = rate_and_delta(
            self.settings, dataset, self.units, batch_size
        )
        self._fixed_secret = secret
        self.renew()
        self._reserved = 0
        self.labels = label_release(settings, dataset.label_dim)
        own = noise_multiplier(
            settings, dataset.label_dim, len(dataset), self.units, batch_size, planned_images
        )
        self.noise_multiplier = max(own, least_noise)
        self.step = Mechanism(self.joint_multiplier, self.sample_rate, 1)

    # --- privacy cost -----------------------------------------------------------------------------

    @property
    def joint_multiplier(self) -> float:
        """Noise multiplier of gradient and signs together, released from the same sample."""
        return joint_noise(
            self.noise_multiplier, *([self.settings.r_t_noise] if self.settings.r_t_noise else [])
        )

    def reserve(self, steps: int, kind: str = STEPS) -> int:
        """Enter `steps` steps in the ledger before they run; return how many it allows."""
        mechanism = self.step if kind == STEPS else self.labels[0]
        allowed = self.ledger.reserve(
            mechanism,
            steps,
            run=self.run,
            kind=kind,
            unit=self.settings.unit,
            delta=self.delta,
            data=self.data,
            max_epsilon=self.settings.max_epsilon,
        )
        self._reserved += allowed if kind == STEPS else 0
        return allowed

    def epsilon(self) -> float:
        """Spent ε at `delta`: all entries of the ledger, over all runs."""
        return self.ledger.epsilon(self.delta)

    # --- sampling ---------------------------------------------------------------------------------

    def renew(self) -> None:
        """Draw a new secret: after a restored checkpoint no noise may come twice."""
        self._secret = secrets.randbits(128) if self._fixed_secret is None else self._fixed_secret
        self._newest = -1

    def draw(self, number: int) -> Draw:
        """The Poisson sample of step `number`: each unit with `sample_rate`; it may be empty."""
        if number <= self._newest:
            self.renew()
        self._newest = number
        sample, noise, torch_seeds = np.random.SeedSequence([self._secret, number]).spawn(3)
        rng = np.random.Generator(np.random.PCG64(sample))
        chosen = np.flatnonzero(rng.random(self.units) < self.sample_rate)
        rows = [self.rows_of_unit[unit] for unit in chosen]
        if most := self.settings.images_per_patient:
            rows = [rng.permutation(row)[:most] for row in rows]
        units = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        seeds = torch_seeds.generate_state(2, np.uint64) >> np.uint64(1)
        host = torch.Generator().manual_seed(int(seeds[0]))
        device = torch.Generator(self.device).manual_seed(int(seeds[1]))
        index = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        noises = np.random.Generator(np.random.PCG64(noise))
        return Draw(index, torch.from_numpy(units).to(self.device), host, device, noises)

    # --- releases ---------------------------------------------------------------------------------

    def gradient(
        self,
        discriminator: nn.Module,
        loss: Loss,
        fakes: tuple[Tensor, Tensor],
        reals: tuple[Tensor, Tensor],
        draw: Draw,
        r1_weight: float = 0.0,
    ) -> tuple[float, int]:
        """Set the gradients of D: clip, sum, add noise, divide by the expected batch size.

        Return (sum of the signs of D on real images, their number), with the noise of
        `privacy.r_t_noise` and the expected number; (0, 0) where it is off. Raises `FedganError`
        for a step that is not reserved in the ledger.
        """
        if self._reserved < 1:
            raise FedganError(
                "a step of D on private images is not in the ledger: reserve it first"
            )
        self._reserved -= 1
        clip, noise = self.settings.max_grad_norm, self.noise_multiplier
        found = clipped_sum(
            discriminator, loss, fakes, reals, draw.units, clip, self.settings.chunk, r1_weight
        )
        expected = self.sample_rate * self.units
        for name, parameter in discriminator.named_parameters():
            total = found.gradients[name]
            draws = draw.normal(tuple(total.shape), total.device)
            parameter.grad = torch.empty_like(parameter).copy_(
                (total + draws * (noise * clip)) / expected
            )
        if not self.settings.r_t_noise:
            return 0.0, 0
        signs = torch.zeros(int(draw.units[-1]) + 1 if len(draw.units) else 0, device=self.device)
        signs.index_add_(0, draw.units, found.real_logits.float().sign().nan_to_num())
        signs = signs / torch.bincount(draw.units, minlength=len(signs)).clamp(min=1)
        noisy = signs.sum() + draw.normal((), self.device) * self.settings.r_t_noise
        return float(noisy), max(1, round(expected))

    def release_labels(self, dataset: ImageDataset) -> np.ndarray:
        """Label frequencies (K,) from noisy counts: of classes, or of each label on its own.

        Reserve it in the ledger first; the Trainer keeps the result. A unit counts 1 in all (the
        images of a patient share it), and up to √K over labels that can occur together: the counts
        get `privacy.label_noise` times that.
        """
        reach = 1.0 if dataset.exclusive else max(1, dataset.label_dim) ** 0.5
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._secret, 2**63])))
        size = np.bincount(self.unit_of_row, minlength=self.units)
        counts = (dataset.labels / size[self.unit_of_row, None]).sum(axis=0)
        noisy = np.clip(
            counts + rng.normal(0.0, self.settings.label_noise * reach, counts.shape), 0.0, None
        )
        if not dataset.exclusive:
            return np.clip(noisy / self.units, 0.0, 1.0)
        return (
            noisy / noisy.sum() if noisy.sum() > 0 else np.full(len(noisy), 1 / max(1, len(noisy)))
        )

    def metrics(self) -> dict[str, float]:
        """What a round reports of the guarantee; nothing is measured on real images."""
        return {
            "epsilon": self.epsilon(),
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": self.sample_rate,
        }


def releases_labels(settings: Settings, label_dim: int = 1) -> bool:
    """Whether a private run releases noisy label counts.

    `label_dim`: number of labels; default 1: any number, where it is not known yet.
    """
    return settings.training.labels == "data" and settings.privacy.label_noise > 0 and label_dim > 0


def noise_multiplier(
    settings: Settings,
    label_dim: int,
    images: int,
    units: int,
    batch_size: int,
    planned_images: float,
) -> float:
    """Noise multiplier of the gradient for `images` images of `units` images or patients.

    With `privacy.epsilon`: what remains for the gradient beside the released label counts and the
    noisy signs of `r_t_noise`, for `planned_images` images in batches of `batch_size`. With
    `privacy.noise_split = "equal"` every hospital uses the largest of the federation. Raises
    `ConfigError` where no noise is enough.
    """
    privacy = settings.privacy
    if privacy.noise_multiplier >= 0:
        return privacy.noise_multiplier
    delta, steps = privacy.delta or 1 / units, steps_of(planned_images, batch_size)
    joint = noise_for(
        privacy.epsilon,
        delta,
        batch_size / images,
        steps,
        tuple(label_release(settings, label_dim)),
    )
    signs = privacy.r_t_noise
    if not signs:
        return joint
    if signs <= joint:
        raise ConfigError(
            f"privacy.r_t_noise = {signs:g} leaves nothing for the gradient: both together need a "
            f"noise multiplier of {joint:.3g}; raise privacy.r_t_noise, or set it to 0 with "
            "augment.mode = 'fixed'"
        )
    return (joint**-2 - signs**-2) ** -0.5


def steps_of(planned_images: float, batch_size: int) -> int:
    """Number of steps that show `planned_images` images."""
    return max(1, -(-int(planned_images) // batch_size))


def rate_and_delta(
    privacy: PrivacySettings, dataset: ImageDataset, units: int, batch_size: int
) -> tuple[float, float]:
    """(sampling rate, δ). Raises `ConfigError` for a rate above 1 or a δ above 1 / `units`."""
    if batch_size > len(dataset):
        raise ConfigError(
            f"training.batch_size = {batch_size} is more than the {len(dataset)} images of "
            f"'{dataset.name}': a Poisson sample cannot be larger than the data; lower it, or set "
            "federation.batch = 'shared'"
        )
    delta = privacy.delta or 1 / units
    if delta > 1 / units:
        raise ConfigError(
            f"privacy.delta = {delta:g} is more than 1/n of the n {privacy.unit}s of "
            f"'{dataset.name}': it allows the full disclosure of one of them; lower it, or set 0 "
            "for 1/n"
        )
    return batch_size / len(dataset), delta


def label_release(settings: Settings, label_dim: int) -> list[Mechanism]:
    """The release of the label counts as mechanisms; empty where none are released."""
    return (
        [Mechanism(settings.privacy.label_noise, 1.0, 1)]
        if releases_labels(settings, label_dim)
        else []
    )


def units_of(dataset: ImageDataset, unit: str) -> tuple[np.ndarray, int]:
    """(unit of each row (N,), number of units)."""
    if unit == "image":
        return np.arange(len(dataset)), len(dataset)
    if not len(dataset.patients):
        raise ConfigError(
            f"privacy.unit = 'patient', but '{dataset.name}' has no patient ids: import it with "
            "patients, or use 'image'"
        )
    names, index = np.unique(dataset.patients, return_inverse=True)
    return index, len(names)


def _rows_of(unit_of_row: np.ndarray, units: int) -> list[np.ndarray]:
    order = np.argsort(unit_of_row, kind="stable")
    return np.split(order, np.cumsum(np.bincount(unit_of_row, minlength=units))[:-1])
