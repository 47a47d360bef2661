"""The comparison's page: what it shows, what it survives, and that nothing is left out without a word."""

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
from test_report import HOSTILE, Page, places, replaced, scraps

from fedgan.errors import ConfigError
from fedgan.evaluation.grids import draw_grid
from fedgan.report.comparison import write_comparison
from fedgan.report.comparison.data import Comparison
from fedgan.report.comparison.report import SECTIONS, build_report
from fedgan.report.comparison.pairs import verdict
from fedgan.report.comparison.parts import UTILITY
from fedgan.report.run.data import clean, tree


def page_of(content: dict[str, Any]) -> Page:
    return Page(build_report(Comparison(clean(content))))


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return make_comparison()


@pytest.fixture(scope="module")
def folder(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("comparison") / "run", content)


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return write_comparison(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def tables(page: Page) -> dict[str, list[list[str]]]:
    """The CSV of every table, by its file name."""
    links = [dict(row) for row in page_links(page)]
    texts = {link["download"]: unquote(link["href"].split(",", 1)[1]) for link in links}
    assert all(words.startswith("\ufeff") for words in texts.values()), (
        "a spreadsheet knows that the file is UTF-8"
    )
    return {
        name: list(csv.reader(io.StringIO(words.removeprefix("\ufeff"))))
        for name, words in texts.items()
    }


def page_links(page: Page) -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = []
    for tag, name, value in page.attributes:
        if tag == "a" and name == "class" and value == "csv":
            found.append([])
        if tag == "a" and name in ("download", "href") and found and len(found[-1]) < 2:
            found[-1].append((name, value))
    return found


def section(html: str, key: str) -> str:
    """The text of one section, without tags."""
    part = html[html.index(f'<section id="{key}"') :]
    end = part.find("\n<section id=", 10)
    parts = [n for n in (end,) if n > 0]
    words = re.sub(r"<[^>]+>", " ", part[: parts[0]] if parts else part)
    return " ".join(words.split())


# --- what the page shows -------------------------------------------------------------------------


def test_the_first_screen_has_question_answer_chart_and_table(
    content: dict[str, Any], html: str, page: Page
) -> None:
    first = section(html, "summary")
    assert (
        "What does federation cost against centralised training, and what does it gain over each hospital alone?"
        in first
    )
    assert content["answer"] in page.words
    assert (
        html.index(content["answer"][:40]) < html.index("summary-auc-title") < html.index("<table>")
    )
    rows = tables(page)["arms.csv"]
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
    assert rows[1][8] == "2.6 (floor)"
    assert rows[1][9] == rows[2][9] == rows[5][9] == "none"
    assert rows[3][9] == "482 MB"
    assert [row[1] for row in rows[5:]] == ["36,000", "16,800", "7,200"]
    assert "Each hospital alone saw its own share of the budget" in first
    assert len(rows[0]) == len(set(rows[0]))


def test_the_first_screen_tells_how_many_were_tested_and_that_they_were_drawn(
    content: dict[str, Any], html: str
) -> None:
    assert "All images were drawn by a program: these figures say nothing of patients." in section(
        html, "summary"
    )
    assert "330 drawn test images ·" in section(html, "summary"), (
        "not of the hospitals' patients: their test images are others"
    )
    hospitals = json.loads(json.dumps(content["hospitals"]))
    for row in hospitals:
        row |= {"images": row["images"] | {"test": 110}, "patients": row["patients"] | {"test": 50}}
    words = page_of(of_patients(content) | {"hospitals": hospitals}).words
    assert "330 real test images of 150 patients" in words
    assert "drawn by a program: these" not in words


def of_patients(content: dict[str, Any]) -> dict[str, Any]:
    """The same comparison, of images that nobody drew."""
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
def test_real_images_are_shown_only_where_the_scenario_allows_it(
    tmp_path: Path, content: dict[str, Any], show_real: str, root: str, shown: bool
) -> None:
    folder = write_folder(
        tmp_path / "run", of_patients(content), show_real=show_real or "all", root=root
    )
    stray = folder / "arms" / "centralized-seed0" / "samples"
    (stray / "real.png").write_bytes((folder / "samples" / "real.png").read_bytes())
    if not show_real:
        (folder / "config.toml").unlink()
    page = Page(write_comparison(folder).read_text())
    titles = {alt.rpartition(": ")[2] for alt in page.values("alt")}
    assert titles == {*(f"{arm}, seed 0" for arm in ARMS), *({"Real"} if shown else ())}
    assert ("This page holds real images." in page.words) is shown
    assert ("in it real images, then images of each arm" in page.words) is shown
    reason = (
        "evaluation.show_real does not allow it"
        if show_real
        else "config.toml, which says whether they may be"
    )
    assert (reason in page.words) is not shown


def test_counts_that_may_give_somebody_away_are_pointed_out(content: dict[str, Any]) -> None:
    words = "Some of these counts are below 10"
    assert page_of(of_patients(content)).words.count(words) == 2
    assert words not in page_of(content).words, "nobody is behind a drawn image"


def test_a_difference_is_turned_round_when_it_was_measured_the_other_way(
    content: dict[str, Any],
) -> None:
    comparison = Comparison(content)
    forward = comparison.difference("federated", "centralized")
    back = comparison.difference("centralized", "federated")
    assert back["difference"] == -forward["difference"]
    assert back["ci"] == [-forward["ci"][1], -forward["ci"][0]]
    assert comparison.difference("federated", "nobody") == {}


def test_the_sections_stand_in_their_order(html: str) -> None:
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


def test_every_figure_of_the_utility_stands_in_a_table(content: dict[str, Any], page: Page) -> None:
    found = tables(page)
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
    assert "nothing: always the majority" in found["utility.csv"][2]


def test_fidelity_stands_beside_its_floor_over_all_and_in_each_part(
    content: dict[str, Any], page: Page
) -> None:
    found = tables(page)
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


def test_the_matrix_prints_each_number_and_marks_a_hospitals_own(html: str, page: Page) -> None:
    rows = tables(page)["cross-site.csv"]
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


def test_each_hospital_is_told_what_it_gains(html: str) -> None:
    part = section(html, "hospitals")
    assert (
        "alone reach a macro AUC of 0.740 (0.708–0.769), those trained on what federated training generates 0.882"
        in part
    )
    assert "(0.850–0.911): +0.142." in part
    assert "(95% interval +0.130 to +0.153). federated is better." in part
    assert "It has no training image of vascular: alone it cannot generate it." in part
    assert "It has training images of every class." in part


def test_cost_names_budget_bytes_and_distance(html: str, page: Page) -> None:
    rows = tables(page)["cost.csv"]
    assert rows[3][:5] == ["federated, seed 0", "60,000", "2 min 11 s", "4 min 22 s", "482 MB"]
    assert rows[3][-1] == "48.0"
    part = section(html, "cost")
    assert "Every arm was trained on the same budget: 60,000 real images" in part
    assert "training had 1 processor thread." in part
    assert (
        "at most 61.5, the worst last distance of all trainings. It is at most one interval of measurement"
        in part
    )
    assert "too late. Not reached, or not measured: local, seed 0; local, seed 1." in part
    assert "federation.strategy = fedavg" in part
    assert "What the bytes buy" not in part, "one federated arm is no choice"


def test_provenance_has_hashes_licences_and_no_path_of_a_machine(html: str) -> None:
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


def test_neither_source_nor_failure_tells_a_name_of_a_file(content: dict[str, Any]) -> None:
    sources = [row | {"source": "/data/pacs/doe_john"} for row in content["provenance"]["sources"]]
    failure = "cannot read /data/pacs/doe_john.dcm: it is no image"
    arms = [
        content["arms"][0] | {"status": "failed", "failure": failure, "evaluation": None},
        *content["arms"][1:],
    ]
    page = page_of(
        content | {"arms": arms, "provenance": content["provenance"] | {"sources": sources}}
    )
    assert "doe_john" not in page.text
    assert "named by a file: not shown" in page.words
    assert "centralized, seed 0 failed: cannot read (path not shown)" in page.words


def test_pictures_of_real_and_of_every_arm_stand_under_each_class(page: Page) -> None:
    alts = page.values("alt")
    for label in LABELS:
        for title in ("Drawn", *(f"{arm}, seed 0" for arm in ARMS)):
            assert f"5 images of class {label}: {title}" in alts
    assert len(alts) == 6 * 4
    assert "This page holds real images." not in page.words


@pytest.mark.parametrize(
    ("difference", "ci", "p", "words"),
    [
        (0.05, [0.03, 0.07], 0.002, "A is better."),
        (-0.05, [-0.07, -0.03], 0.002, "B is better, by more than the margin."),
        (-0.012, [-0.018, -0.006], 0.002, "B is better, but by less than the margin."),
        (-0.018, [-0.03, -0.006], 0.002, "B is better; by more or less than the margin is open."),
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
def test_verdicts_follow_from_interval_p_value_and_margin(
    difference: Any, ci: Any, p: Any, words: str
) -> None:
    assert (
        verdict(
            {"a": "A", "b": "B", "difference": difference, "ci": ci, "p_holm": p, "margin": 0.02}
        )
        == words
    )


def test_no_arm_is_called_better_where_the_seeds_disagree() -> None:
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
        == "A difference is shown, but not the same in every seed."
    )
    assert (
        verdict(row | {"seed_differences": [seeds[0], {"seed": 1, "difference": 0.01}]})
        == "A is better."
    )


# --- what is not there ---------------------------------------------------------------------------


def test_an_arm_that_failed_is_a_row_everywhere_with_its_reason(tmp_path: Path) -> None:
    html = write_comparison(
        write_folder(tmp_path / "c", make_comparison(failed="federated"))
    ).read_text()
    page = Page(html)
    found = tables(page)
    assert found["arms.csv"][3] == ["federated (failed)", *["–"] * 9]
    for name in ("utility.csv", "fidelity-distances.csv", "fidelity-shares.csv", "cost.csv"):
        failed = [row for row in found[name] if row[0].startswith("federated, seed")]
        assert [row[0] for row in failed] == [
            "federated, seed 0 (failed)",
            "federated, seed 1 (failed)",
        ]
    assert found["cross-site.csv"][3] == ["federated (failed)", *["–"] * 6]
    for key in ("summary", "utility", "fidelity", "cost", "cross-site", "missing"):
        assert "failed: The generator's images are not finite after round 4" in section(
            html, key
        ).replace("&#39;", "'"), key
    assert "federated: there is no sample grid, because it failed" in section(html, "samples")
    assert "Without a curve: federated, seed 0; federated, seed 1." in section(html, "curves")
    assert "Not measured: one of the two has no figures." in section(html, "pairs")
    assert "What it gains is not known: federated has no macro AUC on its test images." in section(
        html, "hospitals"
    )


def test_a_seed_that_failed_beside_one_that_did_not_is_named_under_the_first_table(
    content: dict[str, Any],
) -> None:
    arms = list(content["arms"])
    one = next(i for i, run in enumerate(arms) if (run["name"], run["seed"]) == ("federated", 1))
    arms[one] = arms[one] | {"status": "failed", "failure": "Disk full.", "evaluation": None}
    page = page_of(content | {"arms": arms})
    assert (
        "federated, seed 1 failed: Disk full: the figures of federated are of its other seeds."
        in page.words
    )


def test_an_arm_that_was_not_reached_or_not_evaluated_says_so(content: dict[str, Any]) -> None:
    arms = [run for run in content["arms"] if run["arm"] != "coalition"]
    arms[0] = {key: value for key, value in arms[0].items() if key not in ("status", "evaluation")}
    arms[1] = arms[1] | {"evaluation": None}
    page = page_of(content | {"arms": arms})
    assert "centralized, seed 0 is missing, and no reason was written down." in page.words
    assert "federated, seed 0 was trained, but not evaluated." in page.words


def test_a_row_of_the_summary_without_figures_is_a_row_of_the_page(content: dict[str, Any]) -> None:
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
    arms = [run | ({"status": "failed", "failure": "Disk full.", "evaluation": None} if run["name"] == "federated" else {})
            for run in content["arms"]]  # fmt: skip
    found = tables(
        page_of(
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


def test_a_hospitals_fine_tuned_generator_is_not_called_alone(content: dict[str, Any]) -> None:
    tuned = [
        row | {"arm": "finetuned", "name": f"finetuned: {row['hospital']}"}
        for row in content["summary"]
        if row["hospital"]
    ]
    heads = [
        row[0]
        for row in tables(page_of(content | {"summary": content["summary"] + tuned}))["arms.csv"]
    ]
    assert {"harbour alone", "finetuned: harbour"} <= set(heads)
    assert len(heads) == len(set(heads))


def test_chance_is_marked_where_an_arm_lies_below_it(content: dict[str, Any]) -> None:
    assert " chance " not in page_of(content).words.replace("is chance", "")
    rows = [
        row | ({"macro_auc": 0.41, "macro_auc_ci": [0.3, 0.5]} if row["name"] == "local" else {})
        for row in content["summary"]
    ]
    page = page_of(content | {"summary": rows})
    assert " chance " in page.words.replace("is chance", "")
    assert tables(page)["arms.csv"][4][2] == "0.410", "no flipping"


def test_one_seed_is_enough() -> None:
    page = page_of(make_comparison(seeds=(4,)))
    assert "1 seed " in page.words
    assert [row[0] for row in tables(page)["cost.csv"][1:4]] == [f"{arm}, seed 4" for arm in ARMS]


def test_contributions_that_nobody_asked_for_are_a_sentence() -> None:
    assert (
        "contributions were not asked for: add 'coalitions' to comparison.arms"
        in page_of(make_comparison(coalitions=False)).words
    )


def test_contributions_have_their_tables(page: Page) -> None:
    found = tables(page)
    assert found["leave-one-out.csv"][1] == ["northfield", "0.850", "+0.044", "[+0.001, +0.070]"]
    assert found["shapley.csv"][1][:2] == ["northfield", "+0.200"]
    assert len(found["coalitions.csv"]) == 1 + 7
    assert not [row for row in found["arms.csv"] if "+" in row[0]], (
        "coalitions are no arms of the first table"
    )


def test_a_class_without_test_images_is_named(tmp_path: Path) -> None:
    html = write_comparison(
        write_folder(tmp_path / "c", make_comparison(untested="melanoma"))
    ).read_text()
    assert (
        "Not measured for melanoma: the AUC of a class needs test images that have it"
        in section(html, "utility")
    )
    assert "No real test image has this class, so its AUC cannot be measured." in section(
        html, "classes"
    )
    row = next(row for row in tables(Page(html))["utility-classes.csv"] if row[0] == "melanoma")
    assert row == ["melanoma", "0", *["–"] * 8]
    assert "utility › synthetic › per_class › melanoma › auc" in section(html, "missing")
    assert not re.search(r"\b(nan|NaN|None|inf)\b", Page(html).words)


def test_arms_of_unlike_budget_or_extractor_are_called_unfair(content: dict[str, Any]) -> None:
    arms = json.loads(json.dumps(content["arms"]))
    arms[0]["images_seen"] = 30_000
    arms[1]["evaluation"]["fidelity"]["extractor"] = "another network"
    page = page_of(content | {"arms": arms})
    assert "The arms did not see the same number of images: 30,000, 60,000." in page.words
    assert (
        "Beware: the arms name different extractors (another network, reference classifier"
        in page.words
    )


def test_a_quick_suite_says_what_it_left_out(content: dict[str, Any]) -> None:
    arms = json.loads(json.dumps([run for run in content["arms"] if run["arm"] != "coalition"]))
    for run in arms:
        for key in ("real_on_synthetic", "mixed"):
            del run["evaluation"]["utility"][key]
        for key in ("per_class", "per_hospital", "ms_ssim", "path_length"):
            del run["evaluation"]["fidelity"][key]
        run["evaluation"]["label_fidelity"] = None
    page = page_of(content | {"arms": arms})
    for sentence in (
        "Not measured: classifiers trained on real and tested on synthetic images (TRTS)",
        "Nothing was measured for each class on its own.",
        "Nothing was measured for each hospital on its own.",
        "Perceptual path length was not measured.",
        "(MS-SSIM) was not measured.",
        "Label fidelity was not measured",
    ):
        assert sentence in page.words


def test_an_empty_comparison_says_what_is_not_there() -> None:
    page = page_of({})
    for sentence in (
        "The question has no answer yet",
        "No picture can be shown",
        "There are no curves",
        "No distance and no share was measured",
        "No classifier was tested",
        "No arms were compared in pairs",
        "The cross-site matrix was not measured",
        "No hospital is known",
        "The figures name no class.",
        "The cost is not known",
        "contributions were not asked for",
        "comparison.json lists no training.",
        "does not say how the comparison was made",
    ):
        assert sentence in page.words
    assert page.tags["section"] == len(SECTIONS)


@pytest.mark.parametrize("damage", [b"", b'{"arms": ', b"\xff\xfe\x00", b"[1]", b"7"])
def test_a_damaged_file_becomes_a_page_that_says_so(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "comparison.json").write_bytes(damage)
    assert (
        "comparison.json is damaged and could not be read"
        in Page(write_comparison(tmp_path).read_text()).words
    )


def test_no_page_where_there_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no comparison\.json"):
        write_comparison(tmp_path)
    assert not list(tmp_path.iterdir())


def test_pictures_that_are_damaged_or_outside_the_folder_are_not_shown(
    tmp_path: Path, content: dict[str, Any]
) -> None:
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
    page = Page(write_comparison(folder).read_text())
    assert {alt.rpartition(": ")[2] for alt in page.values("alt")} == {
        "Drawn",
        "centralized, seed 0",
    }
    assert "federated: there is no sample grid." in page.words
    assert (
        "local: its sample grid is damaged or has no cells of 32 × 32 pixels, so it is not shown."
        in page.words
    )


def test_hospitals_alone_have_no_figures_where_the_arm_of_their_own_generators_failed() -> None:
    page = page_of(make_comparison(failed="local"))
    row = next(row for row in tables(page)["arms.csv"] if row[0].startswith("harbour alone"))
    assert row == ["harbour alone (failed)", *["–"] * 8, "none"]
    assert (
        "harbour alone failed: The generator's images are not finite after round 4." in page.words
    )


def test_what_a_fine_tuned_hospital_sent_is_not_called_nothing(content: dict[str, Any]) -> None:
    tuned = [
        row | {"arm": "finetuned", "name": f"finetuned: {row['hospital']}"}
        for row in content["summary"]
        if row["hospital"]
    ]
    rows = tables(page_of(content | {"summary": content["summary"] + tuned}))["arms.csv"]
    assert {row[-1] for row in rows if row[0].startswith("finetuned: ")} == {"–"}


def test_an_interval_that_was_not_measured_is_explained_and_its_images_counted(
    content: dict[str, Any], html: str
) -> None:
    words = "No interval: fewer than half of the resamples have both kinds of images."
    assert words not in section(html, "cross-site")
    changed = json.loads(json.dumps(content))
    for line in changed["cross_site"]["ci"]:
        line[2] = None
    for row in changed["summary"]:
        row["per_institution"]["st-elm"]["macro_auc_ci"] = None
    page = build_report(Comparison(changed))
    for key in ("cross-site", "hospitals", "utility"):
        assert words in section(page, key), key
    assert "(too few test images for an interval)" in section(page, "hospitals")
    assert "harbour 90 test images" in section(page, "cross-site")
    assert [row[4] for row in tables(Page(page))["tested-on-harbour.csv"][1:]] == ["90"] * 7
    assert [row[1] for row in tables(Page(page))["utility-institutions.csv"][1:]] == [
        "180",
        "90",
        "60",
    ]


def test_a_class_with_too_few_images_for_distances_is_named_and_not_a_row_of_dashes(
    content: dict[str, Any],
) -> None:
    changed = json.loads(json.dumps(content))
    for run in changed["arms"]:
        run["evaluation"]["fidelity"]["per_class"]["melanoma"] = None
    page = page_of(changed)
    assert "Not measured for melanoma: fewer than 10 images on a side" in page.words
    assert (
        "The synthetic images of melanoma were not measured on their own: fewer than 10 images"
        in page.words
    )
    assert "melanoma" not in {row[0] for row in tables(page)["fidelity-per-class.csv"]}


def test_the_spoken_text_of_a_chart_has_the_intervals(page: Page) -> None:
    assert "centralized: 0.921 (0.901 to 0.939)" in page.words


# --- what the page is ----------------------------------------------------------------------------


def test_the_page_needs_nothing_from_outside_and_is_small(html: str, page: Page) -> None:
    assert page.tags["script"] == page.tags["iframe"] == page.tags["object"] == 0
    assert all(value.startswith("data:image/") for value in page.values("src"))
    assert all(value.startswith(("#", "data:")) for value in page.values("href"))
    assert not [
        name
        for _, name, _ in page.attributes
        if name.startswith("on") or name in ("style", "srcset", "action")
    ]
    assert "default-src 'none'" in page.values("content")[0]
    assert len(html.encode()) < 1_500_000


def test_ids_are_unique_links_lead_somewhere_and_headings_are_in_order(
    html: str, page: Page
) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in page.values("href") if value.startswith("#")} <= set(ids)
    for names in page.values("aria-labelledby"):
        assert set(names.split()) <= set(ids)
    levels = [int(level) for level in re.findall(r"<h(\d)", html)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_tables_have_captions_scopes_and_regions_for_the_keyboard(html: str, page: Page) -> None:
    assert page.tags["table"] == page.tags["caption"] == html.count('class="scroll" role="group"')
    assert (
        len([1 for tag, name, _ in page.attributes if tag == "th" and name == "scope"])
        == page.tags["th"]
    )
    assert page.values("tabindex").count("0") == page.tags["table"]


def test_every_csv_is_rectangular_and_has_a_name_of_its_own(page: Page) -> None:
    found = tables(page)
    assert len(found) == len(page_links(page)) >= 20
    assert all(len(row) == len(rows[0]) for rows in found.values() for row in rows)


def test_writing_twice_gives_the_same_page_and_leaves_nothing_beside_it(
    folder: Path, html: str
) -> None:
    assert write_comparison(folder).read_text(encoding="utf-8") == html
    assert not list(folder.glob(".*"))


def test_hostile_names_are_shown_as_text(tmp_path: Path) -> None:
    labels = [HOSTILE, 'a,b;"c"', "مرحبا", "x" * 90, "{{ 7*7 }}", "=1+1"]
    content = make_comparison(
        labels=labels, hospitals=["<b>h</b>", "\ud800 \x00\u202egnp.exe", "y" * 70], name=HOSTILE
    )
    for run in content["arms"]:
        if run["arm"] == "federated":
            run |= {"status": "failed", "failure": HOSTILE, "evaluation": None}
    html = write_comparison(write_folder(tmp_path / "c", content)).read_text(encoding="utf-8")
    page = Page(html)
    assert "<script" not in html
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE in page.text
    assert not re.search("[\x00-\x08\u202a-\u202e\ud800-\udfff]", html)
    assert len(page.values("id")) == len(set(page.values("id")))
    assert "'=1+1" in [row[0] for row in tables(page)["utility-classes.csv"]]


def test_a_large_comparison_stays_below_five_megabytes(tmp_path: Path) -> None:
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
    html = write_comparison(folder).read_text()
    assert len(html.encode()) < 5_000_000
    assert "Not shown, to keep the page small:" in Page(html).words
    assert "Not shown, for want of room: arm 4, seed 0." in Page(html).words


@settings(max_examples=12)
@given(data=st.data())
def test_no_content_of_the_file_stops_the_page(data: st.DataObject) -> None:
    content: Any = make_comparison(labels=LABELS[:2], hospitals=HOSPITALS[:2], seeds=(0,))
    every = [path for path in places(content) if path]
    for _ in range(data.draw(st.integers(1, 4))):
        path = data.draw(st.sampled_from(every))
        try:
            content = replaced(content, path, data.draw(scraps))
        except (KeyError, IndexError, TypeError):
            continue  # a scrap already stands above this place
    page = page_of(tree(content))
    assert page.tags["section"] >= len(SECTIONS)
    assert len(page.values("id")) == len(set(page.values("id")))
