"""Anatomy of a chest radiograph: a person's thorax and the patient coordinates of each pixel.

Film convention: the patient's right is on the left of the image. Brightness grows with attenuation:
air is dark, bone and fluid are bright.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgan.data.phantoms.canvas import Canvas, step


@dataclass(frozen=True)
class Anatomy:
    """One person. Lengths in normalised units (the image is 2 wide)."""

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
    slope: float  # steepness of the ribs


@dataclass
class Thorax:
    """Patient coordinates of every pixel and signed distances of the organs, (work, work) each.

    A distance is in normalised units and positive inside the organ.
    """

    anatomy: Anatomy
    x: np.ndarray  # from the midline, positive towards the patient's left (right in the image)
    y: np.ndarray
    side: np.ndarray  # |x|
    cage: np.ndarray  # rib cage, down to the costophrenic angle
    dome: np.ndarray  # above the diaphragm
    lung: np.ndarray  # both lungs, mediastinum and diaphragm cut off
    body: np.ndarray


def sample_anatomy(rng: np.random.Generator, female_share: float) -> Anatomy:
    """Draw the anatomy of a random person."""
    female = bool(rng.random() < female_share)
    size = rng.normal(1.0, 0.05)
    return Anatomy(
        female=female,
        width=float(np.clip((0.73 if female else 0.79) * size, 0.62, 0.88)),
        apex=float(rng.normal(-0.80, 0.03)),
        base=float(rng.normal(0.70 if female else 0.75, 0.04)),
        fat=float(rng.beta(2, 3)),
        spacing=float(rng.normal(0.172, 0.009)),
        heart_ratio=float(np.clip(rng.normal(0.445, 0.025), 0.39, 0.49)),
        heart_tilt=float(rng.normal(0.55, 0.12)),
        vessels=float(rng.uniform(0.6, 1.2)),
        breast=float(rng.uniform(0.5, 1.0)) if female else 0.0,
        bones=float(rng.uniform(0.7, 1.2)),
        slope=float(rng.uniform(0.16, 0.34)),
    )


def position_thorax(
    canvas: Canvas, rng: np.random.Generator, person: Anatomy, supine: bool
) -> Thorax:
    """Position a person in front of the film: tilt, shift, scale, breath (supine: shallower)."""
    tilt, scale = rng.normal(0, 0.035), rng.normal(1.0, 0.035)
    shift = rng.normal(0, 0.035, 2)
    breath = rng.normal(0.0, 0.03) - (0.10 if supine else 0.0)
    cos, sin = np.float32(np.cos(tilt) / scale), np.float32(np.sin(tilt) / scale)
    left, down = canvas.x - np.float32(shift[0]), canvas.y - np.float32(shift[1])
    x, y = cos * left + sin * down, cos * down - sin * left
    side = np.abs(x)
    wide, apex, base = person.width, person.apex, person.base + breath
    depth = np.clip((y - apex) / (base - apex), 0.0, 1.2)
    reach = wide * np.power(
        np.maximum(1.0 - np.power(np.maximum(1.0 - depth, 0.0), 2.6), 0.0), np.float32(0.58)
    )
    reach -= np.float32(0.5) * wide * np.square(np.maximum(depth - 0.82, 0.0))
    tip = y - apex - np.float32(0.8) * np.square(side - np.float32(0.42) * wide) / wide
    cage = np.minimum(reach - side, tip)
    # Each dome descends towards the flank; the heart lies on its middle.
    lift = np.float32(0.24) * (
        1.0 - np.square((np.maximum(side, 0.36 * wide) - np.float32(0.40) * wide) / (0.60 * wide))
    )
    # The liver lifts the right dome.
    lift += np.float32(0.05) * step(-x, -0.12, 0.12) * (1.0 - step(side, 0.7 * wide, wide))
    dome = base - lift - y
    middle = np.float32(0.115) + np.float32(0.05) * np.square(y + 0.1)
    lung = np.minimum(np.minimum(cage, dome), side - middle)
    return Thorax(person, x, y, side, cage, dome, lung, _body(person, side, y))


def _body(person: Anatomy, side: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Trunk, armpits, shoulders and neck as one outline."""
    trunk = np.float32(person.width + 0.07 + 0.13 * person.fat)
    armpit = np.clip((0.0 - y) / 0.6, 0.0, 1.0)
    wide = trunk + np.float32(0.45) * armpit * armpit + np.float32(0.03) * y - side
    shoulder = y - np.float32(person.apex - 0.20) - np.float32(0.26) * side
    neck = np.float32(0.20 + 0.07 * person.fat) - side
    # A smooth maximum rounds the corner between neck and shoulder.
    return np.minimum(
        wide, 0.5 * (shoulder + neck + np.sqrt(np.square(shoulder - neck) + np.float32(0.01)))
    )


