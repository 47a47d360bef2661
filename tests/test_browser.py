"""Both pages in a real Chromium: light, dark, on a phone, on paper, by keyboard, for assistive technology, without a network.

Where there is no Chromium these tests are skipped; where CI or FEDGAN_REQUIRE_BROWSER=1 is set they fail instead.
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

PAGES = ("comparison", "failed", "hostile", "run")
HOSTILE = '</title><script>document.title="run"</script>'
LOOKS = [("light", "desktop"), ("dark", "desktop"), ("light", "phone"), ("dark", "phone")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> dict[str, Path]:
    """The pages by name: a comparison, one with a failed arm, one with hostile names, and a single run."""
    folder = tmp_path_factory.mktemp("pages")
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


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("scheme", "size"), LOOKS)
def test_a_page_is_quiet_self_contained_and_fits_its_window(
    browser: Browser, pages: dict[str, Path], name: str, scheme: str, size: str
) -> None:
    browser.show(pages[name], scheme, size)
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
    assert low == [], "contrast below 4.5 to 1, or 3 to 1 of what is drawn"
    console, asked = browser.logs()
    assert console == []
    assert pages[name].resolve().as_uri() in asked, "the log of requests works"
    assert [
        url
        for url in asked
        if not url.startswith("data:") and url != pages[name].resolve().as_uri()
    ] == []
    assert browser.run("return document.title") != "run"


def test_the_log_of_requests_and_of_the_console_would_show_an_offence(
    browser: Browser, tmp_path: Path
) -> None:
    page = tmp_path / "offender.html"
    (tmp_path / "other.css").write_text("p { color: red }")
    page.write_text(
        "<!DOCTYPE html><title>x</title><link rel=stylesheet href=other.css><p>x<script>console.error('loud')</script>"
    )
    browser.show(page)
    deadline = (
        time.monotonic() + 20
    )  # the console's lines come over from the page's process, and may come late
    console, asked = browser.logs()
    while not any("loud" in line for line in console) and time.monotonic() < deadline:
        time.sleep(0.1)
        more, also = browser.logs()
        console, asked = console + more, asked + also
    assert any("loud" in line for line in console)
    assert any(url.endswith("other.css") for url in asked)


def test_the_contrast_check_would_find_faint_text(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "faint.html"
    page.write_text(
        "<!DOCTYPE html><title>x</title><body style='background:#fff'>"
        "<p style='color:#999'>faint</p><p style='color:#000'>plain</p>"
        "<svg viewBox='0 0 90 40'><rect width='90' height='40' fill='#000'/><text x='5' y='25' fill='#333'>lost</text></svg>"
        "<svg viewBox='0 0 9 9'><line class='whisker' x2='9' y2='9' stroke='#06c' opacity='0.5'/><line class='line' x2='9' "
        "y2='9' stroke='#06c'/></svg>"
    )
    browser.show(page)
    assert [words for words, _ in browser.run(CONTRAST)[1]] == ["faint", "lost", "whisker"]


LOST_LINKS = """
return [...document.querySelectorAll('a[href^="#"]')].map(a => a.hash.slice(1)).filter(id => !document.getElementById(id));
"""


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere_and_assistive_technology_finds_names(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.show(pages[name])
    assert browser.run(LOST_LINKS) == []
    browser.run("for (const part of document.querySelectorAll('details')) part.open = true")
    nodes = browser.tree()
    asked = {
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
        node["role"] for node in nodes if node["role"] in asked and not node["name"].strip()
    ] == []
    regions = browser.run(
        "return [...document.querySelectorAll('.scroll')].map(e => e.tabIndex === 0 ? e.ariaLabel : '')"
    )
    assert {" ".join(name.split()) for name in regions} <= {
        node["name"] for node in nodes if node["role"] == "group"
    }
    drawn = browser.run("return document.querySelectorAll('svg:not([aria-hidden]), img').length")
    assert len([node for node in nodes if node["role"] == "image"]) == drawn > 5
    levels = browser.run(
        "return [...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))"
    )
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len([node for node in nodes if node["role"] == "main"]) == 1


FOCUS = """
const e = document.activeElement;
return [e.number, e.className, e.tagName, getComputedStyle(e).outlineStyle, e.getBoundingClientRect().left];
"""


@pytest.mark.parametrize("name", ["comparison", "run"])
def test_the_keyboard_reaches_everything_in_the_order_of_the_page(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.show(pages[name])
    browser.run(
        "const all = [...document.querySelectorAll('*')]; all.forEach((e, i) => { e.number = i })"
    )
    wanted = browser.run(
        "return [...document.querySelectorAll('a[href], summary, [tabindex=\"0\"]')].filter(e => e.checkVisibility()).length"
    )
    stops = []
    for _ in range(wanted):
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
def test_on_paper_everything_is_open_and_light(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.show(pages[name], "dark", "paper", media="print")
    assert (
        browser.run("return getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    heights = "return [...document.querySelectorAll('details:not([open]) table')].map(t => t.getBoundingClientRect().height)"
    assert min(browser.run(heights)) > 20
    wide = browser.run("return document.documentElement.scrollWidth") / SIZES["paper"][0]
    assert wide < 1.1, "printing shrinks the page by a tenth at most to have the widest table on it"
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


@pytest.mark.parametrize("name", PAGES)
def test_the_csv_behind_a_link_is_the_table_above_it(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.show(pages[name])
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
    """A cell without what the CSV changes: the signs of numbers, and the quote before what a spreadsheet would run."""
    cell = " ".join(cell.split()).removeprefix("'")
    return re.sub(r"−(?=[\d.])", "-", cell)


def test_a_click_saves_the_csv_from_the_file_itself(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    browser.show(pages["comparison"])
    browser.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.run("document.querySelector('a.csv[download=\"arms.csv\"]').click()")
    saved, limit = tmp_path / "arms.csv", time.monotonic() + 10
    while not saved.is_file() and time.monotonic() < limit:
        time.sleep(0.05)
    assert saved.read_text(encoding="utf-8").startswith(
        "\ufeffTrained on images of,Images seen,Macro AUC"
    )
