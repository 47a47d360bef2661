"""Charts as inline SVG, without scripts or fonts; all colours are CSS variables of the report.

Each chart has a `key` (unique in the report; prefix of its ids) and a title and description for
screen readers. Sizes are in units of the viewBox, which the report scales to its column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from fedgan.report.html.format import labels, short, signed
from fedgan.report.html.scales import Scale, log_range, log_span, span, spread_out, thin

WIDTH, HEIGHT = 330, 196  # of a line chart
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 10, 38
WIDE = 420  # width of a bar or dot chart
ROW = 30  # height of one row of a bar or dot chart
NAMES = 118  # width of the column of row names
# Scatter chart: height of the plot, height of the numbers above it, width of the labels beside it.
TALL, NUMBERS, GUTTER = 190, 20, 54
ASIDE = 15  # maximum shift of a mark of a scatter chart that would cover another

# Shapes of marks, as paths from their centre, so that colour is not needed. Other styles are discs.
SHAPES = {
    "synthetic": "m0 -5l5 5l-5 5l-5 -5z",
    "a1": "m-3.8 -3.8h7.6v7.6h-7.6z",
    "a2": "m0 -5.4l5.4 5.4l-5.4 5.4l-5.4 -5.4z",
    "a3": "m0 -5.2l5.2 9h-10.4z",
    "a4": "m0 5.2l5.2 -9h-10.4z",
    "a5": "m-1.7 -5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
    "a6": "m-5 0l2.5 -4.4h5l2.5 4.4l-2.5 4.4h-5z",
    "a7": "m-2 -5h4v10h-4z",
    "a8": "m-5 -2h10v4h-10z",
}


@dataclass(frozen=True)
class Line:
    """A line: (x, y) by increasing x.

    `style` is a CSS class: `main` for the mean, `h1`… for hospitals, `a1`… for arms.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "main"


@dataclass(frozen=True)
class Dot:
    """A mark in a row of `dot_chart`, with an optional interval.

    `style`: `real`, `synthetic`, `h1`…, `a1`… If the value is a mean, `singles` are the values it
    averages; small marks below it show them.
    """

    name: str
    value: float
    interval: tuple[float, float] | None = None
    style: str = "real"
    singles: Sequence[float] = ()


@dataclass(frozen=True)
class Point:
    """A mark of `scatter_chart` at (x, y), x > 0, with an optional interval of y. `style`: `a1`…"""

    name: str
    x: float
    y: float
    interval: tuple[float, float] | None = None
    style: str = "a1"


@dataclass(frozen=True)
class Row:
    """A row of `dot_chart` (marks) or `stacked_bars` (one value per name, `note` at its end).

    A `dot_chart` row without marks shows `note`. `strong` rows are emphasised, `minor` ones faint.
    """

    label: str
    dots: Sequence[Dot] = ()
    values: Sequence[float] = ()
    note: str = ""
    strong: bool = False
    minor: bool = False


