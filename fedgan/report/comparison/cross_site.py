"""Cross-site matrix: macro AUC by training images and test hospital."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fedgan.report.comparison.data import Comparison, failure_note
from fedgan.report.comparison.measures import NO_INTERVAL
from fedgan.report.html import format as text
from fedgan.report.html.format import bounds, number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import csv_link
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import Tree, tree

STEPS = (0.5, 0.6, 0.7, 0.8, 0.9)  # AUC at which the next shade begins
SHADES = ("below 0.5", "0.5 to 0.6", "0.6 to 0.7", "0.7 to 0.8", "0.8 to 0.9", "0.9 and above")


@dataclass(frozen=True)
class Cell:
    """One cell: value, interval, shade (0 to 5, None without a value).

    `is_own`: the row is the own generator of the hospital whose test images these are.
    """

    value: str = text.DASH
    interval: str = ""
    shade: int | None = None
    is_own: bool = False


def _render(comparison: Comparison) -> Markup:
    matrix = tree(comparison.content.get("cross_hospital"))
    names, columns = _names(matrix.get("rows")), _names(matrix.get("columns"))
    if not names or not columns:
        return absent(
            "The cross-site matrix was not measured: the hospitals of the test images are not "
            "known, or no arm was tested."
        )
    cells = [[_cell(matrix, i, j) for j in range(len(columns))] for i in range(len(names))]
    labels = {entry.name: entry.row_label for entry in comparison.entries}
    heads = [labels.get(name, name) for name in names]
    # A failed arm may have no row in the matrix: add a row of dashes.
    for entry in comparison.entries:
        if entry.name not in names and (entry.failure_reason or not entry.is_hospital):
            heads.append(entry.row_label)
            cells.append([Cell() for _ in columns])
    notes = [failure_note(comparison.entries)]
    if any(cell.shade is not None and not cell.interval for line in cells for cell in line):
        notes.append(NO_INTERVAL)
    return render(
        "comparison_cross_site.html.j2",
        columns=[(name, comparison.test_images(name)) for name in columns],
        rows=list(zip(heads, cells, strict=True)),
        shades=SHADES,
        link=_link(columns, heads, cells),
        notes=" ".join(notes).strip(),
    )


def _names(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _at(value: Any, i: int, j: int) -> Any:
    """value[i][j], or None outside the matrix."""
    for index in (i, j):
        if not isinstance(value, list) or index >= len(value):
            return None
        value = value[index]
    return value


def _cell(matrix: Tree, i: int, j: int) -> Cell:
    value, ends = number(_at(matrix.get("macro_auc"), i, j)), bounds(_at(matrix.get("ci"), i, j))
    return Cell(
        text.decimal(value),
        text.interval(ends) if ends else "",
        None if value is None else sum(value >= step for step in STEPS),
        _at(matrix.get("is_own"), i, j) is True,
    )


def _link(columns: list[str], heads: list[str], cells: list[list[Cell]]) -> Markup:
    """The matrix as CSV, with one column per interval."""
    names = ["Trained on images of"]
    for column in columns:
        names += [column, f"{column}, 95% interval"]
    rows = [
        [head, *(part for cell in line for part in (cell.value, cell.interval or text.DASH))]
        for head, line in zip(heads, cells, strict=True)
    ]
    return csv_link("cross-site", names, rows)


SECTION = Section("cross-site", "Cross-site", _render)
