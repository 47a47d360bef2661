"""Phantoms: reproducible, the same image at every resolution, visible ground truth."""

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
    lesion_look,
    render_chest,
    render_lesion,
    write_phantoms,
)
from fedgan.data.phantoms.canvas import area_mean, make_canvas
from fedgan.data.phantoms.scanners import label_mix
from fedgan.data.phantoms.writer import assign_patients, hospital_sizes
from fedgan.data.shard import Shard
from fedgan.errors import ConfigError, DataError


def rng(*numbers: int) -> np.random.Generator:
    return np.random.default_rng(numbers)


def contrast(image: np.ndarray, mask: np.ndarray, where: np.ndarray) -> float:
    """Mean grey value inside the mask minus the mean of `where` outside it."""
    grey = image.astype(float) if image.ndim == 2 else image.astype(float).mean(axis=2)
    return float(grey[mask].mean() - grey[where & ~mask].mean())


# --- one image ----------------------------------------------------------------------------------


@pytest.mark.parametrize("label", LESION_LABELS)
def test_lesion_depends_only_on_its_generator(label: str) -> None:
    first, truth = render_lesion(label, rng(1), 32)
    again, truth_again = render_lesion(label, rng(1), 32)
    other, _ = render_lesion(label, rng(2), 32)
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert np.array_equal(truth["mask"], truth_again["mask"])
    assert not np.array_equal(first, other)
    assert first.min() < 140 < first.max()


def test_film_depends_only_on_its_generator() -> None:
    first, _ = render_chest(["effusion"], rng(1), 32)
    assert first.shape == (32, 32)
    assert first.dtype == np.uint8
    assert np.array_equal(first, render_chest(["effusion"], rng(1), 32)[0])
    assert not np.array_equal(first, render_chest(["effusion"], rng(2), 32)[0])


@pytest.mark.parametrize("label", LESION_LABELS)
@pytest.mark.parametrize(("fine", "coarse"), [(64, 32), (256, 64)])
def test_lesion_is_the_same_image_at_every_resolution(label: str, fine: int, coarse: int) -> None:
    for hospital in range(3):
        large, large_truth = render_lesion(label, rng(3, hospital), fine, lesion_look(hospital))
        small, small_truth = render_lesion(label, rng(3, hospital), coarse, lesion_look(hospital))
        mean = area_mean(large.transpose(2, 0, 1), coarse).transpose(1, 2, 0)
        assert np.corrcoef(mean.ravel(), small.ravel())[0, 1] > 0.95
        assert large_truth["area"] == pytest.approx(small_truth["area"], abs=0.01)
        assert large_truth["centre"] == small_truth["centre"]


