"""The central evaluator: sample grids and distances while training goes on, evaluation.json at the end.

It holds real images of its own (the hospitals' splits in a simulation, `evaluation.root` in a deployment) and never
looks into a hospital's training. While training goes on it measures against validation images only, so that a round
chosen by its curve was not chosen by the test split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedgan import files
from fedgan.config import Settings
from fedgan.data.dataset import HospitalData, ImageDataset
from fedgan.errors import DataError
from fedgan.evaluation.evaluate import evaluate_synthetic
from fedgan.evaluation.features import REFERENCE
from fedgan.evaluation.grids import png_bytes, real_grid, sample_grid
from fedgan.evaluation.reference import Progress, RealReference, pool_places
from fedgan.evaluation.sampling import synthetic_dataset
from fedgan.run_folder import RunFolder


class Evaluator:
    """One run's evaluator. Real classifiers and real features are computed once and shared by all its methods."""

    def __init__(
        self,
        settings: Settings,
        run: RunFolder,
        hospitals: Sequence[HospitalData],
        device: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not hospitals:
            raise DataError(
                "the evaluator was given no hospital: check data.root and evaluation.root"
            )
        self.settings, self.run, self.device = settings, run, device or evaluation_device(settings)
        train, val, test = (
            pool_places(
                [(hospital.name, getattr(hospital, split)) for hospital in hospitals], split
            )
            for split in ("train", "val", "test")
        )
        self.train = train  # with the generator's own labels; the reference may merge them for its classifiers
        self.reference = RealReference(
            train, val, test, settings.evaluation, settings.seed, self.device, progress
        )

    def check(
        self, label_names: tuple[str, ...], exclusive: bool, channels: int, resolution: int
    ) -> None:
        """Raise `DataError` where the hospitals' labels or the shape of their images differ from those of `evaluation.root`."""
        names = ("labels", "exclusive labels", "channels", "resolution")
        own = (
            self.train.label_names,
            self.train.exclusive,
            self.train.channels,
            self.train.resolution,
        )
        for what, mine, theirs in zip(
            names, own, (label_names, exclusive, channels, resolution), strict=True
        ):
            if mine != theirs:
                raise DataError(
                    f"the evaluator's real images have {what} {mine}, the hospitals' {theirs}: import evaluation.root as the "
                    "hospitals imported theirs"
                )

    def start(self) -> None:
        """Write samples/real.png, where `evaluation.show_real` allows it.

        Fails early: `ConfigError` or `DataError` for an unusable `evaluation.features`, `StorageError` when the run folder
        cannot be written.
        """
        if self.settings.evaluation.features != REFERENCE:
            _ = self.reference.extractor
        if self.settings.shows_real:
            picture = real_grid(self.train, seed=self.settings.seed)
            files.write_bytes(self.run.samples / "real.png", png_bytes(picture))

    def during(self, generator: Any, round_number: int, images_seen: int) -> dict[str, Any]:
        """Write samples/round-NNNNN.png and measure a quick Fréchet distance to real validation images.

        → {"samples": file name, "fidelity": {"frechet", "extractor", "images", "split"}}, the entries of metrics.jsonl;
        without "fidelity" where no extractor can be had. `images` is the number on each side, at most 1000.
        The first call trains the reference classifier, which the final evaluation uses again.
        Raises `FedganError` when the generator gives images that are not finite.
        """
        reference = self.reference
        reference.say(f"sampling round {round_number} ({images_seen} images seen)")
        entry: dict[str, Any] = {
            "samples": self._write_grid(generator, f"round-{round_number:05d}.png")
        }
        if reference.can_extract:
            synthetic = self._synthetic(generator, len(reference.quick[1]))
            entry["fidelity"] = reference.quick_distance(synthetic.images)
        return entry

    def final(self, generator: Any, facts: dict[str, Any]) -> dict[str, Any]:
        """Write samples/final.png and evaluation.json, and return what the JSON says.

        `facts` has arm, name, images_seen, wall_seconds, bytes_exchanged. Raises `FedganError` when the generator gives
        images that are not finite, or that do not fit the real ones; evaluation.json is then as it was.
        """
        reference = self.reference
        self._write_grid(generator, "final.png")
        synthetic = self._synthetic(generator, self.settings.evaluation.images)
        numbers = evaluate_synthetic(reference, synthetic, generator).numbers
        result = {**facts, **numbers, "psi": self.settings.evaluation.psi}
        files.write_json(self.run.evaluation, result)
        return result

    def _synthetic(self, generator: Any, count: int) -> ImageDataset:
        psi = self.settings.evaluation.psi
        return synthetic_dataset(
            generator, self.train, count, self.settings.seed, psi, device=self.device
        )

    def _write_grid(self, generator: Any, name: str) -> str:
        train = self.train
        psi = self.settings.evaluation.psi
        picture = sample_grid(
            generator,
            train.label_names,
            train.exclusive,
            seed=self.settings.seed,
            psi=psi,
            device=self.device,
        )
        files.write_bytes(self.run.samples / name, png_bytes(picture))
        return name


def evaluation_device(settings: Settings) -> str:
    """CUDA where there is one and the settings allow it: a run of a GPU machine can be evaluated on any other."""
    return "cuda" if settings.training.device != "cpu" and torch.cuda.is_available() else "cpu"
