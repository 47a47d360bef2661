"""The run report: content, damaged files, self-contained HTML."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan import files
from fedgan.config import describe, from_dict, to_dict
from fedgan.errors import ConfigError
from fedgan.evaluation.grids import draw_grid
from fedgan.report import write_report
from fedgan.report.html.tables import csv_link
from fedgan.report.run.data import RunData, clean, tree, trees
from fedgan.report.run.report import build_report
from fedgan.run_folder import RunFolder

LABELS = ["nevus", "melanoma", "keratosis", "basal cell", "actinic", "dermatofibroma", "vascular"]
HOSPITALS = ["Northfield", "Harbour Clinic", "St. Elm"]
SIZES = [900, 420, 180]
ROUNDS = 10
SIDE = 32
EXTRACTOR = "reference classifier (small-cnn, penultimate, 64)"


# --- a plausible run folder ----------------------------------------------------------------------


def blobs(rows: int, columns: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Images (columns, 3, SIDE, SIDE) per row: blobs, one hue per row."""
    yy, xx = np.mgrid[0:SIDE, 0:SIDE] - SIDE / 2
    cells = []
    for r in range(rows):
        hue = 60 + 140 * np.abs(np.sin(r + np.array([0.0, 1.3, 2.1])))[None, :, None, None]
        blob = np.exp(-(xx**2 + yy**2) / rng.uniform(30, 120, (columns, 1, 1)))[:, None]
        noise = rng.normal(0, 4, (columns, 3, SIDE, SIDE))
        cells.append((225 - blob * hue + noise).clip(0, 255).astype(np.uint8))
    return cells


