"""Communication cost: AUC gap of each federated arm to centralised training, by bytes exchanged."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from fedgan.report.comparison.data import FEDERATED, Comparison, Entry, mean_number
from fedgan.report.comparison.measures import interval_columns
from fedgan.report.html import format as text
from fedgan.report.html.charts import Point, legend, scatter_chart
from fedgan.report.html.format import DASH, bounds, number
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render

BASE = "fedavg"


@dataclass(frozen=True)
class ArmCost:
    """Communication of a federated arm, mean over seeds, and its AUC gap to the centralised arm."""

    entry: Entry
    rounds: float | None
    bytes_per_round: float | None
    bytes: float | None
    gap: float | None
    interval: tuple[float, float] | None

    @property
    def missing(self) -> str:
        """Reason why the arm is not in the chart; empty if it is. A log axis has no zero."""
        missing = [] if self.bytes else ["no bytes" if self.bytes == 0 else "bytes not known"]
        missing += ["no macro AUC to compare"] if self.gap is None else []
        return " and ".join(missing)


def communication_cost(comparison: Comparison) -> Markup:
    """Chart and table; empty without a centralised arm and two federated arms of known bytes."""
    central = comparison.centralized
    if central is None:
        return Markup("")
    arms = [
        _arm_cost(comparison, central, entry)
        for entry in comparison.arms
        if entry.kind == FEDERATED
    ]
    if sum(bool(arm.bytes) for arm in arms) < 2:
        return Markup("")
    shown = sorted((arm for arm in arms if not arm.missing), key=lambda arm: arm.bytes or 0.0)
    names = [(f"{i} {arm.entry.label}", arm.entry.style) for i, arm in enumerate(shown, 1)]
    return render(
        "comparison_communication_cost.html.j2",
        chart=_chart(comparison, central, shown)
        if shown
        else absent(f"No arm can be compared with {central.label}, so there is no chart."),
        legend=legend(names, "dot"),
        table=_table(comparison, central, shown, [arm for arm in arms if arm.missing]),
    )


def _arm_cost(comparison: Comparison, central: Entry, entry: Entry) -> ArmCost:
    # An interrupted training sent less than the arm costs, so it does not count.
    costs = [
        (number(run.cost.get("rounds")), number(run.cost.get("bytes_exchanged")))
        for run in entry.runs
        if run.status == "done"
    ]
    sent = mean_number(n for _, n in costs)
    pair = comparison.difference(central.name, entry.name)
    gap = number(pair.get("difference"))
    if gap is None and central.value is not None and entry.value is not None:
        gap = number(central.value - entry.value)
    return ArmCost(
        entry,
        mean_number(rounds for rounds, _ in costs),
        mean_number(
            n / rounds for rounds, n in costs if rounds is not None and rounds > 0 and n is not None
        ),
        sent if sent is None or sent >= 0 else None,
        gap,
        bounds(pair.get("ci")),
    )


def _chart(comparison: Comparison, central: Entry, shown: list[ArmCost]) -> Markup:
    title = f"AUC gap to {central.label}, by bytes exchanged"
    definition = (
        f"Macro AUC of {central.label} minus that of the arm, with its 95% interval: "
        "lower is better, 0 is equal."
    )
    references = [("equal", 0.0)]
    if comparison.margin is not None:
        references.append(("margin", comparison.margin))
    points = [
        Point(arm.entry.label, arm.bytes, arm.gap, arm.interval, arm.entry.style)
        for arm in shown
        if arm.bytes is not None and arm.gap is not None
    ]
    values = []
    for i, arm in enumerate(shown, 1):
        low, high = map(text.signed, arm.interval or (None, None))
        ends = f" ({low} to {high})" if arm.interval else ""
        values.append(f"{i} {arm.entry.label} {text.size(arm.bytes)}, {text.signed(arm.gap)}{ends}")
    chart = scatter_chart(
        "communication-cost",
        title,
        f"{definition} By bytes: {'; '.join(values)}.",
        points,
        "bytes exchanged per training, log scale",
        text.size,
        references,
    )
    return Markup("<figure><figcaption>{}<small>{}</small></figcaption>{}</figure>").format(
        title, definition, chart
    )


def _table(
    comparison: Comparison, central: Entry, shown: list[ArmCost], left_out: list[ArmCost]
) -> Markup:
    sending = [arm for arm in (*shown, *left_out) if arm.bytes]
    base = next(
        (arm for arm in sending if arm.entry.name == BASE),
        min(sending, key=lambda arm: arm.bytes or 0.0),
    )
    columns = [
        Column("Arm", numeric=False),
        Column("Number", title="In the chart"),
        Column("Rounds"),
        Column("Bytes per round"),
        Column("Bytes", title="Both ways, all hospitals"),
        Column(f"Bytes relative to {base.entry.label}"),
        *interval_columns("AUC gap", f"Macro AUC of {central.label} minus that of the arm"),
    ]
    rows = [_cells(arm, str(i), base) for i, arm in enumerate(shown, 1)]
    rows += [_cells(arm, DASH, base) for arm in left_out]
    return table(
        f"Bytes exchanged, and the AUC gap to {central.label}",
        columns,
        rows,
        "communication-cost",
        more=" ".join(_notes(comparison, shown, left_out)),
    )


def _cells(arm: ArmCost, number_in_chart: str, base: ArmCost) -> list[str]:
    ratio = DASH
    if arm.bytes is not None and base.bytes:
        ratio = f"{text.significant(arm.bytes / base.bytes, 3)} ×"
    is_whole = arm.rounds is None or arm.rounds.is_integer()
    return [
        arm.entry.row_label,
        number_in_chart,
        text.whole(arm.rounds) if is_whole else text.decimal(arm.rounds, 1),
        "none" if arm.bytes_per_round == 0 else text.size(arm.bytes_per_round),
        "none" if arm.bytes == 0 else text.size(arm.bytes),
        ratio,
        text.signed(arm.gap),
        text.spread(arm.interval),
    ]


def _notes(comparison: Comparison, shown: list[ArmCost], left_out: list[ArmCost]) -> list[str]:
    """How to read chart and table, and the arms that are not in the chart."""
    notes = [
        "Rounds and bytes: of finished trainings, both ways, all hospitals, mean over seeds; marks "
        "of nearly equal bytes are side by side. Gaps are paired, on the same test images, over "
        "the seeds that both arms have."
    ]
    if (margin := comparison.margin) is not None:
        notes.append(
            "An arm whose whole interval is below the margin of "
            f"{text.decimal(margin)} is not inferior."
        )
    if unpaired := [arm.entry.label for arm in shown if arm.interval is None]:
        notes.append(
            "Without an interval, as the difference of two means where no pair was measured: "
            f"{'; '.join(unpaired)}."
        )
    if left_out:
        reasons = "; ".join(f"{arm.entry.label} ({arm.missing})" for arm in left_out)
        notes.append(f"Not in the chart: {reasons}.")
    return notes
