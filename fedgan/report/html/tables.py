"""Tables: a caption, heads with a scope, numbers that line up, and the same rows as CSV behind a link."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from markupsafe import Markup

from fedgan.report.html.templating import render

# A number or an interval of numbers, and nothing else: its minus signs may become plain ones.
_NUMBERS = re.compile(r"(?=.*\d)[\d\s.,+−–()\[\]e×-]+(?: to [\d.,+−-]+)?")


@dataclass(frozen=True)
class Column:
    """Head of a column. Numeric columns are right-aligned; `title` explains the head."""

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
    """A table whose first column heads its rows; the first `strong` rows stand out.

    `download` is the name of the CSV file (without ending) that a link offers; no link where it is empty.
    `more` is a sentence below the table.
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
    """A link that saves rows as `name`.csv out of the page itself."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow([_harmless(head) for head in heads])
    writer.writerows([_harmless(cell) for cell in row] for row in rows)
    file = re.sub(r"[^\w.-]+", "-", name)
    # The byte order mark tells a spreadsheet that the file is UTF-8.
    data = "data:text/csv;charset=utf-8," + quote("\ufeff" + stream.getvalue())
    return Markup(
        '<a class="csv" download="{}.csv" href="{}">Save as CSV<span class="unseen">: {}</span></a>'
    ).format(file, data, name)


def _harmless(cell: str) -> str:
    """A text that a spreadsheet would run as a formula is quoted; numbers pass, with a plain minus sign."""
    if _NUMBERS.fullmatch(cell):
        cell = cell.replace("−", "-")
    runs = cell[:1] in ("=", "+", "-", "@", "\t", "\r") and not re.fullmatch(
        r"[+-][\d.,]+(e-?\d+)?", cell
    )
    return "'" + cell if runs else cell
