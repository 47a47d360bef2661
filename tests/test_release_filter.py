"""Release filter: images too near to a training image are redrawn and counted, others unchanged."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_audit import pixels_of, small_run

from fedgan.audit import release_filter as release_filter
from fedgan.audit.attacks.copy_controls import plant_copies
from fedgan.audit.release_filter import (
    DistanceThreshold,
    ReleaseFilter,
    check_release_filter,
    distance_thresholds,
    redraw_seed,
)
from fedgan.config import from_dict
from fedgan.data.federation import Hospital, open_hospitals
from fedgan.data.phantoms import write_phantoms
from fedgan.errors import ConfigError, DataError, FedganError
from fedgan.run_folder import RunFolder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> list[Hospital]:
    root = tmp_path_factory.mktemp("shards")
    write_phantoms(root, "lesions", 160, 32, hospitals=2, seed=0)
    return open_hospitals(from_dict({"federation": {"hospitals": 2}}), root)


@pytest.fixture(scope="module")
def thresholds(hospitals: list[Hospital]) -> list[DistanceThreshold]:
    return distance_thresholds(hospitals)


@pytest.fixture(scope="module")
def fresh(
    thresholds: list[DistanceThreshold], tmp_path_factory: pytest.TempPathFactory
) -> np.ndarray:
    """Phantoms outside both distance thresholds."""
    root = tmp_path_factory.mktemp("fresh")
    write_phantoms(root, "lesions", 90, 32, hospitals=1, seed=1)
    images = pixels_of(open_hospitals(from_dict({"federation": {"hospitals": 1}}), root)[0].train)
    near = [threshold.within(threshold.space.rows(images)) for threshold in thresholds]
    return images[~(near[0] | near[1])]


def test_release_filter_redraws_exactly_the_planted_copies(
    hospitals: list[Hospital], thresholds: list[DistanceThreshold], fresh: np.ndarray
) -> None:
    clean, spare = fresh[:30], fresh[30:]
    images, planted, _ = plant_copies(
        clean, hospitals[1].train.images, 0.3, np.random.default_rng(0)
    )
    calls: list[tuple[int, list[int]]] = []

    def draw(labels: np.ndarray, seed: int, positions: np.ndarray) -> np.ndarray:
        calls.append((seed, positions.tolist()))
        return images[positions] if seed == 7 else spare[positions % len(spare)]

    kept = ReleaseFilter(thresholds, draw, 7)
    found, seeds, first = kept.images(np.zeros((30, 7), np.uint8), np.arange(30))
    assert calls == [(7, list(range(30))), (redraw_seed(7, 1), np.flatnonzero(planted).tolist())]
    assert np.array_equal(found[~planted], clean[~planted])
    assert np.array_equal(found[planted], spare[np.flatnonzero(planted) % len(spare)])
    assert np.array_equal(first, images)
    assert np.array_equal(seeds != 7, planted)
    assert (kept.drawn, kept.redrawn) == (30 + planted.sum(), planted.sum())
    assert kept.dropped[hospitals[1].name] == planted.sum()
    assert kept.dropped[hospitals[0].name] == 0


def test_release_filter_refuses_a_generator_that_only_copies(
    hospitals: list[Hospital], thresholds: list[DistanceThreshold]
) -> None:
    copies = pixels_of(hospitals[0].train)[:4]
    draws: list[int] = []

    def draw(labels: np.ndarray, seed: int, positions: np.ndarray) -> np.ndarray:
        draws.append(seed)
        return copies[positions]

    with pytest.raises(
        FedganError,
        match=r"4 of 4 images came too near .* 20 times in a row: this generator copies",
    ):
        ReleaseFilter(thresholds, draw, 0).images(np.zeros((4, 7), np.uint8), np.arange(4))
    assert len(set(draws)) == len(draws) == release_filter.MAX_DRAWS


def test_distance_threshold_includes_the_closest_held_out_image(
    hospitals: list[Hospital], thresholds: list[DistanceThreshold]
) -> None:
    for hospital, threshold in zip(hospitals, thresholds, strict=True):
        held_out = [
            threshold.within(threshold.space.rows(part.images))
            for part in (hospital.val, hospital.test)
        ]
        assert np.concatenate(held_out).sum() == 1  # of fewer than 200: the closest one
        assert threshold.within(threshold.space.rows(hospital.train.images)).all()


def test_distance_threshold_needs_held_out_images(hospitals: list[Hospital]) -> None:
    first = hospitals[0]
    none = first.val.take(np.arange(0))
    with pytest.raises(DataError, match="has no held-out image"):
        distance_thresholds([Hospital(first.name, first.train, none, none)])


def test_release_filter_is_refused_for_private_settings() -> None:
    check_release_filter(from_dict({}))
    check_release_filter(from_dict({"privacy": {"noise_multiplier": 0.0}}))
    for privacy in ({"epsilon": 10.0}, {"noise_multiplier": 1.0}):
        with pytest.raises(ConfigError, match="no longer be covered by the epsilon"):
            check_release_filter(from_dict({"privacy": privacy}))


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return small_run(tmp_path_factory.mktemp("finished") / "run")


def pictures(folder: Path) -> np.ndarray:
    return np.stack(
        [np.asarray(Image.open(path), np.int64) for path in sorted(folder.rglob("*.png"))]
    )


def seeds_of(folder: Path) -> list[int]:
    with open(folder / "labels.csv", newline="") as stream:
        return [int(row["seed"]) for row in csv.DictReader(stream)]


def test_filtered_release_reports_dropped_images_and_utility(
    fedgan: Run, finished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", "--release", finished.path, "--images", "28", "--seed", "3"]
    assert fedgan(*words, "--output", "plain")[0] == 0
    (hospital,) = open_hospitals(finished.settings(), finished.path / "shards")
    space = release_filter.pixel_space(hospital.train.images.shape[1:])
    rows = space.rows(pictures(Path("plain")).transpose(0, 3, 1, 2).astype(np.uint8))
    distances = release_filter.nearest(rows, space.rows(hospital.train.images), moves=space.moves)[
        0
    ]
    threshold = float(np.quantile(distances, 0.2))
    monkeypatch.setattr(release_filter, "release_threshold", lambda *_, **__: threshold)
    monkeypatch.setattr(
        release_filter, "MAX_DRAWS", 500
    )  # images of one class of an untrained generator are similar
    code, out, err = fedgan(*words, "--release-filter", "--output", "kept")
    assert code == 0, err
    dropped = distances <= threshold
    assert dropped.sum() == 6
    card = json.loads(Path("kept/dataset_card.json").read_text())["release_filter"]
    assert card["replaced"] == dropped.sum()
    assert card["dropped"] == {hospital.name: card["drawn"] - 28}
    assert (card["hospitals_compared"], card["hospitals_trained"]) == (1, 1)
    assert {"unfiltered", "filtered"} <= card["utility"].keys()
    text = Path("kept/dataset_card.md").read_text()
    assert f"{card['replaced']} of 28 images were replaced" in text
    assert "without the release filter" in text
    assert f"filter      {card['replaced']} images redrawn" in out
    # images that were kept are unchanged; others can be drawn again with the seed of their row
    before, after, seeds = (
        pictures(Path("plain")),
        pictures(Path("kept")),
        np.array(seeds_of(Path("kept"))),
    )
    assert np.array_equal(seeds != 3, dropped)
    assert np.abs(before[~dropped] - after[~dropped]).max() <= 1
    position = int(np.flatnonzero(dropped)[0])
    again = [
        "generate",
        finished.path,
        "--images",
        "28",
        "--seed",
        str(seeds[position]),
        "--output",
        "again",
    ]
    assert fedgan(*again)[0] == 0
    assert np.abs(pictures(Path("again"))[position] - after[position]).max() <= 1


def test_release_without_filter_does_not_mention_it(fedgan: Run, finished: RunFolder) -> None:
    assert (
        fedgan("generate", "--release", finished.path, "--images", "7", "--output", "plain")[0] == 0
    )
    assert json.loads(Path("plain/dataset_card.json").read_text())["release_filter"] is None
    assert "Release filter" not in Path("plain/dataset_card.md").read_text()
    assert set(seeds_of(Path("plain"))) == {0}


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--release-filter"], 2, "give --release --release-filter"),
        (["--release", "--shards", "."], 2, "give --release --release-filter"),
        (["--release", "--release-filter", "--shards", "nowhere"], 3, "no data at nowhere"),
    ],
)
def test_release_filter_errors_are_one_line(
    words: list[str], code: int, text: str, fedgan: Run, finished: RunFolder
) -> None:
    found, out, err = fedgan("generate", finished.path, "--images", "7", "--output", "out", *words)
    assert (found, out) == (code, "")
    assert text in err
    assert not Path("out").exists()


def test_release_filter_refuses_a_private_run(fedgan: Run, tmp_path: Path) -> None:
    changed: dict[str, Any] = {"privacy": {"epsilon": 10.0}}
    run = small_run(tmp_path / "private", **changed)
    code, _, err = fedgan(
        "generate", "--release", "--release-filter", run.path, "--images", "7", "--output", "out"
    )
    assert code == 2
    assert "covered by the epsilon" in err
