"""Communication cost in the comparison report: AUC gap by bytes, as chart and table."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any

import pytest
from comparison_data import ARMS, LABELS, make_comparison
from hypothesis import given, settings
from hypothesis import strategies as st
from test_comparison_report import section, tables
from test_report import Page, paths_in, replaced, scraps

from fedgan.report.comparison.data import Comparison
from fedgan.report.comparison.report import build_report
from fedgan.report.html.charts import GUTTER, LEFT, WIDE
from fedgan.report.html.scales import Scale, log_range
from fedgan.report.run.data import clean

# Name: bytes of seed 0, rounds, gap to centralised training.
COSTS = {
    "fedavg": (482_000_000, 10, 0.027),
    "half": (241_000_000, 5, 0.041),
    "generator-only": (96_400_000, 10, 0.060),
    "every step": (9_640_000_000, 200, 0.004),
}


def with_costs(
    arms: Mapping[str, tuple[float | None, float | None, float]] = COSTS,
) -> dict[str, Any]:
    """A comparison of these federated arms; the second seed has twice the bytes of the first."""
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
    start = html.rindex("<svg", 0, html.index('<title id="communication-cost-title">'))
    return ElementTree.fromstring(html[start : html.index("</svg>", start) + 6])


def marks_of(chart: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """(x, y) of each mark by its title up to the colon."""
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


def texts_of(chart: ElementTree.Element, style: str) -> list[str]:
    return [str(e.text) for e in chart.iter("text") if e.get("class") == style]


def cost_table(html: str) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in tables(Page(html))["communication-cost.csv"]}


# --- the chart -----------------------------------------------------------------------------------


def test_marks_are_placed_by_bytes_and_gap() -> None:
    marks = marks_of(chart_of(html_of(with_costs())))
    names = ["1 generator-only", "2 half", "3 fedavg", "4 every step"]
    xs, ys = zip(*(marks[name] for name in names), strict=True)
    assert len(marks) == 4
    assert list(xs) == sorted(set(xs)), "by bytes"
    assert list(ys) == sorted(set(ys)), "a smaller gap is lower"
    # On a log axis equal ratios are equal distances: 5 × from first to third, 20 × to the last.
    assert (xs[3] - xs[2]) / (xs[2] - xs[0]) == pytest.approx(1.8614, rel=0.02)
    assert (ys[1] - ys[0]) / (ys[2] - ys[1]) == pytest.approx(19 / 14, rel=0.02)


def test_whiskers_show_intervals_and_lines_zero_and_margin() -> None:
    chart = chart_of(html_of(with_costs()))
    marks = marks_of(chart)
    for group in chart.iter("g"):
        x, y = marks[str(group[0].text).split(":")[0]]
        bar = next(e for e in group if "whisker" in e.get("class", "").split())
        assert float(bar.get("x1", 0)) == float(bar.get("x2", 0)) == x
        low, high = (float(bar.get(key, 0)) for key in ("y1", "y2"))
        # gap − 0.02 to gap + 0.01: negated, because comparison.json has arm minus centralised
        assert (low - y) / (y - high) == pytest.approx(2, rel=0.05)
    lines = [float(e.get("y1", 0)) for e in chart.iter("line") if e.get("class") == "reference"]
    heights = {name: y for name, (_, y) in marks.items()}
    scale = (heights["1 generator-only"] - heights["4 every step"]) / (0.060 - 0.004)
    assert lines == pytest.approx(
        [heights["4 every step"] + (v - 0.004) * scale for v in (0.02, 0.0)], abs=0.3
    )
    assert texts_of(chart, "note") == ["margin", "equal"]


def test_missing_margin_has_no_line() -> None:
    html = html_of(with_costs() | {"margin": None})
    assert texts_of(chart_of(html), "note") == ["equal"]
    assert "is below the margin" not in section(html, "cost")


def test_byte_axis_has_round_sizes_without_overlap() -> None:
    chart = chart_of(html_of(with_costs()))
    ticks = [
        e
        for e in chart.iter("text")
        if e.get("class") == "tick" and e.get("text-anchor") == "middle"
    ]
    assert [e.text for e in ticks] == ["200 MB", "500 MB", "1 GB", "2 GB", "5 GB", "10 GB"]
    near = {"fedavg": COSTS["fedavg"], "similar": (490_000_000, 10, 0.02)}
    ticks = [
        e
        for e in chart_of(html_of(with_costs(near))).iter("text")
        if "B" in str(e.text) and e.get("class") == "tick"
    ]
    assert [e.text for e in ticks] == ["500 MB", "1 GB"], "also for nearly equal bytes"


def test_marks_of_equal_bytes_are_side_by_side() -> None:
    same = {f"strategy {i}": (482_000_000, 10, 0.03) for i in range(3)}
    chart = chart_of(html_of(with_costs(same | {"half": COSTS["half"]})))
    marks = marks_of(chart)
    xs = [marks[f"{i + 2} strategy {i}"][0] for i in range(3)]
    assert [round(after - before, 1) for before, after in itertools.pairwise(xs)] == [10, 10]
    expected = Scale(*log_range([1.5 * 241e6, 1.5 * 482e6]), LEFT, WIDE - GUTTER, log=True)(
        1.5 * 482e6
    )
    assert xs[1] == pytest.approx(expected, abs=0.1)


# --- the table -----------------------------------------------------------------------------------


def test_table_has_the_values_of_the_chart_and_ratios_to_fedavg() -> None:
    html = html_of(with_costs())
    rows = cost_table(html)
    assert list(rows) == ["Arm", "generator-only", "half", "fedavg", "every step"]
    assert rows["Arm"][4] == "Bytes relative to fedavg"
    assert rows["fedavg"] == ["3", "10", "72.3 MB", "723 MB", "1 ×", "+0.027", "[+0.007, +0.037]"]
    assert rows["half"] == ["2", "5", "72.3 MB", "362 MB", "0.5 ×", "+0.041", "[+0.021, +0.051]"]
    assert [rows[name][4] for name in ("generator-only", "every step")] == ["0.2 ×", "20 ×"]
    description = ElementTree.tostring(chart_of(html), encoding="unicode")
    assert "2 half 362 MB, +0.041 (+0.021 to +0.051);" in description
    assert texts_of(chart_of(html), "strong") == [row[0] for row in list(rows.values())[1:]]


def test_cheapest_arm_is_the_base_without_fedavg() -> None:
    rows = cost_table(
        html_of(
            with_costs({name: COSTS[name] for name in ("half", "generator-only", "every step")})
        )
    )
    assert rows["Arm"][4] == "Bytes relative to generator-only"
    assert [row[4] for row in list(rows.values())[1:]] == ["1 ×", "2.5 ×", "100 ×"]


def test_unknown_rounds_are_dashes() -> None:
    content = with_costs()
    for run in content["arms"]:
        if run["name"] == "half":
            del run["cost"]["rounds"]
    assert cost_table(html_of(content))["half"][:4] == ["2", "–", "–", "362 MB"]


def test_interrupted_training_does_not_count() -> None:
    content = with_costs()
    run = next(run for run in content["arms"] if (run["name"], run["seed"]) == ("fedavg", 1))
    run |= {"status": "failed", "failure": "Disk full.", "evaluation": None}
    run["cost"]["bytes_exchanged"] = 10
    assert cost_table(html_of(content))["fedavg"][3] == "482 MB"


def test_unpaired_gap_is_the_difference_of_means_without_whisker() -> None:
    html = html_of(with_costs() | {"comparisons": []})
    assert cost_table(html)["half"][-2:] == ["+0.041", "–"]
    assert not [e for e in chart_of(html).iter("line") if "whisker" in e.get("class", "")]
    assert "Without an interval" in section(html, "cost")


# --- missing content ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing", ["a centralised arm", "a second federated arm", "a second arm with bytes"]
)
def test_chart_needs_arms_to_compare(missing: str) -> None:
    content = with_costs()
    if missing == "a centralised arm":
        for key in ("arms", "summary"):
            content[key] = [row for row in content[key] if row["arm"] != "centralized"]
    elif missing == "a second federated arm":
        content = with_costs({"fedavg": COSTS["fedavg"]})
    else:
        content = with_costs(
            {"fedavg": COSTS["fedavg"], "silent": (0, 10, 0.02), "unknown": (None, 10, 0.02)}
        )
    assert "communication-cost" not in html_of(content)
    assert "Communication cost" not in html_of(content)
    assert "communication-cost" in html_of(with_costs())


def test_arm_without_bytes_or_auc_is_named_and_not_in_the_chart() -> None:
    content = with_costs(
        COSTS
        | {"silent": (0, 10, 0.02), "unknown": (None, 10, 0.02), "failed one": (1e8, 10, 0.02)}
    )
    for row in content["summary"]:
        row |= {"macro_auc": None} if row["name"] == "failed one" else {}
    content["comparisons"] = [row for row in content["comparisons"] if row["a"] != "failed one"]
    html = html_of(content)
    assert len(marks_of(chart_of(html))) == 4
    text = section(html, "cost")
    assert (
        "Not in the chart: silent (no bytes); unknown (bytes not known); "
        "failed one (no macro AUC to compare)." in text
    )
    rows = cost_table(html)
    assert rows["silent"][:5] == ["–", "10", "none", "none", "0 ×"]
    assert rows["unknown"][:5] == ["–", "10", "–", "–", "–"]
    assert rows["failed one (no figures)"][5:] == ["–", "–"]
    assert "Not in the chart" not in section(html_of(with_costs()), "cost")


def test_failed_centralised_training_leaves_the_table_only() -> None:
    content = with_costs() | {"comparisons": []}
    for row in content["summary"]:
        row |= {"macro_auc": None} if row["arm"] == "centralized" else {}
    html = html_of(content)
    assert "No arm can be compared with centralized, so there is no chart." in section(html, "cost")
    assert cost_table(html)["half"][3] == "362 MB"


@settings(max_examples=20)
@given(data=st.data())
def test_any_number_renders(data: st.DataObject) -> None:
    content: Any = with_costs({name: COSTS[name] for name in ("fedavg", "half")})
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
        for path in paths_in(content)
        if path and path[-1] in ends and path[0] in ("arms", "comparisons", "summary", "margin")
    ]
    for _ in range(data.draw(st.integers(1, 6))):
        content = replaced(content, data.draw(st.sampled_from(every)), data.draw(scraps))
    report = Page(html_of(content))
    assert len(report.values("id")) == len(set(report.values("id")))
    assert all(len(row) == len(rows[0]) for rows in tables(report).values() for row in rows)


def test_chart_is_reproducible() -> None:
    assert html_of(with_costs()) == html_of(with_costs())
