"""Released sets: label mix, marks, card, checksums, no private information, errors."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from card_runs import LABELS, SECRET, make_run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedgan import files
from fedgan.cli import label_sampling, release
from fedgan.errors import ConfigError

Run = Callable[..., tuple[int, str, str]]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "labels.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def card_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dataset_card.json").read_text())


# --- the set ------------------------------------------------------------------------------------


def test_release_has_the_requested_label_mix(fedgan: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    mix = ["--mix", "normal=0.5,covid=0.3,pneumonia=0.2"]
    code, out, err = fedgan(
        "generate", "--release", run.path, "--images", "12", "--output", "out", *mix
    )
    assert (code, err) == (0, "")
    assert "normal 6, pneumonia 2, covid 4" in out
    rows, card = table(tmp_path / "out"), card_of(tmp_path / "out")
    counts = {name: sum(int(row[name]) for row in rows) for name in LABELS}
    assert counts == card["counts"] == {"normal": 6, "pneumonia": 2, "covid": 4}
    assert card["images"] == len(rows) == len(list((tmp_path / "out").rglob("*.png"))) == 12
    assert card["label_mix"] == mix[1]
    markdown = (tmp_path / "out" / "dataset_card.md").read_text()
    for name, count in counts.items():
        assert f"| {name} | {count} |" in markdown


def test_release_checksums_pass_sha256sum(fedgan: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert fedgan("generate", "--release", run.path, "--images", "4", "--output", "out")[0] == 0
    held = contents(tmp_path / "out")
    lines = held.pop("SHA256SUMS").decode().splitlines()
    assert dict(line.split("  ")[::-1] for line in lines) == {
        n: hashlib.sha256(data).hexdigest() for n, data in held.items()
    }
    assert {
        "labels.csv",
        "dataset_card.md",
        "dataset_card.json",
        "images/000/00000.png",
    } <= held.keys()
    if tool := shutil.which("sha256sum"):
        check = [tool, "--strict", "--quiet", "-c", "SHA256SUMS"]
        assert subprocess.run(check, cwd=tmp_path / "out", timeout=60).returncode == 0
        (tmp_path / "out" / "labels.csv").write_text("file\n")
        assert (
            subprocess.run(check, cwd=tmp_path / "out", timeout=60, capture_output=True).returncode
            != 0
        )


@pytest.mark.parametrize("words", [["--release"], []])
def test_pngs_are_marked_as_synthetic(words: list[str], fedgan: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert fedgan("generate", *words, run.path, "--images", "3", "--output", "out")[0] == 0
    pictures = list((tmp_path / "out").rglob("*.png"))
    assert len(pictures) == 3
    for path in pictures:
        with Image.open(path) as picture:
            assert (picture.size, picture.mode) == ((16, 16), "L")
            text = picture.text  # type: ignore[attr-defined]
        assert (text["synthetic"], text["Software"]) == ("true", "fedgan")
        assert "Synthetic" in text["Description"]
        packet = text["XML:com.adobe.xmp"]
        tree = ElementTree.fromstring(
            packet[packet.index("<x:xmpmeta") : packet.index("<?xpacket end")]
        )
        (kind,) = tree.iter("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
        assert kind.text == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def test_release_folders_have_a_bounded_size(
    fedgan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "FILES_PER_FOLDER", 2)
    run = make_run(tmp_path / "run")
    assert fedgan("generate", "--release", run.path, "--images", "5", "--output", "out")[0] == 0
    shelves = {
        path.name: len(list(path.iterdir())) for path in (tmp_path / "out" / "images").iterdir()
    }
    assert shelves == {"000": 2, "001": 2, "002": 1}
    assert all((tmp_path / "out" / row["file"]).is_file() for row in table(tmp_path / "out"))


def test_release_is_byte_identical_in_another_folder(fedgan: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        place = tmp_path / f"deep {name}" / name
        assert (
            fedgan(
                "generate",
                "--release",
                run.path,
                "--images",
                "6",
                "--output",
                place,
                "--seed",
                seed,
            )[0]
            == 0
        )
    a, b, c = (contents(tmp_path / f"deep {name}" / name) for name in "abc")
    assert a == b
    assert a["images/000/00000.png"] != c["images/000/00000.png"]


def test_release_contains_no_path_patient_or_file_name(fedgan: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", description=f"Made of {SECRET}/patient-7.dcm")
    assert fedgan("generate", "--release", run.path, "--images", "2", "--output", "out")[0] == 0
    for name, data in contents(tmp_path / "out").items():
        for word in (b"doe", b"pacs", b"St Elm", b"patient-7", str(tmp_path).encode(), b"2026-05"):
            assert word not in data, f"{word!r} in {name}"


def test_release_contains_no_small_count_or_data_hash(fedgan: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    held = run.read_json(run.evaluation)
    held["label_fidelity"] = {
        "real": {
            "per_class": {
                "covid": {"auc": 0.7, "positives": 7},
                "normal": {"auc": 0.8, "positives": 61},
            }
        }
    }
    files.write_json(run.evaluation, held)
    assert fedgan("generate", "--release", run.path, "--images", "2", "--output", "out")[0] == 0
    card, markdown = card_of(tmp_path / "out"), (tmp_path / "out" / "dataset_card.md").read_text()
    assert [
        row["value"] for row in card["metrics"]["other"] if row["name"].startswith("label_fidelity")
    ] == [0.7, 0.8, 61]
    limits = "\n".join(card["limits"])
    assert "Classes with fewer than 10 training images at a hospital: pneumonia." in limits
    assert "Class 'covid' has fewer than 10 positive real test images" in limits
    assert [row["count"] for row in card["metrics"]["per_class"]] == [61, 44, None]
    assert "train_classes" not in json.dumps(card)
    for word in ("south (5)", "only 7 positive", "aa11", "bb22"):
        assert word not in markdown + json.dumps(card)
    assert "Counts of fewer than 10 real images are not stated." in markdown


def test_release_card_states_the_draw_and_leaves_the_licence_open(
    fedgan: Run, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    words = ["--psi", "0.7", "--seed", "5", "--labels-from", "mix", "--created", "2031-05-06"]
    assert (
        fedgan("generate", "--release", run.path, "--images", "20", "--output", "out", *words)[0]
        == 0
    )
    card, markdown = card_of(tmp_path / "out"), (tmp_path / "out" / "dataset_card.md").read_text()
    digest = hashlib.sha256(run.checkpoint(1).read_bytes()).hexdigest()
    assert (
        card["generator"]["checkpoint_sha256"],
        card["generator"]["seed"],
        card["generator"]["psi"],
    ) == (digest, 5, 0.7)
    assert card["label_mix"] == "as in the run's training images"
    assert card["licences"] == ["CC BY 4.0"]
    assert card["without_licence"] == ["south"]
    blanks = {blank["field"]: blank for blank in card["blanks"]}
    assert blanks["licence of this set"]["value"] is None
    assert "the releasing institution" in blanks["licence of this set"]["sentence"]
    assert "date" not in blanks
    assert card["created"] == "2031-05-06"
    for text in (
        "Every image is synthetic",
        digest,
        "2031-05-06",
        "psi was 0.9 there and is 0.7 here",
        "642 other images",
    ):
        assert text in markdown
    assert any("'covid'" in line and "0.553" in line for line in card["limits"])


def test_release_card_names_absent_classes(fedgan: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert (
        fedgan(
            "generate",
            "--release",
            run.path,
            "--images",
            "2",
            "--output",
            "out",
            "--label",
            "covid",
        )[0]
        == 0
    )
    card = card_of(tmp_path / "out")
    assert card["counts"] == {"normal": 0, "pneumonia": 0, "covid": 2}
    assert "This set contains no image of normal, pneumonia" in card["limits"][0]


def test_release_card_counts_each_label_of_an_image(fedgan: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", exclusive=False)
    words = ["--vector", "1,0,1", "--vector", "0,0,0"]
    assert (
        fedgan("generate", "--release", run.path, "--images", "5", "--output", "out", *words)[0]
        == 0
    )
    card = card_of(tmp_path / "out")
    assert (card["counts"], card["unlabelled"]) == ({"normal": 3, "pneumonia": 0, "covid": 3}, 2)


def test_release_of_a_model_without_labels(fedgan: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", label_names=())
    assert fedgan("generate", "--release", run.path, "--images", "2", "--output", "out")[0] == 0
    assert "The images have no labels." in (tmp_path / "out" / "dataset_card.md").read_text()
    assert card_of(tmp_path / "out")["label_mix"] == "none: the model has no labels"


@pytest.mark.parametrize("name", ["evaluation.json", "environment.json", "hospitals.json"])
def test_release_of_a_run_with_damaged_files_has_blanks(
    name: str, fedgan: Run, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    (run.path / name).write_text("{")
    assert fedgan("generate", "--release", run.path, "--images", "2", "--output", "out")[0] == 0
    assert f"{name} is damaged" in "".join(card_of(tmp_path / "out")["problems"])


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--release", "--format", "shard"], "a shard cannot hold the marks"),
        (["--release", "--created", "yesterday"], "write a date such as"),
        (["--created", "2031-05-06"], "give --release as well"),
        (
            ["--mix", "normal=0.5,flu=0.5"],
            "no class 'flu'; the model has the classes normal, pneumonia, covid",
        ),
        (
            ["--mix", "normal=-1,covid=2"],
            "a share is a number of at least 0; the model has the classes normal",
        ),
        (["--mix", "normal=0,covid=0"], "no share above zero; the model has the classes normal"),
        (["--mix", "normal=nan"], "a share is a number"),
        (["--mix", "normal=1e999"], "a share is a number"),
        (["--mix", "normal=half"], "a share is a number"),
        (["--mix", "normal"], "write CLASS=SHARE"),
        (["--mix", "normal=1,,"], "write CLASS=SHARE"),
        (["--mix", "normal=1", "--mix", "normal=2"], "twice"),
        (["--mix", "normal=1", "--label", "covid"], "exclude each other"),
    ],
)
def test_release_errors_are_one_line_and_leave_nothing(
    words: list[str], text: str, fedgan: Run, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    code, out, err = fedgan("generate", run.path, "--images", "4", "--output", "out", *words)
    assert (code, out) == (2, "")
    assert text in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_release_refuses_a_checkpoint_without_a_run(fedgan: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.config.unlink()
    code, _, err = fedgan(
        "generate", "--release", run.checkpoint(1), "--images", "2", "--output", "out"
    )
    assert code == 2
    assert "is not in a run folder" in err


def test_failed_release_leaves_nothing(
    fedgan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")

    def fails(folder: Path) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(release, "checksums", fails)
    code, _, err = fedgan("generate", "--release", run.path, "--images", "2", "--output", "out")
    assert code == 6
    assert "the disk is full" in err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- the mix ------------------------------------------------------------------------------------


@given(
    st.dictionaries(st.sampled_from(LABELS), st.floats(0, 1e6), min_size=1).filter(
        lambda mix: any(mix.values())
    )
)
def test_parsed_mix_reads_written_shares(mix: dict[str, float]) -> None:
    text = " , ".join(f"{name} = {share!r}" for name, share in mix.items())
    read = label_sampling.parsed_mix([text], LABELS)
    assert {name: float(share) for name, share in read.items()} == dict.fromkeys(LABELS, 0.0) | mix


def test_parsed_mix_accepts_commas_in_class_names() -> None:
    assert label_sampling.parsed_mix(["a, b=1,c=3"], ("a, b", "c")) == {"a, b": 1, "c": 3}


def test_parsed_mix_refuses_a_model_without_labels() -> None:
    with pytest.raises(ConfigError, match="has no labels"):
        label_sampling.parsed_mix(["normal=1"], ())


def test_label_mix_gives_one_hot_vectors(tmp_path: Path) -> None:
    meta = {"label_names": list(LABELS), "exclusive": True}
    vectors = label_sampling.requested_labels(
        meta, tmp_path, 10, label_sampling.LabelChoice(mix=["covid=1,normal=2"]), seed=0
    )
    assert vectors.dtype == np.uint8
    assert vectors.sum(axis=1).tolist() == [1] * 10
    assert vectors.sum(axis=0).tolist() == [7, 0, 3]


def test_checksums_are_sorted_and_omit_their_own_file(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.txt", "SHA256SUMS"):
        files.write_text(tmp_path / name, name)
    assert [line.split("  ")[1] for line in release.checksums(tmp_path).splitlines()] == [
        "a/c.txt",
        "b.txt",
    ]
