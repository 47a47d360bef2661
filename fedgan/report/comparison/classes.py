"""A part for each class: who has images of it, how well it is told apart, how true and how varied its synthetic images are."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from fedgan.report.comparison.data import Comparison
from fedgan.report.comparison.fidelity import FEW, FRECHET, SHARES
from fedgan.report.comparison.parts import (
    NO_INTERVAL,
    SMALL,
    figure_of,
    floored,
    lacks_interval,
    range_of,
    with_floors,
)
from fedgan.report.comparison.utility import positives
from fedgan.report.facts import WITHHELD, counts_withheld
from fedgan.report.html import format as text
from fedgan.report.html.format import number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import dig, tree

MEASURES = (FRECHET, *(measure for measure in SHARES if measure.key != "density"))


@dataclass(frozen=True)
class Part:
    """One class's part of the section. `id` is its anchor."""

    id: str
    name: str
    counts: str
    tables: Markup


def _render(comparison: Comparison) -> Markup:
    if not comparison.labels:
        return absent("The figures name no class.")
    parts = [
        Part(
            f"class-{i}",
            label,
            _counts(comparison, label),
            _auc(comparison, label) + _fidelity(comparison, label),
        )
        for i, label in enumerate(comparison.labels, 1)
    ]
    return render(
        "comparison_classes.html.j2", parts=parts, small=SMALL if comparison.small_counts else ""
    )


def _counts(comparison: Comparison, label: str) -> str:
    """Who has training images of the class, and how many test images have it."""
    held = [
        f"{hospital.get('name', 'unnamed')} {text.whole(n)}"
        for hospital in comparison.hospitals
        if (n := number(dig(hospital, "counts", "train", label))) is not None
    ]
    tested = [
        n
        for hospital in comparison.hospitals
        if (n := number(dig(hospital, "counts", "test", label))) is not None
    ]
    if any(map(counts_withheld, comparison.hospitals)):
        words = f"Training images of this class: {WITHHELD}."
    else:
        words = (
            f"Training images: {', '.join(held)}."
            if held
            else "Who has training images of this class is not known."
        )
    known = positives(comparison, label)
    total = text.whole(sum(tested)) if tested else text.DASH
    count = total if known == text.DASH else known
    if count == "0":
        return f"{words} No real test image has this class, so its AUC cannot be measured."
    return f"{words} Real test images: {count}."


def _auc(comparison: Comparison, label: str) -> Markup:
    """AUC of the class over all real test images, a row an arm and a hospital alone."""
    found = [(entry, entry.of_class(label)) for entry in comparison.entries]
    rows = [[entry.label, figure_of(row, "auc"), range_of(row, "auc")] for entry, row in found]
    columns = [
        Column("Trained on images of", numeric=False),
        Column("AUC"),
        Column("AUC, 95% interval"),
    ]
    more = NO_INTERVAL if lacks_interval([row for _, row in found], "auc") else ""
    return table(
        f"{label}: AUC on {positives(comparison, label)} real test images that have it, among all",
        columns,
        rows,
        f"class-{label}",
        more=more,
    )


def _fidelity(comparison: Comparison, label: str) -> Markup:
    """Distance and shares of the class's synthetic images, a row a training; a sentence where there are none."""
    runs = [
        (run, found)
        for run in comparison.arm_runs
        if (found := tree(dig(run.evaluation, "fidelity", "per_class", label)))
    ]
    if not runs:
        return absent(f"The synthetic images of {label} were not measured on their own{FEW}")
    rows = [
        [run.label, text.whole(found.get("images")), *floored(found, MEASURES)]
        for run, found in runs
    ]
    columns = [Column("Arm", numeric=False), Column("Images"), *with_floors(MEASURES)]
    return table(f"{label}: fidelity and diversity", columns, rows, f"class-{label}-fidelity")


SECTION = Section("classes", "Classes", _render)
