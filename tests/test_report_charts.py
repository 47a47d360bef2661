"""Scales, ticks, charts, number formats, and sample grids cut into cells."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from fedgan.evaluation.grids import draw_grid
from fedgan.report.html import format as text
from fedgan.report.html.charts import (
    ASIDE,
    GUTTER,
    LEFT,
    WIDE,
    Dot,
    Line,
    Point,
    Row,
    dot_chart,
    legend,
    line_chart,
    scatter_chart,
    stacked_bars,
)
from fedgan.report.html.pictures import MOST_BYTES, data_uri, open_grid
from fedgan.report.html.scales import (
    Scale,
    log_range,
    log_span,
    log_ticks,
    nice_ticks,
    span,
    spread_out,
    thin,
)

ordinary = st.floats(-1e12, 1e12).map(lambda x: text.number(x) or 0.0)
positive = st.floats(1e-9, 1e9)


def parsed(svg: str) -> ElementTree.Element:
    """A chart as XML, which must be well formed."""
    return ElementTree.fromstring(svg)


def marks(svg: str, tag: str, style: str) -> list[ElementTree.Element]:
    return [e for e in parsed(svg).iter(tag) if style in e.get("class", "").split()]


# --- scales and ticks ----------------------------------------------------------------------------


@given(values=st.lists(ordinary, min_size=1, max_size=20))
def test_span_contains_its_values_and_has_a_width(values: list[float]) -> None:
    low, high = span(values)
    assert low <= min(values)
    assert max(values) <= high
    assert low < high


@given(
    values=st.lists(ordinary, min_size=2, max_size=20),
    start=st.sampled_from([0.0, 200.0]),
    stop=st.sampled_from([100.0, 300.0]),
)
def test_scale_is_monotone_and_clamped_to_its_axis(
    values: list[float], start: float, stop: float
) -> None:
    scale = Scale(*span(values), start, stop)
    places = [scale(value) for value in sorted(values)]
    assert places == sorted(places, reverse=stop < start)
    assert all(min(start, stop) <= place <= max(start, stop) for place in places)


@given(values=st.lists(positive, min_size=2, max_size=20))
def test_log_span_is_used_for_wide_positive_values_only(values: list[float]) -> None:
    found = log_span(values)
    assert (found is not None) == (max(values) / min(values) >= 50)
    if found:
        scale = Scale(*found, 0, 100, log=True)
        assert [scale(v) for v in sorted(values)] == sorted(scale(v) for v in values)
    assert log_span([*values, 0.0]) is None
    assert log_span([*values, -1.0]) is None


@given(low=ordinary, width=st.floats(1e-6, 1e12), count=st.integers(2, 8))
@example(low=-450827950828.0, width=1.0, count=2)
def test_ticks_are_few_evenly_spaced_inside_and_round(low: float, width: float, count: int) -> None:
    high = low + max(width, abs(low) * 1e-6)
    ticks = nice_ticks(low, high, count)
    assert 1 <= len(ticks) <= count + 1
    slack = 1e-6 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert ticks == sorted(set(ticks))
    steps = np.diff(ticks)
    if len(steps):
        assert np.allclose(steps, steps[0], rtol=1e-6)
        assert round(steps[0] / 10.0 ** math.floor(math.log10(steps[0] * 1.0001)), 3) in (1, 2, 5)


def test_ticks_of_known_ranges() -> None:
    assert nice_ticks(0, 60000) == [0, 20000, 40000, 60000]
    assert nice_ticks(0.5, 1.0) == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert nice_ticks(-1, 1) == [-1, -0.5, 0, 0.5, 1]
    assert nice_ticks(3, 3) == [3]
    assert log_ticks(0.5, 2000) == [1, 10, 100, 1000]
    assert log_ticks(3, 70) == [5, 10, 20, 50]
    assert span([]) == (0, 1)
    assert span([0.0, 1.0])[0] == 0, "a range that begins at zero keeps its zero"


@given(low=positive, ratio=st.floats(50, 1e8))
def test_log_ticks_are_inside_and_at_least_two(low: float, ratio: float) -> None:
    ticks = log_ticks(low, low * ratio)
    assert len(ticks) >= 2
    assert ticks == sorted(set(ticks))
    assert all(low <= tick <= low * ratio for tick in ticks)


@given(places=st.lists(st.floats(0, 300), min_size=1, max_size=30), gap=st.floats(0, 40))
def test_spread_out_keeps_order_and_range(places: list[float], gap: float) -> None:
    found = spread_out(sorted(places), gap, 0, 300)
    room = min(gap, 300 / max(len(places) - 1, 1))
    assert all(after - before >= room - 0.11 for before, after in itertools.pairwise(found))
    assert all(0 <= place <= 300 for place in found)
    if all(after - before >= gap for before, after in itertools.pairwise(sorted(places))):
        assert found == [round(place, 1) for place in sorted(places)], (
            "what is apart stays where it is"
        )


@given(values=st.lists(ordinary, min_size=1, max_size=900))
def test_thin_keeps_order_ends_and_extremes(values: list[float]) -> None:
    points = [(float(i), value) for i, value in enumerate(values)]
    kept = thin(points, 100)
    assert len(kept) <= 104
    assert set(kept) <= set(points)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert {min(values), max(values)} <= {y for _, y in kept}


# --- charts --------------------------------------------------------------------------------------


def test_line_connects_its_points_in_order() -> None:
    svg = line_chart(
        "k",
        "Title",
        "Words.",
        [Line("mean", [(1000, 1.0), (2000, 3.0), (4000, 2.0)])],
        "images seen",
    )
    (line,) = marks(svg, "polyline", "line")
    places = [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x0 < x1 < x2
    assert y1 < y2 < y0, "a larger value stands higher"
    assert math.isclose((x2 - x1) / (x1 - x0), 2.0, rel_tol=0.02), (
        "the axis is linear in images seen"
    )
    assert len(marks(svg, "circle", "mark")) == 3


def test_chart_has_title_description_and_unique_ids() -> None:
    svg = line_chart(
        "a-key", "Loss <of> G", "Falls & rises.", [Line("m", [(1, 1), (2, 2)])], "images seen"
    )
    root = parsed(svg)
    assert [child.tag for child in root][:2] == ["title", "desc"]
    assert [child.text for child in root][:2] == ["Loss <of> G", "Falls & rises."]
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "a-key-title a-key-desc"
    assert [e.get("id") for e in root.iter() if e.get("id")] == ["a-key-title", "a-key-desc"]


def test_single_point_is_a_mark_without_a_line() -> None:
    svg = line_chart("k", "t", "d", [Line("mean", [(0, 0.0)])], "images seen", [("reference", 0.0)])
    assert marks(svg, "circle", "mark")
    assert not marks(svg, "polyline", "line")
    assert not re.search("nan|inf", svg)


@pytest.mark.parametrize("lines", [[], [Line("mean", [])]])
def test_empty_chart_states_that_it_is_empty(lines: list[Line]) -> None:
    assert "no values yet" in line_chart("k", "t", "d", lines, "images seen")


@given(ys=st.lists(ordinary, min_size=1, max_size=30), reference=ordinary)
def test_line_chart_stays_inside_its_frame(ys: list[float], reference: float) -> None:
    svg = line_chart(
        "k",
        "t",
        "d",
        [Line("m", [(100.0 * i, y) for i, y in enumerate(ys)])],
        "x",
        [("reference", reference)],
    )
    width, height = map(float, parsed(svg).get("viewBox", "").split()[2:])
    for element in parsed(svg).iter():
        for names, limit in ((("x", "x1", "x2", "cx"), width), (("y", "y1", "y2", "cy"), height)):
            assert all(0 <= float(element.get(name, 0)) <= limit for name in names)


def test_dots_are_ordered_by_value_inside_their_intervals() -> None:
    rows = [
        Row(
            "nevus",
            [Dot("real", 0.9, (0.85, 0.95), "real"), Dot("synthetic", 0.8, None, "synthetic")],
        ),
        Row("other", []),
    ]
    svg = dot_chart("k", "t", "d", rows, "AUC", (0.5, 1.0))
    (whisker,) = marks(svg, "line", "whisker")
    (real,) = marks(svg, "circle", "real")
    (synthetic,) = marks(svg, "path", "synthetic")
    assert float(whisker.get("x1", 0)) < float(real.get("cx", 0)) < float(whisker.get("x2", 0))
    assert float(synthetic.get("d", "")[1:].split()[0]) < float(real.get("cx", 0))
    assert "not measured" in svg
    assert "nevus, real: 0.900 (0.850–0.950)" in svg


def test_single_values_are_small_marks_below_their_mean() -> None:
    svg = dot_chart(
        "k",
        "t",
        "d",
        [Row("federated", [Dot("AUC", 0.8, (0.7, 0.9), "a2", [0.75, 0.85])])],
        "AUC",
        (0.5, 1.0),
    )
    (mark,) = marks(svg, "path", "mark")
    start = re.match(r"M([\d.]+) ([\d.]+)", mark.get("d", ""))
    assert start is not None
    x, y = map(float, start.groups())
    singles = [
        (float(e.get("cx", 0)), float(e.get("cy", 0)), float(e.get("r", 0)))
        for e in marks(svg, "circle", "single")
    ]
    assert len(singles) == 2
    assert singles[0][0] < x < singles[1][0]
    assert all(cy > y and r < 3 for _, cy, r in singles)
    assert "federated, AUC: 0.800 (0.700–0.900); single: 0.750, 0.850" in svg


def test_vertical_reference_is_at_its_value_with_label_above() -> None:
    svg = dot_chart(
        "k",
        "t",
        "d",
        [Row("a", [Dot("AUC", 0.8)]), Row("b", [])],
        "AUC",
        (0.5, 1.0),
        [("real images", 0.8)],
    )
    (line,) = marks(svg, "line", "reference")
    (mark,) = marks(svg, "circle", "mark")
    assert float(line.get("x1", 0)) == float(line.get("x2", 1)) == float(mark.get("cx", 0))
    label = next(e for e in parsed(svg).iter("text") if e.text == "real images")
    assert (
        float(label.get("y", 0))
        < float(line.get("y1", 0))
        < float(mark.get("cy", 0))
        < float(line.get("y2", 0))
    )


@given(values=st.lists(ordinary, min_size=1, max_size=9), reference=ordinary)
def test_dot_chart_stays_inside_its_frame(values: list[float], reference: float) -> None:
    rows = [
        Row(
            "all",
            [Dot(str(i), v, (v - 1, v + 1), f"a{i % 8 + 1}", [v]) for i, v in enumerate(values)],
        ),
        Row("none", []),
    ]
    svg = dot_chart("k", "t", "d", rows, "x", None, [("here", reference)])
    width, height = map(float, parsed(svg).get("viewBox", "").split()[2:])
    for element in parsed(svg).iter():
        for names, limit in ((("x", "x1", "x2", "cx"), width), (("y", "y1", "y2", "cy"), height)):
            assert all(0 <= float(element.get(name, 0)) <= limit for name in names)


def test_marks_of_one_row_do_not_overlap() -> None:
    svg = dot_chart(
        "k",
        "t",
        "d",
        [Row("a", [Dot(str(i), 0.5, None, f"h{i + 1}") for i in range(6)])],
        "x",
        (0.0, 1.0),
    )
    ys = sorted(float(e.get("cy", 0)) for e in marks(svg, "circle", "mark"))
    assert len(ys) == 6
    assert min(np.diff(ys)) >= 8.5


def test_each_arm_has_its_own_shape() -> None:
    styles = ["real", *(f"a{i}" for i in range(1, 9))]
    drawn = [str(legend([("name", style)], "dot")).replace(style, "") for style in styles]
    assert len(set(drawn)) == len(styles)


@given(low=st.floats(1.0, 1e12), ratio=st.floats(1, 1e5))
def test_log_axis_has_two_ticks_with_space_for_labels(low: float, ratio: float) -> None:
    svg = scatter_chart(
        "k", "t", "d", [Point("a", low, 0.1), Point("b", low * ratio, 0.2)], "x", text.size
    )
    ticks = [
        e
        for e in parsed(svg).iter("text")
        if e.get("class") == "tick" and e.get("text-anchor") == "middle"
    ]
    places = [float(e.get("x", 0)) for e in ticks]
    assert len(places) >= 2
    assert all(after - before >= 44 for before, after in itertools.pairwise(places))
    span = log_range([low, low * ratio])
    assert len(log_ticks(*span)) >= 2
    assert span[0] < low <= low * ratio < span[1]


@given(
    xs=st.lists(st.sampled_from([1e6, 1.1e6, 5e8]), min_size=1, max_size=20), gap=st.floats(-1, 1)
)
def test_scatter_numbers_are_apart_and_marks_keep_order(xs: list[float], gap: float) -> None:
    xs = sorted(xs)
    points = [
        Point(str(i), x, gap + i / 9, (gap - 1, gap + i), f"a{i % 8 + 1}") for i, x in enumerate(xs)
    ]
    chart = parsed(
        scatter_chart("k", "t", "d", points, "x", text.size, [("equal", 0.0), ("margin", 0.02)])
    )
    numbers = [
        (str(e.text), float(e.get("x", 0)))
        for e in chart.iter("text")
        if e.get("class") == "strong"
    ]
    assert [words for words, _ in numbers] == [str(i + 1) for i in range(len(xs))]
    assert all(
        after - before >= (12.9 if len(xs) < 10 else len(words) * 8)
        for (_, before), (words, after) in itertools.pairwise(numbers)
    )
    drawn = [e for e in chart.iter() if "mark" in e.get("class", "").split()]
    places = [float(e.get("cx") or e.get("d", "")[1:].split()[0]) for e in drawn]
    scale = Scale(*log_range(xs), LEFT, WIDE - GUTTER, log=True)
    assert places == sorted(places)
    assert all(abs(place - scale(x)) <= ASIDE + 0.1 for place, x in zip(places, xs, strict=True))
    labels = [float(e.get("y", 0)) for e in chart.iter("text") if e.get("class") == "note"]
    assert abs(labels[0] - labels[1]) >= 11.9 - 1e-9
    _, _, width, height = map(float, chart.get("viewBox", "").split())
    for element in chart.iter():
        for keys, limit in ((("x", "x1", "x2", "cx"), width), (("y", "y1", "y2", "cy"), height)):
            assert all(0 <= float(element.get(key, 0)) <= limit for key in keys)


@given(values=st.lists(st.integers(0, 10**6), min_size=1, max_size=8))
def test_bars_divide_their_length_by_share(values: list[int]) -> None:
    svg = stacked_bars(
        "k",
        "t",
        "d",
        [Row("A", values=values, note=str(sum(values)))],
        [f"c{i}" for i in range(len(values))],
    )
    bars = list(parsed(svg).iter("rect"))
    if sum(values) == 0:
        assert not bars
        assert "no images" in svg
        return
    assert len(bars) == sum(value > 0 for value in values)
    for bar, value in zip(bars, [v for v in values if v], strict=True):
        assert math.isclose(float(bar.get("width", 0)) + 1, 242 * value / sum(values), abs_tol=1.6)
    places = [float(bar.get("x", 0)) for bar in bars]
    assert places == sorted(places)


def test_names_are_escaped_and_long_names_shortened() -> None:
    name = "<b>Hospital & sons of a very long name</b>"
    svg = dot_chart("k", "t", "d", [Row(name, [Dot(name, 0.5)])], "x")
    assert "<b>" not in svg
    titles = [e.text for e in parsed(svg).iter("title")]
    assert name in titles
    assert "<b>" not in legend([(name, "h1")], "line")
    rows = [
        Row(f"local of county hospital {place}", [Dot("x", 0.5)]) for place in ("north", "south")
    ]
    shown = [
        e[-1].tail
        for e in parsed(dot_chart("k", "t", "d", rows, "x")).iter()
        if "name" in e.get("class", "").split()
    ]
    assert shown == ["local of…tal north", "local of…tal south"], "both ends, so that they differ"


# --- numbers as text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [None, "12", True, math.nan, math.inf, -math.inf, [1], {}, 10**400]
)
def test_non_numbers_are_a_dash(value: object) -> None:
    for show in (text.whole, text.decimal, text.signed, text.duration, text.size, text.interval):
        assert show(value) == text.DASH


def test_number_formats() -> None:
    assert text.whole(12000) == "12,000"
    assert text.decimal(0.91349) == "0.913"
    assert [text.significant(v) for v in (31.4711, 0.0034123, -3.1e-7, 12345.6)] == [
        "31.47",
        "0.003412",
        "−3.1e−07",
        "12,346",
    ]
    assert text.signed(-0.0581) == "−0.058"
    assert text.interval([0.93, 0.89], 2) == "0.89–0.93"
    assert [text.duration(s) for s in (4.24, 59.6, 221.4, 3600, 4320)] == [
        "4.2 s",
        "1 min 0 s",
        "3 min 41 s",
        "1 h 0 min",
        "1 h 12 min",
    ]
    assert [text.size(b) for b in (0, 812, 48.2e6, 999.6e6, 1.214e9)] == [
        "0 B",
        "812 B",
        "48.2 MB",
        "1 GB",
        "1.21 GB",
    ]
    assert [text.short(v) for v in (0, 0.25, 500, 20000, 1.5e6, -2e3)] == [
        "0",
        "0.25",
        "500",
        "20k",
        "1.5M",
        "−2k",
    ]
    assert text.labels([100000.5, 100001.0]) == ["100.0005k", "100.001k"]


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(
    "names", [["a", "b", "c", "d", "e", "f", "g"], ["only"], ["no finding", "x", "y"], [""] * 4]
)
def test_sample_grid_is_cut_into_its_images(tmp_path: Path, side: int, names: list[str]) -> None:
    rng = np.random.default_rng(side)
    channels = 1 if names[0] == "only" else 3
    images = [rng.integers(0, 256, (3, channels, side, side), dtype=np.uint8) for _ in names]
    path = tmp_path / "real.png"
    draw_grid(names, images).save(path, compress_level=1)
    labels = [name for name in names if name and name != "no finding"]
    grid = open_grid(path, labels, side)
    assert grid is not None
    assert (grid.count, grid.columns, grid.side) == (len(names), 3, side)
    assert grid.rows == (tuple(names) if any(names) else ())
    if side <= 64:
        for row, column in ((0, 0), (len(names) - 1, 2)):
            cell = np.asarray(grid.cell(row, column)).transpose(2, 0, 1)
            assert np.array_equal(cell, np.broadcast_to(images[row][column], cell.shape))


def test_image_that_is_no_grid_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "real.png"
    Image.new("RGB", (301, 97)).save(path)
    assert open_grid(path, ["a", "b"], 32) is None
    path.write_bytes(path.read_bytes()[:40])
    assert open_grid(path, ["a", "b"], 32) is None
    assert open_grid(tmp_path / "absent.png", ["a"], 32) is None


def test_images_stay_below_the_byte_limit() -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (96, 768, 3), dtype=np.uint8))
    assert data_uri(noise).startswith("data:image/jpeg;base64,")
    assert len(data_uri(noise)) < 2 * MOST_BYTES
    assert data_uri(noise.crop((0, 0, 32, 32))).startswith("data:image/png;base64,")
