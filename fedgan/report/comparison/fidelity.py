"""How close the synthetic images are to real ones and how much of their variety they hold, each beside its floor."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from fedgan.report.comparison.data import ArmRun, Comparison
from fedgan.report.comparison.parts import (
    Measure,
    failure_note,
    floored,
    join_words,
    run_label,
    with_floors,
)
from fedgan.report.html import format as text
from fedgan.report.html.format import DASH, number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import Tree, dig, tree

FRECHET = Measure(
    "frechet", "Fréchet distance", "Heusel et al. 2017, over the named features", None
)
KERNEL = Measure(
    "kernel",
    "Kernel distance",
    "Bińkowski et al. 2018; unbiased, so around zero for equal sets",
    None,
)
SHARES = (
    Measure("precision", "Precision", "Share of synthetic images that lie among the real ones"),
    Measure("recall", "Recall", "Share of real images that lie among the synthetic ones"),
    Measure("density", "Density", "Like precision, but robust to outliers; may exceed 1"),
    Measure("coverage", "Coverage", "Share of real images that have a synthetic neighbour"),
)
DISTANCES = (FRECHET, KERNEL)
FEW = ": fewer than 10 images on a side, or see the notes."
PARTS = (("per_class", "class"), ("per_hospital", "hospital"))


def _render(comparison: Comparison) -> Markup:
    runs = comparison.arm_runs
    if not any(_fidelity(run) for run in runs):
        return absent("No distance and no share was measured: no arm has fidelity figures.")
    return render(
        "comparison_fidelity.html.j2",
        how=_how(comparison),
        distances=_table(
            "Distances, lower is better", runs, DISTANCES, "fidelity-distances", over=True
        ),
        shares=_table(
            "Precision, recall, density and coverage: higher is better",
            runs,
            SHARES,
            "fidelity-shares",
        ),
        others=_others(comparison),
        parts=[
            (f"The same for each {what}", _by_part(comparison, key, what)) for key, what in PARTS
        ],
    )


def _fidelity(run: ArmRun) -> Tree:
    return tree(run.evaluation.get("fidelity"))


def _how(comparison: Comparison) -> str:
    """How the figures were made, from what the evaluator wrote down."""
    first = next(found for run in comparison.arm_runs if (found := _fidelity(run)))
    extractor = str(
        first.get("extractor")
        or comparison.content.get("extractor")
        or "an extractor that is not named"
    )
    parts = [
        f"Features: {extractor}, the same for all arms"
        + (" (so the Fréchet distance is an FID)." if first.get("fid") is True else ".")
    ]
    others = {
        str(other) for run in comparison.arm_runs if (other := _fidelity(run).get("extractor"))
    }
    if len(others) > 1:
        parts.append(
            f"Beware: the arms name different extractors ({', '.join(sorted(others))}); their distances cannot be compared."
        )
    images, floor = number(first.get("images")), number(first.get("reference_images"))
    if images is not None:
        same = floor is None or floor == images
        parts.append(
            f"{text.whole(images)} images on each side"
            + ("." if same else f", {text.whole(floor)} for the floor.")
        )
    if isinstance(first.get("real"), str):
        parts.append(f"The real side: {first['real']}.")
    if number(first.get("k")) is not None:
        parts.append(
            f"Precision, recall, density and coverage look at {text.whole(first['k'])} neighbours."
        )
    return " ".join(parts)


def _table(
    caption: str,
    runs: Sequence[ArmRun],
    measures: Sequence[Measure],
    download: str,
    over: bool = False,
) -> Markup:
    """A row a training: each figure, its interval and its floor; `over`: also the first figure over its floor."""
    columns = [Column("Arm", numeric=False), *with_floors(measures)] + (
        [Column("Fréchet over floor")] if over else []
    )
    rows = [
        [
            run_label(run),
            *floored(_fidelity(run), measures),
            *([_over(_fidelity(run))] if over else []),
        ]
        for run in runs
    ]
    return table(caption, columns, rows, download, more=failure_note(runs))


def _over(found: Tree) -> str:
    value, floor = number(found.get("frechet")), number(found.get("frechet_reference"))
    return (
        f"{value / floor:.1f} ×" if value is not None and floor is not None and floor > 0 else DASH
    )


def _by_part(comparison: Comparison, key: str, what: str) -> Markup:
    """A row for each class (or hospital) and training, the distances in one table and the shares in another."""
    runs = [run for run in comparison.arm_runs if tree(_fidelity(run).get(key))]
    names = list(dict.fromkeys(name for run in runs for name in tree(_fidelity(run).get(key))))
    measured = [name for name in names if any(tree(dig(_fidelity(run), key, name)) for run in runs)]
    if not measured:
        return absent(f"Nothing was measured for each {what} on its own{FEW if names else '.'}")
    more = "With few images a distance comes out large, for real images too: read each beside its floor."
    if empty := [name for name in names if name not in measured]:
        more += f" Not measured for {join_words(empty)}{FEW}"
    heads = [
        Column(what.capitalize(), numeric=False),
        Column("Arm", numeric=False),
        Column("Images"),
    ]
    download = f"fidelity-{key.replace('_', '-')}"

    def part(caption: str, measures: Sequence[Measure], name: str) -> Markup:
        rows = []
        for place in measured:
            for run in runs:
                found = tree(dig(_fidelity(run), key, place))
                rows.append(
                    [place, run.label, text.whole(found.get("images")), *floored(found, measures)]
                )
        return table(caption, [*heads, *with_floors(measures)], rows, name, more=more)

    shares = part(
        f"Precision, recall, density and coverage of each {what}", SHARES, f"{download}-shares"
    )
    return part(f"Distances of each {what}", DISTANCES, download) + shares


def _others(comparison: Comparison) -> Markup:
    """Perceptual path length and, for each class, how alike its images are among themselves."""
    runs = [run for run in comparison.arm_runs if _fidelity(run)]
    labels = list(
        dict.fromkeys(label for run in runs for label in tree(_fidelity(run).get("ms_ssim")))
    )
    parts = []
    if any(_path_length(run) is not None for run in runs):
        rows = [[run.label, text.significant(_path_length(run))] for run in runs]
        columns = [Column("Arm", numeric=False), Column("Path length")]
        more = "How far an image moves, to the extractor, for a small step of the latent. "
        more += "An arm with a generator for each hospital has no one path length."
        parts.append(
            table(
                "Perceptual path length, lower is smoother",
                columns,
                rows,
                "fidelity-path-length",
                more=more,
            )
        )
    else:
        parts.append(absent("Perceptual path length was not measured."))
    if not labels:
        return Markup("").join(
            [*parts, absent("How alike the images of one class are (MS-SSIM) was not measured.")]
        )
    rows = []
    for label in labels:
        real = next(
            (
                n
                for run in runs
                if (n := number(dig(_fidelity(run), "ms_ssim", label, "real"))) is not None
            ),
            None,
        )
        rows.append(
            [
                label,
                text.decimal(real),
                *(text.decimal(dig(_fidelity(run), "ms_ssim", label, "synthetic")) for run in runs),
            ]
        )
    columns = [
        Column("Class", numeric=False),
        Column("Real images"),
        *(Column(run.label) for run in runs),
    ]
    more = "Mean over pairs of images of the same class. A value above that of real images says that the images repeat themselves."
    return Markup("").join(
        [
            *parts,
            table(
                "Likeness inside each class (MS-SSIM)", columns, rows, "fidelity-ms-ssim", more=more
            ),
        ]
    )


def _path_length(run: ArmRun) -> float | None:
    return number(_fidelity(run).get("path_length"))


SECTION = Section("fidelity", "Fidelity", _render)
