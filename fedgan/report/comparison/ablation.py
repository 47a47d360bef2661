"""The ladder of an ablation: one chart and one table of what each rung changed, gave, cost and bought in privacy."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.comparison.data import Comparison
from fedgan.report.comparison.parts import auc_domain, chance, chart_figure
from fedgan.report.facts import leaves
from fedgan.report.html import format as text
from fedgan.report.html.charts import Dot, Row, legend
from fedgan.report.html.format import DASH, bounds, number
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import render
from fedgan.report.run.data import Tree, tree, trees

QUESTION = "What does each thing that differential privacy imposes cost, and is it the noise that costs most?"
INFINITE, UNKNOWN = "∞", "not known"
OPEN, CLIPPED, NOISY = "a1", "a3", "a2"  # styles of what has no privacy, clipping alone, and noise
KINDS = (
    (OPEN, "without privacy"),
    (CLIPPED, "clipping alone, ε = ∞"),
    (NOISY, "with noise, ε as named"),
)


def epsilon(variant: Tree) -> str:
    """ε as text: a dash without privacy."""
    if variant.get("private") is not True:
        return DASH
    if variant.get("unknown") is True:
        return UNKNOWN
    value = number(variant.get("epsilon"))
    return INFINITE if value is None else text.significant(value, 3)


def chart(comparison: Comparison) -> Markup:
    """Macro AUC by rung, with its interval, its seeds and its ε."""
    rows = [_row(comparison, variant) for variant in comparison.variants]
    real = comparison.real.value
    references = chance(rows) + ([("real images", real)] if real is not None else [])
    return chart_figure(
        "ablation-auc",
        "Macro AUC on real test images of classifiers trained on each rung's images",
        rows,
        "macro AUC (0.5 is chance)",
        auc_domain(rows),
        references,
    )


def marks(comparison: Comparison) -> Markup:
    """The legend of `chart`: the kinds of privacy that occur."""
    found = {_style(variant) for variant in comparison.variants}
    kinds = [(words, style) for style, words in KINDS if style in found]
    return legend([*kinds, ("one generator's seed", "single main")], "dot")


def ladder(comparison: Comparison) -> Markup:
    """The table: quality, utility, ε and time, a row a rung."""
    columns = [
        Column("Rung", numeric=False),
        Column("Comes from", numeric=False),
        Column("Changes", numeric=False),
        Column("ε", title="Of this training alone; the largest of its hospitals and seeds"),
        Column("Macro AUC"),
        Column("Macro AUC, 95% interval"),
        Column("Minus the one before"),
        Column("Minus the one before, 95% interval"),
        Column("Minus the foot"),
        Column("Minus the foot, 95% interval"),
        Column("Fréchet distance"),
        Column("Precision"),
        Column("Recall"),
        Column("Coverage"),
        Column("Images seen"),
        Column(
            "Public images", title="Shown by the training on public phantoms that it begins from"
        ),
        Column("Wall time"),
    ]
    troubles = [
        f"{entry.label} {entry.failure_reason}."
        for entry in comparison.arms
        if entry.failure_reason
    ]
    more = " ".join(
        [
            "Macro AUC: mean over classes, of classifiers trained on the rung's images alone and tested on the same real ones.",
            "Differences are paired, on the same test images; their p-values and verdicts stand under Paired.",
            "Fréchet distance, precision, recall, coverage and time are means over seeds.",
            "Images seen: real training images, summed over hospitals, in whole batches; a private step expects that many.",
            *troubles,
        ]
    )
    return table(
        "The ladder",
        columns,
        [_cells(variant) for variant in comparison.variants],
        "ablation",
        strong=1,
        more=more,
    )


def privacy(comparison: Comparison) -> Markup:
    """How to read the ladder, and ε of each hospital."""
    rows = [
        [_name(variant), str(place.get("name", "unnamed")), *_spent(place)]
        for variant in comparison.variants
        for place in trees(variant.get("hospitals"))
    ]
    columns = [
        Column("Rung", numeric=False),
        Column("Hospital", numeric=False),
        Column("ε"),
        Column("δ"),
        Column("Noise multiplier"),
        Column("Sampling rate"),
        Column("Steps"),
        Column(
            "ε of the whole ledger",
            title="Of all private trainings in the hospital's ledger when this was written",
        ),
    ]
    found = (
        table("ε of each hospital, the largest over seeds", columns, rows, "ablation-privacy")
        if rows
        else Markup("")
    )
    return render("comparison_ablation.html.j2", table=found)


def _name(variant: Tree) -> str:
    return str(variant.get("name") or "unnamed")


def _style(variant: Tree) -> str:
    if variant.get("private") is not True:
        return OPEN
    return CLIPPED if number(variant.get("epsilon")) is None else NOISY


def _row(comparison: Comparison, variant: Tree) -> Row:
    bound = epsilon(variant)
    label = _name(variant) if bound == DASH else f"{_name(variant)} · ε {bound}"
    value, seeds = number(variant.get("macro_auc")), variant.get("macro_auc_seeds")
    if value is None:
        return Row(label, note="no figures: see below")
    singles = [
        n for one in (seeds if isinstance(seeds, list) else []) if (n := number(one)) is not None
    ]
    return Row(
        label,
        [Dot("macro AUC", value, bounds(variant.get("macro_auc_ci")), _style(variant), singles)],
    )


def _cells(variant: Tree) -> list[str]:
    step, baseline = tree(variant.get("step")), tree(variant.get("from_baseline"))
    return [
        _name(variant),
        str(variant.get("parent") or DASH),
        "; ".join(f"{key} = {words}" for key, words in leaves(tree(variant.get("changes"))))
        or DASH,
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
        "none"
        if number(variant.get("public_images")) is None
        else text.whole(variant.get("public_images")),
        text.duration(variant.get("wall_seconds")),
    ]


def _spent(place: Tree) -> list[str]:
    if place.get("unknown") is True:
        return [UNKNOWN, *[DASH] * 5]
    whole, own = (number(place.get(key)) for key in ("ledger_epsilon", "epsilon"))
    return [
        INFINITE if own is None else text.significant(own, 3),
        text.significant(place.get("delta"), 3),
        text.significant(place.get("noise_multiplier"), 3),
        text.significant(place.get("sample_rate"), 3),
        text.whole(place.get("steps")),
        INFINITE if whole is None else text.significant(whole, 3),
    ]
