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
from fedgan.evaluation.bootstrap import CHUNK, interval, resamples
from fedgan.evaluation.utility import number

LEVEL = 0.05  # a difference counts as shown below this (adjusted) two-sided p-value
FEDERATED = ("federated", "finetuned")
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
            ordered += np.einsum("bn,bn->b", weights[:, rows] @ _ordered(scores[:, :, k], rows, negative), weights[:, negative])
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


def bootstrap_auc(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, bootstrap: int, seed: int) -> Auc:
    """Macro AUC of scores (S, N, K) on labels (N, K), with `bootstrap` draws over the clusters `groups` (N,)."""
    _check(scores, labels, groups)
    value = macro_auc(scores, labels, np.ones((1, len(labels))))[0]
    return Auc(float(value), np.concatenate([macro_auc(scores, labels, rows) for rows in resamples(groups, bootstrap, seed)]))


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
    value = number(a.value - b.value)
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
    both arms have the same ones, `seed_differences` is [{seed, difference}], otherwise None. `images` is N.
    Raises `DataError` when scores, labels and groups are not of the same images.
    """
    _check_exclusive(labels, exclusive)
    a, b = (bootstrap_auc(scores, labels, groups, bootstrap, seed) for scores in (scores_a, scores_b))
    return {
        **difference(a, b, margin),
        "images": len(labels),
        "seed_differences": _by_seed(_seed_aucs(scores_a, labels, seeds_a), _seed_aucs(scores_b, labels, seeds_b)),
    }


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
    A pair with an arm that is not in `arms` stays as a row of None, and Holm counts the pairs that were measured.
    Each arm is resampled once, with the same patients. Raises `DataError` as `paired_difference` does.
    """
    _check_exclusive(labels, exclusive)
    asked = {name for pairs in families.values() for pair in pairs for name in pair}
    aucs = {name: bootstrap_auc(arms[name], labels, groups, bootstrap, seed) for name in arms if name in asked}
    by_seed = {name: _seed_aucs(arms[name], labels, (generator_seeds or {}).get(name)) for name in aucs}
    rows: list[dict[str, Any]] = []
    for family, pairs in families.items():
        members = []
        for a, b in pairs:
            first, second = (aucs.get(name, Auc(np.nan, np.full(bootstrap, np.nan))) for name in (a, b))
            measured = difference(first, second, margin)
            seeds = _by_seed(by_seed.get(a), by_seed.get(b))
            head = {"family": family, "a": a, "b": b, "metric": "macro_auc"}
            members.append({**head, **measured, "p_holm": None, "images": len(labels), "seed_differences": seeds})
        known = [row for row in members if row["p_value"] is not None]
        for row, p_holm in zip(known, holm([row["p_value"] for row in known]), strict=True):
            row |= {"p_holm": p_holm, "better": row["difference"] > 0 and p_holm < LEVEL}
        rows += members
    return rows


def standard_families(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """The families that every comparison has, from rows with `arm`, `name` and `hospital` (those of the summary).

    "federation": each federated (or fine-tuned) arm against centralised training, against the union of what the hospitals
    release alone, and against each hospital alone. "against real": each arm, and no single hospital, against training on
    real images. Coalitions serve the contribution of hospitals and are in neither.
    """
    whole = [row for row in rows if row.get("hospital") is None]
    alone = [row for row in rows if row.get("hospital") is not None and row["arm"] == "local"]
    rivals = [row for kind in ("centralized", "local") for row in whole if row["arm"] == kind] + alone
    federated = [row for row in whole if row["arm"] in FEDERATED]
    generated = [row for row in whole if row["arm"] in ("centralized", *FEDERATED, "local")]
    families = {
        "federation": [(one["name"], other["name"]) for one in federated for other in rivals],
        "against real": [(one["name"], real["name"]) for one in generated for real in whole if real["arm"] == "real"],
    }
    return {family: pairs for family, pairs in families.items() if pairs}


def _seed_aucs(scores: np.ndarray, labels: np.ndarray, seeds: Sequence[int] | None) -> dict[int, float] | None:
    """Macro AUC by generator seed, where the seed of each row of scores is known."""
    if seeds is None or len(seeds) == 0:
        return None
    if len(seeds) != len(scores):
        raise ConfigError(f"{len(seeds)} generator seeds for {len(scores)} rows of scores: give the seed of each row")
    of_row, ones = np.asarray(seeds), np.ones((1, len(labels)))
    return {int(seed): float(macro_auc(scores[of_row == seed], labels, ones)[0]) for seed in np.unique(of_row)}


def _by_seed(a: dict[int, float] | None, b: dict[int, float] | None) -> list[dict[str, Any]] | None:
    if a is None or b is None or a.keys() != b.keys():
        return None
    return [{"seed": seed, "difference": number(a[seed] - b[seed])} for seed in a]


def _check(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> None:
    if scores.ndim != 3 or scores.shape[1:] != labels.shape or len(scores) == 0:
        raise DataError(f"scores {scores.shape} are not (seeds, images, classes) of labels {labels.shape}: test every arm alike")
    if len(groups) != len(labels):
        raise DataError(f"{len(groups)} clusters for {len(labels)} test images: give one an image")
    if not np.isfinite(scores).all():
        raise DataError("scores hold values that are not finite: the classifier that gave them has diverged")


def _check_exclusive(labels: np.ndarray, exclusive: bool) -> None:
    if exclusive and not (labels.sum(1) == 1).all():
        raise DataError("classes exclude each other, but some test images have none or several: check the label map")
