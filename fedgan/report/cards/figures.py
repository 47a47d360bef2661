"""The numbers of evaluation.json as rows of a card, and the limits that they show. No number is made here."""

from __future__ import annotations

from typing import Any

from fedgan.report.html.format import bounds, decimal, interval, number, significant
from fedgan.report.run.data import Tree, sentences, tree

WEAK_AUC = 0.6  # a class below it is named under limits: a classifier hardly tells it from chance
FEW_IMAGES = (
    10  # fewer training images of a class in a hospital are named, as are fewer positives of a test
)
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
    """The metrics of a card: utility, per class, per institution, fidelity beside its floor. Empty rows where not measured."""
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
    """`figures` without counts of fewer than `FEW_IMAGES` images, which may tell of a person: None or no row in their place."""
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
    """Sentences for what the figures show to be bad or unknown: weak classes, lost diversity, undefined numbers.

    `counts`: whether a small number of images is told, or only that it is small.
    """
    if not metrics["measured"]:
        return [
            "Nothing was measured: evaluation.json is not there or could not be read. Nothing is known of the quality."
        ]
    found = [
        f"Class '{row['name']}': a classifier trained on synthetic images only reaches an AUC of {decimal(row['synthetic'])} "
        f"on real test images ({_beside(row)}): the synthetic images of this class carry little of what tells it from the others."
        for row in metrics["per_class"]
        if row["synthetic"] is not None and row["synthetic"] < WEAK_AUC
    ]
    found += [
        f"Class '{row['name']}': the interval of the AUC from synthetic images ({interval(row['synthetic_ci'])}) "
        "reaches 0.5: with these test images it cannot be told from chance."
        for row in metrics["per_class"]
        if (ends := bounds(row["synthetic_ci"]))
        and ends[0] <= 0.5
        and (row["synthetic"] or 0.0) >= WEAK_AUC
    ]
    found += [
        f"Class '{row['name']}' has {_few(row['count'], counts)} positive real test images: its figures are uncertain."
        for row in metrics["per_class"]
        if row["count"] is not None and 0 < row["count"] < FEW_IMAGES
    ]
    found += [
        f"Class '{row['name']}': no AUC is known for synthetic images."
        for row in metrics["per_class"]
        if row["synthetic"] is None
    ]
    found += [
        f"Inside {row['name']} a classifier trained on synthetic images only reaches a macro AUC of {decimal(row['synthetic'])} "
        f"({_beside(row)})."
        for row in metrics["per_institution"]
        if row["synthetic"] is not None and row["synthetic"] < WEAK_AUC
    ]
    return found + _below_floor(metrics)


def _below_floor(metrics: Tree) -> list[str]:
    """Sentences for recall and coverage below those of real images among themselves, over all and by class."""
    found = [
        f"{row['metric'].capitalize()} is {decimal(row['value'])}; between real images it is {decimal(row['floor'])}: "
        "the synthetic images show less of the variety of the real ones."
        for row in metrics["fidelity"]["rows"]
        if row["metric"] in ("recall", "coverage") and _is_less(row["value"], row["floor"], 3)
    ]
    for key in ("recall", "coverage"):
        below = [
            f"{row['name']} ({decimal(row[key], 2)}, floor {decimal(row[f'{key}_reference'], 2)})"
            for row in metrics["fidelity_per_class"]
            if _is_less(row[key], row[f"{key}_reference"], 2)
        ]
        if below:
            found.append(
                f"Classes whose {key} lies below that of real images among themselves: {', '.join(below)}."
            )
    distance = next(
        (row for row in metrics["fidelity"]["rows"] if row["metric"] == "frechet"), None
    )
    if distance and _is_less(distance["floor"], distance["value"], None):
        found.append(
            f"The Fréchet distance to real images is {significant(distance['value'])}, that of real images among themselves "
            f"{significant(distance['floor'])}: the synthetic images can be told from real ones."
        )
    return found


def _few(count: float, counts: bool) -> str:
    return f"only {count:g}" if counts else f"fewer than {FEW_IMAGES}"


