"""How far the synthetic images are from the real ones, beside how far real ones are from each other."""

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

# An unbiased kernel distance has a floor around zero, over which nothing can be divided.
MEASURES = (("Fréchet distance", "frechet", True), ("Kernel distance", "kernel", False))
COLUMNS = (
    Column("Measure", numeric=False),
    Column("Features of", numeric=False),
    Column("Synthetic to real"),
    Column("Floor: real to real"),
    Column("Over the floor"),
)


def _render(run: RunData) -> Markup:
    fidelity = tree(run.evaluation.get("fidelity"))
    known = any(number(fidelity.get(key)) is not None for _, key, _ in MEASURES)
    chart, note = _curve(run)
    distances = (
        _table(fidelity)
        if known
        else absent(
            "The final distances have not been measured: evaluation.json is not there or has no fidelity numbers."
        )
    )
    return render("fidelity.html.j2", table=distances, chart=chart, note=note)


def _table(fidelity: Tree) -> Markup:
    extractor = str(fidelity.get("extractor") or "not named")
    rows = []
    for name, key, divide in MEASURES:
        value, floor = number(fidelity.get(key)), number(fidelity.get(f"{key}_reference"))
        over = divide and value is not None and floor is not None and floor > 0
        rows.append(
            [
                name,
                extractor,
                text.significant(value),
                text.significant(floor),
                f"{value / floor:.1f} ×"
                if over and value is not None and floor is not None
                else text.DASH,
            ]
        )
    images, reference_images = (
        number(fidelity.get("images")),
        number(fidelity.get("reference_images")),
    )
    if images is not None and images == reference_images:
        more = f"{text.whole(images)} images on each side of every comparison."
    else:
        more = f"Images on each side: {text.whole(images)} for synthetic to real, {text.whole(reference_images)} for the floor."
    if isinstance(fidelity.get("real"), str):
        more += f" The real side: {fidelity['real']}."
    return table("Distances, lower is better", COLUMNS, rows, "fidelity", more=more)


def _curve(run: RunData) -> tuple[Markup | None, str]:
    """The Fréchet curve with the floor of the same extractor, and the sentence that says what may be compared."""
    measured = tuple(
        line for line in run.rounds if number(dig(line, "fidelity", "frechet")) is not None
    )
    if not measured:
        return None, "No Fréchet distance was measured while training went on (evaluation.every)."
    extractor = dig(measured[-1], "fidelity", "extractor")
    same = tuple(line for line in measured if dig(line, "fidelity", "extractor") == extractor)
    counts = sorted(
        {n for line in same if (n := number(dig(line, "fidelity", "images"))) is not None}
    )
    splits = sorted({str(split) for line in same if (split := dig(line, "fidelity", "split"))})
    note = f"Features of {extractor or 'an extractor that is not named'}"
    note += f", {' or '.join(text.whole(n) for n in counts)} images on each side" if counts else ""
    note += f", real images of the {' or '.join(splits)} split." if splits else "."
    floor = number(dig(run.evaluation, "fidelity", "frechet_reference"))
    references = (
        [("floor: real to real", floor)]
        if floor is not None and extractor == dig(run.evaluation, "fidelity", "extractor")
        else []
    )
    reference_images = number(dig(run.evaluation, "fidelity", "reference_images"))
    if references and reference_images is not None and counts != [reference_images]:
        note += f" The floor was measured with {text.whole(reference_images)} images on each side;"
        note += " with fewer images a distance comes out larger."
    lines = [Line("Fréchet distance", points(same, "fidelity", "frechet"))]
    if not lines[0].points:
        return (
            None,
            "The rounds have Fréchet distances but no count of images seen, so there is no curve.",
        )
    desc = "Synthetic to real, lower is better."
    return figure(
        "fidelity-curve", "Fréchet distance while training went on", desc, lines, references
    ), note


SECTION = Section("fidelity", "Fidelity", _render)
