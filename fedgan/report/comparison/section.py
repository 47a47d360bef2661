"""What a section of the comparison's page is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from fedgan.report.comparison.data import Comparison


@dataclass(frozen=True)
class Section:
    """One section. `id` is its anchor and the prefix of every id inside it; `short` is its name in the navigation.

    `render` gives its content: numbers, or the sentence that says why there are none.
    """

    id: str
    title: str
    short: str
    render: Callable[[Comparison], Markup]
