"""The central evaluator: sample grids and distances per round, `evaluation.json` at the end.

It has real images of its own (the hospitals' shards in a simulation, `evaluation.root` in a
deployment). During the training it measures against validation images only, so that choosing a
round by its curve does not use the test split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from fedgan import files
from fedgan.config import Settings
from fedgan.data.dataset import HospitalData, ImageDataset
from fedgan.errors import DataError
from fedgan.evaluation.evaluate import evaluate_synthetic
from fedgan.evaluation.features import REFERENCE
from fedgan.evaluation.grids import png_bytes, real_grid, sample_grid
from fedgan.evaluation.reference import OnProgress, RealReference, pool_hospitals
from fedgan.evaluation.sampling import synthetic_dataset
from fedgan.run_folder import RunFolder


class RoundEvaluator(Protocol):
    """The evaluator's interface to the federation's loop."""

    def check_compatible(
        self, label_names: tuple[str, ...], exclusive: bool, channels: int, resolution: int
    ) -> None:
        """Raise `DataError` where the hospitals' images differ in kind from the evaluator's."""

    def write_real_samples(self) -> None:
        """Write the grid of real images."""

    def evaluate_round(self, generator: Any, round_number: int, images_seen: int) -> dict[str, Any]:
        """Evaluate the generator of a round; the result joins the round's line of metrics.jsonl."""

    def evaluate_final(self, generator: Any, facts: dict[str, Any]) -> dict[str, Any]:
        """Evaluate the final generator and write evaluation.json."""


class Evaluator:
    """The evaluator of one run; real classifiers and real features are computed once."""

    def __init__(
        self,
        settings: Settings,
        run: RunFolder,
        hospitals: Sequence[HospitalData],
        device: str | None = None,
        progress: OnProgress | None = None,
    ) -> None:
        if not hospitals:
            raise DataError("no hospital to evaluate on: check data.root and evaluation.root")
        self.settings, self.run = settings, run
        self.device = device or evaluation_device(settings)
        train, val, test = (
            pool_hospitals(
                [(hospital.name, getattr(hospital, split)) for hospital in hospitals], split
            )
            for split in ("train", "val", "test")
        )
        self.train = train  # with the generator's own labels; the reference may merge them
        self.reference = RealReference(
            train, val, test, settings.evaluation, settings.seed, self.device, progress
        )

    def check_compatible(
        self, label_names: tuple[str, ...], exclusive: bool, channels: int, resolution: int
    ) -> None:
        """Raise `DataError` where the hospitals' labels or image shape differ from its own."""
        train = self.train
        for name, expected, found in (
            ("labels", train.label_names, label_names),
            ("exclusive labels", train.exclusive, exclusive),
            ("channels", train.channels, channels),
            ("resolution", train.resolution, resolution),
        ):
            if expected != found:
                raise DataError(
                    f"the evaluator's real images have {name} {expected}, the hospitals' {found}: "
                    "import evaluation.root with the options of the hospitals' import"
                )

    def write_real_samples(self) -> None:
        """Write samples/real.png, where `evaluation.show_real` allows it.

        Fails early: `ConfigError` or `DataError` for an unusable `evaluation.features`,
        `StorageError` where the run folder cannot be written.
        """
        if self.settings.evaluation.features != REFERENCE:
            _ = self.reference.extractor
        if self.settings.shows_real:
            grid = real_grid(self.train, seed=self.settings.seed)
            files.write_bytes(self.run.samples / "real.png", png_bytes(grid))

    def evaluate_round(self, generator: Any, round_number: int, images_seen: int) -> dict[str, Any]:
        """Write samples/round-NNNNN.png and measure a Fréchet distance to real validation images.

        Returns entries of metrics.jsonl: {"samples": file name, "fidelity": {"frechet",
        "extractor", "images", "split"}}; no "fidelity" where there is no extractor. `images`:
        number per side, at most 1000. The first call trains the reference classifier, which the
        final evaluation uses again. Raises `FedganError` when generated images are not finite.
        """
        reference = self.reference
        reference.on_progress(f"sampling round {round_number} ({images_seen} images seen)")
        entry: dict[str, Any] = {
            "samples": self._write_grid(generator, f"round-{round_number:05d}.png")
        }
        if reference.can_extract:
            synthetic = self._synthetic(generator, len(reference.quick[1]))
            entry["fidelity"] = reference.quick_distance(synthetic.images)
        return entry

    def evaluate_final(self, generator: Any, facts: dict[str, Any]) -> dict[str, Any]:
        """Write samples/final.png and evaluation.json, and return the latter's content.

        `facts`: arm, name, images_seen, wall_seconds, bytes_exchanged. Raises `FedganError` when
        the generator's images are not finite or do not fit the real ones; evaluation.json is
        unchanged then.
        """
        self._write_grid(generator, "final.png")
        synthetic = self._synthetic(generator, self.settings.evaluation.images)
        numbers = evaluate_synthetic(self.reference, synthetic, generator).numbers
        result = {**facts, **numbers, "psi": self.settings.evaluation.psi}
        files.write_json(self.run.evaluation, result)
        return result

    def _synthetic(self, generator: Any, count: int) -> ImageDataset:
        psi = self.settings.evaluation.psi
        return synthetic_dataset(
            generator, self.train, count, self.settings.seed, psi, device=self.device
        )

    def _write_grid(self, generator: Any, name: str) -> str:
        grid = sample_grid(
            generator,
            self.train.label_names,
            self.train.exclusive,
            seed=self.settings.seed,
            psi=self.settings.evaluation.psi,
            device=self.device,
        )
        files.write_bytes(self.run.samples / name, png_bytes(grid))
        return name


def evaluation_device(settings: Settings) -> str:
    """CUDA where it is available, unless `training.device` is 'cpu'."""
    return "cuda" if settings.training.device != "cpu" and torch.cuda.is_available() else "cpu"