def write_grid(path: Path, names: list[str], rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(names, blobs(len(names), 4, rng)).save(path, compress_level=1)


def result(
    rng: np.random.Generator, level: float, hospitals: list[str], labels: list[str]
) -> dict[str, Any]:
    """The numbers of one classifier, in the format of evaluation.json."""

    def auc(centre: float, width: float = 0.02) -> dict[str, Any]:
        value = float(np.clip(centre + rng.normal(0, 0.012), 0.5, 0.995))
        return {"auc": value, "auc_ci": [value - width, min(value + width, 1.0)]}

    per_class = {label: auc(level) | {"positives": int(rng.integers(8, 90))} for label in labels}
    return {
        "macro_auc": level,
        "macro_auc_ci": [level - 0.0173, level + 0.0141],
        "macro_auc_seeds": [level - 0.004, level + 0.004],
        "balanced_accuracy": level - 0.2,
        "balanced_accuracy_ci": [level - 0.24, level - 0.17],
        "per_class": per_class,
        "per_institution": {
            name: {
                "macro_auc": level - 0.01 * i,
                "macro_auc_ci": [level - 0.03 - 0.01 * i, level + 0.015],
                "per_class": {label: auc(level, 0.04) for label in labels},
                "images": 180 // (i + 1),
            }
            for i, name in enumerate(hospitals)
        },
    }


def make_evaluation(
    hospitals: list[str], labels: list[str], rng: np.random.Generator
) -> dict[str, Any]:
    return {
        "arm": "federated",
        "name": "three-hospitals",
        "images_seen": 60000,
        "wall_seconds": 221.4,
        "bytes_exchanged": 482_113_536,
        "label_names": labels,
        "utility": {
            "classifier": "small-cnn",
            "seeds": 2,
            "bootstrap": 1000,
            "resampled": "patients",
            "train_images": 1500,
            "synthetic_images": 2000,
            "real": result(rng, 0.9712, hospitals, labels),
            "synthetic": result(rng, 0.9134, hospitals, labels),
            "test_images": 330,
        },
        "fidelity": {
            "extractor": EXTRACTOR,
            "frechet": 31.47,
            "frechet_reference": 2.63,
            "kernel": 0.0812,
            "kernel_reference": 0.0009,
            "images": 290,
            "reference_images": 290,
            "real": "validation and test images",
        },
        "notes": ["The reference was measured on the test split, which is small."],
    }


def make_rounds(
    hospitals: list[str], rounds: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    lines = []
    for n in range(1, rounds + 1):
        age = n / rounds

        def values(shift: float, age: float = age) -> dict[str, float]:
            return {
                "loss_g": 0.9 + 1.1 * age + shift + rng.normal(0, 0.05),
                "loss_d": 1.25 - 0.5 * age + shift + rng.normal(0, 0.03),
                "r_t": 0.75 * (1 - math.exp(-3 * age)) + shift / 2,
                "p": max(0.0, 0.22 * age + shift / 4),
                "r1": 40 * math.exp(-6 * age) * math.exp(rng.normal(0, 0.3)),
                "path_length": 0.4 + 0.3 * age + shift,
            }

        rows = [
            {
                "name": name,
                "num_examples": SIZES[i % 3],
                "images_seen": 3000 // (i + 1) * n,
                "seconds": 12.5,
                "threads": 1,
                **values(0.08 * i),
            }
            for i, name in enumerate(hospitals)
        ]
        line: dict[str, Any] = {
            "round": n,
            "images_seen": 6000 * n,
            "wall_seconds": 22.0 * n,
            "bytes_exchanged": 48_211_353 * n,
            "mean": values(0.05),
            "hospitals": rows,
        }
        if n % 2 == 0:
            line["fidelity"] = {
                "frechet": 30 + 300 * math.exp(-4 * age),
                "extractor": EXTRACTOR,
                "images": 1000,
            }
            line["samples"] = f"round-{n:05d}.png"
        lines.append(line)
    return lines


def make_hospitals(hospitals: list[str], labels: list[str]) -> list[dict[str, Any]]:
    rows = []
    for i, name in enumerate(hospitals):
        weights = np.roll(1.0 / np.arange(1, len(labels) + 1), 2 * i)
        train = np.maximum(1, np.round(SIZES[i % 3] * weights / weights.sum())).astype(int)
        counts = {"train": train, "val": train // 6, "test": train // 5}
        rows.append(
            {
                "name": name,
                "counts": {
                    split: dict(zip(labels, map(int, n), strict=True))
                    for split, n in counts.items()
                },
                "images": {split: int(n.sum()) for split, n in counts.items()},
                "patients": {split: int(n.sum()) // 2 for split, n in counts.items()},
                "content_hash": f"sha256:{i}3f5a9c2e81b07d4{i}",
            }
        )
    return rows


def make_run(
    path: Path,
    hospitals: list[str] = HOSPITALS,
    labels: list[str] = LABELS,
    rounds: int = ROUNDS,
    pictures: bool = True,
) -> RunFolder:
    """A finished run of ten rounds, with the files that fedgan writes."""
    rng = np.random.default_rng(7)
    run = RunFolder.at(path)
    settings = {
        "name": "three-hospitals",
        "description": "Skin phantoms at 32 pixels, three heterogeneous hospitals, FedAvg.",
        "training": {"kimg": 60.0},
        "federation": {"rounds": ROUNDS, "hospitals": len(hospitals)},
    }
    run.write_settings(from_dict(settings))
    environment = {
        "python": "3.11.9",
        "packages": {"torch": "2.15.0", "flwr": "1.41.0", "numpy": "2.4.1"},
        "machine": {"processor": "x86_64", "cores": 2, "accelerator": None},
        "sources": [
            {
                "name": "phantoms",
                "licence": "Apache-2.0",
                "source": "dermatoscopy archive of a county",
            }
        ],
    }
    files.write_json(run.environment, environment)
    files.write_json(run.hospitals, make_hospitals(hospitals, labels))
    files.write_json(run.evaluation, make_evaluation(hospitals, labels, rng))
    lines = make_rounds(hospitals, rounds, rng)
    files.write_text(run.metrics, "".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        if pictures and "samples" in line:
            write_grid(run.samples / line["samples"], labels, rng)
    for name in ("real.png", "final.png") if pictures else ():
        write_grid(run.samples / name, labels, rng)
    return run


def page_of(run: RunFolder) -> str:
    return write_report(run).read_text(encoding="utf-8")


# --- parsing a report ----------------------------------------------------------------------------

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Parsed HTML: tags, attributes, visible text; asserts that tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], (tag, self.open[-3:], self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data + " "

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two labels, four rounds; not to be changed."""
    return make_run(tmp_path_factory.mktemp("report") / "small", labels=["a", "melanoma"], rounds=4)


@pytest.fixture
def copied(small: RunFolder, tmp_path: Path) -> RunFolder:
    """A run folder that the test may change."""
    shutil.copytree(small.path, tmp_path / "run")
    return RunFolder.at(tmp_path / "run")


@pytest.fixture(scope="module")
def html(run: RunFolder) -> str:
    return page_of(run)


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


# --- content -------------------------------------------------------------------------------------


def test_summary_states_the_macro_auc_of_the_evaluation(page: Page) -> None:
    assert (
        "A classifier trained only on images of this federated generator reaches a macro AUC of "
        "0.91 (0.90–0.93) on real test images; trained on the real images it reaches 0.97 "
        "(0.95–0.99)."
    ) in page.words
    for figure in ("60,000", "10 of 10 planned", "3 min 41 s", "482 MB"):
        assert figure in page.words


def test_report_contains_every_figure_of_the_evaluation(run: RunFolder, page: Page) -> None:
    evaluation = run.read_json(run.evaluation)
    for source in ("real", "synthetic"):
        result = evaluation["utility"][source]
        figures = [result, *result["per_institution"].values()]
        for figure in figures:
            assert f"{figure['macro_auc']:.3f}" in page.words
            assert "–".join(f"{end:.3f}" for end in figure["macro_auc_ci"]) in page.words
        assert f"{result['balanced_accuracy']:.3f}" in page.words
        for entry in [e for f in figures for e in f["per_class"].values()]:
            assert f"{entry['auc']:.3f}" in page.words
    for text in (
        "31.47",
        "2.63",
        "0.0812",
        "0.0009",
        EXTRACTOR,
        "12.0 ×",
        "The reference was measured on the test split",
    ):
        assert text in page.words


def test_report_contains_hospitals_settings_and_environment(run: RunFolder, page: Page) -> None:
    for hospital in run.read_json(run.hospitals):
        assert hospital["name"] in page.words
        assert hospital["content_hash"] in page.words
        for split in ("train", "val", "test"):
            assert str(hospital["images"][split]) in page.words
    for setting in describe():
        assert setting.key in page.words
        assert setting.meaning in page.words
    for fact in ("2.15.0", "Apache-2.0", "x86_64", "dermatoscopy archive of a county"):
        assert fact in page.words


def test_each_class_has_real_and_synthetic_images(page: Page) -> None:
    alts = page.values("alt")
    assert "This report contains real images." in page.words
    for label in LABELS:
        assert f"4 real images of class {label}" in alts
        assert f"4 synthetic images of class {label}" in alts
    assert [alt for alt in alts if "after round" in alt] == [
        f"Synthetic images after round {n}" for n in (2, 4, 6, 8, 10)
    ]


def test_real_images_of_patients_are_shown_only_on_request(copied: RunFolder) -> None:
    settings_tree = to_dict(copied.settings())
    settings_tree["data"]["root"] = "/data/hospitals"
    for choice, shown in (("phantoms", False), ("none", False), ("all", True)):
        settings_tree["evaluation"]["show_real"] = choice
        copied.write_settings(from_dict(settings_tree))
        page = Page(page_of(copied))
        assert any("real image" in alt for alt in page.values("alt")) == shown
        assert ("This report contains real images." in page.words) == shown
        assert ("Real images are not shown" in page.words) != shown


def test_merged_labels_apply_to_classifiers_only(copied: RunFolder) -> None:
    """Hospitals and images keep the data labels after `evaluation.label_map`."""
    merged = make_evaluation(HOSPITALS, ["malignant", "benign"], np.random.default_rng(1))
    files.write_json(copied.evaluation, merged)
    page = Page(page_of(copied))
    counts = [hospital["counts"]["train"] for hospital in copied.read_json(copied.hospitals)]
    mix = "; ".join(
        f"{name}: a {count['a']:,}, melanoma {count['melanoma']:,}"
        for name, count in zip(HOSPITALS, counts, strict=True)
    )
    assert f"{mix}." in page.words
    for label in ("a", "melanoma"):
        numbers = [count[label] for count in counts]
        assert f"{label} {' '.join(f'{n:,}' for n in [*numbers, sum(numbers)])}" in page.words
        assert f"4 real images of class {label}" in page.values("alt")
        assert f"4 synthetic images of class {label}" in page.values("alt")
        assert f"AUC, {label}" not in page.words
    for label in ("malignant", "benign"):
        assert (
            f"AUC, {label} {merged['utility']['real']['per_class'][label]['auc']:.3f}" in page.words
        )
        assert f"images of class {label}" not in " ".join(page.values("alt"))
    assert " 0%" not in page.words
    assert "Not in the macro mean" not in page.words


def test_each_curve_has_a_chart_with_a_title(page: Page) -> None:
    ids = page.values("id")
    for key in ("loss-g", "loss-d", "r-t", "p", "r1", "path-length"):
        assert {f"curves-{key}-title", f"curves-{key}-desc"} <= set(ids)
    assert "fidelity-curve-title" in ids
    assert "hospitals-mix-title" in ids
    assert "reference: real to real" in page.words
    for reference in page.values("aria-labelledby"):
        assert set(reference.split()) <= set(ids)


# --- properties of the HTML ----------------------------------------------------------------------


def test_report_is_self_contained(html: str, page: Page) -> None:
    assert page.tags["script"] == page.tags["iframe"] == page.tags["object"] == 0
    assert page.values("src")
    assert all(value.startswith("data:image/") for value in page.values("src"))
    assert all(value.startswith(("#", "data:")) for value in page.values("href"))
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert not [
        name
        for _, name, _ in page.attributes
        if name.startswith("on") or name in ("style", "srcset", "action")
    ]
    assert len(html.encode()) < 3_000_000


def test_ids_are_unique_and_links_have_targets(page: Page) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in page.values("href") if value.startswith("#")} <= set(ids)


def test_tables_have_scoped_headings_and_a_caption(page: Page) -> None:
    heads = [value for tag, name, value in page.attributes if tag == "th" and name == "scope"]
    assert len(heads) == page.tags["th"]
    assert page.tags["table"] == page.tags["caption"] >= 7
    assert page.tags["h1"] == 1
    assert ("html", "lang", "en") in page.attributes


def test_csv_links_contain_the_rows_of_the_table(page: Page) -> None:
    links = [
        value
        for tag, name, value in page.attributes
        if tag == "a" and value.startswith("data:text/csv")
    ]
    tables = [
        list(csv.reader(io.StringIO(unquote(link.split(",", 1)[1]).removeprefix("\ufeff"))))
        for link in links
    ]
    utility = next(rows for rows in tables if rows[0][0] == "Measure" and "Real" in rows[0])
    assert utility[1][:4] == ["Macro AUC", "0.971", "0.954–0.985", "0.913"]
    assert utility[1][5] == "-0.058"
    assert all(len(row) == len(rows[0]) for rows in tables for row in rows)


def test_csv_cells_are_no_spreadsheet_formulas() -> None:
    given = [
        "=1+2",
        "@here",
        "-0.5",
        "+cmd",
        "−0.25",
        "[−0.1, +0.2]",
        "−0.1 to −0.05",
        "0.1–0.2",
        "a − b",
        "−x",
    ]
    link = str(csv_link("x", ["name"], [[cell] for cell in given]))
    rows = list(csv.reader(io.StringIO(unquote(unescape(link).split("utf-8,")[1].split('"')[0]))))
    plain = ["-0.5", "'+cmd", "-0.25", "[-0.1, +0.2]", "'-0.1 to -0.05", "0.1–0.2", "a − b", "−x"]
    assert [row[0] for row in rows[1:]] == ["'=1+2", "'@here", *plain]
    assert rows[0] == ["\ufeffname"]


def test_report_is_deterministic_and_leaves_no_other_files(run: RunFolder, html: str) -> None:
    assert page_of(run) == html
    assert not list(run.path.glob(".*"))


# --- missing, damaged and hostile content --------------------------------------------------------

HOSTILE = '</title><script>alert(1)</script>"><img src=x onerror=alert(2)> {{ 7*7 }} ]]>'


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        hospitals=[HOSTILE, "\ud800 \x00\u202egnp.exe", "C"],
        labels=[HOSTILE + "1", "b", "c"],
        rounds=3,
    )
    run.write_settings(from_dict({"name": HOSTILE, "description": HOSTILE}))
    html = page_of(run)
    page = Page(html)
    assert "<script" not in html
    assert page.tags["script"] == 0
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE in page.text
    assert "49" not in page.values("alt")[0]
    assert not re.search("[\x00-\x08\u202a-\u202e\ud800-\udfff]", html)


def test_new_run_reports_what_is_missing(tmp_path: Path) -> None:
    run = RunFolder.at(tmp_path)
    run.write_settings(from_dict({"name": "young"}))
    page = Page(page_of(run))
    assert "has not been measured yet" in page.words
    for sentence in (
        "No images yet",
        "No classifier has been tested yet",
        "The final distances have not been measured",
        "No round has finished yet",
        "hospitals.json is missing",
        "environment.json is missing",
        "No privacy attack",
    ):
        assert sentence in page.words
    assert page.tags["section"] == 9
    assert "contains real images" not in page.words


@pytest.mark.parametrize(
    "name", ["environment.json", "hospitals.json", "metrics.jsonl", "evaluation.json", "samples"]
)
@pytest.mark.parametrize(
    "damage", [None, b"", b'{"utility": ', b"\xff\xfe\x00", b"[1, null]", b"7"]
)
def test_missing_or_damaged_file_affects_only_its_part(
    copied: RunFolder, name: str, damage: bytes | None
) -> None:
    run = copied
    for path in run.samples.glob("*.png") if name == "samples" else [run.path / name]:
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
    page = Page(page_of(run))
    assert page.tags["section"] == 9
    if name != "evaluation.json":
        assert "0.971" in page.words
    if name == "samples":
        assert "No images yet" in page.words or "damaged or no grid" in page.words
    if damage == b"\xff\xfe\x00" and name != "samples":
        assert f"{name} is damaged" in page.words


def test_folder_without_a_run_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        write_report(RunFolder.at(tmp_path))
    assert not list(tmp_path.iterdir())


def test_null_and_non_finite_numbers_become_dashes(copied: RunFolder) -> None:
    run = copied
    evaluation = run.read_json(run.evaluation)
    evaluation["utility"]["synthetic"] |= {"macro_auc": None, "macro_auc_ci": None}
    evaluation["utility"]["real"]["per_class"]["melanoma"] = {
        "auc": math.nan,
        "auc_ci": [None, 1],
        "positives": 0,
    }
    run.evaluation.write_text(json.dumps(evaluation))  # json writes NaN; files.write_json would not
    page = Page(page_of(run))
    assert (
        "A classifier trained only on images of this federated generator has not been measured"
        in page.words
    )
    assert "utility › synthetic › macro_auc" in page.words
    assert not re.search(
        r"\b(nan|NaN|None|null|inf)\b",
        page.words.replace("Null values in evaluation.json", ""),
    )


def test_stopped_run_is_reported_and_repeated_rounds_count_once(copied: RunFolder) -> None:
    run = copied
    run.evaluation.unlink()
    (run.samples / "final.png").unlink()
    again = {"round": 4, "images_seen": 24000, "mean": {"loss_g": 5.0}}
    files.write_text(run.metrics, run.metrics.read_text() + json.dumps(again) + "\n")
    page = Page(page_of(run))
    assert "The run had 4 of 10 rounds when this report was written." in page.words
    assert "The synthetic images are of round 4" in page.words
    assert "Generator loss 5 Non-saturating" in page.words


def test_absolute_paths_are_not_shown(copied: RunFolder) -> None:
    run = copied
    run.write_settings(
        from_dict(
            {
                "data": {"root": "/home/secret-person/shards"},
                "evaluation": {"root": "C:\\secret\\real"},
            }
        )
    )
    page = Page(page_of(run))
    assert "secret" not in page.words
    assert "…/shards" in page.words
    assert "…/real" in page.words


def test_multi_label_data_is_shown_as_shares(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        labels=[f"finding {i}" for i in range(14)],
        hospitals=[f"H{i}" for i in range(8)],
        rounds=2,
        pictures=False,
    )
    rows = run.read_json(run.hospitals)
    for row in rows:
        row["images"] = {split: 2 * n for split, n in row["images"].items()}
    files.write_json(run.hospitals, rows)
    page = Page(page_of(run))
    assert "Share of training images with each label" in page.words
    assert "2 more hospitals are in the mean" in page.words
    assert "2 more hospitals are in the tables only" in page.words


def test_report_of_a_large_run_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels, hospitals = [f"class {i}" for i in range(16)], [f"H{i}" for i in range(8)]
    run = make_run(tmp_path, labels=["a"], hospitals=hospitals, rounds=1, pictures=False)
    run.write_settings(from_dict({"data": {"resolution": 64}}))
    files.write_json(run.evaluation, make_evaluation(hospitals, labels, rng))
    files.write_text(
        run.metrics, "".join(json.dumps(line) + "\n" for line in make_rounds(hospitals, 600, rng))
    )
    noise = draw_grid(
        labels, [rng.integers(0, 256, (8, 3, 64, 64), dtype=np.uint8) for _ in labels]
    )
    run.samples.mkdir()
    noise.save(run.samples / "real.png", compress_level=0)
    for name in ("final", *(f"round-{n:05d}" for n in range(7))):
        shutil.copy(run.samples / "real.png", run.samples / f"{name}.png")
    html = page_of(run)
    assert html.count("<img") == 2 * 16 + 6
    assert len(html.encode()) < 3_000_000


scraps = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All paths in a tree of dicts and lists."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else []
    )
    return [path] + [p for key, item in items for p in paths_in(item, (*path, key))]


def replaced(value: Any, path: tuple[Any, ...], scrap: Any) -> Any:
    """`value` with `scrap` at `path`."""
    if not path:
        return scrap
    if isinstance(value, dict):
        return value | {path[0]: replaced(value[path[0]], path[1:], scrap)}
    return [
        replaced(item, path[1:], scrap) if i == path[0] else item for i, item in enumerate(value)
    ]


@settings(max_examples=25)
@given(data=st.data())
def test_any_file_content_gives_a_report(data: st.DataObject) -> None:
    rng = np.random.default_rng(1)
    sound = {
        "evaluation": make_evaluation(HOSPITALS[:2], LABELS[:2], rng),
        "hospitals": make_hospitals(HOSPITALS[:2], LABELS[:2]),
        "rounds": make_rounds(HOSPITALS[:2], 2, rng),
    }
    for _ in range(data.draw(st.integers(1, 3))):
        sound = replaced(
            sound, data.draw(st.sampled_from([p for p in paths_in(sound) if p])), data.draw(scraps)
        )
    assert isinstance(sound, dict)
    run = RunData(
        settings=from_dict({}),
        environment=clean({"sources": sound["hospitals"]}),
        hospitals=tuple(trees(clean(sound["hospitals"]))),
        rounds=tuple(trees(clean(sound["rounds"]))),
        evaluation=tree(clean(sound["evaluation"])),
        pictures={},
    )
    page = Page(build_report(run))
    assert page.tags["section"] == 9
    assert len(page.values("id")) == len(set(page.values("id")))
