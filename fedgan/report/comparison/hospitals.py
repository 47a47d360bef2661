"""One part per hospital: its data, its results alone, and its gain from the other hospitals."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.comparison.charts import auc_dots, auc_figure
from fedgan.report.comparison.data import LOCAL, Comparison, Entry
from fedgan.report.comparison.measures import (
    comma_list,
    interval_cell,
    interval_columns,
    interval_note,
    value_cell,
)
from fedgan.report.comparison.paired import verdict
from fedgan.report.comparison.parts import Part, render_parts
from fedgan.report.facts import WITHHELD, has_withheld_counts
from fedgan.report.html import format as text
from fedgan.report.html.charts import Row
from fedgan.report.html.format import bounds, number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent
from fedgan.report.run.data import Tree, dig, tree

SPLITS = ("train", "val", "test")


def _render(comparison: Comparison) -> Markup:
    if not comparison.hospital_names:
        return absent("No hospital is known: comparison.json lists none.")
    parts = []
    for n, name in enumerate(comparison.hospital_names, 1):
        row = next((row for row in comparison.hospitals if str(row.get("name")) == name), {})
        details = [
            ("Figures on its test images", _results(comparison, name)),
            ("Its images", _images(comparison, name, row)),
        ]
        sentences = filter(None, (gain(comparison, name), _missing_classes(comparison, row)))
        chart = _chart(comparison, name, n)
        parts.append(Part(f"hospital-{n}", name, " ".join(sentences), details, chart))
    return render_parts(comparison, parts)


def own_generator(comparison: Comparison, name: str) -> Entry | None:
    """The row of a hospital's own generator, trained locally if there is one."""
    found = [entry for entry in comparison.hospital_entries if entry.hospital == name]
    return next((entry for entry in found if entry.kind == LOCAL), found[0] if found else None)


def gain(comparison: Comparison, name: str) -> str:
    """Gain of a hospital from federation on its own test images, in sentences."""
    own, federated = own_generator(comparison, name), comparison.federated
    before = number((own.in_institution(name) if own else {}).get("macro_auc"))
    after = number((federated.in_institution(name) if federated else {}).get("macro_auc"))
    if federated is None:
        return "The gain is not known: there is no federated arm."
    if after is None:
        return f"The gain is not known: {federated.label} has no macro AUC on its test images."
    result = _with_interval(federated.in_institution(name))
    if before is None or own is None:
        return (
            f"{federated.label} reaches a macro AUC of {result} on its test images; "
            "the result of this hospital alone was not measured."
        )
    sentences = (
        "On its own test images, classifiers trained on images of its own generator reach a macro "
        f"AUC of {_with_interval(own.in_institution(name))}, those trained on images of the "
        f"{federated.label} generator {result}: {text.signed(after - before)}."
    )
    if pair := comparison.difference(federated.name, own.name):
        ends = bounds(pair.get("ci"))
        interval = (
            f" (95% interval {text.signed(ends[0])} to {text.signed(ends[1])})" if ends else ""
        )
        sentences += (
            " On the test images of all hospitals the paired difference is "
            f"{text.signed(pair.get('difference'))}{interval}. "
            + verdict(pair | {"a": federated.label, "b": own.label})
        )
    return sentences


def _with_interval(result: Tree) -> str:
    ends = bounds(result.get("macro_auc_ci"))
    interval = text.interval(ends) if ends else "too few test images for an interval"
    return f"{text.decimal(result.get('macro_auc'))} ({interval})"


def _missing_classes(comparison: Comparison, hospital: Tree) -> str:
    """Classes without a training image in the hospital, and their AUC after federated training."""
    counts = tree(dig(hospital, "counts", "train"))
    if not counts or has_withheld_counts(hospital):
        return ""
    missing = [label for label in comparison.data_labels if not number(counts.get(label))]
    if not missing:
        return "It has training images of every class."
    sentences = (
        f"It has no training image of {comma_list(missing)}: "
        f"alone it cannot generate {'it' if len(missing) == 1 else 'them'}."
    )
    federated = comparison.federated
    found = [
        f"{label} {text.decimal(value)}"
        for label in missing
        if federated and (value := number(federated.for_class(label).get("auc"))) is not None
    ]
    if found and federated:
        sentences += (
            f" AUC after {federated.label} training, on all test images: {', '.join(found)}."
        )
    return sentences


def _images(comparison: Comparison, name: str, hospital: Tree) -> Markup:
    if not hospital:
        return absent("The counts of its images are not known.")
    rows = [
        [label, *(text.whole(dig(hospital, "counts", split, label)) for split in SPLITS)]
        for label in comparison.data_labels
    ]
    rows += [
        [head, *(text.whole(dig(hospital, key, split)) for split in SPLITS)]
        for head, key in (("all images", "images"), ("patients", "patients"))
    ]
    columns = [
        Column("Class", numeric=False),
        Column("Training"),
        Column("Validation"),
        Column("Test"),
    ]
    more = f"Counts of each class: {WITHHELD}." if has_withheld_counts(hospital) else ""
    return table(f"Images of {name}", columns, rows, f"images-{name}", more=more)


def _entries(comparison: Comparison, name: str) -> list[Entry]:
    """Real images, the arms, then single hospitals, this one first."""
    others = sorted(comparison.hospital_entries, key=lambda entry: entry.hospital != name)
    return [comparison.real, *comparison.arms, *others]


def _chart(comparison: Comparison, name: str, n: int) -> Markup:
    rows = [
        Row(
            entry.label,
            auc_dots("macro AUC", entry.in_institution(name), entry.style),
            strong=entry.hospital == name,
            minor=entry.is_hospital and entry.hospital != name,
        )
        for entry in _entries(comparison, name)
    ]
    return auc_figure(f"hospital-{n}-auc", f"Macro AUC on the test images of {name}", rows)


def _results(comparison: Comparison, name: str) -> Markup:
    own = own_generator(comparison, name)
    before = number((own.in_institution(name) if own else {}).get("macro_auc"))
    tested = text.whole(comparison.test_images(name))
    rows = []
    for entry in _entries(comparison, name):
        found = entry.in_institution(name)
        value = number(found.get("macro_auc"))
        change = text.DASH
        if value is not None and before is not None and entry is not own:
            change = text.signed(value - before)
        cells = [value_cell(found, "macro_auc"), interval_cell(found, "macro_auc")]
        rows.append([entry.label, *cells, change, tested])
    columns = [
        Column("Trained on images of", numeric=False),
        *interval_columns("Macro AUC"),
        Column(
            "Minus its own",
            title="Macro AUC minus that of training on images of this hospital's own generator",
        ),
        Column("Test images"),
    ]
    more = "Differences within one hospital are not paired and have no interval."
    note = interval_note(
        [entry.in_institution(name) for entry in _entries(comparison, name)], "macro_auc"
    )
    caption = f"Tested on the test images of {name}"
    return table(caption, columns, rows, f"tested-on-{name}", more=f"{more} {note}".strip())


SECTION = Section("hospitals", "Hospitals", _render)
