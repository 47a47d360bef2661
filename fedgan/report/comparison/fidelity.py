"""Fidelity and diversity of the synthetic images, each figure beside its reference value."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from fedgan.report.comparison.data import ArmRun, Comparison, failure_note, first_number
from fedgan.report.comparison.measures import (
    FRECHET,
    KERNEL,
    PRDC,
    Measure,
    comma_list,
    measure_cells,
    measure_columns,
)
from fedgan.report.html import format as text
from fedgan.report.html.format import DASH, number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import Tree, dig, tree

DISTANCES = (FRECHET, KERNEL)
TOO_FEW = ": fewer than 10 images on a side, or see the notes."
PRDC_NAMES = "Precision, recall, density and coverage"
PARTS = (("per_class", "class"), ("per_hospital", "hospital"))


def _render(comparison: Comparison) -> Markup:
    runs = comparison.arm_runs
    if not any(run.fidelity for run in runs):
        return absent("No distance and no share was measured: no arm has fidelity figures.")
    return render(
        "comparison_fidelity.html.j2",
        method=_method(comparison),
        distances=_table(
            "Distances, lower is better", runs, DISTANCES, "fidelity-distances", ratio=True
        ),
        shares=_table(f"{PRDC_NAMES}: higher is better", runs, PRDC, "fidelity-shares"),
        others=_path_length(comparison) + _ms_ssim(comparison),
        parts=[(f"The same per {unit}", _by_part(comparison, key, unit)) for key, unit in PARTS],
    )


def _method(comparison: Comparison) -> str:
    """Extractor, number of images and neighbours, as the evaluator recorded them."""
    first = next(run.fidelity for run in comparison.arm_runs if run.fidelity)
    extractor = first.get("extractor") or comparison.content.get("extractor")
    fid = " (so the Fréchet distance is an FID)" if first.get("fid") is True else ""
    parts = [f"Features: {extractor or 'an unnamed extractor'}, the same for all arms{fid}."]
    others = {str(other) for run in comparison.arm_runs if (other := run.fidelity.get("extractor"))}
    if len(others) > 1:
        parts.append(
            f"Warning: the arms name different extractors ({', '.join(sorted(others))}), "
            "so their distances cannot be compared."
        )
    images, reference = number(first.get("images")), number(first.get("reference_images"))
    if images is not None:
        is_same = reference is None or reference == images
        parts.append(
            f"{text.whole(images)} images on each side"
            + ("." if is_same else f", {text.whole(reference)} for the reference value.")
        )
    if isinstance(first.get("real"), str):
        parts.append(f"Real side: {first['real']}.")
    if number(first.get("k")) is not None:
        parts.append(f"{PRDC_NAMES} use {text.whole(first['k'])} nearest neighbours.")
    return " ".join(parts)


def _table(
    caption: str,
    runs: Sequence[ArmRun],
    measures: Sequence[Measure],
    download: str,
    ratio: bool = False,
) -> Markup:
    """One row per training: figure, interval, reference value and, optionally, their ratio."""
    columns = [Column("Arm", numeric=False), *measure_columns(measures, reference=True)]
    columns += [Column("Fréchet over reference")] if ratio else []
    rows = [
        [
            run.row_label,
            *measure_cells(run.fidelity, measures, reference=True),
            *([_ratio(run.fidelity)] if ratio else []),
        ]
        for run in runs
    ]
    return table(caption, columns, rows, download, more=failure_note(runs))


def _ratio(found: Tree) -> str:
    value, reference = number(found.get("frechet")), number(found.get("frechet_reference"))
    if value is None or reference is None or reference <= 0:
        return DASH
    return f"{value / reference:.1f} ×"


def _by_part(comparison: Comparison, key: str, unit: str) -> Markup:
    """One row per class (or hospital) and training: a table of distances and one of shares."""
    runs = [run for run in comparison.arm_runs if tree(run.fidelity.get(key))]
    names = list(dict.fromkeys(name for run in runs for name in tree(run.fidelity.get(key))))
    measured = [name for name in names if any(tree(dig(run.fidelity, key, name)) for run in runs)]
    if not measured:
        return absent(f"Nothing was measured per {unit}{TOO_FEW if names else '.'}")
    more = (
        "With few images a distance is large, for real images too: "
        "read each beside its reference value."
    )
    if empty := [name for name in names if name not in measured]:
        more += f" Not measured for {comma_list(empty)}{TOO_FEW}"
    head = [
        Column(unit.capitalize(), numeric=False),
        Column("Arm", numeric=False),
        Column("Images"),
    ]
    download = f"fidelity-{key.replace('_', '-')}"
    tables = []
    for caption, measures, file in (
        (f"Distances per {unit}", DISTANCES, download),
        (f"{PRDC_NAMES} per {unit}", PRDC, f"{download}-shares"),
    ):
        rows = [
            [
                name,
                run.label,
                text.whole(found.get("images")),
                *measure_cells(found, measures, True),
            ]
            for name in measured
            for run in runs
            for found in [tree(dig(run.fidelity, key, name))]
        ]
        columns = [*head, *measure_columns(measures, reference=True)]
        tables.append(table(caption, columns, rows, file, more=more))
    return Markup("").join(tables)


def _path_length(comparison: Comparison) -> Markup:
    rows = [
        [run.label, text.significant(run.fidelity.get("path_length"))]
        for run in comparison.arm_runs
        if run.fidelity
    ]
    if all(cell == DASH for _, cell in rows):
        return absent("Perceptual path length was not measured.")
    return table(
        "Perceptual path length, lower is smoother",
        [Column("Arm", numeric=False), Column("Path length")],
        rows,
        "fidelity-path-length",
        more="Distance in feature space that an image moves for a small step of the latent. "
        "It is not defined for an arm with one generator per hospital.",
    )


def _ms_ssim(comparison: Comparison) -> Markup:
    """MS-SSIM among the images of each class, synthetic and real."""
    runs = [run for run in comparison.arm_runs if run.fidelity]
    labels = list(
        dict.fromkeys(label for run in runs for label in tree(run.fidelity.get("ms_ssim")))
    )
    if not labels:
        return absent("The similarity of images of one class (MS-SSIM) was not measured.")
    rows = []
    for label in labels:
        found = [tree(dig(run.fidelity, "ms_ssim", label)) for run in runs]
        real = first_number(row.get("real") for row in found)
        synthetic = [text.decimal(row.get("synthetic")) for row in found]
        rows.append([label, text.decimal(real), *synthetic])
    columns = [
        Column("Class", numeric=False),
        Column("Real images"),
        *(Column(run.label) for run in runs),
    ]
    more = (
        "Mean over pairs of images of the same class. A value above that of real images shows "
        "that the synthetic images repeat themselves."
    )
    caption = "Similarity within each class (MS-SSIM)"
    return table(caption, columns, rows, "fidelity-ms-ssim", more=more)


SECTION = Section("fidelity", "Fidelity", _render)
