"""Measures of the comparison report, their table columns and cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedgan.report.html import format as text
from fedgan.report.html.format import bounds, number
from fedgan.report.html.tables import Column
from fedgan.report.run.data import Tree

SMALL_COUNTS = (
    "Some of these counts are below 10 and may identify single people: "
    "pass this report on with care."
)
NO_INTERVAL = (
    "No interval: fewer than half of the resamples have images of both kinds, "
    "with and without the class."
)


@dataclass(frozen=True)
class Measure:
    """A figure by its JSON key; `key_ci` holds its interval, `key_reference` its reference value.

    `digits`: decimals, or None for four significant digits.
    """

    key: str
    head: str
    title: str = ""
    digits: int | None = 3


UTILITY = (
    Measure("macro_auc", "Macro AUC", "Area under the ROC curve, mean over classes"),
    Measure("micro_auc", "Micro AUC", "Area under the ROC curve over all (image, class) pairs"),
    Measure(
        "macro_auprc", "Macro AUPRC", "Area under the precision-recall curve, mean over classes"
    ),
    Measure(
        "micro_auprc",
        "Micro AUPRC",
        "Area under the precision-recall curve over all (image, class) pairs",
    ),
    Measure("balanced_accuracy", "Balanced accuracy"),
    Measure("macro_f1", "Macro F1", "F1, mean over classes"),
    Measure("sensitivity_at_90", "Sensitivity at 90% specificity", "Mean over classes"),
    Measure("ece", "Calibration error", "Expected calibration error; lower is better"),
)
FRECHET = Measure(
    "frechet", "Fréchet distance", "Heusel et al. 2017, over the named features", None
)
KERNEL = Measure(
    "kernel",
    "Kernel distance",
    "Bińkowski et al. 2018; unbiased, so around zero for equal sets",
    None,
)
PRDC = (
    Measure("precision", "Precision", "Share of synthetic images within the real manifold"),
    Measure("recall", "Recall", "Share of real images within the synthetic manifold"),
    Measure("density", "Density", "Like precision, but robust to outliers; may exceed 1"),
    Measure("coverage", "Coverage", "Share of real images that have a synthetic neighbour"),
)


def value_cell(result: Tree, key: str, digits: int | None = 3) -> str:
    """A figure as text, or a dash."""
    value = result.get(key)
    return text.significant(value) if digits is None else text.decimal(value, digits)


def interval_cell(result: Tree, key: str, digits: int | None = 3) -> str:
    """A figure's interval as text, or a dash."""
    pair = result.get(f"{key}_ci")
    return text.sized_interval(pair) if digits is None else text.interval(pair, digits)


def interval_columns(head: str, title: str = "") -> list[Column]:
    """Two columns: a figure and its 95% interval."""
    return [Column(head, title=title), Column(f"{head}, 95% interval")]


def measure_columns(measures: Sequence[Measure], reference: bool = False) -> list[Column]:
    """Columns per measure: figure, interval and optional real-to-real reference value."""
    columns = []
    for m in measures:
        columns += interval_columns(m.head, m.title)
        if reference:
            columns.append(Column(f"{m.head}, reference", title="Real to real, same size"))
    return columns


def measure_cells(result: Tree, measures: Sequence[Measure], reference: bool = False) -> list[str]:
    """The cells of `measure_columns`."""
    cells = []
    for m in measures:
        cells += [value_cell(result, m.key, m.digits), interval_cell(result, m.key, m.digits)]
        if reference:
            cells.append(value_cell(result, f"{m.key}_reference", m.digits))
    return cells


def p_value(value: object) -> str:
    """A p-value with three decimals, or < 0.001."""
    p = number(value)
    return text.DASH if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def interval_note(results: Iterable[Tree], key: str) -> str:
    """`NO_INTERVAL` if a figure was measured without its interval, else empty."""
    missing = any(
        number(found.get(key)) is not None and bounds(found.get(f"{key}_ci")) is None
        for found in results
    )
    return NO_INTERVAL if missing else ""


def comma_list(items: Sequence[str]) -> str:
    """a, b and c."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else "".join(items)
