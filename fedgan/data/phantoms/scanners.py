"""Differences between phantom hospitals: camera or X-ray unit, patients, label mix.

The first three hospitals are fixed: a general clinic, an oncology centre with a modern camera, and
a small practice with an old one. Further hospitals are random, with a fixed seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LESION_LABELS = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
CHEST_LABELS = ("cardiomegaly", "consolidation", "effusion", "nodule", "pneumothorax")

_NAMES = (
    "north", "south", "east", "west", "centre", "harbour",
    "hill", "lake", "forest", "river", "valley", "coast",
)  # fmt: skip

# Shares of images by label. Every hospital has every label, in very different shares.
_LESION_MIX = (
    {"akiec": 0.06, "bcc": 0.08, "bkl": 0.22, "df": 0.10, "mel": 0.14, "nv": 0.30, "vasc": 0.10},
    {"akiec": 0.22, "bcc": 0.24, "bkl": 0.10, "df": 0.05, "mel": 0.22, "nv": 0.11, "vasc": 0.06},
    {"akiec": 0.07, "bcc": 0.09, "bkl": 0.08, "df": 0.26, "mel": 0.07, "nv": 0.15, "vasc": 0.28},
)
# Shares of films by leading finding; "" is a film without findings.
_FINDINGS = ("", *CHEST_LABELS)
_CHEST_MIX = tuple(
    dict(zip(_FINDINGS, shares, strict=True))
    for shares in (
        (0.34, 0.20, 0.16, 0.14, 0.08, 0.08),
        (0.14, 0.08, 0.16, 0.14, 0.28, 0.20),
        (0.22, 0.10, 0.24, 0.22, 0.08, 0.14),
    )
)


@dataclass(frozen=True)
class LesionLook:
    """A dermatoscope and its patients."""

    tone_mean: float = 2.2  # skin tone, 1 (very fair) to 6 (very dark)
    tone_spread: float = 0.7
    warmth: float = 0.0  # colour temperature: positive yellowish, negative bluish
    gamma: float = 1.0  # above 1 darkens the middle tones
    contrast: float = 1.0
    exposure: float = 1.0
    blur: float = 0.002  # standard deviation, share of the image side
    noise: float = 0.012  # grain of one pixel, share of full scale
    vignette: float = 0.15  # darkening of the corners, 0 to 1
    port: float = 0.0  # share of images with corners cut off by the round lens
    ruler: float = 0.2  # share of images with a ruler at an edge
    hair: float = 3.0  # mean number of hairs
    bubbles: float = 0.5  # mean number of gel bubbles


@dataclass(frozen=True)
class ChestLook:
    """An X-ray unit, its film processing and its patients."""

    gamma: float = 1.0
    contrast: float = 1.0
    exposure: float = 0.0  # added to the film's density
    blur: float = 0.002  # standard deviation, share of the image side
    sharpen: float = 0.3  # unsharp masking by the film processing
    noise: float = 0.012  # grain of one pixel, share of full scale
    collimation: float = 0.3  # share of films with black collimated borders
    marker: float = 0.8  # share of films with a side marker
    supine: float = 0.2  # share of supine films: higher diaphragm, wider heart, leads
    female: float = 0.5  # share of women


_LESION_LOOKS = (
    LesionLook(
        tone_mean=2.2, tone_spread=0.7, warmth=0.02, vignette=0.12, ruler=0.15, hair=3.0,
        bubbles=0.4,
    ),
    LesionLook(
        tone_mean=1.7, tone_spread=0.5, warmth=-0.05, gamma=0.92, contrast=1.10, exposure=1.04,
        blur=0.001, noise=0.008, vignette=0.04, port=0.25, ruler=0.45, hair=1.5, bubbles=1.2,
    ),
    LesionLook(
        tone_mean=3.6, tone_spread=1.1, warmth=0.07, gamma=1.08, contrast=0.92, exposure=0.97,
        blur=0.005, noise=0.022, vignette=0.30, port=0.10, ruler=0.05, hair=5.0, bubbles=0.2,
    ),
)  # fmt: skip
_CHEST_LOOKS = (
    ChestLook(),
    ChestLook(
        gamma=0.88, contrast=1.12, exposure=0.04, blur=0.001, sharpen=0.5, noise=0.008,
        collimation=0.1, supine=0.05,
    ),
    ChestLook(
        gamma=1.12, contrast=0.88, exposure=-0.04, blur=0.005, sharpen=0.0, noise=0.022,
        collimation=0.6, marker=0.95, supine=0.5,
    ),
)  # fmt: skip
# Ranges of the uniform distributions of further hospitals, in the order of the random draws.
_LESION_RANGES = {
    "tone_mean": (1.5, 4.5), "tone_spread": (0.5, 1.1), "warmth": (-0.06, 0.07),
    "gamma": (0.9, 1.1), "contrast": (0.9, 1.1), "exposure": (0.96, 1.04),
    "blur": (0.001, 0.005), "noise": (0.008, 0.022), "vignette": (0.0, 0.3),
    "port": (0.0, 0.3), "ruler": (0.0, 0.5), "hair": (1.0, 5.0), "bubbles": (0.0, 1.2),
}  # fmt: skip
_CHEST_RANGES = {
    "gamma": (0.88, 1.12), "contrast": (0.88, 1.12), "exposure": (-0.04, 0.04),
    "blur": (0.001, 0.005), "sharpen": (0.0, 0.8), "noise": (0.008, 0.022),
    "collimation": (0.0, 0.6), "marker": (0.5, 1.0), "supine": (0.0, 0.5), "female": (0.4, 0.6),
}  # fmt: skip


def hospital_name(index: int) -> str:
    """Name of hospital `index`, counted from 0."""
    return _NAMES[index] if index < len(_NAMES) else f"hospital-{index + 1}"


def lesion_look(index: int) -> LesionLook:
    """The dermatoscope of hospital `index`."""
    if index < len(_LESION_LOOKS):
        return _LESION_LOOKS[index]
    rng = np.random.default_rng([71, index])
    return LesionLook(**{name: rng.uniform(*ends) for name, ends in _LESION_RANGES.items()})


def chest_look(index: int) -> ChestLook:
    """The X-ray unit of hospital `index`."""
    if index < len(_CHEST_LOOKS):
        return _CHEST_LOOKS[index]
    rng = np.random.default_rng([73, index])
    return ChestLook(**{name: rng.uniform(*ends) for name, ends in _CHEST_RANGES.items()})


def label_mix(kind: str, index: int) -> dict[str, float]:
    """Shares of images by label (lesions) or leading finding (chest; "" for none); the sum is 1.

    From the fourth hospital on, the mean of the first three mixes and a random one.
    """
    mixes = _LESION_MIX if kind == "lesions" else _CHEST_MIX
    if index < len(mixes):
        return dict(mixes[index])
    names = list(mixes[0])
    random = np.random.default_rng([79, index]).dirichlet(np.full(len(names), 2.0))
    union = np.mean([[mix[name] for name in names] for mix in mixes], axis=0)
    return dict(zip(names, (0.5 * random + 0.5 * union).tolist(), strict=True))
