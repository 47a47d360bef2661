"""AUC gap against bytes, on the comparison's page: where the marks stand, what the table says, and when there is neither."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from comparison_data import ARMS, LABELS, make_comparison
from hypothesis import given, settings
from hypothesis import strategies as st
from test_comparison_report import section, tables
from test_report import Page, places, replaced, scraps

from fedgan.report.comparison.data import Comparison
from fedgan.report.comparison.report import build_report
from fedgan.report.html.charts import GUTTER, LEFT, WIDE
from fedgan.report.html.scales import Scale, log_range
from fedgan.report.run.data import clean

# Name: bytes of seed 0, rounds, gap to centralised training.
PRICED = {
    "fedavg": (482_000_000, 10, 0.027),
    "half": (241_000_000, 5, 0.041),
    "generator-only": (96_400_000, 10, 0.060),
    "every step": (9_640_000_000, 200, 0.004),
}


def priced(arms: dict[str, tuple[float | None, float | None, float]] = PRICED) -> dict[str, Any]:  # type: ignore[assignment]
    """A comparison whose federated arms are these, with two seeds, the second of twice as many bytes as the first."""
    content = make_comparison(labels=LABELS[:2], coalitions=False)
    federated = {
        key: [row for row in content[key] if row["arm"] == "federated"]
        for key in ("arms", "summary")
    }
    for key, old in federated.items():
        content[key] = [row for row in content[key] if row["arm"] != "federated"]
        for name, (sent, rounds, gap) in arms.items():
            for row in json.loads(json.dumps(old)):
                row["name"] = name
                if key == "summary":
                    row["macro_auc"] = ARMS["centralized"] - gap
                else:
                    row["cost"] |= {
                        "bytes_exchanged": sent and sent * (1 + row["seed"]),
                        "rounds": rounds,
                    }
                content[key].append(row)
    pair = next(
        row
        for row in content["comparisons"]
        if (row["a"], row["b"]) == ("federated", "centralized")
    )
    content["comparisons"] = [
        pair | {"a": name, "difference": -gap, "ci": [-gap - 0.01, -gap + 0.02]}
        for name, (_, _, gap) in arms.items()
    ]
    return content


def html_of(content: dict[str, Any]) -> str:
    return build_report(Comparison(clean(content)))


def chart_of(html: str) -> ElementTree.Element:
    start = html.rindex("<svg", 0, html.index('<title id="cost-price-title">'))
    return ElementTree.fromstring(html[start : html.index("</svg>", start) + 6])


def marks_of(chart: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """Where each mark stands, by its spoken words up to the colon: a path begins, and a whisker of it hangs, at its x."""
    found = {}
    for group in chart.iter("g"):
        mark = next(e for e in group if "mark" in e.get("class", "").split())
        x, y = (
            mark.get("d", "M0 0m")[1:].split("m")[0].split()
            if mark.tag == "path"
            else (mark.get("cx"), mark.get("cy"))
        )
        found[str(group[0].text).split(":")[0]] = (float(x or 0), float(y or 0))
    return found


def words_of(chart: ElementTree.Element, style: str) -> list[str]:
    return [str(e.text) for e in chart.iter("text") if e.get("class") == style]


def price_table(html: str) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in tables(Page(html))["price.csv"]}


# --- the chart -----------------------------------------------------------------------------------


def test_marks_stand_by_bytes_and_gap() -> None:
    marks = marks_of(chart_of(html_of(priced())))
    names = ["1 generator-only", "2 half", "3 fedavg", "4 every step"]
    xs, ys = zip(*(marks[name] for name in names), strict=True)
    assert len(marks) == 4
    assert list(xs) == sorted(set(xs)), "by bytes"
    assert list(ys) == sorted(set(ys)), "a smaller gap stands lower"
    # On a logarithmic axis equal ratios are equal distances: 5 × between the first and the third, 20 × to the last.
    assert (xs[3] - xs[2]) / (xs[2] - xs[0]) == pytest.approx(1.8614, rel=0.02)
    assert (ys[1] - ys[0]) / (ys[2] - ys[1]) == pytest.approx(19 / 14, rel=0.02)


def test_a_whisker_is_the_interval_of_the_pair_and_lines_stand_at_zero_and_at_the_margin() -> None:
    chart = chart_of(html_of(priced()))
    marks = marks_of(chart)
    for group in chart.iter("g"):
        x, y = marks[str(group[0].text).split(":")[0]]
        bar = next(e for e in group if "whisker" in e.get("class", "").split())
        assert float(bar.get("x1", 0)) == float(bar.get("x2", 0)) == x
        low, high = (float(bar.get(key, 0)) for key in ("y1", "y2"))
        # gap − 0.02 to gap + 0.01: the other way round than in comparison.json, which has arm minus centralised
        assert (low - y) / (y - high) == pytest.approx(2, rel=0.05)
    lines = [float(e.get("y1", 0)) for e in chart.iter("line") if e.get("class") == "reference"]
    heights = {name: y for name, (_, y) in marks.items()}
    scale = (heights["1 generator-only"] - heights["4 every step"]) / (0.060 - 0.004)
    assert lines == pytest.approx(
        [heights["4 every step"] + (v - 0.004) * scale for v in (0.02, 0.0)], abs=0.3
    )
    assert words_of(chart, "note") == ["margin", "equal"]


def test_without_a_margin_there_is_no_line_for_it() -> None:
    html = html_of(priced() | {"margin": None})
    assert words_of(chart_of(html), "note") == ["equal"]
    assert "lies below the margin" not in section(html, "cost")


def test_the_axis_of_bytes_has_round_sizes_that_do_not_touch() -> None:
    chart = chart_of(html_of(priced()))
    ticks = [
        e
        for e in chart.iter("text")
        if e.get("class") == "tick" and e.get("text-anchor") == "middle"
    ]
    assert [e.text for e in ticks] == ["200 MB", "500 MB", "1 GB", "2 GB", "5 GB", "10 GB"]
    near = {"fedavg": PRICED["fedavg"], "like it": (490_000_000, 10, 0.02)}
    ticks = [
        e
        for e in chart_of(html_of(priced(near))).iter("text")
        if "B" in str(e.text) and e.get("class") == "tick"
    ]
    assert [e.text for e in ticks] == ["500 MB", "1 GB"], "even where the arms send about the same"


def test_arms_of_the_same_bytes_stand_side_by_side_near_their_place() -> None:
    same = {f"strategy {i}": (482_000_000, 10, 0.03) for i in range(3)}
    chart = chart_of(html_of(priced(same | {"half": PRICED["half"]})))
    marks = marks_of(chart)
    xs = [marks[f"{i + 2} strategy {i}"][0] for i in range(3)]
    assert [round(after - before, 1) for before, after in itertools.pairwise(xs)] == [10, 10]
    place = Scale(*log_range([1.5 * 241e6, 1.5 * 482e6]), LEFT, WIDE - GUTTER, log=True)(
        1.5 * 482e6
    )
    assert xs[1] == pytest.approx(place, abs=0.1)


# --- the table -----------------------------------------------------------------------------------


def test_the_table_has_every_number_of_the_chart_and_ratios_to_fedavg() -> None:
    html = html_of(priced())
    rows = price_table(html)
    assert list(rows) == ["Arm", "generator-only", "half", "fedavg", "every step"]
    assert rows["Arm"][4] == "Bytes over those of fedavg"
    assert rows["fedavg"] == ["3", "10", "72.3 MB", "723 MB", "1 ×", "+0.027", "[+0.007, +0.037]"]
    assert rows["half"] == ["2", "5", "72.3 MB", "362 MB", "0.5 ×", "+0.041", "[+0.021, +0.051]"]
    assert [rows[name][4] for name in ("generator-only", "every step")] == ["0.2 ×", "20 ×"]
    spoken = ElementTree.tostring(chart_of(html), encoding="unicode")
    assert "2 half 362 MB, +0.041 (+0.021 to +0.051);" in spoken
    assert words_of(chart_of(html), "strong") == [row[0] for row in list(rows.values())[1:]]


def test_without_an_arm_called_fedavg_the_cheapest_is_the_measure() -> None:
    rows = price_table(
        html_of(priced({name: PRICED[name] for name in ("half", "generator-only", "every step")}))
    )
    assert rows["Arm"][4] == "Bytes over those of generator-only"
    assert [row[4] for row in list(rows.values())[1:]] == ["1 ×", "2.5 ×", "100 ×"]


def test_rounds_that_are_not_known_are_dashes() -> None:
    content = priced()
    for run in content["arms"]:
        if run["name"] == "half":
            del run["cost"]["rounds"]
    assert price_table(html_of(content))["half"][:4] == ["2", "–", "–", "362 MB"]


def test_a_training_that_was_broken_off_does_not_make_its_arm_cheaper() -> None:
    content = priced()
    run = next(run for run in content["arms"] if (run["name"], run["seed"]) == ("fedavg", 1))
    run |= {"status": "failed", "failure": "Disk full.", "evaluation": None}
    run["cost"]["bytes_exchanged"] = 10
    assert price_table(html_of(content))["fedavg"][3] == "482 MB"


def test_without_a_pair_the_gap_is_that_of_the_means_and_has_no_whisker() -> None:
    html = html_of(priced() | {"comparisons": []})
    assert price_table(html)["half"][-2:] == ["+0.041", "–"]
    assert not [e for e in chart_of(html).iter("line") if "whisker" in e.get("class", "")]
    assert "Without an interval" in section(html, "cost")


# --- what is not there ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lacking", ["a centralised arm", "a second federated arm", "a second arm that sends"]
)
def test_there_is_no_chart_without_something_to_compare(lacking: str) -> None:
    content = priced()
    if lacking == "a centralised arm":
        for key in ("arms", "summary"):
            content[key] = [row for row in content[key] if row["arm"] != "centralized"]
    elif lacking == "a second federated arm":
        content = priced({"fedavg": PRICED["fedavg"]})
    else:
        content = priced(
            {"fedavg": PRICED["fedavg"], "silent": (0, 10, 0.02), "unknown": (None, 10, 0.02)}
        )
    assert "cost-price" not in html_of(content)
    assert "What the bytes buy" not in html_of(content)
    assert "cost-price" in html_of(priced())


def test_an_arm_without_bytes_or_auc_is_named_and_left_out_of_the_chart() -> None:
    content = priced(
        PRICED
        | {"silent": (0, 10, 0.02), "unknown": (None, 10, 0.02), "failed one": (1e8, 10, 0.02)}
    )
    for row in content["summary"]:
        row |= {"macro_auc": None} if row["name"] == "failed one" else {}
    content["comparisons"] = [row for row in content["comparisons"] if row["a"] != "failed one"]
    html = html_of(content)
    assert len(marks_of(chart_of(html))) == 4
    words = section(html, "cost")
    assert (
        "Not in the chart: silent (no bytes); unknown (bytes not known); failed one (no macro AUC to compare)."
        in words
    )
    rows = price_table(html)
    assert rows["silent"][:5] == ["–", "10", "none", "none", "0 ×"]
    assert rows["unknown"][:5] == ["–", "10", "–", "–", "–"]
    assert rows["failed one (no figures)"][5:] == ["–", "–"]
    assert "Not in the chart" not in section(html_of(priced()), "cost")


def test_a_table_alone_is_shown_where_centralised_training_failed() -> None:
    content = priced() | {"comparisons": []}
    for row in content["summary"]:
        row |= {"macro_auc": None} if row["arm"] == "centralized" else {}
    html = html_of(content)
    assert "No arm can be compared with centralized: no chart." in section(html, "cost")
    assert price_table(html)["half"][3] == "362 MB"


@settings(max_examples=20)
@given(data=st.data())
def test_no_number_of_the_file_stops_the_chart(data: st.DataObject) -> None:
    content: Any = priced({name: PRICED[name] for name in ("fedavg", "half")})
    ends = (
        "bytes_exchanged",
        "rounds",
        "difference",
        "ci",
        "margin",
        "macro_auc",
        "name",
        "status",
    )
    every = [
        path
        for path in places(content)
        if path and path[-1] in ends and path[0] in ("arms", "comparisons", "summary", "margin")
    ]
    for _ in range(data.draw(st.integers(1, 6))):
        content = replaced(content, data.draw(st.sampled_from(every)), data.draw(scraps))
    page = Page(html_of(content))
    assert len(page.values("id")) == len(set(page.values("id")))
    assert all(len(row) == len(rows[0]) for rows in tables(page).values() for row in rows)


def test_writing_twice_gives_the_same_chart() -> None:
    assert html_of(priced()) == html_of(priced())
