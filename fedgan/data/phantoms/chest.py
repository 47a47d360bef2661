"""Frontal chest radiographs with any of five findings, each at its typical location."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from scipy import ndimage

from fedgan.data.phantoms.canvas import Canvas, make_canvas, step
from fedgan.data.phantoms.scanners import CHEST_LABELS, ChestLook
from fedgan.data.phantoms.thorax import (
    Film,
    Thorax,
    position_thorax,
    render_healthy_film,
    sample_anatomy,
)
from fedgan.errors import DataError

_LETTERS: dict[str, list[list[tuple[float, float]]]] = {
    "L": [[(0, 0), (0, 1), (0.6, 1)]],
    "R": [
        [(0, 1), (0, 0), (0.5, 0.05), (0.6, 0.25), (0.5, 0.45), (0, 0.5)],
        [(0.2, 0.5), (0.6, 1)],
    ],
}


def render_chest(
    findings: Collection[str],
    rng: np.random.Generator,
    resolution: int,
    look: ChestLook | None = None,
    patient: np.random.Generator | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Render one frontal radiograph with its ground truth.

    `findings`: any of `CHEST_LABELS`, or none. `rng` determines the film and the locations of the
    findings, `patient` (default: `rng`) the person. Returns (resolution, resolution) uint8 and the
    truth: `findings`, `female`, `supine`, `heart_ratio` (cardiothoracic), `lungs` (resolution,
    resolution) bool, and for each finding its location in [0, 1] image coordinates or its side
    ('right' is the patient's right, left in the image) and a mask `<finding>_mask` (resolution,
    resolution) bool. The same generator state gives the same film at every resolution. Raises
    `DataError` for an unknown finding and `ConfigError` unless the resolution is a power of two
    from 16 to 1024.
    """
    unknown = sorted(set(findings) - set(CHEST_LABELS))
    if unknown:
        raise DataError(
            f"there is no phantom finding '{unknown[0]}': choose from {', '.join(CHEST_LABELS)}"
        )
    canvas, look = make_canvas(resolution), look or ChestLook()
    person = sample_anatomy(patient or rng, look.female)
    supine = bool(rng.random() < look.supine)
    thorax = position_thorax(canvas, rng, person, supine)
    film = render_healthy_film(canvas, rng, thorax)
    truth: dict[str, Any] = {
        "findings": sorted(findings),
        "female": person.female,
        "supine": supine,
    }
    masks: dict[str, np.ndarray] = {}
    # From deep to superficial: heart and fluid cover what lies behind them.
    if "consolidation" in findings:
        masks["consolidation"] = _consolidation(canvas, rng, thorax, film, truth)
    if "nodule" in findings:
        masks["nodule"] = _nodules(canvas, rng, thorax, film, truth)
    if "pneumothorax" in findings:
        masks["pneumothorax"] = _pneumothorax(canvas, rng, thorax, film, truth)
    ratio = (
        float(rng.uniform(0.58, 0.70))
        if "cardiomegaly" in findings
        else person.heart_ratio + 0.02 * supine
    )
    truth["heart_ratio"] = ratio
    masks["cardiomegaly"] = _heart(rng, thorax, ratio, film)
    if "effusion" in findings:
        masks["effusion"] = _effusion(rng, thorax, film, truth)
    if supine:
        truth["leads"] = _leads(canvas, rng, film)
    truth["lungs"] = canvas.down((thorax.lung > 0).astype(np.float32)) >= 0.5
    for name in sorted(findings):
        truth[f"{name}_mask"] = canvas.down((masks[name] > 0.5).astype(np.float32)) >= 0.5
    return _expose(canvas, rng, look, film), truth


