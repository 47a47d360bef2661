"""Sample grids: one row per class, the label on the left, small images enlarged."""

from __future__ import annotations

import io
import textwrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fedgan.data.dataset import ImageDataset
from fedgan.evaluation.metrics.utility import NO_FINDING, names_normal
from fedgan.evaluation.sampling import draw_latents, generate_images

GAP = 2  # pixels between cells
LABEL_WIDTH = 116
BACKGROUND, EMPTY, INK = (255, 255, 255), (235, 235, 235), (30, 30, 30)


def grid_rows(label_names: tuple[str, ...], exclusive: bool) -> list[tuple[str, np.ndarray]]:
    """Rows of a grid as (text, label vector (K,) uint8).

    Exclusive: one per class. Multi-label: 'no finding' (all zero, unless a label means it) and one
    per single finding. Without labels: four unnamed rows.
    """
    count = len(label_names)
    if count == 0:
        return [("", np.zeros(0, np.uint8))] * 4
    rows = [
        (name, vector)
        for name, vector in zip(label_names, np.eye(count, dtype=np.uint8), strict=True)
    ]
    if not exclusive and not names_normal(label_names):
        rows.insert(0, (NO_FINDING, np.zeros(count, np.uint8)))
    return rows


def sample_grid(
    generator: Any,
    label_names: tuple[str, ...],
    exclusive: bool,
    columns: int = 8,
    seed: int = 0,
    psi: float = 1.0,
    device: str = "cpu",
) -> Image.Image:
    """Generated images, one row per class. A column is one latent, equal in all rows and rounds.

    Without labels each cell has its own latent. Raises `FedganError` for an image that is not
    finite.
    """
    rows = grid_rows(label_names, exclusive)
    latents = draw_latents(columns if label_names else columns * len(rows), generator.z_dim, seed)
    labels = np.repeat(np.stack([vector for _, vector in rows]), columns, axis=0)
    latents = latents.repeat(len(rows), 1) if label_names else latents
    images = generate_images(generator, labels, seed, psi, device=device, latents=latents)
    return draw_grid(
        [text for text, _ in rows], list(images.reshape(len(rows), columns, *images.shape[1:]))
    )


def real_grid(dataset: ImageDataset, columns: int = 8, seed: int = 0) -> Image.Image:
    """Real images in the same layout; a cell is empty where no further image of the row exists.

    The row of a single finding shows images with this finding alone first, then others that have
    it.
    """
    rng = np.random.default_rng(seed)
    rows = grid_rows(dataset.label_names, dataset.exclusive)
    cells = []
    taken = np.zeros(len(dataset), bool)
    for _, vector in rows:
        exact = (dataset.labels == vector).all(1)
        having = (dataset.labels[:, vector == 1] == 1).all(1) if vector.any() else exact
        order = np.concatenate(
            [
                rng.permutation(np.flatnonzero(mask))
                for mask in (exact & ~taken, having & ~exact & ~taken)
            ]
        )
        chosen = order[:columns]
        if len(dataset.label_names) == 0:
            taken[chosen] = True
        cells.append(np.asarray(dataset.images[chosen]))
    return draw_grid(
        [text for text, _ in rows], cells, columns, (dataset.channels, dataset.resolution)
    )


def draw_grid(
    texts: list[str],
    rows: list[np.ndarray],
    columns: int | None = None,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """Draw rows of images (n, C, H, W) uint8, C = 1 or 3, with a text on the left of each row.

    Images below 128 pixels are enlarged two to four times without smoothing.
    """
    channels, side = size or (rows[0].shape[1], rows[0].shape[2])
    columns = columns or max(len(row) for row in rows)
    scale = min(4, max(1, 128 // side))
    cell = side * scale
    left = LABEL_WIDTH if any(texts) else 0
    canvas = Image.new(
        "RGB", (left + columns * (cell + GAP) - GAP, len(rows) * (cell + GAP) - GAP), BACKGROUND
    )
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for r, (text, images) in enumerate(zip(texts, rows, strict=True)):
        top = r * (cell + GAP)
        wrapped = "\n".join(textwrap.wrap(text.replace("_", " "), 15)[: max(1, cell // 16)])
        if wrapped:
            pen.multiline_text((4, top + cell / 2), wrapped, INK, font, anchor="lm")
        for column in range(columns):
            corner = (left + column * (cell + GAP), top)
            if column < len(images):
                canvas.paste(
                    _picture(images[column], channels).resize(
                        (cell, cell), Image.Resampling.NEAREST
                    ),
                    corner,
                )
            else:
                pen.rectangle((*corner, corner[0] + cell - 1, top + cell - 1), EMPTY)
    return canvas


def png_bytes(image: Image.Image) -> bytes:
    """The image as PNG."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _picture(image: np.ndarray, channels: int) -> Image.Image:
    return Image.fromarray(
        image[0] if channels == 1 else np.ascontiguousarray(image[:3].transpose(1, 2, 0))
    )
