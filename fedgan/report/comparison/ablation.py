"""Ablation: chart and table of what each variant changed, reached and cost, privacy included."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.comparison.charts import auc_dots, auc_figure
from fedgan.report.comparison.data import Comparison, failure_note
from fedgan.report.comparison.measures import interval_columns
from fedgan.report.facts import flatten
from fedgan.report.html import format as text
from fedgan.report.html.charts import Row, legend
from fedgan.report.html.format import DASH, number
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import render
from fedgan.report.run.data import Tree, tree, trees

QUESTION = "How much does each part of differential privacy cost, and does the noise cost most?"
INFINITE, UNKNOWN = "∞", "not known"
NO_PRIVACY, CLIPPED, NOISY = "a1", "a3", "a2"  # chart styles
STYLE_NAMES = {
    NO_PRIVACY: "without privacy",
    CLIPPED: "clipping alone, ε = ∞",
    NOISY: "with noise, ε as given",
}
NOTES = (
    "Macro AUC: mean over classes, of classifiers trained only on the images of the variant and "
    "tested on the same real images.",
    "Differences are paired, on the same test images; p-values and verdicts are under "
    "Paired differences.",
    "Fréchet distance, precision, recall, coverage and time are means over seeds.",
    "Images seen: real training images, summed over hospitals, in whole batches; "
    "for a private step the expected number.",
)


def epsilon(variant: Tree) -> str:
    """ε as text; a dash without privacy."""
    if variant.get("private") is not True:
        return DASH
    return UNKNOWN if variant.get("unknown") is True else _epsilon(variant.get("epsilon"))


def chart(comparison: Comparison) -> Markup:
    """Macro AUC per variant, with its interval, its seeds and its ε."""
    return auc_figure(
        "ablation-auc",
        "Macro AUC on real test images of classifiers trained on the images of each variant",
        [_row(variant) for variant in comparison.variants],
        real=comparison.real.value,
    )


def chart_legend(comparison: Comparison) -> Markup:
    """Legend of `chart`: the kinds of privacy that occur."""
    found = {_style(variant) for variant in comparison.variants}
    kinds = [(name, style) for style, name in STYLE_NAMES.items() if style in found]
    return legend([*kinds, ("one generator's seed", "single main")], "dot")


def variants_table(comparison: Comparison) -> Markup:
    """Quality, utility, ε and time; one row per variant."""
    columns = [
        Column("Variant", numeric=False),
        Column("Derived from", numeric=False),
        Column("Changes", numeric=False),
        Column("ε", title="Of this training alone; the largest of its hospitals and seeds"),
        *interval_columns("Macro AUC"),
        *interval_columns("Minus the variant before"),
        *interval_columns("Minus the baseline"),
        Column("Fréchet distance"),
        Column("Precision"),
        Column("Recall"),
        Column("Coverage"),
        Column("Images seen"),
        Column("Public images", title="Images of the pretraining on public phantoms"),
        Column("Wall time"),
    ]
    rows = [_cells(variant) for variant in comparison.variants]
    more = " ".join([*NOTES, failure_note(comparison.arms)]).strip()
    return table("The variants", columns, rows, "ablation", strong=1, more=more)


def privacy(comparison: Comparison) -> Markup:
    """Scope of ε, and ε of each hospital."""
    rows = [
        [_name(variant), str(hospital.get("name", "unnamed")), *_spent_cells(hospital)]
        for variant in comparison.variants
        for hospital in trees(variant.get("hospitals"))
    ]
    columns = [
        Column("Variant", numeric=False),
        Column("Hospital", numeric=False),
        Column("ε"),
        Column("δ"),
        Column("Noise multiplier"),
        Column("Sampling rate"),
        Column("Steps"),
        Column(
            "ε of the whole ledger",
            title="Of all private trainings in the hospital's ledger at the time of writing",
        ),
    ]
    caption = "ε of each hospital, the largest over seeds"
    content = table(caption, columns, rows, "ablation-privacy") if rows else Markup("")
    return render("comparison_ablation.html.j2", table=content)


def _name(variant: Tree) -> str:
    return str(variant.get("name") or "unnamed")


def _style(variant: Tree) -> str:
    if variant.get("private") is not True:
        return NO_PRIVACY
    return CLIPPED if number(variant.get("epsilon")) is None else NOISY


def _row(variant: Tree) -> Row:
    value = epsilon(variant)
    label = _name(variant) if value == DASH else f"{_name(variant)} · ε {value}"
    dots = auc_dots("macro AUC", variant, _style(variant), seeds=True)
    return Row(label, dots, note="" if dots else "no figures: see below")


def _cells(variant: Tree) -> list[str]:
    step, baseline = tree(variant.get("from_parent")), tree(variant.get("from_baseline"))
    changes = [f"{key} = {value}" for key, value in flatten(tree(variant.get("changes")))]
    public = variant.get("public_images")
    return [
        _name(variant),
        str(variant.get("parent") or DASH),
        "; ".join(changes) or DASH,
        epsilon(variant),
        text.decimal(variant.get("macro_auc")),
        text.interval(variant.get("macro_auc_ci")),
        text.signed(step.get("difference")),
        text.spread(step.get("ci")),
        text.signed(baseline.get("difference")),
        text.spread(baseline.get("ci")),
        text.significant(variant.get("frechet")),
        *(text.decimal(variant.get(key)) for key in ("precision", "recall", "coverage")),
        text.whole(variant.get("images_seen")),
        "none" if number(public) is None else text.whole(public),
        text.duration(variant.get("wall_seconds")),
    ]


def _spent_cells(hospital: Tree) -> list[str]:
    if hospital.get("unknown") is True:
        return [UNKNOWN, *[DASH] * 5]
    return [
        _epsilon(hospital.get("epsilon")),
        text.significant(hospital.get("delta"), 3),
        text.significant(hospital.get("noise_multiplier"), 3),
        text.significant(hospital.get("sample_rate"), 3),
        text.whole(hospital.get("steps")),
        _epsilon(hospital.get("ledger_epsilon")),
    ]


def _epsilon(value: object) -> str:
    """ε as text; null is infinite (no noise)."""
    found = number(value)
    return INFINITE if found is None else text.significant(found, 3)
