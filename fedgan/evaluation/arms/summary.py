"""Rows, cross-hospital matrix, cost and answer of comparison.json, from evaluations of trainings.

Pure functions. `check_comparable` comes first: it refuses arms that were trained or evaluated
differently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedgan.errors import ConfigError
from fedgan.evaluation.arms.paired import LEVEL, bootstrap_auc, macro_auc
from fedgan.evaluation.metrics.bootstrap import interval
from fedgan.evaluation.metrics.utility import finite_or_none, utility

COMPARED_SECTIONS = ("data", "model", "augment", "training", "privacy", "evaluation")
# Location of the shards, conditioning on the hospital, the term of FedProx, interval of the curve.
# federation.* is not compared.
MAY_DIFFER = frozenset({"data.root", "model.hospitals", "training.proximal_mu", "evaluation.every"})
EVALUATOR_KEYS = ("extractor", "classifier", "suite", "test_hash")
UNSTEADY = "not the same in every seed"
FIGURES = (
    "macro_auc",
    "macro_auc_ci",
    "balanced_accuracy",
    "balanced_accuracy_ci",
    "macro_auprc",
    "macro_auprc_ci",
)


@dataclass(frozen=True)
class RealTest:
    """The real test images on which every arm is evaluated, in the order of the predictions."""

    labels: np.ndarray  # (N, K) 0 or 1
    label_names: tuple[str, ...]
    exclusive: bool
    groups: np.ndarray  # (N,) cluster (patient) of each image, of `bootstrap.clusters`
    institutions: np.ndarray  # (N,) name of each image's hospital; empty: unknown
    bootstrap: int
    seed: int


@dataclass(frozen=True)
class Run:
    """One training of an arm; `scores`: probabilities (S, N, K) of its classifiers."""

    seed: int
    images_seen: int
    scores: np.ndarray
    fidelity: Mapping[str, Any] = field(default_factory=dict)


# --- rows ----------------------------------------------------------------------------------------


def summary_row(
    arm: str, name: str, runs: Sequence[Run], test: RealTest, hospital: str | None = None
) -> dict[str, Any]:
    """A row of `summary`: figures of an arm (or of one hospital alone) over its generator seeds.

    The scores of all runs are stacked, (G · S, N, K): a figure is the mean over generator and
    classifier seeds, and its interval is over test images; `macro_auc_seeds` has the mean of each
    generator seed. Distances are means over the runs that have them. Without a run every figure is
    None. Training on real images has no generator: see `real_row`.
    """
    row: dict[str, Any] = {
        "arm": arm,
        "name": name,
        "seeds": [run.seed for run in runs],
        "images_seen": runs[0].images_seen if runs else None,
        "hospital": hospital,
        **_figures(np.concatenate([run.scores for run in runs]) if runs else None, test),
    }
    ones = np.ones((1, len(test.labels)))
    row["macro_auc_seeds"] = [
        finite_or_none(macro_auc(run.scores, test.labels, ones)[0]) for run in runs
    ]
    for key in ("frechet", "precision", "recall", "coverage"):
        values = [run.fidelity.get(key) for run in runs]
        known = [value for value in values if value is not None]
        row[key] = float(np.mean(known)) if known else None
        if key == "frechet":
            row["frechet_seeds"] = values
    return row


def real_row(scores: np.ndarray, test: RealTest) -> dict[str, Any]:
    """The first row of `summary`: classifiers trained on real images, scores (S, N, K)."""
    return {**summary_row("real", "real", [], test), **_figures(scores, test)}


def _figures(scores: np.ndarray | None, test: RealTest) -> dict[str, Any]:
    if scores is None:
        return {**dict.fromkeys(FIGURES), "per_class": {}, "per_institution": {}}
    found = utility(
        scores,
        test.labels,
        test.label_names,
        test.exclusive,
        test.groups,
        test.bootstrap,
        test.seed,
    )
    per_class = {
        label: {"auc": row["auc"], "auc_ci": row["auc_ci"]}
        for label, row in found["per_class"].items()
    }
    return {
        **{key: found.get(key) for key in FIGURES},
        "per_class": per_class,
        "per_institution": _figures_per_institution(scores, test),
    }


def _figures_per_institution(scores: np.ndarray, test: RealTest) -> dict[str, Any]:
    """Macro AUC and its interval on the test images of each institution, where these are known."""
    result = {}
    for institution in np.unique(test.institutions):
        rows = np.flatnonzero(test.institutions == institution)
        groups = np.unique(test.groups[rows], return_inverse=True)[1].reshape(-1)
        auc = bootstrap_auc(scores[:, rows], test.labels[rows], groups, test.bootstrap, test.seed)
        value = finite_or_none(auc.value)
        result[str(institution)] = {
            "macro_auc": value,
            "macro_auc_ci": None if value is None else interval(auc.draws),
        }
    return result


def cross_hospital(rows: Sequence[Mapping[str, Any]], hospitals: Sequence[str]) -> dict[str, Any]:
    """The matrix of `summary` rows × the hospitals on whose real test images they are tested.

    `rows` (R) names, `columns` (H) hospitals, `macro_auc` (R × H), `ci` (R × H of [low, high]),
    `is_own` (R × H): whether the row is this hospital's own generator. None: not measured, or not
    defined by a hospital's test images.
    """
    cells = [
        [(row.get("per_institution") or {}).get(hospital) or {} for hospital in hospitals]
        for row in rows
    ]
    return {
        "rows": [row["name"] for row in rows],
        "columns": list(hospitals),
        "macro_auc": [[cell.get("macro_auc") for cell in line] for line in cells],
        "ci": [[cell.get("macro_auc_ci") for cell in line] for line in cells],
        "is_own": [[row.get("hospital") == hospital for hospital in hospitals] for row in rows],
    }


# --- cost ----------------------------------------------------------------------------------------


def kimg_to_frechet(curve: Iterable[Mapping[str, Any]], threshold: float | None) -> float | None:
    """Thousand images seen at the first point of a curve at or below the threshold; None without.

    `curve` has points {images_seen, frechet}. Nothing is interpolated, because the distance need
    not fall monotonically: the result is at most one measurement interval too late.
    """
    if threshold is None:
        return None
    reached = [point["images_seen"] for point in _measured(curve) if point["frechet"] <= threshold]
    return min(reached) / 1000 if reached else None


def frechet_threshold(curves: Iterable[Iterable[Mapping[str, Any]]]) -> float | None:
    """The largest final distance of the curves, which all of them reach; None without a point."""
    measured = [points for curve in curves if (points := _measured(curve))]
    return max((float(points[-1]["frechet"]) for points in measured), default=None)


def _measured(curve: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    points = [
        point
        for point in curve
        if point.get("frechet") is not None and np.isfinite(point["frechet"])
    ]
    return sorted(points, key=lambda point: point["images_seen"])


# --- the answer ----------------------------------------------------------------------------------


def answer(
    summary: Sequence[Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]],
    hospitals: Sequence[str],
    federated: str | None = None,
) -> str:
    """Two sentences: cost against centralised training, gain over hospitals that train alone.

    `comparisons`: rows whose `a` is the federated arm, `federated` by name, by default the first of
    `summary`. `hospitals`: all of them. A difference is a cost, a gain or a loss when its p-value
    after Holm is below 0.05 and every one of two or more generator seeds has its sign. The answer
    names what was not measured.
    """
    whole = [row for row in summary if row.get("hospital") is None]
    candidates = [row["name"] for row in whole if row["arm"] == "federated"]
    chosen = federated if federated is not None else next(iter(candidates), None)
    if not any(row["name"] == chosen and row.get("macro_auc") is not None for row in whole):
        who = "federated training" if chosen is None else f"the arm '{chosen}'"
        return f"Cost and gain of federation are unknown: {who} was not measured."
    versus = {
        row["b"]: row
        for row in comparisons
        if row["a"] == chosen and row.get("difference") is not None
    }

    def first(kind: str) -> Mapping[str, Any] | None:
        names = [row["name"] for row in whole if row["arm"] == kind and row["name"] in versus]
        return versus[names[0]] if names else None

    central, pool = first("centralized"), first("local")
    own = {
        row["hospital"]: row["name"]
        for row in summary
        if row["arm"] == "local" and row.get("hospital") is not None
    }
    alone = {name: versus[own[name]] for name in hospitals if own.get(name) in versus}
    missing = _missing_hospitals(hospitals, alone)
    which = f" ('{chosen}')" if len(candidates) > 1 else ""
    if not (central or alone or pool):
        return (
            f"Cost and gain of federation{which} are unknown: centralised training and the "
            "hospitals alone were not measured."
        )
    subject = f"In macro AUC, classifiers trained on federated{which} synthetic images score"
    sentences = ["Centralised training was not measured."]
    if central:
        sentences, subject = [f"{subject} {_against_central(central)}."], "They score"
    clauses = [*_against_hospitals(alone), *([_against_pool(pool)] if pool else [])]
    if clauses:
        text = " and ".join([", ".join(clauses[:-1]), clauses[-1]] if len(clauses) > 1 else clauses)
        sentences.append(f"{subject} {text}{f'; {missing}' if missing else ''}.")
    else:
        sentences.append(f"{missing[0].upper()}{missing[1:]}.")
    return " ".join(sentences)


def _missing_hospitals(hospitals: Sequence[str], alone: Mapping[str, Any]) -> str:
    missing = [name for name in hospitals if name not in alone]
    if not alone:
        return "the hospitals alone were not measured"
    if len(missing) > 1:
        return f"{len(missing)} hospitals alone were not measured"
    return f"{missing[0]} alone was not measured" if missing else ""


def _against_central(row: Mapping[str, Any]) -> str:
    """Gap and verdict. Non-inferior: the interval lies above −margin; cost, gain: shown by Holm."""
    value, margin = row["difference"], f"the margin of {decimal(row['margin'])}"
    text = f"{gap(value)} those of centralised training"
    if row.get("ci") is None:
        return f"{text} (no interval)"
    if is_shown(row) and is_steady(row):
        limit = "within" if row["non_inferior"] else "not shown to be within"
        if value > 0:
            claim = "a gain"
        elif row["ci"][1] < -row["margin"]:
            claim = f"a cost beyond {margin}"
        else:
            claim = f"a cost{'' if row['non_inferior'] else ','} {limit} {margin}"
    elif row["non_inferior"]:
        claim = f"non-inferior at {margin}"
    elif is_shown(row):
        claim = UNSTEADY
    else:
        claim = f"neither a cost nor non-inferiority is shown at {margin}"
    return f"{text} (95 % interval {interval_text(row)}: {claim})"


def _against_hospitals(alone: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Clauses for the weakest and the strongest hospital alone, by the difference to them."""
    order = sorted(alone, key=lambda name: -float(alone[name]["difference"]))
    if len(order) < 2:
        return [
            f"{gap(alone[name]['difference'])} {name} alone ({verdict(alone[name])})"
            for name in order
        ]
    return [
        f"{gap(alone[name]['difference'])} {title} ({name}: {verdict(alone[name])})"
        for title, name in (
            ("the weakest hospital alone", order[0]),
            ("the strongest", order[-1]),
        )
    ]


