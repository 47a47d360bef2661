"""Distances between two sets of features, and all that is said of a synthetic set beside its floor: arrays in, numbers out.

A distance means nothing without its extractor and its sample size: the Fréchet distance falls with the number of
images (arXiv 1911.07023), so the floor between two halves of the real images is taken at the same size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import t as student

from fedgan.apportion import apportion
from fedgan.evaluation.metrics.prdc import NEIGHBOURS, manifold_scores

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
LEVEL = 0.95
SPLITS = 8
BLOCK = 2048  # rows and columns of one tile of the kernel matrix
DOUBLE = 2048  # sets of up to so many rows have their kernel distance in float64 altogether
FEWEST_MIXED = (
    100  # rows in the label mix of a hospital below which the mix gives way before the number does
)
SURE = 3.0  # a share that is 1 in all of n images may be less by 3 / n: the rule of three

Numbers = dict[str, float | int | list[float] | None]


def frechet_gaussians(
    mean_x: ArrayLike, cov_x: ArrayLike, mean_y: ArrayLike, cov_y: ArrayLike
) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians (Dowson and Landau 1982; arXiv 1706.08500, eq. 6).

    |m_x - m_y|² + tr(S_x + S_y - 2 (S_x S_y)^½), means (D,), covariances (D, D) symmetric and positive semi-definite.
    With S_x = A Aᵀ and S_y = B Bᵀ the trace of the root is the sum of the singular values of Aᵀ B: exact also for
    covariances without full rank, where an iterative matrix root breaks down. Never negative.
    """
    difference = np.asarray(mean_x, np.float64) - np.asarray(mean_y, np.float64)
    x, y = _factor(np.asarray(cov_x, np.float64)), _factor(np.asarray(cov_y, np.float64))
    root_trace = np.linalg.svd(x.T @ y, compute_uv=False).sum()
    return float(
        max(difference @ difference + (x * x).sum() + (y * y).sum() - 2.0 * root_trace, 0.0)
    )


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance of Gaussians fitted to features x (N, D) and y (M, D), N, M ≥ 2 (arXiv 1706.08500, eq. 6).

    The same number as `frechet_gaussians` of the means and covariances, straight from the centred features: no
    covariance is made, which is faster, exact for fewer images than features, and squares no condition number.
    """
    (mean_x, root_x), (mean_y, root_y) = _gaussian(x), _gaussian(y)
    difference = mean_x - mean_y
    nuclear = torch.linalg.svdvals(root_x @ root_y.T).sum()
    distance = (
        difference @ difference + root_x.square().sum() + root_y.square().sum() - 2.0 * nuclear
    )
    return float(distance.clamp_min(0.0))


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """k(x, y) = (x·y / D + 1)³ of all pairs, (N, D) and (M, D) → (N, M) (arXiv 1801.01401, section 4)."""
    kernel: np.ndarray = (x @ y.T / x.shape[1] + 1.0) ** 3
    return kernel


def kernel_distance(x: np.ndarray, y: np.ndarray, block: int = BLOCK) -> float:
    """Unbiased estimate of MMD² with the polynomial kernel (Gretton et al. 2012, eq. 3; arXiv 1801.01401).

    Features x (N, D) and y (M, D), N, M ≥ 2. Around 0 for two samples of one distribution, and then as often negative
    as positive. All pairs count; tiles of `block` rows and columns bound the memory and change nothing but rounding.

    Beyond 2048 rows products are in float32, their sums in float64. The roundings average out over the pairs: at 4,000
    rows the value differed from that in float64 by a relative 4e-6 at most, and by 2e-5 for features whose mean was ten
    times their deviation. Up to 2048 rows all is in float64.
    """
    x, y = _checked(x), _checked(y)
    n, m = len(x), len(y)
    dtype = torch.float64 if max(n, m) <= DOUBLE else torch.float32
    a, b = (torch.from_numpy(features).to(dtype) for features in (x, y))
    within_x = _kernel_sum(a, a, block, within=True) / (n * (n - 1))
    within_y = _kernel_sum(b, b, block, within=True) / (m * (m - 1))
    return within_x + within_y - 2.0 * _kernel_sum(a, b, block) / (n * m)


def measures(real: np.ndarray, synthetic: np.ndarray, k: int = NEIGHBOURS) -> dict[str, float]:
    """All `MEASURES` of synthetic (M, D) against real (N, D) features; NaN for the four of neighbours where N or M ≤ k."""
    found = {
        "frechet": frechet_distance(real, synthetic),
        "kernel": kernel_distance(real, synthetic),
    }
    if min(len(real), len(synthetic)) > k:
        return {**found, **manifold_scores(real, synthetic, k)}
    return {**found, **dict.fromkeys(MEASURES[2:], float("nan"))}


def fidelity(
    real: np.ndarray,
    synthetic: np.ndarray,
    seed: int,
    splits: int = SPLITS,
    k: int = NEIGHBOURS,
    patients: np.ndarray | None = None,
) -> Numbers:
    """Every one of `MEASURES`, with an interval (`…_ci`) and beside its floor (`…_floor`), all at one sample size.

    real (N, D), synthetic (M, D), N ≥ 4, M ≥ 2. `splits` times the real images are cut at random into two disjoint
    halves of n = min(N // 2, M). Each half is compared with n synthetic images (other ones for the two halves where
    M ≥ 2n), and the halves with each other: that is the floor, what a perfect generator would reach. Means over the
    splits; `images` = `reference_images` = n, the images on each side of every comparison; `k` the neighbours.

    `patients` (N,), numbers or names: the rows of one patient stay in one half (but for one patient at the cut), or the
    floor would be of two sets that know each other.

    The interval is the mean ± the 95 % quantile of Student's t times the standard error from half differences
    (balanced half samples, McCarthy 1969): d is the difference between the figures of two disjoint halves of all that
    was drawn, real and synthetic, d² / 4 the variance of their mean, averaged over the splits. It says where the figure
    at n images a side would lie for other real and other synthetic images of the same kinds, in as great a number. It
    does not speak of another training run. It errs on the wide side: on Gaussians it held the value for fresh images in 97
    to 100 of 100 cases, at 1.1 to 2 times the width that would do (3 where a share is all but 1), for d uses 2n synthetic
    images and the mean more. For a share it reaches at least 3 / (2n) to each side (the rule of three), or a share
    of 1 in every split would look certain. There is no bootstrap here: an image drawn twice is its own neighbour at
    distance 0 and lowers the rank of a covariance, so that a resample with replacement is biased in all these measures.

    A measure that is not defined is None with its interval and floor: those of neighbours where n ≤ k.
    """
    real, synthetic = _checked(real), _checked(synthetic)
    n = min(len(real) // 2, len(synthetic))
    if n < 2:
        raise ValueError("fidelity needs at least four real and two synthetic images")
    if patients is not None and len(patients) != len(real):
        raise ValueError(f"{len(patients)} patients do not fit {len(real)} real images")
    values, differences, floors = [], [], []
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
        ):  # the two synthetic samples overlap: the difference is taken between disjoint ones, which are smaller
            parts = ((half, order[:m]), (other, order[-m:])) if m > 1 else ()
            pair = [_row(real[rows], synthetic[made], k) for rows, made in parts] or [
                np.full(len(MEASURES), np.nan)
            ] * 2
        differences.append(pair[0] - pair[1])
        floors.append(_row(real[half], real[other], k))
    return {
        **_table(np.array(values), np.array(differences), np.array(floors), n),
        "images": n,
        "reference_images": n,
        "k": k,
    }


def _table(values: np.ndarray, differences: np.ndarray, floors: np.ndarray, n: int) -> Numbers:
    """Means, intervals and floors from rows (splits, measures) of figures at n images, half differences and floors."""
    error = (
        np.sqrt(np.square(differences).mean(0)) / 2 * student.ppf((1 + LEVEL) / 2, len(differences))
    )
    error = np.where(
        [name in SHARES for name in MEASURES], np.maximum(error, SURE / (2 * n)), error
    )
    numbers: Numbers = {}
    for name, mean, width, floor in zip(
        MEASURES, values.mean(0), error, floors.mean(0), strict=True
    ):
        interval = [float(bound) for bound in np.clip([mean - width, mean + width], *RANGES[name])]
        numbers[name] = _defined(mean)
        numbers[f"{name}_ci"] = interval if np.isfinite(interval).all() else None
        numbers[f"{name}_reference"] = _defined(floor)
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
    """`fidelity` inside each group, given as name → (rows of real, rows of synthetic): a table by class or by hospital.

    None for a group in which the comparison would have fewer than 2k images a side (4k real, 2k synthetic ones): balls
    round fewer images say nothing.
    """
    tables: dict[str, Numbers | None] = {}
    for name, (rows, made) in groups.items():
        if min(len(rows) // 2, len(made)) < max(2 * k, 2):
            tables[name] = None
            continue
        inside = None if patients is None else np.asarray(patients)[rows]
        tables[name] = fidelity(real[rows], synthetic[made], seed, splits, k, inside)
    return tables


class LabelMix(NamedTuple):
    """Rows of a synthetic set in a hospital's mix of labels, none of them twice."""

    rows: np.ndarray  # (R,) shuffled
    deviation: float  # share of the rows that would have to have other labels for the mix to be the hospital's, in [0, 1]


