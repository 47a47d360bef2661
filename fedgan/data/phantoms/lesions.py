"""Dermatoscopic photographs of skin lesions with their diagnostic signs.

A lesion is a stack of layers in the skin: melanin and blood absorb light, deep pigment looks blue
(Tyndall effect), keratin waxy, scars and scales white. The skin tone changes the colours. The
labels are those of HAM10000; the signs follow the common dermatoscopic criteria, simplified so that
they are visible at 32 x 32 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedgan.data.phantoms.camera import Layers, photograph
from fedgan.data.phantoms.canvas import Canvas, make_canvas, step
from fedgan.data.phantoms.scanners import LESION_LABELS, LesionLook
from fedgan.errors import DataError

_TEXTBOOK = 0.5  # share of lesions with all signs fully visible


@dataclass
class Shape:
    """Outline of a lesion. `inside` (work, work): 1 at its centre, 0 at its border, < 0 outside."""

    inside: np.ndarray
    centre: np.ndarray  # (2,) x, y
    radius: float  # mean, normalised units (the image is 2 wide)
    angle: float


def render_lesion(
    label: str,
    rng: np.random.Generator,
    resolution: int,
    look: LesionLook | None = None,
    patient: np.random.Generator | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Render one photograph of a lesion with its ground truth.

    `label`: one of `LESION_LABELS`. `rng` determines the lesion and the photograph, `patient`
    (default: `rng`) the person, so photographs of one patient share skin and hair. Returns
    (resolution, resolution, 3) uint8 and the truth: `label`, `mask` (resolution, resolution) bool,
    `area` (share of the image), `centre` (x, y in [0, 1]), `radius` (share of the side), `tone` (1
    to 6), `typical` (0 to 1, clarity of the signs), `hairs`, `ruler`, `bubbles`, and the signs of
    the label. The same generator state gives the same image at every resolution. Raises `DataError`
    for an unknown label and `ConfigError` unless the resolution is a power of two from 16 to 1024.
    """
    if label not in _RENDERERS:
        raise DataError(
            f"there is no phantom lesion '{label}': choose from {', '.join(LESION_LABELS)}"
        )
    canvas, look = make_canvas(resolution), look or LesionLook()
    person = patient or rng
    tone = float(np.clip(person.normal(look.tone_mean, look.tone_spread), 1.0, 6.0))
    hairiness, flush = float(person.gamma(1.2)) / 1.2, float(person.uniform(0.0, 0.12))
    layers = Layers.none(canvas)
    # Half of the lesions are textbook cases; the others have faint signs or signs of another class.
    textbook, faint = rng.random() < _TEXTBOOK, float(rng.uniform(0.1, 1.0))
    typical = 1.0 if textbook else faint
    shape = _RENDERERS[label](canvas, rng, layers, typical)
    layers.melanin += 0.035 * canvas.noise(rng, "fine") + 0.05 * canvas.noise(rng, "broad")
    layers.blood += flush + 0.05 * canvas.noise(rng, "coarse")
    image, artefacts = photograph(canvas, rng, look, tone, hairiness, layers)
    mask = canvas.down((shape.inside > 0).astype(np.float32)) >= 0.5
    truth = {
        "label": label,
        "mask": mask,
        "area": float((shape.inside > 0).mean()),
        "centre": [float(value) for value in (shape.centre + 1) / 2],
        "radius": shape.radius / 2,
        "tone": tone,
        "typical": typical,
    }
    return image, truth | artefacts | layers.signs


