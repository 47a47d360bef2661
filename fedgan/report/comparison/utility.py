"""Utility: classifiers trained on synthetic, real or mixed images, tested on real images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from markupsafe import Markup

from fedgan.report.comparison.charts import arm_legend, auc_dots, auc_figure
from fedgan.report.comparison.data import ArmRun, Comparison, Entry, failure_note, first_number
from fedgan.report.comparison.measures import (
    UTILITY,
    comma_list,
    interval_cell,
    interval_columns,
    interval_note,
    measure_cells,
    measure_columns,
    value_cell,
)
from fedgan.report.html import format as text
from fedgan.report.html.charts import Row, legend
from fedgan.report.html.format import DASH, number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import Tree, dig, tree, trees

NO_OTHERS = (
    "Not measured: classifiers trained on real and tested on synthetic images (TRTS), "
    "and on real with synthetic images added (evaluation.suite = full measures both)."
)
COUNTS = (
    ("train_images", "real training images"),
    ("synthetic_images", "synthetic images"),
    ("test_images", "real test images"),
)


def _render(comparison: Comparison) -> Markup:
    if not any(run.utility for run in comparison.arm_runs) and not comparison.real.figures:
        return absent("No classifier was tested: no arm has utility figures.")
    charts = (_class_chart(comparison), _institution_chart(comparison))
    return render(
        "comparison_utility.html.j2",
        method=_method(comparison),
        main=_main(comparison),
        others=_others(comparison),
        legend=legend(arm_legend(comparison), "dot"),
        charts=[chart for chart in charts if chart],
        classes=_classes(comparison),
        institutions=_institutions(comparison),
        confounding=confounding(comparison),
        label_fidelity=_label_fidelity(comparison),
    )


def _method(comparison: Comparison) -> str:
    """Classifier, seeds, images and bootstrap, as the evaluator recorded them."""
    first = next((run.utility for run in comparison.arm_runs if run.utility), {})
    parts = []
    classifier = first.get("classifier") or comparison.content.get("classifier")
    if isinstance(classifier, str):
        parts.append(f"Classifier: {classifier}.")
    seeds = first.get("seeds")
    if (count := number(len(seeds) if isinstance(seeds, list) else seeds)) is not None:
        means = "; the figures are means" if count > 1 else ""
        parts.append(f"Trained with {text.plural(round(count), 'seed')}{means}.")
    for key, noun in COUNTS:
        if number(first.get(key)) is not None:
            parts.append(f"{text.whole(first[key])} {noun}.")
    for key, head in (("selection", "Choice of the epoch"), ("validation", "Validation")):
        if isinstance(first.get(key), str):
            parts.append(f"{head}: {first[key].rstrip('.')}.")
    if number(first.get("bootstrap")) is not None:
        parts.append(
            f"Intervals: bootstrap, {text.whole(first['bootstrap'])} resamples of the test "
            f"{first.get('resampled') or 'images'}."
        )
    return " ".join(parts)


# --- tables of all measures ----------------------------------------------------------------------


def _main(comparison: Comparison) -> Markup:
    """All measures of training on real images, majority class, and each training's images."""
    runs = comparison.arm_runs
    rows = [
        [head, *measure_cells(_shared(runs, key), UTILITY)]
        for head, key in (("real images (TRTR)", "real"), ("nothing: majority class", "majority"))
    ]
    rows += [
        [
            run.row_label if run.failure_reason else f"{run.row_label} (TSTR)",
            *measure_cells(tree(run.utility.get("synthetic")), UTILITY),
        ]
        for run in runs
    ]
    more = (
        "TRTR: trained on real, tested on real. TSTR: trained on synthetic images only, tested on "
        "real. Majority class: the measures of a constant prediction."
    )
    if len({str(dig(run.utility, "real", "macro_auc")) for run in runs if run.utility}) > 1:
        more += (
            " Warning: the arms differ in the figures of training on real images; "
            "those of the first arm are shown."
        )
    return table(
        "Tested on all real test images",
        [Column("Trained on images of", numeric=False), *measure_columns(UTILITY)],
        rows,
        "utility",
        strong=1,
        more=f"{more} {failure_note(runs)}",
    )


