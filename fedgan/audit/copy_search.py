"""Copy search in one space, with its controls and a picture of the nearest pairs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fedgan.audit.attacks.copies import CopyFindings, find_copies
from fedgan.audit.attacks.copy_controls import (
    MIN_AUC,
    Recovery,
    negative_control,
    plant_copies,
    recovered,
)
from fedgan.audit.attacks.membership import score_attack
from fedgan.audit.attacks.nearest import nearest
from fedgan.audit.attacks.tail import Neighbours, Outliers, find_outliers
from fedgan.audit.rules import chance_to_find
from fedgan.audit.subject import Roles, Space
from fedgan.data.dataset import ImageDataset
from fedgan.evaluation.grids import draw_grid
from fedgan.evaluation.metrics.intervals import Interval, wilson_interval

PLANTED_SHARE = 0.3
PLANTED = 200  # copies by which the power is measured
POWER = {"one": 0.0, "1 %": 0.01, "5 %": 0.05}  # leaks by their share of the synthetic images
# Of single patients: stay in the hospital.
PRIVATE = ("pairs", "distances", "rows", "real_distances", "real_rows")
COLUMNS = 8  # pairs per row of the picture


@dataclass(frozen=True)
class Planted:
    """A set that leaks: `images` (S, C, H, W), planted `flags` (S,), training `rows` (S,)."""

    images: np.ndarray
    flags: np.ndarray
    rows: np.ndarray

    @property
    def sources(self) -> np.ndarray:
        """The training rows that were planted."""
        return np.unique(self.rows[self.flags])


def plant(images: np.ndarray, train: ImageDataset, seed: int) -> Planted:
    """Replace 30 % of `images` by training images that are slightly moved, mirrored and noised."""
    return Planted(
        *plant_copies(images, train.images, PLANTED_SHARE, np.random.default_rng([seed, 13]))
    )


@dataclass(frozen=True)
class CopySearch:
    """Result in one space: `figures` and controls may leave the hospital, `found` may not."""

    figures: dict[str, Any]
    positive: dict[str, Any]
    negative: dict[str, Any]
    found: CopyFindings
    outliers: Outliers


def search_copies(
    space: Space, roles: Roles, synthetic: np.ndarray, seed: int, bootstrap: int
) -> CopySearch:
    """Search copies of one hospital's training images in one space, with both controls."""
    training, held = space.rows(roles.train.images), space.rows(roles.held_out.images)
    options: dict[str, Any] = {
        "seed": seed,
        "bootstrap": bootstrap,
        "moves": space.moves,
        "training_groups": roles.train_patients,
    }
    made = space.rows(synthetic)
    found = find_copies(made, training, held, held_out_groups=roles.held_out_patients, **options)
    recovery, auc_ci = _recovery(space, roles, training, held, options)
    negative = negative_control(
        training, held, seed=seed, moves=space.moves, held_out_groups=roles.held_out_patients
    )
    outliers = _outliers(space, roles, made, training, held, found, seed)
    positive = dataclasses.asdict(recovery) | {"auc_ci": auc_ci}
    if not recovery.passed:
        positive["reason"] = (
            f"planted copies are found with an AUC of {recovery.auc:.3f} ({MIN_AUC} is needed) and "
            f"as a share of {recovery.found_share:.3f}, {recovery.found_ci[0]:.3f} to "
            f"{recovery.found_ci[1]:.3f}, where it is {recovery.planted_share:.3f}"
        )
    negative_figures = dataclasses.asdict(negative)
    if not negative.passed:
        negative_figures["reason"] = (
            f"held-out images are taken for copies in {1 - negative.covered:.0%} of the splits"
        )
    figures = _figures(found, space) | {
        "outliers": outliers.count,
        "held_out_outliers": outliers.held_out_count,
        "dimension": float(f"{outliers.dimension:.2g}"),
        "power": power(outliers),
    }
    figures |= (
        _near_shares(space, made, training, held, found.threshold, seed) if not space.fitted else {}
    )
    return CopySearch(figures, positive, negative_figures, found, outliers)


