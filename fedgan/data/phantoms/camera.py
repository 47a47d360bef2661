"""Dermatoscopic photograph: light through skin layers, objects on the skin, and the camera."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import ndimage

from fedgan.data.phantoms.canvas import Canvas, step
from fedgan.data.phantoms.scanners import LesionLook

# Skin under polarised light for tones 1 to 6, and the optics of each layer (red, green, blue).
_TONES = np.array(
    [[240, 205, 194], [230, 184, 167], [212, 160, 138],
     [178, 126, 102], [134, 91, 73], [98, 67, 56]], np.float32
) / 255  # fmt: skip
_MELANIN = np.array([0.52, 0.88, 1.08], np.float32)  # absorption per unit
_BLOOD = np.array([0.16, 0.78, 0.62], np.float32)
_BLUE = np.array([88, 98, 128], np.float32) / 255  # colours that scattering layers add
_KERATIN = np.array([202, 156, 96], np.float32) / 255
_WHITE = np.array([240, 222, 212], np.float32) / 255


@dataclass
class Layers:
    """Layers of the skin, each (work, work) float32, 0 where absent."""

    melanin: np.ndarray
    blood: np.ndarray
    blue: np.ndarray
    keratin: np.ndarray
    white: np.ndarray
    signs: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def none(canvas: Canvas) -> Layers:
        """Bare skin."""
        melanin, blood, blue, keratin, white = np.zeros((5, canvas.work, canvas.work), np.float32)
        return Layers(melanin, blood, blue, keratin, white)


def photograph(
    canvas: Canvas,
    rng: np.random.Generator,
    look: LesionLook,
    tone: float,
    hairiness: float,
    layers: Layers,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Photograph (resolution, resolution, 3) uint8 of skin with `layers`, and its artefacts."""
    light = _light(tone, layers)
    artefacts: dict[str, Any] = {}
    artefacts["bubbles"] = _bubbles(canvas, rng, look, light)
    artefacts["hairs"] = _hairs(canvas, rng, look.hair * hairiness, tone, light)
    artefacts["ruler"] = _ruler(canvas, rng, look, light)
    image = canvas.down(light)
    return _develop(canvas, rng, look, image), artefacts


def _light(tone: float, layers: Layers) -> np.ndarray:
    """Reflected light (3, work, work): Beer-Lambert for absorbing layers, mixing for scattering."""
    skin = np.array(
        [np.interp(tone, np.arange(1, 7), _TONES[:, channel]) for channel in range(3)], np.float32
    )
    lit = float(skin[0])  # dark skin also darkens deep and scattering layers
    dim = np.float32(0.45 + 0.55 * lit)
    out = np.empty((3, *layers.melanin.shape), np.float32)
    blue, keratin, white = (
        np.clip(layer, 0.0, 0.92) for layer in (layers.blue, layers.keratin, layers.white)
    )
    for channel in range(3):
        base = skin[channel] + keratin * (_KERATIN[channel] * dim - skin[channel])
        base *= np.exp(-_MELANIN[channel] * layers.melanin - _BLOOD[channel] * layers.blood)
        base += blue * (_BLUE[channel] * dim - base)
        base += white * (_WHITE[channel] * dim - base)
        out[channel] = base
    return out


def _bubbles(canvas: Canvas, rng: np.random.Generator, look: LesionLook, light: np.ndarray) -> int:
    """Air bubbles in the gel: bright rings with a highlight."""
    count = int(min(rng.poisson(look.bubbles), 6))
    for x, y, size in rng.uniform((-0.95, -0.95, 0.03), (0.95, 0.95, 0.10), (count, 3)).astype(
        np.float32
    ):
        away = np.hypot(canvas.x - x, canvas.y - y) / size
        ring = 0.28 * np.exp(-np.square((away - 1.0) / 0.16)) + 0.5 * np.exp(
            -(np.square(canvas.x - x + 0.35 * size) + np.square(canvas.y - y + 0.35 * size))
            / (0.22 * size) ** 2
        )
        light += ring * (0.97 - light)
    return count


def _hairs(
    canvas: Canvas, rng: np.random.Generator, mean: float, tone: float, light: np.ndarray
) -> int:
    """Hairs, mostly parallel, brown to black."""
    count = int(min(rng.poisson(mean), 24))
    direction, dark = rng.uniform(0, np.pi), rng.uniform(0.05, 0.32 if tone < 3 else 0.12)
    middle, heading = rng.uniform(-1.0, 1.0, (count, 2)), direction + rng.normal(0, 0.35, count)
    half = rng.uniform(0.35, 1.1, (count, 1)) * np.stack([np.cos(heading), np.sin(heading)], axis=1)
    curves = np.stack(
        [middle - half, middle + rng.normal(0, 0.18, (count, 2)), middle + half], axis=1
    )
    thick = rng.uniform(0.004, 0.010, count)
    cover = canvas.strokes(curves, np.stack([thick, 0.6 * thick], axis=1), 0.9)
    for channel, tint in enumerate((1.0, 0.72, 0.52)):
        light[channel] += cover * (np.float32(dark * tint) - light[channel])
    return count


def _ruler(canvas: Canvas, rng: np.random.Generator, look: LesionLook, light: np.ndarray) -> bool:
    """Millimetre ticks along one edge, every fifth longer."""
    present, edge, gap, start = (
        rng.random() < look.ruler,
        int(rng.integers(4)),
        rng.uniform(0.09, 0.14),
        rng.uniform(0, 0.1),
    )
    if not present:
        return False
    along = np.arange(-1.0 + start, 1.0, gap)
    length = np.where(np.arange(len(along)) % 5 == 0, 0.20, 0.11)
    tips = [np.stack([along, -1.0 + share * length], axis=1) for share in (0.0, 0.5, 1.0)]
    light += np.rot90(canvas.strokes(np.stack(tips, axis=1), 0.008, 0.8), edge) * (
        np.float32(0.10) - light
    )
    return True


def _develop(
    canvas: Canvas, rng: np.random.Generator, look: LesionLook, image: np.ndarray
) -> np.ndarray:
    """Apply light, vignette, blur, colour, tone curve, grain: (3, R, R) to (R, R, 3) uint8."""
    size = canvas.resolution
    grid = ((np.arange(size) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)
    slope = rng.normal(0, 0.045, 2).astype(np.float32)
    exposure, tint = look.exposure * rng.normal(1.0, 0.035), rng.normal(0, 0.012, 3)
    corner_cut, cut_radius = rng.random() < look.port, rng.uniform(1.05, 1.25)
    far = np.hypot(grid[None, :], grid[:, None])
    shade = (
        1.0
        + slope[0] * grid[None, :]
        + slope[1] * grid[:, None]
        - np.float32(look.vignette) * (far**2) / 2
    )
    gain = exposure * (1.0 + tint + look.warmth * np.array([1.0, 0.1, -1.0]))
    image = image * shade * gain.astype(np.float32)[:, None, None]
    if corner_cut:
        image *= 1.0 - 0.93 * step(far, cut_radius - 0.03, cut_radius + 0.03)
    if look.blur * size > 0.25:
        image = ndimage.gaussian_filter(
            image, (0, look.blur * size, look.blur * size), mode="nearest"
        )
    image = np.clip(image, 0.0, 1.0) ** np.float32(look.gamma)
    image = (image - 0.5) * np.float32(look.contrast) + 0.5
    # The grain is last: only its number of random draws depends on the resolution.
    image += np.float32(look.noise) * rng.standard_normal(image.shape, np.float32)
    return np.ascontiguousarray(
        (np.clip(image, 0.0, 1.0) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
    )
