"""A part for each class: who has images of it, how well it is told apart, how true and how varied its synthetic images are."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from fedgan.report import format as text
from fedgan.report.comparison.data import Comparison, Entry
from fedgan.report.comparison.parts import figure_of, mean_of, range_of
from fedgan.report.comparison.section import Section
from fedgan.report.comparison.utility import positives
from fedgan.report.format import number
from fedgan.report.run_data import dig
from fedgan.report.tables import Column, table
from fedgan.report.templating import absent, render

FIDELITY = (
    ("frechet", "Fréchet distance", None),
    ("frechet_floor", "Fréchet, floor", None),
    ("precision", "Precision", 3),
    ("recall", "Recall", 3),
    ("density", "Density", 3),
    ("coverage", "Coverage", 3),
)


@dataclass(frozen=True)
class Part:
    """One class's part of the section. `id` is its anchor."""

    id: str
    name: str
    counts: str
    table: Markup


def _render(comparison: Comparison) -> Markup:
    if not comparison.labels:
        return absent("The figures name no class.")
    parts = [
        Part(f"class-{i}", label, _counts(comparison, label), _table(comparison, label))
        for i, label in enumerate(comparison.labels, 1)
    ]
    return render("comparison_classes.html.j2", parts=parts)


def _counts(comparison: Comparison, label: str) -> str:
    """Who has training images of the class, and how many test images have it."""
    held = [
        f"{hospital.get('name', 'unnamed')} {text.whole(n)}"
        for hospital in comparison.hospitals
        if (n := number(dig(hospital, "counts", "train", label))) is not None
    ]
    tested = [n for hospital in comparison.hospitals if (n := number(dig(hospital, "counts", "test", label))) is not None]
    words = f"Training images: {', '.join(held)}." if held else "Who has training images of this class is not known."
    known = positives(comparison, label)
    total = text.whole(sum(tested)) if tested else text.DASH
    count = total if known == text.DASH else known
    if count == "0":
        return f"{words} No real test image has this class, so its AUC cannot be measured."
    return f"{words} Real test images: {count}."


def _table(comparison: Comparison, label: str) -> Markup:
    rows = []
    for entry in comparison.entries:
        found = entry.of_class(label)
        fidelity = [_mean(entry, label, key, digits) for key, _, digits in FIDELITY]
        rows.append([entry.label, figure_of(found, "auc"), range_of(found, "auc"), *fidelity])
    columns = [Column("Trained on images of", numeric=False), Column("AUC"), Column("95% interval")]
    columns += [Column(head) for _, head, _ in FIDELITY]
    return table(f"{label}: AUC and fidelity", columns, rows, f"class-{label}", more="Fidelity: mean over the seeds.")


def _mean(entry: Entry, label: str, key: str, digits: int | None) -> str:
    """A figure of the class's synthetic images, averaged over the seeds; a dash for what has no generator."""
    if entry.is_alone:
        values = [
            dig(member, "fidelity", "per_class", label, key)
            for run in entry.runs
            for member in run.members
            if str(member.get("hospital")) == entry.hospital
        ]
    else:
        values = [dig(run.evaluation, "fidelity", "per_class", label, key) for run in entry.runs]
    value = mean_of(values)
    return text.significant(value) if digits is None else text.decimal(value, digits)


SECTION = Section("classes", "Each class", "Classes", _render)
