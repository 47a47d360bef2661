"""An ablation as a ladder: what each rung changed, what it cost, and what privacy it bought. Rows in, rows and a sentence out.

Whoever reads that a private GAN is poor wants to know why: the noise, or what had to be given up before any noise was added
(minibatch-std, R1, ADA, batches that are clipped image by image)? Each rung is compared with the one that it comes from, and
with the foot of the ladder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedgan.evaluation.arms.summary import decimal, gap, shown, span_of, steady, verdict

STEP, FOOT = (
    "rung against the one before",
    "rung against the foot",
)  # families of the paired comparisons
FIDELITY = ("frechet", "precision", "recall", "coverage")
COSTS = ("wall_seconds", "core_seconds")
MODERATE = 10.0  # ε beyond which a guarantee bounds attacks by next to nothing

Tree = Mapping[str, Any]


def families(arms: Sequence[Tree]) -> dict[str, list[tuple[str, str]]]:
    """The pairs (a, b) of an ablation's paired comparisons, from entries of `arms` (`name`, `parent`).

    None where no arm has a parent.
    """
    parents = {arm["name"]: arm["parent"] for arm in arms if arm.get("parent")}
    if not parents:
        return {}
    baseline = _foot(parents)
    found = {
        STEP: list(parents.items()),
        FOOT: [(name, baseline) for name, parent in parents.items() if parent != baseline],
    }
    return {family: pairs for family, pairs in found.items() if pairs}


def ladder(
    arms: Sequence[Tree], summary: Sequence[Tree], comparisons: Sequence[Tree]
) -> dict[str, Any] | None:
    """`ablation` of comparison.json: the foot and its rungs in order; None where no arm has a parent.

    `arms`: entries an arm and seed; `summary`: rows an arm; `comparisons`: with the pairs of `families`.
    """
    parents = {arm["name"]: arm["parent"] for arm in arms if arm.get("parent")}
    if not parents:
        return None
    baseline = _foot(parents)
    pairs = {
        (row["a"], row["b"]): row for row in reversed(comparisons)
    }  # the family of steps comes first
    figures = {row["name"]: row for row in summary}
    variants = []
    for name in (baseline, *parents):
        entries = [arm for arm in arms if arm["name"] == name]
        row = figures.get(name, {})
        parent = parents.get(name)
        variants.append(
            {
                "name": name,
                "parent": parent,
                "changes": dict(entries[0].get("changes") or {}) if entries else {},
                "images_seen": _first(arm.get("images_seen") for arm in entries),
                "public_images": _first((arm.get("public") or {}).get("images") for arm in entries),
                **_privacy([arm.get("privacy") for arm in entries]),
                **{
                    key: _mean(
                        (arm.get("evaluation") or {}).get("fidelity", {}).get(key)
                        for arm in entries
                    )
                    for key in FIDELITY
                },
                **{key: row.get(key) for key in ("macro_auc", "macro_auc_ci", "macro_auc_seeds")},
                **{
                    key: _mean((arm.get("cost") or {}).get(key) for arm in entries) for key in COSTS
                },
                "step": pairs.get((name, parent)) if parent else None,
                "from_baseline": pairs.get((name, baseline)) if parent else None,
            }
        )
    return {"baseline": baseline, "variants": variants}


def answer(found: Tree) -> str:
    """Which rung costs most, whether that is noise, and the best arm that has a guarantee: sentences from `ladder`.

    Where that arm's ε is above 10, the best one at ε ≤ 10 is named, too.
    """
    variants, baseline = found["variants"], found["baseline"]
    steps = [variant for variant in variants if _difference(variant["step"]) is not None]
    if not steps:
        return "What differential privacy imposes costs an unknown amount: no rung of the ladder was measured."
    worst = min(steps, key=lambda variant: float(variant["step"]["difference"]))
    said = [_of_worst(worst)]
    said += _of_noise(variants, baseline, worst)
    guarded = [
        variant
        for variant in variants
        if variant["epsilon"] is not None and variant["macro_auc"] is not None
    ]
    if guarded:
        best = _best(guarded)
        said.append(f"The best arm with a guarantee is {_of_guarded(best, baseline)}.")
        if best["epsilon"] > MODERATE:
            moderate = [variant for variant in guarded if variant["epsilon"] <= MODERATE]
            one = _of_guarded(_best(moderate), baseline) if moderate else "none that was measured"
            said.append(f"The best one at ε ≤ {MODERATE:g} is {one}.")
    elif any(variant["private"] for variant in variants):
        said.append("No arm with a guarantee was measured.")
    return " ".join(said)


def _best(variants: Sequence[Tree]) -> Tree:
    return max(variants, key=lambda variant: float(variant["macro_auc"]))


def _of_guarded(variant: Tree, baseline: str) -> str:
    below = _difference(variant["from_baseline"])
    behind = (
        ""
        if below is None
        else f", {gap(below)} '{baseline}' ({span_of(variant['from_baseline'])})"
    )
    return f"'{variant['name']}', ε ≤ {variant['epsilon']:.3g}: {decimal(variant['macro_auc'])}{behind}"


def _of_worst(worst: Tree) -> str:
    step = worst["step"]
    if step["difference"] >= 0:
        return "In macro AUC (95 % intervals) no rung of the ladder is worse than the one that it comes from."
    where = f"'{worst['name']}' is {gap(step['difference'])} '{worst['parent']}' ({span_of(step)}{verdict(step)})"
    return f"In macro AUC (95 % intervals) the rung that costs most is '{worst['name']}': {where}."


def _of_noise(variants: Sequence[Tree], baseline: str, worst: Tree) -> list[str]:
    """Is it the noise? What stands before it, against the foot, and each first noise against the clipping that it comes from."""
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
        and _difference(variant["step"]) is not None
    ]
    if not noisy:
        return ["Noise was not tested: no rung adds it to clipping alone."]
    before = clipped[noisy[0]["parent"]]
    ends = sorted(noisy, key=lambda variant: -float(variant["step"]["difference"]))
    ends = ends[:1] if len(ends) == 1 else [ends[0], ends[-1]]
    costs = " and ".join(
        f"'{variant['name']}' (ε ≤ {variant['epsilon']:.3g}) is {_against(variant['step'], 'it')}"
        for variant in ends
    )
    base = before["from_baseline"]
    first = (
        ""
        if _difference(base) is None
        else f"without noise, '{before['name']}' is {_against(base, repr(baseline))}; "
    )
    clear = shown(worst["step"]) and steady(worst["step"]) and worst["step"]["difference"] < 0
    claim = "Noise is" if worst in noisy else "Noise is not"
    head = f"{claim} what costs most: " if clear else "Whether noise costs most is not shown: "
    return [f"{head}{first}{costs}."]


def _privacy(seeds: Sequence[Tree | None]) -> dict[str, Any]:
    """The largest ε of each hospital over the seeds, and of all; None is infinite where `private`, and else no privacy at all.

    A hospital whose ledger could not be read makes it unknown: `unknown`.
    """
    known = [one for one in seeds if one]
    hospitals: dict[str, Any] = {}
    for one in known:
        for row in one["hospitals"]:
            worst = hospitals.get(row["name"])
            if worst is None or _size(row) > _size(worst):
                hospitals[row["name"]] = row
    values = [row["epsilon"] for row in hospitals.values()]
    return {
        "private": bool(known),
        "unknown": bool(known)
        and (not values or any(row["unknown"] for row in hospitals.values())),
        "epsilon": max(values) if values and all(value is not None for value in values) else None,
        "hospitals": list(hospitals.values()),
    }


def _size(row: Tree) -> float:
    return float("inf") if row["epsilon"] is None else float(row["epsilon"])


def _foot(parents: Mapping[str, str]) -> str:
    """The arm that all others come from: the first parent that has none itself."""
    return next(parent for parent in parents.values() if parent not in parents)


def _against(row: Tree, other: str) -> str:
    return f"{gap(row['difference'])} {other} ({span_of(row)})"


def _difference(row: Tree | None) -> float | None:
    return None if row is None or row.get("difference") is None else float(row["difference"])


def _first(values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
