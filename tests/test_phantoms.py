"""Phantoms: the same seed gives the same picture at every resolution, and the truth that is told can be seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan.data.phantoms import (
    CHEST_LABELS,
    KINDS,
    LESION_LABELS,
    TRUTH,
    chest_look,
    draw_chest,
    draw_lesion,
    lesion_look,
    write_phantoms,
)
from fedgan.data.phantoms.canvas import area_mean, canvas
from fedgan.data.phantoms.scanners import label_mix
from fedgan.data.phantoms.writer import deal, hospital_sizes
from fedgan.data.shard import Shard
from fedgan.errors import ConfigError, DataError


def rng(*numbers: int) -> np.random.Generator:
    return np.random.default_rng(numbers)


def contrast(picture: np.ndarray, mask: np.ndarray, where: np.ndarray) -> float:
    """Mean grey value inside the mask minus the mean of `where` outside it."""
    grey = picture.astype(float) if picture.ndim == 2 else picture.astype(float).mean(axis=2)
    return float(grey[mask].mean() - grey[where & ~mask].mean())


# --- one picture --------------------------------------------------------------------------------


@pytest.mark.parametrize("label", LESION_LABELS)
def test_a_lesion_depends_on_its_generator_alone(label: str) -> None:
    first, truth = draw_lesion(label, rng(1), 32)
    again, truth_again = draw_lesion(label, rng(1), 32)
    other, _ = draw_lesion(label, rng(2), 32)
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert np.array_equal(truth["mask"], truth_again["mask"])
    assert not np.array_equal(first, other)
    assert first.min() < 140 < first.max()


def test_a_film_depends_on_its_generator_alone() -> None:
    first, _ = draw_chest(["effusion"], rng(1), 32)
    assert first.shape == (32, 32)
    assert first.dtype == np.uint8
    assert np.array_equal(first, draw_chest(["effusion"], rng(1), 32)[0])
    assert not np.array_equal(first, draw_chest(["effusion"], rng(2), 32)[0])


@pytest.mark.parametrize("label", LESION_LABELS)
@pytest.mark.parametrize(("fine", "coarse"), [(64, 32), (256, 64)])
def test_a_lesion_is_the_same_picture_at_every_resolution(
    label: str, fine: int, coarse: int
) -> None:
    for hospital in range(3):
        large, large_truth = draw_lesion(label, rng(3, hospital), fine, lesion_look(hospital))
        small, small_truth = draw_lesion(label, rng(3, hospital), coarse, lesion_look(hospital))
        mean = area_mean(large.transpose(2, 0, 1), coarse).transpose(1, 2, 0)
        assert np.corrcoef(mean.ravel(), small.ravel())[0, 1] > 0.95
        assert large_truth["area"] == pytest.approx(small_truth["area"], abs=0.01)
        assert large_truth["centre"] == small_truth["centre"]


@pytest.mark.parametrize("findings", [(), *[(label,) for label in CHEST_LABELS], CHEST_LABELS])
@pytest.mark.parametrize(("fine", "coarse"), [(64, 32), (256, 64)])
def test_a_film_is_the_same_picture_at_every_resolution(
    findings: tuple[str, ...], fine: int, coarse: int
) -> None:
    for hospital in range(3):
        large, _ = draw_chest(findings, rng(3, hospital), fine, chest_look(hospital))
        small, _ = draw_chest(findings, rng(3, hospital), coarse, chest_look(hospital))
        assert np.corrcoef(area_mean(large, coarse).ravel(), small.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("resolution", [16, 128, 512])
def test_any_power_of_two_is_drawn(resolution: int) -> None:
    picture, truth = draw_lesion("mel", rng(4), resolution)
    assert picture.shape == (resolution, resolution, 3)
    assert truth["mask"].shape == (resolution, resolution)
    assert draw_chest(["nodule"], rng(4), resolution)[0].shape == (resolution, resolution)


@pytest.mark.slow
def test_the_largest_resolution_is_drawn() -> None:
    assert draw_lesion("bcc", rng(4), 1024)[0].shape == (1024, 1024, 3)
    assert draw_chest(CHEST_LABELS, rng(4), 1024)[0].shape == (1024, 1024)


def test_pigmented_lesions_are_darker_than_the_skin_round_them() -> None:
    for label in ("mel", "nv", "vasc"):
        for seed in range(8):
            picture, truth = draw_lesion(label, rng(5, seed), 64)
            inner = np.hypot(*(np.indices((64, 64)) + 0.5 - 32)) < 30
            assert contrast(picture, truth["mask"], inner) < -8, (label, seed)
            assert 0.03 < truth["area"] < 0.7


def test_each_lesion_has_its_colours() -> None:
    """Mean over many of each: vasc and akiec are redder than the skin, a melanoma darkest, a scar bright in its middle."""

    def middle(label: str) -> np.ndarray:
        pictures = [draw_lesion(label, rng(6, seed), 32) for seed in range(25)]
        return np.mean([picture[truth["mask"]].mean(axis=0) for picture, truth in pictures], axis=0)

    colour = {label: middle(label) for label in LESION_LABELS}
    redness = {label: value[0] - value[1:].mean() for label, value in colour.items()}
    assert min(redness["vasc"], redness["akiec"]) > max(
        redness["nv"], redness["df"], redness["bcc"], redness["mel"]
    )
    assert colour["df"].mean() > colour["nv"].mean() > colour["mel"].mean()
    assert (
        colour["bkl"][0] - colour["bkl"][2] > colour["nv"][0] - colour["nv"][2]
    )  # waxy yellow against brown


def test_skin_tone_hair_and_ruler_are_as_told() -> None:
    pictures = [draw_lesion("nv", rng(7, seed), 32, lesion_look(seed % 3)) for seed in range(40)]
    tones = [truth["tone"] for _, truth in pictures]
    border = [
        np.median(picture[4:-4, 4:-4].reshape(-1, 3), axis=0).mean() for picture, _ in pictures
    ]
    assert np.corrcoef(tones, border)[0, 1] < -0.7
    assert {truth["ruler"] for _, truth in pictures} == {True, False}
    assert len({truth["hairs"] for _, truth in pictures}) > 3


@pytest.mark.parametrize(
    ("finding", "least"),
    [
        ("effusion", 40),
        ("consolidation", 25),
        ("nodule", 12),
        ("cardiomegaly", 30),
        ("pneumothorax", -12),
    ],
)
def test_a_finding_is_where_the_truth_says(finding: str, least: float) -> None:
    """Inside its mask the film differs from the lungs of the same person on the same film without it."""
    for seed in range(6):
        sick, truth = draw_chest([finding], rng(8, seed), 64, patient=rng(9, seed))
        mask = truth[f"{finding}_mask"]
        assert mask.any()
        difference = contrast(sick, mask, truth["lungs"])
        assert difference > least if least > 0 else difference < least, (seed, difference)


def test_effusion_whitens_the_costophrenic_angle_of_its_side() -> None:
    for seed in range(10):
        film, truth = draw_chest(["effusion"], rng(10, seed), 64)
        side = truth["effusion"]["side"]
        if side == "both":
            continue
        rows, columns = np.nonzero(truth["effusion_mask"] & truth["lungs"])
        angle = np.zeros_like(truth["lungs"])
        angle[rows, columns] = True
        mirrored = angle[:, ::-1] & truth["lungs"]
        assert film[angle].mean() > film[mirrored].mean() + 30
        assert (columns.mean() < 32) == (side == "right")


def test_cardiomegaly_widens_the_heart() -> None:
    def ratio(findings: list[str]) -> list[float]:
        return [draw_chest(findings, rng(11, seed), 16)[1]["heart_ratio"] for seed in range(20)]

    assert max(ratio([])) < 0.55 < min(ratio(["cardiomegaly"]))


def test_several_findings_lie_on_one_film() -> None:
    film, truth = draw_chest(CHEST_LABELS, rng(12), 64)
    assert truth["findings"] == sorted(CHEST_LABELS)
    assert all(truth[f"{name}_mask"].any() for name in CHEST_LABELS)
    assert film.std() > 20
    clean = draw_chest([], rng(12), 64)[1]
    assert clean["findings"] == []
    assert not [name for name in clean if name.endswith("_mask")]


def test_unknown_names_and_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="akiec"):
        draw_lesion("melanoma", rng(0), 32)
    with pytest.raises(DataError, match="cardiomegaly"):
        draw_chest(["fracture"], rng(0), 32)
    for resolution in (8, 33, 2048):
        with pytest.raises(ConfigError, match="powers of two"):
            draw_lesion("nv", rng(0), resolution)


# --- the drawing board --------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from(["broad", "coarse", "middle"]))
def test_noise_is_the_same_field_on_every_board(seed: int, band: str) -> None:
    small, large = canvas(32), canvas(128)
    mean = area_mean(large.noise(rng(seed), band), small.work)
    assert np.corrcoef(mean.ravel(), small.noise(rng(seed), band).ravel())[0, 1] > 0.97


@settings(max_examples=30)
@given(st.floats(-0.7, 0.7), st.floats(-0.7, 0.7), st.floats(0, np.pi), st.floats(0.004, 0.05))
def test_a_stroke_covers_its_area_at_every_width(
    x: float, y: float, angle: float, half_width: float
) -> None:
    """Length times width, also where the line is thinner than a pixel (its round ends add a little)."""
    board = canvas(32)
    half = 0.25 * np.array([np.cos(angle), np.sin(angle)])
    middle = np.array([x, y])
    line = np.stack([middle - half, middle, middle + half])[None]
    covered = board.strokes(line, half_width).sum() * board.pixel**2
    wide = max(2 * half_width, board.pixel)
    assert 0.7 * 0.5 * 2 * half_width < covered < 1.5 * (0.5 * 2 * half_width + wide**2)


# --- hospitals ----------------------------------------------------------------------------------


def test_three_hospitals_hold_50_30_and_20_per_cent() -> None:
    assert hospital_sizes(3000, 3) == [1500, 900, 600]
    assert hospital_sizes(30, 3) == [15, 9, 6]


@given(st.integers(400, 5000), st.integers(1, 8))
def test_sizes_fall_and_add_up(images: int, hospitals: int) -> None:
    sizes = hospital_sizes(images, hospitals)
    assert sum(sizes) == images
    assert sizes == sorted(sizes, reverse=True)


@settings(max_examples=25)
@given(st.sampled_from(KINDS), st.integers(200, 1500), st.integers(1, 5), st.integers(0, 1000))
def test_every_label_is_in_every_split_and_at_two_hospitals(
    kind: str, images: int, hospitals: int, seed: int
) -> None:
    dealt = deal(kind, hospital_sizes(images, hospitals), seed)
    labels = LESION_LABELS if kind == "lesions" else CHEST_LABELS
    for split in ("train", "val", "test"):
        seen = {
            label
            for patients in dealt
            for patient in patients
            if patient["split"] == split
            for label in patient["labels"]
        }
        assert seen == set(labels)
    for label in labels:
        holders = sum(any(label in patient["labels"] for patient in patients) for patients in dealt)
        assert holders >= min(2, hospitals)
    for patients, size in zip(dealt, hospital_sizes(images, hospitals), strict=True):
        assert sum(patient["images"] for patient in patients) == size
    everyone = [patient["split"] for patients in dealt for patient in patients]
    assert 0.60 < everyone.count("train") / len(everyone) < 0.80
    assert 0.10 < everyone.count("test") / len(everyone) < 0.30


@pytest.mark.parametrize("kind", KINDS)
def test_label_mixes_add_up_and_differ(kind: str) -> None:
    mixes = [label_mix(kind, index) for index in range(6)]
    for mix in mixes:
        assert sum(mix.values()) == pytest.approx(1.0)
        assert min(mix.values()) > 0
    for first in range(6):
        for second in range(first):
            assert sum(abs(mixes[first][name] - mixes[second][name]) for name in mixes[0]) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_whole_and_tell_the_truth(tmp_path: Path, kind: str) -> None:
    paths = write_phantoms(tmp_path, kind, 120, 16, seed=5)
    assert [path.name for path in paths] == ["north", "south", "east"]
    shards = [Shard.open(path, verify=True) for path in paths]
    assert [len(shard) for shard in shards] == [60, 36, 24]
    everyone: list[str] = []
    for shard in shards:
        assert shard.card.exclusive == (kind == "lesions")
        assert shard.card.channels == (3 if kind == "lesions" else 1)
        truths = [json.loads(line) for line in (shard.path / TRUTH).read_text().splitlines()]
        told = [
            {truth["label"]} if kind == "lesions" else set(truth["findings"]) for truth in truths
        ]
        names = [{shard.card.label_names[k] for k in np.flatnonzero(row)} for row in shard.labels]
        assert told == names
        assert set(shard.samples.splits) == {"train", "val", "test"}
        everyone += sorted(set(shard.samples.patients))
    assert (
        len(everyone) == len(set(everyone)) < 120
    )  # a patient has one hospital, and some have several images
    union = np.concatenate([shard.labels[shard.samples.splits == "test"] for shard in shards])
    assert union.any(axis=0).all()
    means = [shard.labels.mean(axis=0) for shard in shards]
    assert np.abs(means[0] - means[1]).max() > 0.05
    assert np.abs(means[0] - means[2]).max() > 0.05


def test_films_without_finding_have_no_label(tmp_path: Path) -> None:
    labels = np.concatenate(
        [Shard.open(path).labels for path in write_phantoms(tmp_path, "chest", 60, 16)]
    )
    counts = labels.sum(axis=1)
    assert (counts == 0).any()
    assert (counts > 1).any()


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    def hashes(folder: str, seed: int) -> list[str]:
        return [
            Shard.open(path).card.content_hash
            for path in write_phantoms(tmp_path / folder, "lesions", 30, 16, seed=seed)
        ]

    first = hashes("a", 0)
    assert first == hashes("b", 0)
    assert not set(first) & set(hashes("c", 1))
    assert (tmp_path / "a/north/samples.csv").read_bytes() == (
        tmp_path / "b/north/samples.csv"
    ).read_bytes()
    assert (tmp_path / "a/north" / TRUTH).read_bytes() == (
        tmp_path / "b/north" / TRUTH
    ).read_bytes()


def test_images_of_one_patient_show_one_person() -> None:
    tones = {draw_lesion("nv", rng(13, view), 16, patient=rng(14))[1]["tone"] for view in range(4)}
    assert len(tones) == 1
    films = [draw_chest([], rng(13, view), 16, patient=rng(14))[1] for view in range(4)]
    assert len({film["female"] for film in films}) == 1


def test_looks_differ_between_hospitals() -> None:
    """The same lesion and the same film, photographed by each hospital's own device, differ in brightness or colour."""
    for first in range(3):
        for second in range(first):
            skins = [
                draw_lesion("nv", rng(15), 32, lesion_look(k), patient=rng(16))[0]
                for k in (first, second)
            ]
            assert np.abs(skins[0].astype(float) - skins[1].astype(float)).mean() > 5
            films = [
                draw_chest([], rng(15), 32, chest_look(k), patient=rng(16))[0]
                for k in (first, second)
            ]
            assert np.abs(films[0].astype(float) - films[1].astype(float)).mean() > 3


def test_bad_wishes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    place = tmp_path / "new"
    with pytest.raises(DataError, match="lesions, chest"):
        write_phantoms(place, "brains", 100, 32)
    with pytest.raises(ConfigError, match="powers of two"):
        write_phantoms(place, "lesions", 100, 48)
    with pytest.raises(ConfigError, match=r"data\.phantom_images"):
        write_phantoms(place, "lesions", 12, 32)
    with pytest.raises(ConfigError, match=r"data\.phantom_images"):
        write_phantoms(place, "lesions", 15, 32, hospitals=1)
    with pytest.raises(ConfigError, match="hospital"):
        write_phantoms(place, "lesions", 100, 32, hospitals=0)
    assert not place.exists()
    write_phantoms(place, "lesions", 30, 16)
    before = (place / "north" / "card.json").read_bytes()
    (place / "north").rename(tmp_path / "aside")
    with pytest.raises(DataError, match="south exists"):
        write_phantoms(place, "lesions", 30, 16)
    assert not (place / "north").exists()  # found before the first hospital was written
    (tmp_path / "aside").rename(place / "north")
    write_phantoms(place, "lesions", 30, 16, seed=1, overwrite=True)
    assert (place / "north" / "card.json").read_bytes() != before
