"""First section: cost and gain of federation as an answer, one chart and one table."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.comparison import ablation
from fedgan.report.comparison.charts import auc_dots, auc_figure
from fedgan.report.comparison.data import (
    LOCAL,
    REAL,
    Comparison,
    Entry,
    failure_note,
    first_number,
    mean_number,
)
from fedgan.report.facts import PHANTOM_NOTE
from fedgan.report.html import format as text
from fedgan.report.html.charts import Row, legend
from fedgan.report.html.format import number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import render
from fedgan.report.run.data import dig

QUESTION = (
    "What does federation cost against centralised training, "
    "and what does it gain over each hospital alone?"
)
NO_ANSWER = "No answer is available: comparison.json has none."
DEFINITIONS = (
    "Macro AUC: area under the ROC curve, mean over classes, of classifiers trained only on the "
    "images of the row and tested on the same real images.",
    "Differences are paired, on the same test images; p-values and verdicts are under "
    "Paired differences.",
    "Intervals cover the choice of test images, the small dots training with another seed.",
    "Fréchet distance: from synthetic to real images, mean over seeds, lower is better; its "
    "reference value is the distance from real to real images. "
    "Bytes exchanged: both ways, mean over seeds.",
)


def _render(comparison: Comparison) -> Markup:
    answer = comparison.content.get("answer")
    is_ablation = bool(comparison.variants)
    marks = [("mean and 95% interval", "main"), ("one generator's seed", "single main")]
    return render(
        "comparison_summary.html.j2",
        question=ablation.QUESTION if is_ablation else QUESTION,
        answer=answer if isinstance(answer, str) and answer.strip() else NO_ANSWER,
        description=str(comparison.content.get("description") or ""),
        chart=ablation.chart(comparison) if is_ablation else _chart(comparison),
        legend=ablation.chart_legend(comparison) if is_ablation else legend(marks, "dot"),
        table=ablation.variants_table(comparison) if is_ablation else _table(comparison),
        privacy=ablation.privacy(comparison) if is_ablation else "",
        facts=_facts(comparison),
        phantoms=PHANTOM_NOTE if comparison.has_only_phantoms else "",
        problems=comparison.problems,
    )


def _chart(comparison: Comparison) -> Markup:
    return auc_figure(
        "summary-auc",
        "Macro AUC on real test images, by the training images of the classifier",
        [_row(entry) for entry in comparison.entries],
        real=comparison.real.value,
    )


def _row(entry: Entry) -> Row:
    dots = auc_dots("macro AUC", entry.figures, entry.style, seeds=True)
    note = "no figures: see below" if entry.failure_reason else ""
    return Row(entry.label, dots, note=note, strong=entry.kind == REAL, minor=entry.is_hospital)


def _table(comparison: Comparison) -> Markup:
    # An arm of which only some seeds failed has figures, over fewer seeds than the other arms.
    failed_seeds = [
        f"{run.label} {run.failure_reason}: the figures of {entry.label} cover its other seeds."
        for entry in comparison.arms
        if not entry.failure_reason
        for run in entry.runs
        if run.failure_reason
    ]
    notes = [failure_note(comparison.entries), *dict.fromkeys(failed_seeds)]
    return table(
        "The arms",
        _columns(comparison),
        [_cells(comparison, entry) for entry in comparison.entries],
        "arms",
        strong=1,
        more=" ".join([*_definitions(comparison), *filter(None, notes)]),
    )


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
    """Definitions of the columns and of the image budget of single hospitals."""
    notes = ["Images seen: real training images shown to discriminators, summed over hospitals."]
    if any(entry.kind == LOCAL for entry in comparison.hospital_entries):
        full = "; coalitions of one have the full budget (Paired differences, Contribution)"
        notes.append(
            "Each hospital alone saw its own share of the budget, the same number of images as in "
            f"the federation{full if comparison.content.get('contribution') else ''}."
        )
    return [*notes, *DEFINITIONS]


def _cells(comparison: Comparison, entry: Entry) -> list[str]:
    centralized, federated = comparison.centralized, comparison.federated
    cost, gain = {}, {}
    if centralized not in (None, entry):
        cost = comparison.difference(entry.name, centralized.name)
    if federated not in (None, entry):
        gain = comparison.difference(federated.name, entry.name)
    return [
        entry.row_label,
        "none" if entry.kind == REAL else text.whole(_images_seen(entry)),
        text.decimal(entry.value),
        text.interval(entry.figures.get("macro_auc_ci")),
        text.signed(cost.get("difference")),
        text.spread(cost.get("ci")),
        text.signed(gain.get("difference")),
        text.spread(gain.get("ci")),
        _distance(comparison, entry),
        _bytes_exchanged(entry),
    ]


def _distance(comparison: Comparison, entry: Entry) -> str:
    """Fréchet distance; for real images the reference value, which all arms share."""
    if entry.kind != REAL:
        return text.significant(entry.figures.get("frechet"))
    reference = first_number(run.fidelity.get("frechet_reference") for run in comparison.arm_runs)
    return text.DASH if reference is None else f"{text.significant(reference, 2)} (reference)"


def _bytes_exchanged(entry: Entry) -> str:
    """Bytes exchanged: none for local training, unknown for one fine-tuned hospital."""
    if entry.kind == REAL or (entry.is_hospital and entry.kind == LOCAL):
        return "none"
    if entry.is_hospital:
        return text.DASH
    sent = mean_number(run.cost.get("bytes_exchanged") for run in entry.runs)
    return "none" if sent == 0 else text.size(sent)


def _images_seen(entry: Entry) -> float | None:
    found = number(entry.figures.get("images_seen"))
    if found is not None or entry.is_hospital:
        return found
    return mean_number(run.content.get("images_seen") for run in entry.runs)


def _facts(comparison: Comparison) -> str:
    """Size of the comparison, in one line."""
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
    if tested := _test_images(comparison):
        parts.append(tested)
    if (budget := number(content.get("images_seen_budget"))) is not None:
        seen = [n for run in comparison.arm_runs
                if (n := number(run.content.get("images_seen"))) is not None]  # fmt: skip
        least = f"{text.whole(min(seen))} to " if seen and min(seen) < budget else ""
        parts.append(f"{least}{text.whole(budget)} images seen per arm and seed")
    return " · ".join(parts)


def _test_images(comparison: Comparison) -> str:
    """Number of test images and, where they are the hospitals' own test images, of patients."""
    images = max(
        (n for row in comparison.pairs if (n := number(row.get("images"))) is not None),
        default=None,
    )
    if images is None:
        return ""
    kind = "phantom" if comparison.has_only_phantoms else "real"
    count = f"{text.whole(images)} {kind} test images"
    rows = [
        (number(dig(row, "images", "test")), number(dig(row, "patients", "test")))
        for row in comparison.hospitals
    ]
    is_known = bool(rows) and all(n is not None and p is not None for n, p in rows)
    if is_known and sum(n or 0 for n, _ in rows) == images:
        people = "simulated patients" if comparison.has_only_phantoms else "patients"
        count += f" of {text.whole(sum(p or 0 for _, p in rows))} {people}"
    return count


SECTION = Section("summary", "Summary", _render)
