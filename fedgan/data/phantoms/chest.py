"""Frontal chest radiographs with any of five findings, each drawn where and as it is seen on a film."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from scipy import ndimage

from fedgan.data.phantoms.canvas import Canvas, canvas, step
from fedgan.data.phantoms.scanners import CHEST_LABELS, ChestLook
from fedgan.data.phantoms.thorax import Film, Thorax, draw_person, healthy_film, place
from fedgan.errors import DataError

_LETTERS: dict[str, list[list[tuple[float, float]]]] = {
    "L": [[(0, 0), (0, 1), (0.6, 1)]],
    "R": [
        [(0, 1), (0, 0), (0.5, 0.05), (0.6, 0.25), (0.5, 0.45), (0, 0.5)],
        [(0.2, 0.5), (0.6, 1)],
    ],
}


def draw_chest(
    findings: Collection[str],
    rng: np.random.Generator,
    resolution: int,
    look: ChestLook | None = None,
    patient: np.random.Generator | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """One frontal radiograph and what is true of it.

    `findings`: any of `CHEST_LABELS`, or none. `rng` decides the film and the findings' places,
    `patient` (default: `rng`) the person. Returns (resolution, resolution) uint8 and the truth:
    `findings`, `female`, `supine`, `heart_ratio` (cardiothoracic), `lungs` (resolution, resolution) bool,
    and for each finding its place in [0, 1] picture coordinates or its side ('right' is the patient's,
    left in the picture) and a mask `<finding>_mask` (resolution, resolution) bool. The same generator
    state gives the same film at every resolution. Raises `DataError` for an unknown finding and
    `ConfigError` for a resolution that is no power of two from 16 to 1024.
    """
    unknown = sorted(set(findings) - set(CHEST_LABELS))
    if unknown:
        raise DataError(
            f"no phantom finding is called '{unknown[0]}': choose from {', '.join(CHEST_LABELS)}"
        )
    board, look = canvas(resolution), look or ChestLook()
    person = draw_person(patient or rng, look.female)
    supine = bool(rng.random() < look.supine)
    thorax = place(board, rng, person, supine)
    film = healthy_film(board, rng, thorax)
    truth: dict[str, Any] = {
        "findings": sorted(findings),
        "female": person.female,
        "supine": supine,
    }
    masks: dict[str, np.ndarray] = {}
    # From the deepest to the most superficial: what the heart or fluid covers is not seen.
    if "consolidation" in findings:
        masks["consolidation"] = _consolidation(board, rng, thorax, film, truth)
    if "nodule" in findings:
        masks["nodule"] = _nodules(board, rng, thorax, film, truth)
    if "pneumothorax" in findings:
        masks["pneumothorax"] = _pneumothorax(board, rng, thorax, film, truth)
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
        truth["leads"] = _leads(board, rng, film)
    truth["lungs"] = board.down((thorax.lung > 0).astype(np.float32)) >= 0.5
    for name in sorted(findings):
        truth[f"{name}_mask"] = board.down((masks[name] > 0.5).astype(np.float32)) >= 0.5
    return _expose(board, rng, look, film), truth


def _heart(rng: np.random.Generator, thorax: Thorax, ratio: float, film: Film) -> np.ndarray:
    """Heart, great vessels, aortic knob, windpipe. `ratio`: the heart's width over the rib cage's. Returns the heart."""
    person = thorax.anatomy
    x, y = thorax.x, thorax.y
    width = 2 * person.width * 0.97 * ratio
    left = width * rng.uniform(0.64, 0.69)
    right = width - left
    grown = max(0.0, ratio - 0.48)
    low, high = np.float32(person.base - 0.18 + 0.1 * grown), np.float32(0.33 + 0.5 * grown)
    # The left ventricle: an ellipse whose long axis falls towards its apex. The right atrium: a steeper one.
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
    # The great vessels: a band that widens into the heart.
    root = 0.085 + 0.5 * left * step(y, person.apex + 0.35, float(low))
    band = (root + np.float32(0.03) * np.square(y + 0.15) - thorax.side) * 3.0
    knob = 1.0 - np.hypot(x - np.float32(0.085), y - np.float32(person.apex + 0.45)) / np.float32(
        0.095
    )
    great = np.maximum(band, knob)
    both = np.maximum(ventricle, atrium)
    heart = step(both, -0.03, 0.16)
    # Heart and vessels melt into one outline: a smooth maximum of both.
    outline = 0.5 * (both + great + np.sqrt(np.square(both - great) + np.float32(0.02)))
    shade = step(outline, -0.03, 0.30)
    depth = np.float32(0.42) + np.float32(0.16) * step(both, -0.3, 0.55)
    film.light += (
        shade
        * np.maximum(depth + 0.35 * film.bones - film.light, 0.0)
        * step(thorax.body, 0.0, 0.1)
    )
    windpipe = step(np.float32(0.045) - np.abs(x - np.float32(0.01)), 0.0, 0.03)
    film.light -= (
        0.075
        * windpipe
        * (1.0 - step(y, person.apex + 0.40, person.apex + 0.58))
        * step(thorax.body, 0.0, 0.1)
    )
    return heart


def _choose_side(rng: np.random.Generator) -> tuple[int, str]:
    """-1 and 'right', or 1 and 'left': the patient's side."""
    return (-1, "right") if rng.random() < 0.5 else (1, "left")


