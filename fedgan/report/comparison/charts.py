"""Dot charts of the comparison report."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from fedgan.report.comparison.data import Comparison, Entry, numbers
from fedgan.report.html.charts import Dot, Row, dot_chart
from fedgan.report.html.format import bounds, number
from fedgan.report.run.data import Tree


def dot_figure(
    key: str,
    title: str,
    rows: Sequence[Row],
    x_label: str,
    domain: tuple[float, float] | None = None,
    references: Sequence[tuple[str, float]] = (),
) -> Markup:
    """A dot chart with its title; empty where no row has a mark."""
    if not any(row.dots for row in rows):
        return Markup("")
    chart = dot_chart(key, title, describe(rows), rows, x_label, domain, references)
    return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(title, chart)


def auc_figure(
    key: str,
    title: str,
    rows: Sequence[Row],
    x_label: str = "macro AUC (0.5 is chance)",
    real: float | None = None,
) -> Markup:
    """`dot_figure` of AUC with reference lines at chance and at `real`.

    The axis goes from 0.5 to 1, or begins lower where a value is below chance.
    """
    dots = [dot for row in rows for dot in row.dots]
    low = min([0.5, *(v for dot in dots for v in (dot.value, *dot.singles, *(dot.interval or ())))])
    references = [("chance", 0.5)] if low < 0.49 else []
    references += [("real images", real)] if real is not None else []
    return dot_figure(key, title, rows, x_label, (low, 1.0), references)


def auc_dots(
    name: str, result: Tree, style: str, key: str = "macro_auc", seeds: bool = False
) -> list[Dot]:
    """The mark of an AUC with its interval and optional seeds; empty if not measured."""
    value = number(result.get(key))
    if value is None:
        return []
    singles = numbers(result.get(f"{key}_seeds")) if seeds else []
    return [Dot(name, value, bounds(result.get(f"{key}_ci")), style, singles)]


def describe(rows: Sequence[Row]) -> str:
    """Text of a dot chart for a screen reader: every row and mark with its value."""
    parts = []
    for row in rows:
        dots = ", ".join(
            f"{dot.name + ' ' if len(row.dots) > 1 else ''}{dot.value:.3f}"
            + (f" ({dot.interval[0]:.3f} to {dot.interval[1]:.3f})" if dot.interval else "")
            for dot in row.dots
        )
        parts.append(f"{row.label}: {dots or row.note or 'not measured'}")
    return "; ".join(parts) + "."


def arm_legend(comparison: Comparison, real: bool = True) -> list[tuple[str, str]]:
    """(label, style) of real images (unless `real` is false) and of every arm."""
    entries: list[Entry] = [comparison.real] if real else []
    return [(entry.label, entry.style) for entry in entries + comparison.arms]
