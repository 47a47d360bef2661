"""Figures of evaluation.json as rows of a card, and the limits that they show."""

from __future__ import annotations

from typing import Any

from fedgan.report.html.format import bounds, decimal, interval, number, significant
from fedgan.report.run.data import Tree, sentences, tree

WEAK_AUC = 0.6  # a class below it is listed under limits
# A class with fewer training images at a hospital, or fewer positive test images, is listed.
FEW_IMAGES = 10
TRAINED_ON = {
    "real": "real images (TRTR)",
    "synthetic": "synthetic images only (TSTR)",
    "majority": "none: always the most frequent class",
    "real_on_synthetic": "real images, tested on synthetic ones (TRTS)",
}
UTILITY = (
    "macro_auc",
    "macro_auprc",
    "micro_auc",
    "micro_auprc",
    "balanced_accuracy",
    "macro_f1",
    "sensitivity_at_90",
    "ece",
)
FIDELITY = ("frechet", "kernel", "precision", "recall", "density", "coverage")
SHARES = ("precision", "recall", "density", "coverage")  # higher is better; the rest are distances


def figures(evaluation: Tree) -> Tree:
    """Metrics of a card: utility, per class and institution, fidelity and its reference."""
    utility, fidelity = tree(evaluation.get("utility")), tree(evaluation.get("fidelity"))
    facts = (
        "classifier",
        "seeds",
        "steps",
        "selection",
        "validation",
        "resampled",
        "train_images",
        "synthetic_images",
        "test_images",
    )
    return {
        "measured": bool(utility or fidelity),
        "suite": evaluation.get("suite"),
        "psi": number(evaluation.get("psi")),
        "utility": {key: utility.get(key) for key in facts} | {"rows": _utility_rows(utility)},
        "per_class": _pairs(utility, "per_class", "auc", "positives"),
        "per_institution": _pairs(utility, "per_institution", "macro_auc", "images"),
        "fidelity": {
            key: fidelity.get(key)
            for key in ("extractor", "fid", "real", "images", "reference_images", "k")
        }
        | {"rows": [row for key in FIDELITY if (row := _fidelity_row(fidelity, key))]},
        "fidelity_per_class": _groups(fidelity, "per_class"),
        "fidelity_per_hospital": _groups(fidelity, "per_hospital"),
        "other": _leaves(
            {key: fidelity.get(key) for key in ("path_length", "ms_ssim")}
            | {"label_fidelity": evaluation.get("label_fidelity")}
        ),
        "notes": _notes(evaluation),
    }


def without_small(metrics: Tree) -> Tree:
    """`figures` without counts below `FEW_IMAGES`, which may reveal facts about a person."""
    found = dict(metrics)
    for group, key in (
        ("per_class", "count"),
        ("per_institution", "count"),
        ("fidelity_per_class", "images"),
        ("fidelity_per_hospital", "images"),
    ):
        found[group] = [
            row | {key: None} if (row[key] or 0) < FEW_IMAGES else row for row in metrics[group]
        ]
    counted = (", positives", ", images")
    found["other"] = [
        row
        for row in metrics["other"]
        if row["value"] >= FEW_IMAGES or not row["name"].endswith(counted)
    ]
    return found


