"""Procedural phantoms: the embedded default data. They need no download and know their own truth.

`write_phantoms` writes the shards of whole hospitals; `draw_lesion` and `draw_chest` draw one picture.
"""

from fedgan.data.phantoms.chest import draw_chest
from fedgan.data.phantoms.lesions import draw_lesion
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
    "draw_chest",
    "draw_lesion",
    "lesion_look",
    "write_phantoms",
]
