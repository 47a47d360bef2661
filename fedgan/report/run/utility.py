"""Utility: classifiers trained on real or on synthetic images, tested on real images."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.html import format as text
from fedgan.report.html.charts import Dot, Row, dot_chart, legend
from fedgan.report.html.format import bounds, number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import RunData, Tree, dig, tree

SOURCES = ("real", "synthetic")
SIZES = (("real", "train_images"), ("synthetic", "synthetic_images"))
COLUMNS = (
    Column("Real", title="Classifier trained on real images"),
    Column("Real, 95% interval"),
    Column("Synthetic only", title="Classifier trained on synthetic images only"),
    Column("Synthetic, 95% interval"),
    Column("Difference", title="Synthetic minus real"),
)


def _render(run: RunData) -> Markup:
    utility = tree(run.evaluation.get("utility"))
    if not any(tree(utility.get(source)) for source in SOURCES):
        return absent(
            "No classifier has been tested yet: evaluation.json is missing or has no utility "
            "figures. The end of a run or the command fedgan evaluate writes them."
        )
    labels = _names(utility, "per_class", run.evaluation_labels)
    institutions = _names(utility, "per_institution", run.hospital_names)
    return render(
        "utility.html.j2",
        method=_method(utility),
        legend=legend(
            [("trained on real images", "real"), ("trained on synthetic images only", "synthetic")],
            "dot",
        ),
        charts=[
            chart
            for chart in (_class_chart(utility, labels), _institution_chart(utility, institutions))
            if chart
        ],
        overall=_overall(utility, labels, run.evaluation_labels),
        institutions=_institutions(utility, institutions),
        class_by_institution=_class_by_institution(utility, labels, institutions),
        no_institutions=not institutions,
    )


def _method(utility: Tree) -> str:
    """Method of the evaluation, as recorded by the evaluator."""
    parts = []
    if isinstance(utility.get("classifier"), str):
        parts.append(f"Classifier: {utility['classifier']}.")
    trained = [
        f"{text.whole(n)} {kind} images"
        for kind, key in SIZES
        if (n := number(utility.get(key))) is not None
    ]
    if trained:
        parts.append(f"Trained on {' or '.join(trained)}.")
    seeds = utility.get("seeds")
    if isinstance(seeds, list):
        parts.append(f"Trained with seeds {', '.join(map(str, seeds))}; the figures are means.")
    elif (count := number(seeds)) is not None:
        parts.append(
            f"Trained with {text.plural(round(count), 'seed')}"
            + ("; the figures are means." if count > 1 else ".")
        )
    if number(utility.get("test_images")) is not None:
        parts.append(
            f"Tested on {text.whole(utility['test_images'])} real images unseen in training."
        )
    return " ".join(parts)


def _footnote(utility: Tree, labels: list[str], known: list[str]) -> str:
    """Positives, resampling, seeds, and classes outside the macro mean."""
    parts = ["For a class, the last column counts the positive test images."]
    resamples, resampled = number(utility.get("bootstrap")), utility.get("resampled")
    if resamples is not None:
        parts.append(
            f"Intervals: percentile bootstrap, {text.whole(resamples)} resamples "
            f"of the test {resampled or 'images'}."
        )
    for source in SOURCES:
        seeds = dig(utility, source, "macro_auc_seeds")
        if isinstance(seeds, list) and len(seeds) > 1:
            parts.append(
                f"Macro AUC per seed, {source}: "
                f"{', '.join(text.decimal(value) for value in seeds)}."
            )
    outside = [label for label in labels if known and label not in known]
    if outside:
        parts.append(f"Not in the macro mean: {', '.join(outside)}.")
    return " ".join(parts)


def _names(utility: Tree, key: str, order: list[str]) -> list[str]:
    """All names under `key` of either source, those in `order` first."""
    found = dict.fromkeys(
        str(name) for source in SOURCES for name in tree(dig(utility, source, key))
    )
    return [name for name in order if name in found] + [name for name in found if name not in order]


def _pair(utility: Tree, path: tuple[str, ...], value: str, ci: str) -> list[str]:
    """Cells: real, its interval, synthetic, its interval, difference."""
    results = [dig(utility, source, *path) for source in SOURCES]
    real, synthetic = (number(dig(result, value)) for result in results)
    gap = text.signed(synthetic - real) if real is not None and synthetic is not None else text.DASH
    real_ci, synthetic_ci = (text.interval(dig(result, ci)) for result in results)
    return [text.decimal(real), real_ci, text.decimal(synthetic), synthetic_ci, gap]


def _overall(utility: Tree, labels: list[str], known: list[str]) -> Markup:
    rows = [
        [
            "Macro AUC",
            *_pair(utility, (), "macro_auc", "macro_auc_ci"),
            text.whole(utility.get("test_images")),
        ],
        [
            "Balanced accuracy",
            *_pair(utility, (), "balanced_accuracy", "balanced_accuracy_ci"),
            text.whole(utility.get("test_images")),
        ],
    ]
    for label in labels:
        counts = [
            number(dig(utility, source, "per_class", label, "positives")) for source in SOURCES
        ]
        positives = next((n for n in counts if n is not None), None)
        rows.append(
            [
                f"AUC, {label}",
                *_pair(utility, ("per_class", label), "auc", "auc_ci"),
                text.whole(positives),
            ]
        )
    columns = [
        Column("Measure", numeric=False),
        *COLUMNS,
        Column("Test images", title="For a class: positive test images"),
    ]
    more = _footnote(utility, labels, known)
    return table("All real test images", columns, rows, "utility", strong=2, more=more)


def _institutions(utility: Tree, institutions: list[str]) -> Markup:
    if not institutions:
        return Markup("")
    rows = []
    for institution in institutions:
        images = [
            number(dig(utility, source, "per_institution", institution, "images"))
            for source in SOURCES
        ]
        count = next((n for n in images if n is not None), None)
        rows.append(
            [
                institution,
                *_pair(utility, ("per_institution", institution), "macro_auc", "macro_auc_ci"),
                text.whole(count),
            ]
        )
    columns = [Column("Institution", numeric=False), *COLUMNS, Column("Test images")]
    return table("Macro AUC per institution", columns, rows, "utility-institutions")


def _class_by_institution(utility: Tree, labels: list[str], institutions: list[str]) -> Markup:
    """AUC per class and institution: real / synthetic in one cell."""

    def cell(institution: str, label: str) -> str:
        entries = [
            dig(utility, source, "per_institution", institution, "per_class", label)
            for source in SOURCES
        ]
        values = [
            number(dig(entry, "auc") if isinstance(entry, dict) else entry) for entry in entries
        ]
        return (
            " / ".join(text.decimal(value) for value in values)
            if any(v is not None for v in values)
            else text.DASH
        )

    rows = [
        [institution, *(cell(institution, label) for label in labels)]
        for institution in institutions
    ]
    if not any(value != text.DASH for row in rows for value in row[1:]):
        return Markup("")
    columns = [Column("Institution", numeric=False), *(Column(label) for label in labels)]
    return table(
        "AUC per class and institution: real / synthetic only",
        columns,
        rows,
        "utility-crossed",
    )


def _dots(utility: Tree, path: tuple[str, ...], value: str, ci: str) -> list[Dot]:
    return [
        Dot(f"trained on {source}", found, bounds(dig(result, ci)), source)
        for source in SOURCES
        for result in [dig(utility, source, *path)]
        if (found := number(dig(result, value))) is not None
    ]


def _class_chart(utility: Tree, labels: list[str]) -> Markup | None:
    rows = [Row("all (macro)", _dots(utility, (), "macro_auc", "macro_auc_ci"), strong=True)]
    rows += [Row(label, _dots(utility, ("per_class", label), "auc", "auc_ci")) for label in labels]
    return _chart("utility-classes", "AUC per class", rows)


def _institution_chart(utility: Tree, institutions: list[str]) -> Markup | None:
    rows = [Row("all", _dots(utility, (), "macro_auc", "macro_auc_ci"), strong=True)]
    rows += [
        Row(
            institution,
            _dots(utility, ("per_institution", institution), "macro_auc", "macro_auc_ci"),
        )
        for institution in institutions
    ]
    return (
        _chart("utility-institutions", "Macro AUC per institution", rows) if institutions else None
    )


def _chart(key: str, title: str, rows: list[Row]) -> Markup | None:
    values = [v for row in rows for dot in row.dots for v in (dot.value, *(dot.interval or ()))]
    if not values:
        return None
    desc = "; ".join(
        f"{row.label}, {dot.name}: {dot.value:.3f}" for row in rows for dot in row.dots
    )
    chart = dot_chart(
        key,
        title,
        desc + ".",
        rows,
        "AUC on real test images (0.5 is chance)",
        (min(0.5, *values), 1.0),
    )
    return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(title, chart)


SECTION = Section("utility", "Utility", _render)