def limits(metrics: Tree, counts: bool = True) -> list[str]:
    """Limits that the figures show: weak classes, low diversity, missing figures.

    `counts`: whether to state small numbers of images, or only that they are small.
    """
    if not metrics["measured"]:
        return [
            "Nothing was measured: evaluation.json is missing or could not be read. The quality "
            "is not known."
        ]
    found = [
        f"Class '{row['name']}': a classifier trained on synthetic images only reaches an AUC of "
        f"{decimal(row['synthetic'])} on real test images ({_real_auc(row)}): the synthetic "
        "images of this class hardly show what distinguishes it from other classes."
        for row in metrics["per_class"]
        if row["synthetic"] is not None and row["synthetic"] < WEAK_AUC
    ]
    found += [
        f"Class '{row['name']}': the interval of the AUC from synthetic images "
        f"({interval(row['synthetic_ci'])}) reaches 0.5: with these test images it is not "
        "distinguishable from chance."
        for row in metrics["per_class"]
        if (ends := bounds(row["synthetic_ci"]))
        and ends[0] <= 0.5
        and (row["synthetic"] or 0.0) >= WEAK_AUC
    ]
    found += [
        f"Class '{row['name']}' has {_few_text(row['count'], counts)} positive real test images: "
        "its figures are uncertain."
        for row in metrics["per_class"]
        if row["count"] is not None and 0 < row["count"] < FEW_IMAGES
    ]
    found += [
        f"Class '{row['name']}': the AUC of synthetic images is not known."
        for row in metrics["per_class"]
        if row["synthetic"] is None
    ]
    found += [
        f"At {row['name']} a classifier trained on synthetic images only reaches a macro AUC of "
        f"{decimal(row['synthetic'])} ({_real_auc(row)})."
        for row in metrics["per_institution"]
        if row["synthetic"] is not None and row["synthetic"] < WEAK_AUC
    ]
    return found + _below_reference(metrics)


def _below_reference(metrics: Tree) -> list[str]:
    """Limits where recall, coverage or the Fréchet distance is worse than its reference."""
    found = [
        f"{row['metric'].capitalize()} is {decimal(row['value'])}; between real images it is "
        f"{decimal(row['reference'])}: the synthetic images are less diverse than the real ones."
        for row in metrics["fidelity"]["rows"]
        if row["metric"] in ("recall", "coverage") and _is_less(row["value"], row["reference"], 3)
    ]
    for key in ("recall", "coverage"):
        below = [
            f"{row['name']} ({decimal(row[key], 2)}, reference "
            f"{decimal(row[f'{key}_reference'], 2)})"
            for row in metrics["fidelity_per_class"]
            if _is_less(row[key], row[f"{key}_reference"], 2)
        ]
        if below:
            found.append(
                f"Classes whose {key} is below that between real images: {', '.join(below)}."
            )
    distance = next(
        (row for row in metrics["fidelity"]["rows"] if row["metric"] == "frechet"), None
    )
    if distance and _is_less(distance["reference"], distance["value"], None):
        found.append(
            f"The Fréchet distance to real images is {significant(distance['value'])}, that "
            f"between real images {significant(distance['reference'])}: the synthetic images are "
            "distinguishable from real ones."
        )
    return found


def _few_text(count: float, counts: bool) -> str:
    return f"only {count:g}" if counts else f"fewer than {FEW_IMAGES}"


def _is_less(low: float | None, high: float | None, digits: int | None) -> bool:
    """Whether `low` < `high` as the card prints them (None: four significant digits)."""
    if low is None or high is None or low >= high:
        return False
    return (
        significant(low) != significant(high)
        if digits is None
        else decimal(low, digits) != decimal(high, digits)
    )


def data_limits(rows: list[Tree], counts: bool = True) -> list[str]:
    """Limits of the data, from `hospital_rows`: classes that are rare or at one hospital only.

    `counts`: whether to state where and how few the images are, or (for a release) only the class.
    """
    found = []
    few = [
        (label, f"{label} at {row['name']} ({count})")
        for row in rows
        for label, count in row["train_classes"].items()
        if count is not None and 0 < count < FEW_IMAGES
    ]
    if few and counts:
        found.append(
            f"Fewer than {FEW_IMAGES} training images: {', '.join(text for _, text in few)}. Such "
            "images are the most likely to be memorised, and counts this small may reveal facts "
            "about a person: decide before publishing this card."
        )
    elif few:
        found.append(
            f"Classes with fewer than {FEW_IMAGES} training images at a hospital: "
            f"{', '.join(dict.fromkeys(label for label, _ in few))}. Such images are the most "
            "likely to be memorised."
        )
    labels = dict.fromkeys(label for row in rows for label in row["train_classes"])
    for label in labels if len(rows) > 1 else ():
        if any(row["train_classes"].get(label, 0) is None for row in rows):
            continue  # withheld: the hospitals that have it are not known
        holders = [row["name"] for row in rows if row["train_classes"].get(label)]
        if len(holders) == 1:
            found.append(
                f"Only {holders[0]} has training images of '{label}': the appearance of the class "
                "is confounded with that of the hospital."
            )
        elif not holders:
            found.append(
                f"No hospital has a training image of '{label}': images generated for it are "
                "meaningless."
            )
    return found