def _outline(
    canvas: Canvas,
    rng: np.random.Generator,
    radius: tuple[float, float],
    long: float,
    wavy: float,
    lobes: int = 1,
) -> Shape:
    """A roundish outline: `long` the largest elongation, `wavy` the irregularity of the border."""
    centre = rng.normal(0.0, 0.07, 2)
    size, angle, stretch = (
        rng.uniform(*radius),
        rng.uniform(0, 2 * np.pi),
        1.0 + long * rng.uniform(0.2, 1.0),
    )
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    inside = np.full((canvas.work, canvas.work), -np.inf, np.float32)
    for lobe in range(lobes):
        away, share = (rng.uniform(0.35, 0.65), rng.uniform(0.5, 0.8)) if lobe else (0.0, 1.0)
        where = rng.uniform(0, 2 * np.pi)
        x = canvas.x - np.float32(centre[0] + size * away * np.cos(where))
        y = canvas.y - np.float32(centre[1] + size * away * np.sin(where))
        along, across = (
            (cos * x + sin * y) / np.float32(stretch**0.5),
            (cos * y - sin * x) * np.float32(stretch**0.5),
        )
        inside = np.maximum(
            inside, np.float32(share) - np.sqrt(along * along + across * across) / np.float32(size)
        )
    inside += np.float32(wavy) * canvas.noise(rng, "coarse") + np.float32(
        0.25 * wavy
    ) * canvas.noise(rng, "middle")
    return Shape(inside, centre, float(size), float(angle))


def _honeycomb(canvas: Canvas, rng: np.random.Generator, cycles: float) -> np.ndarray:
    """A bent hexagonal net with `cycles` holes across: (work, work), 1 on lines, 0 in holes."""
    turn, start = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi, 2)
    waves = []
    for k in range(2):
        a = turn + k * 2 * np.pi / 3
        wave = np.float32(np.cos(a)) * canvas.x + np.float32(np.sin(a)) * canvas.y
        wave = (wave + np.float32(0.045) * canvas.noise(rng, "broad")) * np.float32(
            np.pi * cycles
        ) + np.float32(start[k])
        waves.append(wave + np.float32(0.6) * canvas.noise(rng, "coarse"))
    total = np.cos(waves[0]) + np.cos(waves[1]) + np.cos(waves[0] + waves[1])
    return 1.0 - step(total, -1.2, 0.8)


def _scatter(
    rng: np.random.Generator, shape: Shape, count: int, low: float, high: float
) -> np.ndarray:
    """Points (count, 2) at `low` to `high` radii from the lesion's centre, spread apart."""
    points: list[np.ndarray] = []
    for _ in range(count):
        angle, away = (
            rng.uniform(0, 2 * np.pi, 6),
            shape.radius * np.sqrt(rng.uniform(low**2, high**2, 6)),
        )
        trial = shape.centre + np.stack([away * np.cos(angle), away * np.sin(angle)], axis=1)
        gap = (
            np.min([np.hypot(*(trial - point).T) for point in points], axis=0)
            if points
            else np.ones(6)
        )
        points.append(trial[int(np.argmax(gap))])
    return np.asarray(points).reshape(-1, 2)


def _nv(canvas: Canvas, rng: np.random.Generator, layers: Layers, typical: float) -> Shape:
    """Naevus: one even brown, a regular net that fades out at a round border."""
    shape = _outline(
        canvas, rng, (0.32, 0.60), 0.35, rng.uniform(0.03, 0.09) + 0.07 * (1 - typical)
    )
    body = step(shape.inside, -0.06, rng.uniform(0.15, 0.45))
    depth, cycles = rng.uniform(0.5, 1.1), rng.uniform(17, 26)
    net = _honeycomb(canvas, rng, cycles) * step(shape.inside, -0.04, 0.2)
    middle = rng.uniform(-0.15, 0.4) * step(shape.inside, 0.2, 0.9)
    layers.melanin += (
        body * (np.float32(depth) + middle + 0.07 * canvas.noise(rng, "coarse"))
        + np.float32(0.4 * depth) * net
    )
    layers.melanin += (
        np.float32(0.7 * (1 - typical)) * body * step(canvas.noise(rng, "coarse"), -0.5, 1.5)
    )
    layers.signs |= {"network_cycles": cycles}
    return shape


