"""From the evaluations of single trainings to what comparison.json says of arms: rows, matrix, cost and one sentence.

Pure functions. `check_comparable` comes first: a comparison of arms that were trained or judged differently is refused.
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
# Where the shards lie, what hospitals are to the networks, fedprox's own term, how often a curve is measured.
# federation.* is not looked at.
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
    """The real test images that every arm is judged on, in the order of the predictions."""

    labels: np.ndarray  # (N, K) 0 or 1
    label_names: tuple[str, ...]
    exclusive: bool
    groups: np.ndarray  # (N,) cluster (patient) of each image, as `bootstrap.clusters` gives it
    institutions: np.ndarray  # (N,) name of each image's hospital; empty: unknown
    bootstrap: int
    seed: int


@dataclass(frozen=True)
class Run:
    """One training of an arm: its seed, its budget, its classifiers' probabilities (S, N, K), its `fidelity` figures."""

    seed: int
    images_seen: int
    scores: np.ndarray
    fidelity: Mapping[str, Any] = field(default_factory=dict)


# --- rows ----------------------------------------------------------------------------------------


def summary_row(
    arm: str, name: str, runs: Sequence[Run], test: RealTest, hospital: str | None = None
) -> dict[str, Any]:
    """A row of `summary`: the figures of one arm (or of one hospital alone) over its generator seeds.

    The scores of all runs are stacked, (G · S, N, K), so that a figure is the mean over generator and classifier seeds and
    its interval speaks of the test images; `macro_auc_seeds` has the mean of each generator seed. Distances are means over
    the runs that have them. Without a run every figure is None. The real arm has no generator: see `real_row`.
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
    """The first row of `summary`: classifiers trained on real images, scores (S, N, K). It has no generator's figures."""
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
        "per_institution": _inside(scores, test),
    }


def _inside(scores: np.ndarray, test: RealTest) -> dict[str, Any]:
    """Macro AUC and its interval inside each institution, where institutions are known."""
    result = {}
    for place in np.unique(test.institutions):
        rows = np.flatnonzero(test.institutions == place)
        groups = np.unique(test.groups[rows], return_inverse=True)[1].reshape(-1)
        auc = bootstrap_auc(scores[:, rows], test.labels[rows], groups, test.bootstrap, test.seed)
        value = finite_or_none(auc.value)
        result[str(place)] = {
            "macro_auc": value,
            "macro_auc_ci": None if value is None else interval(auc.draws),
        }
    return result


def cross_site(rows: Sequence[Mapping[str, Any]], hospitals: Sequence[str]) -> dict[str, Any]:
    """The matrix of `summary` rows × the hospitals whose real test images they are tested on.

    `rows` (R) names, `columns` (H) hospitals, `macro_auc` (R × H), `ci` (R × H of [low, high]), `own` (R × H): whether the
    row is this very hospital's own generator. None where it was not measured or a hospital's test images do not define it.
    """
    cells = [
        [(row.get("per_institution") or {}).get(place) or {} for place in hospitals] for row in rows
    ]
    return {
        "rows": [row["name"] for row in rows],
        "columns": list(hospitals),
        "macro_auc": [[cell.get("macro_auc") for cell in line] for line in cells],
        "ci": [[cell.get("macro_auc_ci") for cell in line] for line in cells],
        "own": [[row.get("hospital") == place for place in hospitals] for row in rows],
    }


# --- cost ----------------------------------------------------------------------------------------


def kimg_to_frechet(curve: Iterable[Mapping[str, Any]], threshold: float | None) -> float | None:
    """Thousand images seen at the first measured point of a curve that is at or below the threshold; None if there is none.

    `curve` has points {images_seen, frechet}. Nothing is interpolated: between two measurements the distance is not known,
    and it need not fall steadily, so the answer is at most one interval of measurement too late.
    """
    if threshold is None:
        return None
    reached = [point["images_seen"] for point in _measured(curve) if point["frechet"] <= threshold]
    return min(reached) / 1000 if reached else None