def line_chart(
    key: str,
    title: str,
    desc: str,
    lines: Sequence[Line],
    x_label: str,
    references: Sequence[tuple[str, float]] = (),
) -> Markup:
    """Draw lines over a common x.

    `references` are horizontal (label, y). The y axis is logarithmic if values differ 50-fold.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return _svg(
            key,
            title,
            desc + " No values yet.",
            WIDTH,
            HEIGHT,
            [_text(WIDTH / 2, HEIGHT / 2, "no values yet", "note", "middle")],
        )
    ys = [y for line in lines for _, y in line.points] + [y for _, y in references]
    logarithmic = log_span(ys)
    y = Scale(*(logarithmic or span(ys)), HEIGHT - BOTTOM, TOP, log=logarithmic is not None)
    x = Scale(0.0, max(max(p[0] for line in lines for p in line.points), 1e-9), LEFT, WIDTH - RIGHT)
    parts = _y_axis(y) + _x_axis(x, HEIGHT - BOTTOM, x_label)
    for label, value in references:
        parts.append(
            Markup('<line class="reference" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                LEFT, WIDTH - RIGHT, y(value), y(value)
            )
        )
        above = y(value) - 4 if y(value) > TOP + 14 else y(value) + 12
        parts.append(_text(WIDTH - RIGHT, above, label, "note halo", "end"))
    for line in sorted(lines, key=lambda line: line.style == "main"):
        parts.append(_line(line, x, y))
    return _svg(key, title, desc, WIDTH, HEIGHT, parts)


def dot_chart(
    key: str,
    title: str,
    desc: str,
    rows: Sequence[Row],
    x_label: str,
    domain: tuple[float, float] | None = None,
    references: Sequence[tuple[str, float]] = (),
) -> Markup:
    """Draw one row per name, one mark per value and a bar for its interval.

    `domain` fixes the axis; marks outside it are clamped. `references` are vertical (label, x).
    """
    height = max(ROW, max((9.0 * len(row.dots) + 8 for row in rows), default=0.0))
    top = TOP + (15 if references else 0)
    bottom = top + height * max(len(rows), 1)
    ends = [
        v
        for row in rows
        for dot in row.dots
        for v in (dot.value, *dot.singles, *(dot.interval or ()))
    ]
    x = Scale(
        *(domain or span([*ends, *(value for _, value in references)])), NAMES + 8, WIDE - RIGHT - 6
    )
    parts = _x_axis(x, bottom, x_label, grid_from=top)
    for label, value in references:
        parts += _vertical_reference(x, label, value, top, bottom)
    for i, row in enumerate(rows):
        middle = top + height * (i + 0.5)
        parts.append(_row_name(row, middle))
        if i:
            parts.append(
                Markup('<line class="grid" x1="0" x2="{:g}" y1="{:g}" y2="{:g}"/>').format(
                    x.stop, middle - height / 2, middle - height / 2
                )
            )
        if not row.dots:
            parts.append(_text(NAMES + 12, middle + 4, row.note or "not measured", "note"))
        gap = min(9.0, (height - 8) / max(len(row.dots), 1))
        for j, dot in enumerate(row.dots):
            parts.append(_dot(dot, x, middle + (j - (len(row.dots) - 1) / 2) * gap, row))
    return _svg(key, title, desc, WIDE, bottom + BOTTOM, parts)


def scatter_chart(
    key: str,
    title: str,
    desc: str,
    points: Sequence[Point],
    x_label: str,
    format_x: Callable[[float], str] = short,
    references: Sequence[tuple[str, float]] = (),
) -> Markup:
    """Draw marks at (x, y) on a logarithmic x axis, numbered from 1 above the plot.

    `points` are given by increasing x. Marks that would cover each other move apart by at most
    `ASIDE`. `references` are horizontal (label, y); `format_x` turns an x into text.
    """
    top, right = TOP + NUMBERS, WIDE - GUTTER
    bottom = top + TALL
    ends = [v for point in points for v in (point.y, *(point.interval or ()))]
    x = Scale(*log_range(point.x for point in points), LEFT, right, log=True)
    y = Scale(*span([*ends, *(value for _, value in references)]), bottom, top)
    parts = _y_axis(y, right) + _x_axis(x, bottom, x_label, top, _spaced_ticks(x), format_x)
    ordered = sorted(references, key=lambda reference: -reference[1])
    # Labels beside the plot, apart from each other, so that they cover no mark.
    heights = spread_out([y(value) for _, value in ordered], 12, top, bottom)
    for (label, value), height in zip(ordered, heights, strict=True):
        parts.append(
            Markup('<line class="reference" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                LEFT, right, y(value), y(value)
            )
        )
        parts.append(_text(right + 5, height + 4, label, "note"))
    places = _move_apart([x(point.x) for point in points], LEFT, right)
    above = spread_out(places, 13 if len(points) < 10 else 20, LEFT, right)
    for i, (point, place, over) in enumerate(zip(points, places, above, strict=True), 1):
        tip = y(max(point.y, *(point.interval or (point.y,))))
        lead = Markup('<line class="grid" x1="{:g}" x2="{:g}" y1="{:g}" y2="{:g}"/>').format(
            over, place, top - 5, tip
        )
        parts += [lead, _text(over, top - 9, str(i), "strong", "middle")]
    # Marks come after all leads, which would cross them.
    parts += [
        _point(i, point, place, y, format_x)
        for i, (point, place) in enumerate(zip(points, places, strict=True), 1)
    ]
    return _svg(key, title, desc, WIDE, bottom + BOTTOM, parts)


def stacked_bars(
    key: str, title: str, desc: str, rows: Sequence[Row], names: Sequence[str]
) -> Markup:
    """Draw one bar per row, all of equal length, divided by the shares of its values (`names`)."""
    start, stop = NAMES + 8, WIDE - 52
    parts: list[Markup] = []
    for i, row in enumerate(rows):
        top, total = TOP + ROW * i + 4, sum(row.values)
        parts += [_row_name(row, top + 11), _text(WIDE - 2, top + 15, row.note, "note", "end")]
        place = float(start)
        for j, value in enumerate(row.values):
            width = (stop - start) * value / total if total > 0 else 0.0
            if width > 0:
                title_text = f"{row.label}: {names[j]} {value:,.0f} ({value / total:.0%})"
                parts.append(
                    Markup(
                        '<rect class="fill c{}" x="{:.1f}" y="{}" width="{:.1f}" height="22">'
                        "<title>{}</title></rect>"
                    ).format(j % 8 + 1, place, top, max(width - 1, 0.5), title_text)
                )
                if width > 30:
                    parts.append(
                        _text(
                            place + width / 2,
                            top + 15,
                            f"{value / total:.0%}",
                            f"inside on{j % 8 + 1}",
                            "middle",
                        )
                    )
            place += width
        if total <= 0:
            parts.append(_text(start + 4, top + 15, "no images", "note"))
    return _svg(key, title, desc, WIDE, TOP + ROW * max(len(rows), 1), parts)


def legend(entries: Sequence[tuple[str, str]], kind: str) -> Markup:
    """Draw a legend of (name, style).

    `kind`: "line" (`line_chart`), "dot" (`dot_chart`) or "fill" (`stacked_bars`).
    """
    if not entries:
        return Markup("")
    items = Markup("").join(
        Markup(
            '<li><svg viewBox="0 0 24 12" aria-hidden="true" focusable="false">{}</svg>{}</li>'
        ).format(_swatch(style, kind), name)
        for name, style in entries
    )
    return Markup('<ul class="legend">{}</ul>').format(items)


# --- parts ---------------------------------------------------------------------------------------


def _svg(
    key: str, title: str, desc: str, width: float, height: float, parts: Sequence[Markup]
) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {:g} {:g}" role="img" aria-labelledby="{}-title {}-desc">'
        '<title id="{}-title">{}</title><desc id="{}-desc">{}</desc>{}</svg>'
    ).format(width, height, key, key, key, title, key, desc, Markup("").join(parts))


def _text(x: float, y: float, content: str, style: str, anchor: str = "start") -> Markup:
    return Markup('<text class="{}" x="{:g}" y="{:g}" text-anchor="{}">{}</text>').format(
        style, x, y, anchor, content
    )


def _vertical_reference(
    x: Scale, label: str, value: float, top: float, bottom: float
) -> list[Markup]:
    """A vertical reference line and its label, aligned inwards near the ends of the axis."""
    place = x(value)
    anchor = "end" if place > x.stop - 40 else "start" if place < x.start + 40 else "middle"
    line = Markup('<line class="reference" x1="{}" x2="{}" y1="{:g}" y2="{:g}"/>').format(
        place, place, top, bottom
    )
    return [line, _text(place, top - 5, label, "note", anchor)]


def _row_name(row: Row, middle: float) -> Markup:
    """The row's name, right-aligned; a long one is shortened, with the full name as its title."""
    name = (
        row.label if len(row.label) <= 18 else f"{row.label[:8].rstrip()}…{row.label[-9:].lstrip()}"
    )
    style = "name strong" if row.strong else "name minor" if row.minor else "name"
    return Markup(
        '<text class="{}" x="{}" y="{:g}" text-anchor="end"><title>{}</title>{}</text>'
    ).format(style, NAMES, middle + 4, row.label, name)


