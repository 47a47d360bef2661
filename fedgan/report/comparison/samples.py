"""Sample images: one row per class, one block per arm, the same latents in the same positions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from fedgan.comparison_folder import ComparisonFolder
from fedgan.errors import FedganError
from fedgan.report.comparison.data import ArmRun, Comparison, first_number
from fedgan.report.html import format as text
from fedgan.report.html.format import number
from fedgan.report.html.pictures import MOST_ROWS, Block, Grid, common_rows, open_grid
from fedgan.report.html.section import Section
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import trees

MAX_ARMS = 7  # generators whose images are shown
MAX_CHARACTERS = 2_600_000  # of all pictures of the report together, as data URIs
CELLS = 5  # images of one generator and one class
REAL, PHANTOMS = "Real", "Phantoms"
FIRST = {REAL: "real images", PHANTOMS: "phantoms of the training data"}


@dataclass(frozen=True)
class Picture:
    """A block of images of one class: its title, and the images unless the grid has no such row."""

    title: str
    block: Block | None


def _render(comparison: Comparison) -> Markup:
    side = number(comparison.content.get("resolution"))
    if comparison.folder is None or side is None or not 1 <= side <= 4096:
        return absent(
            "No picture can be shown: comparison.json does not give the resolution of the images."
        )
    grids, notes = _grids(comparison, comparison.folder, int(side))
    if not grids:
        return Markup("").join(absent(note) for note in [*notes, "There is no picture to show."])
    rows, left_out = _rows(grids)
    if left_out:
        more = text.plural(left_out, "more class", "more classes")
        notes.append(f"Not shown, to keep the report small: {more}.")
    psi = first_number(run.evaluation.get("psi") for run in comparison.arm_runs)
    return render(
        "comparison_samples.html.j2",
        rows=rows,
        notes=notes,
        first=FIRST.get(grids[0][0], ""),
        has_real=grids[0][0] == REAL,
        by_hospital=any(trees(run.content.get("hospital_models")) for run in comparison.arm_runs),
        side=int(side),
        psi=None if psi is None else f"{psi:g}",
    )


def _grids(
    comparison: Comparison, folder: Path, side: int
) -> tuple[list[tuple[str, Grid]], list[str]]:
    """(title, grid) of real images and of one seed per arm; notes on the others."""
    grids: list[tuple[str, Grid]] = []
    notes: list[str] = []
    names = comparison.data_labels
    real, note = _real(comparison, folder, names, side)
    if real is not None:
        grids.append((PHANTOMS if comparison.has_only_phantoms else REAL, real))
    else:
        notes.append(note)
    for entry in comparison.arms:
        paths = [(run, path) for run in entry.runs if (path := _final(run, folder)) is not None]
        found = (
            (run.label, grid)
            for run, path in paths
            if (grid := open_grid(path, names, side)) is not None
        )
        shown = next(found, None)
        if shown is not None:
            grids.append(shown)
        elif paths:
            notes.append(f"{entry.name}: {_damaged('its sample grid', side)}")
        else:
            reason = f", because it {entry.failure_reason}" if entry.failure_reason else ""
            notes.append(f"{entry.name}: there is no sample grid{reason}.")
    if len(grids) > MAX_ARMS + 1:
        titles = ", ".join(title for title, _ in grids[MAX_ARMS + 1 :])
        notes.append(f"Not shown, because space is limited: {titles}.")
    return grids[: MAX_ARMS + 1], notes


def _real(
    comparison: Comparison, folder: Path, names: list[str], side: int
) -> tuple[Grid | None, str]:
    """The grid of training images, or None and the reason why it is not shown."""
    noun = FIRST[PHANTOMS if comparison.has_only_phantoms else REAL]
    try:
        is_allowed = ComparisonFolder.at(folder).settings().shows_real
    except FedganError:
        return None, (
            f"No {noun} are shown: config.toml, which allows them (evaluation.show_real), "
            "cannot be read."
        )
    if not is_allowed:
        return None, f"No {noun} are shown: evaluation.show_real does not allow it."
    path = folder / "samples" / "real.png"
    if not _is_file(path):
        return None, f"There is no grid of {noun}."
    grid = open_grid(path, names, side)
    return grid, "" if grid is not None else f"The grid of {noun}: {_damaged('it', side)}"


def _damaged(noun: str, side: int) -> str:
    return f"{noun} is damaged or has no cells of {side} × {side} pixels, so it is not shown."


def _final(run: ArmRun, folder: Path) -> Path | None:
    """The final grid of one training, or None if the comparison folder does not contain it."""
    name = run.content.get("folder")
    if not isinstance(name, str) or not name:
        return None
    try:
        inside = (folder / name).resolve()
    except (OSError, ValueError):
        return None
    path = inside / "samples" / "final.png"
    is_shown = inside.is_relative_to(folder.resolve()) and _is_file(path)
    return path if is_shown else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _rows(grids: list[tuple[str, Grid]]) -> tuple[list[tuple[str, list[Picture]]], int]:
    """(class, one picture per generator) of each row, and the number of classes left out."""
    names = common_rows([grid for _, grid in grids])
    columns = min([CELLS, *(grid.columns for _, grid in grids)])
    rows: list[tuple[str, list[Picture]]] = []
    characters = 0
    for i, name in enumerate(names[:MOST_ROWS]):
        pictures = [Picture(title, grid.row_block(i, name, columns)) for title, grid in grids]
        characters += sum(len(picture.block.uri) for picture in pictures if picture.block)
        if characters > MAX_CHARACTERS:
            break
        rows.append((name, pictures))
    return rows, len(names) - len(rows)


SECTION = Section("samples", "Samples", _render)
