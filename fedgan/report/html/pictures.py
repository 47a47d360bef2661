"""Sample grids as data URIs: one strip of images per row, within a limit of bytes.

A grid (`fedgan/evaluation/grids.py`) has one row per class. Its cells are images, enlarged by
an integer, with a margin between them and, if rows have names, a text column on the left. The
report has its own text, so the grid is cut into cells, each at its original resolution.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

MOST_CELLS = 8  # cells of a row that are shown
MOST_ROWS = 16  # rows of a grid that are shown
MOST_BYTES = 45_000  # of one image in the report
SIDE = 96  # pixels; larger cells are reduced
NO_FINDING = "no finding"  # extra first row of a multi-label grid
# The layout of fedgan/evaluation/grids.py, repeated because importing it would load torch.
TEXT_WIDTHS = (116, 0)  # pixels at the left that are text
GAP = 2  # pixels between cells


@dataclass(frozen=True)
class Grid:
    """A sample grid: row names (may be empty) and cell layout in pixels.

    A cell is `side` pixels wide, enlarged `scale` times.
    """

    image: Image.Image
    rows: tuple[str, ...]
    count: int
    columns: int
    side: int
    scale: int
    left: int

    def cell(self, row: int, column: int) -> Image.Image:
        """One cell, at its original resolution or reduced to `SIDE`."""
        wide = self.side * self.scale
        x, y = self.left + column * (wide + GAP), row * (wide + GAP)
        cell = self.image.crop((x, y, x + wide, y + wide))
        cell = (
            cell.resize((self.side, self.side), Image.Resampling.NEAREST)
            if self.scale > 1
            else cell
        )
        return cell.resize((SIDE, SIDE), Image.Resampling.LANCZOS) if self.side > SIDE else cell

    def block(self, rows: Sequence[int], columns: int = MOST_CELLS) -> Block:
        """The first cells of the given rows, without margins."""
        columns, side = min(columns, self.columns), min(self.side, SIDE)
        joined = Image.new(self.image.mode, (columns * side, len(rows) * side))
        for i, row in enumerate(rows):
            for column in range(columns):
                joined.paste(self.cell(row, column), (column * side, i * side))
        return Block(data_uri(joined), joined.width, joined.height, columns)

    def row_block(self, i: int, name: str, columns: int) -> Block | None:
        """The block of the row `name`, or of row `i` without a name; None if there is none."""
        row = i if not name else self.rows.index(name) if name in self.rows else self.count
        return self.block([row], columns) if row < self.count else None


@dataclass(frozen=True)
class Block:
    """Cells as one image: data URI, width and height in pixels, cells per row."""

    uri: str
    width: int
    height: int
    columns: int


def open_grid(path: Path, names: Sequence[str], side: int) -> Grid | None:
    """Read a grid of cells of `side` pixels whose rows are the labels `names`.

    None if the file is no image or its size does not match such a grid.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    scale = min(4, max(1, 128 // side))
    step = side * scale + GAP
    count, below = divmod(image.height + GAP, step)
    for left in TEXT_WIDTHS:
        columns, beside = divmod(image.width - left + GAP, step)
        if not below and not beside and count >= 1 and columns >= 1:
            return Grid(image, _row_names(names, count), count, columns, side, scale, left)
    return None


def common_rows(grids: Sequence[Grid]) -> list[str]:
    """Row names of all grids; empty names for rows by position if a grid has no names."""
    if grids and all(grid.rows for grid in grids):
        return list(dict.fromkeys(name for grid in grids for name in grid.rows))
    return [""] * max((grid.count for grid in grids), default=0)


def _row_names(names: Sequence[str], count: int) -> tuple[str, ...]:
    """The labels, after "no finding" if there is one more row; empty if the count differs."""
    return next(
        (rows for rows in (tuple(names), (NO_FINDING, *names)) if names and len(rows) == count), ()
    )


def data_uri(image: Image.Image) -> str:
    """`image` as a data URI of about `MOST_BYTES` at most: PNG, or JPEG of decreasing quality."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    kind = "png"
    for quality in (90, 80, 65, 45):
        if stream.tell() <= MOST_BYTES:
            break
        kind, stream = "jpeg", io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