def _against_pool(row: Mapping[str, Any]) -> str:
    """Clause for the rival without a federation: hospitals train alone and pool their releases."""
    return f"{gap(row['difference'])} the pooled releases of the hospitals ({verdict(row)})"


def verdict(row: Mapping[str, Any]) -> str:
    """What a paired difference shows."""
    if row.get("ci") is None:
        return "no interval"
    if not is_shown(row):
        return "no difference shown"
    if not is_steady(row):
        return UNSTEADY
    return "a gain" if row["difference"] > 0 else "a loss"


def is_shown(row: Mapping[str, Any]) -> bool:
    """Whether a difference is expected on other test images too."""
    return row.get("p_holm") is not None and row["p_holm"] < LEVEL


def is_steady(row: Mapping[str, Any]) -> bool:
    """Whether the difference has one sign in all generator seeds; true for fewer than two."""
    each = [one["difference"] for one in row.get("seed_differences") or []]
    return len(each) < 2 or all(
        value is not None and value * row["difference"] > 0 for value in each
    )


def gap(value: float) -> str:
    """A difference as text: "0.012 below"."""
    size = decimal(abs(value))
    return "level with" if float(size) == 0 else f"{size} {'above' if value > 0 else 'below'}"


def interval_text(row: Mapping[str, Any]) -> str:
    ci = row.get("ci")
    return "no interval" if ci is None else f"{decimal(ci[0])} to {decimal(ci[1])}"


