"""The comparison's page: `report.html`, one self-contained file made from `comparison.json` and the sample grids.

No script, no network, no outside font or picture; the page's own content security policy forbids them.
"""

from __future__ import annotations

from pathlib import Path

from fedgan import files
from fedgan.comparison_folder import ComparisonFolder
from fedgan.report.comparison import (
    classes,
    contribution,
    cost,
    cross_site,
    curves,
    fidelity,
    hospitals,
    missing,
    pairs,
    provenance,
    samples,
    summary,
    utility,
)
from fedgan.report.comparison.data import Comparison, load
from fedgan.report.html.section import Section, render_report

SECTIONS: tuple[Section[Comparison], ...] = (
    summary.SECTION,
    samples.SECTION,
    curves.SECTION,
    fidelity.SECTION,
    utility.SECTION,
    pairs.SECTION,
    cross_site.SECTION,
    hospitals.SECTION,
    classes.SECTION,
    cost.SECTION,
    contribution.SECTION,
    missing.SECTION,
    provenance.SECTION,
)


def write_comparison(folder: Path) -> Path:
    """Write `report.html` into a comparison folder, atomically, and return its path.

    Reads `comparison.json` and the PNGs of `arms/*/samples`. What is null, missing or damaged becomes a sentence.
    Raises `ConfigError` where the folder has no `comparison.json`, `StorageError` where the page cannot be written.
    """
    place = ComparisonFolder.at(folder)
    files.write_text(place.report, build_report(load(place.path)))
    return place.report


def build_report(comparison: Comparison) -> str:
    """Build the comparison report as HTML."""
    return render_report(
        "comparison",
        comparison.name,
        SECTIONS,
        comparison,
        "comparison.json and the sample grids of its arms",
    )