def _y_axis(y: Scale, right: float = WIDTH - RIGHT) -> list[Markup]:
    parts = []
    ticks = y.ticks(5)
    for tick, label_text in zip(ticks, labels(ticks), strict=True):
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                LEFT, right, y(tick), y(tick)
            )
        )
        parts.append(_text(LEFT - 6, y(tick) + 4, label_text, "tick", "end"))
    return parts


def _x_axis(
    x: Scale,
    bottom: float,
    label: str,
    grid_from: float | None = None,
    ticks: Sequence[float] | None = None,
    format_tick: Callable[[float], str] | None = None,
) -> list[Markup]:
    parts = [
        Markup('<line class="axis" x1="{:g}" x2="{:g}" y1="{:g}" y2="{:g}"/>').format(
            x.start, x.stop, bottom, bottom
        )
    ]
    ticks = x.ticks(5) if ticks is None else ticks
    for tick, label_text in zip(
        ticks, [format_tick(tick) for tick in ticks] if format_tick else labels(ticks), strict=True
    ):
        if grid_from is not None:
            parts.append(
                Markup('<line class="grid" x1="{}" x2="{}" y1="{:g}" y2="{:g}"/>').format(
                    x(tick), x(tick), grid_from, bottom
                )
            )
        parts.append(_text(x(tick), bottom + 15, label_text, "tick", "middle"))
    parts.append(_text((x.start + x.stop) / 2, bottom + 32, label, "label", "middle"))
    return parts