def _mel(canvas: Canvas, rng: np.random.Generator, layers: Layers, typical: float) -> Shape:
    """Melanoma: asymmetric, ragged border, brown to black, blue-white veil, black dots."""
    shape = _outline(
        canvas,
        rng,
        (0.42, 0.68),
        0.7,
        rng.uniform(0.06, 0.10) + 0.08 * typical,
        lobes=int(rng.integers(1, 3)) + (typical > 0.5),
    )
    body = step(shape.inside, -0.03, 0.10)
    patches = step(canvas.noise(rng, "coarse"), -0.7, 1.1)
    ragged = _honeycomb(canvas, rng, rng.uniform(9, 13)) * (
        0.3 + 0.7 * step(canvas.noise(rng, "coarse"), -0.3, 0.8)
    )
    layers.melanin += body * (
        np.float32(rng.uniform(0.5, 0.8))
        + np.float32(rng.uniform(1.0, 1.6) * (0.3 + 0.7 * typical)) * patches
        + 0.4 * ragged
    )
    layers.blood += (
        np.float32(rng.uniform(0.2, 0.9)) * step(canvas.noise(rng, "broad"), 0.5, 1.5) * body
    )
    spots = _scatter(rng, shape, int(rng.integers(4, 14)), 0.3, 0.98)
    dots = step(canvas.blobs(spots, rng.uniform(0.015, 0.05, len(spots))), 0.3, 0.8)
    layers.melanin += 1.8 * dots * step(shape.inside, -0.08, 0.05)
    where = _scatter(rng, shape, 1, 0.1, 0.5)
    veil = canvas.blobs(where, shape.radius * rng.uniform(0.28, 0.45))
    veil = (
        step(
            veil + 0.2 * canvas.noise(rng, "coarse") + 0.08 * canvas.noise(rng, "middle"),
            0.25,
            0.95,
        )
        * body
    )
    layers.blue += np.float32(rng.uniform(0.65, 0.92) * typical) * veil
    layers.white += np.float32(rng.uniform(0.12, 0.30) * typical) * veil
    layers.signs |= {"veil": [float(value) for value in (where[0] + 1) / 2], "dots": len(spots)}
    return shape


def _bcc(canvas: Canvas, rng: np.random.Generator, layers: Layers, typical: float) -> Shape:
    """Basal cell carcinoma: pearly pink, branching vessels in focus, blue-grey ovoid nests."""
    shape = _outline(canvas, rng, (0.44, 0.68), 0.4, 0.09)
    body = step(shape.inside, -0.06, 0.2)
    layers.blood += np.float32(rng.uniform(0.25, 0.45)) * body
    pearl = step(canvas.noise(rng, "coarse") + 0.5 * canvas.noise(rng, "middle"), -0.6, 1.8)
    layers.white += body * (np.float32(rng.uniform(0.15, 0.32)) + 0.35 * pearl)
    trees = [
        _tree(rng, shape, float(start))
        for start in rng.uniform(0, 2 * np.pi, int(rng.integers(3, 6)))
    ]
    curves, widths = (np.concatenate(parts) for parts in zip(*trees, strict=True))
    vessels = canvas.strokes(curves, widths, 0.5 + 0.5 * widths[:, 0] / widths.max())
    layers.blood += np.float32(rng.uniform(1.3, 2.0) * (0.4 + 0.6 * typical)) * vessels
    layers.white *= 1.0 - 0.8 * vessels
    nests = _scatter(rng, shape, int(rng.integers(3, 9)), 0.25, 0.9)
    sizes = rng.uniform(0.04, 0.11, len(nests))
    ovoid = step(
        canvas.blobs(nests, sizes)
        + 0.2 * canvas.noise(rng, "coarse")
        + 0.06 * canvas.noise(rng, "middle"),
        0.4,
        0.85,
    )
    layers.blue += np.float32(rng.uniform(0.6, 0.85) * (0.15 + 0.85 * typical)) * ovoid * body
    layers.melanin += np.float32(rng.uniform(0.4, 0.9) * (0.15 + 0.85 * typical)) * ovoid * body
    layers.signs |= {"vessels": len(trees), "nests": len(nests)}
    return shape


