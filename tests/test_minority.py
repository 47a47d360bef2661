"""A class that one small hospital alone holds is still drawn: what the default of a federation of unlike hospitals is for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_federation import federate

from client.app import app
from fedgan.config import Settings, load_scenario
from fedgan.data.federation import open_hospitals
from fedgan.data.phantoms import draw_lesion
from fedgan.data.shard import write_shard
from fedgan.evaluation.manifold import manifold_scores
from fedgan.evaluation.sampling import generate_images
from fedgan.run_folder import RunFolder
from fedgan.training.checkpoint import load_generator

SCENARIO = Path(__file__).parents[1] / "simulations" / "chest_three_hospitals_compare.toml"
LABELS = ("mel", "nv", "vasc")
HELD = {"city": (180, 420, 0), "town": (150, 90, 0), "village": (0, 0, 80)}  # images of each label
ROUNDS = 40


def write_hospitals(root: Path) -> None:
    for number, (name, counts) in enumerate(HELD.items()):
        chosen = np.repeat(np.arange(3), counts)
        draws = [np.random.default_rng([7, number, row]) for row in range(len(chosen))]
        images = [draw_lesion(LABELS[label], rng, 32)[0].transpose(2, 0, 1) for label, rng in zip(chosen, draws, strict=True)]
        splits = np.array(["train", "train", "train", "test", "train", "train", "train", "val"])[np.arange(len(chosen)) % 8]
        write_shard(
            root / name,
            np.stack(images),
            np.eye(3, dtype=np.uint8)[chosen],
            patients=[f"{name}-{row}" for row in range(len(chosen))],
            splits=splits,
            label_names=LABELS,
            name=name,
        )


def coverage_of_the_village(settings: Settings, folder: Path) -> float:
    """Share of the village's training images that its class's generated images come near, on pixels of 8 × 8."""
    run = RunFolder.at(folder)
    federate(settings, run, app)
    generator, _ = load_generator(run.checkpoint(settings.federation.rounds))
    village = next(hospital.train for hospital in open_hospitals(settings) if hospital.name == "village")
    real = np.asarray(village.images[np.arange(len(village))])
    made = generate_images(generator, village.labels, seed=1)
    small = [images.reshape(-1, 3, 8, 4, 8, 4).mean((3, 5), dtype=np.float32).reshape(len(images), -1) for images in (real, made)]
    return manifold_scores(*small)["coverage"]


@pytest.mark.slow
def test_the_class_of_a_small_hospital_does_not_vanish(tmp_path: Path) -> None:
    """Measured: PLACEHOLDER."""
    write_hospitals(tmp_path / "data")
    words = [f"data.root={tmp_path / 'data'}", "training.kimg=6", f"federation.rounds={ROUNDS}", "evaluation.every=0"]
    settings = load_scenario(SCENARIO, [*words, "training.device=cpu"])
    assert coverage_of_the_village(settings, tmp_path / "run") > 0.45
