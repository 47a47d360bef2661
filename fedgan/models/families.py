"""Generator families: the networks behind `model.family`.

A family is a package fedgan/models/FAMILY with `NETWORKS`, which maps 'generator' and any other
name in `federation.exchange` to a class that is built from (model settings, resolution, channels,
label_dim, rng); and a module fedgan/training/FAMILY_step.py (see fedgan/training/step.py). Every
generator is called as `generator(z, c, psi, noise, rng)` and has `z_dim`, `label_dim`, `resolution`
and `channels`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

LABEL_EMBEDDING = (
    "mapping.embed.weight"  # (w_dim, label_dim): the only tensor with a column per label
)


def network_classes(family: str) -> dict[str, Any]:
    """The networks of a family by part name."""
    classes: dict[str, Any] = import_module(f"fedgan.models.{family}").NETWORKS
    return classes
