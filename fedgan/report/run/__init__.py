"""The sections of the page, in order. A new one is a module with a `SECTION` and a line in this list."""

from __future__ import annotations

from fedgan.report.html.section import Section
from fedgan.report.run import (
    curves,
    fidelity,
    hospitals,
    images,
    notes,
    privacy,
    provenance,
    summary,
    utility,
)

SECTIONS: tuple[Section, ...] = (
    summary.SECTION,
    images.SECTION,
    utility.SECTION,
    fidelity.SECTION,
    privacy.SECTION,
    curves.SECTION,
    hospitals.SECTION,
    notes.SECTION,
    provenance.SECTION,
)

__all__ = ["SECTIONS", "Section"]
