"""The first screen: what federation costs and gains, in one sentence, one chart and one table."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.comparison import ablation
from fedgan.report.comparison.data import LOCAL, REAL, Comparison, Entry
from fedgan.report.comparison.parts import auc_domain, chance, chart_figure, entry_label, mean_of
from fedgan.report.facts import DRAWN
from fedgan.report.html import format as text
from fedgan.report.html.charts import Dot, Row, legend
from fedgan.report.html.format import number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import render
from fedgan.report.run.data import dig

QUESTION = "What does federation cost against centralised training, and what does it gain over each hospital alone?"
NO_ANSWER = "The question has no answer yet: comparison.json does not give one."


def _render(comparison: Comparison) -> Markup:
    answer = comparison.content.get("answer")
    climbs = bool(comparison.variants)
    return render(
        "comparison_summary.html.j2",
        question=ablation.QUESTION if climbs else QUESTION,
        answer=answer if isinstance(answer, str) and answer.strip() else NO_ANSWER,
        description=str(comparison.content.get("description") or ""),
        chart=ablation.chart(comparison) if climbs else _chart(comparison),
        legend=ablation.marks(comparison)
        if climbs
        else legend(
            [("mean and 95% interval", "main"), ("one generator's seed", "single main")], "dot"
        ),
        table=ablation.ladder(comparison) if climbs else _table(comparison),
        privacy=ablation.privacy(comparison) if climbs else "",
        facts=_facts(comparison),
        drawn=DRAWN if comparison.drawn else "",
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
    singles = [
        n
        for value in (seeds if isinstance(seeds, list) else [])
        if (n := number(value)) is not None
    ]
    dots = (
        []
        if entry.value is None
        else [Dot("macro AUC", entry.value, entry.interval, entry.style, singles)]
    )
    note = "no figures: see below" if entry.failure_reason else ""
    return Row(entry.label, dots, note=note, strong=entry.kind == REAL, minor=entry.is_alone)


def _table(comparison: Comparison) -> Markup:
    rows = [_cells(comparison, entry) for entry in comparison.entries]
    troubles = [
        f"{entry.label} {entry.failure_reason}."
        for entry in comparison.entries
        if entry.failure_reason
    ]
    # A seed that failed beside one that did not: the arm has figures, of fewer seeds than the others.
    troubles += [
        f"{run.label} {run.failure_reason}: the figures of {entry.label} are of its other seeds."
        for entry in comparison.arms
        if not entry.failure_reason
        for run in entry.runs
        if run.failure_reason
    ]
    more = " ".join([*_definitions(comparison), *dict.fromkeys(troubles)])
    return table("The arms", _columns(comparison), rows, "arms", strong=1, more=more)


def _columns(comparison: Comparison) -> list[Column]:
    federated = comparison.federated.label if comparison.federated else "federated"
    gain = f"{federated[:1].upper()}{federated[1:]} minus it"
    return [
        Column("Trained on images of", numeric=False),
        Column("Images seen"),
        Column("Macro AUC"),
        Column("Macro AUC, 95% interval"),
        Column("Minus centralised"),
        Column("Minus centralised, 95% interval"),
        Column(gain),
        Column(f"{gain}, 95% interval"),
        Column("Fréchet distance"),
        Column("Bytes exchanged"),
    ]


def _definitions(comparison: Comparison) -> list[str]:
    """What the columns mean, and how the budget of the hospitals alone compares."""
    said = ["Images seen: training images shown to the discriminators, summed over hospitals."]
    if any(entry.kind == LOCAL for entry in comparison.alone):
        asked = comparison.content.get("contribution")
        whole = (
            "; at the whole budget it is a coalition of one (Paired, Contribution)" if asked else ""
        )
        said.append(
            f"Each hospital alone saw its own share of the budget, as many images as it shows in the federation{whole}."
        )
    return [
        *said,
        "Macro AUC: area under the ROC curve, mean over classes, of classifiers trained on nothing but the row's images and "
        "tested on the same real images.",
        "Differences are paired, on the same test images; their p-values and verdicts stand under Paired.",
        "Intervals speak of the test images, the small dots of training again with another seed.",
        "Fréchet distance: of the synthetic images to real ones, mean over seeds, lower is better; its floor is that of real "
        "images to real ones. Bytes exchanged: both ways, mean over seeds.",
    ]


def _cells(comparison: Comparison, entry: Entry) -> list[str]:
    central, federated = comparison.central, comparison.federated
    gap = comparison.difference(entry.name, central.name) if central not in (None, entry) else {}
    gain = (
        comparison.difference(federated.name, entry.name) if federated not in (None, entry) else {}
    )
    return [
        entry_label(entry),
        "none" if entry.kind == REAL else text.whole(_seen(entry)),
        text.decimal(entry.value),
        text.interval(entry.figures.get("macro_auc_ci")),
        text.signed(gap.get("difference")),
        text.spread(gap.get("ci")),
        text.signed(gain.get("difference")),
        text.spread(gain.get("ci")),
        _distance(comparison, entry),
        _sent(entry),
    ]


def _distance(comparison: Comparison, entry: Entry) -> str:
    """The Fréchet distance; in the row of real images its floor, which the same real images give every arm."""
    if entry.kind != REAL:
        return text.significant(entry.figures.get("frechet"))
    floors = (
        number(dig(run.evaluation, "fidelity", "frechet_reference")) for run in comparison.arm_runs
    )
    floor = next((value for value in floors if value is not None), None)
    return text.DASH if floor is None else f"{text.significant(floor, 2)} (floor)"


def _sent(entry: Entry) -> str:
    """Bytes exchanged. A hospital that trains alone sends none; what a single fine-tuned hospital sent is not known."""
    if entry.kind == REAL or (entry.is_alone and entry.kind == LOCAL):
        return "none"
    sent = (
        None
        if entry.is_alone
        else mean_of([dig(run.content, "cost", "bytes_exchanged") for run in entry.runs])
    )
    return "none" if sent == 0 else text.size(sent)


def _seen(entry: Entry) -> float | None:
    found = number(entry.figures.get("images_seen"))
    if found is not None or entry.is_alone:
        return found
    return mean_of([run.content.get("images_seen") for run in entry.runs])


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
    if tested := _tested(comparison):
        parts.append(tested)
    if (budget := number(content.get("images_seen_budget"))) is not None:
        seen = [
            n
            for run in comparison.arm_runs
            if (n := number(run.content.get("images_seen"))) is not None
        ]
        least = f"{text.whole(min(seen))} to " if seen and min(seen) < budget else ""
        parts.append(f"{least}{text.whole(budget)} images seen by each arm and seed")
    return " · ".join(parts)


def _tested(comparison: Comparison) -> str:
    """How many real test images there are, and of how many patients, where these are the hospitals' own test images."""
    images = max(
        (n for row in comparison.comparisons if (n := number(row.get("images"))) is not None),
        default=None,
    )
    if images is None:
        return ""
    rows = [
        (number(dig(row, "images", "test")), number(dig(row, "patients", "test")))
        for row in comparison.hospitals
    ]
    words = f"{text.whole(images)} {'drawn' if comparison.drawn else 'real'} test images"
    known = bool(rows) and all(n is not None and p is not None for n, p in rows)
    if known and sum(n or 0 for n, _ in rows) == images:
        words += f" of {text.whole(sum(p or 0 for _, p in rows))} {'drawn ' if comparison.drawn else ''}patients"
    return words


SECTION = Section("summary", "Summary", _render)