def _spaced_ticks(x: Scale, gap: float = 44) -> list[float]:
    """Ticks of a logarithmic axis at least `gap` apart; powers of ten take precedence."""
    kept: list[float] = []
    for tick in sorted(x.ticks(5), key=lambda tick: (f"{tick:e}"[0] != "1", tick)):
        if all(abs(x(tick) - x(other)) >= gap for other in kept):
            kept.append(tick)
    return sorted(kept)


def _move_apart(places: Sequence[float], low: float, high: float) -> list[float]:
    """Increasing positions, moved apart as far as `ASIDE` allows: a mark must stay near its x."""
    for gap in (10, 8, 6, 4, 3, 2, 1):
        moved = spread_out(places, gap, low, high)
        if all(abs(after - before) <= ASIDE for before, after in zip(places, moved, strict=True)):
            return moved
    return list(places)


def _point(
    number: int, point: Point, place: float, y: Scale, format_x: Callable[[float], str]
) -> Markup:
    bar, title = Markup(""), f"{number} {point.name}: {signed(point.y)}"
    if point.interval is not None:
        low, high = point.interval
        bar = Markup('<line class="whisker {}" x1="{:g}" x2="{:g}" y1="{:g}" y2="{:g}"/>').format(
            point.style, place, place, y(low), y(high)
        )
        title += f" ({signed(low)} to {signed(high)})"
    title += f" at {format_x(point.x)}"
    return Markup("<g><title>{}</title>{}{}</g>").format(
        title, bar, _mark(point.style, place, y(point.y))
    )


def _line(line: Line, x: Scale, y: Scale) -> Markup:
    points = thin(line.points)
    path = " ".join(f"{x(px):g},{y(py):g}" for px, py in points)
    last_x, last_y = line.points[-1]
    title = f"{line.name}: {short(last_y)} at {short(last_x)}"
    marks = Markup("")
    if len(points) <= 24:
        radius = 2.6 if line.style == "main" else 1.8
        marks = Markup("").join(
            Markup(
                '<circle class="mark {}" cx="{:g}" cy="{:g}" r="{}"><title>{}</title></circle>'
            ).format(line.style, x(px), y(py), radius, f"{line.name}: {short(py)} at {short(px)}")
            for px, py in points
        )
    path_element = (
        Markup('<polyline class="line {}" points="{}"/>').format(line.style, path)
        if len(points) > 1
        else Markup("")
    )
    return Markup("<g><title>{}</title>{}{}</g>").format(title, path_element, marks)


def _dot(dot: Dot, x: Scale, y: float, row: Row) -> Markup:
    bar, title = Markup(""), f"{row.label}, {dot.name}: {dot.value:.3f}"
    style = f"{dot.style} minor" if row.minor else dot.style
    if dot.interval is not None:
        low, high = dot.interval
        bar = Markup('<line class="whisker {}" x1="{:g}" x2="{:g}" y1="{:g}" y2="{:g}"/>').format(
            style, x(low), x(high), y, y
        )
        title += f" ({low:.3f}–{high:.3f})"
    singles = Markup("").join(
        Markup('<circle class="single {}" cx="{:g}" cy="{:g}" r="1.9"/>').format(
            style, x(value), y + 9
        )
        for value in dot.singles
    )
    if dot.singles:
        title += "; single: " + ", ".join(f"{value:.3f}" for value in dot.singles)
    return Markup("<g><title>{}</title>{}{}{}</g>").format(
        title, bar, singles, _mark(style, x(dot.value), y)
    )


def _mark(style: str, x: float, y: float) -> Markup:
    """A disc, or the shape of the first word of the style."""
    shape = SHAPES.get(style.split()[0] if style.strip() else "")
    if shape:
        return Markup('<path class="mark {}" d="M{:g} {:g}{}"/>').format(style, x, y, shape)
    return Markup('<circle class="mark {}" cx="{:g}" cy="{:g}" r="{}"/>').format(style, x, y, 4.2)


def _swatch(style: str, kind: str) -> Markup:
    if kind == "fill":
        return Markup('<rect class="fill {}" x="6" y="0" width="12" height="12" rx="2"/>').format(
            escape(style)
        )
    if style.startswith("single"):
        return Markup('<circle class="{}" cx="12" cy="6" r="2.4"/>').format(escape(style))
    if kind == "line":
        return Markup('<line class="line {}" x1="1" x2="23" y1="6" y2="6"/>').format(escape(style))
    return Markup('<line class="whisker {}" x1="2" x2="22" y1="6" y2="6"/>{}').format(
        escape(style), _mark(style, 12, 6)
    )