def _heart(rng: np.random.Generator, thorax: Thorax, ratio: float, film: Film) -> np.ndarray:
    """Add heart, great vessels, aortic knob and trachea; return the heart."""
    person = thorax.anatomy
    x, y = thorax.x, thorax.y
    width = 2 * person.width * 0.97 * ratio
    left = width * rng.uniform(0.64, 0.69)
    right = width - left
    grown = max(0.0, ratio - 0.48)
    low, high = np.float32(person.base - 0.18 + 0.1 * grown), np.float32(0.33 + 0.5 * grown)
    # Left ventricle: an ellipse whose long axis descends towards its apex. Right atrium: steeper.
    tilt = person.heart_tilt * 0.55
    cos, sin = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    along, across = (
        cos * (x - np.float32(left * 0.30)) + sin * (y - low + high),
        cos * (y - low + high) - sin * x,
    )
    ventricle = 1.0 - np.hypot(
        along / np.float32(left * 0.78), (across + np.float32(0.02)) / np.float32(0.95 * high)
    )
    atrium = 1.0 - np.hypot(
        (x + np.float32(right * 0.30)) / np.float32(right * 0.72),
        (y - low + high) / np.float32(1.05 * high),
    )
    # Great vessels: a band that widens into the heart.
    root = 0.085 + 0.5 * left * step(y, person.apex + 0.35, float(low))
    band = (root + np.float32(0.03) * np.square(y + 0.15) - thorax.side) * 3.0
    knob = 1.0 - np.hypot(x - np.float32(0.085), y - np.float32(person.apex + 0.45)) / np.float32(
        0.095
    )
    great = np.maximum(band, knob)
    both = np.maximum(ventricle, atrium)
    heart = step(both, -0.03, 0.16)
    # A smooth maximum joins heart and vessels into one outline.
    outline = 0.5 * (both + great + np.sqrt(np.square(both - great) + np.float32(0.02)))
    shade = step(outline, -0.03, 0.30)
    depth = np.float32(0.42) + np.float32(0.16) * step(both, -0.3, 0.55)
    film.light += (
        shade
        * np.maximum(depth + 0.35 * film.bones - film.light, 0.0)
        * step(thorax.body, 0.0, 0.1)
    )
    trachea = step(np.float32(0.045) - np.abs(x - np.float32(0.01)), 0.0, 0.03)
    film.light -= (
        0.075
        * trachea
        * (1.0 - step(y, person.apex + 0.40, person.apex + 0.58))
        * step(thorax.body, 0.0, 0.1)
    )
    return heart


def _choose_side(rng: np.random.Generator) -> tuple[int, str]:
    """A random side of the patient: -1 and 'right', or 1 and 'left'."""
    return (-1, "right") if rng.random() < 0.5 else (1, "left")


def _in_lung(
    rng: np.random.Generator, thorax: Thorax, sign: int, margin: float
) -> tuple[float, float]:
    """A location (patient coordinates) at least `margin` inside the lung, beside the heart."""
    own = (thorax.lung > margin) & (
        thorax.x * sign > thorax.anatomy.width * (0.42 if sign > 0 else 0.34)
    )
    lines = np.flatnonzero(own.any(axis=1))
    share, across = rng.uniform(0.12, 0.95), rng.uniform(0.1, 0.9)
    row = int(lines[int(share * (len(lines) - 1))])
    columns = np.flatnonzero(own[row])
    column = int(columns[int(across * (len(columns) - 1))])
    return float(thorax.x[row, column]), float(thorax.y[row, column])


