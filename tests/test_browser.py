"""Both reports in Chromium: colour schemes, phone, print, keyboard, accessibility, no network.

Without Chromium these tests are skipped; with CI or FEDGAN_REQUIRE_BROWSER=1 they fail.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from browser import CONTRAST, SIZES, Browser, open_browser
from comparison_data import make_comparison, write_folder
from test_report import make_run

from fedgan.report import write_report
from fedgan.report.comparison import write_comparison_report

REPORTS = ("comparison", "failed", "hostile", "run")
HOSTILE = '</title><script>document.title="run"</script>'
LOOKS = [("light", "desktop"), ("dark", "desktop"), ("light", "phone"), ("dark", "phone")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> dict[str, Path]:
    """Reports of a comparison, one with a failed arm, one with hostile names, and a run."""
    folder = tmp_path_factory.mktemp("reports")
    hostile = make_comparison(
        labels=[HOSTILE, 'a,b;"c"', "مرحبا سرطان", "x" * 90, "{{ 7*7 }}", "=1+1"],
        hospitals=["<b>h</b>", "مستشفى الشمال", "y" * 70],
        name=HOSTILE,
        seeds=(0,),
    )
    comparisons = {
        "comparison": make_comparison(),
        "failed": make_comparison(failed="federated", coalitions=False),
        "hostile": hostile,
    }
    found = {
        name: write_comparison_report(write_folder(folder / name, content))
        for name, content in comparisons.items()
    }
    return found | {"run": write_report(make_run(folder / "run"))}


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize(("scheme", "size"), LOOKS)
def test_report_is_self_contained_and_fits_its_window(
    browser: Browser, reports: dict[str, Path], name: str, scheme: str, size: str
) -> None:
    browser.show(reports[name], scheme, size)
    width = SIZES[size][0]
    assert browser.run("return matchMedia('(prefers-color-scheme: dark)').matches") == (
        scheme == "dark"
    )
    assert browser.run("return [innerWidth, document.documentElement.scrollWidth]") == [
        width,
        width,
    ]
    browser.run("for (const part of document.querySelectorAll('details')) part.open = true")
    assert browser.run("return document.documentElement.scrollWidth") == width, (
        "with its details open"
    )
    seen, low = browser.run(CONTRAST)
    assert seen > 300
    assert low == [], "contrast below 4.5 to 1, or 3 to 1 for lines"
    console, requests = browser.logs()
    assert console == []
    assert reports[name].resolve().as_uri() in requests, "the log of requests works"
    assert [
        url
        for url in requests
        if not url.startswith("data:") and url != reports[name].resolve().as_uri()
    ] == []
    assert browser.run("return document.title") != "run"


def test_browser_logs_show_requests_and_errors(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "violation.html"
    (tmp_path / "other.css").write_text("p { color: red }")
    page.write_text(
        "<!DOCTYPE html><title>x</title><link rel=stylesheet href=other.css>"
        "<p>x<script>console.error('loud')</script>"
    )
    browser.show(page)
    deadline = time.monotonic() + 20  # console messages of another process may arrive late
    console, requests = browser.logs()
    while not any("loud" in line for line in console) and time.monotonic() < deadline:
        time.sleep(0.1)
        more, more_requests = browser.logs()
        console, requests = console + more, requests + more_requests
    assert any("loud" in line for line in console)
    assert any(url.endswith("other.css") for url in requests)


def test_contrast_check_finds_faint_text(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "faint.html"
    page.write_text(
        "<!DOCTYPE html><title>x</title><body style='background:#fff'>"
        "<p style='color:#999'>faint</p><p style='color:#000'>plain</p>"
        "<svg viewBox='0 0 90 40'><rect width='90' height='40' fill='#000'/>"
        "<text x='5' y='25' fill='#333'>lost</text></svg>"
        "<svg viewBox='0 0 9 9'>"
        "<line class='whisker' x2='9' y2='9' stroke='#06c' opacity='0.5'/>"
        "<line class='line' x2='9' y2='9' stroke='#06c'/></svg>"
    )
    browser.show(page)
    assert [words for words, _ in browser.run(CONTRAST)[1]] == ["faint", "lost", "whisker"]


LOST_LINKS = """
return [...document.querySelectorAll('a[href^="#"]')].map(a => a.hash.slice(1))
  .filter(id => !document.getElementById(id));
