"""Frontal chest radiographs with any of five findings, each drawn where and as it is seen on a film."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from scipy import ndimage

from fedgan.data.phantoms.canvas import Canvas, canvas, step
from fedgan.data.phantoms.scanners import CHEST_LABELS, ChestLook
from fedgan.data.phantoms.thorax import Thorax, draw_person, healthy_film, place
from fedgan.errors import DataError

_LETTERS: dict[str, list[list[tuple[float, float]]]] = {
    "L": [[(0, 0), (0, 1), (0.6, 1)]],
    "R": [[(0, 1), (0, 0), (0.5, 0.05), (0.6, 0.25), (0.5, 0.45), (0, 0.5)], [(0.2, 0.5), (0.6, 1)]],
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
        raise DataError(f"no phantom finding is called '{unknown[0]}': choose from {', '.join(CHEST_LABELS)}")
    board, look = canvas(resolution), look or ChestLook()
    person = draw_person(patient or rng, look.female)
    supine = bool(rng.random() < look.supine)
    thorax = place(board, rng, person, supine)
    film = healthy_film(board, rng, thorax)
    truth: dict[str, Any] = {"findings": sorted(findings), "female": person.female, "supine": supine}
    masks: dict[str, np.ndarray] = {}
    ratio = float(rng.uniform(0.59, 0.70)) if "cardiomegaly" in findings else person.heart_ratio + 0.02 * supine
    truth["heart_ratio"] = ratio
    masks["cardiomegaly"] = _heart(rng, thorax, ratio, film)
    # From the deepest to the most superficial; a collapsed lung shows no vessels where it was.
    if "consolidation" in findings:
        masks["consolidation"] = _consolidation(board, rng, thorax, film, truth)
    if "nodule" in findings:
        masks["nodule"] = _nodules(board, rng, thorax, film, truth)
    if "pneumothorax" in findings:
        masks["pneumothorax"] = _pneumothorax(board, rng, thorax, film, truth)
    if "effusion" in findings:
        masks["effusion"] = _effusion(board, rng, thorax, film, truth)
    truth["lungs"] = board.down((thorax.lung > 0).astype(np.float32)) >= 0.5
    for name in sorted(findings):
        truth[f"{name}_mask"] = board.down((masks[name] > 0.5).astype(np.float32)) >= 0.5
    return _expose(board, rng, look, film, supine), truth


def _heart(rng: np.random.Generator, thorax: Thorax, ratio: float, film: np.ndarray) -> np.ndarray:
    """Heart, great vessels and aortic knob. `ratio`: the heart's width over the rib cage's."""
    person = thorax.anatomy
    width = 2 * person.width * 0.96 * ratio
    x, y = thorax.x, thorax.y
    big = ratio > 0.55
    left = width * rng.uniform(0.63, 0.68)
    right = width - left
    bottom = np.float32(person.base - (0.13 if big else 0.16))
    height = np.float32(rng.uniform(0.30, 0.36) * (1.12 if big else 1.0))
    middle = bottom - height * np.float32(0.82)
    # Two half ellipses that meet at the midline; the apex of the left one hangs lower.
    reach = np.where(x > 0, np.float32(left), np.float32(right))
    sag = np.where(x > 0, np.float32(0.22 * person.heart_tilt) * x, np.float32(0.0))
    round_ = 1.0 - np.sqrt(np.square(x / reach) + np.square((y - middle - sag) / height))
    heart = step(round_ * reach, -0.012, 0.045)
    band = np.float32(0.125) + np.float32(0.03) * np.cos(y * np.float32(4.0)) - thorax.side
    great = step(band, -0.02, 0.03) * step(y, person.apex - 0.15, person.apex + 0.2)
    knob = step(1.0 - np.hypot(x - np.float32(0.12), y - np.float32(person.apex + 0.38)) / np.float32(0.085), 0.0, 0.3)
    film += np.maximum(0.85 * great, 0.9 * knob) * np.maximum(0.50 - film, 0.0) * step(thorax.body, 0.0, 0.1)
    film += heart * np.maximum(0.74 - film, 0.0) * np.float32(0.88)
    windpipe = step(np.float32(0.042) - np.abs(x - np.float32(0.01)), 0.0, 0.02) * (
        1.0 - step(y, person.apex + 0.35, person.apex + 0.5)
    )
    film -= 0.10 * windpipe * step(thorax.body, 0.0, 0.1)
    return heart


def _choose_side(rng: np.random.Generator) -> tuple[int, str]:
    """-1 and 'right', or 1 and 'left': the patient's side."""
    return (-1, "right") if rng.random() < 0.5 else (1, "left")


