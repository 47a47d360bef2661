"""Importers: every row is in a shard or a count with its reason; invalid sources write nothing."""

import csv
import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedgan.data.importers import (
    Columns,
    ImportOptions,
    folder,
    import_source,
    read_folder,
    read_manifest,
    read_npz,
)
from fedgan.data.importers.pixels import UnreadableError, decode, fit_square
from fedgan.data.labels import LabelMap
from fedgan.errors import ConfigError, DataError, SplitError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_png(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def own_pack(
    path: Path, count: int = 60, card: dict | None = None, **changes: np.ndarray | None
) -> Path:
    arrays = {
        "images": noise(count, 16, 16),
        "label": (np.arange(count) % 3).astype(np.uint8),
        "institution": (np.arange(count) >= 40).astype(np.uint8),
        "split": ((np.arange(count) // 2) % 5 == 0).astype(np.uint8),
        "patient": np.array([f"p{i // 2}" for i in range(count)]),
        "name": np.array([f"{i}.png" for i in range(count)]),
        **changes,
    }
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
    names = {"labels": ["normal", "a", "b"], "institutions": ["north", "St. Mary's / south"]}
    path.with_suffix(".json").write_text(json.dumps(names if card is None else card))
    return path


def test_copies_share_a_split_and_copies_across_given_splits_count(
    tmp_path,
):
    rng = np.random.default_rng(0)
    images = np.repeat(rng.integers(0, 256, (30, 16, 16), dtype=np.uint8), 2, axis=0)
    bare = own_pack(
        tmp_path / "bare.npz",
        images=images,
        label=np.zeros(60, int),
        institution=None,
        split=None,
        patient=None,
        name=None,
    )
    (shard,) = import_source(read_npz(bare), tmp_path / "bare")
    splits = shard.samples.splits
    assert np.array_equal(splits[::2], splits[1::2])
    assert len(set(splits.tolist())) == 3
    assert not any("another split" in note for note in shard.card.notes)
    given = own_pack(
        tmp_path / "given.npz",
        images=images,
        label=np.zeros(60, int),
        institution=None,
        split=np.arange(60) % 2,
        patient=None,
        name=None,
    )
    (shard,) = import_source(read_npz(given), tmp_path / "given")
    assert any("copy is in another split: 30" in note for note in shard.card.notes)


# --- npz -----------------------------------------------------------------------------------------


def test_own_npz_layout_gives_one_shard_per_institution(tmp_path):
    card = {
        "labels": ["normal", "a", "b"],
        "institutions": ["north", "St. Mary's / south"],
        "title": "Two towns",
        "provenance": [{"institution": "north", "data_licence": "CC BY 4.0"}],
    }
    pack = own_pack(tmp_path / "pack.npz", card=card)
    south, north = import_source(read_npz(pack), tmp_path / "out")  # by name: capitals come first
    with np.load(pack) as arrays:
        images, split = arrays["images"], arrays["split"]
    assert (north.name, south.name) == ("north", "St.-Mary-s-south")
    assert np.array_equal(np.asarray(north.images)[:, 0], images[:40])
    assert np.array_equal(np.asarray(south.images)[:, 0], images[40:])
    assert np.array_equal(north.samples.splits == "test", split[:40] == 1)
    assert set(south.samples.institutions) == {"St. Mary's / south"}
    assert north.card.label_names == south.card.label_names == ("normal", "a", "b")
    assert (north.card.licence, south.card.licence, north.card.source) == (
        "CC BY 4.0",
        "",
        "Two towns",
    )
    assert north.card.images["val"] > 0
    assert "no" in north.card.resize
    assert north.samples.sources[3] == "3.png"


def test_npz_arrays_can_hold_the_code_names(tmp_path):
    pack = own_pack(
        tmp_path / "pack.npz",
        labels=np.array(["x", "y", "z"]),
        institutions=np.array(["one", "two"]),
    )
    pack.with_suffix(".json").unlink()
    assert [shard.name for shard in import_source(read_npz(pack), tmp_path / "out")] == [
        "one",
        "two",
    ]
    bare = own_pack(tmp_path / "bare.npz", institution=None, split=None, patient=None, name=None)
    bare.with_suffix(".json").unlink()
    (shard,) = import_source(read_npz(bare), tmp_path / "bare")
    assert shard.name == "bare"
    assert shard.card.label_names == ("class-0", "class-1", "class-2")
    assert shard.card.images == {"train": 43, "val": 6, "test": 11}
    assert "images without a patient id, each its own patient: 60" in shard.card.notes


def test_label_map_merges_classes_and_keeps_the_split(tmp_path):
    pack = own_pack(tmp_path / "pack.npz")
    six = import_source(read_npz(pack), tmp_path / "six")
    two = import_source(
        read_npz(pack), tmp_path / "two", ImportOptions(label_map="normal=normal,*=abnormal")
    )
    for before, after in zip(six, two, strict=True):
        assert after.card.label_names == ("normal", "abnormal")
        assert np.array_equal(after.labels[:, 0], before.labels[:, 0])
        assert np.array_equal(after.labels[:, 1], before.labels[:, 1] | before.labels[:, 2])
        assert np.array_equal(before.samples.splits, after.samples.splits)
    with pytest.raises(DataError, match="no rule for 'a'"):
        import_source(
            read_npz(pack), tmp_path / "none", ImportOptions(label_map="normal=normal,b=abnormal")
        )
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("columns", [1, 3])
def test_medmnist_layout_keeps_its_splits(tmp_path, columns):
    counts = {"train": 20, "val": 5, "test": 7}
    arrays = {}
    for seed, (split, count) in enumerate(counts.items()):
        arrays[f"{split}_images"] = noise(count, 28, 28, 3, seed=seed)
        arrays[f"{split}_labels"] = (
            np.arange(count)[:, None] % 2 if columns == 1 else noise(count, 3, seed=seed) % 2
        )
    np.savez(tmp_path / "dermamnist.npz", **arrays)
    (tmp_path / "dermamnist.json").write_text(
        json.dumps({"labels": {str(i): f"l{i}" for i in range(3 if columns > 1 else 2)}})
    )
    with pytest.raises(DataError, match=r"28×28.*--resolution 32"):
        import_source(read_npz(tmp_path / "dermamnist.npz"), tmp_path / "out")
    (shard,) = import_source(
        read_npz(tmp_path / "dermamnist.npz"), tmp_path / "out", ImportOptions(resolution=32)
    )
    assert shard.card.images == counts
    assert (shard.card.channels, shard.card.exclusive) == (3, columns == 1)
    assert "LANCZOS" in shard.card.resize
    for split in counts:
        wanted = arrays[f"{split}_labels"]
        wanted = np.eye(2, dtype=np.uint8)[wanted[:, 0]] if columns == 1 else wanted
        assert np.array_equal(shard.labels[shard.rows(split)], wanted)
    first = Image.fromarray(arrays["val_images"][0]).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(
        shard.images[shard.rows("val")[:1]][0], np.asarray(first).transpose(2, 0, 1)
    )


def test_fortran_order_and_channel_axis_give_the_same_images(tmp_path):
    plain = import_source(read_npz(own_pack(tmp_path / "a.npz")), tmp_path / "a")
    images = np.asfortranarray(noise(60, 16, 16)[..., None])
    other = import_source(read_npz(own_pack(tmp_path / "b.npz", images=images)), tmp_path / "b")
    assert [shard.card.content_hash for shard in plain] == [
        shard.card.content_hash for shard in other
    ]


def test_npz_keeps_and_counts_duplicates_by_default(tmp_path):
    images = noise(60, 16, 16)
    images[1] = images[0]  # the next label
    images[3] = images[0]  # the same label
    pack = own_pack(tmp_path / "pack.npz", images=images)
    kept = import_source(read_npz(pack), tmp_path / "kept")
    assert sum(map(len, kept)) == 60
    assert any("kept: 2" in note for note in kept[0].card.notes)
    _, north = import_source(read_npz(pack), tmp_path / "skipped", ImportOptions(duplicates="skip"))
    assert north.card.skipped == {"identical pixels": 1, "identical pixels with another label": 1}
    assert len(north) == 38


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"label": np.full(60, 3, np.uint8)},
            "60 images have a label code outside the card's 3 labels",
        ),
        ({"label": np.array(["odd"] * 60)}, "'odd' is not in the card"),
        ({"label": np.zeros(59, np.uint8)}, "59 entries for 60 images"),
        ({"label": np.zeros(60)}, "whole numbers"),
        ({"label": np.full((60, 3), 2, np.uint8)}, "label columns of 0 and 1"),
        ({"institution": np.full(60, 2, np.uint8)}, "'institution' holds a code outside"),
        ({"split": np.full(60, 9, np.uint8)}, "'split' holds a code outside"),
        ({"images": np.zeros((60, 16, 16), np.float32)}, "must be uint8"),
        ({"images": np.zeros((60, 16, 16, 2), np.uint8)}, "must be uint8"),
        ({"images": None}, "neither 'images' nor 'train_images'"),
        ({"label": np.array([{}] * 60, dtype=object)}, "pickle"),
    ],
)
def test_invalid_npz_is_one_clear_error(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        import_source(read_npz(own_pack(tmp_path / "pack.npz", **changes)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("left", [0, 0.3, 0.9])
def test_truncated_or_missing_npz_is_one_clear_error(tmp_path, left):
    pack = own_pack(tmp_path / "pack.npz")
    pack.write_bytes(pack.read_bytes()[: int(left * pack.stat().st_size)])
    with pytest.raises(DataError, match="truncated or damaged"):
        read_npz(pack)
    with pytest.raises(DataError, match="no file at"):
        read_npz(tmp_path / "nowhere.npz")


def test_damaged_npz_images_leave_no_output(tmp_path):
    pack = own_pack(tmp_path / "pack.npz")
    data = bytearray(pack.read_bytes())
    data[5000:5100] = bytes(100)  # inside the first member, the images
    pack.write_bytes(data)
    with pytest.raises(DataError, match="truncated or damaged"):
        import_source(read_npz(pack), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pack.json", "pack.npz"]


def test_patient_in_two_splits_of_the_source_is_refused(tmp_path):
    split = (np.arange(60) % 2).astype(np.uint8)  # each patient has an even and an odd row
    with pytest.raises(SplitError, match="30 patients are in more than one split"):
        import_source(read_npz(own_pack(tmp_path / "pack.npz", split=split)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_non_empty_output_is_refused(tmp_path):
    pack = own_pack(tmp_path / "pack.npz")
    (tmp_path / "out").mkdir()
    import_source(read_npz(pack), tmp_path / "out")
    before = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(DataError, match="not empty"):
        import_source(read_npz(pack), tmp_path / "out", ImportOptions(seed=1))
    assert sorted((tmp_path / "out").rglob("*")) == before


# --- folders -------------------------------------------------------------------------------------


def test_class_folders_count_every_skipped_file(tmp_path):
    root = tmp_path / "photos"
    for i in range(20):
        save_png(
            root / ("cat" if i % 2 else "dog") / f"person{i // 4}_{i}.png",
            noise(20 + i, 30, seed=i),
        )
    save_png(root / "cat" / "deeper" / "person9_0.PNG", noise(16, 16, seed=50))
    save_png(root / "dog" / "copy.png", noise(21, 30, seed=1))  # the pixels of a cat
    save_png(root / "stray.png", noise(16, 16))
    (root / "dog" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    whole = (root / "cat" / "person0_1.png").read_bytes()
    (root / "cat" / "short.png").write_bytes(whole[: len(whole) // 2])
    (root / "cat" / "notes.txt").write_text("hello")
    source = read_folder(root, patient_pattern=r"(person\d+)_")
    (shard,) = import_source(source, tmp_path / "out", ImportOptions(resolution=16))
    assert len(shard) + sum(shard.card.skipped.values()) == 26
    assert shard.card.skipped == {
        "identical pixels with another label": 1,
        "not an image file": 1,
        "not in a class folder": 1,
        "unreadable or truncated file": 2,
    }
    assert shard.card.label_names == ("cat", "dog")
    assert len(np.unique(shard.samples.patients)) == 6
    assert shard.name == "photos"
    assert [source.startswith("cat/") for source in shard.samples.sources] == (
        shard.labels[:, 0] == 1
    ).tolist()


def test_split_folders_keep_their_split(tmp_path):
    for i in range(24):
        save_png(
            tmp_path / "x" / ("training", "Test")[i % 3 == 0] / f"c{i % 2}" / f"{i}.png",
            noise(16, 16, seed=i),
        )
    (shard,) = import_source(read_folder(tmp_path / "x"), tmp_path / "out")
    assert shard.card.images["test"] == 8
    assert shard.card.label_names == ("c0", "c1")
    assert [source.startswith("Test") for source in shard.samples.sources] == (
        shard.samples.splits == "test"
    ).tolist()


def test_folder_without_usable_images_is_one_clear_error(tmp_path):
    with pytest.raises(DataError, match="no folder at"):
        read_folder(tmp_path / "nowhere")
    save_png(tmp_path / "flat" / "a.png", noise(16, 16))
    with pytest.raises(DataError, match="no image in class folders"):
        read_folder(tmp_path / "flat")
    (tmp_path / "bad" / "c").mkdir(parents=True)
    (tmp_path / "bad" / "c" / "a.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"unreadable or truncated file \(1\)"):
        import_source(read_folder(tmp_path / "bad"), tmp_path / "out", ImportOptions(resolution=16))
    with pytest.raises(DataError, match="exactly one group"):
        read_folder(tmp_path / "bad", patient_pattern="person")
    with pytest.raises(DataError, match="no regular expression"):
        read_folder(tmp_path / "bad", patient_pattern="(person")


# --- manifests -----------------------------------------------------------------------------------


def manifest(path: Path, rows: list[dict[str, object]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def save_images(folder: Path, count: int) -> list[str]:
    return [save_png(folder / f"{i}.png", noise(16, 16, seed=i)).name for i in range(count)]


def test_manifest_with_one_label_column(tmp_path):
    names = save_images(tmp_path, 30)
    rows = [
        {
            "path": name,
            "label": "mel" if i % 3 else "nv",
            "patient": f"p{i // 3}",
            "institution": "AB"[i >= 18],
            "split": "",
        }
        for i, name in enumerate(names)
    ]
    for i, row in enumerate(rows):
        row["split"] = ("Train", "testing", "valid")[(i // 3) % 3]
    rows[0]["label"], rows[1]["path"], rows[2]["split"], rows[29]["path"] = "", "", "", "gone.png"
    a, b = import_source(read_manifest(manifest(tmp_path / "m.csv", rows)), tmp_path / "out")
    assert (a.card.skipped, b.card.skipped) == (
        {"no label": 1, "no path": 1, "no split": 1},
        {"missing file": 1},
    )
    assert len(a) + len(b) == 26
    assert a.card.label_names == ("mel", "nv")
    wanted = {
        row["path"]: {"Train": "train", "testing": "test", "valid": "val"}.get(str(row["split"]))
        for row in rows
    }
    for shard in (a, b):
        assert all(
            wanted[name] == split
            for name, split in zip(shard.samples.sources, shard.samples.splits, strict=True)
        )


@pytest.mark.parametrize("given", [False, True])
def test_a_record_removed_before_import_changes_no_other_row(tmp_path, given):
    save_images(tmp_path, 60)
    rows = [
        {
            "path": f"{number}.png",
            "label": "abc"[number % 3],
            "patient": "" if number % 5 == 0 else f"p{number // 3}",
            "institution": "north" if number < 35 else "south",
            **({"split": "train" if number // 6 % 4 else "test"} if given else {}),
        }
        for number in np.random.default_rng(0).permutation(60).tolist()
    ]

    def imported(name: str, kept: list[dict[str, object]]) -> dict[str, tuple]:
        source = read_manifest(manifest(tmp_path / f"{name}.csv", kept))
        return {
            str(samples.sources[row]): (
                samples.patients[row],
                samples.institutions[row],
                samples.splits[row],
                shard.labels[row].tobytes(),
                shard.images[row].tobytes(),
            )
            for shard in import_source(source, tmp_path / name)
            for samples in [shard.samples]
            for row in range(len(shard))
        }

    whole = imported("whole", rows)
    assert len(whole) == 60
    assert {found[2] for found in whole.values()} == {"train", "val", "test"}
    for number, gone in enumerate([rows[0], next(row for row in rows if not row["patient"])]):
        unit = ("patient", "institution", *([] if gone["patient"] else ["path"]))
        rest = [row for row in rows if any(row[key] != gone[key] for key in unit)]
        left = imported(f"rest{number}", rest)
        assert left == {name: whole[name] for name in left}
        assert len(left) == len(rest) < 60


def test_manifest_with_several_label_columns(tmp_path):
    names = save_images(tmp_path / "images", 12)
    rows = [
        {"file": name, "effusion": i % 2, "nodule": (i // 2) % 2, "subject": i // 2}
        for i, name in enumerate(names)
    ]
    rows[3]["nodule"], rows[4]["effusion"] = "-1", ""
    columns = Columns("file", ("effusion", "nodule"), patient="subject")
    file = manifest(tmp_path / "findings.csv", rows)
    (shard,) = import_source(
        read_manifest(file, columns, root=tmp_path / "images", name="ward 7"), tmp_path / "out"
    )
    assert shard.name == "ward-7"
    assert not shard.card.exclusive
    assert shard.card.skipped == {"label neither 0 nor 1": 1, "no label": 1}
    rows = [row for i, row in enumerate(rows) if i not in (3, 4)]
    assert shard.labels.tolist() == [[row["effusion"], row["nodule"]] for row in rows]
    assert shard.samples.patients.tolist() == [str(row["subject"]) for row in rows]


def test_one_hot_columns_are_exclusive_classes(tmp_path):
    rows = [
        {"path": name, "MEL": i % 2, "NV": 1 - i % 2}
        for i, name in enumerate(save_images(tmp_path, 10))
    ]
    (shard,) = import_source(
        read_manifest(manifest(tmp_path / "m.csv", rows), Columns(labels=("MEL", "NV"))),
        tmp_path / "out",
    )
    assert shard.card.exclusive
    (bare,) = import_source(
        read_manifest(tmp_path / "m.csv", Columns(labels=())), tmp_path / "bare"
    )
    assert bare.labels.shape == (10, 0)


def test_invalid_manifest_error_names_column_or_row(tmp_path):
    rows = [
        {"path": name, "label": "a", "patiant": i, "split": "holdout"}
        for i, name in enumerate(save_images(tmp_path, 4))
    ]
    file = manifest(tmp_path / "m.csv", rows)
    for columns, message in (
        (Columns(patient="patient"), "no column 'patient'; did you mean 'patiant'"),
        (
            Columns(labels=("finding",)),
            "no column 'finding': name one of path, label, patiant, split with --label-column",
        ),
        (Columns(), "'holdout' is no split"),
    ):
        with pytest.raises(DataError, match=message):
            read_manifest(file, columns)
    (tmp_path / "ragged.csv").write_text("path,label\na.png,x,y\n")
    with pytest.raises(DataError, match="row 2 has 3 cells for 2 columns"):
        read_manifest(tmp_path / "ragged.csv")
    (tmp_path / "empty.csv").write_text("path,label\n")
    with pytest.raises(DataError, match="no row below its header"):
        read_manifest(tmp_path / "empty.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00path")
    with pytest.raises(DataError, match="no readable CSV"):
        read_manifest(tmp_path / "binary.csv")


# --- pixels --------------------------------------------------------------------------------------


def test_images_are_stretched_unless_cropped(tmp_path):
    pixels = np.zeros((32, 64), np.uint8)
    pixels[:, 16:48] = 200
    stretched, cropped = fit_square(pixels, 16, 1, crop=False), fit_square(pixels, 16, 1, crop=True)
    assert (cropped == 200).all()
    assert stretched[0, 8, 0] < 20
    assert stretched[0, 8, 8] == 200
    assert fit_square(pixels, 16, 3, crop=True).shape == (3, 16, 16)


def test_decode_handles_16_bit_exif_rotation_and_alpha(tmp_path):
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(decode(tmp_path / "deep.png"), (deep >> 8).astype(np.uint8))
    picture = Image.fromarray(noise(16, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise
    picture.save(tmp_path / "rotated.png", exif=exif)
    assert np.array_equal(decode(tmp_path / "rotated.png"), np.rot90(np.asarray(picture), -1))
    Image.fromarray(noise(16, 16, 4), "RGBA").save(tmp_path / "alpha.png")
    assert decode(tmp_path / "alpha.png").shape == (16, 16, 3)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(UnreadableError, match="floating"):
        decode(tmp_path / "float.tiff")


# --- label maps ----------------------------------------------------------------------------------

LABELS = st.text(st.sampled_from("abcdefgh"), min_size=1, max_size=3)


@given(st.lists(LABELS, min_size=1, max_size=5, unique=True), st.data())
@settings(max_examples=50)
def test_label_maps_compose(names, data):
    middle = data.draw(st.lists(LABELS, min_size=len(names), max_size=len(names)))
    first = LabelMap(tuple(zip(names, middle, strict=True)))
    reached = list(dict.fromkeys(middle))
    second = LabelMap(tuple((name, data.draw(LABELS)) for name in reached))
    both = LabelMap(tuple((name, second.target(first.target(name))) for name in names))
    labels = np.random.default_rng(len(names)).integers(0, 2, (20, len(names)), dtype=np.uint8)
    after, after_names = second.apply(*first.apply(labels, names))
    whole, whole_names = both.apply(labels, names)
    assert after_names == whole_names
    assert np.array_equal(after, whole)
    assert np.array_equal(whole.any(axis=1), labels.any(axis=1))


@given(st.lists(LABELS, min_size=1, max_size=6, unique=True), st.data())
@settings(max_examples=50)
def test_label_map_keeps_one_label_per_image(names, data):
    label_map = LabelMap(
        (*((n, data.draw(LABELS)) for n in names if data.draw(st.booleans())), ("*", "rest"))
    )
    labels = np.eye(len(names), dtype=np.uint8)
    mapped, out = label_map.apply(labels, names)
    assert (mapped.sum(axis=1) == 1).all()
    assert [out[row.argmax()] for row in mapped] == [label_map.target(name) for name in names]
    assert mapped.any(axis=0).all()
    same, same_names = LabelMap.parse("").apply(labels, names)
    assert same_names == tuple(names)
    assert np.array_equal(same, labels)


def test_label_map_parsing_and_errors():
    label_map = LabelMap.parse(" normal = normal , * = abnormal ")
    assert label_map.names(["x", "normal", "y"]) == ("normal", "abnormal")
    with pytest.raises(DataError, match="did you mean 'normal'"):
        LabelMap.parse("norml=normal,*=abnormal").names(["normal", "x"])
    for text, message in (
        ("normal", "is no rule"),
        ("a=", "is no rule"),
        ("a=*", "is no rule"),
        ("a=b,a=c", "two rules"),
    ):
        with pytest.raises(ConfigError, match=message):
            LabelMap.parse(text)


# --- sources that were made to harm ---------------------------------------------------------------


def npz_with(path: Path, key: str, header: bytes, body: bytes) -> Path:
    """A pack whose array `key` has this header and body, compressed."""
    own_pack(path, **{key: None})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{key}.npy", header + body)
    return path


def npy_header(shape: str, descr: str = "|u1") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("key", "shape", "descr", "body"),
    [
        ("images", "(10**9, 16, 16)", "|u1", b""),
        ("images", "(1000000000, 16, 16)", "|u1", bytes(100)),
        ("images", "(1000000000000, 0, 16)", "|u1", b""),
        ("images", "(-1, 16, 16)", "|u1", b""),
        ("label", "(60,)", "<U100000000", bytes(60)),
        ("label", "(60,)", "|O", bytes(60)),
        ("label", "(60,)", "|V9", bytes(540)),
        ("patient", "(60,)", "<U2", b"\xff" * 480),
        ("label", "()", "<i8", bytes(8)),
    ],
)
def test_array_unlike_its_header_is_not_read(tmp_path, key, shape, descr, body):
    path = npz_with(tmp_path / "pack.npz", key, npy_header(shape, descr), body)
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            import_source(read_npz(path), tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert not (tmp_path / "out").exists()


def test_huge_label_code_is_refused(tmp_path):
    path = own_pack(tmp_path / "pack.npz", card={}, label=np.arange(60) * 10**15)
    with pytest.raises(DataError, match="at most 10000 are possible"):
        read_npz(path)


def test_encrypted_member_is_one_clear_error(tmp_path):
    path = own_pack(tmp_path / "pack.npz")
    data = bytearray(path.read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(magic) + offset] |= 1  # the flag of encryption
    path.write_bytes(data)
    with pytest.raises(DataError, match="truncated or damaged"):
        read_npz(path)


def test_names_pipes_and_links_of_a_folder_are_counted_or_refused(tmp_path):
    for number in range(12):
        save_png(
            tmp_path / "source" / f"class-{number % 2}" / f"{number}.png",
            noise(16, 16, seed=number),
        )
    os.mkfifo(tmp_path / "source" / "class-0" / "pipe.png")
    strange = os.fsencode(tmp_path / "source" / "class-0") + b"/\xff.png"
    os.link(tmp_path / "source" / "class-0" / "0.png", os.fsdecode(strange))
    (shard,) = import_source(read_folder(tmp_path / "source"), tmp_path / "out")
    assert shard.card.skipped == {"a name that is not UTF-8": 1, "not a regular file": 1}

    save_png(tmp_path / "elsewhere.png", noise(16, 16, seed=99))
    (tmp_path / "source" / "class-1" / "link.png").symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(DataError, match="leads out of"):
        read_folder(tmp_path / "source")
    assert len(read_folder(tmp_path / "source", outside=True)) == 14


@pytest.mark.parametrize("outside", ["../secret.png", "{root}/secret.png"])
def test_manifest_path_out_of_its_root_is_refused(tmp_path, outside):
    save_png(tmp_path / "secret.png", noise(16, 16))
    manifest = tmp_path / "data" / "images.csv"
    manifest.parent.mkdir()
    manifest.write_text(f"path,label\n{outside.format(root=tmp_path)},a\n")
    with pytest.raises(DataError, match="leads out of"):
        read_manifest(manifest)
    assert len(read_manifest(manifest, outside=True)) == 1
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match="no file at"):
        read_manifest(tmp_path / "pipe.csv")


def test_exponential_pattern_is_stopped(tmp_path, monkeypatch):
    save_png(tmp_path / "source" / "a" / f"{'a' * 60}!.png", noise(16, 16))
    monkeypatch.setattr(folder, "PATTERN_SECONDS", 0.3)
    with pytest.raises(DataError, match="takes more than"):
        read_folder(tmp_path / "source", patient_pattern="((?:a+)+)$")
    assert len(read_folder(tmp_path / "source", patient_pattern="(a+)")) == 1