def frechet_threshold(curves: Iterable[Iterable[Mapping[str, Any]]]) -> float | None:
    """The largest last distance among the curves, which every one of them reaches; None when no curve has a point."""
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
    """One sentence: what federation costs against centralised training, and what it gains over each hospital alone.

    Read off `comparisons` (rows whose `a` is the federated arm) by the names in `summary`; `federated` names that arm, by
    default the first federated one. `hospitals` names all of them. A difference is called a cost, a gain or a loss when its
    p-value after Holm is below 0.05 and every one of two or more generator seeds has its sign; what was not measured is
    said to be so, and that a hospital alone saw no more than its own share of the images.
    """
    whole = [row for row in summary if row.get("hospital") is None]
    candidates = [row["name"] for row in whole if row["arm"] == "federated"]
    chosen = federated if federated is not None else next(iter(candidates), None)
    if not any(row["name"] == chosen and row.get("macro_auc") is not None for row in whole):
        who = "federated training" if chosen is None else f"the arm '{chosen}'"
        return f"What federation costs and gains is unknown: {who} was not measured."
    versus = {
        row["b"]: row
        for row in comparisons
        if row["a"] == chosen and row.get("difference") is not None
    }
    central = next(
        (
            versus[row["name"]]
            for row in whole
            if row["arm"] == "centralized" and row["name"] in versus
        ),
        None,
    )
    own = {
        row["hospital"]: row["name"]
        for row in summary
        if row["arm"] == "local" and row.get("hospital") is not None
    }
    alone = {place: versus[own[place]] for place in hospitals if own.get(place) in versus}

    clauses = [*([_against_central(central)] if central else []), *_against_hospitals(alone)]
    unknown = [] if central else ["centralised training was not measured"]
    missing = [place for place in hospitals if place not in alone]
    if missing or not alone:
        places = (
            "the hospitals"
            if not alone
            else f"{len(missing)} hospitals"
            if len(missing) > 1
            else missing[0]
        )
        unknown.append(f"{places} alone {'was' if places in hospitals else 'were'} not measured")
    which = f" ('{chosen}')" if len(candidates) > 1 else ""
    if not clauses:
        return f"What federation{which} costs and gains is unknown: {' and '.join(unknown)}."
    said = " and ".join([", ".join(clauses[:-1]), clauses[-1]] if len(clauses) > 1 else clauses)
    if alone:
        said += f", {'each ' if len(alone) > 1 else ''}with its own share of the images"
    first = f"In macro AUC (95 % intervals), classifiers trained on federated{which} synthetic images score {said}"
    pooled = [
        versus[row["name"]] for row in whole if row["arm"] == "local" and row["name"] in versus
    ]
    return "; ".join([first, *(_against_pool(row) for row in pooled), *unknown]) + "."


def _against_central(row: Mapping[str, Any]) -> str:
    """Clause and verdict. Non-inferior: the whole interval lies above −margin; a cost or a gain: shown after Holm."""
    value, margin = row["difference"], f"the margin of {decimal(row['margin'])}"
    clear = shown(row) and steady(row)
    if row.get("ci") is None:
        verdict = ""
    elif clear and value > 0:
        verdict = ": a gain"
    elif clear and row["ci"][1] < -row["margin"]:
        verdict = f": a cost beyond {margin}"
    elif clear:
        verdict = (
            f": a cost{' within' if row['non_inferior'] else ', not shown to be within'} {margin}"
        )
    else:
        found = (
            "non-inferior" if row["non_inferior"] else "neither a cost nor non-inferiority is shown"
        )
        verdict = (
            f": {UNSTEADY}" if shown(row) and not row["non_inferior"] else f": {found} at {margin}"
        )
    return f"{gap(value)} those of centralised training ({span_of(row)}{verdict})"


