"""A contact sheet: real images side by side, classes as rows, hospitals as groups of columns."""

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
    """Draw `contact_sheet` and write it as PNG to `path`, atomically. Raises `StorageError`."""
    path, sheet = Path(path).expanduser(), contact_sheet(shards, per_cell, seed)
    with files.atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def contact_sheet(shards: Sequence[Shard], per_cell: int = 0, seed: int = 0) -> Image.Image:
    """One picture of all shards: `per_cell` images (0: as many as look well) for each class and hospital, drawn at random.

    With several labels an image may stand in several rows; images without any label have a row of their own.
    """
    labels = list(dict.fromkeys(label for shard in shards for label in shard.card.label_names))
    rows = [*labels, *(["(no label)"] if any(_unlabelled(shard).any() for shard in shards) else [])]
    per_cell = per_cell or int(np.clip(18 // len(shards), 1, 6))
    tile = int(np.clip(shards[0].card.resolution, 64, 96))
    font = ImageFont.load_default(TEXT_SIZE)
    left = MARGIN + 10 + max(int(font.getlength(label)) for label in [*rows, "hospital"])
    group = per_cell * (tile + GAP) - GAP
    # a hospital's name and size must fit over its columns
    group = max(group, *(int(font.getlength(line)) for shard in shards for line in _heading(shard)))
    top = MARGIN + 2 * (TEXT_SIZE + 4) + 4
    width = left + len(shards) * (group + GROUP_GAP) - GROUP_GAP + MARGIN
    sheet = Image.new("RGB", (width, top + len(rows) * (tile + 8) - 8 + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for line, label in enumerate(rows):
        draw.text((MARGIN, top + line * (tile + 8) + tile // 2), label, INK, font, anchor="lm")
    for place, shard in enumerate(shards):
        x = left + place * (group + GROUP_GAP)
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
    # small images are enlarged without smoothing: a person must see the pixels that the network sees
    return picture.resize(
        (side, side), Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
    )


def _heading(shard: Shard) -> tuple[str, str]:
    return shard.name, f"{len(shard):,} images, {sum(shard.card.patients.values()):,} patients"


def _unlabelled(shard: Shard) -> np.ndarray:
    return np.asarray(~shard.labels.any(axis=1))