def label_mix_rows(synthetic_labels: np.ndarray, target_labels: np.ndarray, seed: int) -> LabelMix:
    """Rows of a synthetic set, none twice, whose label vectors come in the proportions of target_labels.

    synthetic_labels (M, K), target_labels (N, K), multi-hot, whole vectors count. As many rows as the rarest vector lets
    have these proportions, by largest remainder: its supply over its share, be that far below M. Where that is fewer than
    min(`FEWEST_MIXED`, N), the quotas are those of so many rows and a vector that is too rare gives all it has: fewer rows
    then, in another mix, by `deviation`. No row is repeated in either case, for a copy is its own neighbour at
    distance 0. A vector of the target that no synthetic image has is left out and the rest keep their proportions
    (`missing_share` says how much that is, `deviation` is about the rest); no row at all where none occurs.
    """
    rng = np.random.default_rng(seed)
    made, target = _vector_numbers(synthetic_labels, target_labels)
    counts = np.bincount(
        target, minlength=int(max(made.max(initial=0), target.max(initial=0))) + 1
    ).astype(float)
    supply = np.bincount(made, minlength=len(counts))
    counts[supply == 0] = 0
    if counts.sum() == 0:
        return LabelMix(np.empty(0, np.int64), 0.0)
    share = counts / counts.sum()
    wanted = share > 0
    exact = int(np.floor((supply[wanted] / share[wanted]).min() + 1e-9))
    total = max(exact, min(FEWEST_MIXED, len(target)))
    quota = np.zeros(len(share), np.int64)
    quota[wanted] = apportion((share[wanted] * total).tolist(), total, tolerance=1e-9)
    quota = np.minimum(quota, supply)
    rows = [
        rng.permutation(np.flatnonzero(made == vector))[: quota[vector]]
        for vector in np.flatnonzero(quota)
    ]
    return LabelMix(
        rng.permutation(np.concatenate(rows)), float(np.abs(quota / quota.sum() - share).sum() / 2)
    )


