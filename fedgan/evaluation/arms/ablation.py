"""Ablation table: what each variant changes, what it costs, and its privacy guarantee.

It separates the cost of the noise of differential privacy from the cost of what must be given up
before any noise is added (minibatch-std, R1, ADA, per-image clipping). Each variant is compared
with its parent and with the baseline.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedgan.evaluation.arms.summary import decimal, gap, interval_text, is_shown, is_steady, verdict

# families of the paired comparisons
PARENT, BASELINE = "variant against its parent", "variant against the baseline"
FIDELITY = ("frechet", "precision", "recall", "coverage")
COSTS = ("wall_seconds", "core_seconds")
MODERATE = 10.0  # a larger ε hardly bounds any attack

Tree = Mapping[str, Any]


def families(arms: Sequence[Tree]) -> dict[str, list[tuple[str, str]]]:
    """Pairs (a, b) of the paired comparisons, from entries of `arms` (`name`, `parent`).

    Empty where no arm has a parent.
    """
    parents = _parents(arms)
    if not parents:
        return {}
    baseline = _baseline(parents)
    found = {
        PARENT: list(parents.items()),
        BASELINE: [(name, baseline) for name, parent in parents.items() if parent != baseline],
    }
    return {family: pairs for family, pairs in found.items() if pairs}


def table(
    arms: Sequence[Tree], summary: Sequence[Tree], comparisons: Sequence[Tree]
) -> dict[str, Any] | None:
    """`ablation` of comparison.json: the baseline and its variants; None where no arm has a parent.

    `arms`: one entry per arm and seed; `summary`: one row per arm; `comparisons`: rows with the
    pairs of `families`.
    """
    parents = _parents(arms)
    if not parents:
        return None
    baseline = _baseline(parents)
    pairs = {(row["a"], row["b"]): row for row in reversed(comparisons)}  # the first of equals
    figures = {row["name"]: row for row in summary}
    variants = []
    for name in (baseline, *parents):
        entries = [arm for arm in arms if arm["name"] == name]
        row, parent = figures.get(name, {}), parents.get(name)
        fidelities = [(arm.get("evaluation") or {}).get("fidelity", {}) for arm in entries]
        costs = [arm.get("cost") or {} for arm in entries]
        public = [arm.get("public_pretraining") or {} for arm in entries]
        variants.append(
            {
                "name": name,
                "parent": parent,
                "changes": dict(entries[0].get("changes") or {}) if entries else {},
                "images_seen": _first(arm.get("images_seen") for arm in entries),
                "public_images": _first(one.get("images") for one in public),
                **_privacy([arm.get("privacy") for arm in entries]),
                **{key: _mean(one.get(key) for one in fidelities) for key in FIDELITY},
                **{key: row.get(key) for key in ("macro_auc", "macro_auc_ci", "macro_auc_seeds")},
                **{key: _mean(one.get(key) for one in costs) for key in COSTS},
                "from_parent": pairs.get((name, parent)) if parent else None,
                "from_baseline": pairs.get((name, baseline)) if parent else None,
            }
        )
    return {"baseline": baseline, "variants": variants}


# --- sentences -----------------------------------------------------------------------------------


def answer(found: Tree) -> str:
    """The costliest variant and the best one with a guarantee: two sentences, from `table`."""
    variants, baseline = found["variants"], found["baseline"]
    worst = _costliest(variants)
    if worst is None:
        return "The cost of differential privacy is unknown: no variant was measured."
    step = worst["from_parent"]
    sentences = ["In macro AUC no variant is worse than its parent."]
    if step["difference"] < 0:
        cost = f"{gap(step['difference'])} '{worst['parent']}'"
        reason = verdict(step)
        if step.get("ci") is not None:
            reason = f"95 % interval {interval_text(step)}: {reason}"
        sentences = [f"In macro AUC '{worst['name']}' costs most: {cost} ({reason})."]
    if private := _with_guarantee(variants):
        best = _describe(_best(private), baseline)
        sentences.append(f"The best arm with a guarantee is {best}.")
    elif any(variant["private"] for variant in variants):
        sentences.append("No arm with a guarantee was measured.")
    return " ".join(sentences)


def findings(found: Tree) -> list[str]:
    """Sentences beside the answer: whether noise costs most, and the best arm at ε ≤ 10.

    The latter only where the best arm has a larger ε.
    """
    variants, baseline = found["variants"], found["baseline"]
    worst = _costliest(variants)
    if worst is None:
        return []
    sentences = [_cost_of_noise(variants, baseline, worst)]
    private = _with_guarantee(variants)
    if private and _best(private)["epsilon"] > MODERATE:
        moderate = [variant for variant in private if variant["epsilon"] <= MODERATE]
        best = _describe(_best(moderate), baseline) if moderate else "not measured"
        sentences.append(f"The best arm at ε ≤ {MODERATE:g} is {best}.")
    return sentences


def _costliest(variants: Sequence[Tree]) -> Tree | None:
    measured = [one for one in variants if _difference(one["from_parent"]) is not None]
    return min(measured, key=lambda one: float(one["from_parent"]["difference"]), default=None)


def _with_guarantee(variants: Sequence[Tree]) -> list[Tree]:
    """Measured variants with a finite ε."""
    return [
        variant
        for variant in variants
        if variant["epsilon"] is not None and variant["macro_auc"] is not None
    ]


def _best(variants: Sequence[Tree]) -> Tree:
    return max(variants, key=lambda variant: float(variant["macro_auc"]))


def _describe(variant: Tree, baseline: str) -> str:
    row = variant["from_baseline"]
    behind = "" if _difference(row) is None else f", {_against(row, repr(baseline))}"
    name, epsilon = variant["name"], variant["epsilon"]
    return f"'{name}' at ε ≤ {epsilon:.3g}: macro AUC {decimal(variant['macro_auc'])}{behind}"


def _cost_of_noise(variants: Sequence[Tree], baseline: str, worst: Tree) -> str:
    """Whether noise costs most.

    It compares clipping alone with the baseline, and the first variants with noise with clipping.
    """
    clipped = {
        variant["name"]: variant
        for variant in variants
        if variant["private"] and variant["epsilon"] is None and not variant["unknown"]
    }
    noisy = [
        variant
        for variant in variants
        if variant["parent"] in clipped
        and variant["epsilon"] is not None
        and _difference(variant["from_parent"]) is not None
    ]
    if not noisy:
        return "The noise was not tested: no variant adds it to clipping alone."
    without = clipped[noisy[0]["parent"]]
    order = sorted(noisy, key=lambda variant: -float(variant["from_parent"]["difference"]))
    ends = order[:1] if len(order) == 1 else [order[0], order[-1]]
    costs = " and ".join(
        f"'{one['name']}' (ε ≤ {one['epsilon']:.3g}) is {_against(one['from_parent'], 'it')}"
        for one in ends
    )
    row, step = without["from_baseline"], worst["from_parent"]
    first = ""
    if _difference(row) is not None:
        first = f"without noise, '{without['name']}' is {_against(row, repr(baseline))}; "
    claim = "Noise costs most" if worst in noisy else "Noise does not cost most"
    if not (is_shown(step) and is_steady(step) and step["difference"] < 0):
        claim = "Whether noise costs most is not shown"
    return f"{claim}: {first}{costs}."


def _against(row: Tree, other: str) -> str:
    return f"{gap(row['difference'])} {other} ({interval_text(row)})"


# --- parts ---------------------------------------------------------------------------------------


def _parents(arms: Sequence[Tree]) -> dict[str, str]:
    return {arm["name"]: arm["parent"] for arm in arms if arm.get("parent")}


def _baseline(parents: Mapping[str, str]) -> str:
    """The root of all variants: the first parent that has none itself."""
    return next(parent for parent in parents.values() if parent not in parents)


def _privacy(seeds: Sequence[Tree | None]) -> dict[str, Any]:
    """The largest ε of each hospital over the seeds, and of all; None: infinite where `private`.

    `unknown`: a hospital's ledger could not be read.
    """
    known = [one for one in seeds if one]
    hospitals: dict[str, Any] = {}
    for one in known:
        for row in one["hospitals"]:
            largest = hospitals.get(row["name"])
            if largest is None or _epsilon(row) > _epsilon(largest):
                hospitals[row["name"]] = row
    values = [row["epsilon"] for row in hospitals.values()]
    return {
        "private": bool(known),
        "unknown": bool(known)
        and (not values or any(row["unknown"] for row in hospitals.values())),
        "epsilon": max(values) if values and all(value is not None for value in values) else None,
        "hospitals": list(hospitals.values()),
    }


def _epsilon(row: Tree) -> float:
    return float("inf") if row["epsilon"] is None else float(row["epsilon"])


def _difference(row: Tree | None) -> float | None:
    return None if row is None or row.get("difference") is None else float(row["difference"])


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _mean(values: Iterable[Any]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
