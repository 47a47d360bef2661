"""What each hospital contributes to the federation: the loss without it, and its Shapley value."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.comparison.data import COALITION, Comparison
from fedgan.report.comparison.parts import chart_figure
from fedgan.report.html import format as text
from fedgan.report.html.charts import Dot, Row
from fedgan.report.html.format import bounds, number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import Tree, sentences, tree, trees

NOT_ASKED = (
    "The hospitals' contributions were not asked for: add 'coalitions' to comparison.arms. It trains a federation of each "
    "coalition of hospitals, six more for three hospitals."
)


def _render(comparison: Comparison) -> Markup:
    found = tree(comparison.content.get("contribution"))
    failed = [
        f"{run.label} {run.failure_reason}."
        for run in comparison.runs
        if run.kind == COALITION and run.failure_reason
    ]
    if not found:
        asked = any(run.kind == COALITION for run in comparison.runs)
        words = "The hospitals' contributions could not be worked out." if asked else NOT_ASKED
        return absent(" ".join([words, *failed]))
    return render(
        "comparison_contribution.html.j2",
        without=_without(found),
        chart=_chart(found),
        shapley=_shapley(found),
        values=_values(found),
        notes=[*sentences(found.get("notes")), *failed],
    )


def _without(found: Tree) -> Markup:
    rows = [
        [
            str(row.get("hospital", "unnamed")),
            text.decimal(row.get("macro_auc_without")),
            text.signed(row.get("loss")),
            text.spread(row.get("ci")),
        ]
        for row in trees(found.get("leave_one_out"))
    ]
    if not rows:
        return absent("What is lost without each hospital was not measured.")
    columns = [
        Column("Left out", numeric=False),
        Column("Macro AUC without it"),
        Column("Loss"),
        Column("Loss, 95% interval"),
    ]
    more = "Loss: macro AUC of the whole federation minus that of the federation of the others, at the same number of images seen."
    return table("One hospital left out", columns, rows, "leave-one-out", more=more)


def _chart(found: Tree) -> Markup:
    rows = [
        Row(
            str(row.get("hospital", "unnamed")),
            [Dot("loss without it", value, bounds(row.get("ci")), "main")],
        )
        for row in trees(found.get("leave_one_out"))
        if (value := number(row.get("loss"))) is not None
    ]
    return chart_figure(
        "contribution-loss",
        "Loss of macro AUC without each hospital",
        rows,
        "loss of macro AUC",
        None,
        [("no loss", 0.0)],
    )


def _shapley(found: Tree) -> Markup:
    rows = [
        [
            str(row.get("hospital", "unnamed")),
            text.signed(row.get("value")),
            text.spread(row.get("ci")),
        ]
        for row in trees(found.get("shapley"))
    ]
    if not rows:
        return absent("Shapley values were not worked out.")
    empty = number(found.get("empty"))
    columns = [
        Column("Hospital", numeric=False),
        Column("Shapley value"),
        Column("Shapley value, 95% interval"),
    ]
    more = "Its mean gain of macro AUC over all orders in which the hospitals may join. "
    chance = text.decimal(0.5 if empty is None else empty)
    more += f"The values add up to the whole federation's macro AUC minus {chance}, which is what nobody's images are worth."
    return table("Shapley values", columns, rows, "shapley", more=more)


def _values(found: Tree) -> Markup:
    rows = [
        [key.replace("+", " + "), text.decimal(value)]
        for key, value in tree(found.get("values")).items()
    ]
    if not rows:
        return absent("The coalitions' figures are not given.")
    return table(
        "Macro AUC of each coalition",
        [Column("Coalition", numeric=False), Column("Macro AUC")],
        rows,
        "coalitions",
    )


SECTION = Section("contribution", "Contribution", _render)
