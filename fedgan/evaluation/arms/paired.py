"""Paired comparison of arms: difference of two macro AUCs on the same real test images.

Both arms get the same bootstrap resamples of patients, so variance that both share cancels out.
Intervals and p-values are over test images (another sample of patients), not over trainings with
another seed: that spread is in `seed_differences`. A resample without a class of the macro mean is
left out, as in `utility`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedgan.errors import ConfigError, DataError
from fedgan.evaluation.metrics.bootstrap import CHUNK, interval, resamples
from fedgan.evaluation.metrics.utility import finite_or_none

LEVEL = 0.05  # a difference counts as shown below this (adjusted) two-sided p-value
# Resamples per pair of a family: Holm's smallest p-value of m pairs is then 2m / (100m + 1) < 0.02.
DRAWS_PER_PAIR = 100
FEDERATED = ("federated", "finetuned")
NOTE = (
    "Intervals and p-values of differences between arms are over the real test images (resampled "
    "patients, the same for both arms); the spread between trainings with different seeds is given "
    "beside them. The p-values have Holm's correction within each family; the intervals and "
    "non-inferiority (one-sided at 2.5 %) are not adjusted."
)


class Auc(NamedTuple):
    """A macro AUC with its bootstrap; two with the same images and seed are paired draw by draw."""

    value: float
    draws: np.ndarray  # (B,)


def macro_auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Macro AUC (B,) for scores (S, N, K), labels (N, K) and image weights (B, N).

    The mean over classes and seeds, equal to `utility.statistics(...)["macro_auc"]`. The weighted
    share of correctly ordered pairs (Hanley and McNeil 1982) is linear in the matrix of ordered
    pairs, so the seeds are averaged in that matrix and all resamples are one matrix product.
    Classes without positive or without negative images are not part of the mean; NaN where a row
    of weights leaves a class of the mean without either.
    """
    parts = []
    for k in range(labels.shape[1]):
        positive, negative = np.flatnonzero(labels[:, k] == 1), np.flatnonzero(labels[:, k] != 1)
        if len(positive) == 0 or len(negative) == 0:
            continue
        ordered = np.zeros(len(weights))
        step = max(1, CHUNK // len(negative))
        for start in range(0, len(positive), step):
            rows = positive[start : start + step]
            ordered += np.einsum(
                "bn,bn->b",
                weights[:, rows] @ _ordered(scores[:, :, k], rows, negative),
                weights[:, negative],
            )
        pairs = weights[:, positive].sum(1) * weights[:, negative].sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append(np.where(pairs > 0, ordered / pairs, np.nan))
    result: np.ndarray = np.mean(parts, axis=0) if parts else np.full(len(weights), np.nan)
    return result


def _ordered(scores: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """(P, Q): share of the seeds (S, N) with a positive above a negative; a tie counts one half."""
    total = np.zeros((len(positive), len(negative)))
    for seed in scores:
        above, below = seed[positive][:, None], seed[negative][None, :]
        total += (above > below) + 0.5 * (above == below)
    return total / len(scores)


def bootstrap_auc(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, bootstrap: int, seed: int
) -> Auc:
    """Macro AUC of scores (S, N, K) on labels (N, K), with draws over clusters `groups` (N,)."""
    _check(scores, labels, groups)
    value = macro_auc(scores, labels, np.ones((1, len(labels))))[0]
    draws = [macro_auc(scores, labels, rows) for rows in resamples(groups, bootstrap, seed)]
    return Auc(float(value), np.concatenate(draws))


def difference(a: Auc, b: Auc, margin: float) -> dict[str, Any]:
    """`difference` (a − b) in AUC, its 95 % `ci`, `p_value`, `margin`, `non_inferior`, `better`.

    `p_value` is two-sided, by inversion of the percentile interval (Efron and Tibshirani 1993,
    ch. 15): the level at which the interval excludes 0, counted as (1 + n) / (B + 1), so that it
    is never 0. `non_inferior`: the lower end of the two-sided 95 % interval lies above −margin,
    which is a one-sided test at 2.5 %. `better`: the difference is positive and the p-value below
    0.05. An undefined value is None.
    """
    draws = a.draws - b.draws
    ci = interval(draws)
    finite = draws[np.isfinite(draws)]
    value = finite_or_none(a.value - b.value)
    p_value = None
    if ci is not None and value is not None:
        fewer = min((finite <= 0).sum(), (finite >= 0).sum())
        p_value = min(1.0, 2.0 * (1.0 + float(fewer)) / (len(finite) + 1.0))
    return {
        "difference": value,
        "ci": ci,
        "p_value": p_value,
        "margin": margin,
        "non_inferior": None if ci is None else ci[0] > -margin,
        "better": None if p_value is None or value is None else value > 0 and p_value < LEVEL,
    }


def paired_difference(
    scores_a: np.ndarray,
    scores_b: np.ndarray,
    labels: np.ndarray,
    exclusive: bool,
    groups: np.ndarray,
    margin: float,
    bootstrap: int,
    seed: int,
    seeds_a: Sequence[int] | None = None,
    seeds_b: Sequence[int] | None = None,
) -> dict[str, Any]:
    """`difference` of the macro AUC of scores_a (S, N, K) and scores_b (T, N, K) on N test images.

    Each AUC is the mean over classes and over all rows of scores (classifier × generator seeds).
    `exclusive`: labels (N, K) are one-hot, which is checked. `seeds_a` and `seeds_b` give the
    generator seed of each row of scores. Where both are known, only the rows of common seeds are
    compared, `seeds` lists these and `seed_differences` is [{seed, difference}]; where one is
    known, `seeds` are its seeds; an unknown value is None. `images` is N. Raises `DataError` when
    scores, labels and groups are not of the same images.
    """
    _check_exclusive(labels, exclusive)
    both = (
        _Arm(scores_a, labels, groups, bootstrap, seed, seeds_a),
        _Arm(scores_b, labels, groups, bootstrap, seed, seeds_b),
    )
    return _paired(*both, margin)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order (Holm 1979): family-wise error at most 5 %."""
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def compare_arms(
    arms: Mapping[str, np.ndarray],
    families: Mapping[str, Sequence[tuple[str, str]]],
    labels: np.ndarray,
    exclusive: bool,
    groups: np.ndarray,
    margin: float,
    bootstrap: int,
    seed: int,
    generator_seeds: Mapping[str, Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """`comparisons` of comparison.json: one row per pair (a, b) of each family, in order.

    `arms`: each arm's scores (S, N, K); `generator_seeds`: the generator seed of each row of them.
    A row is that of `paired_difference` with `family`, `a`, `b`, `metric` and `p_holm`; `better`
    needs an adjusted p-value below 0.05. A pair with a missing arm, or without a common seed, is a
    row of None, and Holm counts the measured pairs only. Each arm is resampled once per set of its
    seeds, with the same patients, `bootstrap` times or 100 times the pairs of the largest family,
    if that is more: the smallest p-value of B resamples is 2 / (B + 1), and Holm's multiple of it
    must be able to fall below 0.05. Raises `DataError` as `paired_difference` does.
    """
    _check_exclusive(labels, exclusive)
    largest = max((len(pairs) for pairs in families.values()), default=0)
    bootstrap = max(bootstrap, DRAWS_PER_PAIR * largest)
    seeds = generator_seeds or {}
    known = {
        name: _Arm(scores, labels, groups, bootstrap, seed, seeds.get(name))
        for name, scores in arms.items()
    }
    rows: list[dict[str, Any]] = []
    for family, pairs in families.items():
        members = []
        for a, b in pairs:
            row: dict[str, Any] = {"family": family, "a": a, "b": b, "metric": "macro_auc"}
            row |= _paired(known.get(a), known.get(b), margin)
            members.append({**row, "images": len(labels), "p_holm": None})
        counted = [row for row in members if row["p_value"] is not None]
        for row, p_holm in zip(counted, holm([row["p_value"] for row in counted]), strict=True):
            row |= {"p_holm": p_holm, "better": row["difference"] > 0 and p_holm < LEVEL}
        rows += members
    return rows


def standard_families(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """The families of every comparison, from `arm`, `name` and `hospital` of the summary's rows.

    "federation": each federated (or fine-tuned) arm against centralised training, against the
    pooled releases of the hospitals alone, against each hospital alone with its share of the budget
    and, where trained, with the whole budget (the "coalition NAME" of one member); and those pooled
    releases against centralised training. "against real": each arm, but no single hospital, against
    training on real images. Larger coalitions serve the contribution of hospitals only.
    """
    whole = [row for row in rows if row.get("hospital") is None]

    def names(*kinds: str) -> list[str]:
        return [row["name"] for kind in kinds for row in whole if row["arm"] == kind]

    alone = [
        row["name"] for row in rows if row.get("hospital") is not None and row["arm"] == "local"
    ]
    rivals = [*names("centralized", "local"), *alone]
    rivals += [name for name in names("coalition") if "+" not in name]
    federated = [row["name"] for row in whole if row["arm"] in FEDERATED]
    generated = [row["name"] for row in whole if row["arm"] in ("centralized", *FEDERATED, "local")]
    families = {
        "federation": [(one, other) for one in federated for other in rivals]
        + [(one, other) for one in names("local") for other in names("centralized")],
        "against real": [(one, real) for one in generated for real in names("real")],
    }
    return {family: pairs for family, pairs in families.items() if pairs}


class _Arm:
    """Scores (S, N, K) of an arm and their generator seeds; resampled once per set of seeds."""

    def __init__(
        self,
        scores: np.ndarray,
        labels: np.ndarray,
        groups: np.ndarray,
        bootstrap: int,
        seed: int,
        seeds: Sequence[int] | None,
    ) -> None:
        if seeds is not None and len(seeds) not in (0, len(scores)):
            raise ConfigError(
                f"{len(seeds)} generator seeds for {len(scores)} rows of scores: give the seed of "
                "each row"
            )
        self.scores, self.labels, self.groups = scores, labels, groups
        self.bootstrap, self.seed = bootstrap, seed
        self.row_seeds = np.asarray([] if seeds is None else seeds)  # empty: unknown
        self.seeds = sorted({int(one) for one in self.row_seeds}) or None
        self._auc: dict[tuple[int, ...] | None, Auc] = {}
        self._auc_of_seed: dict[int, float] = {}

    def auc(self, seeds: Sequence[int] | None) -> Auc:
        """Over the rows of some seeds, or over all rows (None)."""
        key = None if seeds is None or seeds == self.seeds else tuple(seeds)
        if key not in self._auc:
            scores = self.scores if key is None else self.scores[np.isin(self.row_seeds, key)]
            self._auc[key] = bootstrap_auc(
                scores, self.labels, self.groups, self.bootstrap, self.seed
            )
        return self._auc[key]

    def auc_of_seed(self, seed: int) -> float:
        if seed not in self._auc_of_seed:
            scores, ones = self.scores[self.row_seeds == seed], np.ones((1, len(self.labels)))
            self._auc_of_seed[seed] = float(macro_auc(scores, self.labels, ones)[0])
        return self._auc_of_seed[seed]


def _paired(a: _Arm | None, b: _Arm | None, margin: float) -> dict[str, Any]:
    """A row of `paired_difference` over the seeds that both arms have; None values without them."""
    undefined = Auc(np.nan, np.full(1, np.nan))
    blank = difference(undefined, undefined, margin)
    if a is None or b is None:
        return {**blank, "images": 0, "seeds": None, "seed_differences": None}
    if a.seeds is None or b.seeds is None:
        found, seeds, each = difference(a.auc(None), b.auc(None), margin), a.seeds or b.seeds, None
    else:
        seeds = [one for one in a.seeds if one in b.seeds]
        found = difference(a.auc(seeds), b.auc(seeds), margin) if seeds else blank
        each = [
            {"seed": one, "difference": finite_or_none(a.auc_of_seed(one) - b.auc_of_seed(one))}
            for one in seeds
        ]
    return {**found, "images": len(a.labels), "seeds": seeds, "seed_differences": each}


def _check(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> None:
    if scores.ndim != 3 or scores.shape[1:] != labels.shape or len(scores) == 0:
        raise DataError(
            f"scores {scores.shape} are not (seeds, images, classes) of labels {labels.shape}: "
            "test every arm alike"
        )
    if len(groups) != len(labels):
        raise DataError(f"{len(groups)} clusters for {len(labels)} test images: give one per image")
    if not np.isfinite(scores).all():
        raise DataError(
            "scores hold values that are not finite: the classifier that gave them has diverged"
        )


def _check_exclusive(labels: np.ndarray, exclusive: bool) -> None:
    if exclusive and not (labels.sum(1) == 1).all():
        raise DataError(
            "classes exclude each other, but some test images have none or several: check the "
            "label map"
        )