# --- rows ----------------------------------------------------------------------------------------


def _utility_rows(utility: Tree) -> list[Tree]:
    """One row per training set of the classifier: its figures with intervals."""
    named = [(text, key, tree(utility.get(key))) for key, text in TRAINED_ON.items()]
    for mixed in utility.get("mixed") or []:
        if isinstance(mixed, dict):
            share = mixed.get("share")
            added = (
                f"{share:g} × as many synthetic images"
                if number(share) is not None
                else "all synthetic images"
            )
            named.append((f"real images and {added}", f"mixed {share}", mixed))
    return [
        {"trained_on": text, "key": key}
        | {name: number(values.get(name)) for name in UTILITY}
        | {f"{name}_ci": _pair(values.get(f"{name}_ci")) for name in UTILITY}
        for text, key, values in named
        if values
    ]


def _pairs(utility: Tree, group: str, figure: str, count: str) -> list[Tree]:
    """One row per class or institution: figures of real and synthetic training, with intervals."""
    sides = {side: tree(tree(utility.get(side)).get(group)) for side in ("real", "synthetic")}
    rows = []
    for name in dict.fromkeys([*sides["real"], *sides["synthetic"]]):
        row: Tree = {"name": name, "figure": figure}
        found = {side: tree(sides[side].get(name)) for side in sides}
        row["count"] = number(found["synthetic"].get(count, found["real"].get(count)))
        for side, values in found.items():
            row[side], row[f"{side}_ci"] = (
                number(values.get(figure)),
                _pair(values.get(f"{figure}_ci")),
            )
        rows.append(row)
    return rows


def _fidelity_row(fidelity: Tree, key: str) -> Tree | None:
    value, reference = number(fidelity.get(key)), number(fidelity.get(f"{key}_reference"))
    if value is None and reference is None:
        return None
    return {
        "metric": key,
        "value": value,
        "ci": _pair(fidelity.get(f"{key}_ci")),
        "reference": reference,
        "better": "higher" if key in SHARES else "lower",
    }


def _groups(fidelity: Tree, group: str) -> list[Tree]:
    keys = [name for key in FIDELITY for name in (key, f"{key}_reference")]
    return [
        {"name": name, "images": number(tree(values).get("images"))}
        | {key: number(tree(values).get(key)) for key in keys}
        for name, values in tree(fidelity.get(group)).items()
    ]


def _leaves(value: Any, path: str = "") -> list[Tree]:
    """The numbers of a nested dict as rows {name, value}."""
    if isinstance(value, dict):
        return [
            row
            for key, item in value.items()
            for row in _leaves(item, f"{path}, {key}" if path else str(key))
        ]
    found = number(value)
    return [] if found is None else [{"name": path, "value": found}]


def _notes(evaluation: Tree) -> list[str]:
    holders = (evaluation, *(tree(evaluation.get(key)) for key in sorted(evaluation)))
    return list(
        dict.fromkeys(text for holder in holders for text in sentences(holder.get("notes")))
    )


def _pair(value: Any) -> list[float] | None:
    ends = bounds(value)
    return None if ends is None else list(ends)


def _real_auc(row: Tree) -> str:
    return (
        "not measured for real images"
        if row["real"] is None
        else f"trained on real images {decimal(row['real'])}"
    )
