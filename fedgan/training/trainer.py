"""The one Trainer: centralised, local and federated arms all train with this loop and no other.

It advances by images shown to the discriminator and holds everything that the next step depends on, so that
stopping, saving, loading and going on gives bit for bit what an undisturbed run gives (on a CPU, with the same
number of threads; CUDA adds in no fixed order), and a federation of one hospital is centralised training.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedgan.config import Settings
from fedgan.data.dataset import ImageDataset
from fedgan.errors import CheckpointError, ConfigError, DataError, FedganError, MachineError
from fedgan.models.stylegan2.discriminator import Discriminator
from fedgan.models.stylegan2.generator import Generator
from fedgan.privacy.step import LABELS, PrivateStep, releases_labels
from fedgan.training import losses
from fedgan.training.ada import AdaController
from fedgan.training.augment import AugmentPipe
from fedgan.training.checkpoint import (
    lists_of,
    load_into,
    load_tensors,
    numbered,
    save_tensors,
    with_prefix,
)
from fedgan.training.ema import ema_decay, ema_update, half_life_kimg
from fedgan.training.labels import draw_labels
from fedgan.training.optimizer import adam, load_optimizer, optimizer_tensors, pull_towards
from fedgan.training.sampler import PoissonSampler, Sampler
from fedgan.training.variates import ControlVariates

PATH_LENGTH_DECAY = 0.01
STATE_KEYS = (
    "images_seen",
    "steps",
    "g_steps",
    "since_g",
    "goal",
    "sampler",
    "ada",
    "labels",
    "device",
    "stream",
    "data",
)
MOST_WAITING = 16  # how many times training.d_steps the generator waits for D at most
SYNTHESIS_CHUNK = (
    256  # images that are synthesised at once in a private step, whose batch may be thousands
)
PATH_LENGTH_BATCH_SHARE = (
    2  # path lengths are measured on half a batch (arXiv 1912.04958, appendix B)
)


class Trainer:
    """Trains one StyleGAN2-ADA on one dataset.

    Networks are initialised from `settings.seed` alone, the same in every hospital; every other draw comes
    from (seed, `stream`), where `stream` is the hospital's number. `places` (N,): the number of each image's hospital, where the
    dataset is pooled and the networks tell hospitals apart (`model.hospitals`); else all are `stream`'s. `device` is
    'cpu', 'cuda' or 'auto'. `private`: what `make_private` gave, where `settings.privacy` is on; D's step is then DP-SGD's
    and draws from a secret.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: ImageDataset,
        device: str = "cpu",
        stream: int = 0,
        private: PrivateStep | None = None,
        places: np.ndarray | None = None,
    ) -> None:
        if settings.privacy.on and private is None:
            raise ConfigError(
                "privacy is on, but this Trainer was given no ledger to enter its steps in: it would count nothing"
            )
        if dataset.resolution != settings.data.resolution:
            raise ConfigError(
                f"data.resolution = {settings.data.resolution}, but the images of '{dataset.name}' "
                f"are {dataset.resolution} pixels wide"
            )
        if not len(dataset):
            raise DataError(
                f"'{dataset.name}' has no training image: check the splits of its shard"
            )
        self.settings, self.dataset, self.stream = settings, dataset, stream
        self.places = np.full(len(dataset), stream) if places is None else places
        self.device = resolve_device(device)
        training, model = settings.training, settings.model
        self.batch_size = training.batch_size
        self.generator_batch = training.generator_batch or training.batch_size
        self.dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32

        # Networks. One generator of random numbers feeds both, in this order, whatever the device.
        init = torch.Generator().manual_seed(settings.seed)
        shape = (settings.data.resolution, dataset.channels, dataset.label_dim)
        self.generator = Generator(model, *shape, init)
        self.discriminator = Discriminator(model, *shape, init)
        for network in (self.generator, self.discriminator):
            network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            network.dtype = self.dtype
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self._set_label_shares()
        self.d_average = (
            copy.deepcopy(self.discriminator).requires_grad_(False) if training.d_average else None
        )

        # Optimisers, with the correction for regularisers that run now and then.
        g_interval = training.path_length_interval if training.path_length_weight else 0
        self.g_adam = adam(self.generator, training.learning_rate, g_interval)
        self.d_adam = adam(
            self.discriminator, training.learning_rate, training.r1_interval if self.r1_gamma else 0
        )

        # Randomness: `host` for choices made on the CPU, `noise` for latents and noise on the device.
        seeds = np.random.SeedSequence([settings.seed, stream]).generate_state(
            2, np.uint64
        ) >> np.uint64(1)
        self.host = torch.Generator().manual_seed(int(seeds[0]))
        self.noise = torch.Generator(self.device).manual_seed(int(seeds[1]))
        kind = PoissonSampler if training.sampling == "poisson" else Sampler
        self.sampler = kind(len(dataset), settings.seed, stream)

        # Privacy: whose D's step is DP-SGD's. The labels' frequencies are released once, with noise, when first asked for.
        self.private = private
        self.label_weights: list[float] = []

        self.pipe = AugmentPipe(settings.augment.pipe)
        self.ada = AdaController(settings.augment)
        self.path_length_mean = torch.zeros((), device=self.device)
        self.images_seen = 0
        self.steps = 0  # of D
        self.g_steps = 0
        self.since_g = training.d_steps  # D's steps since G's last one
        self.exhausted = False
        self._goal = 0
        self._anchor: dict[str, list[Tensor]] = {}
        self._variates = ControlVariates()

    # --- the loop --------------------------------------------------------------------------------

    def train(
        self, images: int, on_step: Callable[[Trainer], None] | None = None
    ) -> dict[str, float]:
        """Advance by `images` real images; return the means of this call.

        Goals add up over calls: whole batches are shown until the sum of all goals is reached, so that a
        budget cut into rounds is the same budget. Keys: loss_g, loss_d, r1, path_length (where measured),
        r_t, p, images, seconds, core_seconds (of this process). Raises `FedganError` when a loss is no longer finite.

        With privacy: what D says of real images is not measured (it would be released uncounted), `epsilon` is what the
        ledger holds, and `exhausted` is set, with fewer images shown, when the ledger allows no further step.
        """
        start, core_start, before = time.perf_counter(), time.process_time(), self.images_seen
        self._goal += images
        if self.private is not None:
            self._reserve(self.private)
        measured: dict[str, list[Tensor]] = defaultdict(list)
        steps = self._steps_left()
        while self.images_seen < self._goal:
            self._step(measured)
            self._variates.apply(self.parts, 1 / steps)
            if on_step is not None:
                on_step(self)
        result = {name: float(torch.stack(values).mean()) for name, values in measured.items()}
        if not all(np.isfinite(value) for value in result.values()):
            raise FedganError(
                f"training diverged after {self.images_seen} images (a loss is not finite): "
                "lower training.learning_rate or raise training.r1_gamma, and resume from the last round"
            )
        result |= (
            {"r_t": self.ada.r_t, "p": self.ada.p}
            if self.private is None
            else self.private.facts(self.ada.r_t, self.ada.p)
        )
        spent = {
            "seconds": time.perf_counter() - start,
            "core_seconds": time.process_time() - core_start,
        }
        return result | {"images": self.images_seen - before} | spent

    def _step(self, measured: dict[str, list[Tensor]]) -> None:
        if self.since_g >= self.settings.training.d_steps:
            self._generator_step(measured)
        self.discriminator.requires_grad_(True)
        if self.private is None:
            self._discriminator_step(measured)
        else:
            self._private_discriminator_step(self.private)
        if self.d_average is not None:
            ema_update(self.d_average, self.discriminator, self.settings.training.d_average)

        # ---- the average generator, and the strength of augmentation
        if self.since_g == 0:
            shown = self.batch_size * self.settings.training.d_steps
            decay = ema_decay(
                shown, self.ema_half_life_kimg, self.settings.training.ema_rampup, self.images_seen
            )
            ema_update(self.ema, self.generator, decay)
        self.ada.step()
        self.images_seen += self.batch_size
        self.steps += 1
        self.since_g += 1

    def _generator_step(self, measured: dict[str, list[Tensor]]) -> None:
        """One step of G, unless it waits for D (`training.d_accuracy`). It looks at no real image."""
        training, batch = self.settings.training, self.generator_batch
        critic = self.discriminator if self.d_average is None else self.d_average
        critic.requires_grad_(False)

        # ---- generator: fool the discriminator
        fake_c = self._fake_labels(batch)
        fake = self._synthesise(self._styles(fake_c, track=True))
        logits = critic(self._augment(fake), fake_c)
        accuracy = (logits.detach() < 0).float().mean()
        measured["d_accuracy"].append(accuracy)
        if self.since_g < MOST_WAITING * training.d_steps and accuracy < training.d_accuracy:
            return
        loss_g = losses.generator_loss(logits)
        self._update(self.g_adam, loss_g, "generator")
        measured["loss_g"].append(loss_g.detach())

        # ---- generator: path length, now and then
        if training.path_length_weight and self.g_steps % training.path_length_interval == 0:
            ws = self._styles(self._fake_labels(max(1, batch // PATH_LENGTH_BATCH_SHARE)))
            images = self._synthesise(ws)
            lengths = losses.path_lengths(images, ws, self._randn(images.shape))
            self.path_length_mean = self.path_length_mean.lerp(
                lengths.detach().mean(), PATH_LENGTH_DECAY
            )
            penalty = (lengths - self.path_length_mean).square().mean()
            self._update(
                self.g_adam,
                penalty * (training.path_length_weight * training.path_length_interval),
                "generator",
            )
            measured["path_length"].append(lengths.detach().mean())
        self.g_steps += 1
        self.since_g = 0

    def _discriminator_step(self, measured: dict[str, list[Tensor]]) -> None:
        """One step of D: tell fake from real, both in one pass; and R1 now and then."""
        training = self.settings.training
        real, real_c = self._real_batch()
        if not len(real):
            return  # an empty Poisson sample
        with torch.no_grad():
            fake_c = self._fake_labels(len(real))
            shown = self._augment(torch.cat([self._synthesise(self._styles(fake_c)), real]))
        fake_logits, real_logits = self.discriminator(
            shown, torch.cat([fake_c, real_c]), halves=2
        ).chunk(2)
        loss_d = losses.discriminator_loss(fake_logits, real_logits)
        self._update(self.d_adam, loss_d, "discriminator")
        self.ada.observe(real_logits.detach())
        measured["loss_d"].append(loss_d.detach())

        # ---- R1 on the images as D saw them
        if self.r1_gamma and self.steps % training.r1_interval == 0:
            seen = shown[len(real) :].detach().requires_grad_(True)
            penalty = losses.r1_penalty(self.discriminator(seen, real_c), seen).mean()
            self._update(
                self.d_adam, penalty * (self.r1_gamma / 2 * training.r1_interval), "discriminator"
            )
            measured["r1"].append(penalty.detach())

    def _private_discriminator_step(self, private: PrivateStep) -> None:
        """One step of D by DP-SGD: one clipped gradient a unit, of its real and its fake image together, and one noise.

        All of its draws are the secret's: even the number of random numbers that it uses would tell the size of the sample.
        """
        draw = private.draw(self.steps)
        real, real_c = self._real_batch(draw.rows, draw.host)
        with torch.no_grad():
            fake_c = self._fake_labels(len(real), draw.host)
            # One draw of styles for the whole step: what fakes share must not depend on where the sample's chunks end.
            ws = self._styles(fake_c, randomness=(draw.host, draw.device))
            parts = [
                self._synthesise(some, draw.device)
                for some in ws.split(SYNTHESIS_CHUNK)
                if len(some)
            ]
            shown = (
                self._augment(torch.cat([*parts, real]), draw.host)
                if len(real)
                else torch.cat([real, real])
            )
        signs, count = private.gradient(
            self.discriminator,
            losses.discriminator_loss,
            (shown[: len(real)], fake_c),
            (shown[len(real) :], real_c),
            draw,
            self.r1_gamma / 2 if self.settings.privacy.r1 else 0.0,
        )
        self._apply(self.d_adam, "discriminator")
        if count:
            self.ada.observe_sum(signs, count)

    def _reserve(self, private: PrivateStep) -> None:
        """Enter the steps up to the goal in the ledger before the first of them; shorten the goal where it allows fewer."""
        if releases_labels(self.settings, self.dataset.label_dim) and not self.label_weights:
            if not private.reserve(1, LABELS):
                self._goal, self.exhausted = self.images_seen, True
                return
            self.label_weights = private.release_labels(self.dataset).tolist()
        wanted = self._steps_left()
        allowed = private.reserve(wanted) if wanted else 0
        if allowed < wanted:
            self._goal, self.exhausted = self.images_seen + allowed * self.batch_size, True

    def _steps_left(self) -> int:
        return max(0, -(-(self._goal - self.images_seen) // self.batch_size))

    def restore_progress(self, images_seen: int, p: float) -> None:
        """Count `images_seen` images that the received model was shown before, and augment with strength `p` from the start.

        For a Trainer that takes a model over from another training: its averages (of weights and of w) and ADA then go on
        and do not begin anew. Adam's moments and the mean of path lengths do: they never left that training.
        """
        self.images_seen = self._goal = images_seen
        self.steps = images_seen // self.batch_size
        self.g_steps = (
            self.steps // self.settings.training.d_steps
        )  # else the first batch of w would replace w_avg
        self.ada.p = p

    def at(self, number: int) -> None:
        """Take all images for those of hospital `number` of the federation that the model comes from."""
        self.places = np.full(len(self.dataset), number)
        self._set_label_shares()

    # --- the parts of a step ---------------------------------------------------------------------

    def _real_batch(
        self, rows: np.ndarray | None = None, host: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        rows, host = self.sampler.take(self.batch_size) if rows is None else rows, host or self.host
        images, labels = self.dataset.batch(rows)
        real = images.to(self.device, non_blocking=True).float() / 127.5 - 1
        if self.settings.augment.mirror:
            flip = (torch.rand(len(real), 1, 1, 1, generator=host) < 0.5).to(self.device)
            real = torch.where(flip, real.flip(3), real)
        return real, self._condition(labels, rows).to(self.device, non_blocking=True)

    def _fake_labels(self, count: int, host: torch.Generator | None = None) -> Tensor:
        """Labels (count, K) for the generator: as frequent as in the hospital's own images, or as `training.labels` asks."""
        host = host or self.host
        if self.private is None and self.settings.training.labels == "data":
            rows = torch.randint(len(self.dataset), (count,), generator=host).numpy()
            labels = self._condition(
                torch.from_numpy(self.dataset.labels[rows].astype(np.float32)), rows
            )
        else:
            labels = draw_labels(
                self.label_weights, self.dataset.label_dim, self.dataset.exclusive, count, host
            )
        return labels.to(self.device, non_blocking=True)

    def _condition(self, labels: Tensor, rows: np.ndarray) -> Tensor:
        """The labels (B, K) of the rows, and behind them their hospitals (B, H) where the networks tell them apart."""
        if not self.settings.model.hospitals:
            return labels
        hospital = torch.from_numpy(self.places[rows]).long()
        return torch.cat(
            [labels, nn.functional.one_hot(hospital, self.settings.model.hospitals).float()], dim=1
        )

    def _set_label_shares(self) -> None:
        """Let the networks know how often each hospital has each label among the images here, for whoever asks by label alone."""
        of = {number: self.places == number for number in range(self.settings.model.hospitals)}
        shares = {
            number: (int(mine.sum()), self.dataset.labels[mine].sum(0, dtype=int).tolist())
            for number, mine in of.items()
        }
        for mapping in (self.generator.mapping, self.ema.mapping, self.discriminator.mapping):
            if mapping is not None:
                mapping.hospital_condition.set_label_counts(shares, self.dataset.exclusive)

    def _randn(self, shape: Iterable[int], noise: torch.Generator | None = None) -> Tensor:
        return torch.randn(tuple(shape), generator=noise or self.noise, device=self.device)

    def _styles(
        self,
        c: Tensor,
        track: bool = False,
        randomness: tuple[torch.Generator, torch.Generator] | None = None,
    ) -> Tensor:
        """ws (B, L, w_dim) of fresh latents; from a random layer on, those of a second latent (style mixing)."""
        host, noise = randomness or (self.host, self.noise)
        mapping, depth = self.generator.mapping, self.generator.synthesis.num_ws
        w = mapping(self._randn((len(c), mapping.z_dim), noise), c)
        if track:
            mapping.track(w, self.g_steps)
        ws = w.unsqueeze(1).expand(-1, depth, -1)
        if torch.rand((), generator=host) < self.settings.training.style_mixing:
            cut = int(torch.randint(1, depth, (), generator=host))
            other = (
                mapping(self._randn((len(c), mapping.z_dim), noise), c)
                .unsqueeze(1)
                .expand(-1, depth - cut, -1)
            )
            ws = torch.cat([ws[:, :cut], other], dim=1)
        return ws

    def _synthesise(self, ws: Tensor, noise: torch.Generator | None = None) -> Tensor:
        return self.generator.synthesis(ws, "random", noise or self.noise)

    def _augment(self, images: Tensor, host: torch.Generator | None = None) -> Tensor:
        return images if self.ada.p == 0 else self.pipe(images, self.ada.p, host or self.host)

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor, part: str) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._apply(optimizer, part)

    def _apply(self, optimizer: torch.optim.Optimizer, part: str) -> None:
        if part in self._anchor:
            pull_towards(optimizer, self._anchor[part], self.settings.training.proximal_mu)
        optimizer.step()

    # --- settings that depend on others ----------------------------------------------------------

    @property
    def r1_gamma(self) -> float:
        given = self.settings.training.r1_gamma
        return (
            losses.default_r1_gamma(self.settings.data.resolution, self.batch_size)
            if given < 0
            else given
        )

    @property
    def ema_half_life_kimg(self) -> float:
        return half_life_kimg(self.settings.training, self.batch_size)

    # --- what travels ----------------------------------------------------------------------------

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator, "ema": self.ema}

    def outgoing(self, parts: Iterable[str]) -> dict[str, np.ndarray]:
        """Copies of the named parts: `part/name` → float32 array of at least one dimension, sorted by name.

        Constants (filters, noise images) are not among them.
        """
        arrays = {
            f"{part}/{name}": tensor.detach().cpu().numpy().copy()
            for part in parts
            for name, tensor in self.parts[part].state_dict().items()
        }
        return {
            name: np.ascontiguousarray(arrays[name], dtype=np.float32) for name in sorted(arrays)
        }

    def incoming(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over the parts in `arrays`; parts that are not there stay as they are.

        Raises `CheckpointError` when names or shapes are not this model's; nothing is changed then. With
        `training.proximal_mu` the received weights become the anchor of the proximal term (arXiv 1812.06127), with
        `federation.control_variates` their distance from the own ones corrects the next rounds (arXiv 1910.06378).
        """
        tensors = {
            name: torch.from_numpy(np.array(array, dtype=np.float32))
            for name, array in arrays.items()
        }
        known = {f"{part}/" for part in self.parts}
        if strangers := [name for name in tensors if name.split("/")[0] + "/" not in known]:
            raise CheckpointError(f"the model that arrived has an unknown part '{strangers[0]}'")
        given = {part: with_prefix(tensors, f"{part}/") for part in self.parts}
        for part, weights in given.items():
            if weights:
                load_into(self.parts[part], weights, f"the {part} that arrived", check_only=True)
        for part, weights in given.items():
            if weights:
                corrected = self.settings.federation.control_variates and part != "ema"
                made = (
                    [parameter.detach().clone() for parameter in self.parts[part].parameters()]
                    if corrected
                    else []
                )
                before = (
                    copy.deepcopy(self.parts[part])
                    if part == "discriminator" and self.d_average is not None
                    else None
                )
                load_into(self.parts[part], weights, f"the {part} that arrived")
                if before is not None:
                    self._move_average(before)
                if self.settings.training.proximal_mu and part != "ema":
                    self._anchor[part] = [
                        parameter.detach().clone() for parameter in self.parts[part].parameters()
                    ]
                if corrected:
                    self._variates.arrived(part, made, self.parts[part])

    def _move_average(self, before: nn.Module) -> None:
        """Let the average of D follow a D that arrived; `before`: D until then. An average of nothing yet is that D."""
        assert self.d_average is not None
        with torch.no_grad():
            parts = (
                self.d_average.parameters(),
                before.parameters(),
                self.discriminator.parameters(),
            )
            for average, old, new in zip(*parts, strict=True):
                average.copy_(new if not self.steps else average + (new - old))

    # --- the whole state -------------------------------------------------------------------------

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """(tensors, plain values): everything that the next step depends on."""
        tensors = {
            f"{part}/{name}": tensor
            for part, module in self.parts.items()
            for name, tensor in module.state_dict().items()
        }
        if self.d_average is not None:
            tensors |= {
                f"d_average/{name}": tensor for name, tensor in self.d_average.state_dict().items()
            }
        tensors |= optimizer_tensors(self.g_adam, self.generator, "g_adam/")
        tensors |= optimizer_tensors(self.d_adam, self.discriminator, "d_adam/")
        tensors |= numbered(self._anchor, "anchor/")
        tensors |= self._variates.tensors()
        tensors |= {
            "rng/host": self.host.get_state(),
            "rng/noise": self.noise.get_state(),
            "path_length_mean": self.path_length_mean,
        }
        plain: dict[str, object] = {
            "images_seen": self.images_seen,
            "steps": self.steps,
            "g_steps": self.g_steps,
            "since_g": self.since_g,
            "labels": self.label_weights,
            "goal": self._goal,
            "sampler": self.sampler.state(),
            "ada": self.ada.state(),
            "device": self.device.type,
            "stream": self.stream,
            "data": self._fingerprint(),
        }
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}, plain

    def load_state_dict(
        self, state: tuple[Mapping[str, Tensor], Mapping[str, object]], where: str = "the state"
    ) -> None:
        """Go on from `state_dict()`. Raises `CheckpointError` when it belongs to another model, shard or device."""
        tensors, plain = state
        if missing := [key for key in STATE_KEYS if key not in plain]:
            raise CheckpointError(f"{where} is no Trainer's state: it lacks '{missing[0]}'")
        ours = {"device": self.device.type, "stream": self.stream}
        for key, value in ours.items():
            if plain.get(key) != value:
                raise CheckpointError(
                    f"{where} belongs to {key} '{plain.get(key)}', this is {key} '{value}': it cannot be continued here"
                )
        sampler: dict[str, int] = plain["sampler"]  # type: ignore[assignment]
        if sampler["size"] != len(self.dataset):
            raise CheckpointError(
                f"{where} was made with {sampler['size']} images, the shard now has {len(self.dataset)}: start a new run"
            )
        if plain["data"] != self._fingerprint():
            raise CheckpointError(
                f"{where} was made with other images or labels than the shard now has: start a new run"
            )
        for check_only in (True, False):  # nothing is changed unless all of it fits
            for part, module in self.parts.items():
                load_into(module, with_prefix(tensors, f"{part}/"), where, check_only)
            if self.d_average is not None:
                load_into(self.d_average, with_prefix(tensors, "d_average/"), where, check_only)
        load_optimizer(self.g_adam, self.generator, tensors, "g_adam/")
        load_optimizer(self.d_adam, self.discriminator, tensors, "d_adam/")
        self._anchor = lists_of(tensors, "anchor/", self.device)
        if self.settings.federation.control_variates:
            self._variates.load(tensors, self.device)
        self.host.set_state(tensors["rng/host"])
        self.noise.set_state(tensors["rng/noise"])
        self.path_length_mean = tensors["path_length_mean"].to(self.device).reshape(())
        self.sampler.load_state(sampler)
        self.ada.load_state(plain["ada"])  # type: ignore[arg-type]
        self.label_weights = [float(weight) for weight in plain["labels"]]  # type: ignore[attr-defined]
        numbers = ("images_seen", "steps", "g_steps", "since_g", "goal")
        self.images_seen, self.steps, self.g_steps, self.since_g, self._goal = (
            int(plain[key])  # type: ignore[call-overload]
            for key in numbers
        )
        if self.private is not None:
            self.private.renew()  # the noise of the steps after this state must not come a second time

    def _fingerprint(self) -> str:
        """Hash of the shard's content and of the labels as they are used here."""
        labels = np.ascontiguousarray(self.dataset.labels)
        return hashlib.sha256(
            f"{self.dataset.content_hash} {labels.shape}".encode() + labels.tobytes()
        ).hexdigest()

    def save(self, path: Path) -> None:
        """Write the whole state to `path` (.safetensors) and the .json beside it, atomically."""
        tensors, plain = self.state_dict()
        save_tensors(path, tensors, plain)

    def load(self, path: Path) -> None:
        """Go on from a file that `save` wrote. Raises `CheckpointError` when it is missing, damaged or another's."""
        self.load_state_dict(load_tensors(path), f"checkpoint {path.name}")


def resolve_device(name: str) -> torch.device:
    """'auto' is CUDA where it is there. Raises `MachineError` for 'cuda' on a machine without."""
    if name == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "training.device = 'cuda', but this machine has no CUDA device: use auto or cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        torch.backends.cudnn.benchmark = True
    return torch.device(name)