def _in_lung(rng: np.random.Generator, thorax: Thorax, sign: int, margin: float) -> tuple[float, float]:
    """A place (in the patient's coordinates) at least `margin` inside the lung, clear of the heart."""
    own = (thorax.lung > margin) & (thorax.x * sign > thorax.anatomy.width * (0.42 if sign > 0 else 0.34))
    lines = np.flatnonzero(own.any(axis=1))
    share, across = rng.uniform(0.12, 0.95), rng.uniform(0.1, 0.9)
    row = int(lines[int(share * (len(lines) - 1))])
    columns = np.flatnonzero(own[row])
    column = int(columns[int(across * (len(columns) - 1))])
    return float(thorax.x[row, column]), float(thorax.y[row, column])


def _picture_place(board: Canvas, thorax: Thorax, x: float, y: float) -> list[float]:
    """Picture coordinates in [0, 1] of a place in the patient's coordinates."""
    nearest = int(np.argmin(np.square(thorax.x - np.float32(x)) + np.square(thorax.y - np.float32(y))))
    return [(nearest % board.work + 0.5) / board.work, (nearest // board.work + 0.5) / board.work]


def _consolidation(
    board: Canvas, rng: np.random.Generator, thorax: Thorax, film: np.ndarray, truth: dict[str, Any]
) -> np.ndarray:
    """Pneumonia: a cloudy opacity with hazy borders and air-filled bronchi in it; in one third of cases on both sides."""
    sign, side = _choose_side(rng)
    both = rng.random() < 0.33
    cloud = np.zeros_like(film)
    places = []
    for number, which in enumerate((sign, -sign)):
        x, y = _in_lung(rng, thorax, which, 0.10)
        size, flat = rng.uniform(0.17, 0.30) * (0.75 if number else 1.0), rng.uniform(0.8, 1.3)
        if number and not both:
            continue
        away = np.hypot((thorax.x - np.float32(x)) * np.float32(flat), thorax.y - np.float32(y)) / np.float32(size)
        cloud = np.maximum(cloud, 1.35 - away)
        places.append(_picture_place(board, thorax, x, y))
    cloud += 0.28 * board.noise(rng, "coarse") + 0.16 * board.noise(rng, "middle")
    dense = step(cloud, 0.15, 0.95) * step(thorax.lung, -0.01, 0.05)
    film += dense * np.maximum(np.float32(rng.uniform(0.56, 0.68)) - film, 0.0) * np.float32(rng.uniform(0.75, 0.95))
    truth["consolidation"] = {"side": "both" if both else side, "places": places}
    return dense


def _nodules(board: Canvas, rng: np.random.Generator, thorax: Thorax, film: np.ndarray, truth: dict[str, Any]) -> np.ndarray:
    """One to three round, well-bounded opacities."""
    total = np.zeros_like(film)
    places = []
    for _ in range(int(rng.choice((1, 2, 3), p=(0.6, 0.25, 0.15)))):
        sign, _ = _choose_side(rng)
        size, bright = rng.uniform(0.065, 0.12), rng.uniform(0.24, 0.34)
        x, y = _in_lung(rng, thorax, sign, 0.06)
        away = np.hypot(thorax.x - np.float32(x), thorax.y - np.float32(y)) / np.float32(size)
        ball = np.sqrt(np.maximum(1.0 - np.square(away), 0.0))  # the ray's way through a ball
        film += np.float32(bright) * ball**0.7
        total = np.maximum(total, step(1.0 - away, -0.05, 0.05))
        places.append([*_picture_place(board, thorax, x, y), size / 2])
    truth["nodule"] = {"places": places}
    return total


def _pneumothorax(board: Canvas, rng: np.random.Generator, thorax: Thorax, film: np.ndarray, truth: dict[str, Any]) -> np.ndarray:
    """Air round a collapsed lung: black and without vessels at apex and flank, a fine white pleural line, a denser lung."""
    person = thorax.anatomy
    sign, side = _choose_side(rng)
    gap = rng.uniform(0.12, 0.26)
    own = step(thorax.x * np.float32(sign), 0.0, 0.02)
    depth = (thorax.y - np.float32(person.apex)) / np.float32(person.base - person.apex)
    # The gap is widest at the apex and narrows downwards.
    pleura = thorax.cage - np.float32(gap) * (1.25 - 0.75 * np.clip(depth, 0.0, 1.0)) + 0.012 * board.noise(rng, "coarse")
    space = step(-pleura, -0.006, 0.012) * step(thorax.lung, 0.0, 0.03) * own
    lung = step(pleura, 0.0, 0.02) * step(thorax.lung, 0.0, 0.05) * own
    film += space * (np.float32(0.055) + 0.30 * np.maximum(film - 0.28, 0.0) - film) * np.float32(0.88)
    film += lung * np.float32(0.05 + 0.35 * gap)
    film += 0.16 * np.exp(-np.square(pleura / np.float32(0.012))) * step(thorax.lung, 0.0, 0.03) * own
    truth["pneumothorax"] = {"side": side, "gap": gap / 2}
    return space


def _effusion(board: Canvas, rng: np.random.Generator, thorax: Thorax, film: np.ndarray, truth: dict[str, Any]) -> np.ndarray:
    """Fluid in the pleural space: the costophrenic angle is gone under a meniscus that rises to the flank."""
    person = thorax.anatomy
    sign, side = _choose_side(rng)
    both = rng.random() < 0.25
    level = [rng.uniform(0.22, 0.52), rng.uniform(0.22, 0.34)]
    fluid = np.zeros_like(film)
    out = thorax.side / np.float32(person.width)
    for number, which in enumerate((sign, -sign)):
        if number and not both:
            continue
        own = step(thorax.x * np.float32(which), 0.02, 0.06)
        surface = thorax.y - np.float32(person.base - level[number]) + np.float32(0.30) * (np.square(out) - 0.35)
        fluid = np.maximum(fluid, step(surface, -0.03, 0.05) * step(thorax.cage, -0.02, 0.02) * own)
    film += fluid * np.maximum(0.72 - film, 0.0) * np.float32(0.92)
    truth["effusion"] = {"side": "both" if both else side, "height": level[0] / 2}
    return fluid


def _expose(board: Canvas, rng: np.random.Generator, look: ChestLook, film: np.ndarray, supine: bool) -> np.ndarray:
    """Leads, marker and collimation, then the film processing: (work, work) to (R, R) uint8."""
    exposure, contrast = look.exposure + rng.normal(0, 0.025), look.contrast * rng.normal(1.0, 0.05)
    _marker(board, rng, look, film)
    edges = rng.uniform(0.86, 1.0, 4)
    collimated = rng.random() < look.collimation
    picture = board.down(film)
    size = board.resolution
    if look.blur * size > 0.25:
        picture = ndimage.gaussian_filter(picture, look.blur * size, mode="nearest")
    if look.sharpen:
        # Unsharp masking with a radius of 2 % of the side, as film processing does it.
        picture = picture + np.float32(look.sharpen) * (picture - ndimage.gaussian_filter(picture, 0.02 * size, mode="nearest"))
    picture = np.clip((picture * np.float32(1.22) + np.float32(exposure)), 0.0, 1.0) ** np.float32(look.gamma)
    picture = (picture - 0.5) * np.float32(contrast) + 0.5
    if collimated:
        grid = ((np.arange(size) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)
        soft = max(0.01, 1.0 / size)
        across = step(np.minimum(grid + edges[0], edges[1] - grid), -soft, soft)
        down = step(np.minimum(grid + edges[2], edges[3] - grid), -soft, soft)
        picture = picture * (across[None, :] * down[:, None])
    # Quantum noise is stronger where fewer rays arrive. It is drawn last: its number depends on the resolution.
    grain = rng.standard_normal(picture.shape, np.float32)
    picture = picture + np.float32(look.noise) * (0.6 + 0.8 * np.clip(picture, 0, 1)) * grain
    return (np.clip(picture, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def _marker(board: Canvas, rng: np.random.Generator, look: ChestLook, film: np.ndarray) -> None:
    """A lead letter for the side, in an upper corner; R stands on the left of the picture."""
    present, letter = rng.random() < look.marker, "L" if rng.random() < 0.5 else "R"
    x, y, size = rng.uniform(0.76, 0.84), rng.uniform(-0.95, -0.85), rng.uniform(0.09, 0.13)
    if not present:
        return
    left = x if letter == "L" else -x - 0.06
    lead = np.zeros_like(film)
    for line in _LETTERS[letter]:
        board.stroke(lead, np.array(line) * size + np.array([left, y]), 0.013)
    film += lead * np.maximum(0.86 - film, 0.0)