def _outliers(
    space: Space,
    roles: Roles,
    made: np.ndarray,
    training: np.ndarray,
    held: np.ndarray,
    found: CopyFindings,
    seed: int,
) -> Outliers:
    """Single copies among the rows `made`, with copies planted to measure the power."""
    shape = (PLANTED, *roles.train.images.shape[1:])
    copies, _, _ = plant_copies(
        np.zeros(shape, np.uint8), roles.train.images, 1.0, np.random.default_rng([seed, 17])
    )
    return find_outliers(
        Neighbours(made, found.distances, found.rows),
        Neighbours(held, found.real_distances, found.real_rows),
        Neighbours.of(space.rows(copies), training, space.moves),
        training,
        roles.train_patients,
        roles.held_out_patients,
        found.threshold,
        seed=seed,
        moves=space.moves,
        fitted=space.fitted,
    )


def power(found: Outliers) -> dict[str, float]:
    """Chance to find one copy, 1 % and 5 % of copies, by the rule of the verdict."""
    counts = found.images, found.held_out_count, found.held_out_images
    return {
        leak: chance_to_find(max(1, round(share * found.images)), found.found_share, *counts)
        for leak, share in POWER.items()
    }


def _recovery(
    space: Space, roles: Roles, training: np.ndarray, held: np.ndarray, options: dict[str, Any]
) -> tuple[Recovery, Interval]:
    """Positive control: copies planted in one half of the held-out images; also the AUC's interval.

    The other half is held out. Not in the audited generator's images: those may contain copies
    already, and the control would fail because of the very leak that it has to validate.
    """
    query_half = np.asarray(roles.held_out.images[roles.query_half])
    planted = plant(query_half, roles.train, options["seed"])
    rest = {
        "held_out": held[roles.reference_half],
        "held_out_groups": roles.held_out_patients[roles.reference_half],
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
        non_member_groups=roles.held_out_patients[roles.query_half][~planted.flags],
    )
    return recovered(leaking, planted.flags, clean, planted.rows), area.auc_ci


def _near_shares(
    space: Space,
    made: np.ndarray,
    training: np.ndarray,
    held: np.ndarray,
    threshold: float,
    seed: int,
) -> dict[str, Any]:
    """Shares of synthetic images within the threshold of a training and of a held-out image.

    Among equally many of each, with Wilson's intervals. A blurred or typical image is near to both;
    a copy is near to its source.
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
    """Findings without figures of single patients; the threshold is rounded to 2 digits."""
    figures = {
        item.name: getattr(found, item.name)
        for item in dataclasses.fields(found)
        if item.name not in PRIVATE
    }
    figures["threshold"] = float(f"{found.threshold:.2g}")
    if space.fitted:  # 0.5 is not neutral there
        figures |= {"closer_share": None, "closer_ci": None}
    return figures


def pairs_picture(search: CopySearch, synthetic: np.ndarray, train: ImageDataset) -> Image.Image:
    """Synthetic images above their nearest training images: the most exposed patients first.

    Outliers by their chance, then the smallest distances. Stays in the hospital.
    """
    found, outliers = search.found, search.outliers
    exposed = np.flatnonzero(outliers.flags)
    exposed = exposed[np.argsort(outliers.chances[exposed], kind="stable")]
    first = [(int(row), int(found.rows[row])) for row in exposed]
    rest = [(row, source) for row, source, _ in found.pairs if not outliers.flags[row]]
    shown = [*first, *rest][: len(found.pairs)]
    texts: list[str] = []
    rows: list[np.ndarray] = []
    for start in range(0, len(shown), COLUMNS):
        pairs = shown[start : start + COLUMNS]
        texts += ["synthetic", "training"]
        rows += [
            synthetic[[pair[0] for pair in pairs]],
            np.asarray(train.images[np.array([pair[1] for pair in pairs])]),
        ]
    return draw_grid(texts, rows, COLUMNS, (train.channels, train.resolution))
