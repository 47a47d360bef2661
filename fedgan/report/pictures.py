"""The run's PNGs as data URIs, cut into one strip for each row of a grid, within a limit of bytes.

A grid has a row for each class and square cells of the run's resolution, with or without a margin
between them. The names of its rows may stand in the PNG itself, in a text chunk `rows` (a JSON list).
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from fedgan.report.run_data import clean

MOST_CELLS = 8  # cells of a row that are shown
MOST_ROWS = 16  # rows of a grid that are shown
MOST_BYTES = 45_000  # of one image of the page
SIDE = 96  # pixels; a larger cell is shown reduced to this


@dataclass(frozen=True)
class Grid:
    """One sample grid: `rows` names of its rows (empty where they are not known), cells `side` pixels wide."""

    image: Image.Image
    rows: tuple[str, ...]
    count: int
    columns: int
    side: int
    margin: int
    gap: int

    def block(self, rows: Sequence[int], columns: int = MOST_CELLS) -> Block:
        """The first cells of some rows, without the margins between them."""
        columns = min(columns, self.columns)
        side, step = min(self.side, SIDE), self.side + self.gap
        joined = Image.new(self.image.mode, (columns * side, len(rows) * side))
        for i, row in enumerate(rows):
            for column in range(columns):
                x, y = self.margin + column * step, self.margin + row * step
                cell = self.image.crop((x, y, x + self.side, y + self.side))
                cell = cell if side == self.side else cell.resize((side, side), Image.Resampling.LANCZOS)
                joined.paste(cell, (column * side, i * side))
        return Block(data_uri(joined), joined.width, joined.height, columns)


@dataclass(frozen=True)
class Block:
    """Some cells as one image: its data URI, its width and height in pixels, and how many cells stand side by side."""

    uri: str
    width: int
    height: int
    columns: int


def open_grid(path: Path, names: list[str], resolution: int) -> Grid | None:
    """Read a grid whose rows are `names`. None where the file is no picture or its size fits no grid of such cells."""
    try:
        with Image.open(path) as opened:
            rows = _row_names(opened.info.get("rows"))
            image = opened.convert("L" if opened.mode in ("L", "1", "I;16") else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    rows = rows or tuple(names)
    fits = [
        Grid(image, (), count, columns, resolution, margin, gap)
        for margin, gap in ((0, 0), (2, 2), (1, 1), (0, 1), (0, 2), (4, 4), (0, 4))
        for count, below in [divmod(image.height - 2 * margin + gap, resolution + gap)]
        for columns, beside in [divmod(image.width - 2 * margin + gap, resolution + gap)]
        if not below and not beside and count >= 1 and columns >= 1
    ]
    named = [replace(grid, rows=rows) for grid in fits if grid.count == len(rows)]
    return next(iter(named or fits), None)


def data_uri(image: Image.Image) -> str:
    """`image` as a data URI of at most about `MOST_BYTES`: PNG, or JPEG, as good as the limit allows, where that is larger."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    kind = "png"
    for quality in (90, 80, 65, 45):
        if stream.tell() <= MOST_BYTES:
            break
        kind, stream = "jpeg", io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _row_names(value: object) -> tuple[str, ...]:
    try:
        names = json.loads(value) if isinstance(value, str) else []
    except ValueError:
        return ()
    return tuple(str(clean(name)) for name in names) if isinstance(names, list) else ()