@dataclass
class Film:
    """An unprocessed film: brightness 0 to 1 and the parts of vessels and bones, (work, work)."""

    light: np.ndarray
    vessels: np.ndarray
    bones: np.ndarray


def render_healthy_film(canvas: Canvas, rng: np.random.Generator, thorax: Thorax) -> Film:
    """Soft tissue, lungs, diaphragm and bones, without heart and findings."""
    person = thorax.anatomy
    film = step(thorax.body, -0.02, 0.06) * np.float32(0.36 + 0.12 * person.fat)
    film *= 0.72 + 0.28 * step(thorax.body, 0.0, 0.35)
    lungs = step(thorax.lung, -0.015, 0.07)
    # The chest wall is thicker towards the flank, and the lung thinner at its tip.
    air = (
        np.float32(0.23 + 0.08 * person.fat) * lungs * (0.80 + 0.20 * step(thorax.lung, 0.04, 0.28))
    )
    film -= air
    liver = 0.60 + 0.06 * step(-thorax.x, -0.25, 0.15)
    below = step(-thorax.dome, -0.010, 0.045) * step(thorax.body, 0.0, 0.16)
    film += below * (liver - film) * np.float32(0.85)
    if person.breast:
        film += _breasts(thorax) * np.float32(0.10 * person.breast)
    stomach, offset, size = rng.random() < 0.55, rng.normal(0, 0.03, 2), rng.uniform(0.07, 0.11)
    if stomach:  # air in the stomach, under the left dome
        away = np.hypot(
            thorax.x - np.float32(0.45 * person.width + offset[0]),
            1.3 * (thorax.dome + np.float32(size + 0.05)),
        )
        film -= 0.20 * step(1.0 - away / np.float32(size), 0.0, 0.6) * below
    vessels = _vessels(canvas, rng, thorax) * lungs
    bones = np.float32(person.bones) * _bones(canvas, rng, thorax)
    film += vessels + bones + 0.010 * canvas.noise(rng, "middle") * step(thorax.body, 0.0, 0.1)
    return Film(film, vessels, bones)


def _breasts(thorax: Thorax) -> np.ndarray:
    """Two soft shadows over the lower lungs, bounded below."""
    person = thorax.anatomy
    across = (thorax.side - np.float32(0.60 * person.width)) / np.float32(0.36)
    down = (thorax.y - np.float32(person.base - 0.28)) / np.float32(0.34)
    return step(1.0 - np.sqrt(across * across + down * down), 0.0, 0.35) * step(down, -0.9, 0.5)