"""


@pytest.mark.parametrize("name", REPORTS)
def test_links_have_targets_and_elements_accessible_names(
    browser: Browser, reports: dict[str, Path], name: str
) -> None:
    browser.show(reports[name])
    assert browser.run(LOST_LINKS) == []
    browser.run("for (const part of document.querySelectorAll('details')) part.open = true")
    nodes = browser.tree()
    named_roles = {
        "image",
        "link",
        "table",
        "region",
        "heading",
        "columnheader",
        "rowheader",
        "navigation",
    }
    assert [
        node["role"] for node in nodes if node["role"] in named_roles and not node["name"].strip()
    ] == []
    regions = browser.run(
        "return [...document.querySelectorAll('.scroll')]"
        ".map(e => e.tabIndex === 0 ? e.ariaLabel : '')"
    )
    assert {" ".join(name.split()) for name in regions} <= {
        node["name"] for node in nodes if node["role"] == "group"
    }
    images = browser.run("return document.querySelectorAll('svg:not([aria-hidden]), img').length")
    assert len([node for node in nodes if node["role"] == "image"]) == images > 5
    levels = browser.run(
        "return [...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))"
    )
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len([node for node in nodes if node["role"] == "main"]) == 1


FOCUS = """
const e = document.activeElement;
const left = e.getBoundingClientRect().left;
return [e.number, e.className, e.tagName, getComputedStyle(e).outlineStyle, left];
"""


@pytest.mark.parametrize("name", ["comparison", "run"])
def test_keyboard_reaches_all_elements_in_order(
    browser: Browser, reports: dict[str, Path], name: str
) -> None:
    browser.show(reports[name])
    browser.run(
        "const all = [...document.querySelectorAll('*')]; all.forEach((e, i) => { e.number = i })"
    )
    count = browser.run(
        "return [...document.querySelectorAll('a[href], summary, [tabindex=\"0\"]')]"
        ".filter(e => e.checkVisibility()).length"
    )
    stops = []
    for _ in range(count):
        browser.press("Tab", 9)
        stops.append(browser.run(FOCUS))
    assert stops[0][1] == "skip"
    assert stops[0][4] >= 0, "the skip link is on the screen when it has the focus"
    assert [stop[0] for stop in stops] == sorted({stop[0] for stop in stops}), (
        "in order, none twice, none left out"
    )
    assert {stop[3] for stop in stops} == {"solid"}, "the focus can be seen"
    browser.run("document.querySelector('.skip').focus()")
    browser.press("Enter", 13)
    assert browser.run("return location.hash") == "#content"


@pytest.mark.parametrize("name", ["comparison", "run"])
def test_printed_report_is_open_and_light(
    browser: Browser, reports: dict[str, Path], name: str
) -> None:
    browser.show(reports[name], "dark", "paper", media="print")
    assert (
        browser.run("return getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    heights = (
        "return [...document.querySelectorAll('details:not([open]) table')]"
        ".map(t => t.getBoundingClientRect().height)"
    )
    assert min(browser.run(heights)) > 20
    wide = browser.run("return document.documentElement.scrollWidth") / SIZES["paper"][0]
    assert wide < 1.1, "printing shrinks the page by at most a tenth to fit the widest table"
    assert browser.run("return document.querySelector('nav').checkVisibility()") is False
    paper = browser.pdf()
    assert paper.startswith(b"%PDF-")
    assert len(paper) > 50_000
    assert (
        paper.count(b"/Type /Page\n") + paper.count(b"/Type /Page>") + paper.count(b"/Type /Page ")
        > 3
    )


ROWS = """
const words = e => {
  const copy = e.cloneNode(true);
  copy.querySelectorAll('small, .unseen, [aria-hidden]').forEach(part => part.remove());
  return copy.textContent.trim();
};
return [...document.querySelectorAll('.table')].map(t => {
  const link = t.querySelector('a.csv');
  return [link && link.href, link && link.download, t.querySelector('table').className,
    [...t.querySelectorAll('tr')].map(r => [...r.children].map(words))];
});
"""


@pytest.mark.parametrize("name", REPORTS)
def test_csv_link_contains_the_table_above_it(
    browser: Browser, reports: dict[str, Path], name: str
) -> None:
    browser.show(reports[name])
    found: list[list[Any]] = browser.run(ROWS)
    saved = [row for row in found if row[0]]
    assert len(saved) >= 3
    for href, _, style, rows in saved:
        table = list(csv.reader(io.StringIO(unquote(href.split(",", 1)[1]).removeprefix("\ufeff"))))
        shown = [row[:1] + row[1::2] for row in table] if style == "matrix" else table
        assert [[plain(cell) for cell in row] for row in shown] == [
            [plain(cell) for cell in row] for row in rows
        ]
    names = [row[1] for row in saved]
    assert len(names) == len(set(names))


def plain(cell: str) -> str:
    """A cell without the changes of the CSV: minus signs, and quotes before formulas."""
    cell = " ".join(cell.split()).removeprefix("'")
    return re.sub(r"−(?=[\d.])", "-", cell)


def test_click_saves_the_csv(browser: Browser, reports: dict[str, Path], tmp_path: Path) -> None:
    browser.show(reports["comparison"])
    browser.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.run("document.querySelector('a.csv[download=\"arms.csv\"]').click()")
    saved, limit = tmp_path / "arms.csv", time.monotonic() + 10
    while not saved.is_file() and time.monotonic() < limit:
        time.sleep(0.05)
    assert saved.read_text(encoding="utf-8").startswith(
        "\ufeffTrained on images of,Images seen,Macro AUC"
    )
