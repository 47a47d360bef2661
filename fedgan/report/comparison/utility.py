"""What the synthetic images are good for: classifiers trained on them, on real ones, or on both, and tested on real images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from markupsafe import Markup

from fedgan.report.comparison.data import ArmRun, Comparison, Entry
from fedgan.report.comparison.parts import (
    NO_INTERVAL,
    UTILITY,
    arm_legend,
    auc_domain,
    auc_dot,
    cells,
    chance,
    chart_figure,
    failure_note,
    figure_of,
    join_words,
    lacks_interval,
    range_of,
    run_label,
    with_intervals,
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


def _render(comparison: Comparison) -> Markup:
    if not any(_utility(run) for run in comparison.arm_runs) and not comparison.real.figures:
        return absent("No classifier was tested: no arm has utility figures.")
    charts = [chart for chart in (_class_chart(comparison), _place_chart(comparison)) if chart]
    return render(
        "comparison_utility.html.j2",
        how=_how(comparison),
        main=_main(comparison),
        others=_others(comparison),
        legend=legend(arm_legend(comparison), "dot"),
        charts=charts,
        classes=_classes(comparison),
        places=_places(comparison),
        confounded=confounding(comparison),
        label_fidelity=_label_fidelity(comparison),
    )


def _utility(run: ArmRun) -> Tree:
    return tree(run.evaluation.get("utility"))


def _how(comparison: Comparison) -> str:
    """How the figures were made, from what the evaluator wrote down."""
    first = next((found for run in comparison.arm_runs if (found := _utility(run))), {})
    parts = []
    classifier = first.get("classifier") or comparison.content.get("classifier")
    if isinstance(classifier, str):
        parts.append(f"Classifier: {classifier}.")
    seeds = first.get("seeds")
    if (count := number(len(seeds) if isinstance(seeds, list) else seeds)) is not None:
        parts.append(
            f"Each is trained with {text.plural(round(count), 'seed')}"
            + ("; the figures are means." if count > 1 else ".")
        )
    for key, words in (
        ("train_images", "real training images"),
        ("synthetic_images", "synthetic images"),
        ("test_images", "real test images"),
    ):
        if number(first.get(key)) is not None:
            parts.append(f"{text.whole(first[key])} {words}.")
    for key, head in (("selection", "Choice of the epoch"), ("validation", "Validation")):
        if isinstance(first.get(key), str):
            parts.append(f"{head}: {first[key].rstrip('.')}.")
    if number(first.get("bootstrap")) is not None:
        parts.append(
            f"Intervals: bootstrap, {text.whole(first['bootstrap'])} resamples of the test {first.get('resampled') or 'images'}."
        )
    return " ".join(parts)


# --- tables of all measures ------------------------------------------------------------------------


def _main(comparison: Comparison) -> Markup:
    """Training on real images, the majority's row, and each training's synthetic images: all measures."""
    runs = comparison.arm_runs
    rows = []
    for head, key in (("real images (TRTR)", "real"), ("nothing: always the majority", "majority")):
        rows.append([head, *cells(_shared(runs, key), UTILITY)])
    rows += [
        [
            f"{run_label(run)} (TSTR)" if not run.failure_reason else run_label(run),
            *cells(tree(_utility(run).get("synthetic")), UTILITY),
        ]
        for run in runs
    ]
    columns = [Column("Trained on images of", numeric=False), *with_intervals(UTILITY)]
    more = "TRTR: trained on real, tested on real. TSTR: trained on synthetic images alone, tested on real. "
    more += "The majority's row is what the same measures give to a reader who never looks."
    if len({str(dig(_utility(run), "real", "macro_auc")) for run in runs if _utility(run)}) > 1:
        more += " Beware: the arms do not agree on the figures of training on real images; those of the first arm are shown."
    return table(
        "Tested on all real test images",
        columns,
        rows,
        "utility",
        strong=1,
        more=f"{more} {failure_note(runs)}",
    )


def _shared(runs: Sequence[ArmRun], key: str) -> Tree:
    """Figures that all arms share: those of the first that has them."""
    return next((found for run in runs if (found := tree(_utility(run).get(key)))), {})


def _others(comparison: Comparison) -> Markup:
    """Real tested on synthetic, and real with synthetic images added."""
    rows = [
        [head, run.label, count, *cells(found, UTILITY)]
        for run in comparison.arm_runs
        for head, count, found in _variants(run)
    ]
    if not rows:
        return absent(NO_OTHERS)
    columns = [
        Column("Question", numeric=False),
        Column("Arm", numeric=False),
        Column("Synthetic images"),
        *with_intervals(UTILITY),
    ]
    more = "TRTS: trained on real, tested on the synthetic images. "
    more += "Real + n ×: trained on all real images and n times as many synthetic ones."
    return table(
        "Real tested on synthetic, and real with synthetic added",
        columns,
        rows,
        "utility-others",
        more=more,
    )


def _variants(run: ArmRun) -> Iterator[tuple[str, str, Tree]]:
    """(question, synthetic images, figures) of one training."""
    utility = _utility(run)
    if found := tree(utility.get("real_on_synthetic")):
        yield "TRTS", text.whole(found.get("images", utility.get("synthetic_images"))), found
    for found in trees(utility.get("mixed")):
        share = found.get("share")
        words = f"{number(share):g} ×" if number(share) is not None else str(share)
        yield f"Real + {words}", text.whole(found.get("synthetic_images")), found


# --- classes and institutions ----------------------------------------------------------------------


def _compared(comparison: Comparison) -> list[Entry]:
    return [comparison.real, *comparison.arms]


def _class_chart(comparison: Comparison) -> Markup:
    entries = _compared(comparison)
    rows = [
        Row(
            "all (macro)",
            [dot for e in entries for dot in auc_dot(e, e.figures, "macro_auc")],
            strong=True,
        )
    ]
    rows += [
        Row(label, [dot for e in entries for dot in auc_dot(e, e.of_class(label))])
        for label in comparison.labels
    ]
    return chart_figure(
        "utility-classes",
        "AUC for each class",
        rows,
        "AUC on real test images (0.5 is chance)",
        auc_domain(rows),
        chance(rows),
    )


def _place_chart(comparison: Comparison) -> Markup:
    entries = _compared(comparison)
    rows = [
        Row(
            "all", [dot for e in entries for dot in auc_dot(e, e.figures, "macro_auc")], strong=True
        )
    ]
    rows += [
        Row(name, [dot for e in entries for dot in auc_dot(e, e.inside(name), "macro_auc")])
        for name in comparison.hospital_names
    ]
    if not any(row.dots for row in rows[1:]):
        return Markup("")
    return chart_figure(
        "utility-institutions",
        "Macro AUC inside each institution",
        rows,
        "macro AUC on its test images (0.5 is chance)",
        auc_domain(rows),
        chance(rows),
    )


def _pairs_of(results: Sequence[Tree], key: str) -> list[str]:
    return [cell for result in results for cell in (figure_of(result, key), range_of(result, key))]


def _two_columns(entries: Sequence[Entry]) -> list[Column]:
    return [
        column
        for entry in entries
        for column in (Column(entry.label), Column(f"{entry.label}, 95% interval"))
    ]


def _classes(comparison: Comparison) -> Markup:
    entries = _compared(comparison)
    if not comparison.labels:
        return absent("The figures name no class.")
    rows = [
        [
            label,
            positives(comparison, label),
            *_pairs_of([entry.of_class(label) for entry in entries], "auc"),
        ]
        for label in comparison.labels
    ]
    empty = [row[0] for row in rows if all(cell == DASH for cell in row[2:])]
    more = (
        f"Not measured for {join_words(empty)}: the AUC of a class needs test images that have it and test images that do not."
        if empty
        else ""
    )
    if lacks_interval(
        [entry.of_class(label) for entry in entries for label in comparison.labels], "auc"
    ):
        more = f"{more} {NO_INTERVAL}".strip()
    columns = [
        Column("Class", numeric=False),
        Column("Test images", title="Real test images that have it"),
        *_two_columns(entries),
    ]
    return table(
        "AUC for each class, on real test images", columns, rows, "utility-classes", more=more
    )


def positives(comparison: Comparison, label: str) -> str:
    """How many real test images have a class, as text."""
    found = [
        dig(_utility(run), source, "per_class", label, "positives")
        for run in comparison.arm_runs
        for source in ("real", "synthetic")
    ]
    return text.whole(next((n for n in found if number(n) is not None), None))


def _places(comparison: Comparison) -> Markup:
    entries = _compared(comparison)
    names = [
        name for name in comparison.hospital_names if any(entry.inside(name) for entry in entries)
    ]
    if not names:
        return absent("No figure was measured inside a single institution.")
    rows = [
        [
            name,
            text.whole(comparison.test_images(name)),
            *_pairs_of([entry.inside(name) for entry in entries], "macro_auc"),
        ]
        for name in names
    ]
    columns = [Column("Institution", numeric=False), Column("Test images"), *_two_columns(entries)]
    missing = lacks_interval(
        [entry.inside(name) for entry in entries for name in names], "macro_auc"
    )
    more = NO_INTERVAL if missing else ""
    return table(
        "Macro AUC inside each institution", columns, rows, "utility-institutions", more=more
    )


def confounding(comparison: Comparison) -> str:
    """Which classes only one hospital can show, so that its look gives them away."""
    holders: dict[str, list[str]] = {}
    for hospital in comparison.hospitals:
        for label, count in tree(dig(hospital, "counts", "train")).items():
            if number(count):
                holders.setdefault(label, []).append(str(hospital.get("name", "unnamed")))
    alone = [f"{label} ({names[0]})" for label, names in holders.items() if len(names) == 1]
    if not holders or len(comparison.hospitals) < 2:
        return ""
    if alone:
        return f"Here {text.plural(len(alone), 'class is', 'classes are')} held by one hospital only: {join_words(alone)}."
    return "Here every class is held by two hospitals or more, but not in the same shares."


# --- label fidelity --------------------------------------------------------------------------------


def _label_fidelity(comparison: Comparison) -> Markup:
    """What classifiers trained on real images read in the synthetic labels, beside what they read in real test images."""
    runs = comparison.arm_runs
    readings = [tree(run.evaluation.get("label_fidelity")) for run in runs]
    if not any(readings):
        return absent(
            "Label fidelity was not measured: what classifiers trained on real images read in the synthetic labels."
        )
    real = next((found for reading in readings if (found := tree(reading.get("real")))), {})
    sources = [real, *(tree(reading.get("synthetic")) for reading in readings)]
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
    rows.append(["images read", *(text.whole(source.get("images")) for source in sources)])
    columns = [
        Column("Figure", numeric=False),
        Column("Real test images"),
        *(Column(run_label(run)) for run in runs),
    ]
    more = "Accuracy: the share of images that are read as what was asked for; recall: the same for the images of one class. "
    more += f"What is below the figure of real images is lost by the generator's conditioning. {failure_note(runs)}"
    return table(
        "Is the image what its label says? Read by classifiers trained on real images",
        columns,
        rows,
        "label-fidelity",
        strong=1,
        more=more,
    )


SECTION = Section("utility", "Utility", _render)
