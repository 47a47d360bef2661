"""Copies of training images among synthetic ones, beside the same figures for held-out images.

arXiv 2402.01054 calls an image a copy when its similarity to a training image exceeds the 95th
percentile of the similarity between real images and their nearest ones in the other split. In
distances this is the 5th percentile: the threshold is the distance to the nearest training image
that only the closest 5 % of held-out images fall below.

The nearest of more rows is nearer, so compared sizes match:
- copying and held-out share: synthetic and held-out images are looked up in the same training rows;
- memorised share: grows with the number of queries, so it is also given for equally many of both
  sets;
- closer share: training and held-out images are the rows, both reduced to the smaller size.

All shares are in [0, 1], all intervals have 95 %. Only these may leave the hospital: pairs, rows
and distances concern single patients.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.special import betaincinv, gammaln

from fedgan.audit.attacks.nearest import Moves, nearest
from fedgan.evaluation.metrics.bootstrap import group_numbers, resamples
from fedgan.evaluation.metrics.intervals import (
    LEVEL,
    Interval,
    effective_size,
    newcombe_interval,
    percentile_interval,
    wilson_interval,
)


@dataclass(frozen=True)
class CopyFindings:
    """Result of `find_copies`. Distances are in the units of the features.

    `pairs`, `…distances` and `…rows` stay in the hospital. Shares of synthetic images:
    `copying_share` within the threshold of a training image, `closer_share` nearer to a training
    than to a held-out image. Shares of training images: `memorised_share` nearest to one copying
    image or more, at this number of synthetic images; `memorised_matched` expected at
    `matched_images`, the smaller of both sets; `memorised_held_out` of as many held-out images.
    `held_out_share`: held-out images within the threshold. `excess`: copying_share -
    held_out_share.
    """

    threshold: float
    copying_share: float
    copying_ci: Interval  # Wilson, synthetic images are independent draws
    memorised_share: float
    memorised_ci: Interval  # Wilson over training images (patients)
    held_out_share: float
    held_out_ci: Interval  # exact, of all such real images, given this threshold
    excess: float
    excess_ci: Interval  # Newcombe
    pairs: tuple[
        tuple[int, int, float], ...
    ]  # (synthetic row, training row, distance), nearest first
    reference_images: int  # training images looked up
    held_out_images: int
    synthetic_images: int
    memorised_matched: float
    memorised_matched_ci: Interval
    memorised_held_out: float
    memorised_held_out_ci: Interval
    matched_images: int
    closer_share: float
    closer_ci: Interval
    distances: np.ndarray = field(repr=False, compare=False)  # (S,) to the nearest training image
    rows: np.ndarray = field(repr=False, compare=False)  # (S,) that training image
    real_distances: np.ndarray = field(repr=False, compare=False)  # (H,), of held-out images
    real_rows: np.ndarray = field(repr=False, compare=False)  # (H,)


def find_copies(
    synthetic: np.ndarray,
    training: np.ndarray,
    held_out: np.ndarray,
    *,
    seed: int,
    percentile: float = 5.0,
    bootstrap: int = 1000,
    most_pairs: int = 24,
    moves: Moves | None = None,
    training_groups: np.ndarray | None = None,
    held_out_groups: np.ndarray | None = None,
) -> CopyFindings:
    """Find copies of `training` (N, F) in `synthetic` (S, F), with reference `held_out` (H, F).

    `held_out` has the same distribution as `training`. `percentile` of the held-out distances is
    the threshold, in (0, 50]. `seed` and `bootstrap` are used by the closer share only: everything
    else is exact. `moves`: see `nearest`. `…_groups` (N,), (H,): the patient of each image;
    intervals then assume that a patient's images are all alike. `pairs` are the nearest ones,
    copies or not. Raises `ValueError` for sets that do not fit or are too small.
    """
    for name, rows in (("synthetic", synthetic), ("training", training), ("held_out", held_out)):
        if len(rows) < 2:
            raise ValueError(f"{name} needs two images or more, not {len(rows)}")
    distances, nearest_rows = nearest(synthetic, training, moves=moves)
    real_distances, real_rows = nearest(held_out, training, moves=moves)
    shares = compare(distances, real_distances, percentile, real_groups=held_out_groups)
    copies, real_copies = distances <= shares.threshold, real_distances <= shares.threshold
    matched = min(len(copies), len(real_copies))
    patients = effective_size(len(training), training_groups)
    hits, real_hits = (
        np.bincount(rows[flags], minlength=len(training))
        for rows, flags in ((nearest_rows, copies), (real_rows, real_copies))
    )
    memorised = float((hits > 0).mean())
    memorised_matched, memorised_held_out = (
        _hit_share(h, len(f), matched) for h, f in ((hits, copies), (real_hits, real_copies))
    )
    closer, closer_ci = closer_share(
        synthetic,
        training,
        held_out,
        seed=seed,
        bootstrap=bootstrap,
        moves=moves,
        groups=(training_groups, held_out_groups),
    )
    order = np.argsort(distances, kind="stable")[:most_pairs]
    return CopyFindings(
        threshold=shares.threshold,
        copying_share=shares.share,
        copying_ci=shares.share_ci,
        memorised_share=memorised,
        memorised_ci=wilson_interval(memorised, patients),
        held_out_share=shares.real_share,
        held_out_ci=shares.real_ci,
        excess=shares.excess,
        excess_ci=shares.excess_ci,
        pairs=tuple((int(row), int(nearest_rows[row]), float(distances[row])) for row in order),
        reference_images=len(training),
        held_out_images=len(held_out),
        synthetic_images=len(synthetic),
        memorised_matched=memorised_matched,
        memorised_matched_ci=wilson_interval(memorised_matched, patients),
        memorised_held_out=memorised_held_out,
        memorised_held_out_ci=wilson_interval(memorised_held_out, patients),
        matched_images=matched,
        closer_share=closer,
        closer_ci=closer_ci,
        distances=distances,
        rows=nearest_rows,
        real_distances=real_distances,
        real_rows=real_rows,
    )


@dataclass(frozen=True)
class Shares:
    """Two shares at one threshold and their difference."""

    threshold: float
    share: float
    share_ci: Interval
    real_share: float
    real_ci: Interval
    excess: float
    excess_ci: Interval


def compare(
    distances: np.ndarray,
    real_distances: np.ndarray,
    percentile: float,
    *,
    groups: np.ndarray | None = None,
    real_groups: np.ndarray | None = None,
) -> Shares:
    """Shares of `distances` (S,) and `real_distances` (H,) up to the `percentile` of the real ones.

    Wilson's interval for the first; the exact one of an order statistic for the second, which
    expresses the uncertainty of the threshold; Newcombe's of both for the excess. No bootstrap: its
    intervals are too narrow with few held-out images (simulated with 20 images, 95 % intervals
    covered 67 to 83 %, these 92 to 98 %). `…_groups`: see `effective_size`.
    """
    threshold = closest(real_distances, percentile)
    flags, real_flags = distances <= threshold, real_distances <= threshold
    share, real_share = float(flags.mean()), float(real_flags.mean())
    share_ci = wilson_interval(share, effective_size(len(flags), groups))
    real_ci = _population_share(real_share, effective_size(len(real_flags), real_groups))
    excess_ci = newcombe_interval(share, share_ci, real_share, real_ci)
    return Shares(threshold, share, share_ci, real_share, real_ci, share - real_share, excess_ci)


def release_threshold(
    training: np.ndarray,
    held_out: np.ndarray,
    percentile: float = 1.0,
    *,
    moves: Moves | None = None,
) -> float:
    """Distance to `training` (N, F) of the closest `percentile` of `held_out` (H, F).

    The release filter drops synthetic images up to this distance: about the same share of images
    that copy nothing. With fewer than 100 / `percentile` held-out images it is their smallest
    distance, which drops more: on average the share 1 / (H + 1).
    """
    return closest(nearest(held_out, training, moves=moves)[0], percentile)


def closest(distances: np.ndarray, percentile: float) -> float:
    """The k-th smallest of `distances` (H,), k = `percentile` of H rounded down, at least 1.

    An order statistic, not interpolated: the share of the population at or below it is Beta(k, H +
    1 - k) for any distribution (David and Nagaraja 2003, section 2.5).
    """
    if not 0 < percentile <= 50:
        raise ValueError(f"percentile must be above 0 and at most 50, not {percentile}")
    k = max(1, int(len(distances) * percentile / 100 + 1e-9))
    return float(np.partition(distances, k - 1)[k - 1])


def closer_share(
    queries: np.ndarray,
    training: np.ndarray,
    held_out: np.ndarray,
    *,
    seed: int,
    bootstrap: int = 1000,
    moves: Moves | None = None,
    groups: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
) -> tuple[float, Interval]:
    """Share of `queries` (Q, F) nearer to a training than to a held-out image; 0.5 is neutral.

    Needs no threshold, and blurred or typical queries do not change it, as they are near to both.
    min(N, H) rows of each are drawn by `seed`. Percentile bootstrap over these rows (over patients
    with `groups`), because few rows can attract many queries; a resampled row keeps its queries.
    Only for features that are not fitted to the training images: a network separates the images it
    was trained on, and 0.5 is then not neutral.
    """
    rng = np.random.default_rng(seed)
    size = min(len(training), len(held_out))
    chosen = [np.sort(rng.choice(len(rows), size, replace=False)) for rows in (training, held_out)]
    base = np.concatenate([training[chosen[0]], held_out[chosen[1]]])
    attracted = np.bincount(nearest(queries, base, moves=moves)[1], minlength=2 * size)
    sums = []
    for start, rows, names in zip((0, size), chosen, groups, strict=True):
        counts = attracted[start : start + size].astype(np.float64)
        numbers = group_numbers(None if names is None else np.asarray(names)[rows], size)
        sums.append(
            np.concatenate([weights @ counts for weights in resamples(numbers, bootstrap, rng)])
        )
    totals = np.maximum(sums[0] + sums[1], 1.0)  # no query attracted: rare, the share is 0 then
    share = float(attracted[:size].sum() / attracted.sum())
    return share, percentile_interval(sums[0] / totals)


def _population_share(share: float, count: float) -> Interval:
    """Interval of the population's share up to a k-th smallest distance, k = `share` · `count`."""
    k = min(max(share * count, 1.0), count)  # the smallest distance is the lowest threshold
    low, high = betaincinv(k, count + 1 - k, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _hit_share(hits: np.ndarray, drawn: int, most: int) -> float:
    """Expected share of rows hit at least once by `most` of the `drawn` images (rarefaction).

    `hits` (N,): number of copying images whose nearest row it is. A row of h hits is missed by
    `most` images drawn without replacement with probability C(drawn - h, most) / C(drawn, most)
    (Hurlbert 1971).
    """
    counts = hits[hits > 0].astype(np.float64)
    possible = drawn - counts >= most
    left = np.where(possible, drawn - counts, most)

    def log_choose(n: np.ndarray | float) -> np.ndarray:
        return gammaln(np.add(n, 1.0)) - gammaln(np.add(n, 1.0) - most) - gammaln(most + 1.0)

    missed = np.where(possible, np.exp(log_choose(left) - log_choose(float(drawn))), 0.0)
    return float((1 - missed).sum() / len(hits))
