"""What a section of the page is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from fedgan.report.run.data import RunData


@dataclass(frozen=True)
class Section:
    """One section. `id` is its anchor and the prefix of every id inside it.

    `render` gives its content, a sentence where the run does not have the numbers yet, or None where
    the section does not concern this run at all and is left out.
    """

    id: str
    title: str
    render: Callable[[RunData], Markup | None]
