"""How far the synthetic images are from the real ones, beside how far real ones are from each other."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report import format as text
from fedgan.report.format import number
from fedgan.report.run_data import RunData, tree
from fedgan.report.sections.base import Section
from fedgan.report.tables import Column, table
from fedgan.report.templating import absent, render

MEASURES = (("Fréchet distance", "frechet", 2), ("Kernel distance", "kernel", 4))


def _render(run: RunData) -> Markup:
    fidelity = tree(run.evaluation.get("fidelity"))
    if not any(number(fidelity.get(key)) is not None for _, key, _ in MEASURES):
        return absent("No distance has been measured yet: evaluation.json is not there or has no fidelity numbers.")
    extractor = str(fidelity.get("extractor") or "not named")
    rows = []
    for name, key, digits in MEASURES:
        value, floor = number(fidelity.get(key)), number(fidelity.get(f"{key}_floor"))
        ratio = f"{value / floor:.1f} ×" if value is not None and floor is not None and floor > 0 else text.DASH
        rows.append([name, extractor, text.decimal(value, digits), text.decimal(floor, digits), ratio])
    columns = [
        Column("Measure", numeric=False),
        Column("Features of", numeric=False),
        Column("Synthetic to real"),
        Column("Floor: real to real"),
        Column("Over the floor"),
    ]
    more = (
        f"Synthetic to real: {text.whole(fidelity.get('images'))} images. Floor: two halves of the real images, "
        f"{text.whole(fidelity.get('floor_images'))} images in each."
    )
    return render("fidelity.html.j2", table=table("Distances, lower is better", columns, rows, "fidelity", more=more))


SECTION = Section("fidelity", "Fidelity", _render)
