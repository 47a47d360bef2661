"""The arms' images side by side: a row a class, a block an arm, the same latents in the same places."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from fedgan.report import format as text
from fedgan.report.comparison.data import ArmRun, Comparison
from fedgan.report.comparison.section import Section
from fedgan.report.format import number
from fedgan.report.pictures import MOST_ROWS, Block, Grid, open_grid
from fedgan.report.run_data import dig
from fedgan.report.templating import absent, render

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
        return absent("No picture can be shown: comparison.json does not give the resolution of the images.")
    grids, notes = _grids(comparison, comparison.folder, int(side))
    if not grids:
        return Markup("").join(absent(note) for note in [*notes, "There is no picture to show."])
    rows, left_out = _rows(grids)
    if left_out:
        notes.append(f"Not shown, to keep the page small: {text.plural(left_out, 'more class', 'more classes')}.")
    psi = next((n for run in comparison.arm_runs if (n := number(dig(run.evaluation, "psi"))) is not None), None)
    return render(
        "comparison_samples.html.j2",
        rows=rows,
        notes=notes,
        holds_real=grids[0][0] == "Real",
        by_hospital=any(run.members for run in comparison.arm_runs),
        side=int(side),
        psi=None if psi is None else f"{psi:g}",
    )


def _grids(comparison: Comparison, folder: Path, side: int) -> tuple[list[tuple[str, Grid]], list[str]]:
    """(title, grid) of the real images and of each arm's first seed that has pictures; sentences for those that have none."""
    grids: list[tuple[str, Grid]] = []
    notes: list[str] = []
    names = comparison.data_labels
    homes = [home for run in comparison.arm_runs if (home := _home(run, folder)) is not None]
    real = _first(names, side, [folder / "samples" / "real.png", *(home / "samples" / "real.png" for home in homes)])
    if real is not None:
        grids.append(("Real", real))
    else:
        notes.append(
            "There is no readable grid of real images, so none stand beside the synthetic ones "
            "(evaluation.show_real says whether real images may be shown; by default drawn ones only)."
        )
    for entry in comparison.arms:
        found = next((shown for run in entry.runs if (shown := _of_run(run, folder, names, side))), [])
        if not found:
            notes.append(f"{entry.name}: no readable sample grid{', because it ' + entry.trouble if entry.trouble else ''}.")
        grids += found
    if len(grids) > MOST_ARMS + 1:
        notes.append(f"Not shown, for want of room: {', '.join(title for title, _ in grids[MOST_ARMS + 1 :])}.")
    return grids[: MOST_ARMS + 1], notes


def _of_run(run: ArmRun, folder: Path, names: list[str], side: int) -> list[tuple[str, Grid]]:
    """The final grid of one training; of an arm with a generator for each hospital, those of its members."""
    home = _home(run, folder)
    if home is None:
        return []
    grid = _first(names, side, [home / "samples" / "final.png"])
    if grid is not None:
        return [(run.label, grid)]
    places = [str(member["hospital"]) for member in run.members if member.get("hospital") is not None]
    found = []
    for place in places:
        inner = _inside(home, home / "members" / place)
        grid = _first(names, side, [inner / "samples" / "final.png"]) if inner is not None else None
        if grid is not None:
            found.append((f"{place}: {run.label}", grid))
    return found


def _home(run: ArmRun, folder: Path) -> Path | None:
    """The run folder of a training, never outside the comparison's folder."""
    name = run.content.get("folder")
    if not isinstance(name, str) or not name:
        return None
    inside = [place for base in (folder, folder / "arms") if (place := _inside(folder, base / name)) is not None]
    return next((place for place in inside if _is_folder(place)), None)


def _inside(folder: Path, path: Path) -> Path | None:
    try:
        resolved = path.resolve()
    except (OSError, ValueError):
        return None
    return resolved if resolved.is_relative_to(folder.resolve()) else None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _first(names: list[str], side: int, paths: list[Path]) -> Grid | None:
    """The first of some grids that can be read."""
    return next((grid for path in paths if (grid := open_grid(path, names, side)) is not None), None)


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


SECTION = Section("samples", "Samples: the same latents in every arm", "Samples", _render)
