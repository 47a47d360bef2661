"""The Trainer: the one training loop of centralized, local and federated arms.

It advances by real images shown and holds everything that the next step depends on. Two identities
hold bit for bit on a CPU with a fixed number of threads (CUDA sums in no fixed order): stop, save,
load and continue equals never stopping; a federation of one hospital equals centralized training.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgan.config import PARTS, Settings
from fedgan.data.dataset import ImageDataset
from fedgan.errors import CheckpointError, ConfigError, DataError, FedganError, MachineError
from fedgan.models.hospital_condition import set_label_counts
from fedgan.privacy.step import LABELS, PrivateStep, releases_labels
from fedgan.training.batches import Batches, Streams
from fedgan.training.checkpoint import (
    ForeignStateError,
    load_into,
    load_tensors,
    save_tensors,
    with_prefix,
)
from fedgan.training.ema import ema_decay, ema_update, half_life_kimg
from fedgan.training.exchange_state import ExchangeState
from fedgan.training.proximal import ProximalTerm
from fedgan.training.step import Measured, build_step

STATE_KEYS = ("images_seen", "goal", "sampler", "labels", "device", "stream", "data")


class Trainer:
    """Train one generative model on one dataset.

        trainer = Trainer(settings, dataset)
        means = trainer.train(images=10_000)
        arrays = trainer.get_parameters(["generator", "ema"])

    Networks are initialised from `settings.seed` alone, equally in every hospital. All other draws
    come from (seed, `stream`); `stream` is the hospital's number. `hospital_of_row` (N,): each
    image's hospital where the dataset is pooled and `model.hospitals` is set; default: all are
    `stream`'s. `device`: 'cpu', 'cuda' or 'auto'. `private`: DP-SGD for the part that sees real
    images, where `settings.privacy` is on.
    """

    def __init__(
        self,
        settings: Settings,
        dataset: ImageDataset,
        device: str = "cpu",
        stream: int = 0,
        private: PrivateStep | None = None,
        hospital_of_row: np.ndarray | None = None,
    ) -> None:
        if settings.privacy.on and private is None:
            raise ConfigError(
                "privacy is on, but this Trainer has no ledger for its steps: use begin_training"
            )
        if dataset.resolution != settings.data.resolution:
            raise ConfigError(
                f"data.resolution = {settings.data.resolution}, but the images of "
                f"'{dataset.name}' are {dataset.resolution} pixels wide"
            )
        if not len(dataset):
            raise DataError(
                f"'{dataset.name}' has no training image: check the splits of its shard"
            )
        self.settings, self.dataset, self.stream = settings, dataset, stream
        self.device, self.private = resolve_device(device), private
        self.batch_size = settings.training.batch_size

        # ---- randomness and data
        seeds = np.random.SeedSequence([settings.seed, stream]).generate_state(
            2, np.uint64
        ) >> np.uint64(1)
        self.streams = Streams(
            torch.Generator().manual_seed(int(seeds[0])),
            torch.Generator(self.device).manual_seed(int(seeds[1])),
        )
        self.batches = Batches(settings, dataset, stream, hospital_of_row, self.device)

        # ---- networks, their average, and what travels
        proximal = ProximalTerm(settings.training.proximal_mu)
        self.step = build_step(settings, self.batches, self.streams, proximal, private)
        self.ema = copy.deepcopy(self.step.networks["generator"]).eval().requires_grad_(False)
        self.networks: dict[str, Any] = {**self.step.networks, "ema": self.ema}
        self.parts = {part: self.networks[part] for part in PARTS if part in self.networks}
        self.exchange = ExchangeState(settings, self.parts, self.step, proximal)
        self._set_label_shares()

        self.images_seen = 0
        self.exhausted = False
        self._goal = 0

    # --- the loop ---------------------------------------------------------------------------------

    def train(
        self, images: int, on_step: Callable[[Trainer], None] | None = None
    ) -> dict[str, float]:
        """Advance by `images` real images; return the means of this call.

        Goals add up over calls: whole batches are shown until the sum of all goals is reached, so
        that a budget split into rounds is the same budget. Keys: what the family's step measures
        (StyleGAN2: loss_g, loss_d, d_accuracy, r1, path_length, r_t, p), images, seconds,
        core_seconds (of this process). Raises `FedganError` when a loss is not finite.

        With privacy nothing is measured on real images without noise, `epsilon` is the ledger's,
        and `exhausted` is set, with fewer images shown, when the ledger allows no further step.
        """
        start, core_start, before = time.perf_counter(), time.process_time(), self.images_seen
        training = self.settings.training
        half_life = half_life_kimg(training, self.batch_size)
        self._goal += images
        if self.private is not None:
            self._reserve(self.private)
        measured: Measured = defaultdict(list)
        steps = self._steps_left()

        while self.images_seen < self._goal:
            updated = self.step.run(measured)

            # ---- average of the generator
            if updated:
                shown = self.step.images_per_update
                decay = ema_decay(shown, half_life, training.ema_rampup, self.images_seen)
                ema_update(self.ema, self.networks["generator"], decay)
            self.images_seen += self.batch_size

            # ---- control variates
            self.exchange.apply_corrections(steps)
            if on_step is not None:
                on_step(self)

        result = {name: float(torch.stack(values).mean()) for name, values in measured.items()}
        if not all(np.isfinite(value) for value in result.values()):
            raise FedganError(
                f"training diverged after {self.images_seen} images (a loss is not finite): lower "
                "training.learning_rate or raise training.r1_gamma, and resume from the last round"
            )
        return {
            **result,
            **self.step.metrics(),
            **({} if self.private is None else self.private.metrics()),
            "images": self.images_seen - before,
            "seconds": time.perf_counter() - start,
            "core_seconds": time.process_time() - core_start,
        }

    def _reserve(self, private: PrivateStep) -> None:
        """Enter the steps up to the goal in the ledger before they run.

        Where the ledger allows fewer, shorten the goal.
        """
        label_dim = self.dataset.label_dim
        if releases_labels(self.settings, label_dim) and not self.batches.label_weights:
            if not private.reserve(1, LABELS):
                self._goal, self.exhausted = self.images_seen, True
                return
            self.batches.label_weights = private.release_labels(self.dataset).tolist()
        planned = self._steps_left()
        allowed = private.reserve(planned) if planned else 0
        if allowed < planned:
            self._goal, self.exhausted = self.images_seen + allowed * self.batch_size, True

    def _steps_left(self) -> int:
        return max(0, -(-(self._goal - self.images_seen) // self.batch_size))

    # --- what travels -----------------------------------------------------------------------------

    def get_parameters(self, parts: Iterable[str]) -> dict[str, np.ndarray]:
        """Copies of parts as float32 arrays (`ExchangeState.get_parameters`)."""
        return self.exchange.get_parameters(parts)

    def load_parameters(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Load a received model (`ExchangeState.load_parameters`)."""
        self.exchange.load_parameters(arrays)

    def restore_progress(self, images_seen: int, p: float | None = None) -> None:
        """Continue the training of a received model: `images_seen` images, augmentation `p`.

        The averages (of weights and of w) and ADA continue. Adam's moments and the mean of the path
        lengths start anew: they do not travel. `p` None: keep the present strength.
        """
        self.images_seen = self._goal = images_seen
        self.step.restore_progress(images_seen, p)

    def set_hospital(self, number: int) -> None:
        """Treat all images as those of hospital `number` of the federation."""
        self.batches.hospital_of_row = np.full(len(self.dataset), number)
        self._set_label_shares()

    def _set_label_shares(self) -> None:
        """Set the hospitals' label counts in the networks, for sampling by label alone."""
        shares = self.batches.label_shares()
        for network in self.networks.values():
            set_label_counts(network, shares, self.dataset.exclusive)

    # --- the whole state --------------------------------------------------------------------------

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """(tensors, plain values): everything that the next step depends on."""
        step_tensors, step_plain = self.step.state_dict()
        tensors = {
            f"{part}/{name}": tensor
            for part, network in self.networks.items()
            for name, tensor in network.state_dict().items()
        }
        tensors |= step_tensors | self.exchange.tensors()
        tensors["rng/host"] = self.streams.host.get_state()
        tensors["rng/noise"] = self.streams.noise.get_state()
        plain: dict[str, object] = {
            "images_seen": self.images_seen,
            "goal": self._goal,
            "labels": self.batches.label_weights,
            "sampler": self.batches.sampler.state(),
            "device": self.device.type,
            "stream": self.stream,
            "data": self._fingerprint(),
        }
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return copies, plain | step_plain

    def load_state_dict(
        self, state: tuple[Mapping[str, Tensor], Mapping[str, Any]], where: str = "the state"
    ) -> None:
        """Continue from `state_dict()`.

        Raises `CheckpointError` for the state of another model, shard, stream or device.
        """
        tensors, plain = state
        if missing := [key for key in (*STATE_KEYS, *self.step.state_keys) if key not in plain]:
            raise CheckpointError(f"{where} is no state of a Trainer: it lacks '{missing[0]}'")
        for key, own in (("device", self.device.type), ("stream", self.stream)):
            if plain[key] != own:
                # a device can come back; a file of another hospital has no use here
                kind = ForeignStateError if key == "device" else CheckpointError
                raise kind(
                    f"{where} belongs to {key} '{plain[key]}', this is {key} '{own}': "
                    "it cannot be continued here"
                )
        size = plain["sampler"]["size"]
        if size != len(self.dataset):
            raise ForeignStateError(
                f"{where} was made with {size} images, the shard now has {len(self.dataset)}: "
                "start a new run"
            )
        if plain["data"] != self._fingerprint():
            raise ForeignStateError(
                f"{where} was made with other images or labels than the shard now has: "
                "start a new run"
            )
        for check_only in (True, False):  # change nothing unless all of it fits
            for part, network in self.networks.items():
                load_into(network, with_prefix(tensors, f"{part}/"), where, check_only)
        self.step.load_state_dict(tensors, plain)
        self.exchange.load(tensors, self.device)
        self.streams.host.set_state(tensors["rng/host"])
        self.streams.noise.set_state(tensors["rng/noise"])
        self.batches.sampler.load_state(plain["sampler"])
        self.batches.label_weights = [float(weight) for weight in plain["labels"]]
        self.images_seen, self._goal = int(plain["images_seen"]), int(plain["goal"])
        if self.private is not None:
            self.private.renew()  # the noise of the steps after this state must not come twice

    def _fingerprint(self) -> str:
        """Hash of the shard's content and of the labels as they are used here."""
        labels = np.ascontiguousarray(self.dataset.labels)
        return hashlib.sha256(
            f"{self.dataset.content_hash} {labels.shape}".encode() + labels.tobytes()
        ).hexdigest()

    def save(self, path: Path) -> None:
        """Write the whole state to `path` (.safetensors) and the .json beside it, atomically."""
        save_tensors(path, *self.state_dict())

    def load(self, path: Path) -> None:
        """Continue from a file of `save`; raises `CheckpointError` where it does not fit."""
        self.load_state_dict(load_tensors(path), f"checkpoint {path.name}")


def resolve_device(name: str) -> torch.device:
    """A device; 'auto': CUDA where available. Raises `MachineError` for 'cuda' without CUDA."""
    if name == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "training.device = 'cuda', but this machine has no CUDA device: use auto or cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        torch.backends.cudnn.benchmark = True
    return torch.device(name)
