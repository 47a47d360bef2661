"""What bytes buy: how far each federated arm stays behind pooling the images, by what its training sent."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from fedgan.report.comparison.data import FEDERATED, Comparison, Entry
from fedgan.report.comparison.parts import entry_label, mean_of
from fedgan.report.html import format as text
from fedgan.report.html.charts import Point, legend, scatter_chart
from fedgan.report.html.format import bounds, number
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import dig

BASE = "fedavg"


@dataclass(frozen=True)
class Priced:
    """A federated arm: what it exchanged, mean over seeds, and how far it stays behind the centralised arm."""

    entry: Entry
    rounds: float | None
    a_round: float | None
    bytes: float | None
    gap: float | None
    interval: tuple[float, float] | None

    @property
    def missing(self) -> str:
        """What keeps it out of the chart; empty where nothing does. A logarithmic axis has no place for no bytes."""
        missing = [] if self.bytes else ["no bytes" if self.bytes == 0 else "bytes not known"]
        missing += ["no macro AUC to compare"] if self.gap is None else []
        return " and ".join(missing)


def communication_cost(comparison: Comparison) -> Markup:
    """Chart and table; nothing where there is no centralised arm or fewer than two federated ones whose bytes are known."""
    central = comparison.central
    if central is None:
        return Markup("")
    arms = [
        _priced(comparison, central, entry) for entry in comparison.arms if entry.kind == FEDERATED
    ]
    if sum(bool(arm.bytes) for arm in arms) < 2:
        return Markup("")
    shown = sorted((arm for arm in arms if not arm.missing), key=lambda arm: arm.bytes or 0.0)
    return render(
        "comparison_price.html.j2",
        chart=_chart(comparison, central, shown)
        if shown
        else absent(f"No arm can be compared with {central.label}: no chart."),
        legend=legend(
            [(f"{i} {arm.entry.label}", arm.entry.style) for i, arm in enumerate(shown, 1)], "dot"
        ),
        table=_table(comparison, central, shown, [arm for arm in arms if arm.missing]),
    )


def _priced(comparison: Comparison, central: Entry, entry: Entry) -> Priced:
    # A training that was broken off has sent less than the arm costs, so it does not count.
    costs = [
        (
            number(dig(run.content, "cost", "rounds")),
            number(dig(run.content, "cost", "bytes_exchanged")),
        )
        for run in entry.runs
        if run.status == "done"
    ]
    sent = mean_of([n for _, n in costs])
    pair = comparison.difference(central.name, entry.name)
    gap = number(pair.get("difference"))
    if gap is None and central.value is not None and entry.value is not None:
        gap = number(central.value - entry.value)
    return Priced(
        entry,
        mean_of([rounds for rounds, _ in costs]),
        mean_of(
            [
                n / rounds
                for rounds, n in costs
                if rounds is not None and rounds > 0 and n is not None
            ]
        ),
        sent if sent is None or sent >= 0 else None,
        gap,
        bounds(pair.get("ci")),
    )


def _chart(comparison: Comparison, central: Entry, shown: list[Priced]) -> Markup:
    title = f"AUC gap to {central.label}, by bytes exchanged"
    how = f"Macro AUC of {central.label} minus that of the arm, with its 95% interval: lower is better, 0 is as good."
    margin = _margin(comparison)
    references = [("equal", 0.0)] + ([("margin", margin)] if margin is not None else [])
    points = [
        Point(arm.entry.label, arm.bytes, arm.gap, arm.interval, arm.entry.style)
        for arm in shown
        if arm.bytes is not None and arm.gap is not None
    ]
    said = "; ".join(
        f"{i} {arm.entry.label} {text.size(arm.bytes)}, {text.signed(arm.gap)}"
        + (
            f" ({text.signed(arm.interval[0])} to {text.signed(arm.interval[1])})"
            if arm.interval
            else ""
        )
        for i, arm in enumerate(shown, 1)
    )
    chart = scatter_chart(
        "cost-price",
        title,
        f"{how} By bytes: {said}.",
        points,
        "bytes exchanged in a training, log scale",
        text.size,
        references,
    )
    return Markup("<figure><figcaption>{}<small>{}</small></figcaption>{}</figure>").format(
        title, how, chart
    )


def _margin(comparison: Comparison) -> float | None:
    margin = number(comparison.content.get("margin"))
    return margin if margin is not None and margin > 0 else None


def _table(
    comparison: Comparison, central: Entry, shown: list[Priced], left_out: list[Priced]
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
        Column("Bytes a round"),
        Column("Bytes", title="Both ways, all hospitals"),
        Column(f"Bytes over those of {base.entry.label}"),
        Column("AUC gap", title=f"Macro AUC of {central.label} minus that of the arm"),
        Column("AUC gap, 95% interval"),
    ]
    rows = [_cells(arm, str(i), base) for i, arm in enumerate(shown, 1)]
    rows += [_cells(arm, text.DASH, base) for arm in left_out]
    return table(
        f"Bytes exchanged, and the AUC gap to {central.label}",
        columns,
        rows,
        "price",
        more=" ".join(_notes(comparison, shown, left_out)),
    )


def _cells(arm: Priced, place: str, base: Priced) -> list[str]:
    ratio = (
        text.significant(arm.bytes / base.bytes, 3)
        if arm.bytes is not None and base.bytes
        else text.DASH
    )
    rounds = (
        text.whole(arm.rounds)
        if arm.rounds is None or arm.rounds.is_integer()
        else text.decimal(arm.rounds, 1)
    )
    return [
        entry_label(arm.entry),
        place,
        rounds,
        "none" if arm.a_round == 0 else text.size(arm.a_round),
        "none" if arm.bytes == 0 else text.size(arm.bytes),
        ratio if ratio == text.DASH else f"{ratio} ×",
        text.signed(arm.gap),
        text.spread(arm.interval),
    ]


def _notes(comparison: Comparison, shown: list[Priced], left_out: list[Priced]) -> list[str]:
    """How to read chart and table, and which arms the chart lacks."""
    said = [
        "Rounds and bytes: of trainings that were finished, both ways, all hospitals, mean over seeds; the chart puts marks of "
        "like bytes side by side. Gaps are paired, on the same test images, over the seeds that both arms have."
    ]
    if (margin := _margin(comparison)) is not None:
        said.append(
            f"An arm whose whole interval lies below the margin of {text.decimal(margin)} is not inferior."
        )
    if bare := [arm.entry.label for arm in shown if arm.interval is None]:
        said.append(
            f"Without an interval, as the difference of two means where no pair was measured: {'; '.join(bare)}."
        )
    if left_out:
        said.append(
            f"Not in the chart: {'; '.join(f'{arm.entry.label} ({arm.missing})' for arm in left_out)}."
        )
    return said
