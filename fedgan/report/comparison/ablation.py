"""The ladder of an ablation: one chart and one table of what each rung changed, gave, cost and bought in privacy."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report import format as text
from fedgan.report.charts import Dot, Row, legend
from fedgan.report.comparison.data import Comparison
from fedgan.report.comparison.parts import auc_domain, chance, chart_figure
from fedgan.report.facts import leaves
from fedgan.report.format import DASH, bounds, number
from fedgan.report.run_data import Tree, tree, trees
from fedgan.report.tables import Column, table
from fedgan.report.templating import render

QUESTION = "What does each thing that differential privacy imposes cost, and is it the noise that costs most?"
INFINITE, UNKNOWN = "∞", "not known"
OPEN, CLIPPED, NOISY = "a1", "a3", "a2"  # styles of what has no privacy, clipping alone, and noise
KINDS = ((OPEN, "without privacy"), (CLIPPED, "clipping alone, ε = ∞"), (NOISY, "with noise, ε as named"))


def epsilon(rung: Tree) -> str:
    """ε as text: a dash without privacy."""
    if rung.get("private") is not True:
        return DASH
    if rung.get("unknown") is True:
        return UNKNOWN
    value = number(rung.get("epsilon"))
    return INFINITE if value is None else text.significant(value, 3)


def chart(comparison: Comparison) -> Markup:
    """Macro AUC by rung, with its interval, its seeds and its ε."""
    rows = [_row(comparison, rung) for rung in comparison.rungs]
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
    found = {_style(rung) for rung in comparison.rungs}
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
        Column("Public images", title="Shown by the training on public phantoms that it begins from"),
        Column("Wall time"),
    ]
    troubles = [f"{entry.label} {entry.trouble}." for entry in comparison.arms if entry.trouble]
    more = " ".join(
        [
            "Macro AUC: mean over classes, of classifiers trained on the rung's images alone and tested on the same real ones.",
            "Differences are paired, on the same test images; their p-values and verdicts stand under Paired.",
            "Fréchet distance, precision, recall, coverage and time are means over seeds.",
            "Images seen: real training images, summed over hospitals, in whole batches; a private step expects that many.",
            *troubles,
        ]
    )
    return table("The ladder", columns, [_cells(rung) for rung in comparison.rungs], "ablation", strong=1, more=more)


def privacy(comparison: Comparison) -> Markup:
    """How to read the ladder, and ε of each hospital."""
    rows = [
        [_name(rung), str(place.get("name", "unnamed")), *_spent(place)]
        for rung in comparison.rungs
        for place in trees(rung.get("hospitals"))
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
    found = table("ε of each hospital, the largest over seeds", columns, rows, "ablation-privacy") if rows else Markup("")
    return render("comparison_ablation.html.j2", table=found)


def _name(rung: Tree) -> str:
    return str(rung.get("name") or "unnamed")


def _style(rung: Tree) -> str:
    if rung.get("private") is not True:
        return OPEN
    return CLIPPED if number(rung.get("epsilon")) is None else NOISY


def _row(comparison: Comparison, rung: Tree) -> Row:
    bound = epsilon(rung)
    label = _name(rung) if bound == DASH else f"{_name(rung)} · ε {bound}"
    value, seeds = number(rung.get("macro_auc")), rung.get("macro_auc_seeds")
    if value is None:
        return Row(label, note="no figures: see below")
    singles = [n for one in (seeds if isinstance(seeds, list) else []) if (n := number(one)) is not None]
    return Row(label, [Dot("macro AUC", value, bounds(rung.get("macro_auc_ci")), _style(rung), singles)])


def _cells(rung: Tree) -> list[str]:
    step, foot = tree(rung.get("step")), tree(rung.get("from_foot"))
    return [
        _name(rung),
        str(rung.get("parent") or DASH),
        "; ".join(f"{key} = {words}" for key, words in leaves(tree(rung.get("changes")))) or DASH,
        epsilon(rung),
        text.decimal(rung.get("macro_auc")),
        text.interval(rung.get("macro_auc_ci")),
        text.signed(step.get("difference")),
        text.spread(step.get("ci")),
        text.signed(foot.get("difference")),
        text.spread(foot.get("ci")),
        text.significant(rung.get("frechet")),
        *(text.decimal(rung.get(key)) for key in ("precision", "recall", "coverage")),
        text.whole(rung.get("images_seen")),
        "none" if number(rung.get("public_images")) is None else text.whole(rung.get("public_images")),
        text.duration(rung.get("wall_seconds")),
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
