"""Write `report.html` of a comparison: one self-contained file from `comparison.json` and grids."""

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
    not_measured,
    paired,
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
    paired.SECTION,
    cross_site.SECTION,
    hospitals.SECTION,
    classes.SECTION,
    cost.SECTION,
    contribution.SECTION,
    not_measured.SECTION,
    provenance.SECTION,
)


def write_comparison_report(folder: Path) -> Path:
    """Write `report.html` into a comparison folder, atomically, and return its path.

    Null, missing or damaged content becomes a sentence. Raises `ConfigError` if the folder has no
    `comparison.json`, `StorageError` if the report cannot be written.
    """
    paths = ComparisonFolder.at(folder)
    files.write_text(paths.report, build_report(load(paths.path)))
    return paths.report


def build_report(comparison: Comparison) -> str:
    """Build the comparison report as HTML."""
    return render_report(
        "comparison",
        comparison.name,
        SECTIONS,
        comparison,
        "comparison.json and the sample grids of its arms",
    )
