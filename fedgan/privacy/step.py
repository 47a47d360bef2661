"""The private half of a training step: which images are looked at, and the noisy gradient that comes of it.

Only D sees real images, so only D's gradient gets noise. The generator learns from D and from its own images alone: all that
is derived from it is post-processing (arXiv 1607.00133, section 3), and noise on it would buy nothing.

The secret. Everybody knows `settings.seed`: the server sends it. Whoever can compute the noise can subtract it, and whoever
knows which images were drawn gains nothing from the drawing. So the Poisson sample, the noise and every other draw of
D's step come from a secret of this process (the system's entropy), which is never stored, sent or replayed: a restored
checkpoint gets new noise. The generators are not cryptographic (the privacy page says so), but the noise has all of the
secret's 128 bits: PyTorch's own CPU generator keeps 32 bits of a seed, so few that trying each would find the noise.

What is not covered: how long a step takes (it grows with the sample), and the rounding of floating-point sums, by which a
unit may move a sum a little further than the clip (arXiv 2207.10635); the noise is larger by many orders.
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
    """What a Trainer needs of a ledger (fedgan/privacy/ledger.py)."""

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
    """What one step of D looks at: rows (B,), the unit of each (B,), and the generators of all its other draws.

    `noise` is for what hides the sample, and for nothing else.
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
        )  # CUDA's generator keeps all of it
        return torch.randn(shape, generator=seeded, device=device)


class PrivateStep:
    """DP-SGD for one hospital's discriminator.

    `planned_images`: real images that this hospital's whole run shows, from which the noise for `privacy.epsilon` follows.
    `least_noise`: a noise multiplier that is raised to (`privacy.noise_split = "equal"`: what the hospital that needs most
    needs). `secret`: for tests alone, that want the same noise twice; without it the noise is nobody's to know.
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
        self._given = secret
        self.renew()
        self._paid = 0
        self.labels = label_release(settings, dataset.label_dim)
        own = noise_multiplier(
            settings, dataset.label_dim, len(dataset), self.units, batch_size, planned_images
        )
        self.noise_multiplier = max(own, least_noise)
        self.step = Mechanism(self.joint_multiplier, self.sample_rate, 1)

    # --- what it costs -----------------------------------------------------------------------------

    @property
    def joint_multiplier(self) -> float:
        """Of gradient and signs together, which are released from the same sample."""
        return joint_noise(
            self.noise_multiplier, *([self.settings.r_t_noise] if self.settings.r_t_noise else [])
        )

    def reserve(self, steps: int, kind: str = STEPS) -> int:
        """Enter `steps` steps in the ledger before they are done; fewer than asked when `privacy.max_epsilon` ends them."""
        what = self.step if kind == STEPS else self.labels[0]
        allowed = self.ledger.reserve(
            what,
            steps,
            run=self.run,
            kind=kind,
            unit=self.settings.unit,
            delta=self.delta,
            data=self.data,
            max_epsilon=self.settings.max_epsilon,
        )
        self._paid += allowed if kind == STEPS else 0
        return allowed

    def epsilon(self) -> float:
        """ε at `delta` of all that the ledger holds, over all runs."""
        return self.ledger.epsilon(self.delta)

    # --- what is drawn -----------------------------------------------------------------------------

    def renew(self) -> None:
        """Draw a new secret: after a checkpoint was restored no noise may come twice."""
        self._secret = secrets.randbits(128) if self._given is None else self._given
        self._newest = -1

    def draw(self, number: int) -> Draw:
        """The Poisson sample of step `number` (each unit with probability `sample_rate`; it may be empty)."""
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

    # --- what is released --------------------------------------------------------------------------

    def gradient(
        self,
        discriminator: nn.Module,
        loss: Loss,
        fakes: tuple[Tensor, Tensor],
        reals: tuple[Tensor, Tensor],
        draw: Draw,
        r1_weight: float = 0.0,
    ) -> tuple[float, int]:
        """Set the gradients of D's parameters: clip, sum, then noise, then divide by the batch size that is expected.

        Returns (sum of the signs of D on real images, their number), with the noise of `privacy.r_t_noise` and the number
        that is expected; (0, 0) where that is off. Raises `FedganError` for a step that no `reserve` has paid for.
        """
        if self._paid < 1:
            raise FedganError(
                "a step of D on private images that the ledger knows nothing of: reserve it first"
            )
        self._paid -= 1
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
        """Frequencies (K,) of the labels from noisy counts: of the classes where they exclude each other, else of each label.

        Enter it in the ledger first, and once: the Trainer keeps the result. A unit counts 1 in all (a patient's images share
        it), and √K at most over labels that do not exclude each other, so the counts get `privacy.label_noise` times as much.
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
    """Whether a private run releases the counts of its labels: they are asked for, there are some, and they get noise.

    `label_dim`: the number of labels; 1 stands for any number, where it is not known yet.
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
    """The gradient's noise multiplier of a hospital with `images` images of `units` images or patients, and `label_dim` labels.

    With `privacy.epsilon`, what is left for the gradient beside the released labels and the noisy signs of `r_t_noise`, so
    that `planned_images` images shown in batches of `batch_size` cost that much. `privacy.noise_split = "equal"`: a
    federation gives each hospital the largest of these. Raises `ConfigError` where no noise is enough.
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
            f"privacy.r_t_noise = {signs:g} leaves nothing for the gradient, whose steps need a noise multiplier of "
            f"{joint:.3g} together with it: raise privacy.r_t_noise or set it to 0 with augment.mode = 'fixed'"
        )
    return (joint**-2 - signs**-2) ** -0.5


def steps_of(planned_images: float, batch_size: int) -> int:
    """The steps in which `planned_images` images are shown."""
    return max(1, -(-int(planned_images) // batch_size))


def rate_and_delta(
    privacy: PrivacySettings, dataset: ImageDataset, units: int, batch_size: int
) -> tuple[float, float]:
    """(sampling rate, δ). Raises `ConfigError` for a rate above 1, and for a δ above 1 / `units`."""
    if batch_size > len(dataset):
        raise ConfigError(
            f"training.batch_size = {batch_size} is more than the {len(dataset)} images of '{dataset.name}': a Poisson "
            "sample cannot be larger than what it is drawn from; lower it, or set federation.batch = 'shared'"
        )
    delta = privacy.delta or 1 / units
    if delta > 1 / units:
        raise ConfigError(
            f"privacy.delta = {delta:g} is more than 1/n of the n {privacy.unit}s of '{dataset.name}': giving one away whole "
            "would keep that promise; lower it, or set 0 for 1/n"
        )
    return batch_size / len(dataset), delta


def label_release(settings: Settings, label_dim: int) -> list[Mechanism]:
    """What the release of the labels' counts is to the accountant; nothing where none are released."""
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
            f"privacy.unit = 'patient', but '{dataset.name}' names no patients: import it with patients, or use 'image'"
        )
    names, index = np.unique(dataset.patients, return_inverse=True)
    return index, len(names)


def _rows_of(unit_of_row: np.ndarray, units: int) -> list[np.ndarray]:
    order = np.argsort(unit_of_row, kind="stable")
    return np.split(order, np.cumsum(np.bincount(unit_of_row, minlength=units))[:-1])
