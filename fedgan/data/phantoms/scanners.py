"""How each hospital's pictures differ from the next one's: camera or X-ray tube, patients, label mix.

The first three hospitals are set by hand: a general clinic, an oncology centre with a modern camera,
and a small practice with an old one. Further ones are drawn, the same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LESION_LABELS = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
CHEST_LABELS = ("cardiomegaly", "consolidation", "effusion", "nodule", "pneumothorax")

_NAMES = (
    "north",
    "south",
    "east",
    "west",
    "centre",
    "harbour",
    "hill",
    "lake",
    "forest",
    "river",
    "valley",
    "coast",
)

# Shares of images by label. Every label is held by every hospital, but by some far more than by others.
_LESION_MIX = (
    {"akiec": 0.06, "bcc": 0.08, "bkl": 0.22, "df": 0.10, "mel": 0.14, "nv": 0.30, "vasc": 0.10},
    {"akiec": 0.22, "bcc": 0.24, "bkl": 0.10, "df": 0.05, "mel": 0.22, "nv": 0.11, "vasc": 0.06},
    {"akiec": 0.07, "bcc": 0.09, "bkl": 0.08, "df": 0.26, "mel": 0.07, "nv": 0.15, "vasc": 0.28},
)
# Shares of films by their leading finding; "" is a film without any.
_CHEST_MIX = (
    {
        "": 0.34,
        "cardiomegaly": 0.20,
        "consolidation": 0.16,
        "effusion": 0.14,
        "nodule": 0.08,
        "pneumothorax": 0.08,
    },
    {
        "": 0.14,
        "cardiomegaly": 0.08,
        "consolidation": 0.16,
        "effusion": 0.14,
        "nodule": 0.28,
        "pneumothorax": 0.20,
    },
    {
        "": 0.22,
        "cardiomegaly": 0.10,
        "consolidation": 0.24,
        "effusion": 0.22,
        "nodule": 0.08,
        "pneumothorax": 0.14,
    },
)


@dataclass(frozen=True)
class LesionLook:
    """A dermatoscope, its room and its patients."""

    tone_mean: float = 2.2  # skin tone, 1 (very fair) to 6 (very dark)
    tone_spread: float = 0.7
    warmth: float = 0.0  # colour temperature: positive yellowish, negative bluish
    gamma: float = 1.0  # above 1 darkens the middle tones
    contrast: float = 1.0
    exposure: float = 1.0
    blur: float = 0.002  # standard deviation, share of the picture's side
    noise: float = 0.012  # grain of one pixel, share of full scale
    vignette: float = 0.15  # darkening of the corners, 0 to 1
    port: float = 0.0  # share of pictures whose corners the round lens cuts off
    ruler: float = 0.2  # share of pictures with a ruler at an edge
    hair: float = 3.0  # mean number of hairs
    bubbles: float = 0.5  # mean number of gel bubbles


@dataclass(frozen=True)
class ChestLook:
    """An X-ray unit, its film processing and its patients."""

    gamma: float = 1.0
    contrast: float = 1.0
    exposure: float = 0.0  # added to the film's density
    blur: float = 0.002  # standard deviation, share of the picture's side
    sharpen: float = 0.3  # unsharp masking by the film processing
    noise: float = 0.012  # grain of one pixel, share of full scale
    collimation: float = 0.3  # share of films with black collimated borders
    marker: float = 0.8  # share of films with a side marker
    supine: float = (
        0.2  # share of films taken lying: higher diaphragm, wider heart, tubes and leads
    )
    female: float = 0.5  # share of women


_LESION_LOOKS = (
    LesionLook(tone_mean=2.2, tone_spread=0.7, warmth=0.02, vignette=0.12, ruler=0.15, hair=3.0, bubbles=0.4),
    LesionLook(
        tone_mean=1.7, tone_spread=0.5, warmth=-0.05, gamma=0.92, contrast=1.10, exposure=1.04, blur=0.001,
        noise=0.008, vignette=0.04, port=0.25, ruler=0.45, hair=1.5, bubbles=1.2,
    ),
    LesionLook(
        tone_mean=3.6, tone_spread=1.1, warmth=0.07, gamma=1.08, contrast=0.92, exposure=0.97, blur=0.005,
        noise=0.022, vignette=0.30, port=0.10, ruler=0.05, hair=5.0, bubbles=0.2,
    ),
)  # fmt: skip
_CHEST_LOOKS = (
    ChestLook(),
    ChestLook(
        gamma=0.88,
        contrast=1.12,
        exposure=0.04,
        blur=0.001,
        sharpen=0.5,
        noise=0.008,
        collimation=0.1,
        supine=0.05,
    ),
    ChestLook(
        gamma=1.12,
        contrast=0.88,
        exposure=-0.04,
        blur=0.005,
        sharpen=0.0,
        noise=0.022,
        collimation=0.6,
        marker=0.95,
        supine=0.5,
    ),
)


def hospital_name(index: int) -> str:
    """Name of hospital `index`, counted from 0."""
    return _NAMES[index] if index < len(_NAMES) else f"hospital-{index + 1}"


def lesion_look(index: int) -> LesionLook:
    """The dermatoscope of hospital `index`."""
    if index < len(_LESION_LOOKS):
        return _LESION_LOOKS[index]
    rng = np.random.default_rng([71, index])
    return LesionLook(
        tone_mean=rng.uniform(1.5, 4.5), tone_spread=rng.uniform(0.5, 1.1), warmth=rng.uniform(-0.06, 0.07),
        gamma=rng.uniform(0.9, 1.1), contrast=rng.uniform(0.9, 1.1), exposure=rng.uniform(0.96, 1.04),
        blur=rng.uniform(0.001, 0.005), noise=rng.uniform(0.008, 0.022), vignette=rng.uniform(0.0, 0.3),
        port=rng.uniform(0.0, 0.3), ruler=rng.uniform(0.0, 0.5), hair=rng.uniform(1.0, 5.0), bubbles=rng.uniform(0.0, 1.2),
    )  # fmt: skip


def chest_look(index: int) -> ChestLook:
    """The X-ray unit of hospital `index`."""
    if index < len(_CHEST_LOOKS):
        return _CHEST_LOOKS[index]
    rng = np.random.default_rng([73, index])
    return ChestLook(
        gamma=rng.uniform(0.88, 1.12), contrast=rng.uniform(0.88, 1.12), exposure=rng.uniform(-0.04, 0.04),
        blur=rng.uniform(0.001, 0.005), sharpen=rng.uniform(0.0, 0.8), noise=rng.uniform(0.008, 0.022),
        collimation=rng.uniform(0.0, 0.6), marker=rng.uniform(0.5, 1.0), supine=rng.uniform(0.0, 0.5),
        female=rng.uniform(0.4, 0.6),
    )  # fmt: skip


def label_mix(kind: str, index: int) -> dict[str, float]:
    """Shares of images by label (lesions) or leading finding (chest; "" for none) of hospital `index`; they add up to 1.

    From the fourth hospital on, a mix of the first three and a drawn one.
    """
    mixes = _LESION_MIX if kind == "lesions" else _CHEST_MIX
    if index < len(mixes):
        return dict(mixes[index])
    names = list(mixes[0])
    drawn = np.random.default_rng([79, index]).dirichlet(np.full(len(names), 2.0))
    union = np.mean([[mix[name] for name in names] for mix in mixes], axis=0)
    return dict(zip(names, (0.5 * drawn + 0.5 * union).tolist(), strict=True))
