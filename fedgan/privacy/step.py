"""DP-SGD for the discriminator: the Poisson sample and the noisy gradient of a step.

Only D sees real images, so only D's gradient gets noise. The generator learns from D and from its
own images: all that is derived from it is post-processing (arXiv 1607.00133, section 3).

The secret. `settings.seed` is public: the server sends it. Noise that can be computed can be
subtracted, and a known sample gives no amplification. So the Poisson sample, the images of a
patient, and the noise of gradients, signs and label counts are ChaCha20's key stream under 256 bits
of the system's entropy, which are never stored, sent or reused: a restored checkpoint gets a new
key. Sum and noise are float64 and leave on a grid (fedgan/privacy/noise.py).

On CUDA the noise is made on the CPU and copied, 8 bytes per parameter and step; cuDNN's search for
algorithms and TF32 are off (`exact_kernels`), and chunks have a fixed size.

Not covered: the duration of a step (it grows with the sample); the rounding inside a pair's float32
gradient, which may depend on the other pairs (fedgan/privacy/clipping.py); latents and augmentation
of the step, which come from PyTorch's generators under a seed of the key stream, of which the CPU's
keeps 32 bits.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedgan.config import PrivacySettings, Settings
from fedgan.data.dataset import ImageDataset, unit_numbers
from fedgan.errors import ConfigError, FedganError
from fedgan.privacy.accounting import Mechanism, joint_noise, noise_for
from fedgan.privacy.clipping import Loss, clipped_sum
from fedgan.privacy.noise import KeyStream, Purpose, release

STEPS, LABELS = "discriminator steps", "label counts"
MAX_DELTA = 1e-5  # of the default


class LedgerLike(Protocol):
    """The part of a ledger that training needs (fedgan/privacy/ledger.py)."""

    def epsilon(self, delta: float, run: str = "") -> float: ...

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

    `host` and `device` serve latents and augmentation, `noise` the noise of DP-SGD.
    """

    rows: np.ndarray
    units: Tensor
    host: torch.Generator
    device: torch.Generator
    noise: KeyStream

    def normal(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Noise of standard deviation 1, float64."""
        return self.noise.normal(shape).to(device)


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
        """Spent ε at `delta`: all entries that concern a unit, over all runs."""
        return self.ledger.epsilon(self.delta, self.run)

    # --- sampling ---------------------------------------------------------------------------------

    def renew(self) -> None:
        """Draw a new key: after a restored checkpoint no noise may come twice."""
        secret = secrets.randbits(256) if self._fixed_secret is None else self._fixed_secret
        self._key = secret.to_bytes(32, "little")
        self._newest = -1

    def draw(self, number: int) -> Draw:
        """The Poisson sample of step `number`: each unit with `sample_rate`; it may be empty."""
        if number <= self._newest:
            self.renew()
        self._newest = number
        sample, noise, seeds = (
            KeyStream(self._key, number, purpose)
            for purpose in (Purpose.SAMPLE, Purpose.NOISE, Purpose.SEEDS)
        )
        chosen = np.flatnonzero(sample.uniform(self.units).numpy() < self.sample_rate)
        rows = [self.rows_of_unit[unit] for unit in chosen]
        if self.settings.unit == "patient":
            most = self.settings.images_per_patient
            rows = [
                row if len(row) <= most else row[sample.uniform(len(row)).argsort().numpy()[:most]]
                for row in rows
            ]
        units = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        host_seed, device_seed = (seeds.words(2) & (2**63 - 1)).tolist()
        host = torch.Generator().manual_seed(host_seed)
        device = torch.Generator(self.device).manual_seed(device_seed)
        index = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        return Draw(index, torch.from_numpy(units).to(self.device), host, device, noise)

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
        """Set the gradients of D: clip, sum, add noise, round, divide by the expected batch size.

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
                release(total, draws, noise * clip) / expected
            )
        if not self.settings.r_t_noise:
            return 0.0, 0
        counts = torch.bincount(draw.units)
        signs = torch.zeros(len(counts), dtype=torch.float64, device=self.device)
        signs.index_add_(0, draw.units, found.real_logits.double().sign().nan_to_num())
        noisy = release(
            (signs / counts).sum(), draw.normal((), self.device), self.settings.r_t_noise
        )
        return float(noisy), max(1, round(expected))

    def release_labels(self, dataset: ImageDataset) -> np.ndarray:
        """Label frequencies (K,) from noisy counts: of classes, or of each label on its own.

        Reserve it in the ledger first; the Trainer keeps the result. A unit counts 1 in all (the
        images of a patient share it), and up to √K over labels that can occur together: the counts
        get `privacy.label_noise` times that.
        """
        reach = 1.0 if dataset.exclusive else max(1, dataset.label_dim) ** 0.5
        self.renew()  # a key of its own, whatever steps came before
        size = np.bincount(self.unit_of_row, minlength=self.units)
        counts = torch.from_numpy((dataset.labels / size[self.unit_of_row, None]).sum(axis=0))
        draws = KeyStream(self._key, 0, Purpose.LABELS).normal(tuple(counts.shape))
        noisy = release(counts, draws, self.settings.label_noise * reach).clamp(min=0.0).numpy()
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
    delta, steps = delta_of(privacy, units), steps_of(planned_images, batch_size)
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
    delta = delta_of(privacy, units)
    if delta > 1 / units:
        raise ConfigError(
            f"privacy.delta = {delta:g} is more than 1/n of the n {privacy.unit}s of "
            f"'{dataset.name}': it allows the full disclosure of one of them; lower it, or set 0 "
            "for the smaller of 1e-5 and 1/(10 n)"
        )
    return batch_size / len(dataset), delta


def delta_of(privacy: PrivacySettings, units: int) -> float:
    """δ for `units` images or patients: `privacy.delta`, or the smaller of 1e-5 and 1/(10 n).

    A release of one unit chosen at random holds with ε = 0 and δ = 1/n. The default allows a
    disclosure of anybody with a probability of at most 1/10.
    """
    return privacy.delta or min(MAX_DELTA, 0.1 / units)


def label_release(settings: Settings, label_dim: int) -> list[Mechanism]:
    """The release of the label counts as mechanisms; empty where none are released."""
    return (
        [Mechanism(settings.privacy.label_noise, 1.0, 1)]
        if releases_labels(settings, label_dim)
        else []
    )


def units_of(dataset: ImageDataset, unit: str) -> tuple[np.ndarray, int]:
    """(unit of each row (N,), number of units). An image without a patient is its own unit."""
    numbers = np.arange(len(dataset)) if unit == "image" else unit_numbers(dataset)
    return numbers, int(numbers.max(initial=-1)) + 1


def _rows_of(unit_of_row: np.ndarray, units: int) -> list[np.ndarray]:
    order = np.argsort(unit_of_row, kind="stable")
    return np.split(order, np.cumsum(np.bincount(unit_of_row, minlength=units))[:-1])
