"""Accessible HTML tables, with the same rows as a CSV download."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from markupsafe import Markup

from fedgan.report.html.templating import render

# A number or an interval of numbers: in CSV its minus signs become hyphens.
_NUMBERS = re.compile(r"(?=.*\d)[\d\s.,+−–()\[\]e×-]+(?: to [\d.,+−-]+)?")


@dataclass(frozen=True)
class Column:
    """A column. Numeric columns are right-aligned; `title` is the tooltip of the heading."""

    head: str
    numeric: bool = True
    title: str = ""


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    download: str = "",
    strong: int = 0,
    more: str = "",
) -> Markup:
    """Render a table whose first column holds row headings; the first `strong` rows are emphasised.

    `download` is the name, without extension, of the CSV file behind a link; empty: no link.
    `more` is the text below the table.
    """
    link = csv_link(download, [column.head for column in columns], rows) if download else Markup("")
    return render(
        "table.html.j2",
        caption=caption,
        columns=columns,
        rows=rows,
        link=link,
        strong=strong,
        more=more,
    )


def csv_link(name: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """Render a link that saves the rows as `name`.csv; the data is in the link itself."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow([_escape_formula(head) for head in heads])
    writer.writerows([_escape_formula(cell) for cell in row] for row in rows)
    file = re.sub(r"[^\w.-]+", "-", name)
    # Spreadsheets recognise UTF-8 by the byte order mark.
    data = "data:text/csv;charset=utf-8," + quote("\ufeff" + stream.getvalue())
    return Markup(
        '<a class="csv" download="{}.csv" href="{}">Save as CSV<span class="unseen">: {}</span></a>'
    ).format(file, data, name)


def _escape_formula(cell: str) -> str:
    """Quote text that a spreadsheet would run as a formula; numbers get a plain minus sign."""
    if _NUMBERS.fullmatch(cell):
        cell = cell.replace("−", "-")
    runs = cell[:1] in ("=", "+", "-", "@", "\t", "\r") and not re.fullmatch(
        r"[+-][\d.,]+(e-?\d+)?", cell
    )
    return "'" + cell if runs else cell
