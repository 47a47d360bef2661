"""Small pieces that several sections of the comparison's page share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedgan.report.comparison.data import ArmRun, Comparison, Entry
from fedgan.report.html import format as text
from fedgan.report.html.charts import Dot, Row, dot_chart
from fedgan.report.html.format import bounds, number
from fedgan.report.html.tables import Column
from fedgan.report.run.data import Tree


@dataclass(frozen=True)
class Measure:
    """A figure by its key in the JSON; its interval is at `key_ci`, its floor, where it has one, at `key_floor`."""

    key: str
    head: str
    title: str = ""
    digits: int | None = 3  # None: of unknown size, four significant digits


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


def figure_of(result: Tree, key: str, digits: int | None = 3) -> str:
    """A figure as text, or a dash."""
    return (
        text.significant(result.get(key))
        if digits is None
        else text.decimal(result.get(key), digits)
    )


def range_of(result: Tree, key: str, digits: int | None = 3) -> str:
    """A figure's interval as text, or a dash."""
    pair = result.get(f"{key}_ci")
    return text.sized_interval(pair) if digits is None else text.interval(pair, digits)


def p_value(value: object) -> str:
    """A p-value with three decimals; a smaller one as < 0.001."""
    p = number(value)
    return text.DASH if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


SMALL = "Some of these counts are below 10: they may give single people away, so pass this page on with care."
NO_INTERVAL = "No interval: fewer than half of the resamples have both kinds of images."


def lacks_interval(results: Iterable[Tree], key: str) -> bool:
    """Whether a figure was measured whose interval was not."""
    return any(
        number(found.get(key)) is not None and bounds(found.get(f"{key}_ci")) is None
        for found in results
    )


def with_intervals(measures: Sequence[Measure]) -> list[Column]:
    """Two columns a measure: the figure and its interval."""
    return [
        column
        for m in measures
        for column in (Column(m.head, title=m.title), Column(f"{m.head}, 95% interval"))
    ]


def cells(result: Tree, measures: Sequence[Measure]) -> list[str]:
    """The texts for `with_intervals`."""
    return [
        cell
        for m in measures
        for cell in (figure_of(result, m.key, m.digits), range_of(result, m.key, m.digits))
    ]


def with_floors(measures: Sequence[Measure]) -> list[Column]:
    """Three columns a measure: the figure, its interval and its floor."""
    return [
        column
        for m in measures
        for column in (
            Column(m.head, title=m.title),
            Column(f"{m.head}, 95% interval"),
            Column(f"{m.head}, floor", title="Real to real, same size"),
        )
    ]


def floored(result: Tree, measures: Sequence[Measure]) -> list[str]:
    """The texts for `with_floors`."""
    return [
        cell
        for m in measures
        for cell in (
            figure_of(result, m.key, m.digits),
            range_of(result, m.key, m.digits),
            figure_of(result, f"{m.key}_reference", m.digits),
        )
    ]


def run_label(run: ArmRun) -> str:
    """The row head of one training: name, seed, and what became of it where it gives no figures."""
    if not run.failure_reason:
        return run.label
    return f"{run.label} ({'not evaluated' if run.status == 'done' else run.status})"


def entry_label(entry: Entry) -> str:
    """The row head of an arm: its name, and what became of it where it gives no figures."""
    if entry.value is not None:
        return entry.label
    failed = entry.runs and all(run.status == "failed" for run in entry.runs)
    return f"{entry.label} ({'failed' if failed else 'no figures'})"


def failure_note(runs: Sequence[ArmRun]) -> str:
    """A sentence that names each training without figures and why, for the line below a table; empty if there is none."""
    return " ".join(f"{run.label} {run.failure_reason}." for run in runs if run.failure_reason)


def describe(rows: Sequence[Row]) -> str:
    """What a dot chart shows, for a screen reader: every row and mark with its value."""
    parts = []
    for row in rows:
        dots = ", ".join(
            f"{dot.name + ' ' if len(row.dots) > 1 else ''}{dot.value:.3f}{_ends(dot)}"
            for dot in row.dots
        )
        parts.append(f"{row.label}: {dots or row.note or 'not measured'}")
    return "; ".join(parts) + "."


def _ends(dot: Dot) -> str:
    return f" ({dot.interval[0]:.3f} to {dot.interval[1]:.3f})" if dot.interval else ""


def chart_figure(
    key: str,
    title: str,
    rows: Sequence[Row],
    x_label: str,
    domain: tuple[float, float] | None = None,
    references: Sequence[tuple[str, float]] = (),
) -> Markup:
    """A dot chart under its title; no chart where no row has a mark."""
    if not any(row.dots for row in rows):
        return Markup("")
    chart = dot_chart(key, title, describe(rows), rows, x_label, domain, references)
    return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(title, chart)


def auc_domain(rows: Sequence[Row]) -> tuple[float, float]:
    """The axis of AUC: from chance, or from below it where a value lies there, to 1."""
    values = [
        v
        for row in rows
        for dot in row.dots
        for v in (dot.value, *dot.singles, *(dot.interval or ()))
    ]
    return min([0.5, *values]), 1.0


def chance(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """The line of chance, where the axis of AUC reaches below it."""
    return [("chance", 0.5)] if auc_domain(rows)[0] < 0.49 else []


def auc_dot(entry: Entry, result: Tree, key: str = "auc") -> list[Dot]:
    """The mark of an entry's AUC in `result`, or nothing where it was not measured."""
    value = number(result.get(key))
    return (
        []
        if value is None
        else [Dot(entry.label, value, bounds(result.get(f"{key}_ci")), entry.style)]
    )


def arm_legend(comparison: Comparison, real: bool = True) -> list[tuple[str, str]]:
    """(name, style) of real images and of every arm."""
    return [
        (entry.label, entry.style)
        for entry in ([comparison.real] if real else []) + comparison.arms
    ]


def mean_of(values: Sequence[object]) -> float | None:
    """Mean of what is a number; None without any."""
    known = [n for value in values if (n := number(value)) is not None]
    return sum(known) / len(known) if known else None


def join_words(words: Sequence[str]) -> str:
    """a, b and c."""
    return (
        words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
    )
