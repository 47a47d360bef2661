"""Training by images seen: the Fréchet distance and the losses of every arm, a line a seed."""

from __future__ import annotations

from collections.abc import Callable

from markupsafe import Markup

from fedgan.report.comparison.data import FINETUNED, ArmRun, Comparison
from fedgan.report.comparison.parts import arm_legend
from fedgan.report.html import format as text
from fedgan.report.html.charts import Line, legend, line_chart
from fedgan.report.html.format import number, short
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.curves import CURVES
from fedgan.report.run.data import trees

LOSSES = CURVES[:4]  # what comparison.json keeps of each round


def _render(comparison: Comparison) -> Markup:
    runs = comparison.arm_runs
    if not runs:
        return absent("There are no curves: comparison.json lists no arm.")
    threshold = number(comparison.content.get("frechet_threshold"))
    references = [("distance to reach", threshold)] if threshold is not None else []
    fidelity = _figure(
        comparison,
        "frechet",
        "Fréchet distance",
        "Synthetic to real, lower is better.",
        lambda run: run.content.get("curve"),
        references,
    )
    losses = [
        drawn
        for key, title, desc in LOSSES
        if (
            drawn := _figure(
                comparison, key, title, desc, lambda run: run.content.get("losses"), []
            )
        )
        is not None
    ]
    unmeasured = [run.label for run in runs if not points(run.content.get("curve"), "frechet")]
    return render(
        "comparison_curves.html.j2",
        legend=legend(arm_legend(comparison, real=False), "line"),
        fidelity=fidelity,
        losses=losses,
        unmeasured=unmeasured,
        tuned=any(run.kind == FINETUNED for run in runs),
        extractor=str(comparison.content.get("extractor") or "an extractor that is not named"),
        table=_table(comparison) if fidelity is not None else None,
    )


def points(rows: object, key: str) -> list[tuple[float, float]]:
    """(images seen, value) of the points that have both, by rising images seen."""
    found = [(number(row.get("images_seen")), number(row.get(key))) for row in trees(rows)]
    return sorted((x, y) for x, y in found if x is not None and y is not None)


def _figure(
    comparison: Comparison,
    key: str,
    title: str,
    desc: str,
    rows: Callable[[ArmRun], object],
    references: list[tuple[str, float]],
) -> Markup | None:
    lines = [
        Line(run.label, points(rows(run), key), comparison.style(run.name))
        for run in comparison.arm_runs
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    ends = "; ".join(f"{line.name} {short(line.points[-1][1])}" for line in lines)
    words = f"{desc} By images seen. Last values: {ends}."
    chart = line_chart(
        f"curves-{key.replace('_', '-')}", title, words, lines, "images seen", references
    )
    return Markup("<figure><figcaption>{}<small>{}</small></figcaption>{}</figure>").format(
        title, desc, chart
    )


def _table(comparison: Comparison) -> Markup:
    """A row a measured point: the images seen, and the distance of every training."""
    runs = [run for run in comparison.arm_runs if points(run.content.get("curve"), "frechet")]
    curves = [dict(points(run.content.get("curve"), "frechet")) for run in runs]
    places = sorted({x for curve in curves for x in curve})
    rows = [[text.whole(x), *(text.significant(curve.get(x)) for curve in curves)] for x in places]
    return table(
        "Fréchet distance by images seen",
        [Column("Images seen"), *(Column(run.label) for run in runs)],
        rows,
        "curves",
    )


SECTION = Section("curves", "Training", _render)
