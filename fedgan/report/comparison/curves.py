"""Fréchet distance and losses by images seen, one line per arm and seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from markupsafe import Markup

from fedgan.report.comparison.charts import arm_legend
from fedgan.report.comparison.data import FINETUNED, ArmRun, Comparison
from fedgan.report.html import format as text
from fedgan.report.html.charts import Line, legend, line_chart
from fedgan.report.html.format import number, short
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.curves import CURVES, points
from fedgan.report.run.data import trees

LOSSES = CURVES[:4]  # those that comparison.json holds per round


def _render(comparison: Comparison) -> Markup:
    runs = comparison.arm_runs
    if not runs:
        return absent("There are no curves: comparison.json lists no arm.")
    threshold = number(comparison.content.get("frechet_threshold"))
    references = [("distance to reach", threshold)] if threshold is not None else []
    title, description = "Fréchet distance", "Synthetic to real, lower is better."
    fidelity = _figure(comparison, "frechet", title, description, distances, references)
    losses = [
        _figure(comparison, key, title, description, partial(_losses, key))
        for key, title, description in LOSSES
    ]
    return render(
        "comparison_curves.html.j2",
        legend=legend(arm_legend(comparison, real=False), "line"),
        fidelity=fidelity,
        losses=[figure for figure in losses if figure],
        unmeasured=[run.label for run in runs if not distances(run)],
        is_finetuned=any(run.kind == FINETUNED for run in runs),
        extractor=str(comparison.content.get("extractor") or "an unnamed extractor"),
        table=_table(comparison) if fidelity else None,
    )


def distances(run: ArmRun) -> list[tuple[float, float]]:
    """(images seen, Fréchet distance) of the measured points."""
    return points(tuple(trees(run.content.get("curve"))), "frechet")


def _losses(key: str, run: ArmRun) -> list[tuple[float, float]]:
    return points(tuple(trees(run.content.get("losses"))), key)


def _figure(
    comparison: Comparison,
    key: str,
    title: str,
    description: str,
    curve: Callable[[ArmRun], list[tuple[float, float]]],
    references: Sequence[tuple[str, float]] = (),
) -> Markup:
    """A line chart with a title; empty where no training has a point."""
    lines = [
        Line(run.label, found, comparison.style(run.name))
        for run in comparison.arm_runs
        if (found := curve(run))
    ]
    if not lines:
        return Markup("")
    ends = "; ".join(f"{line.name} {short(line.points[-1][1])}" for line in lines)
    spoken = f"{description} By images seen. Last values: {ends}."
    svg_key = f"curves-{key.replace('_', '-')}"
    chart = line_chart(svg_key, title, spoken, lines, "images seen", references)
    return Markup("<figure><figcaption>{}<small>{}</small></figcaption>{}</figure>").format(
        title, description, chart
    )


def _table(comparison: Comparison) -> Markup:
    """One row per measured point: images seen and the distance of every training."""
    curves = [(run.label, dict(distances(run))) for run in comparison.arm_runs if distances(run)]
    steps = sorted({x for _, curve in curves for x in curve})
    rows = [
        [text.whole(x), *(text.significant(curve.get(x)) for _, curve in curves)] for x in steps
    ]
    columns = [Column("Images seen"), *(Column(label) for label, _ in curves)]
    return table("Fréchet distance by images seen", columns, rows, "curves")


SECTION = Section("curves", "Training", _render)