@pytest.mark.parametrize("findings", [(), *[(label,) for label in CHEST_LABELS], CHEST_LABELS])
@pytest.mark.parametrize(("fine", "coarse"), [(64, 32), (256, 64)])
def test_film_is_the_same_image_at_every_resolution(
    findings: tuple[str, ...], fine: int, coarse: int
) -> None:
    for hospital in range(3):
        large, _ = render_chest(findings, rng(3, hospital), fine, chest_look(hospital))
        small, _ = render_chest(findings, rng(3, hospital), coarse, chest_look(hospital))
        assert np.corrcoef(area_mean(large, coarse).ravel(), small.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("resolution", [16, 128, 512])
def test_any_power_of_two_is_rendered(resolution: int) -> None:
    image, truth = render_lesion("mel", rng(4), resolution)
    assert image.shape == (resolution, resolution, 3)
    assert truth["mask"].shape == (resolution, resolution)
    assert render_chest(["nodule"], rng(4), resolution)[0].shape == (resolution, resolution)


@pytest.mark.slow
def test_largest_resolution_is_rendered() -> None:
    assert render_lesion("bcc", rng(4), 1024)[0].shape == (1024, 1024, 3)
    assert render_chest(CHEST_LABELS, rng(4), 1024)[0].shape == (1024, 1024)


def test_pigmented_lesions_are_darker_than_the_skin() -> None:
    for label in ("mel", "nv", "vasc"):
        for seed in range(8):
            image, truth = render_lesion(label, rng(5, seed), 64)
            inner = np.hypot(*(np.indices((64, 64)) + 0.5 - 32)) < 30
            assert contrast(image, truth["mask"], inner) < -8, (label, seed)
            assert 0.03 < truth["area"] < 0.7


def test_lesion_classes_have_their_colours() -> None:
    """Means over many lesions: vasc and akiec are reddest, df is brighter than nv and mel."""

    def middle(label: str) -> np.ndarray:
        images_and_truths = [render_lesion(label, rng(6, seed), 32) for seed in range(25)]
        return np.mean(
            [image[truth["mask"]].mean(axis=0) for image, truth in images_and_truths], axis=0
        )

    colour = {label: middle(label) for label in LESION_LABELS}
    redness = {label: value[0] - value[1:].mean() for label, value in colour.items()}
    assert min(redness["vasc"], redness["akiec"]) > max(
        redness["nv"], redness["df"], redness["bcc"], redness["mel"]
    )
    assert colour["df"].mean() > colour["nv"].mean() > colour["mel"].mean()
    assert (
        colour["bkl"][0] - colour["bkl"][2] > colour["nv"][0] - colour["nv"][2]
    )  # waxy yellow against brown


def test_image_agrees_with_tone_hair_and_ruler_of_the_truth() -> None:
    images_and_truths = [
        render_lesion("nv", rng(7, seed), 32, lesion_look(seed % 3)) for seed in range(40)
    ]
    tones = [truth["tone"] for _, truth in images_and_truths]
    border = [
        np.median(image[4:-4, 4:-4].reshape(-1, 3), axis=0).mean() for image, _ in images_and_truths
    ]
    assert np.corrcoef(tones, border)[0, 1] < -0.7
    assert {truth["ruler"] for _, truth in images_and_truths} == {True, False}
    assert len({truth["hairs"] for _, truth in images_and_truths}) > 3


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
def test_finding_is_at_its_true_location(finding: str, least: float) -> None:
    """The mask of a finding differs in brightness from the lungs of the same film."""
    for seed in range(6):
        sick, truth = render_chest([finding], rng(8, seed), 64, patient=rng(9, seed))
        mask = truth[f"{finding}_mask"]
        assert mask.any()
        difference = contrast(sick, mask, truth["lungs"])
        assert difference > least if least > 0 else difference < least, (seed, difference)


def test_effusion_covers_the_costophrenic_angle_of_its_side() -> None:
    for seed in range(10):
        film, truth = render_chest(["effusion"], rng(10, seed), 64)
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
        return [render_chest(findings, rng(11, seed), 16)[1]["heart_ratio"] for seed in range(20)]

    assert max(ratio([])) < 0.55 < min(ratio(["cardiomegaly"]))


def test_one_film_can_have_several_findings() -> None:
    film, truth = render_chest(CHEST_LABELS, rng(12), 64)
    assert truth["findings"] == sorted(CHEST_LABELS)
    assert all(truth[f"{name}_mask"].any() for name in CHEST_LABELS)
    assert film.std() > 20
    clean = render_chest([], rng(12), 64)[1]
    assert clean["findings"] == []
    assert not [name for name in clean if name.endswith("_mask")]


def test_unknown_names_and_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="akiec"):
        render_lesion("melanoma", rng(0), 32)
    with pytest.raises(DataError, match="cardiomegaly"):
        render_chest(["fracture"], rng(0), 32)
    for resolution in (8, 33, 2048):
        with pytest.raises(ConfigError, match="power of two"):
            render_lesion("nv", rng(0), resolution)


# --- canvas -------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from(["broad", "coarse", "middle"]))
def test_noise_is_the_same_field_on_every_canvas(seed: int, band: str) -> None:
    small, large = make_canvas(32), make_canvas(128)
    mean = area_mean(large.noise(rng(seed), band), small.work)
    assert np.corrcoef(mean.ravel(), small.noise(rng(seed), band).ravel())[0, 1] > 0.97


@settings(max_examples=30)
@given(st.floats(-0.7, 0.7), st.floats(-0.7, 0.7), st.floats(0, np.pi), st.floats(0.004, 0.05))
def test_stroke_covers_its_area_at_every_width(
    x: float, y: float, angle: float, half_width: float
) -> None:
    """Coverage is length times width plus round ends, also for lines thinner than a pixel."""
    canvas = make_canvas(32)
    half = 0.25 * np.array([np.cos(angle), np.sin(angle)])
    middle = np.array([x, y])
    line = np.stack([middle - half, middle, middle + half])[None]
    covered = canvas.strokes(line, half_width).sum() * canvas.pixel**2
    wide = max(2 * half_width, canvas.pixel)
    assert 0.7 * 0.5 * 2 * half_width < covered < 1.5 * (0.5 * 2 * half_width + wide**2)


# --- hospitals ----------------------------------------------------------------------------------


def test_three_hospitals_have_50_30_and_20_per_cent() -> None:
    assert hospital_sizes(3000, 3) == [1500, 900, 600]
    assert hospital_sizes(30, 3) == [15, 9, 6]


