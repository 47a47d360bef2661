"""The anatomy of a chest radiograph: a person's thorax, and where each pixel of a film lies in it.

Film convention: the patient's right is on the left of the picture. Brightness grows with what the
ray passed: air is dark, bone and fluid are bright.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgan.data.phantoms.canvas import Canvas, curve, step


@dataclass(frozen=True)
class Anatomy:
    """One person. Lengths in normalised units (the picture is 2 wide)."""

    female: bool
    width: float  # half width of the rib cage at its base
    apex: float  # y of the lungs' tips
    base: float  # y of the costophrenic angles
    fat: float  # thickness of the soft tissue, 0 slim to 1
    spacing: float  # distance from rib to rib
    heart_ratio: float  # healthy cardiothoracic ratio
    heart_tilt: float
    vessels: float  # strength of the vascular markings
    breast: float  # size of the breast shadows, 0 for none
    bones: float  # brightness of the bones
    slope: float  # how steeply the ribs fall


@dataclass
class Thorax:
    """A person on a film: the patient's coordinates of every pixel and the organs' signed distances, (work, work) each.

    A distance is positive inside the organ and in normalised units.
    """

    anatomy: Anatomy
    x: np.ndarray  # from the midline, positive towards the patient's left (right in the picture)
    y: np.ndarray
    side: np.ndarray  # |x|
    cage: np.ndarray  # rib cage, down to the costophrenic angle
    dome: np.ndarray  # above the diaphragm
    lung: np.ndarray  # both lungs, mediastinum and diaphragm cut off
    body: np.ndarray


def draw_person(rng: np.random.Generator, female_share: float) -> Anatomy:
    """A person by chance."""
    female = bool(rng.random() < female_share)
    size = rng.normal(1.0, 0.05)
    return Anatomy(
        female=female,
        width=float(np.clip((0.66 if female else 0.72) * size, 0.56, 0.82)),
        apex=float(rng.normal(-0.74, 0.03)),
        base=float(rng.normal(0.50 if female else 0.56, 0.04)),
        fat=float(rng.beta(2, 3)),
        spacing=float(rng.normal(0.150, 0.008)),
        heart_ratio=float(np.clip(rng.normal(0.445, 0.025), 0.39, 0.49)),
        heart_tilt=float(rng.normal(0.55, 0.12)),
        vessels=float(rng.uniform(0.6, 1.2)),
        breast=float(rng.uniform(0.5, 1.0)) if female else 0.0,
        bones=float(rng.uniform(0.7, 1.2)),
        slope=float(rng.uniform(0.16, 0.34)),
    )


def place(board: Canvas, rng: np.random.Generator, person: Anatomy, supine: bool) -> Thorax:
    """The person before the film: tilt, shift, scale, depth of breath (lying: shallower)."""
    tilt, scale = rng.normal(0, 0.035), rng.normal(1.0, 0.035)
    shift = rng.normal(0, 0.035, 2)
    breath = rng.normal(0.0, 0.03) - (0.10 if supine else 0.0)
    cos, sin = np.float32(np.cos(tilt) / scale), np.float32(np.sin(tilt) / scale)
    left, down = board.x - np.float32(shift[0]), board.y - np.float32(shift[1])
    x, y = cos * left + sin * down, cos * down - sin * left
    side = np.abs(x)
    wide, apex, base = np.float32(person.width), np.float32(person.apex), np.float32(person.base + breath)
    depth = np.clip((y - apex) / (base - apex), 0.0, 1.2)
    reach = wide * np.power(np.maximum(1.0 - np.power(np.maximum(1.0 - depth, 0.0), 2.3), 0.0), np.float32(0.62))
    reach -= np.float32(0.5) * wide * np.square(np.maximum(depth - 0.82, 0.0))
    tip = y - apex - np.float32(0.9) * np.square(side - np.float32(0.40) * wide) / wide
    cage = np.minimum(reach - side, tip)
    lift = np.float32(0.20) * (1.0 - np.square((side - np.float32(0.42) * wide) / (np.float32(0.60) * wide)))
    higher = np.where(x < 0, np.float32(0.045), np.float32(0.0))  # the liver lifts the right dome
    dome = base - lift - higher * (side < 0.95 * wide) - y
    middle = np.float32(0.115) + np.float32(0.05) * np.square(y + 0.1)
    lung = np.minimum(np.minimum(cage, dome), side - middle)
    return Thorax(person, x, y, side, cage, dome, lung, _body(person, side, y))


def _body(person: Anatomy, side: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Trunk, shoulders and neck as one outline."""
    trunk = np.float32(person.width + 0.10 + 0.14 * person.fat) + np.float32(0.05) * y - side
    shoulder = y - np.float32(person.apex - 0.07) - np.float32(0.30) * side + np.float32(0.10)
    shoulder -= np.float32(0.55) * np.square(np.maximum(side - np.float32(person.width + 0.05), 0.0))
    arms = np.float32(1.15) - side - np.float32(0.6) * np.maximum(y + 0.15, 0.0)
    neck = np.float32(0.21 + 0.07 * person.fat) - side + np.float32(0.25) * np.square(np.maximum(y + 1.0, 0.0))
    return np.maximum(np.minimum(np.maximum(trunk, arms), shoulder), neck)


