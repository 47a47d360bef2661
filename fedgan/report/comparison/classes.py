"""One part per class: who holds its images, its AUC, its fidelity and diversity."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.comparison.data import Comparison
from fedgan.report.comparison.fidelity import TOO_FEW
from fedgan.report.comparison.measures import (
    FRECHET,
    PRDC,
    interval_cell,
    interval_columns,
    interval_note,
    measure_cells,
    measure_columns,
    value_cell,
)
from fedgan.report.comparison.parts import Part, render_parts
from fedgan.report.comparison.utility import positives
from fedgan.report.facts import WITHHELD, has_withheld_counts
from fedgan.report.html import format as text
from fedgan.report.html.format import number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent
from fedgan.report.run.data import dig, tree

MEASURES = (FRECHET, *(measure for measure in PRDC if measure.key != "density"))


def _render(comparison: Comparison) -> Markup:
    if not comparison.labels:
        return absent("The figures name no class.")
    parts = [
        Part(
            f"class-{i}",
            label,
            _counts(comparison, label),
            [("Figures", _auc(comparison, label) + _fidelity(comparison, label))],
        )
        for i, label in enumerate(comparison.labels, 1)
    ]
    return render_parts(comparison, parts)


def _counts(comparison: Comparison, label: str) -> str:
    """Training images of the class per hospital, and its test images."""
    counts = {
        split: [
            (str(hospital.get("name", "unnamed")), n)
            for hospital in comparison.hospitals
            if (n := number(dig(hospital, "counts", split, label))) is not None
        ]
        for split in ("train", "test")
    }
    if any(map(has_withheld_counts, comparison.hospitals)):
        training = f"Training images of this class: {WITHHELD}."
    elif counts["train"]:
        held = ", ".join(f"{name} {text.whole(n)}" for name, n in counts["train"])
        training = f"Training images: {held}."
    else:
        training = "Which hospitals have training images of this class is not known."
    tested = positives(comparison, label)
    if tested == text.DASH and counts["test"]:
        tested = text.whole(sum(n for _, n in counts["test"]))
    if tested == "0":
        return f"{training} No real test image has this class, so its AUC cannot be measured."
    return f"{training} Real test images: {tested}."


def _auc(comparison: Comparison, label: str) -> Markup:
    """AUC of the class over all real test images; one row per arm and hospital."""
    found = [(entry, entry.for_class(label)) for entry in comparison.entries]
    rows = [
        [entry.label, value_cell(row, "auc"), interval_cell(row, "auc")] for entry, row in found
    ]
    return table(
        f"{label}: AUC on all real test images, {positives(comparison, label)} of this class",
        [Column("Trained on images of", numeric=False), *interval_columns("AUC")],
        rows,
        f"class-{label}",
        more=interval_note([row for _, row in found], "auc"),
    )


def _fidelity(comparison: Comparison, label: str) -> Markup:
    """Fréchet distance and PRDC of the class; one row per training."""
    runs = [
        (run, found)
        for run in comparison.arm_runs
        if (found := tree(dig(run.fidelity, "per_class", label)))
    ]
    if not runs:
        return absent(f"The synthetic images of {label} were not measured separately{TOO_FEW}")
    rows = [
        [run.label, text.whole(found.get("images")), *measure_cells(found, MEASURES, True)]
        for run, found in runs
    ]
    columns = [
        Column("Arm", numeric=False),
        Column("Images"),
        *measure_columns(MEASURES, reference=True),
    ]
    return table(f"{label}: fidelity and diversity", columns, rows, f"class-{label}-fidelity")


SECTION = Section("classes", "Classes", _render)
