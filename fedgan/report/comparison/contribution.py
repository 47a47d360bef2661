"""Contribution of each hospital to the federation: leave-one-out loss and Shapley value."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.comparison.charts import dot_figure
from fedgan.report.comparison.data import COALITION, Comparison, failure_note
from fedgan.report.comparison.measures import interval_columns
from fedgan.report.html import format as text
from fedgan.report.html.charts import Dot, Row
from fedgan.report.html.format import bounds, number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import Tree, sentences, tree, trees

NOT_REQUESTED = (
    "The contribution of the hospitals was not requested: add 'coalitions' to comparison.arms. "
    "This trains a federation per coalition of hospitals, six more for three hospitals."
)


def _render(comparison: Comparison) -> Markup:
    found = tree(comparison.content.get("contribution"))
    coalitions = [run for run in comparison.runs if run.kind == COALITION]
    failures = failure_note(coalitions)
    if not found:
        reason = "The contribution of the hospitals could not be computed."
        return absent(f"{reason if coalitions else NOT_REQUESTED} {failures}".strip())
    return render(
        "comparison_contribution.html.j2",
        leave_one_out=_leave_one_out(found),
        chart=_chart(found),
        shapley=_shapley(found),
        coalitions=_coalitions(found),
        notes=[*sentences(found.get("notes")), *filter(None, [failures])],
    )


def _leave_one_out(found: Tree) -> Markup:
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
        return absent("The loss without each hospital was not measured.")
    columns = [
        Column("Left out", numeric=False),
        Column("Macro AUC without it"),
        *interval_columns("Loss"),
    ]
    more = (
        "Loss: macro AUC of the whole federation minus that of the federation of the other "
        "hospitals, at the same number of images seen."
    )
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
    return dot_figure(
        "contribution-loss",
        "Loss of macro AUC without each hospital",
        rows,
        "loss of macro AUC",
        references=[("no loss", 0.0)],
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
        return absent("Shapley values were not computed.")
    empty = number(found.get("empty_coalition_auc"))
    more = (
        "Mean gain of macro AUC over all orders in which the hospitals may join. The values add up "
        "to the macro AUC of the whole federation minus that of the empty coalition, "
        f"{text.decimal(0.5 if empty is None else empty)}."
    )
    columns = [Column("Hospital", numeric=False), *interval_columns("Shapley value")]
    return table("Shapley values", columns, rows, "shapley", more=more)


def _coalitions(found: Tree) -> Markup:
    rows = [
        [key.replace("+", " + "), text.decimal(value)]
        for key, value in tree(found.get("coalition_auc")).items()
    ]
    if not rows:
        return absent("The figures of the coalitions are not given.")
    columns = [Column("Coalition", numeric=False), Column("Macro AUC")]
    return table("Macro AUC of each coalition", columns, rows, "coalitions")


SECTION = Section("contribution", "Contribution", _render)