def healthy_film(board: Canvas, rng: np.random.Generator, thorax: Thorax) -> np.ndarray:
    """Soft tissue, lungs, diaphragm and bones without heart and findings: brightness 0 to 1, (work, work)."""
    person = thorax.anatomy
    film = step(thorax.body, -0.02, 0.05) * np.float32(0.50 + 0.10 * person.fat)
    film *= 0.80 + 0.20 * step(thorax.body, 0.0, 0.30)
    lungs = step(thorax.lung, -0.01, 0.07)
    film -= lungs * np.float32(0.33 + 0.02 * person.fat) * (0.86 + 0.14 * step(thorax.lung, 0.05, 0.3))
    below = step(-thorax.dome, -0.012, 0.03) * step(thorax.body, 0.0, 0.12)
    film += below * (np.float32(0.72) - film) * np.float32(0.75)
    if person.breast:
        film += _breasts(board, thorax) * np.float32(0.13 * person.breast)
    if rng.random() < 0.6:  # air in the stomach, under the left dome
        air = board.blobs(rng.normal((0.42 * person.width, person.base - 0.02), 0.03), rng.uniform(0.06, 0.10))
        film -= 0.25 * step(air, 0.3, 0.8) * below
    film += _vessels(board, rng, thorax) * lungs
    film += np.float32(person.bones) * _bones(board, rng, thorax)
    film += 0.012 * board.noise(rng, "middle") * step(thorax.body, 0.0, 0.1)
    return film


def _breasts(board: Canvas, thorax: Thorax) -> np.ndarray:
    """Two soft half-moons over the lower lungs."""
    person = thorax.anatomy
    across = (thorax.side - np.float32(0.58 * person.width)) / np.float32(0.34)
    down = (thorax.y - np.float32(person.base - 0.30)) / np.float32(0.30)
    return step(1.0 - np.sqrt(across * across + down * down), 0.0, 0.22) * step(down, -0.6, 0.5)


def _vessels(board: Canvas, rng: np.random.Generator, thorax: Thorax) -> np.ndarray:
    """Hila and the vessels that spread from them, thinner and fainter outwards."""
    person, strength = thorax.anatomy, np.float32(thorax.anatomy.vessels)
    film = np.zeros((board.work, board.work), np.float32)
    for sign in (-1, 1):
        root = np.array([sign * 0.20, -0.10 - 0.03 * sign])
        for angle in np.linspace(-1.25, 1.35, 8) + rng.normal(0, 0.1, 8):
            length = person.width * rng.uniform(0.45, 0.72)
            ahead = np.array([sign * np.cos(angle), 1.15 * np.sin(angle)]) * length
            bend = np.array([sign * 0.05, 0.08]) * rng.normal(0, 1.0, 2)
            path = curve(np.stack([root, root + 0.5 * ahead + bend, root + ahead]), 10)
            board.stroke(film, path, np.linspace(0.020, 0.004, 10), 0.8)
    near = np.exp(-((thorax.side - np.float32(0.16)) ** 2 + (thorax.y + 0.08) ** 2) / np.float32(0.10))
    hila = np.exp(-(((thorax.side - np.float32(0.17)) / 0.07) ** 2) - ((thorax.y + 0.07) / 0.13) ** 2)
    mesh = step(board.noise(rng, "middle"), 0.2, 1.8) * (np.float32(0.35) + near)
    return strength * (0.11 * film * (0.45 + near) + 0.15 * hila + 0.055 * mesh)


def _bones(board: Canvas, rng: np.random.Generator, thorax: Thorax) -> np.ndarray:
    """Ribs (back and front), clavicles, shoulder blades, spine."""
    person = thorax.anatomy
    out = thorax.side / np.float32(person.width)
    over = step(thorax.cage, -0.045, 0.01)
    start = rng.uniform(0, 1)
    back = thorax.y + np.float32(0.20) * out * (1.0 - np.float32(1.1) * out) - np.float32(person.slope) * out * out * 0.5
    front = thorax.y - np.float32(person.slope + 0.12) * (1.0 - out)
    bones = 0.085 * _bars(back, person.spacing, start, 0.40) * step(out, 0.10, 0.22)
    bones += 0.040 * _bars(front, person.spacing, start + 0.4, 0.45) * step(out, 0.34, 0.55)
    bones *= over * (1.0 - 0.55 * step(-thorax.dome, 0.0, 0.05))
    clavicle = np.zeros_like(bones)
    for sign in (-1, 1):
        tilt = rng.normal(0, 0.02)
        y = person.apex + 0.10
        ends = np.array(
            [[sign * 0.07, y + 0.06], [sign * 0.35, y + 0.03 + tilt], [sign * 0.50, y - 0.08], [sign * 0.86, y - 0.10 + tilt]]
        )
        path = np.concatenate([curve(ends[:3], 12), ends[3:]])
        board.stroke(clavicle, path, np.concatenate([[0.042], np.full(11, 0.028), [0.034]]))
        blade = np.array(
            [[sign * 0.92, y + 0.02], [sign * (person.width + 0.03), y + 0.20], [sign * (person.width - 0.04), y + 0.52]]
        )
        board.stroke(bones, curve(blade, 12), 0.016, 0.06)
    spine = step(np.float32(0.085) - thorax.side, 0.0, 0.025)
    discs = 0.6 + 0.4 * step(np.cos(thorax.y * np.float32(2 * np.pi / 0.135) + np.float32(start)), -0.9, -0.3)
    return bones + 0.12 * clavicle + 0.075 * spine * discs


def _bars(where: np.ndarray, spacing: float, start: float, share: float) -> np.ndarray:
    """Parallel bars with brighter edges (the cortex), 0 to 1. `share` of each spacing is bar."""
    phase = where * np.float32(1.0 / spacing) + np.float32(start)
    away = np.abs(phase - np.floor(phase) - np.float32(0.5))  # 0 on a bar's axis, 0.5 between two bars
    half = 0.5 * share
    bar = 1.0 - step(away, half - 0.05, half + 0.05)
    return bar * (0.62 + 0.38 * step(away, 0.35 * half, 0.95 * half))