def _in_lung(
    rng: np.random.Generator, thorax: Thorax, sign: int, margin: float
) -> tuple[float, float]:
    """A place (in the patient's coordinates) at least `margin` inside the lung, clear of the heart."""
    own = (thorax.lung > margin) & (
        thorax.x * sign > thorax.anatomy.width * (0.42 if sign > 0 else 0.34)
    )
    lines = np.flatnonzero(own.any(axis=1))
    share, across = rng.uniform(0.12, 0.95), rng.uniform(0.1, 0.9)
    row = int(lines[int(share * (len(lines) - 1))])
    columns = np.flatnonzero(own[row])
    column = int(columns[int(across * (len(columns) - 1))])
    return float(thorax.x[row, column]), float(thorax.y[row, column])


def _picture_place(board: Canvas, thorax: Thorax, x: float, y: float) -> list[float]:
    """Picture coordinates in [0, 1] of a place in the patient's coordinates."""
    nearest = int(
        np.argmin(np.square(thorax.x - np.float32(x)) + np.square(thorax.y - np.float32(y)))
    )
    return [(nearest % board.work + 0.5) / board.work, (nearest // board.work + 0.5) / board.work]


def _consolidation(
    board: Canvas, rng: np.random.Generator, thorax: Thorax, film: Film, truth: dict[str, Any]
) -> np.ndarray:
    """Pneumonia: a cloudy opacity with hazy borders and air-filled bronchi in it; in one third of cases on both sides."""
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
        places.append(_picture_place(board, thorax, x, y))
    cloud += 0.25 * board.noise(rng, "coarse") + 0.15 * board.noise(rng, "middle")
    dense = step(cloud, 0.05, 1.15) * step(thorax.lung, -0.01, 0.06)
    goal = (
        np.float32(rng.uniform(0.46, 0.58)) + 0.7 * film.bones + 0.02 * board.noise(rng, "middle")
    )
    film.light += dense * np.maximum(goal - film.light, 0.0) * np.float32(rng.uniform(0.75, 0.95))
    truth["consolidation"] = {"side": "both" if both else side, "places": places}
    return dense


def _nodules(
    board: Canvas, rng: np.random.Generator, thorax: Thorax, film: Film, truth: dict[str, Any]
) -> np.ndarray:
    """One to three round, well-bounded opacities."""
    total = np.zeros_like(film.light)
    places = []
    for _ in range(int(rng.choice((1, 2, 3), p=(0.55, 0.27, 0.18)))):
        sign, _ = _choose_side(rng)
        size, bright = rng.uniform(0.085, 0.140), rng.uniform(0.24, 0.34)
        x, y = _in_lung(rng, thorax, sign, 0.05)
        away = np.hypot(thorax.x - np.float32(x), thorax.y - np.float32(y)) / np.float32(size)
        away += np.float32(0.07) * board.noise(rng, "coarse")
        ball = np.sqrt(np.maximum(1.0 - np.square(away), 0.0)) * step(
            1.0 - away, -0.02, 0.25
        )  # the ray's way through a ball
        film.light += np.float32(bright) * ball
        total = np.maximum(total, step(1.0 - away, -0.05, 0.05))
        places.append([*_picture_place(board, thorax, x, y), size / 2])
    truth["nodule"] = {"places": places}
    return total


def _pneumothorax(
    board: Canvas, rng: np.random.Generator, thorax: Thorax, film: Film, truth: dict[str, Any]
) -> np.ndarray:
    """Air round a collapsed lung: black and without vessels at apex and flank, a fine white pleural line, a denser lung."""
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
        + 0.016 * board.noise(rng, "coarse")
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
    """Fluid in the pleural space: the costophrenic angle is gone under a meniscus that rises to the flank."""
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


def _leads(board: Canvas, rng: np.random.Generator, film: Film) -> int:
    """Wires of a monitor on the chest of a patient who lies."""
    count = int(rng.integers(0, 4))
    ends = rng.uniform((-0.6, -0.5), (0.6, 0.5), (count, 2))
    leave = np.stack(
        [rng.uniform(-1.0, 1.0, count), np.where(rng.random(count) < 0.5, -1.05, 1.05)], axis=1
    )
    middle = 0.5 * (ends + leave) + rng.normal(0, 0.2, (count, 2))
    wires = board.strokes(np.stack([ends, middle, leave], axis=1), 0.007, 0.8)
    pads = board.strokes(np.stack([ends, ends, ends + 0.01], axis=1), 0.025, 0.8)
    film.light += 0.22 * np.maximum(wires, pads)
    return count


def _expose(board: Canvas, rng: np.random.Generator, look: ChestLook, film: Film) -> np.ndarray:
    """Marker and collimation, then the film processing: a `Film` to (R, R) uint8."""
    exposure, contrast = look.exposure + rng.normal(0, 0.025), look.contrast * rng.normal(1.0, 0.05)
    _marker(board, rng, look, film)
    collimated, edges = rng.random() < look.collimation, rng.uniform(0.88, 1.0, 4)
    picture = board.down(film.light)
    size = board.resolution
    if look.blur * size > 0.25:
        picture = ndimage.gaussian_filter(picture, look.blur * size, mode="nearest")
    if look.sharpen:
        # Unsharp masking with a radius of 2 % of the side, as film processing does it.
        picture = picture + np.float32(look.sharpen) * (
            picture - ndimage.gaussian_filter(picture, 0.02 * size, mode="nearest")
        )
    open_field = np.clip(
        picture * np.float32(8.0), 0.0, 1.0
    )  # unattenuated rays stay black at any exposure
    picture = np.clip(
        picture * np.float32(1.18) + np.float32(exposure) * open_field, 0.0, 1.0
    ) ** np.float32(look.gamma)
    picture += (picture - 0.45) * np.float32(contrast - 1.0) * open_field
    if collimated:
        grid = ((np.arange(size) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)
        soft = max(0.01, 1.0 / size)
        across = step(np.minimum(grid + edges[0], edges[1] - grid), -soft, soft)
        down = step(np.minimum(grid + edges[2], edges[3] - grid), -soft, soft)
        picture = picture * (across[None, :] * down[:, None])
    # Quantum noise is drawn last: its number depends on the resolution.
    grain = rng.standard_normal(picture.shape, np.float32)
    picture = picture + np.float32(look.noise) * (0.4 + np.clip(picture, 0, 1)) * grain
    return (np.clip(picture, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def _marker(board: Canvas, rng: np.random.Generator, look: ChestLook, film: Film) -> None:
    """A lead letter for the side, in an upper corner; R stands on the left of the picture."""
    present, letter = rng.random() < look.marker, "L" if rng.random() < 0.5 else "R"
    x, y, size = rng.uniform(0.70, 0.80), rng.uniform(-0.93, -0.82), rng.uniform(0.08, 0.11)
    if not present:
        return
    lines = [np.array(line) * size for line in _LETTERS[letter]]
    parts = np.concatenate(
        [np.stack([line[:-1], 0.5 * (line[:-1] + line[1:]), line[1:]], axis=1) for line in lines]
    )
    lead = board.strokes(parts + np.array([x if letter == "L" else -x - 0.06, y]), 0.011)
    film.light += lead * np.maximum(0.80 - film.light, 0.0)
