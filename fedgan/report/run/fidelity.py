"""Fidelity: distances from synthetic to real images, beside real-to-real reference values."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.html import format as text
from fedgan.report.html.charts import Line
from fedgan.report.html.format import number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.curves import figure, points
from fedgan.report.run.data import RunData, Tree, dig, tree

# The reference value of the unbiased kernel distance is about zero, so no ratio is formed.
MEASURES = (("Fréchet distance", "frechet", True), ("Kernel distance", "kernel", False))
COLUMNS = (
    Column("Measure", numeric=False),
    Column("Features of", numeric=False),
    Column("Synthetic to real"),
    Column("Reference: real to real"),
    Column("Ratio to the reference"),
)


def _render(run: RunData) -> Markup:
    fidelity = tree(run.evaluation.get("fidelity"))
    known = any(number(fidelity.get(key)) is not None for _, key, _ in MEASURES)
    chart, note = _curve(run)
    distances = (
        _table(fidelity)
        if known
        else absent(
            "The final distances have not been measured: evaluation.json is missing or has no "
            "fidelity figures."
        )
    )
    return render("fidelity.html.j2", table=distances, chart=chart, note=note)


def _table(fidelity: Tree) -> Markup:
    extractor = str(fidelity.get("extractor") or "not named")
    rows = []
    for name, key, has_ratio in MEASURES:
        value, reference = number(fidelity.get(key)), number(fidelity.get(f"{key}_reference"))
        ratio = (
            f"{value / reference:.1f} ×"
            if has_ratio and value is not None and reference is not None and reference > 0
            else text.DASH
        )
        rows.append(
            [
                name,
                extractor,
                text.significant(value),
                text.significant(reference),
                ratio,
            ]
        )
    images, reference_images = (
        number(fidelity.get("images")),
        number(fidelity.get("reference_images")),
    )
    if images is not None and images == reference_images:
        more = f"{text.whole(images)} images on each side of every comparison."
    else:
        more = (
            f"Images on each side: {text.whole(images)} for synthetic to real, "
            f"{text.whole(reference_images)} for the reference."
        )
    if isinstance(fidelity.get("real"), str):
        more += f" Real images: {fidelity['real']}."
    return table("Distances (lower is better)", COLUMNS, rows, "fidelity", more=more)


def _curve(run: RunData) -> tuple[Markup | None, str]:
    """The Fréchet curve with the reference of the same extractor, and a note on comparability."""
    measured = tuple(
        line for line in run.rounds if number(dig(line, "fidelity", "frechet")) is not None
    )
    if not measured:
        return None, "No Fréchet distance was measured during training (evaluation.every)."
    extractor = dig(measured[-1], "fidelity", "extractor")
    same = tuple(line for line in measured if dig(line, "fidelity", "extractor") == extractor)
    counts = sorted(
        {n for line in same if (n := number(dig(line, "fidelity", "images"))) is not None}
    )
    splits = sorted({str(split) for line in same if (split := dig(line, "fidelity", "split"))})
    note = f"Features of {extractor or 'an unnamed extractor'}"
    note += f", {' or '.join(text.whole(n) for n in counts)} images on each side" if counts else ""
    note += f", real images of the {' or '.join(splits)} split." if splits else "."
    reference = number(dig(run.evaluation, "fidelity", "frechet_reference"))
    references = (
        [("reference: real to real", reference)]
        if reference is not None and extractor == dig(run.evaluation, "fidelity", "extractor")
        else []
    )
    reference_images = number(dig(run.evaluation, "fidelity", "reference_images"))
    if references and reference_images is not None and counts != [reference_images]:
        note += f" The reference was measured with {text.whole(reference_images)} images on each"
        note += " side; fewer images give a larger distance."
    lines = [Line("Fréchet distance", points(same, "fidelity", "frechet"))]
    if not lines[0].points:
        return None, "The rounds have Fréchet distances but no images seen: there is no curve."
    desc = "Synthetic to real, lower is better."
    title = "Fréchet distance during training"
    return figure("fidelity-curve", title, desc, lines, references), note


SECTION = Section("fidelity", "Fidelity", _render)
