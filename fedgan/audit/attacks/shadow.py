"""Calibration by shadow models: generators trained like the audited one with known members.

An image may score high because it is easy, not because it was trained on. The scores of models that
were not trained on it measure how easy it is.
"""

from __future__ import annotations

import numpy as np

from fedgan.errors import ConfigError
from fedgan.evaluation.metrics.bootstrap import group_numbers

SHADOWS_FOR_OWN_SPREAD = 64  # from here each image has its own variance (arXiv 2112.03570)


def assign_shadows(
    rows: int, shadows: int, seed: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """Which shadow model is trained with which rows: (J, N) bool, every row in half of the shadows.

    Shadows come in complementary pairs (arXiv 2112.03570). `rows` counts members and non-members,
    because a shadow must treat both alike. `groups` (N,): patients, who are in or out as a whole,
    so a pair halves the patients and approximately the images. Raises `ConfigError` unless
    `shadows` is even and at least 2, and for fewer than two groups.
    """
    numbers = group_numbers(groups, rows)
    total = int(numbers.max()) + 1 if rows else 0
    if shadows < 2 or shadows % 2 or total < 2:
        raise ConfigError(
            f"{shadows} shadow models of {total} patients or images: give an even number of models "
            "and at least 2 of each"
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
    """Score (N,) of the model minus the mean score of models with and without the image (RMIA).

    RMIA (arXiv 2312.03262) ranks x by P over z of (P(x|θ) / P(x)) / (P(z|θ) / P(z)) ≥ γ, where P(x)
    is the mean over reference models, half of them trained with x. For one model θ that is a
    monotone function of P(x|θ) / P(x), whatever γ and the population of z: the ratio alone has the
    same ROC curve. Here it is a difference, because scores are logarithms of likelihoods, or none.

    `target_scores` (N,), `shadow_scores` (J, N) of the same attack, higher for members;
    `trained_with` (J, N) bool from `assign_shadows`. Where no shadow was trained with an image, the
    mean is over those without it (offline). Raises `ValueError` for shapes that do not fit and for
    an image in every shadow.
    """
    target, shadows, inside = _checked(target_scores, shadow_scores, trained_with)
    if inside.all(0).any():
        raise ValueError(
            "some images were in every shadow model: "
            "calibrate with a model that was not trained on them"
        )
    with_it, without_it = (
        (shadows * chosen).sum(0) / np.maximum(chosen.sum(0), 1) for chosen in (inside, ~inside)
    )
    return target - np.where(inside.any(0), (with_it + without_it) / 2, without_it)


def likelihood_ratio_scores(
    target_scores: np.ndarray, shadow_scores: np.ndarray, trained_with: np.ndarray
) -> np.ndarray:
    """log N(s; µ_in, σ_in) - log N(s; µ_out, σ_out), (N,), of each image's score s (LiRA).

    The online attack (arXiv 2112.03570, algorithm 1): Gaussians per image, fitted to the shadows
    with and without it. With fewer than 64 shadows variances are pooled over all images, as the
    paper recommends. Arguments as in `calibrated_scores`. Raises `ValueError` where an image was
    in, or not in, fewer than two shadows: train at least four.
    """
    target, shadows, inside = _checked(target_scores, shadow_scores, trained_with)
    if min(inside.sum(0).min(initial=2), (~inside).sum(0).min(initial=2)) < 2:
        raise ValueError(
            "each image must be in two shadow models and absent from two: "
            "assign four or more with `assign_shadows`"
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
        # Scores may be equal to the last bit.
        variance = np.maximum(variance, 1e-12 + 1e-6 * float(shadows.var()))
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
            f"scores {target.shape}, shadow scores {shadows.shape} and membership {inside.shape} "
            "are not (N,), (J, N), (J, N)"
        )
    return target, shadows, inside
