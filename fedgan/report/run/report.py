"""The run report: `report.html`, one self-contained file made from the files of a run folder.

It has no scripts, no network access and no external fonts or images. Its content security policy
enforces this.
"""

from __future__ import annotations

from pathlib import Path

from fedgan import files
from fedgan.report.html.section import Section, render_report
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
from fedgan.report.run.data import RunData, load
from fedgan.run_folder import RunFolder

SECTIONS: tuple[Section[RunData], ...] = (
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


def write_report(run: RunFolder) -> Path:
    """Write `report.html` into the run folder, atomically, and return its path.

    Files other than `config.toml` may be missing or damaged; the report then says so. Raises
    `ConfigError` if `config.toml` cannot be read, `StorageError` if the report cannot be written.
    """
    files.write_text(run.report, build_report(load(run)))
    return run.report


def build_report(run: RunData) -> str:
    """Build the run report as HTML."""
    return render_report("report", run.settings.name, SECTIONS, run, "the files of this run folder")
