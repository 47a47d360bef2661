"""Procedural phantoms: the default data, without download and with known ground truth.

`write_phantoms` writes one shard per hospital; `render_lesion` and `render_chest` return one image.
"""

from fedgan.data.phantoms.chest import render_chest
from fedgan.data.phantoms.lesions import render_lesion
from fedgan.data.phantoms.scanners import (
    CHEST_LABELS,
    LESION_LABELS,
    ChestLook,
    LesionLook,
    chest_look,
    lesion_look,
)
from fedgan.data.phantoms.writer import KINDS, TRUTH, write_phantoms

__all__ = [
    "CHEST_LABELS",
    "KINDS",
    "LESION_LABELS",
    "TRUTH",
    "ChestLook",
    "LesionLook",
    "chest_look",
    "lesion_look",
    "render_chest",
    "render_lesion",
    "write_phantoms",
]