def _tree(rng: np.random.Generator, shape: Shape, start: float) -> tuple[np.ndarray, np.ndarray]:
    """A vessel that branches from the border inwards: curves (K, 3, 2), half widths (K, 2)."""
    root = shape.centre + shape.radius * rng.uniform(0.85, 1.1) * np.array(
        [np.cos(start), np.sin(start)]
    )
    tips = [
        (
            root,
            start + np.pi + rng.normal(0, 0.4),
            rng.uniform(0.013, 0.022),
            rng.uniform(0.35, 0.6),
        )
    ]
    curves, widths = [], []
    for _ in range(4):
        grown = []
        for point, heading, width, length in tips:
            reach, bend = (
                length * shape.radius * rng.uniform(0.7, 1.3),
                heading + rng.normal(0, 0.35),
            )
            end = point + reach * np.array([np.cos(bend), np.sin(bend)])
            curves.append([point, (point + end) / 2 + rng.normal(0, 0.2 * reach, 2), end])
            widths.append([width, 0.7 * width])
            for side in (-1, 1):
                if rng.random() < 0.78:
                    grown.append(
                        (end, bend + side * rng.uniform(0.25, 0.9), 0.66 * width, 0.72 * length)
                    )
        tips = grown
    return np.asarray(curves), np.asarray(widths)


def _akiec(canvas: Canvas, rng: np.random.Generator, layers: Layers, typical: float) -> Shape:
    """Actinic keratosis: a hazy red patch, pale follicles (strawberry), whitish scales."""
    shape = _outline(canvas, rng, (0.48, 0.76), 0.45, 0.13)
    body = step(shape.inside, -0.15, 0.3)
    net = _honeycomb(canvas, rng, rng.uniform(8, 13))
    layers.blood += body * (np.float32(rng.uniform(0.35, 0.6)) + 0.15 * canvas.noise(rng, "coarse"))
    layers.blood += np.float32(rng.uniform(0.45, 0.75) * (0.25 + 0.75 * typical)) * net * body
    follicles = (
        (1.0 - step(net, 0.0, 0.45))
        * step(shape.inside, -0.05, 0.3)
        * step(canvas.noise(rng, "coarse"), -0.9, 0.7)
    )
    layers.white += np.float32(rng.uniform(0.35, 0.65) * (0.2 + 0.8 * typical)) * follicles
    layers.keratin += np.float32(0.25 * typical) * follicles
    scale = step(
        canvas.noise(rng, "coarse") + 0.7 * canvas.noise(rng, "middle"), rng.uniform(0.6, 1.1), 1.9
    )
    scale *= step(shape.inside, 0.0, 0.3)
    layers.white += np.float32(rng.uniform(0.5, 0.8) * (0.4 + 0.6 * typical)) * scale
    layers.keratin += np.float32(rng.uniform(0.1, 0.5)) * scale
    layers.signs |= {"scale": float(scale.mean())}
    return shape


def _bkl(canvas: Canvas, rng: np.random.Generator, layers: Layers, typical: float) -> Shape:
    """Seborrhoeic keratosis: waxy, sharp border, furrows, milia-like cysts, dark plugs."""
    shape = _outline(canvas, rng, (0.40, 0.70), 0.55, rng.uniform(0.05, 0.10))
    body = step(shape.inside, -0.01, 0.04)
    layers.keratin += np.float32(rng.uniform(0.5, 0.85) * (0.25 + 0.75 * typical)) * body
    folds = canvas.noise(rng, "middle") + 0.3 * canvas.noise(rng, "coarse")
    furrows = 1.0 - step(np.abs(folds), 0.1, 0.6)
    layers.melanin += body * (
        np.float32(rng.uniform(0.25, 0.7)) + 0.12 * canvas.noise(rng, "coarse")
    )
    layers.melanin += body * np.float32(rng.uniform(0.35, 0.8) * (0.2 + 0.8 * typical)) * furrows
    layers.melanin += np.float32(0.2) * body * (1.0 - step(shape.inside, 0.04, 0.12))
    cysts = _scatter(rng, shape, int(rng.integers(4, 14)), 0.0, 0.9)
    milia = canvas.blobs(
        cysts, rng.uniform(0.014, 0.036, len(cysts)), rng.uniform(0.6, 1.0, len(cysts))
    )
    milia = step(milia, 0.2, 0.9) * body
    layers.white += np.float32(0.85 * typical) * milia
    layers.melanin *= 1.0 - np.float32(0.8 * typical) * milia
    plugs = _scatter(rng, shape, int(rng.integers(2, 9)), 0.0, 0.9)
    dark = step(
        canvas.blobs(plugs, rng.uniform(0.015, 0.045, len(plugs)))
        + 0.1 * canvas.noise(rng, "middle"),
        0.35,
        0.75,
    )
    layers.melanin += 1.2 * dark * body * (1.0 - milia)
    layers.signs |= {"cysts": len(cysts), "plugs": len(plugs)}
    return shape


