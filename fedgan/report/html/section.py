"""Sections of a report, and the HTML document that holds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from markupsafe import Markup

from fedgan.report.html.templating import read_template, render

Data = TypeVar("Data")


@dataclass(frozen=True)
class Section(Generic[Data]):
    """A section of a run report (`RunData`) or a comparison report (`Comparison`).

    `id` is the anchor and the prefix of every id in the section; `title` is the heading and the
    link in the navigation. `render` returns the content: figures, or a sentence that says which
    figures are missing. None leaves out a section that does not apply.
    """

    id: str
    title: str
    render: Callable[[Data], Markup | None]


def render_report(
    kind: str, name: str, sections: Sequence[Section[Data]], data: Data, source: str
) -> str:
    """Render a self-contained HTML report.

    `kind` is "report" or "comparison", `name` the heading, `source` the files named in the footer.
    """
    parts = [(section, part) for section in sections if (part := section.render(data)) is not None]
    # The style sheet belongs to the package and contains no "</", so it is safe without escaping.
    style = Markup(read_template("style.css"))
    document = render(
        "report.html.j2", kind=kind, name=name, sections=parts, style=style, source=source
    )
    return str(document)  # as Markup it would escape what is joined to it