def _vessels(canvas: Canvas, rng: np.random.Generator, thorax: Thorax) -> np.ndarray:
    """Hila and their vessels, thinner and fainter outwards."""
    person = thorax.anatomy
    curves, widths = [], []
    for sign in (-1, 1):
        root = np.array([sign * 0.17, -0.07 - 0.03 * sign])
        angles = np.linspace(-1.25, 1.35, 7) + rng.normal(0, 0.14, 7)
        for angle, length, bend in zip(
            angles, rng.uniform(0.40, 0.78, 7), rng.normal(0, 0.06, (7, 2)), strict=True
        ):
            ahead = np.array([sign * np.cos(angle), 1.2 * np.sin(angle)]) * length * person.width
            middle, end = root + 0.5 * ahead + bend, root + ahead
            curves.append([root, middle, end])
            widths.append([0.016, 0.003])
            # A side branch from the middle of each vessel.
            fork = angle + rng.normal(0, 0.6)
            twig = (
                middle
                + np.array([sign * np.cos(fork), np.sin(fork)]) * 0.45 * length * person.width
            )
            curves.append(
                [
                    0.5 * (root + middle) * 0.4 + 0.6 * middle,
                    0.5 * (middle + twig) + 0.3 * bend,
                    twig,
                ]
            )
            widths.append([0.009, 0.002])
    film = canvas.strokes(np.asarray(curves), np.asarray(widths), 0.9)
    away = np.square(thorax.side - np.float32(0.15)) + np.square(thorax.y + np.float32(0.06))
    near = np.exp(away / np.float32(-0.10))
    hila = np.exp(
        -np.square((thorax.side - np.float32(0.16)) / 0.075)
        - np.square((thorax.y + np.float32(0.06)) / 0.14)
    )
    mesh = step(canvas.noise(rng, "middle"), 0.0, 2.0) * (np.float32(0.4) + near)
    return np.float32(person.vessels) * (film * (0.035 + 0.05 * near) + 0.13 * hila + 0.045 * mesh)


def _bones(canvas: Canvas, rng: np.random.Generator, thorax: Thorax) -> np.ndarray:
    """Ribs (back and front), clavicles, shoulder blades, spine."""
    person = thorax.anatomy
    out = thorax.side / np.float32(person.width)
    over = step(thorax.cage, -0.05, 0.01)
    start = rng.uniform(0, 1)
    back = thorax.y + np.float32(0.20) * out - np.float32(0.22 + person.slope) * out * out
    front = thorax.y - np.float32(person.slope + 0.20) * (1.0 - out)
    bones = 0.090 * _bars(back, person.spacing, start, 0.42) * step(out, 0.10, 0.25)
    bones += 0.045 * _bars(front, 1.08 * person.spacing, start + 0.4, 0.46) * step(out, 0.36, 0.60)
    bones *= over * (1.0 - 0.75 * step(-thorax.dome, 0.0, 0.06))
    tilt = rng.normal(0, 0.02, 2)
    clavicle_curves, blade_curves = [], []
    y, w = person.apex + 0.13, person.width
    for sign, lean in zip((-1, 1), tilt, strict=True):
        bend, tip = [0.42, y - 0.03 + lean], [w - 0.02, y + 0.55]
        clavicle_curves += [
            [[0.07, y + 0.07], [0.22, y + 0.04], bend] * np.array([sign, 1]),
            [bend, [0.60, y - 0.10 + lean], [0.88, y - 0.09 + lean]] * np.array([sign, 1]),
        ]
        blade_curves += [
            [[0.98, y], [w + 0.06, y + 0.16], tip] * np.array([sign, 1]),
            [tip, [w + 0.14, y + 0.42], [w + 0.30, y + 0.12]] * np.array([sign, 1]),
        ]
    clavicles = canvas.strokes(
        np.asarray(clavicle_curves), np.array([[0.040, 0.026], [0.026, 0.036]] * 2)
    )
    shoulder = canvas.strokes(np.asarray(blade_curves), 0.014, 0.5)
    spine = step(np.float32(0.085) - thorax.side, 0.0, 0.03)
    discs = 0.55 + 0.45 * step(
        np.cos(thorax.y * np.float32(2 * np.pi / 0.135) + np.float32(6.28 * start)), -0.9, -0.3
    )
    inside = step(thorax.body, 0.0, 0.1)
    shoulder, clavicles = shoulder * inside, clavicles * inside
    return bones + 0.10 * clavicles + 0.07 * shoulder + 0.06 * spine * discs


def _bars(where: np.ndarray, spacing: float, start: float, share: float) -> np.ndarray:
    """Parallel bars with brighter edges (the cortex), 0 to 1. `share` of each spacing is bar."""
    phase = where * np.float32(1.0 / spacing) + np.float32(start)
    # 0 on the axis of a bar, 0.5 between two bars.
    away = np.abs(phase - np.floor(phase) - np.float32(0.5))
    half = 0.5 * share
    bar = 1.0 - step(away, half - 0.07, half + 0.05)
    return bar * (0.62 + 0.38 * step(away, 0.3 * half, 0.9 * half))
