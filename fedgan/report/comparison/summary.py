"""The first screen: what federation costs and gains, in one sentence, one chart and one table."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report import format as text
from fedgan.report.charts import Dot, Row, legend
from fedgan.report.comparison.data import REAL, Comparison, Entry
from fedgan.report.comparison.parts import auc_domain, chance, chart_figure, entry_label, mean_of, p_value, spread
from fedgan.report.comparison.section import Section
from fedgan.report.format import bounds, number
from fedgan.report.run_data import Tree, dig
from fedgan.report.tables import Column, table
from fedgan.report.templating import render

QUESTION = "What does federation cost against centralised training, and what does it gain over each hospital alone?"
NO_ANSWER = "The question has no answer yet: comparison.json does not give one."
COLUMNS = (
    Column("Trained on images of", numeric=False),
    Column("Images seen", title="Real images shown to the discriminators, summed over hospitals"),
    Column("Macro AUC", title="Of classifiers trained on synthetic images only, on all real test images"),
    Column("95% interval"),
    Column("Minus centralised", title="Paired difference of macro AUC on the same test images"),
    Column("95% interval"),
    Column("p, Holm", title="Two-sided p-value of the difference, adjusted by Holm over its family"),
    Column("Fréchet distance", title="Of the synthetic images to real ones; lower is better"),
    Column("Bytes exchanged", title="Mean over seeds"),
)


def _render(comparison: Comparison) -> Markup:
    answer = comparison.content.get("answer")
    return render(
        "comparison_summary.html.j2",
        question=QUESTION,
        answer=answer if isinstance(answer, str) and answer.strip() else NO_ANSWER,
        description=str(comparison.content.get("description") or ""),
        chart=_chart(comparison),
        legend=legend([("mean and 95% interval", "main"), ("one generator's seed", "single main")], "dot"),
        table=_table(comparison),
        facts=_facts(comparison),
        problems=comparison.problems,
    )


def _chart(comparison: Comparison) -> Markup:
    rows = [_row(entry) for entry in comparison.entries]
    real = comparison.real.value
    references = chance(rows) + ([("real images", real)] if real is not None else [])
    return chart_figure(
        "summary-auc",
        "Macro AUC on real test images, by what the classifier was trained on",
        rows,
        "macro AUC (0.5 is chance)",
        auc_domain(rows),
        references,
    )


def _row(entry: Entry) -> Row:
    seeds = entry.figures.get("macro_auc_seeds")
    singles = [n for value in (seeds if isinstance(seeds, list) else []) if (n := number(value)) is not None]
    dots = [] if entry.value is None else [Dot("macro AUC", entry.value, entry.interval, entry.style, singles)]
    note = "no figures: see below" if entry.trouble else ""
    return Row(entry.label, dots, note=note, strong=entry.kind == REAL, minor=entry.is_alone)


def _table(comparison: Comparison) -> Markup:
    rows = [_cells(comparison, entry) for entry in comparison.entries]
    troubles = [f"{entry.label} {entry.trouble}." for entry in comparison.entries if entry.trouble]
    # A seed that failed beside one that did not: the arm has figures, of fewer seeds than the others.
    troubles += [
        f"{run.label} {run.trouble}: the figures of {entry.label} are of its other seeds."
        for entry in comparison.arms
        if not entry.trouble
        for run in entry.runs
        if run.trouble
    ]
    more = "Macro AUC: classifiers trained on nothing but the row's images, tested on the same real images. "
    more += "Intervals and p-values speak of the test images, the small dots of training again with another seed."
    return table("The arms", COLUMNS, rows, "arms", strong=1, more=" ".join([more, *troubles]))


def _cells(comparison: Comparison, entry: Entry) -> list[str]:
    central = comparison.central
    gap: Tree = {}
    if central is not None and central is not entry:
        gap = comparison.difference(entry.name, central.name)
    sent = None if entry.is_alone else mean_of([dig(run.content, "cost", "bytes_exchanged") for run in entry.runs])
    seen = "none" if entry.kind == REAL else text.whole(_seen(entry))
    return [
        entry_label(entry),
        seen,
        text.decimal(entry.value),
        text.interval(entry.figures.get("macro_auc_ci")),
        text.signed(gap.get("difference")),
        spread(bounds(gap.get("ci"))),
        p_value(gap.get("p_holm")),
        text.significant(entry.figures.get("frechet")),
        "none" if entry.is_alone or entry.kind == REAL or sent == 0 else text.size(sent),
    ]


def _seen(entry: Entry) -> float | None:
    found = number(entry.figures.get("images_seen"))
    return found if found is not None else mean_of([run.content.get("images_seen") for run in entry.runs])


def _facts(comparison: Comparison) -> str:
    """How much was compared, in one line."""
    content = comparison.content
    parts = [text.plural(len(comparison.arms), "arm")]
    seeds = content.get("seeds")
    if isinstance(seeds, list) and seeds:
        parts.append(text.plural(len(seeds), "seed"))
    if comparison.hospital_names:
        parts.append(text.plural(len(comparison.hospital_names), "hospital"))
    if comparison.labels:
        parts.append(text.plural(len(comparison.labels), "class", "classes"))
    if (side := number(content.get("resolution"))) is not None:
        parts.append(f"{side:g} × {side:g} pixels")
    if (budget := number(content.get("images_seen_budget"))) is not None:
        parts.append(f"{text.whole(budget)} images seen by each arm and seed")
    return " · ".join(parts)


SECTION = Section("summary", "Summary", "Summary", _render)