def _df(canvas: Canvas, rng: np.random.Generator, layers: Layers, typical: float) -> Shape:
    """Dermatofibroma: a white scar-like centre in a light-brown net that fades outwards."""
    shape = _outline(canvas, rng, (0.42, 0.66), 0.3, 0.06)
    ring = step(shape.inside, -0.1, 0.35)
    depth, share = rng.uniform(0.40, 0.85), rng.uniform(0.42, 0.60) * (0.55 + 0.45 * typical)
    layers.melanin += (
        ring * np.float32(depth) * (0.75 + 0.8 * _honeycomb(canvas, rng, rng.uniform(14, 21)))
    )
    layers.blood += np.float32(rng.uniform(0.05, 0.35)) * step(shape.inside, -0.1, 0.3)
    middle = shape.centre + rng.normal(0, 0.08, 2) * shape.radius
    away = np.hypot(
        canvas.x - np.float32(middle[0]), canvas.y - np.float32(middle[1])
    ) / np.float32(shape.radius)
    edge = (
        np.float32(share)
        - away
        + 0.10 * canvas.noise(rng, "coarse")
        + 0.05 * canvas.noise(rng, "middle")
    )
    scar = step(edge, -0.10, 0.14) * step(shape.inside, 0.0, 0.1)
    layers.melanin *= 1.0 - np.float32(0.8 * (0.3 + 0.7 * typical)) * scar
    layers.white += (
        np.float32(rng.uniform(0.55, 0.85) * (0.3 + 0.7 * typical))
        * scar
        * (0.88 + 0.12 * canvas.noise(rng, "middle"))
    )
    layers.signs |= {"scar": float((scar > 0.5).mean())}
    return shape


def _vasc(canvas: Canvas, rng: np.random.Generator, layers: Layers, typical: float) -> Shape:
    """Haemangioma: well-bounded red to purple lacunae between pale septa."""
    shape = _outline(canvas, rng, (0.32, 0.62), 0.4, 0.07)
    body = step(shape.inside, -0.05, 0.08)
    lakes = _scatter(rng, shape, int(rng.integers(10, 26)), 0.0, 0.95)
    sizes = shape.radius * rng.uniform(0.09, 0.17, len(lakes))
    lacunae = step(
        canvas.blobs(lakes, sizes) + 0.07 * canvas.noise(rng, "middle"), 0.3, 0.7
    ) * step(shape.inside, -0.12, 0.0)
    purple = rng.uniform(0.0, 1.0)
    layers.blood += (
        body * np.float32(rng.uniform(0.6, 1.1) * (0.6 + 0.4 * typical))
        + np.float32(rng.uniform(0.9, 1.6) * (0.3 + 0.7 * typical)) * lacunae
    )
    layers.blue += np.float32(0.5 * purple) * lacunae * step(canvas.noise(rng, "coarse"), -1.0, 1.0)
    layers.melanin += np.float32(0.5 * purple + 0.5 * (1 - typical)) * lacunae
    layers.white += np.float32(rng.uniform(0.1, 0.3)) * body * (1.0 - lacunae)
    layers.signs |= {"lacunae": len(lakes)}
    return shape


_RENDERERS: dict[str, Callable[[Canvas, np.random.Generator, Layers, float], Shape]] = {
    "akiec": _akiec, "bcc": _bcc, "bkl": _bkl, "df": _df, "mel": _mel, "nv": _nv, "vasc": _vasc,
}  # fmt: skip
