"""Sections with one part per class or per hospital."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedgan.report.comparison.data import Comparison
from fedgan.report.comparison.measures import SMALL_COUNTS
from fedgan.report.html.templating import render


@dataclass(frozen=True)
class Part:
    """One part: its anchor, heading, text, (summary, content) of each fold, and a chart if any."""

    id: str
    name: str
    text: str
    details: Sequence[tuple[str, Markup]]
    chart: Markup | str = ""


def render_parts(comparison: Comparison, parts: Sequence[Part]) -> Markup:
    """An index of the parts, then the parts."""
    small_counts = SMALL_COUNTS if comparison.has_small_counts else ""
    return render("comparison_parts.html.j2", parts=parts, small_counts=small_counts)
