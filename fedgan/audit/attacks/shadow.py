"""Calibration by shadow models: generators trained as the audited one was, of which it is known who was in.

An image may score high because it is easy and not because it was trained on. The score that models give it that never
saw it says how easy it is.
"""

from __future__ import annotations

import numpy as np

from fedgan.errors import ConfigError
from fedgan.evaluation.metrics.bootstrap import group_numbers

SHADOWS_FOR_OWN_SPREAD = (
    64  # shadows from which on each image's own standard deviation is used (arXiv 2112.03570)
)


def deal_shadows(
    rows: int, shadows: int, seed: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """Which shadow model is trained with which rows: (J, N) bool, every row in exactly half of the shadows.

    Shadows come in pairs that share the rows between them (arXiv 2112.03570). `rows` counts members and
    non-members together, for a shadow must treat both alike; `groups` (N,): patients, who go in or stay out as a whole, so
    that a pair divides patients in half and images nearly so. Raises `ConfigError` unless `shadows` is even and at least 2,
    and for fewer than two groups.
    """
    numbers = group_numbers(groups, rows)
    total = int(numbers.max()) + 1 if rows else 0
    if shadows < 2 or shadows % 2 or total < 2:
        raise ConfigError(
            f"{shadows} shadow models of {total} patients or images: give an even number of models, 2 of each at least"
        )
    rng = np.random.default_rng(seed)
    inside = np.zeros((shadows, total), bool)
    for first in range(0, shadows, 2):
        inside[first, rng.permutation(total)[: total // 2]] = True
        inside[first + 1] = ~inside[first]
    return inside[:, numbers]


def calibrated_scores(
    target_scores: np.ndarray, shadow_scores: np.ndarray, trained_with: np.ndarray | None = None
) -> np.ndarray:
    """Score (N,) of the audited model minus the mean score of the shadows that never saw the image (arXiv 2111.08440).

    `target_scores` (N,), `shadow_scores` (J, N) by the same attack, higher for members; `trained_with` (J, N) bool from
    `deal_shadows`, or None where no shadow was trained with any of these images (one reference model is enough then).
    Raises `ValueError` for shapes that do not fit and where an image was in every shadow.
    """
    target, shadows, inside = _checked(target_scores, shadow_scores, trained_with)
    outside = ~inside
    if not outside.any(0).all():
        raise ValueError(
            "some images were in every shadow model: calibrate with a model that never saw them"
        )
    return target - (shadows * outside).sum(0) / outside.sum(0)


def likelihood_ratio_scores(
    target_scores: np.ndarray, shadow_scores: np.ndarray, trained_with: np.ndarray
) -> np.ndarray:
    """log N(s; µ_in, σ_in) - log N(s; µ_out, σ_out) (N,) of each image's score s under both kinds of shadows.

    The online attack of LiRA (arXiv 2112.03570, algorithm 1): Gaussians fitted for each image to the shadows with and
    without it. With fewer than 64 shadows the spreads are those of all images together, as it recommends.
    Arguments as of `calibrated_scores`. Raises `ValueError` where an image was in fewer than two shadows or missing from
    fewer than two (a spread needs two): deal at least four.
    """
    target, shadows, inside = _checked(target_scores, shadow_scores, trained_with)
    if min(inside.sum(0).min(initial=2), (~inside).sum(0).min(initial=2)) < 2:
        raise ValueError(
            "each image must be in two shadow models and missing from two: deal four or more with `deal_shadows`"
        )
    value = np.zeros(len(target))
    for sign, chosen in ((1.0, inside), (-1.0, ~inside)):
        counts = chosen.sum(0)
        mean = (shadows * chosen).sum(0) / counts
        squares = ((shadows - mean) ** 2 * chosen).sum(0)
        if len(shadows) >= SHADOWS_FOR_OWN_SPREAD:
            variance = squares / (counts - 1)
        else:
            variance = np.full(len(target), squares.sum() / (counts - 1).sum())
        variance = np.maximum(
            variance, 1e-12 + 1e-6 * float(shadows.var())
        )  # scores may agree to the last bit
        value -= sign * 0.5 * ((target - mean) ** 2 / variance + np.log(variance))
    return value


def _checked(
    target_scores: np.ndarray, shadow_scores: np.ndarray, trained_with: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    target, shadows = np.asarray(target_scores, np.float64), np.asarray(shadow_scores, np.float64)
    inside = (
        np.zeros(shadows.shape, bool) if trained_with is None else np.asarray(trained_with, bool)
    )
    if (
        target.ndim != 1
        or shadows.ndim != 2
        or shadows.shape[1:] != target.shape
        or len(shadows) == 0
        or inside.shape != shadows.shape
    ):
        raise ValueError(
            f"scores {target.shape}, shadows' scores {shadows.shape} and who was in {inside.shape} are no (N,), (J, N), (J, N)"
        )
    return target, shadows, inside
