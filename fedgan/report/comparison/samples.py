"""The arms' images side by side: a row a class, a block an arm, the same latents in the same places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from fedgan.comparison_folder import ComparisonFolder
from fedgan.errors import FedganError
from fedgan.report.comparison.data import ArmRun, Comparison
from fedgan.report.html import format as text
from fedgan.report.html.format import number
from fedgan.report.html.pictures import MOST_ROWS, Block, Grid, open_grid
from fedgan.report.html.section import Section
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import dig

MOST_ARMS = 7  # generators whose images are shown
MOST_CHARACTERS = 2_600_000  # of all pictures of the page together, as data URIs
CELLS = 5  # images of one generator and one class


@dataclass(frozen=True)
class Picture:
    """One block of images under its class: whose it is, and the images, or None where the grid has no such row."""

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
        notes.append(
            f"Not shown, to keep the page small: {text.plural(left_out, 'more class', 'more classes')}."
        )
    psi = next(
        (n for run in comparison.arm_runs if (n := number(dig(run.evaluation, "psi"))) is not None),
        None,
    )
    return render(
        "comparison_samples.html.j2",
        rows=rows,
        notes=notes,
        first={"Real": "real images", "Drawn": "drawn training images"}.get(grids[0][0], ""),
        holds_real=grids[0][0] == "Real",
        by_hospital=any(run.members for run in comparison.arm_runs),
        side=int(side),
        psi=None if psi is None else f"{psi:g}",
    )


def _grids(
    comparison: Comparison, folder: Path, side: int
) -> tuple[list[tuple[str, Grid]], list[str]]:
    """(title, grid) of the real images and of each arm's first seed that has pictures; sentences for those that have none."""
    grids: list[tuple[str, Grid]] = []
    notes: list[str] = []
    names = comparison.data_labels
    real, note = _real(comparison, folder, names, side)
    if real is not None:
        grids.append(("Drawn" if comparison.drawn else "Real", real))
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
        else:
            why = f", because it {entry.failure_reason}" if entry.failure_reason else ""
            notes.append(
                f"{entry.name}: {_damaged('its sample grid', side) if paths else f'there is no sample grid{why}.'}"
            )
    if len(grids) > MOST_ARMS + 1:
        notes.append(
            f"Not shown, for want of room: {', '.join(title for title, _ in grids[MOST_ARMS + 1 :])}."
        )
    return grids[: MOST_ARMS + 1], notes


def _real(
    comparison: Comparison, folder: Path, names: list[str], side: int
) -> tuple[Grid | None, str]:
    """The grid of training images, or None and the sentence that says why it is not shown."""
    what = "drawn training images" if comparison.drawn else "real images"
    try:
        allowed = ComparisonFolder.at(folder).settings().shows_real
    except FedganError:
        return (
            None,
            f"No {what} are shown: config.toml, which says whether they may be (evaluation.show_real), cannot be read.",
        )
    if not allowed:
        return None, f"No {what} are shown: evaluation.show_real does not allow it."
    path = folder / "samples" / "real.png"
    if not _is(path, Path.is_file):
        return None, f"There is no grid of {what}."
    grid = open_grid(path, names, side)
    return grid, "" if grid is not None else f"The grid of {what}: {_damaged('it', side)}"


def _damaged(what: str, side: int) -> str:
    return f"{what} is damaged or has no cells of {side} × {side} pixels, so it is not shown."


def _final(run: ArmRun, folder: Path) -> Path | None:
    """The final grid of one training, or None where there is none inside the comparison's folder."""
    name = run.content.get("folder")
    if not isinstance(name, str) or not name:
        return None
    home = _inside(folder, folder / name)
    path = None if home is None else home / "samples" / "final.png"
    return path if path is not None and _is(path, Path.is_file) else None


def _inside(folder: Path, path: Path) -> Path | None:
    try:
        resolved = path.resolve()
    except (OSError, ValueError):
        return None
    return resolved if resolved.is_relative_to(folder.resolve()) else None


def _is(path: Path, what: Callable[[Path], bool]) -> bool:
    try:
        return what(path)
    except (OSError, ValueError):
        return False


def _rows(grids: list[tuple[str, Grid]]) -> tuple[list[tuple[str, list[Picture]]], int]:
    """(class, a picture a generator) of each row, and how many classes had no room."""
    if all(grid.rows for _, grid in grids):
        names = list(dict.fromkeys(name for _, grid in grids for name in grid.rows))
    else:
        names = [""] * max(grid.count for _, grid in grids)
    columns = min([CELLS, *(grid.columns for _, grid in grids)])
    rows: list[tuple[str, list[Picture]]] = []
    spent = 0
    for i, name in enumerate(names[:MOST_ROWS]):
        pictures = [Picture(title, _block(grid, name, i, columns)) for title, grid in grids]
        spent += sum(len(picture.block.uri) for picture in pictures if picture.block)
        if spent > MOST_CHARACTERS:
            break
        rows.append((name, pictures))
    return rows, len(names) - len(rows)


def _block(grid: Grid, name: str, i: int, columns: int) -> Block | None:
    row = i if not name else grid.rows.index(name) if name in grid.rows else grid.count
    return grid.block([row], columns) if row < grid.count else None


SECTION = Section("samples", "Samples", _render)