def _against_hospitals(alone: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Clauses for the weakest and the strongest hospital alone: those that the federated arm is most and least above."""
    order = sorted(alone, key=lambda place: -float(alone[place]["difference"]))
    ends = (
        [("the weakest hospital alone", order[0]), ("the strongest", order[-1])]
        if len(order) > 1
        else []
    )
    clauses = []
    for title, place in ends or [(f"{place} alone", place) for place in order]:
        row = alone[place]
        clauses.append(
            f"{gap(row['difference'])} {title} ({f'{place}, ' if ends else ''}{span_of(row)}{verdict(row)})"
        )
    return clauses


def _against_pool(row: Mapping[str, Any]) -> str:
    """Clause for the rival that needs no federation: each hospital trains alone and all release what they made."""
    pool = "the pooled releases of hospitals that train alone"
    return f"against {pool} they are {gap(row['difference']).replace('level with', 'level')} ({span_of(row)}{verdict(row)})"


def verdict(row: Mapping[str, Any]) -> str:
    """The verdict behind an interval; nothing where there is no interval."""
    if row.get("ci") is None:
        return ""
    claim = ("a gain" if row["difference"] > 0 else "a loss") if steady(row) else UNSTEADY
    return f": {claim if shown(row) else 'no difference shown'}"


def shown(row: Mapping[str, Any]) -> bool:
    """Whether other test images would be expected to show a difference too."""
    return row.get("p_holm") is not None and row["p_holm"] < LEVEL


def steady(row: Mapping[str, Any]) -> bool:
    """Whether the difference has one sign in every generator seed; one seed alone, or none known, cannot speak against it."""
    each = [one["difference"] for one in row.get("seed_differences") or []]
    return len(each) < 2 or all(
        value is not None and value * row["difference"] > 0 for value in each
    )


def gap(value: float) -> str:
    size = decimal(abs(value))
    return "level with" if float(size) == 0 else f"{size} {'above' if value > 0 else 'below'}"


def span_of(row: Mapping[str, Any]) -> str:
    ci = row.get("ci")
    return "no interval" if ci is None else f"{decimal(ci[0])} to {decimal(ci[1])}"


def decimal(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "−")


# --- the guard -----------------------------------------------------------------------------------


def check_comparable(arms: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ConfigError` unless all arms were trained and judged alike; the message names arm, key and both values.

    An arm is {name, seed, images_seen, settings (the resolved nested dict), resolution, label_names, evaluator: {extractor,
    classifier, suite, test_hash, …}}. Compared: images seen, label names, resolution, every key of `evaluator`, and the
    sections data, model, augment, training, privacy and evaluation of the settings but for `MAY_DIFFER`. Seeds, names and the
    federation may differ, and the keys that an arm of an ablation has in `declared`: those say what is compared.

    Images seen are whole batches. Arms with batches of another size have shown the budget rounded up to their own, and no
    other number. An arm with hospitals in `stopped` (their privacy budgets were used up) may have shown fewer.
    """
    if not arms:
        return
    facts = [_facts(arm) for arm in arms]
    for key in dict.fromkeys(key for found in facts for key in found):
        bound = [
            (arm, found.get(key))
            for arm, found in zip(arms, facts, strict=True)
            if key not in arm.get("declared", ())
        ]
        for arm, value in bound[1:]:
            if value != bound[0][1]:
                _refuse(key, (arm, value), bound[0])
    if any("training.batch_size" in arm.get("declared", ()) for arm in arms):
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
        if arm["images_seen"] > budget or (arm["images_seen"] < budget and not arm.get("stopped")):
            _refuse("images_seen", (most, most["images_seen"]), (arm, arm["images_seen"]))


def whole_batches(training: Mapping[str, Any]) -> int:
    """The budget of images of a `training` section, rounded up to its batches."""
    batch = int(training["batch_size"])
    return -(-round(training["kimg"] * 1000) // batch) * batch


def _refuse(
    key: str, one: tuple[Mapping[str, Any], Any], other: tuple[Mapping[str, Any], Any]
) -> None:
    said = [f"{_who(arm)} has {_shorten(value)}" for arm, value in (one, other)]
    raise ConfigError(
        f"arms cannot be compared, {key} differs: {said[0]}, {said[1]}. "
        f"Train and evaluate both with the same {key}, or take one out of comparison.arms"
    )


def _facts(arm: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that must be equal, by dotted key. Raises `ConfigError` for an arm that does not say it."""
    evaluator = arm.get("evaluator") or {}
    lacking = [
        key
        for key in ("resolution", "label_names", "settings", "images_seen")
        if arm.get(key) is None
    ]
    lacking += [f"evaluator.{key}" for key in EVALUATOR_KEYS if evaluator.get(key) is None]
    if lacking:
        raise ConfigError(
            f"{_who(arm)} does not say its {', '.join(lacking)}: evaluate it again before it is compared"
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


def _who(arm: Mapping[str, Any]) -> str:
    seed = "" if arm.get("seed") is None else f" (seed {arm['seed']})"
    return f"arm '{arm.get('name', '?')}'{seed}"


def _shorten(value: Any, most: int = 200) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"
