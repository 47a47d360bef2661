"""Comparison report: content, missing and damaged input, accessibility and size."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from comparison_data import ARMS, HOSPITALS, LABELS, blobs, make_comparison, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import HOSTILE, Page, paths_in, replaced, scraps

from fedgan.errors import ConfigError
from fedgan.evaluation.grids import draw_grid
from fedgan.report.comparison import write_comparison_report
from fedgan.report.comparison.data import Comparison
from fedgan.report.comparison.measures import NO_INTERVAL, SMALL_COUNTS, UTILITY
from fedgan.report.comparison.paired import verdict
from fedgan.report.comparison.report import SECTIONS, build_report
from fedgan.report.comparison.summary import QUESTION
from fedgan.report.facts import PHANTOM_NOTE
from fedgan.report.run.data import clean, tree


def report_of(content: dict[str, Any]) -> Page:
    return Page(build_report(Comparison(clean(content))))


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return make_comparison()


@pytest.fixture(scope="module")
def folder(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("comparison") / "run", content)


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return write_comparison_report(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def report(html: str) -> Page:
    return Page(html)


def tables(report: Page) -> dict[str, list[list[str]]]:
    """The CSV of every table, by its file name."""
    links = [dict(row) for row in csv_links(report)]
    texts = {link["download"]: unquote(link["href"].split(",", 1)[1]) for link in links}
    assert all(content.startswith("\ufeff") for content in texts.values()), "UTF-8 in spreadsheets"
    return {
        name: list(csv.reader(io.StringIO(content.removeprefix("\ufeff"))))
        for name, content in texts.items()
    }


def csv_links(report: Page) -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for tag, name, value in report.attributes:
        if tag == "a" and name == "class" and value == "csv":
            found.append([])
        if tag == "a" and name in ("download", "href") and found and len(found[-1]) < 2:
            found[-1].append((name, value))
    return found


def section(html: str, key: str) -> str:
    """The text of one section, without tags."""
    part = html[html.index(f'<section id="{key}"') :]
    end = part.find("\n<section id=", 10)
    text = re.sub(r"<[^>]+>", " ", part[:end] if end > 0 else part)
    return " ".join(text.split())


# --- content --------------------------------------------------------------------------------------


def test_summary_has_question_answer_chart_and_table(
    content: dict[str, Any], html: str, report: Page
) -> None:
    first = section(html, "summary")
    assert QUESTION in first
    assert content["answer"] in report.words
    assert (
        html.index(content["answer"][:40]) < html.index("summary-auc-title") < html.index("<table>")
    )
    rows = tables(report)["arms.csv"]
    assert [row[0] for row in rows[1:]] == [
        "real images",
        *ARMS,
        *(f"{name} alone" for name in HOSPITALS),
    ]
    assert rows[2][1:4] == ["60,000", "0.921", "0.901–0.939"]
    gap = next(
        row
        for row in content["comparisons"]
        if (row["a"], row["b"]) == ("federated", "centralized")
    )
    assert rows[3][4:8] == ["-0.027", "[-0.039, -0.016]", "–", "–"]
    assert gap["difference"] == -0.027
    gains = {row[0]: row[6:8] for row in rows[1:]}
    assert gains["harbour alone"] == ["+0.142", "[+0.130, +0.153]"], (
        "the gain over each hospital alone"
    )
    assert gains["centralized"] == ["-0.027", "[-0.039, -0.016]"]
    assert rows[1][8] == "2.6 (reference)"
    assert rows[1][9] == rows[2][9] == rows[5][9] == "none"
    assert rows[3][9] == "482 MB"
    assert [row[1] for row in rows[5:]] == ["36,000", "16,800", "7,200"]
    assert "Each hospital alone saw its own share of the budget" in first
    assert len(rows[0]) == len(set(rows[0]))


def test_summary_counts_test_images_and_names_phantoms(content: dict[str, Any], html: str) -> None:
    assert PHANTOM_NOTE in section(html, "summary")
    assert "330 phantom test images ·" in section(html, "summary"), "the hospitals have others"
    hospitals = json.loads(json.dumps(content["hospitals"]))
    for row in hospitals:
        row |= {"images": row["images"] | {"test": 110}, "patients": row["patients"] | {"test": 50}}
    text = report_of(of_patients(content) | {"hospitals": hospitals}).words
    assert "330 real test images of 150 patients" in text
    assert PHANTOM_NOTE not in text


def of_patients(content: dict[str, Any]) -> dict[str, Any]:
    """The same comparison on images that are no phantoms."""
    sources = [
        row | {"source": "dermatoscopy archive of a county"}
        for row in content["provenance"]["sources"]
    ]
    return content | {"provenance": content["provenance"] | {"sources": sources}}


@pytest.mark.parametrize(
    ("show_real", "root", "shown"),
    [
        ("none", "", False),
        ("phantoms", "", True),
        ("phantoms", "/data/h", False),
        ("all", "/data/h", True),
        ("", "", False),
    ],
)
def test_samples_show_real_images_only_if_the_scenario_allows_it(
    tmp_path: Path, content: dict[str, Any], show_real: str, root: str, shown: bool
) -> None:
    folder = write_folder(
        tmp_path / "run", of_patients(content), show_real=show_real or "all", root=root
    )
    stray = folder / "arms" / "centralized-seed0" / "samples"
    (stray / "real.png").write_bytes((folder / "samples" / "real.png").read_bytes())
    if not show_real:
        (folder / "config.toml").unlink()
    report = Page(write_comparison_report(folder).read_text())
    titles = {alt.rpartition(": ")[2] for alt in report.values("alt")}
    assert titles == {*(f"{arm}, seed 0" for arm in ARMS), *({"Real"} if shown else ())}
    assert ("This report contains real images." in report.words) is shown
    assert ("One part per class: real images, then images of each arm" in report.words) is shown
    reason = (
        "evaluation.show_real does not allow it" if show_real else "config.toml, which allows them"
    )
    assert (reason in report.words) is not shown


def test_small_counts_of_patients_get_a_warning(content: dict[str, Any]) -> None:
    assert report_of(of_patients(content)).words.count(SMALL_COUNTS) == 2
    assert SMALL_COUNTS not in report_of(content).words, "phantoms are nobody's images"


def test_difference_is_negated_for_the_reverse_order(
    content: dict[str, Any],
) -> None:
    comparison = Comparison(content)
    forward = comparison.difference("federated", "centralized")
    back = comparison.difference("centralized", "federated")
    assert back["difference"] == -forward["difference"]
    assert back["ci"] == [-forward["ci"][1], -forward["ci"][0]]
    assert comparison.difference("federated", "nobody") == {}


def test_sections_and_parts_are_in_order(html: str) -> None:
    ids = re.findall(r'<(?:section|div) [^>]*?id="([^"]+)"', html)
    assert [key for key in ids if key in {section.id for section in SECTIONS}] == [
        section.id for section in SECTIONS
    ]
    assert [key for key in ids if key.startswith("hospital-")] == [
        "hospital-1",
        "hospital-2",
        "hospital-3",
    ]
    assert [key for key in ids if key.startswith("class-")] == [f"class-{n}" for n in range(1, 7)]


def test_utility_tables_have_every_figure(content: dict[str, Any], report: Page) -> None:
    found = tables(report)
    cells = {cell for row in found["utility.csv"] + found["utility-others.csv"] for cell in row}
    for run in (run for run in content["arms"] if run["arm"] != "coalition"):
        utility = run["evaluation"]["utility"]
        for figures in (
            utility["real"],
            utility["synthetic"],
            utility["majority"],
            utility["real_on_synthetic"],
            *utility["mixed"],
        ):
            for measure in UTILITY:
                assert f"{figures[measure.key]:.3f}" in cells
                assert "–".join(f"{end:.3f}" for end in figures[f"{measure.key}_ci"]) in cells
    assert {"TRTS", "Real + 0.5 ×", "Real + 1 ×", "Real + all"} <= {
        row[0] for row in found["utility-others.csv"]
    }
    assert "real images (TRTR)" in found["utility.csv"][1]
    assert "nothing: majority class" in found["utility.csv"][2]


def test_fidelity_has_reference_values_overall_and_per_part(
    content: dict[str, Any], report: Page
) -> None:
    found = tables(report)
    fidelity = content["arms"][0]["evaluation"]["fidelity"]
    row = found["fidelity-distances.csv"][1]
    assert row[:4] == ["centralized, seed 0", f"{fidelity['frechet']:.4g}", row[2], "2.63"]
    assert row[-1] == f"{fidelity['frechet'] / 2.63:.1f} ×"
    shares = found["fidelity-shares.csv"][1]
    assert shares[1] == f"{fidelity['precision']:.3f}"
    assert shares[3] == "0.860"
    assert {row[0] for row in found["fidelity-per-class.csv"][1:]} == set(LABELS)
    assert {row[0] for row in found["fidelity-per-hospital.csv"][1:]} == set(HOSPITALS)
    assert (
        len(found["fidelity-per-class.csv"])
        == len(found["fidelity-per-class-shares.csv"])
        == 1 + 6 * 6
    )
    inside = fidelity["per_class"]["nevus"]
    assert found["fidelity-per-class.csv"][1][2:6] == [
        "40",
        f"{inside['frechet']:.4g}",
        "–".join(f"{end:.1f}" for end in inside["frechet_ci"]),
        "2.63",
    ]
    assert found["class-nevus-fidelity.csv"][1][5:8] == [
        f"{inside['precision']:.3f}",
        "–".join(f"{end:.3f}" for end in inside["precision_ci"]),
        "0.860",
    ]
    assert found["fidelity-path-length.csv"][1][1] == "134.2"
    assert found["fidelity-ms-ssim.csv"][1][:3] == ["nevus", "0.280", "0.310"]


def test_cross_site_matrix_has_values_and_marks_own_hospitals(html: str, report: Page) -> None:
    rows = tables(report)["cross-site.csv"]
    assert len(rows) == 1 + 7
    assert rows[1][:3] == ["real images", "0.954", "0.922–0.983"]
    matrix = html[html.index('<table class="matrix">') :]
    matrix = matrix[: matrix.index("</table>")]
    assert matrix.count('<td class="cell') == 7 * 3
    own = re.findall(r'<td class="cell heat\d own">([\d.]+)', matrix)
    assert own == ["0.792", "0.740", "0.688"]
    assert matrix.count("own test images") == 3
    shades = re.findall(r'<td class="cell heat(\d)[^>]*>([\d.]+)', matrix)
    assert all(
        int(shade) == sum(float(value) >= step for step in (0.5, 0.6, 0.7, 0.8, 0.9))
        for shade, value in shades
    )


def test_hospitals_have_their_gain_and_missing_classes(html: str) -> None:
    part = section(html, "hospitals")
    assert (
        "its own generator reach a macro AUC of 0.740 (0.708–0.769), those trained on images of "
        "the federated generator 0.882" in part
    )
    assert "(0.850–0.911): +0.142." in part
    assert "(95% interval +0.130 to +0.153). federated is better." in part
    assert "It has no training image of vascular: alone it cannot generate it." in part
    assert "It has training images of every class." in part


def test_cost_has_budget_bytes_and_distance(html: str, report: Page) -> None:
    rows = tables(report)["cost.csv"]
    assert rows[3][:5] == ["federated, seed 0", "60,000", "2 min 11 s", "4 min 22 s", "482 MB"]
    assert rows[3][-1] == "48.0"
    part = section(html, "cost")
    assert "Every arm was trained on the same budget: 60,000 real images" in part
    assert "The training of each hospital had 1 processor thread." in part
    assert (
        "at most 61.5, the largest final distance of all trainings. "
        "It is at most one interval of measurement" in part
    )
    assert "too late. Not reached, or not measured: local, seed 0; local, seed 1." in part
    assert "federation.strategy = fedavg" in part
    assert "Communication cost" not in part, "one federated arm has nothing to compare"


def test_provenance_has_hashes_licences_and_no_local_path(html: str) -> None:
    part = section(html, "provenance")
    for fact in (
        "sha256:77ab",
        "sha256:13f5a9c2e",
        "CC0-1.0",
        "2.15.0",
        "0.1.0",
        "…/shards",
        "fedgan compare config.toml --output DIR",
    ):
        assert fact in part
    assert "secret" not in html
    assert "somebody" not in html


def test_sources_and_failures_hide_file_names(content: dict[str, Any]) -> None:
    sources = [row | {"source": "/data/pacs/doe_john"} for row in content["provenance"]["sources"]]
    failure = "cannot read /data/pacs/doe_john.dcm: it is no image"
    arms = [
        content["arms"][0] | {"status": "failed", "failure": failure, "evaluation": None},
        *content["arms"][1:],
    ]
    report = report_of(
        content | {"arms": arms, "provenance": content["provenance"] | {"sources": sources}}
    )
    assert "doe_john" not in report.text
    assert "named by a file: not shown" in report.words
    assert "centralized, seed 0 failed: cannot read (path not shown)" in report.words


def test_samples_have_real_and_arm_images_per_class(report: Page) -> None:
    alts = report.values("alt")
    for label in LABELS:
        for title in ("Phantoms", *(f"{arm}, seed 0" for arm in ARMS)):
            assert f"5 images of class {label}: {title}" in alts
    assert len(alts) == 6 * 4
    assert "This report contains real images." not in report.words


@pytest.mark.parametrize(
    ("difference", "ci", "p", "words"),
    [
        (0.05, [0.03, 0.07], 0.002, "A is better."),
        (-0.05, [-0.07, -0.03], 0.002, "B is better, by more than the margin."),
        (-0.012, [-0.018, -0.006], 0.002, "B is better, but by less than the margin."),
        (
            -0.018,
            [-0.03, -0.006],
            0.002,
            "B is better; whether by more than the margin is not shown.",
        ),
        (0.001, [-0.01, 0.012], 0.8, "No difference shown; A is not inferior."),
        (
            -0.01,
            [-0.05, 0.03],
            0.6,
            "Undecided: neither a difference nor non-inferiority is shown.",
        ),
        (None, None, None, "Not measured: one of the two has no figures."),
        (0.01, None, None, "No verdict: there is no interval or no p-value."),
    ],
)
def test_verdict_follows_interval_p_value_and_margin(
    difference: Any, ci: Any, p: Any, words: str
) -> None:
    assert (
        verdict(
            {"a": "A", "b": "B", "difference": difference, "ci": ci, "p_holm": p, "margin": 0.02}
        )
        == words
    )


def test_verdict_is_withheld_where_seeds_disagree() -> None:
    row = {
        "a": "A",
        "b": "B",
        "difference": 0.05,
        "ci": [0.03, 0.07],
        "p_holm": 0.002,
        "margin": 0.02,
    }
    seeds = [{"seed": 0, "difference": 0.11}, {"seed": 1, "difference": -0.01}]
    assert (
        verdict(row | {"seed_differences": seeds})
        == "A difference is shown, but not with the same sign in every seed."
    )
    assert (
        verdict(row | {"seed_differences": [seeds[0], {"seed": 1, "difference": 0.01}]})
        == "A is better."
    )


# --- missing and damaged content ------------------------------------------------------------------


def test_failed_arm_has_a_row_in_every_table_and_its_reason(tmp_path: Path) -> None:
    html = write_comparison_report(
        write_folder(tmp_path / "c", make_comparison(failed="federated"))
    ).read_text()
    report = Page(html)
    found = tables(report)
    assert found["arms.csv"][3] == ["federated (failed)", *["–"] * 9]
    for name in ("utility.csv", "fidelity-distances.csv", "fidelity-shares.csv", "cost.csv"):
        failed = [row for row in found[name] if row[0].startswith("federated, seed")]
        assert [row[0] for row in failed] == [
            "federated, seed 0 (failed)",
            "federated, seed 1 (failed)",
        ]
    assert found["cross-site.csv"][3] == ["federated (failed)", *["–"] * 6]
    for key in ("summary", "utility", "fidelity", "cost", "cross-site", "not-measured"):
        assert "failed: The generator's images are not finite after round 4" in section(
            html, key
        ).replace("&#39;", "'"), key
    assert "federated: there is no sample grid, because it failed" in section(html, "samples")
    assert "Without a curve: federated, seed 0; federated, seed 1." in section(html, "curves")
    assert "Not measured: one of the two has no figures." in section(html, "pairs")
    assert "The gain is not known: federated has no macro AUC on its test images." in section(
        html, "hospitals"
    )


def test_single_failed_seed_is_named_below_the_summary_table(
    content: dict[str, Any],
) -> None:
    arms = list(content["arms"])
    one = next(i for i, run in enumerate(arms) if (run["name"], run["seed"]) == ("federated", 1))
    arms[one] = arms[one] | {"status": "failed", "failure": "Disk full.", "evaluation": None}
    report = report_of(content | {"arms": arms})
    assert (
        "federated, seed 1 failed: Disk full: the figures of federated cover its other seeds."
        in report.words
    )


def test_missing_or_unevaluated_training_has_its_reason(content: dict[str, Any]) -> None:
    arms = [run for run in content["arms"] if run["arm"] != "coalition"]
    arms[0] = {key: value for key, value in arms[0].items() if key not in ("status", "evaluation")}
    arms[1] = arms[1] | {"evaluation": None}
    report = report_of(content | {"arms": arms})
    assert "centralized, seed 0 is missing, without a recorded reason." in report.words
    assert "federated, seed 0 was trained but not evaluated." in report.words


def test_summary_row_without_figures_stays_a_row(content: dict[str, Any]) -> None:
    """As the comparison writes it: a failed arm keeps its row, of nulls."""
    empty = {
        "arm": "federated",
        "name": "federated",
        "seeds": [],
        "hospital": None,
        "macro_auc": None,
        "macro_auc_ci": None,
    }
    rows = [row | (empty if row["name"] == "federated" else {}) for row in content["summary"]]
    failed = {"status": "failed", "failure": "Disk full.", "evaluation": None}
    arms = [run | (failed if run["name"] == "federated" else {}) for run in content["arms"]]
    found = tables(
        report_of(
            content
            | {
                "summary": rows,
                "arms": arms,
                "not_measured": ["federated, seed 0 failed: Disk full."],
            }
        )
    )
    assert found["arms.csv"][3][0] == "federated (failed)"
    assert found["arms.csv"][3][2:4] == ["–", "–"]


def test_finetuned_hospital_keeps_its_own_label(content: dict[str, Any]) -> None:
    tuned = [
        row | {"arm": "finetuned", "name": f"finetuned: {row['hospital']}"}
        for row in content["summary"]
        if row["hospital"]
    ]
    heads = [
        row[0]
        for row in tables(report_of(content | {"summary": content["summary"] + tuned}))["arms.csv"]
    ]
    assert {"harbour alone", "finetuned: harbour"} <= set(heads)
    assert len(heads) == len(set(heads))


def test_chance_line_appears_for_an_auc_below_it(content: dict[str, Any]) -> None:
    assert " chance " not in report_of(content).words.replace("is chance", "")
    rows = [
        row | ({"macro_auc": 0.41, "macro_auc_ci": [0.3, 0.5]} if row["name"] == "local" else {})
        for row in content["summary"]
    ]
    report = report_of(content | {"summary": rows})
    assert " chance " in report.words.replace("is chance", "")
    assert tables(report)["arms.csv"][4][2] == "0.410", "no flipping"


def test_report_works_with_one_seed() -> None:
    report = report_of(make_comparison(seeds=(4,)))
    assert "1 seed " in report.words
    assert [row[0] for row in tables(report)["cost.csv"][1:4]] == [f"{arm}, seed 4" for arm in ARMS]


def test_contribution_not_requested_is_a_sentence() -> None:
    assert (
        "contribution of the hospitals was not requested: add 'coalitions' to comparison.arms"
        in report_of(make_comparison(coalitions=False)).words
    )


def test_contribution_has_its_tables(report: Page) -> None:
    found = tables(report)
    assert found["leave-one-out.csv"][1] == ["northfield", "0.850", "+0.044", "[+0.001, +0.070]"]
    assert found["shapley.csv"][1][:2] == ["northfield", "+0.200"]
    assert len(found["coalitions.csv"]) == 1 + 7
    assert not [row for row in found["arms.csv"] if "+" in row[0]], (
        "coalitions are no arms of the first table"
    )


def test_class_without_test_images_is_named(tmp_path: Path) -> None:
    html = write_comparison_report(
        write_folder(tmp_path / "c", make_comparison(untested="melanoma"))
    ).read_text()
    assert (
        "Not measured for melanoma: the AUC of a class needs test images with and without it"
        in section(html, "utility")
    )
    assert "No real test image has this class, so its AUC cannot be measured." in section(
        html, "classes"
    )
    row = next(row for row in tables(Page(html))["utility-classes.csv"] if row[0] == "melanoma")
    assert row == ["melanoma", "0", *["–"] * 8]
    assert "utility › synthetic › per_class › melanoma › auc" in section(html, "not-measured")
    assert not re.search(r"\b(nan|NaN|None|inf)\b", Page(html).words)


def test_different_budget_or_extractor_gets_a_warning(content: dict[str, Any]) -> None:
    arms = json.loads(json.dumps(content["arms"]))
    arms[0]["images_seen"] = 30_000
    arms[1]["evaluation"]["fidelity"]["extractor"] = "another network"
    report = report_of(content | {"arms": arms})
    assert "The arms did not see the same number of images: 30,000, 60,000." in report.words
    assert (
        "Warning: the arms name different extractors (another network, reference classifier"
        in report.words
    )


def test_quick_suite_names_missing_measures(content: dict[str, Any]) -> None:
    arms = json.loads(json.dumps([run for run in content["arms"] if run["arm"] != "coalition"]))
    for run in arms:
        for key in ("real_on_synthetic", "mixed"):
            del run["evaluation"]["utility"][key]
        for key in ("per_class", "per_hospital", "ms_ssim", "path_length"):
            del run["evaluation"]["fidelity"][key]
        run["evaluation"]["label_fidelity"] = None
    report = report_of(content | {"arms": arms})
    for sentence in (
        "Not measured: classifiers trained on real and tested on synthetic images (TRTS)",
        "Nothing was measured per class.",
        "Nothing was measured per hospital.",
        "Perceptual path length was not measured.",
        "(MS-SSIM) was not measured.",
        "Label fidelity was not measured",
    ):
        assert sentence in report.words


def test_empty_comparison_names_missing_content() -> None:
    report = report_of({})
    for sentence in (
        "No answer is available",
        "No picture can be shown",
        "There are no curves",
        "No distance and no share was measured",
        "No classifier was tested",
        "No arms were compared in pairs",
        "The cross-site matrix was not measured",
        "No hospital is known",
        "The figures name no class.",
        "The cost is not known",
        "contribution of the hospitals was not requested",
        "comparison.json lists no training.",
        "does not say how the comparison was made",
    ):
        assert sentence in report.words
    assert report.tags["section"] == len(SECTIONS)


@pytest.mark.parametrize("damage", [b"", b'{"arms": ', b"\xff\xfe\x00", b"[1]", b"7"])
def test_damaged_file_is_named_in_the_report(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "comparison.json").write_bytes(damage)
    assert (
        "comparison.json is damaged and could not be read"
        in Page(write_comparison_report(tmp_path).read_text()).words
    )


def test_folder_without_comparison_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no comparison\.json"):
        write_comparison_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_or_foreign_pictures_are_not_shown(tmp_path: Path, content: dict[str, Any]) -> None:
    outside = tmp_path / "outside" / "samples"
    outside.mkdir(parents=True)
    draw_grid(LABELS, blobs(6, 8, np.random.default_rng(0))).save(outside / "final.png")
    arms = json.loads(json.dumps(content["arms"]))
    for run in arms:
        if run["arm"] == "federated":
            run["folder"] = "../outside"
    folder = write_folder(tmp_path / "run", content)
    (folder / "comparison.json").write_text(json.dumps(content | {"arms": arms}))
    for path in (folder / "arms").glob("local-seed*/samples/*.png"):
        path.write_bytes(b"no picture")
    report = Page(write_comparison_report(folder).read_text())
    assert {alt.rpartition(": ")[2] for alt in report.values("alt")} == {
        "Phantoms",
        "centralized, seed 0",
    }
    assert "federated: there is no sample grid." in report.words
    assert (
        "local: its sample grid is damaged or has no cells of 32 × 32 pixels, so it is not shown."
        in report.words
    )


def test_hospitals_have_no_figures_if_the_local_arm_failed() -> None:
    report = report_of(make_comparison(failed="local"))
    row = next(row for row in tables(report)["arms.csv"] if row[0].startswith("harbour alone"))
    assert row == ["harbour alone (failed)", *["–"] * 8, "none"]
    assert (
        "harbour alone failed: The generator's images are not finite after round 4." in report.words
    )


def test_bytes_of_a_finetuned_hospital_are_unknown(content: dict[str, Any]) -> None:
    tuned = [
        row | {"arm": "finetuned", "name": f"finetuned: {row['hospital']}"}
        for row in content["summary"]
        if row["hospital"]
    ]
    rows = tables(report_of(content | {"summary": content["summary"] + tuned}))["arms.csv"]
    assert {row[-1] for row in rows if row[0].startswith("finetuned: ")} == {"–"}


def test_missing_interval_is_explained_with_image_counts(
    content: dict[str, Any], html: str
) -> None:
    assert NO_INTERVAL not in section(html, "cross-site")
    changed = json.loads(json.dumps(content))
    for line in changed["cross_hospital"]["ci"]:
        line[2] = None
    for row in changed["summary"]:
        row["per_institution"]["st-elm"]["macro_auc_ci"] = None
    report = build_report(Comparison(changed))
    for key in ("cross-site", "hospitals", "utility"):
        assert NO_INTERVAL in section(report, key), key
    assert "(too few test images for an interval)" in section(report, "hospitals")
    assert "harbour 90 test images" in section(report, "cross-site")
    assert [row[4] for row in tables(Page(report))["tested-on-harbour.csv"][1:]] == ["90"] * 7
    assert [row[1] for row in tables(Page(report))["utility-institutions.csv"][1:]] == [
        "180",
        "90",
        "60",
    ]


def test_class_with_too_few_images_is_named_and_has_no_row(
    content: dict[str, Any],
) -> None:
    changed = json.loads(json.dumps(content))
    for run in changed["arms"]:
        run["evaluation"]["fidelity"]["per_class"]["melanoma"] = None
    report = report_of(changed)
    assert "Not measured for melanoma: fewer than 10 images on a side" in report.words
    assert (
        "The synthetic images of melanoma were not measured separately: fewer than 10 images"
        in report.words
    )
    assert "melanoma" not in {row[0] for row in tables(report)["fidelity-per-class.csv"]}


def test_chart_description_has_intervals(report: Page) -> None:
    assert "centralized: 0.921 (0.901 to 0.939)" in report.words


# --- accessibility, size and reproducibility ------------------------------------------------------


def test_report_is_self_contained_and_small(html: str, report: Page) -> None:
    assert report.tags["script"] == report.tags["iframe"] == report.tags["object"] == 0
    assert all(value.startswith("data:image/") for value in report.values("src"))
    assert all(value.startswith(("#", "data:")) for value in report.values("href"))
    assert not [
        name
        for _, name, _ in report.attributes
        if name.startswith("on") or name in ("style", "srcset", "action")
    ]
    assert "default-src 'none'" in report.values("content")[0]
    assert len(html.encode()) < 1_500_000


def test_ids_links_and_heading_levels_are_valid(html: str, report: Page) -> None:
    ids = report.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in report.values("href") if value.startswith("#")} <= set(ids)
    for names in report.values("aria-labelledby"):
        assert set(names.split()) <= set(ids)
    levels = [int(level) for level in re.findall(r"<h(\d)", html)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_tables_have_captions_scopes_and_focusable_regions(html: str, report: Page) -> None:
    assert (
        report.tags["table"] == report.tags["caption"] == html.count('class="scroll" role="group"')
    )
    assert (
        len([1 for tag, name, _ in report.attributes if tag == "th" and name == "scope"])
        == report.tags["th"]
    )
    assert report.values("tabindex").count("0") == report.tags["table"]


def test_csv_files_are_rectangular_and_have_unique_names(report: Page) -> None:
    found = tables(report)
    assert len(found) == len(csv_links(report)) >= 20
    assert all(len(row) == len(rows[0]) for rows in found.values() for row in rows)


def test_report_is_reproducible_and_leaves_no_other_file(folder: Path, html: str) -> None:
    assert write_comparison_report(folder).read_text(encoding="utf-8") == html
    assert not list(folder.glob(".*"))


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    labels = [HOSTILE, 'a,b;"c"', "مرحبا", "x" * 90, "{{ 7*7 }}", "=1+1"]
    content = make_comparison(
        labels=labels, hospitals=["<b>h</b>", "\ud800 \x00\u202egnp.exe", "y" * 70], name=HOSTILE
    )
    for run in content["arms"]:
        if run["arm"] == "federated":
            run |= {"status": "failed", "failure": HOSTILE, "evaluation": None}
    html = write_comparison_report(write_folder(tmp_path / "c", content)).read_text(
        encoding="utf-8"
    )
    report = Page(html)
    assert "<script" not in html
    assert not [name for _, name, _ in report.attributes if name.startswith("on")]
    assert HOSTILE in report.text
    assert not re.search("[\x00-\x08\u202a-\u202e\ud800-\udfff]", html)
    assert len(report.values("id")) == len(set(report.values("id")))
    assert "'=1+1" in [row[0] for row in tables(report)["utility-classes.csv"]]


def test_large_comparison_stays_below_five_megabytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = [f"class {i}" for i in range(14)]
    content = make_comparison(labels=labels, coalitions=False) | {"resolution": 64}
    for i in range(5):  # eight arms in all
        content["arms"] += [
            run | {"name": f"arm {i}", "folder": f"arms/arm{i}-seed{run['seed']}"}
            for run in content["arms"][1:6:3]
        ]
    noise = draw_grid(
        labels, [rng.integers(0, 256, (8, 3, 64, 64), dtype=np.uint8) for _ in labels]
    )
    folder = write_folder(tmp_path / "c", content, pictures=False)
    for run in content["arms"]:
        samples = folder / run["folder"] / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        if run["seed"] == 0:
            noise.save(samples / "final.png", compress_level=0)
    (folder / "samples").mkdir()
    noise.save(folder / "samples" / "real.png", compress_level=0)
    html = write_comparison_report(folder).read_text()
    assert len(html.encode()) < 5_000_000
    assert "Not shown, to keep the report small:" in Page(html).words
    assert "Not shown, because space is limited: arm 4, seed 0." in Page(html).words


@settings(max_examples=12)
@given(data=st.data())
def test_any_content_renders(data: st.DataObject) -> None:
    content: Any = make_comparison(labels=LABELS[:2], hospitals=HOSPITALS[:2], seeds=(0,))
    every = [path for path in paths_in(content) if path]
    for _ in range(data.draw(st.integers(1, 4))):
        path = data.draw(st.sampled_from(every))
        try:
            content = replaced(content, path, data.draw(scraps))
        except (KeyError, IndexError, TypeError):
            continue  # a scrap already stands above this place
    report = report_of(tree(content))
    assert report.tags["section"] >= len(SECTIONS)
    assert len(report.values("id")) == len(set(report.values("id")))