def _is_less(low: float | None, high: float | None, digits: int | None) -> bool:
    """Whether `low` lies below `high` also as the card writes them (None: four significant digits)."""
    if low is None or high is None or low >= high:
        return False
    return (
        significant(low) != significant(high)
        if digits is None
        else decimal(low, digits) != decimal(high, digits)
    )


def data_limits(rows: list[Tree], counts: bool = True) -> list[str]:
    """Sentences for classes that are rare, or confounded with one hospital, from `hospital_rows`.

    `counts`: whether it is told where and how few they are, or, of a set that is handed on, only which classes.
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
            f"Fewer than {FEW_IMAGES} training images: {', '.join(text for _, text in few)}. Such images are the most likely to "
            "be memorised, and counts this small may themselves say something of a person: decide before this card is published."
        )
    elif few:
        found.append(
            f"Classes of which a hospital had fewer than {FEW_IMAGES} training images: "
            f"{', '.join(dict.fromkeys(label for label, _ in few))}. Such images are the most likely to be memorised."
        )
    labels = dict.fromkeys(label for row in rows for label in row["train_classes"])
    for label in labels if len(rows) > 1 else ():
        if any(row["train_classes"].get(label, 0) is None for row in rows):
            continue  # withheld: who holds it is not known
        holders = [row["name"] for row in rows if row["train_classes"].get(label)]
        if len(holders) == 1:
            found.append(
                f"Only {holders[0]} has training images of '{label}': its look cannot be told from that hospital's look."
            )
        elif not holders:
            found.append(
                f"No hospital has a training image of '{label}': what the model draws for it means nothing."
            )
    return found


# --- rows ----------------------------------------------------------------------------------------


def _utility_rows(utility: Tree) -> list[Tree]:
    """A row for each kind of training: what it trained on and each figure with its interval."""
    named = [(text, key, tree(utility.get(key))) for key, text in TRAINED_ON.items()]
    for extra in utility.get("mixed") or []:
        if isinstance(extra, dict):
            share = extra.get("share")
            more = (
                f"{share:g} × as many synthetic images"
                if number(share) is not None
                else "all synthetic images"
            )
            named.append((f"real images and {more}", f"mixed {share}", extra))
    return [
        {"trained_on": text, "key": key}
        | {name: number(held.get(name)) for name in UTILITY}
        | {f"{name}_ci": _pair(held.get(f"{name}_ci")) for name in UTILITY}
        for text, key, held in named
        if held
    ]


def _pairs(utility: Tree, group: str, figure: str, count: str) -> list[Tree]:
    """A row for each class or institution: the figure from real and from synthetic training, with intervals."""
    sides = {side: tree(tree(utility.get(side)).get(group)) for side in ("real", "synthetic")}
    rows = []
    for name in dict.fromkeys([*sides["real"], *sides["synthetic"]]):
        row: Tree = {"name": name, "figure": figure}
        held = {side: tree(sides[side].get(name)) for side in sides}
        row["count"] = number(held["synthetic"].get(count, held["real"].get(count)))
        for side, values in held.items():
            row[side], row[f"{side}_ci"] = (
                number(values.get(figure)),
                _pair(values.get(f"{figure}_ci")),
            )
        rows.append(row)
    return rows


def _fidelity_row(fidelity: Tree, key: str) -> Tree | None:
    value = number(fidelity.get(key))
    if value is None and number(fidelity.get(f"{key}_reference")) is None:
        return None
    ends, floor = _pair(fidelity.get(f"{key}_ci")), number(fidelity.get(f"{key}_reference"))
    return {
        "metric": key,
        "value": value,
        "ci": ends,
        "floor": floor,
        "better": "higher" if key in SHARES else "lower",
    }


def _groups(fidelity: Tree, group: str) -> list[Tree]:
    keys = [name for key in FIDELITY for name in (key, f"{key}_reference")]
    return [
        {"name": name, "images": number(tree(held).get("images"))}
        | {key: number(tree(held).get(key)) for key in keys}
        for name, held in tree(fidelity.get(group)).items()
    ]


def _leaves(value: Any, path: str = "") -> list[Tree]:
    """The numbers of a tree as rows {name, value}."""
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


def _beside(row: Tree) -> str:
    return (
        "trained on real images it was not measured"
        if row["real"] is None
        else f"trained on real images {decimal(row['real'])}"
    )
