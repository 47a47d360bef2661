"""`fedgan data`: import, phantoms, show."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedgan.cli import main
from fedgan.data.contact_sheet import contact_sheet
from fedgan.data.shard import Shard, write_shard


def photos(root: Path, count: int = 24) -> Path:
    for i in range(count):
        place = root / ("benign", "malign")[i % 2] / f"patient{i // 3}_{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        colour = (200, 30, 30) if i % 2 else (30, 200, 30)
        pixels = np.random.default_rng(i).integers(0, 20, (16, 16, 3), dtype=np.uint8) + np.array(
            colour, np.uint8
        )
        Image.fromarray(pixels).save(place)
    return root


def test_import_then_show_then_import_again_is_refused(tmp_path, capsys):
    source, output = photos(tmp_path / "clinic"), tmp_path / "out"
    arguments = [
        "data",
        "import",
        "folder",
        str(source),
        "--output",
        str(output),
        "--patient",
        r"(patient\d+)_",
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "wrote" in text
    assert "24 images" in text
    assert f"data.root={output}" in text
    assert (
        main(["data", "show", str(output), "--output", str(tmp_path / "sheet.png"), "--verify"])
        == 0
    )
    text = capsys.readouterr().out
    assert "benign" in text
    assert "16×16 RGB, 2 classes" in text
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "not empty" in error
    assert error.count("\n") == 1
    assert len(Shard.open(output / "clinic")) == 24


def test_json_output_is_one_object(tmp_path, capsys):
    source, output = photos(tmp_path / "clinic"), tmp_path / "out"
    assert (
        main(
            [
                "data",
                "import",
                "folder",
                str(source),
                "-o",
                str(output),
                "--label-map",
                "*=lesion",
                "--json",
            ]
        )
        == 0
    )
    written = json.loads(capsys.readouterr().out)
    assert (
        written["shards"][0]["counts"]["train"]["lesion"] == written["shards"][0]["images"]["train"]
    )
    assert main(["data", "show", str(output), "--json", "--no-sheet"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["shards"] == written["shards"]
    assert shown["contact_sheet"] is None
    assert sorted(path.name for path in output.iterdir()) == ["clinic"]


def test_npz_and_csv_imports_take_their_options(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "pack.npz",
        images=rng.integers(0, 256, (30, 28, 28), dtype=np.uint8),
        label=np.arange(30) % 3,
    )
    assert (
        main(
            [
                "data",
                "import",
                "npz",
                str(tmp_path / "pack.npz"),
                "-o",
                str(tmp_path / "a"),
                "-r",
                "32",
                "--seed",
                "4",
            ]
        )
        == 0
    )
    assert Shard.open(tmp_path / "a" / "pack").card.resolution == 32
    photos(tmp_path / "clinic")
    files = sorted(tmp_path.rglob("p*_*.png"))
    lines = [f"{file.relative_to(tmp_path)},{file.parent.name},{file.name[:8]}" for file in files]
    (tmp_path / "m.csv").write_text("\n".join(["file,kind,who", *lines]))
    options = [
        "--path-column",
        "file",
        "--label-column",
        "kind",
        "--patient-column",
        "who",
        "--channels",
        "grey",
        "--name",
        "x",
    ]
    assert (
        main(
            ["data", "import", "csv", str(tmp_path / "m.csv"), "-o", str(tmp_path / "b"), *options]
        )
        == 0
    )
    shard = Shard.open(tmp_path / "b" / "x")
    assert (len(shard), shard.card.channels, sum(shard.card.patients.values())) == (24, 1, 8)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["show", "nowhere"], 3, "no data at nowhere"),
        (["import", "npz", "nowhere.npz", "-o", "out"], 3, "no file at nowhere.npz"),
        (["import", "folder", "nowhere", "-o", "out"], 3, "no folder at nowhere"),
        (["import", "folder", "clinic", "-o", "out", "-r", "24"], 3, "24 is no power of two"),
        (
            ["import", "folder", "clinic", "-o", "out", "--label-map", "benign"],
            2,
            "no rule of a label map",
        ),
        (["import", "folder", "clinic", "-o", "out", "--val", "0.9"], 3, "split shares"),
        (
            ["import", "folder", "clinic", "-o", "clinic/benign/patient0_0.png/x"],
            6,
            "is a file: choose a folder",
        ),
        (["import", "folder", "clinic"], 2, "--output"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path, capsys, monkeypatch, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "clinic")
    before = sorted(tmp_path.rglob("*"))
    assert main(["data", *arguments]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.strip().count("\n") == 0
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_phantoms_are_written_as_shards(tmp_path, capsys):
    arguments = [
        "data",
        "phantoms",
        "--kind",
        "lesions",
        "--images",
        "60",
        "--resolution",
        "16",
        "--hospitals",
        "2",
    ]
    assert main([*arguments, "--output", str(tmp_path / "ph"), "--json"]) == 0
    cards = json.loads(capsys.readouterr().out)["shards"]
    assert len(cards) == 2
    assert sum(sum(card["images"].values()) for card in cards) == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ph"]
    assert main([*arguments, "--images", "1", "--output", str(tmp_path / "few")]) in (2, 3)
    assert "fedgan:" in capsys.readouterr().err
    assert not (tmp_path / "few").exists()


def test_every_data_verb_has_help_with_an_example(capsys):
    for verb in (
        ["import", "npz"],
        ["import", "folder"],
        ["import", "csv"],
        ["phantoms"],
        ["show"],
    ):
        assert main(["data", *verb, "--help"]) == 0
        assert f"Example: fedgan data {' '.join(verb)}" in " ".join(capsys.readouterr().out.split())


def test_show_warns_about_splits_and_labels_that_harm_training(tmp_path, capsys):
    images = np.zeros((30, 1, 16, 16), np.uint8)
    for name, label in (("north", 0), ("south", 1)):
        labels = np.eye(3, dtype=np.uint8)[np.full(30, label)]
        patients = [f"{name}{i}" for i in range(30)]
        splits = ["train"] * 30 if name == "north" else ["train"] * 10 + ["test"] * 20
        write_shard(
            tmp_path / name,
            images,
            labels,
            patients=patients,
            splits=splits,
            label_names=("x", "y", "z"),
        )
    assert main(["data", "show", str(tmp_path), "--json", "--no-sheet"]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    for sentence in (
        "north has no image in its test split",
        "south has no image in its val split",
        "no hospital holds 'z' in its train split",
        "'y' has only 10 training images",
        "only north holds 'x'",
    ):
        assert any(sentence in warning for warning in warnings)


def test_contact_sheet_has_one_cell_per_hospital_and_class(tmp_path):
    shades = {("north", 0): 60, ("north", 1): 120, ("south", 1): 180}
    for name in ("north", "south"):
        held = [label for hospital, label in shades if hospital == name]
        codes = np.repeat(held, 3)
        images = np.stack([np.full((1, 16, 16), shades[name, code], np.uint8) for code in codes])
        patients = [f"{i}" for i in range(len(codes))]
        labels = np.eye(2, dtype=np.uint8)[codes]
        write_shard(
            tmp_path / name,
            images,
            labels,
            patients=patients,
            splits=["train"] * len(codes),
            label_names=("x", "y"),
        )
    sheet = np.asarray(
        contact_sheet([Shard.open(tmp_path / "north"), Shard.open(tmp_path / "south")], per_cell=2)
    )
    centres = {}
    for place, shade in shades.items():
        rows, columns = np.nonzero((sheet == shade).all(axis=2))
        assert len(rows) >= 2 * 64 * 64  # two tiles of 64 pixels, without smoothing
        centres[place] = (rows.mean(), columns.mean())
    assert (
        centres["north", 0][0]
        < centres["north", 1][0]
        == pytest.approx(centres["south", 1][0], abs=2)
    )
    assert centres["north", 1][1] < centres["south", 1][1]
