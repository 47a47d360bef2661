"""Phantoms in container volumes: a simulation's shards, and other patients for the evaluator."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedgan.config import Settings, load_scenario
from fedgan.data.federation import open_hospital
from fedgan.data.phantoms import write_phantoms
from fedgan.data.shard import Shard
from fedgan.runs.preparation import check_evaluation
from server.operator import phantom_volumes

SCENARIO = Path(__file__).resolve().parent.parent / "simulations" / "three_hospitals.toml"
SMALL = ["data.phantom_images=120", "data.resolution=16"]


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_scenario(SCENARIO, SMALL)


@pytest.fixture(scope="module")
def volumes(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("volumes")
    (root / "hospitals").mkdir()
    (root / "reference").mkdir()
    assert len(phantom_volumes.write_volumes(settings, root / "hospitals", root / "reference")) == 6
    return root


def test_hospital_volumes_hold_the_shards_of_a_simulation(
    settings: Settings, volumes: Path, tmp_path: Path
) -> None:
    simulated = write_phantoms(tmp_path / "simulated", "lesions", 120, 16, 3, settings.data_seed)
    for number, path in enumerate(simulated, 1):
        assert (
            Shard.open(volumes / "hospitals" / str(number), verify=True).card
            == Shard.open(path).card
        )


def test_reference_volumes_hold_other_patients_of_the_same_scanners(
    settings: Settings, volumes: Path
) -> None:
    hospitals = [
        open_hospital(settings, volumes / "hospitals" / str(number)) for number in (1, 2, 3)
    ]
    reference_hospitals = [
        open_hospital(settings, path) for path in sorted((volumes / "reference").iterdir())
    ]
    check_evaluation(settings, hospitals, reference_hospitals)
    assert {reference_hospital.name for reference_hospital in reference_hospitals} == {
        f"reference-{hospital.name}" for hospital in hospitals
    }
    assert not {bytes(image) for hospital in hospitals for image in hospital.train.images[:]} & {
        bytes(image)
        for reference_hospital in reference_hospitals
        for image in reference_hospital.test.images[:]
    }


def test_incomplete_shards_are_generated_again_and_others_kept(
    settings: Settings, volumes: Path
) -> None:
    reference = volumes / "reference"
    before = (volumes / "hospitals" / "1" / "images.npy").stat().st_mtime_ns
    (volumes / "hospitals" / "2" / "card.json").unlink()
    assert phantom_volumes.write_volumes(settings, volumes / "hospitals", reference) == [
        volumes / "hospitals" / "2"
    ]
    assert (volumes / "hospitals" / "1" / "images.npy").stat().st_mtime_ns == before
    assert phantom_volumes.write_volumes(settings, volumes / "hospitals", reference) == []
    assert not list(reference.glob(".*"))


def test_missing_scenario_is_an_error_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = phantom_volumes.main(
        [str(tmp_path / "none.toml"), "--hospitals", str(tmp_path), "--reference", str(tmp_path)]
    )
    assert code == 2
    assert "none.toml" in capsys.readouterr().err
