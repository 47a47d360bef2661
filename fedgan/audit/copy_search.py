"""Copies in one space: what was found, whether the search would have found planted copies, and the pairs to look at."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fedgan.audit.attacks.copies import CopyFindings, find_copies
from fedgan.audit.attacks.copy_controls import (
    LEAST_AUC,
    Recovery,
    negative_control,
    plant_copies,
    recovered,
)
from fedgan.audit.attacks.membership import score_attack
from fedgan.audit.attacks.nearest import nearest
from fedgan.audit.subject import Roles, Space
from fedgan.data.dataset import ImageDataset
from fedgan.evaluation.grids import draw_grid
from fedgan.evaluation.metrics.intervals import Interval, wilson_interval

PLANTED_SHARE = 0.3
PRIVATE = ("pairs", "distances", "rows")  # of single patients: they stay in the hospital
COLUMNS = 8  # pairs in a row of the picture


@dataclass(frozen=True)
class Planted:
    """A set that leaks: `images` (S, C, H, W) with planted copies; `flags` (S,): which; `rows` (S,): of which training row."""

    images: np.ndarray
    flags: np.ndarray
    rows: np.ndarray

    @property
    def sources(self) -> np.ndarray:
        """The training rows that were planted."""
        return np.unique(self.rows[self.flags])


def plant(images: np.ndarray, train: ImageDataset, seed: int) -> Planted:
    """Replace three in ten `images` by training images that are moved, mirrored and noised a little."""
    return Planted(
        *plant_copies(images, train.images, PLANTED_SHARE, np.random.default_rng([seed, 13]))
    )


@dataclass(frozen=True)
class CopySearch:
    """One space: `figures` and the controls may leave the hospital, `found` may not."""

    figures: dict[str, Any]
    positive: dict[str, Any]
    negative: dict[str, Any]
    found: CopyFindings


def search_copies(
    space: Space, roles: Roles, synthetic: np.ndarray, seed: int, bootstrap: int
) -> CopySearch:
    """Look for copies of one hospital's training images in one space, with both controls."""
    training, held = space.rows(roles.train.images), space.rows(roles.held.images)
    options: dict[str, Any] = {
        "seed": seed,
        "bootstrap": bootstrap,
        "moves": space.moves,
        "training_groups": roles.train_patients,
    }
    made = space.rows(synthetic)
    found = find_copies(made, training, held, held_out_groups=roles.held_patients, **options)
    recovery, auc_ci = _recovery(space, roles, training, held, options)
    negative = negative_control(
        training, held, seed=seed, moves=space.moves, held_out_groups=roles.held_patients
    )
    positive = dataclasses.asdict(recovery) | {"auc_ci": auc_ci}
    if not recovery.passed:
        positive["reason"] = (
            f"planted copies are found with an AUC of {recovery.auc:.3f} ({LEAST_AUC} is needed) and as a share of "
            f"{recovery.found_share:.3f}, {recovery.found_ci[0]:.3f} to {recovery.found_ci[1]:.3f}, where it is "
            f"{recovery.planted_share:.3f}"
        )
    refused = dataclasses.asdict(negative)
    if not negative.passed:
        refused["reason"] = (
            f"held-out images are taken for copies in {1 - negative.covered:.0%} of the splits"
        )
    figures = _figures(found, space) | (
        _both_ways(space, made, training, held, found.threshold, seed) if not space.fitted else {}
    )
    return CopySearch(figures, positive, refused, found)


def _recovery(
    space: Space, roles: Roles, training: np.ndarray, held: np.ndarray, options: dict[str, Any]
) -> tuple[Recovery, Interval]:
    """Are copies found that are planted in one half of the held-out images, while the other is held out? And the AUC's interval.

    Not in the audited generator's images: those may hold copies already, and the control would fail for the very leak that
    it is there to vouch for.
    """
    query_half = np.asarray(roles.held.images[roles.query_half])
    planted = plant(query_half, roles.train, options["seed"])
    rest = {
        "held_out": held[roles.reference_half],
        "held_out_groups": roles.held_patients[roles.reference_half],
        **options,
    }
    clean = find_copies(held[roles.query_half], training, **rest)
    leaking = find_copies(space.rows(planted.images), training, **rest)
    area = score_attack(
        "planted copies",
        -leaking.distances[planted.flags],
        -leaking.distances[~planted.flags],
        seed=options["seed"],
        bootstrap=options["bootstrap"],
        match=False,
        non_member_groups=roles.held_patients[roles.query_half][~planted.flags],
    )
    return recovered(leaking, planted.flags, clean, planted.rows), area.auc_ci


def _both_ways(
    space: Space,
    made: np.ndarray,
    training: np.ndarray,
    held: np.ndarray,
    threshold: float,
    seed: int,
) -> dict[str, Any]:
    """Shares of the synthetic images within the threshold of a training image, and of a held-out one, among as many of each.

    A blurred or typical image is near to both; a copy is near to the one that it copies. Wilson's intervals.
    """
    rng, size = np.random.default_rng([seed, 19]), min(len(training), len(held))
    shares = []
    for base in (training, held):
        rows = np.sort(rng.choice(len(base), size, replace=False))
        shares.append(float((nearest(made, base[rows], moves=space.moves)[0] <= threshold).mean()))
    return {
        "near_training_share": shares[0],
        "near_training_ci": wilson_interval(shares[0], len(made)),
        "near_held_out_share": shares[1],
        "near_held_out_ci": wilson_interval(shares[1], len(made)),
        "near_images": size,
    }


def _figures(found: CopyFindings, space: Space) -> dict[str, Any]:
    """The findings without what tells of single patients; a threshold, being one image's distance, only to two digits."""
    figures = {
        item.name: getattr(found, item.name)
        for item in dataclasses.fields(found)
        if item.name not in PRIVATE
    }
    figures["threshold"] = float(f"{found.threshold:.2g}")
    if space.fitted:  # 0.5 is no neutral point there
        figures |= {"closer_share": None, "closer_ci": None}
    return figures


def pairs_picture(found: CopyFindings, synthetic: np.ndarray, train: ImageDataset) -> Image.Image:
    """Synthetic images, each above its nearest training image, nearest first. Shows patients: it stays in the hospital."""
    texts: list[str] = []
    rows: list[np.ndarray] = []
    for start in range(0, len(found.pairs), COLUMNS):
        pairs = found.pairs[start : start + COLUMNS]
        texts += ["synthetic", "training"]
        rows += [
            synthetic[[pair[0] for pair in pairs]],
            np.asarray(train.images[np.array([pair[1] for pair in pairs])]),
        ]
    return draw_grid(texts, rows, COLUMNS, (train.channels, train.resolution))
