"""A part for each hospital: its data, what it reaches alone, and what the others' training gives it on its own test images."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from fedgan.report.comparison.data import Comparison, Entry
from fedgan.report.comparison.pairs import verdict
from fedgan.report.comparison.parts import (
    NO_INTERVAL,
    SMALL,
    auc_domain,
    chance,
    chart_figure,
    figure_of,
    join_words,
    lacks_interval,
    range_of,
)
from fedgan.report.facts import WITHHELD, counts_withheld
from fedgan.report.html import format as text
from fedgan.report.html.charts import Dot, Row
from fedgan.report.html.format import bounds, number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import Tree, dig, tree

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Part:
    """One hospital's part of the section. `id` is its anchor."""

    id: str
    name: str
    gain: str
    lacking: str
    data: Markup
    chart: Markup
    results: Markup


def _render(comparison: Comparison) -> Markup:
    names = comparison.hospital_names
    if not names:
        return absent("No hospital is known: comparison.json lists none.")
    parts = [_part(comparison, name, i + 1) for i, name in enumerate(names)]
    return render(
        "comparison_hospitals.html.j2", parts=parts, small=SMALL if comparison.small_counts else ""
    )


def _part(comparison: Comparison, name: str, n: int) -> Part:
    rows = next((row for row in comparison.hospitals if str(row.get("name")) == name), {})
    return Part(
        id=f"hospital-{n}",
        name=name,
        gain=gain(comparison, name),
        lacking=_lacking(comparison, name, rows),
        data=_data(comparison, name, rows),
        chart=_chart(comparison, name, n),
        results=_results(comparison, name),
    )


def own(comparison: Comparison, name: str) -> Entry | None:
    """What a hospital reaches with a generator of its own images alone."""
    found = [entry for entry in comparison.alone if entry.hospital == name]
    return next((entry for entry in found if entry.kind == "local"), found[0] if found else None)


def gain(comparison: Comparison, name: str) -> str:
    """What this hospital gains from the federation, on its own test images, in a sentence or two."""
    alone, federated = own(comparison, name), comparison.federated
    before = number((alone.inside(name) if alone else {}).get("macro_auc"))
    after = number((federated.inside(name) if federated else {}).get("macro_auc"))
    if federated is None:
        return "What it gains is not known: there is no federated arm."
    if after is None:
        return f"What it gains is not known: {federated.label} has no macro AUC on its test images."
    ends = _with_interval(federated.inside(name))
    if before is None or alone is None:
        return f"{federated.label} reaches a macro AUC of {ends} on its test images; what it reaches alone was not measured."
    words = "On its own test images, classifiers trained on what it generates alone reach a macro AUC of "
    words += f"{_with_interval(alone.inside(name))}, "
    words += f"those trained on what {federated.label} training generates {ends}: {text.signed(after - before)}."
    paired = comparison.difference(federated.name, alone.name)
    if paired:
        words += f" Over the test images of all hospitals the paired difference is {text.signed(paired.get('difference'))}"
        both = bounds(paired.get("ci"))
        words += (
            f" (95% interval {text.signed(both[0])} to {text.signed(both[1])}). " if both else ". "
        )
        words += verdict(paired | {"a": federated.label, "b": alone.label})
    return words


def _with_interval(result: Tree) -> str:
    ends = bounds(result.get("macro_auc_ci"))
    return text.decimal(result.get("macro_auc")) + (
        f" ({text.interval(ends)})" if ends else " (too few test images for an interval)"
    )


def _lacking(comparison: Comparison, name: str, hospital: Tree) -> str:
    """The classes of which it has no training image, and what becomes of them alone and in the federation."""
    counts = tree(dig(hospital, "counts", "train"))
    if not counts or counts_withheld(hospital):
        return ""
    missing = [label for label in comparison.data_labels if not number(counts.get(label))]
    if not missing:
        return "It has training images of every class."
    words = f"It has no training image of {join_words(missing)}: alone it cannot generate {'it' if len(missing) == 1 else 'them'}."
    federated = comparison.federated
    found = [
        f"{label} {text.decimal(value)}"
        for label in missing
        if federated and (value := number(federated.of_class(label).get("auc"))) is not None
    ]
    return words + (
        f" AUC after {federated.label} training, over all test images: {', '.join(found)}."
        if found and federated
        else ""
    )


def _data(comparison: Comparison, name: str, hospital: Tree) -> Markup:
    if not hospital:
        return absent("The counts of its images are not known.")
    rows = []
    for label in comparison.data_labels:
        rows.append(
            [label, *(text.whole(dig(hospital, "counts", split, label)) for split in SPLITS)]
        )
    rows.append(["all images", *(text.whole(dig(hospital, "images", split)) for split in SPLITS)])
    rows.append(["patients", *(text.whole(dig(hospital, "patients", split)) for split in SPLITS)])
    columns = [
        Column("Class", numeric=False),
        Column("Training"),
        Column("Validation"),
        Column("Test"),
    ]
    more = f"Counts of each class: {WITHHELD}." if counts_withheld(hospital) else ""
    return table(f"Images of {name}", columns, rows, f"images-{name}", more=more)


def _shown(comparison: Comparison, name: str) -> list[Entry]:
    """Real images and the arms; every hospital alone, this one first."""
    alone = sorted(comparison.alone, key=lambda entry: entry.hospital != name)
    return [comparison.real, *comparison.arms, *alone]


def _chart(comparison: Comparison, name: str, n: int) -> Markup:
    rows = []
    for entry in _shown(comparison, name):
        found = entry.inside(name)
        value = number(found.get("macro_auc"))
        dots = (
            []
            if value is None
            else [Dot("macro AUC", value, bounds(found.get("macro_auc_ci")), entry.style)]
        )
        rows.append(
            Row(
                entry.label,
                dots,
                strong=entry.hospital == name,
                minor=entry.is_alone and entry.hospital != name,
            )
        )
    return chart_figure(
        f"hospital-{n}-auc",
        f"Macro AUC on the test images of {name}",
        rows,
        "macro AUC (0.5 is chance)",
        auc_domain(rows),
        chance(rows),
    )


def _results(comparison: Comparison, name: str) -> Markup:
    alone = own(comparison, name)
    before = number((alone.inside(name) if alone else {}).get("macro_auc"))
    tested = text.whole(comparison.test_images(name))
    rows = []
    for entry in _shown(comparison, name):
        found = entry.inside(name)
        value = number(found.get("macro_auc"))
        change = (
            text.signed(value - before)
            if value is not None and before is not None and entry is not alone
            else text.DASH
        )
        rows.append(
            [
                entry.label,
                figure_of(found, "macro_auc"),
                range_of(found, "macro_auc"),
                change,
                tested,
            ]
        )
    columns = [
        Column("Trained on images of", numeric=False),
        Column("Macro AUC"),
        Column("Macro AUC, 95% interval"),
        Column(
            "Against its own",
            title="Macro AUC minus that of training on what this hospital generates alone",
        ),
        Column("Test images"),
    ]
    more = "Differences inside one hospital are plain differences of the figures; they have no interval."
    if lacks_interval([entry.inside(name) for entry in _shown(comparison, name)], "macro_auc"):
        more += f" {NO_INTERVAL}"
    return table(
        f"Tested on the test images of {name}", columns, rows, f"tested-on-{name}", more=more
    )


SECTION = Section("hospitals", "Hospitals", _render)
