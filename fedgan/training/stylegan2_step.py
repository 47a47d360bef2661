"""Training step of StyleGAN2-ADA: Gmain, Gpl, Dmain, Dr1 (arXiv 1912.04958, 2006.06676)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedgan.config import Settings
from fedgan.models.stylegan2.discriminator import Discriminator
from fedgan.models.stylegan2.generator import Generator
from fedgan.privacy.clipping import exact_kernels
from fedgan.privacy.step import PrivateStep
from fedgan.privacy.validator import check_modules
from fedgan.training import losses
from fedgan.training.ada import AdaController
from fedgan.training.augment import AugmentPipe
from fedgan.training.batches import Batches, Streams
from fedgan.training.ema import ema_update
from fedgan.training.optimizer import adam, load_optimizer, optimizer_tensors
from fedgan.training.proximal import ProximalTerm
from fedgan.training.step import Measured

PATH_LENGTH_DECAY = 0.01
PATH_LENGTH_BATCH_SHARE = 2  # Gpl uses half a batch (arXiv 1912.04958, appendix B)
MAX_WAITING = 16  # G waits for D at most so many times training.d_steps
SYNTHESIS_CHUNK = 256  # images synthesised at once in a private step, whose batch may be thousands


class StyleGAN2Step:
    """Networks, optimisers, ADA and counters of StyleGAN2-ADA.

    `steps` counts steps of D, `g_steps` of G, `since_g` those of D since G's last one. With
    `private`, D's step is DP-SGD and draws from a secret; G's never sees a real image.
    """

    state_keys = ("steps", "g_steps", "since_g", "ada")

    def __init__(
        self,
        settings: Settings,
        batches: Batches,
        streams: Streams,
        proximal: ProximalTerm,
        private: PrivateStep | None,
    ) -> None:
        training, data = settings.training, batches.dataset
        self.settings, self.training, self.batches = settings, training, batches
        self.streams, self.proximal, self.private = streams, proximal, private
        self.batch_size = training.batch_size
        self.generator_batch = training.generator_batch or training.batch_size
        self.images_per_update = training.batch_size * training.d_steps
        self.r1_gamma = training.r1_gamma
        if self.r1_gamma < 0:
            self.r1_gamma = losses.default_r1_gamma(data.resolution, self.batch_size)

        # ---- networks: one CPU generator initialises G, then D, on any device
        init = torch.Generator().manual_seed(settings.seed)
        shape = (data.resolution, data.channels, data.label_dim)
        self.generator = Generator(settings.model, *shape, init)
        self.discriminator = Discriminator(settings.model, *shape, init)
        for network in (self.generator, self.discriminator):
            layout = {"device": batches.device, "memory_format": torch.channels_last}
            network.to(**layout)  # type: ignore[call-overload]
            network.dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
        if private is not None:
            check_modules(self.discriminator, data)
        self.networks: dict[str, Any] = {
            "generator": self.generator,
            "discriminator": self.discriminator,
        }
        self.d_average: Discriminator | None = None
        if training.d_average:
            self.d_average = copy.deepcopy(self.discriminator).requires_grad_(False)
            self.networks["d_average"] = self.d_average

        # ---- optimisers, corrected for lazy regularisation
        g_interval = training.path_length_interval if training.path_length_weight else 0
        d_interval = training.r1_interval if self.r1_gamma else 0
        self.g_adam = adam(self.generator, training.learning_rate, g_interval)
        self.d_adam = adam(self.discriminator, training.learning_rate, d_interval)

        self.pipe = AugmentPipe(settings.augment.pipe)
        self.ada = AdaController(settings.augment)
        self.path_length_mean = torch.zeros((), device=batches.device)
        self.steps, self.g_steps, self.since_g = 0, 0, training.d_steps

    # --- the phases -------------------------------------------------------------------------------

    def run(self, measured: Measured) -> bool:
        """Take one step of D, after one of G where it is due; return whether G was updated."""
        training = self.training
        if self.since_g >= training.d_steps and self._g_main(measured):
            if training.path_length_weight and self.g_steps % training.path_length_interval == 0:
                self._g_pl(measured)
            self.g_steps += 1
            self.since_g = 0
        self.discriminator.requires_grad_(True)
        if self.private is None:
            self._d_main(measured)
        else:
            self._d_main_private(self.private)
        if self.d_average is not None:
            ema_update(self.d_average, self.discriminator, training.d_average)
        self.ada.step()
        updated = self.since_g == 0
        self.steps += 1
        self.since_g += 1
        return updated

    def _g_main(self, measured: Measured) -> bool:
        """Gmain: -log sigmoid(D(G(z, c))). Return False where G waits (`training.d_accuracy`)."""
        critic = self.discriminator if self.d_average is None else self.d_average
        critic.requires_grad_(False)
        c = self.batches.generator_labels(self.generator_batch, self.streams.host)
        fake = self._synthesize(self._map(c, self.streams, track=True), self.streams)
        logits = critic(self._augment(fake, self.streams), c)
        accuracy = (logits.detach() < 0).float().mean()
        measured["d_accuracy"].append(accuracy)
        may_wait = self.since_g < MAX_WAITING * self.training.d_steps
        if may_wait and accuracy < self.training.d_accuracy:
            return False
        loss = losses.generator_loss(logits)
        self._update_g(loss)
        measured["loss_g"].append(loss.detach())
        return True

    def _g_pl(self, measured: Measured) -> None:
        """Gpl: (|Jᵀy| - a)², where a is the running mean of the path lengths."""
        half = max(1, self.generator_batch // PATH_LENGTH_BATCH_SHARE)
        ws = self._map(self.batches.generator_labels(half, self.streams.host), self.streams)
        images = self._synthesize(ws, self.streams)
        y = torch.randn(images.shape, generator=self.streams.noise, device=self.batches.device)
        lengths = losses.path_lengths(images, ws, y)
        mean = lengths.detach().mean()
        self.path_length_mean = self.path_length_mean.lerp(mean, PATH_LENGTH_DECAY)
        penalty = (lengths - self.path_length_mean).square().mean()
        self._update_g(
            penalty * (self.training.path_length_weight * self.training.path_length_interval)
        )
        measured["path_length"].append(mean)

    def _d_main(self, measured: Measured) -> None:
        """Dmain: -log sigmoid(D(x)) - log(1 - sigmoid(D(G(z)))), in one pass; then Dr1."""
        real, real_c = self.batches.real(self.streams.host)
        if not len(real):
            return  # an empty Poisson sample
        with torch.no_grad():
            fake_c = self.batches.generator_labels(len(real), self.streams.host)
            fake = self._synthesize(self._map(fake_c, self.streams), self.streams)
            seen = self._augment(torch.cat([fake, real]), self.streams)
        fake_logits, real_logits = self.discriminator(
            seen, torch.cat([fake_c, real_c]), halves=2
        ).chunk(2)
        loss = losses.discriminator_loss(fake_logits, real_logits)
        self._update_d(loss)
        self.ada.observe(real_logits.detach())
        measured["loss_d"].append(loss.detach())
        if self.r1_gamma and self.steps % self.training.r1_interval == 0:
            self._d_r1(seen[len(real) :], real_c, measured)

    def _d_r1(self, real: Tensor, c: Tensor, measured: Measured) -> None:
        """Dr1: γ/2 · |dD(x)/dx|² at the real images as D saw them."""
        x = real.detach().requires_grad_(True)
        penalty = losses.r1_penalty(self.discriminator(x, c), x).mean()
        self._update_d(penalty * (self.r1_gamma / 2 * self.training.r1_interval))
        measured["r1"].append(penalty.detach())

    @exact_kernels()
    def _d_main_private(self, private: PrivateStep) -> None:
        """Dmain by DP-SGD: per unit one clipped gradient, of its real and fake image together.

        All draws come from the secret: even the number of random numbers reveals the sample size.
        """
        draw = private.draw(self.steps)
        streams = Streams(draw.host, draw.device)
        real, real_c = self.batches.real(streams.host, draw.rows)
        with torch.no_grad():
            fake_c = self.batches.generator_labels(len(real), streams.host)
            # One draw of styles for all: what fakes share must not depend on where the chunks end.
            ws = self._map(fake_c, streams)
            fakes = [
                self._synthesize(chunk, streams)
                for chunk in ws.split(SYNTHESIS_CHUNK)
                if len(chunk)
            ]
            both = torch.cat([*fakes, real]) if fakes else torch.cat([real, real])
            seen = self._augment(both, streams) if fakes else both
        signs, count = private.gradient(
            self.discriminator,
            losses.discriminator_loss,
            (seen[: len(real)], fake_c),
            (seen[len(real) :], real_c),
            draw,
            self.r1_gamma / 2 if self.settings.privacy.r1 else 0.0,
        )
        self.proximal.add_gradient("discriminator", self.discriminator)
        self.d_adam.step()
        if count:
            self.ada.observe_sum(signs, count)

    # --- the parts of a phase ---------------------------------------------------------------------

    def _map(self, c: Tensor, streams: Streams, track: bool = False) -> Tensor:
        """ws (B, L, w_dim) of new latents z; style mixing: another z from a random layer on."""
        mapping, depth = self.generator.mapping, self.generator.synthesis.num_ws

        def w_of_new_z() -> Tensor:
            shape = (len(c), mapping.z_dim)
            z = torch.randn(shape, generator=streams.noise, device=self.batches.device)
            w: Tensor = mapping(z, c)
            return w

        w = w_of_new_z()
        if track:
            mapping.track(w, self.g_steps)
        ws = w.unsqueeze(1).expand(-1, depth, -1)
        if torch.rand((), generator=streams.host) < self.training.style_mixing:
            cut = int(torch.randint(1, depth, (), generator=streams.host))
            mixed = w_of_new_z().unsqueeze(1).expand(-1, depth - cut, -1)
            ws = torch.cat([ws[:, :cut], mixed], dim=1)
        return ws

    def _synthesize(self, ws: Tensor, streams: Streams) -> Tensor:
        images: Tensor = self.generator.synthesis(ws, "random", streams.noise)
        return images

    def _augment(self, images: Tensor, streams: Streams) -> Tensor:
        return images if self.ada.p == 0 else self.pipe(images, self.ada.p, streams.host)

    def _update_g(self, loss: Tensor) -> None:
        self.g_adam.zero_grad(set_to_none=True)
        loss.backward()
        self.proximal.add_gradient("generator", self.generator)
        self.g_adam.step()

    def _update_d(self, loss: Tensor) -> None:
        self.d_adam.zero_grad(set_to_none=True)
        loss.backward()
        self.proximal.add_gradient("discriminator", self.discriminator)
        self.d_adam.step()

    # --- state ------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """`p`, and `r_t` unless a private run keeps it secret."""
        public = self.private is None or self.settings.privacy.r_t_noise > 0
        return {"p": self.ada.p} | ({"r_t": self.ada.r_t} if public else {})

    def restore_progress(self, images_seen: int, p: float | None) -> None:
        """Continue after `images_seen` images; else the first batch of w would replace w_avg."""
        self.steps = images_seen // self.batch_size
        self.g_steps = self.steps // self.training.d_steps
        self.ada.p = self.ada.p if p is None else p

    @torch.no_grad()
    def parameters_loaded(self, part: str, before: Sequence[Tensor]) -> None:
        """Move the average of D by the change of D; before the first step, set it to D."""
        if part != "discriminator" or self.d_average is None:
            return
        networks = (self.d_average.parameters(), before, self.discriminator.parameters())
        for average, old, new in zip(*networks, strict=True):
            average.copy_(new if not self.steps else average + (new - old))

    def reset_averages(self) -> None:
        """Set the average of D to D."""
        if self.d_average is not None:
            self.d_average.load_state_dict(self.discriminator.state_dict())

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """(tensors, plain values): optimisers, path-length mean, counters and ADA."""
        tensors = {
            **optimizer_tensors(self.g_adam, self.generator, "g_adam/"),
            **optimizer_tensors(self.d_adam, self.discriminator, "d_adam/"),
            "path_length_mean": self.path_length_mean,
        }
        counters = {"steps": self.steps, "g_steps": self.g_steps, "since_g": self.since_g}
        return tensors, {**counters, "ada": self.ada.state()}

    def load_state_dict(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        load_optimizer(self.g_adam, self.generator, tensors, "g_adam/")
        load_optimizer(self.d_adam, self.discriminator, tensors, "d_adam/")
        mean = tensors["path_length_mean"]
        self.path_length_mean = mean.to(self.batches.device).reshape(())
        self.ada.load_state(plain["ada"])
        self.steps, self.g_steps, self.since_g = (
            int(plain[key]) for key in ("steps", "g_steps", "since_g")
        )


STEP = StyleGAN2Step