@given(st.integers(400, 5000), st.integers(1, 8))
def test_hospital_sizes_decrease_and_add_up(images: int, hospitals: int) -> None:
    sizes = hospital_sizes(images, hospitals)
    assert sum(sizes) == images
    assert sizes == sorted(sizes, reverse=True)


@settings(max_examples=25)
@given(st.sampled_from(KINDS), st.integers(200, 1500), st.integers(1, 5), st.integers(0, 1000))
def test_labels_are_in_every_split_and_in_two_hospitals(
    kind: str, images: int, hospitals: int, seed: int
) -> None:
    assigned = assign_patients(kind, hospital_sizes(images, hospitals), seed)
    labels = LESION_LABELS if kind == "lesions" else CHEST_LABELS
    for split in ("train", "val", "test"):
        seen = {
            label
            for patients in assigned
            for patient in patients
            if patient["split"] == split
            for label in patient["labels"]
        }
        assert seen == set(labels)
    for label in labels:
        holders = sum(
            any(label in patient["labels"] for patient in patients) for patients in assigned
        )
        assert holders >= min(2, hospitals)
    for patients, size in zip(assigned, hospital_sizes(images, hospitals), strict=True):
        assert sum(patient["images"] for patient in patients) == size
    everyone = [patient["split"] for patients in assigned for patient in patients]
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
def test_shards_agree_with_their_truth_file(tmp_path: Path, kind: str) -> None:
    paths = write_phantoms(tmp_path, kind, 120, 16, seed=5)
    assert [path.name for path in paths] == ["north", "south", "east"]
    shards = [Shard.open(path, verify=True) for path in paths]
    assert [len(shard) for shard in shards] == [60, 36, 24]
    everyone: list[str] = []
    for shard in shards:
        assert shard.card.exclusive == (kind == "lesions")
        assert shard.card.channels == (3 if kind == "lesions" else 1)
        truths = [json.loads(line) for line in (shard.path / TRUTH).read_text().splitlines()]
        labels = [
            {truth["label"]} if kind == "lesions" else set(truth["findings"]) for truth in truths
        ]
        names = [{shard.card.label_names[k] for k in np.flatnonzero(row)} for row in shard.labels]
        assert labels == names
        assert set(shard.samples.splits) == {"train", "val", "test"}
        everyone += sorted(set(shard.samples.patients))
    assert (
        len(everyone) == len(set(everyone)) < 120
    )  # a patient has one hospital; some have several images
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


def test_seed_determines_every_byte(tmp_path: Path) -> None:
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
    tones = {
        render_lesion("nv", rng(13, view), 16, patient=rng(14))[1]["tone"] for view in range(4)
    }
    assert len(tones) == 1
    films = [render_chest([], rng(13, view), 16, patient=rng(14))[1] for view in range(4)]
    assert len({film["female"] for film in films}) == 1


def test_images_differ_between_hospitals() -> None:
    """The same lesion and film differ in brightness or colour between devices."""
    for first in range(3):
        for second in range(first):
            skins = [
                render_lesion("nv", rng(15), 32, lesion_look(k), patient=rng(16))[0]
                for k in (first, second)
            ]
            assert np.abs(skins[0].astype(float) - skins[1].astype(float)).mean() > 5
            films = [
                render_chest([], rng(15), 32, chest_look(k), patient=rng(16))[0]
                for k in (first, second)
            ]
            assert np.abs(films[0].astype(float) - films[1].astype(float)).mean() > 3


def test_invalid_arguments_are_refused_before_writing(tmp_path: Path) -> None:
    root = tmp_path / "new"
    with pytest.raises(DataError, match="lesions, chest"):
        write_phantoms(root, "brains", 100, 32)
    with pytest.raises(ConfigError, match="power of two"):
        write_phantoms(root, "lesions", 100, 48)
    with pytest.raises(ConfigError, match=r"data\.phantom_images"):
        write_phantoms(root, "lesions", 12, 32)
    with pytest.raises(ConfigError, match=r"data\.phantom_images"):
        write_phantoms(root, "lesions", 15, 32, hospitals=1)
    with pytest.raises(ConfigError, match="hospital"):
        write_phantoms(root, "lesions", 100, 32, hospitals=0)
    assert not root.exists()
    write_phantoms(root, "lesions", 30, 16)
    before = (root / "north" / "card.json").read_bytes()
    (root / "north").rename(tmp_path / "aside")
    with pytest.raises(DataError, match="south exists"):
        write_phantoms(root, "lesions", 30, 16)
    assert not (root / "north").exists()  # found before the first hospital was written
    (tmp_path / "aside").rename(root / "north")
    write_phantoms(root, "lesions", 30, 16, seed=1, overwrite=True)
    assert (root / "north" / "card.json").read_bytes() != before
