"""Decode images and fit them to the channels and square size of a shard."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
DEEP_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})
GREY_MODES = frozenset({"1", "L", "LA", "La", *DEEP_MODES})


class UnreadableError(Exception):
    """An image that cannot be decoded; the text is the reason in the counts."""


def decode(path: Path) -> np.ndarray:
    """Decode an image file to (H, W) grey or (H, W, 3) colour, uint8, rotated by its EXIF tag.

    16-bit grey keeps its upper 8 bits. Raises `UnreadableError`.
    """
    try:
        if path.exists() and not path.is_file():
            raise UnreadableError("not a regular file")  # a pipe or device would block
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.load()
                mode, upright = picture.mode, ImageOps.exif_transpose(picture)
        if mode in DEEP_MODES:
            deep = np.asarray(upright).astype(np.int64)
            if deep.min() < 0 or deep.max() > 65535:
                raise UnreadableError("more than 16 bits per pixel")
            return (deep >> 8).astype(np.uint8)
        if mode == "F":
            raise UnreadableError("floating-point pixels")
        return np.asarray(upright.convert("L" if mode in GREY_MODES else "RGB"))
    except UnreadableError:
        raise
    except FileNotFoundError:
        raise UnreadableError("missing file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableError("too many pixels") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more
        raise UnreadableError("unreadable or truncated file") from error


def read_header(path: Path) -> tuple[tuple[int, int], bool] | None:
    """((width, height), is in colour) from the file header, or None if it cannot be read."""
    try:
        if not path.is_file():
            return None
        with Image.open(path) as picture:
            return picture.size, picture.mode not in GREY_MODES
    except Exception:  # as in decode, which counts the file
        return None


def fit_square(pixels: np.ndarray, resolution: int, channels: int, crop: bool) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 as (channels, resolution, resolution) uint8.

    `crop` takes the central square first; otherwise the image is stretched. Pillow's LANCZOS, which
    applies a low-pass filter when shrinking, resizes; grey is computed with ITU-R 601 weights.
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels)).convert("L" if channels == 1 else "RGB")
    size = (resolution, resolution)
    if crop:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    array = np.asarray(picture)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))
