"""The cross-site matrix: whose images a classifier was trained on × whose real test images it was tested on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fedgan.report.comparison.data import Comparison
from fedgan.report.comparison.parts import NO_INTERVAL, entry_label
from fedgan.report.html import format as text
from fedgan.report.html.format import bounds, number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import csv_link
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import tree

STEPS = (0.5, 0.6, 0.7, 0.8, 0.9)  # AUC at which the next shade begins
SHADES = ("below 0.5", "0.5 to 0.6", "0.6 to 0.7", "0.7 to 0.8", "0.8 to 0.9", "0.9 and above")


@dataclass(frozen=True)
class Cell:
    """One cell: its number, its interval, its shade (0 to 5, or None without a number), and whether it is the hospital's own."""

    value: str
    interval: str
    shade: int | None
    own: bool


def _render(comparison: Comparison) -> Markup:
    matrix = tree(comparison.content.get("cross_site"))
    rows, columns = _names(matrix.get("rows")), _names(matrix.get("columns"))
    if not rows or not columns:
        return absent(
            "The cross-site matrix was not measured: the hospitals of the test images are not known, or no arm was tested."
        )
    cells = [[_cell(matrix, i, j) for j in range(len(columns))] for i in range(len(rows))]
    labels = {entry.name: entry_label(entry) for entry in comparison.entries}
    heads = [labels.get(name, name) for name in rows]
    # An arm that failed may have no row in the matrix: here it has one, of dashes.
    for entry in comparison.entries:
        if entry.name not in rows and (entry.failure_reason or not entry.is_alone):
            heads.append(entry_label(entry))
            cells.append([Cell(text.DASH, "", None, False) for _ in columns])
    troubles = [
        f"{entry.label} {entry.failure_reason}."
        for entry in comparison.entries
        if entry.failure_reason
    ]
    return render(
        "comparison_matrix.html.j2",
        columns=[(name, comparison.test_images(name)) for name in columns],
        rows=list(zip(heads, cells, strict=True)),
        shades=SHADES,
        link=_link(columns, heads, cells),
        under=[*troubles, NO_INTERVAL]
        if any(cell.shade is not None and not cell.interval for line in cells for cell in line)
        else troubles,
    )


def _names(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _at(value: Any, i: int, j: int) -> Any:
    """value[i][j], or None where it does not reach so far."""
    for place in (i, j):
        if not isinstance(value, list) or place >= len(value):
            return None
        value = value[place]
    return value


def _cell(matrix: dict[str, Any], i: int, j: int) -> Cell:
    value, ends = number(_at(matrix.get("macro_auc"), i, j)), bounds(_at(matrix.get("ci"), i, j))
    shade = None if value is None else sum(value >= step for step in STEPS)
    return Cell(
        text.decimal(value),
        text.interval(ends) if ends else "",
        shade,
        _at(matrix.get("own"), i, j) is True,
    )


def _link(columns: list[str], heads: list[str], cells: list[list[Cell]]) -> Markup:
    """The matrix as CSV, with a column for each interval."""
    names = ["Trained on images of"]
    for column in columns:
        names += [column, f"{column}, 95% interval"]
    rows = [
        [head, *(part for cell in line for part in (cell.value, cell.interval or text.DASH))]
        for head, line in zip(heads, cells, strict=True)
    ]
    return csv_link("cross-site", names, rows)


SECTION = Section("cross-site", "Cross-site", _render)
