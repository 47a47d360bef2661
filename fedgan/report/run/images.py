"""Real and synthetic images side by side, per class, and samples during training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from fedgan.report.html.format import number, plural
from fedgan.report.html.pictures import (
    MOST_CELLS,
    MOST_ROWS,
    Block,
    Grid,
    common_rows,
    open_grid,
)
from fedgan.report.html.section import Section
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import RunData

MOST_ROUNDS = 6


@dataclass(frozen=True)
class Pair:
    """One class: its name and its images, if any."""

    name: str
    real: Block | None
    synthetic: Block | None


def _render(run: RunData) -> Markup:
    if not run.pictures:
        return absent(
            "No images yet: the evaluator draws the first grid after evaluation.every rounds."
        )
    if run.settings.shows_real:
        real, real_note = _grid(run, run.pictures.get("real"), "of real images")
    else:
        real, real_note = None, NOT_SHOWN
    newest = run.round_pictures[-1:] if "final" not in run.pictures else []
    file = run.pictures.get("final") or (newest[0][1] if newest else None)
    synthetic, synthetic_note = _grid(run, file, "of synthetic images")
    notes = [note for note in (real_note, synthetic_note) if note]
    phantoms = run.has_only_phantoms
    if newest:
        notes.append(
            f"The synthetic images are of round {newest[0][0]}: the run has no final grid yet."
        )
    return render(
        "images.html.j2",
        pairs=pairs(real, synthetic),
        progress=_progress(run),
        notes=notes,
        holds_real=real is not None and not phantoms,
        real_heading="Phantoms" if phantoms else "Real",
        cells=MOST_CELLS,
        psi=run.settings.evaluation.psi,
        resolution=run.settings.data.resolution,
    )


def pairs(real: Grid | None, synthetic: Grid | None) -> list[Pair]:
    """The rows of both grids side by side, matched by name if both have names, else by position."""
    grids = [grid for grid in (real, synthetic) if grid is not None]
    columns = min([MOST_CELLS, *(grid.columns for grid in grids)])

    def block(grid: Grid | None, i: int, name: str) -> Block | None:
        return None if grid is None else grid.row_block(i, name, columns)

    return [
        Pair(name, block(real, i, name), block(synthetic, i, name))
        for i, name in enumerate(common_rows(grids)[:MOST_ROWS])
    ]


def _grid(run: RunData, path: Path | None, what: str) -> tuple[Grid | None, str]:
    """A grid, or None and the reason."""
    if path is None:
        return None, f"There is no grid {what} yet."
    grid = open_grid(path, run.data_labels, run.settings.data.resolution)
    if grid is None:
        side = run.settings.data.resolution
        reason = f"damaged or no grid of cells of {side} × {side} pixels"
        return None, f"{path.name} is not shown: it is {reason}."
    return (
        grid,
        f"The grid {what} has {plural(grid.count, 'row')}; {MOST_ROWS} are shown."
        if grid.count > MOST_ROWS
        else "",
    )


def _progress(run: RunData) -> list[tuple[int, str, Block]]:
    """Up to six grids over the run, including the newest: (round, images seen, image)."""
    rounds = run.round_pictures
    if len(rounds) > MOST_ROUNDS:
        rounds = [
            rounds[round(i * (len(rounds) - 1) / (MOST_ROUNDS - 1))] for i in range(MOST_ROUNDS)
        ]
    seen = {number(line.get("round")): number(line.get("images_seen")) for line in run.rounds}
    strip = []
    for number_of_round, path in rounds:
        grid = open_grid(path, run.data_labels, run.settings.data.resolution)
        if grid is not None:
            images = seen.get(float(number_of_round))
            caption = f"{images:,.0f} images seen" if images is not None else ""
            strip.append((number_of_round, caption, grid.block(range(min(grid.count, 8)), 3)))
    return strip


NOT_SHOWN = "Real images are not shown: evaluation.show_real does not allow it."
SECTION = Section("images", "Images", _render)