def missing_share(synthetic_labels: np.ndarray, target_labels: np.ndarray) -> float:
    """Share of the target's images, in [0, 1], whose label vector no synthetic image has; 0 for no target image."""
    made, target = _vector_numbers(synthetic_labels, target_labels)
    return float(1.0 - np.isin(target, made).mean()) if len(target) else 0.0


def _vector_numbers(made: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A number for each row: equal vectors, equal numbers."""
    stacked = np.concatenate([np.asarray(made), np.asarray(target)]).astype(np.uint8)
    if stacked.shape[1] == 0:
        numbers = np.zeros(len(stacked), np.int64)
    else:
        numbers = np.unique(stacked, axis=0, return_inverse=True)[1].reshape(-1)
    return numbers[: len(made)], numbers[len(made) :]


def _halves(
    count: int, patients: np.ndarray | None, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint arrays of n rows of `count`."""
    order = rng.permutation(count)
    if patients is not None:
        number = np.unique(patients, return_inverse=True)[1].reshape(-1)
        place = rng.permutation(int(number.max()) + 1)
        order = order[np.argsort(place[number[order]], kind="stable")]
    return order[:n], order[n : 2 * n]


def _row(real: np.ndarray, synthetic: np.ndarray, k: int) -> np.ndarray:
    found = measures(real, synthetic, k)
    return np.array([found[name] for name in MEASURES])


def _defined(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _checked(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2 or not np.isfinite(features).all():
        raise ValueError(f"features must be (N, D), finite, N at least 2; got {features.shape}")
    return features


def _gaussian(features: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) and A (r, D), r = min(N, D), with Aᵀ A the covariance (N - 1 in the denominator)."""
    x = torch.from_numpy(_checked(features))
    centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    return x.mean(0), torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred


def _factor(covariance: np.ndarray) -> np.ndarray:
    """A with A Aᵀ = covariance; eigenvalues that rounding made negative count as zero."""
    values, vectors = np.linalg.eigh(covariance)
    factor: np.ndarray = vectors * np.sqrt(np.maximum(values, 0.0))
    return factor


def _kernel_sum(x: torch.Tensor, y: torch.Tensor, block: int, within: bool = False) -> float:
    """Sum of the kernel over all pairs; `within` one set (y is x) over the pairs of different rows, each tile taken once."""
    total = 0.0
    one = torch.ones((), dtype=x.dtype)
    tile_buffer, cube_buffer = torch.empty(
        2, min(block, len(x)) * min(block, len(y)), dtype=x.dtype
    )
    for i in range(0, len(x), block):
        for j in range(i if within else 0, len(y), block):
            rows, columns = x[i : i + block], y[j : j + block]
            size, shape = len(rows) * len(columns), (len(rows), len(columns))
            tile, cube = tile_buffer[:size].view(shape), cube_buffer[:size].view(shape)
            torch.addmm(one, rows, columns.t(), alpha=1.0 / x.shape[1], out=tile)
            if within and i == j:
                tile.fill_diagonal_(0.0)
            torch.mul(tile, tile, out=cube).mul_(tile)
            total += float(cube.sum(1).double().sum()) * (2.0 if within and j > i else 1.0)
    return total
