"""Fidelity of a synthetic set: Fréchet and kernel distance, PRDC, each with its real-to-real value.

Every figure depends on the extractor and on the sample size (the Fréchet distance falls with the
number of images, arXiv 1911.07023). So each has a reference value: the same figure between two
disjoint halves of the real images, at the same size.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.special import stdtrit

from fedgan.evaluation.metrics.frechet_distance import checked_features, frechet_distance
from fedgan.evaluation.metrics.intervals import LEVEL
from fedgan.evaluation.metrics.kernel_distance import kernel_distance
from fedgan.evaluation.metrics.prdc import NEIGHBOURS, prdc

MEASURES = ("frechet", "kernel", "precision", "recall", "density", "coverage")
RANGES = {
    "frechet": (0.0, np.inf),
    "kernel": (-np.inf, np.inf),
    "precision": (0.0, 1.0),
    "recall": (0.0, 1.0),
    "density": (0.0, np.inf),
    "coverage": (0.0, 1.0),
}
SHARES = ("precision", "recall", "coverage")
SPLITS = 8
RULE_OF_THREE = 3.0  # a share that is 1 in all of n images may be less by 3 / n

Numbers = dict[str, float | int | list[float] | None]


def measures(real: np.ndarray, synthetic: np.ndarray, k: int = NEIGHBOURS) -> dict[str, float]:
    """All `MEASURES` of synthetic (M, D) and real (N, D) features; PRDC is NaN where N or M ≤ k."""
    found = {
        "frechet": frechet_distance(real, synthetic),
        "kernel": kernel_distance(real, synthetic),
    }
    if min(len(real), len(synthetic)) > k:
        return {**found, **prdc(real, synthetic, k)}
    return {**found, **dict.fromkeys(MEASURES[2:], float("nan"))}


def fidelity(
    real: np.ndarray,
    synthetic: np.ndarray,
    seed: int,
    splits: int = SPLITS,
    k: int = NEIGHBOURS,
    patients: np.ndarray | None = None,
) -> Numbers:
    """Every one of `MEASURES` with an interval (`…_ci`) and its reference value (`…_reference`).

    real (N, D), synthetic (M, D), N ≥ 4, M ≥ 2. The real images are cut at random, `splits` times,
    into two disjoint halves of n = min(N // 2, M). Each half is compared with n synthetic images
    (different ones for the two halves where M ≥ 2n), and the halves with each other: this is the
    reference value, which a perfect generator would reach. Figures are means over the splits.
    `images` = `reference_images` = n, the images on each side of every comparison; `k`: the
    neighbours.

    `patients` (N,), numbers or names: rows of one patient stay in one half (except for one patient
    at the cut), so that the halves are independent.

    Interval: mean ± the 95 % quantile of Student's t times the standard error from half differences
    (balanced half samples, McCarthy 1969). d is the difference between the figures of two disjoint
    halves of all real and synthetic images, and d² / 4, averaged over the splits, is the variance
    of their mean. It covers the figure at n images per side for other real and synthetic images of
    the same kinds and number, not for another training run. It is conservative: on Gaussians it
    covered the value of fresh images in 97 to 100 of 100 cases, at 1.1 to 2 times the necessary
    width (3 for a share close to 1), because d uses 2n synthetic images and the mean uses more. For
    a share it reaches at least 3 / (2n) to each side (rule of three). There is no bootstrap: an
    image that occurs twice is its own neighbour at distance 0 and lowers the rank of a covariance,
    so resampling with replacement biases all these measures.

    An undefined measure is None, as are its interval and reference value: PRDC where n ≤ k.
    """
    real, synthetic = checked_features(real), checked_features(synthetic)
    n = min(len(real) // 2, len(synthetic))
    if n < 2:
        raise ValueError("fidelity needs at least four real and two synthetic images")
    if patients is not None and len(patients) != len(real):
        raise ValueError(f"{len(patients)} patients do not fit {len(real)} real images")
    values, differences, references = [], [], []
    for split in range(splits):
        half, other = _halves(len(real), patients, n, np.random.default_rng([seed, 0, split]))
        order = np.random.default_rng([seed, 1, split]).permutation(len(synthetic))
        pair = [
            _row(real[rows], synthetic[made], k)
            for rows, made in ((half, order[:n]), (other, order[-n:]))
        ]
        values += pair
        m = len(synthetic) // 2
        if (
            m < n
        ):  # the synthetic samples overlap: take the difference between smaller disjoint ones
            parts = ((half, order[:m]), (other, order[-m:])) if m > 1 else ()
            pair = [_row(real[rows], synthetic[made], k) for rows, made in parts] or [
                np.full(len(MEASURES), np.nan)
            ] * 2
        differences.append(pair[0] - pair[1])
        references.append(_row(real[half], real[other], k))
    return {
        **_table(np.array(values), np.array(differences), np.array(references), n),
        "images": n,
        "reference_images": n,
        "k": k,
    }


def _table(values: np.ndarray, differences: np.ndarray, references: np.ndarray, n: int) -> Numbers:
    """Means, intervals and reference values from rows (splits, measures) at n images per side."""
    error = np.sqrt(np.square(differences).mean(0)) / 2 * stdtrit(len(differences), (1 + LEVEL) / 2)
    error = np.where(
        [name in SHARES for name in MEASURES], np.maximum(error, RULE_OF_THREE / (2 * n)), error
    )
    numbers: Numbers = {}
    for name, mean, width, reference in zip(
        MEASURES, values.mean(0), error, references.mean(0), strict=True
    ):
        interval = [float(bound) for bound in np.clip([mean - width, mean + width], *RANGES[name])]
        numbers[name] = _defined(mean)
        numbers[f"{name}_ci"] = interval if np.isfinite(interval).all() else None
        numbers[f"{name}_reference"] = _defined(reference)
    return numbers


def grouped_fidelity(
    real: np.ndarray,
    synthetic: np.ndarray,
    groups: Mapping[str, tuple[np.ndarray, np.ndarray]],
    seed: int,
    splits: int = SPLITS,
    k: int = NEIGHBOURS,
    patients: np.ndarray | None = None,
) -> dict[str, Numbers | None]:
    """`fidelity` inside each group, name → (real rows, synthetic rows): by class or by hospital.

    None for a group with fewer than 2k images per side (4k real, 2k synthetic ones): neighbourhoods
    of fewer images have no meaning.
    """
    tables: dict[str, Numbers | None] = {}
    for name, (rows, made) in groups.items():
        if min(len(rows) // 2, len(made)) < max(2 * k, 2):
            tables[name] = None
            continue
        inside = None if patients is None else np.asarray(patients)[rows]
        tables[name] = fidelity(real[rows], synthetic[made], seed, splits, k, inside)
    return tables


def _halves(
    count: int, patients: np.ndarray | None, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint arrays of n rows of `count`."""
    order = rng.permutation(count)
    if patients is not None:
        number = np.unique(patients, return_inverse=True)[1].reshape(-1)
        position = rng.permutation(int(number.max()) + 1)
        order = order[np.argsort(position[number[order]], kind="stable")]
    return order[:n], order[n : 2 * n]


def _row(real: np.ndarray, synthetic: np.ndarray, k: int) -> np.ndarray:
    found = measures(real, synthetic, k)
    return np.array([found[name] for name in MEASURES])


def _defined(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
