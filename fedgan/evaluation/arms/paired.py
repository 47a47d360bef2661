"""Paired comparison of arms: the difference of two macro AUCs on the same real test images, with what it may be trusted for.

Both arms see the same resamples of patients, so what makes an image hard for both cancels out. Intervals and p-values
speak of the test images (another sample of patients) and not of training again with another seed: that spread is in
`seed_differences`. A resample that lacks a class of the macro mean is left out, as in `utility`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedgan.errors import ConfigError, DataError
from fedgan.evaluation.metrics.bootstrap import CHUNK, interval, resamples
from fedgan.evaluation.metrics.utility import finite_or_none

LEVEL = 0.05  # a difference counts as shown below this (adjusted) two-sided p-value
DRAWS_A_PAIR = 100  # resamples for each pair of a family: Holm's smallest p-value of m pairs is then 2m / (100m + 1) < 0.02
FEDERATED = ("federated", "finetuned")
POOL = (
    "local",
    "centralized",
)  # what the hospitals release alone, against what they could not do: pool their images
NOTE = (
    "Intervals and p-values of differences between arms speak of the real test images (patients drawn again, the same for "
    "both arms); the spread between trainings with different seeds stands beside them. Holm's correction is applied inside "
    "each family to the p-values; the intervals and non-inferiority (one-sided at 2.5 %) are not adjusted."
)


class Auc(NamedTuple):
    """A macro AUC with its bootstrap: two of the same images, resamples and seed are paired draw by draw."""

    value: float
    draws: np.ndarray  # (B,)


def macro_auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Macro AUC (B,) for scores (S, N, K), labels (N, K) and B rows of image weights (B, N): mean over classes and seeds.

    The same quantity as `utility.statistics(...)["macro_auc"]`, and that alone. The share of weighted pairs in their
    right order (Hanley and McNeil 1982) is linear in the matrix that says which pairs are, so the seeds are averaged
    there and all resamples become one product of matrices. Classes without positive or without negative images are not
    part of the mean; NaN where a row of weights leaves a class of the mean without either.
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
    """(P, Q): share of the seeds (S, N) in which a positive scores above a negative, ties counting one half."""
    total = np.zeros((len(positive), len(negative)))
    for seed in scores:
        above, below = seed[positive][:, None], seed[negative][None, :]
        total += (above > below) + 0.5 * (above == below)
    return total / len(scores)


def bootstrap_auc(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, bootstrap: int, seed: int
) -> Auc:
    """Macro AUC of scores (S, N, K) on labels (N, K), with `bootstrap` draws over the clusters `groups` (N,)."""
    _check(scores, labels, groups)
    value = macro_auc(scores, labels, np.ones((1, len(labels))))[0]
    return Auc(
        float(value),
        np.concatenate(
            [macro_auc(scores, labels, rows) for rows in resamples(groups, bootstrap, seed)]
        ),
    )


def difference(a: Auc, b: Auc, margin: float) -> dict[str, Any]:
    """`difference` (a − b) in AUC, its 95 % `ci`, `p_value`, `margin`, `non_inferior`, `better`.

    `p_value` is two-sided, from the percentile interval turned round (Efron and Tibshirani 1993, ch. 15): the level at
    which the interval begins to exclude 0, counted as (1 + n) / (B + 1), so that it is never 0. `non_inferior`: the lower
    end of the two-sided 95 % interval lies above −margin, which is a one-sided test at 2.5 %. `better`: the difference is
    positive and the p-value below 0.05. What the data do not define is None.
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
    """Macro AUC of scores_a (S, N, K) minus that of scores_b (T, N, K) on the same N test images, as `difference` gives it.

    Each AUC is the mean over classes and over all rows of scores (classifier seeds × generator seeds). `exclusive` says that
    labels (N, K) are one-hot, which is checked. `seeds_a` and `seeds_b` name the generator seed of each row of scores; where
    both are known, only the rows of common seeds are compared, `seeds` lists these and `seed_differences` is
    [{seed, difference}]; where one is known, `seeds` are its seeds; what is not known is None. `images` is N.
    Raises `DataError` when scores, labels and groups are not of the same images.
    """
    _check_exclusive(labels, exclusive)
    both = (
        _Arm(scores_a, labels, groups, bootstrap, seed, seeds_a),
        _Arm(scores_b, labels, groups, bootstrap, seed, seeds_b),
    )
    return _paired(*both, margin)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for all being looked at, in the order given (Holm 1979): any false claim at most as often as 5 %."""
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
    """The `comparisons` of comparison.json: a row for each pair (a, b) of each family, in order.

    `arms` gives each arm's scores (S, N, K), `generator_seeds` the generator seed of each row of them. A row is that of
    `paired_difference` with `family`, `a`, `b`, `metric` and `p_holm`; `better` asks for the adjusted p-value below 0.05.
    A pair with an arm that is not in `arms`, or without a common seed, stays as a row of None, and Holm counts the pairs
    that were measured. Each arm is resampled once for each set of its seeds, with the same patients, `bootstrap` times or
    100 times the pairs of the largest family, if that is more: the smallest p-value of B resamples is 2 / (B + 1), and
    Holm's multiple of it must be able to fall below 0.05. Raises `DataError` as `paired_difference` does.
    """
    _check_exclusive(labels, exclusive)
    bootstrap = max(
        bootstrap, DRAWS_A_PAIR * max((len(pairs) for pairs in families.values()), default=0)
    )
    seeds = generator_seeds or {}
    known = {
        name: _Arm(scores, labels, groups, bootstrap, seed, seeds.get(name))
        for name, scores in arms.items()
    }
    rows: list[dict[str, Any]] = []
    for family, pairs in families.items():
        members = []
        for a, b in pairs:
            measured = _paired(known.get(a), known.get(b), margin) | {"images": len(labels)}
            members.append(
                {
                    "family": family,
                    "a": a,
                    "b": b,
                    "metric": "macro_auc",
                    **measured,
                    "p_holm": None,
                }
            )
        counted = [row for row in members if row["p_value"] is not None]
        for row, p_holm in zip(counted, holm([row["p_value"] for row in counted]), strict=True):
            row |= {"p_holm": p_holm, "better": row["difference"] > 0 and p_holm < LEVEL}
        rows += members
    return rows


def standard_families(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """The families that every comparison has, from rows with `arm`, `name` and `hospital` (those of the summary).

    "federation": each federated (or fine-tuned) arm against centralised training, against the union of what the hospitals
    release alone, against each hospital alone, which has its own share of the budget of images, and, where it was trained,
    against each hospital alone with the whole budget (the "coalition NAME" of one member); and that union against
    centralised training. "against real": each arm, and no
    single hospital, against training on real images. Larger coalitions serve the contribution of hospitals alone.
    """
    whole = [row for row in rows if row.get("hospital") is None]
    alone = [row for row in rows if row.get("hospital") is not None and row["arm"] == "local"]
    rivals = [
        row for kind in ("centralized", "local") for row in whole if row["arm"] == kind
    ] + alone
    rivals += [row for row in whole if row["arm"] == "coalition" and "+" not in row["name"]]
    federated = [row for row in whole if row["arm"] in FEDERATED]
    generated = [row for row in whole if row["arm"] in ("centralized", *FEDERATED, "local")]
    pooled = [
        (one["name"], other["name"])
        for one in whole
        for other in whole
        if (one["arm"], other["arm"]) == POOL
    ]
    families = {
        "federation": [(one["name"], other["name"]) for one in federated for other in rivals]
        + pooled,
        "against real": [
            (one["name"], real["name"])
            for one in generated
            for real in whole
            if real["arm"] == "real"
        ],
    }
    return {family: pairs for family, pairs in families.items() if pairs}


class _Arm:
    """The scores (S, N, K) of an arm with the generator seed of each row, resampled once for each set of its seeds."""

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
                f"{len(seeds)} generator seeds for {len(scores)} rows of scores: give the seed of each row"
            )
        self.scores, self.labels, self.groups, self.bootstrap, self.seed = (
            scores,
            labels,
            groups,
            bootstrap,
            seed,
        )
        self.of_row = np.asarray([] if seeds is None else seeds)  # empty: not known
        self.seeds = sorted({int(one) for one in self.of_row}) or None
        self._drawn: dict[tuple[int, ...] | None, Auc] = {}
        self._single: dict[int, float] = {}

    def auc(self, seeds: Sequence[int] | None) -> Auc:
        """Over the rows of some seeds, or over all rows (None)."""
        key = None if seeds is None or seeds == self.seeds else tuple(seeds)
        if key not in self._drawn:
            scores = self.scores if key is None else self.scores[np.isin(self.of_row, key)]
            self._drawn[key] = bootstrap_auc(
                scores, self.labels, self.groups, self.bootstrap, self.seed
            )
        return self._drawn[key]

    def auc_of_seed(self, seed: int) -> float:
        if seed not in self._single:
            ones = np.ones((1, len(self.labels)))
            self._single[seed] = float(
                macro_auc(self.scores[self.of_row == seed], self.labels, ones)[0]
            )
        return self._single[seed]


def _paired(a: _Arm | None, b: _Arm | None, margin: float) -> dict[str, Any]:
    """A row of `paired_difference`: over the seeds that both arms have; of None for an arm that is missing."""
    nothing = Auc(np.nan, np.full(1, np.nan))
    if a is None or b is None:
        return {
            **difference(nothing, nothing, margin),
            "images": 0,
            "seeds": None,
            "seed_differences": None,
        }
    if a.seeds is None or b.seeds is None:
        found, seeds, each = difference(a.auc(None), b.auc(None), margin), a.seeds or b.seeds, None
    else:
        seeds = [one for one in a.seeds if one in b.seeds]
        found = (
            difference(a.auc(seeds), b.auc(seeds), margin)
            if seeds
            else difference(nothing, nothing, margin)
        )
        each = [
            {"seed": one, "difference": finite_or_none(a.auc_of_seed(one) - b.auc_of_seed(one))}
            for one in seeds
        ]
    return {**found, "images": len(a.labels), "seeds": seeds, "seed_differences": each}


def _check(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> None:
    if scores.ndim != 3 or scores.shape[1:] != labels.shape or len(scores) == 0:
        raise DataError(
            f"scores {scores.shape} are not (seeds, images, classes) of labels {labels.shape}: test every arm alike"
        )
    if len(groups) != len(labels):
        raise DataError(f"{len(groups)} clusters for {len(labels)} test images: give one an image")
    if not np.isfinite(scores).all():
        raise DataError(
            "scores hold values that are not finite: the classifier that gave them has diverged"
        )


def _check_exclusive(labels: np.ndarray, exclusive: bool) -> None:
    if exclusive and not (labels.sum(1) == 1).all():
        raise DataError(
            "classes exclude each other, but some test images have none or several: check the label map"
        )