def decimal(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "−")


# --- check ---------------------------------------------------------------------------------------


def check_comparable(arms: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ConfigError` unless all arms were trained and evaluated alike.

    An arm is {name, seed, images_seen, settings (resolved, nested), resolution, label_names,
    evaluator: {extractor, classifier, suite, test_hash, …}}. Compared: images seen, label names,
    resolution, every key of `evaluator`, and the settings of `COMPARED_SECTIONS` but for
    `MAY_DIFFER` and, in an ablation, the arm's own `may_differ`. The message names arm, key and
    both values.

    Images seen are whole batches: an arm with another batch size has seen the budget rounded up to
    its own batches. An arm with hospitals in `exhausted` (spent privacy budgets) may have seen
    fewer.
    """
    if not arms:
        return
    facts = [_facts(arm) for arm in arms]
    for key in dict.fromkeys(key for found in facts for key in found):
        fixed = [
            (arm, found.get(key))
            for arm, found in zip(arms, facts, strict=True)
            if key not in arm.get("may_differ", ())
        ]
        for arm, value in fixed[1:]:
            if value != fixed[0][1]:
                raise _difference_error(key, (arm, value), fixed[0])
    if any("training.batch_size" in arm.get("may_differ", ()) for arm in arms):
        budgets = [whole_batches(arm["settings"]["training"]) for arm in arms]
    else:
        budgets = [max(arm["images_seen"] for arm in arms)] * len(arms)
    whole = [arm for arm, budget in zip(arms, budgets, strict=True) if arm["images_seen"] == budget]
    most = max(
        whole,
        key=lambda arm: arm["images_seen"],
        default={"name": "the budget", "images_seen": max(budgets)},
    )
    for arm, budget in sorted(
        zip(arms, budgets, strict=True), key=lambda pair: pair[0]["images_seen"]
    ):
        seen = arm["images_seen"]
        if seen > budget or (seen < budget and not arm.get("exhausted")):
            raise _difference_error("images_seen", (most, most["images_seen"]), (arm, seen))


def whole_batches(training: Mapping[str, Any]) -> int:
    """The budget of images of a `training` section, rounded up to its batches."""
    batch = int(training["batch_size"])
    return -(-round(training["kimg"] * 1000) // batch) * batch


def _difference_error(
    key: str, one: tuple[Mapping[str, Any], Any], other: tuple[Mapping[str, Any], Any]
) -> ConfigError:
    values = ", ".join(f"{_label(arm)} has {_shorten(value)}" for arm, value in (one, other))
    return ConfigError(
        f"arms cannot be compared, {key} differs: {values}. Train and evaluate both with the same "
        f"{key}, or take one out of comparison.arms"
    )


def _facts(arm: Mapping[str, Any]) -> dict[str, Any]:
    """Facts that must be equal, by dotted key. Raises `ConfigError` where one is missing."""
    evaluator = arm.get("evaluator") or {}
    required = ("resolution", "label_names", "settings", "images_seen")
    missing = [key for key in required if arm.get(key) is None]
    missing += [f"evaluator.{key}" for key in EVALUATOR_KEYS if evaluator.get(key) is None]
    if missing:
        raise ConfigError(
            f"{_label(arm)} has no {', '.join(missing)}: evaluate it again before it is compared"
        )
    settings = {
        f"{section}.{key}": list(value) if isinstance(value, tuple) else value
        for section in COMPARED_SECTIONS
        for key, value in arm["settings"].get(section, {}).items()
        if f"{section}.{key}" not in MAY_DIFFER
    }
    return {
        "resolution": arm["resolution"],
        "label_names": list(arm["label_names"]),
        **{f"evaluator.{key}": value for key, value in evaluator.items()},
        **settings,
    }


def _label(arm: Mapping[str, Any]) -> str:
    seed = "" if arm.get("seed") is None else f" (seed {arm['seed']})"
    return f"arm '{arm.get('name', '?')}'{seed}"


def _shorten(value: Any, most: int = 200) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"
