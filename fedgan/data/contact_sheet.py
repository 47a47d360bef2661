"""Contact sheet: real images side by side, one row per class, columns grouped by hospital."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fedgan import files
from fedgan.data.shard import Shard

GAP, GROUP_GAP, MARGIN = 2, 14, 12
PAPER, INK, FAINT = (255, 255, 255), (30, 30, 30), (225, 225, 225)
TEXT_SIZE = 13


def write_contact_sheet(
    path: str | Path, shards: Sequence[Shard], per_cell: int = 0, seed: int = 0
) -> Path:
    """Write `contact_sheet` as PNG to `path`, atomically. Raises `StorageError`."""
    path, sheet = Path(path).expanduser(), contact_sheet(shards, per_cell, seed)
    with files.atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def contact_sheet(shards: Sequence[Shard], per_cell: int = 0, seed: int = 0) -> Image.Image:
    """Contact sheet with `per_cell` random images per class and hospital (0: a suitable number).

    An image with several labels may be in several rows; images without a label have their own row.
    """
    labels = list(dict.fromkeys(label for shard in shards for label in shard.card.label_names))
    rows = [*labels, *(["(no label)"] if any(_unlabelled(shard).any() for shard in shards) else [])]
    per_cell = per_cell or int(np.clip(18 // len(shards), 1, 6))
    tile = int(np.clip(shards[0].card.resolution, 64, 96))
    font = ImageFont.load_default(TEXT_SIZE)
    left = MARGIN + 10 + max(int(font.getlength(label)) for label in [*rows, "hospital"])
    group = per_cell * (tile + GAP) - GAP
    # The name and size of a hospital must fit above its columns.
    group = max(group, *(int(font.getlength(line)) for shard in shards for line in _heading(shard)))
    top = MARGIN + 2 * (TEXT_SIZE + 4) + 4
    width = left + len(shards) * (group + GROUP_GAP) - GROUP_GAP + MARGIN
    sheet = Image.new("RGB", (width, top + len(rows) * (tile + 8) - 8 + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for line, label in enumerate(rows):
        draw.text((MARGIN, top + line * (tile + 8) + tile // 2), label, INK, font, anchor="lm")
    for column, shard in enumerate(shards):
        x = left + column * (group + GROUP_GAP)
        for line, text in enumerate(_heading(shard)):
            draw.text((x, MARGIN + line * (TEXT_SIZE + 4)), text, INK, font)
        for line, label in enumerate(rows):
            _draw_cell(
                sheet, shard, label, (x, top + line * (tile + 8)), tile, group, per_cell, seed
            )
    return sheet


def _draw_cell(
    sheet: Image.Image,
    shard: Shard,
    label: str,
    corner: tuple[int, int],
    tile: int,
    group: int,
    per_cell: int,
    seed: int,
) -> None:
    x, y = corner
    names = shard.card.label_names
    held = np.flatnonzero(
        shard.labels[:, names.index(label)] if label in names else _unlabelled(shard)
    )
    if not len(held):
        ImageDraw.Draw(sheet).rectangle((x, y + tile // 2, x + group - 1, y + tile // 2 + 1), FAINT)
        return
    chosen = np.sort(np.random.default_rng([seed, len(held)]).permutation(held)[:per_cell])
    for number, image in enumerate(shard.images[chosen]):
        sheet.paste(_tile(image, tile), (x + number * (tile + GAP), y))


def _tile(image: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(
        image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    ).convert("RGB")
    if picture.width == side:
        return picture
    # Small images are enlarged without smoothing, to show the pixels of the network input.
    return picture.resize(
        (side, side), Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
    )


def _heading(shard: Shard) -> tuple[str, str]:
    return shard.name, f"{len(shard):,} images, {sum(shard.card.patients.values()):,} patients"


def _unlabelled(shard: Shard) -> np.ndarray:
    return np.asarray(~shard.labels.any(axis=1))