def _shared(runs: Sequence[ArmRun], key: str) -> Tree:
    """Figures that all arms share, from the first arm that has them."""
    return next((found for run in runs if (found := tree(run.utility.get(key)))), {})


def _others(comparison: Comparison) -> Markup:
    """Trained on real and tested on synthetic; trained on real with synthetic images added."""
    rows = [
        [head, run.label, count, *measure_cells(found, UTILITY)]
        for run in comparison.arm_runs
        for head, count, found in _other_results(run)
    ]
    if not rows:
        return absent(NO_OTHERS)
    return table(
        "Real tested on synthetic, and real with synthetic added",
        [
            Column("Training", numeric=False),
            Column("Arm", numeric=False),
            Column("Synthetic images"),
            *measure_columns(UTILITY),
        ],
        rows,
        "utility-others",
        more="TRTS: trained on real, tested on the synthetic images. "
        "Real + n ×: trained on all real images and n times as many synthetic ones.",
    )


def _other_results(run: ArmRun) -> Iterator[tuple[str, str, Tree]]:
    """(name, synthetic images, figures) of TRTS and of each mix."""
    if found := tree(run.utility.get("real_on_synthetic")):
        images = found.get("images", run.utility.get("synthetic_images"))
        yield "TRTS", text.whole(images), found
    for found in trees(run.utility.get("mixed")):
        share = found.get("share")
        amount = f"{number(share):g} ×" if number(share) is not None else str(share)
        yield f"Real + {amount}", text.whole(found.get("synthetic_images")), found


# --- classes and institutions --------------------------------------------------------------------


def _entries(comparison: Comparison) -> list[Entry]:
    return [comparison.real, *comparison.arms]


def _rows(
    comparison: Comparison,
    head: str,
    names: Sequence[str],
    result: Callable[[Entry, str], Tree],
    key: str,
) -> list[Row]:
    """Chart rows: macro AUC over all test images, then `key` of the result for each name."""
    entries = _entries(comparison)
    marks = [dot for e in entries for dot in auc_dots(e.label, e.figures, e.style)]
    return [
        Row(head, marks, strong=True),
        *(
            Row(
                name,
                [dot for e in entries for dot in auc_dots(e.label, result(e, name), e.style, key)],
            )
            for name in names
        ),
    ]


def _class_chart(comparison: Comparison) -> Markup:
    return auc_figure(
        "utility-classes",
        "AUC per class",
        _rows(comparison, "all (macro)", comparison.labels, Entry.for_class, "auc"),
        "AUC on real test images (0.5 is chance)",
    )


def _institution_chart(comparison: Comparison) -> Markup:
    names = comparison.hospital_names
    rows = _rows(comparison, "all", names, Entry.in_institution, "macro_auc")
    if not any(row.dots for row in rows[1:]):
        return Markup("")
    return auc_figure(
        "utility-institutions",
        "Macro AUC within each institution",
        rows,
        "macro AUC on its test images (0.5 is chance)",
    )


def _auc_table(
    caption: str,
    head: Sequence[Column],
    rows: Sequence[tuple[list[str], Sequence[Tree]]],
    entries: Sequence[Entry],
    key: str,
    download: str,
    more: str = "",
) -> Markup:
    """One row per (first cells, results): the figure `key` of each entry with its interval."""
    cells = [
        [*first, *(c for r in results for c in (value_cell(r, key), interval_cell(r, key)))]
        for first, results in rows
    ]
    columns = [*head, *(column for e in entries for column in interval_columns(e.label))]
    note = interval_note([result for _, results in rows for result in results], key)
    return table(caption, columns, cells, download, more=f"{more} {note}".strip())


