"""The page: `report.html`, one self-contained file made from the files of a run folder.

No script, no network, no outside font or picture. The page's own content security policy forbids
them, so that a reader can see that it keeps the promise.
"""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from fedgan import files
from fedgan.report.html.templating import render, source
from fedgan.report.run import SECTIONS
from fedgan.report.run.data import RunData, load
from fedgan.run_folder import RunFolder


def write_report(run: RunFolder) -> Path:
    """Write `report.html` into the run folder, atomically, and return its path.

    Reads only the run folder. Anything but `config.toml` may be missing or damaged: the page then
    says so. Raises `ConfigError` where this is no run folder, `StorageError` where it cannot be written.
    """
    files.write_text(run.report, build_page(load(run)))
    return run.report


def build_page(run: RunData) -> str:
    """The page as HTML."""
    parts = [
        (section, content) for section in SECTIONS if (content := section.render(run)) is not None
    ]
    # The style sheet is the package's own and holds no "</": it may stand in the page as it is.
    return render(
        "page.html.j2", name=run.settings.name, sections=parts, style=Markup(source("style.css"))
    )