def _picture_position(canvas: Canvas, thorax: Thorax, x: float, y: float) -> list[float]:
    """Image coordinates in [0, 1] of a location in patient coordinates."""
    nearest = int(
        np.argmin(np.square(thorax.x - np.float32(x)) + np.square(thorax.y - np.float32(y)))
    )
    return [
        (nearest % canvas.work + 0.5) / canvas.work,
        (nearest // canvas.work + 0.5) / canvas.work,
    ]


def _consolidation(
    canvas: Canvas, rng: np.random.Generator, thorax: Thorax, film: Film, truth: dict[str, Any]
) -> np.ndarray:
    """Pneumonia: a cloudy opacity with hazy borders; in one third of cases on both sides."""
    sign, side = _choose_side(rng)
    both = rng.random() < 0.33
    cloud = np.zeros_like(film.light)
    places = []
    for number, which in enumerate((sign, -sign)):
        x, y = _in_lung(rng, thorax, which, 0.10)
        size, flat = rng.uniform(0.19, 0.34) * (0.75 if number else 1.0), rng.uniform(0.8, 1.3)
        if number and not both:
            continue
        away = np.hypot(
            (thorax.x - np.float32(x)) * np.float32(flat), thorax.y - np.float32(y)
        ) / np.float32(size)
        cloud = np.maximum(cloud, 1.45 - away)
        places.append(_picture_position(canvas, thorax, x, y))
    cloud += 0.25 * canvas.noise(rng, "coarse") + 0.15 * canvas.noise(rng, "middle")
    dense = step(cloud, 0.05, 1.15) * step(thorax.lung, -0.01, 0.06)
    goal = (
        np.float32(rng.uniform(0.46, 0.58)) + 0.7 * film.bones + 0.02 * canvas.noise(rng, "middle")
    )
    film.light += dense * np.maximum(goal - film.light, 0.0) * np.float32(rng.uniform(0.75, 0.95))
    truth["consolidation"] = {"side": "both" if both else side, "places": places}
    return dense


def _nodules(
    canvas: Canvas, rng: np.random.Generator, thorax: Thorax, film: Film, truth: dict[str, Any]
) -> np.ndarray:
    """One to three round, well-bounded opacities."""
    total = np.zeros_like(film.light)
    places = []
    for _ in range(int(rng.choice((1, 2, 3), p=(0.55, 0.27, 0.18)))):
        sign, _ = _choose_side(rng)
        size, bright = rng.uniform(0.085, 0.140), rng.uniform(0.24, 0.34)
        x, y = _in_lung(rng, thorax, sign, 0.05)
        away = np.hypot(thorax.x - np.float32(x), thorax.y - np.float32(y)) / np.float32(size)
        away += np.float32(0.07) * canvas.noise(rng, "coarse")
        # Length of the ray inside a sphere.
        ball = np.sqrt(np.maximum(1.0 - np.square(away), 0.0)) * step(1.0 - away, -0.02, 0.25)
        film.light += np.float32(bright) * ball
        total = np.maximum(total, step(1.0 - away, -0.05, 0.05))
        places.append([*_picture_position(canvas, thorax, x, y), size / 2])
    truth["nodule"] = {"places": places}
    return total


def _pneumothorax(
    canvas: Canvas, rng: np.random.Generator, thorax: Thorax, film: Film, truth: dict[str, Any]
) -> np.ndarray:
    """Air around a collapsed lung: black without vessels at apex and flank, white pleural line."""
    person = thorax.anatomy
    sign, side = _choose_side(rng)
    gap = rng.uniform(0.13, 0.28)
    own = step(thorax.x * np.float32(sign), 0.0, 0.02)
    inside = step(thorax.lung, -0.01, 0.06) * own
    depth = (thorax.y - np.float32(person.apex)) / np.float32(person.base - person.apex)
    # The gap is widest at the apex and closes downwards.
    pleura = (
        thorax.cage
        - np.float32(gap) * (1.2 - 0.75 * step(depth, 0.1, 1.05))
        + 0.016 * canvas.noise(rng, "coarse")
    )
    space = step(-pleura, -0.01, 0.015) * inside
    lung = step(pleura, 0.0, 0.02) * inside
    deeper = np.float32(0.115) * np.minimum(film.light / np.float32(0.16), 1.0)
    film.light -= space * (film.vessels + deeper)
    film.light += lung * np.float32(0.03 + 0.28 * gap)
    film.light += 0.11 * np.exp(-np.square(pleura / np.float32(0.011))) * inside
    truth["pneumothorax"] = {"side": side, "gap": gap / 2}
    return space


def _effusion(
    rng: np.random.Generator, thorax: Thorax, film: Film, truth: dict[str, Any]
) -> np.ndarray:
    """Pleural fluid: covers the costophrenic angle, with a meniscus that rises to the flank."""
    person = thorax.anatomy
    sign, side = _choose_side(rng)
    both = rng.random() < 0.25
    level = [rng.uniform(0.30, 0.62), rng.uniform(0.30, 0.42)]
    fluid = np.zeros_like(film.light)
    out = thorax.side / np.float32(person.width)
    for number, which in enumerate((sign, -sign)):
        if number and not both:
            continue
        own = step(thorax.x * np.float32(which), 0.0, 0.04)
        surface = (
            thorax.y
            - np.float32(person.base - level[number])
            + np.float32(0.26) * (out * out * out - 0.25)
        )
        fluid = np.maximum(fluid, step(surface, -0.06, 0.07) * step(thorax.cage, -0.02, 0.03) * own)
    fluid *= step(thorax.dome, -0.16, -0.04)
    film.light += fluid * np.maximum(0.63 + 0.4 * film.bones - film.light, 0.0) * np.float32(0.95)
    truth["effusion"] = {"side": "both" if both else side, "height": level[0] / 2}
    return fluid


def _leads(canvas: Canvas, rng: np.random.Generator, film: Film) -> int:
    """Monitor leads on the chest of a supine patient."""
    count = int(rng.integers(0, 4))
    ends = rng.uniform((-0.6, -0.5), (0.6, 0.5), (count, 2))
    leave = np.stack(
        [rng.uniform(-1.0, 1.0, count), np.where(rng.random(count) < 0.5, -1.05, 1.05)], axis=1
    )
    middle = 0.5 * (ends + leave) + rng.normal(0, 0.2, (count, 2))
    wires = canvas.strokes(np.stack([ends, middle, leave], axis=1), 0.007, 0.8)
    pads = canvas.strokes(np.stack([ends, ends, ends + 0.01], axis=1), 0.025, 0.8)
    film.light += 0.22 * np.maximum(wires, pads)
    return count


def _expose(canvas: Canvas, rng: np.random.Generator, look: ChestLook, film: Film) -> np.ndarray:
    """Add marker and collimation, then process the film: (R, R) uint8."""
    exposure, contrast = look.exposure + rng.normal(0, 0.025), look.contrast * rng.normal(1.0, 0.05)
    _marker(canvas, rng, look, film)
    collimated, edges = rng.random() < look.collimation, rng.uniform(0.88, 1.0, 4)
    image = canvas.down(film.light)
    size = canvas.resolution
    if look.blur * size > 0.25:
        image = ndimage.gaussian_filter(image, look.blur * size, mode="nearest")
    if look.sharpen:
        # Unsharp masking with a radius of 2 % of the side.
        image = image + np.float32(look.sharpen) * (
            image - ndimage.gaussian_filter(image, 0.02 * size, mode="nearest")
        )
    # Unattenuated rays stay black at any exposure.
    open_field = np.clip(image * np.float32(8.0), 0.0, 1.0)
    image = np.clip(
        image * np.float32(1.18) + np.float32(exposure) * open_field, 0.0, 1.0
    ) ** np.float32(look.gamma)
    image += (image - 0.45) * np.float32(contrast - 1.0) * open_field
    if collimated:
        grid = ((np.arange(size) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)
        soft = max(0.01, 1.0 / size)
        across = step(np.minimum(grid + edges[0], edges[1] - grid), -soft, soft)
        down = step(np.minimum(grid + edges[2], edges[3] - grid), -soft, soft)
        image = image * (across[None, :] * down[:, None])
    # Quantum noise is last: only its number of random draws depends on the resolution.
    grain = rng.standard_normal(image.shape, np.float32)
    image = image + np.float32(look.noise) * (0.4 + np.clip(image, 0, 1)) * grain
    return (np.clip(image, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def _marker(canvas: Canvas, rng: np.random.Generator, look: ChestLook, film: Film) -> None:
    """A lead letter for the side, in an upper corner; R is on the left of the image."""
    present, letter = rng.random() < look.marker, "L" if rng.random() < 0.5 else "R"
    x, y, size = rng.uniform(0.70, 0.80), rng.uniform(-0.93, -0.82), rng.uniform(0.08, 0.11)
    if not present:
        return
    lines = [np.array(line) * size for line in _LETTERS[letter]]
    parts = np.concatenate(
        [np.stack([line[:-1], 0.5 * (line[:-1] + line[1:]), line[1:]], axis=1) for line in lines]
    )
    lead = canvas.strokes(parts + np.array([x if letter == "L" else -x - 0.06, y]), 0.011)
    film.light += lead * np.maximum(0.80 - film.light, 0.0)