def _classes(comparison: Comparison) -> Markup:
    if not comparison.labels:
        return absent("The figures name no class.")
    entries = _entries(comparison)
    rows = [
        ([label, positives(comparison, label)], [entry.for_class(label) for entry in entries])
        for label in comparison.labels
    ]
    empty = [
        first[0]
        for first, results in rows
        if all(value_cell(r, "auc") == interval_cell(r, "auc") == DASH for r in results)
    ]
    more = (
        f"Not measured for {comma_list(empty)}: the AUC of a class needs test images with and "
        "without it."
    )
    return _auc_table(
        "AUC per class, on real test images",
        [
            Column("Class", numeric=False),
            Column("Test images", title="Real test images of the class"),
        ],
        rows,
        entries,
        "auc",
        "utility-classes",
        more if empty else "",
    )


def positives(comparison: Comparison, label: str) -> str:
    """Number of real test images of a class, as text."""
    return text.whole(
        first_number(
            dig(run.utility, source, "per_class", label, "positives")
            for run in comparison.arm_runs
            for source in ("real", "synthetic")
        )
    )


def _institutions(comparison: Comparison) -> Markup:
    entries = _entries(comparison)
    rows = []
    for name in comparison.hospital_names:
        results = [entry.in_institution(name) for entry in entries]
        if any(results):
            rows.append(([name, text.whole(comparison.test_images(name))], results))
    if not rows:
        return absent("No figure was measured within a single institution.")
    return _auc_table(
        "Macro AUC within each institution",
        [Column("Institution", numeric=False), Column("Test images")],
        rows,
        entries,
        "macro_auc",
        "utility-institutions",
    )


def confounding(comparison: Comparison) -> str:
    """Classes that only one hospital holds, so that its image style identifies them."""
    holders: dict[str, list[str]] = {}
    for hospital in comparison.hospitals:
        for label, count in tree(dig(hospital, "counts", "train")).items():
            if number(count):
                holders.setdefault(label, []).append(str(hospital.get("name", "unnamed")))
    if not holders or len(comparison.hospitals) < 2:
        return ""
    single = [f"{label} ({names[0]})" for label, names in holders.items() if len(names) == 1]
    if single:
        count = text.plural(len(single), "class is", "classes are")
        return f"Here {count} held by one hospital only: {comma_list(single)}."
    return "Here every class is held by two hospitals or more, but in different shares."


# --- label fidelity ------------------------------------------------------------------------------


def _label_fidelity(comparison: Comparison) -> Markup:
    """Agreement of classifiers trained on real images with synthetic and with real labels."""
    runs = comparison.arm_runs
    found = [tree(run.evaluation.get("label_fidelity")) for run in runs]
    if not any(found):
        return absent(
            "Label fidelity was not measured: the agreement of classifiers trained on real images "
            "with the synthetic labels."
        )
    real = next((result for row in found if (result := tree(row.get("real")))), {})
    sources = [real, *(tree(row.get("synthetic")) for row in found)]
    labels = list(
        dict.fromkeys(label for source in sources for label in tree(source.get("per_class")))
    )
    rows = [["all: accuracy", *(text.decimal(source.get("accuracy")) for source in sources)]]
    for key, head in (("recall", "recall"), ("auc", "AUC")):
        rows += [
            [
                f"{label}: {head}",
                *(text.decimal(dig(source, "per_class", label, key)) for source in sources),
            ]
            for label in labels
        ]
    rows.append(["images classified", *(text.whole(source.get("images")) for source in sources)])
    more = (
        "Accuracy: share of images that are classified as their label; recall: the same for the "
        "images of one class. A value below that of real images is a loss of the generator's "
        f"conditioning. {failure_note(runs)}"
    )
    return table(
        "Agreement of labels with classifiers trained on real images",
        [
            Column("Figure", numeric=False),
            Column("Real test images"),
            *(Column(run.row_label) for run in runs),
        ],
        rows,
        "label-fidelity",
        strong=1,
        more=more,
    )


SECTION = Section("utility", "Utility", _render)
