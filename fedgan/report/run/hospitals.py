"""Hospitals that take part: images, patients and classes of each."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.facts import WITHHELD, has_withheld_counts
from fedgan.report.html import format as text
from fedgan.report.html.charts import Dot, Row, dot_chart, legend, stacked_bars
from fedgan.report.html.format import number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import RunData, Tree, dig, tree, trees
from fedgan.report.run.privacy.guarantee import SCOPE, privacy_costs

SPLITS = ("train", "val", "test")
MOST_MARKS = 6  # hospitals in one row of marks
MOST_PARTS = 8  # parts of a bar that remain distinguishable


def _render(run: RunData) -> Markup:
    if not run.hospitals:
        return absent(
            "hospitals.json is missing: it is written when the hospitals have opened their shards."
        )
    labels = run.data_labels
    exclusive = all(_is_exclusive(hospital, labels) for hospital in run.hospitals)
    if not labels or any(map(has_withheld_counts, run.hospitals)):
        figure, marks = Markup(""), Markup("")
    elif exclusive:
        figure, marks = _class_mix(run.hospitals, labels)
    else:
        figure, marks = _label_shares(run.hospitals, labels)
    not_shown = 0 if exclusive or not labels else max(0, len(run.hospitals) - MOST_MARKS)
    return render(
        "hospitals.html.j2",
        figure=figure,
        legend=marks,
        sizes=_sizes(run),
        classes=_classes(run, labels),
        exclusive=exclusive,
        not_shown=not_shown,
    )


def _name(hospital: Tree) -> str:
    return str(hospital.get("name", "unnamed"))


def _count(hospital: Tree, split: str, label: str) -> float:
    return max(number(dig(hospital, "counts", split, label)) or 0.0, 0.0)


def _is_exclusive(hospital: Tree, labels: list[str]) -> bool:
    """Whether each training image has exactly one label, as far as the counts show."""
    images = number(dig(hospital, "images", "train"))
    return images is None or sum(_count(hospital, "train", label) for label in labels) == images


def _class_mix(hospitals: tuple[Tree, ...], labels: list[str]) -> tuple[Markup, Markup]:
    """One bar per hospital, divided by class; beyond eight classes the rarest share one part."""
    by_size = sorted(
        labels, key=lambda label: -sum(_count(hospital, "train", label) for hospital in hospitals)
    )
    kept = set(by_size if len(labels) <= MOST_PARTS else by_size[: MOST_PARTS - 1])
    names = [label for label in labels if label in kept]
    rest = [label for label in labels if label not in kept]
    rows = []
    for hospital in hospitals:
        values = [_count(hospital, "train", label) for label in names]
        values += [sum(_count(hospital, "train", label) for label in rest)] if rest else []
        images = number(dig(hospital, "images", "train"))
        rows.append(
            Row(
                _name(hospital),
                values=values,
                note=text.whole(images if images is not None else sum(values)),
            )
        )
    names += [f"{len(rest)} others"] if rest else []
    desc = "; ".join(
        f"{row.label}: "
        + ", ".join(f"{name} {value:,.0f}" for name, value in zip(names, row.values, strict=True))
        for row in rows
    )
    chart = stacked_bars(
        "hospitals-mix", "Class mix of the training images", desc + ".", rows, names
    )
    return chart, legend([(name, f"c{i % 8 + 1}") for i, name in enumerate(names)], "fill")


def _label_shares(hospitals: tuple[Tree, ...], labels: list[str]) -> tuple[Markup, Markup]:
    """For labels that may occur together: share of images with each, one mark per hospital."""
    shown = hospitals[:MOST_MARKS]
    rows = [
        Row(
            label,
            [
                Dot(_name(hospital), _count(hospital, "train", label) / images, None, f"h{i + 1}")
                for i, hospital in enumerate(shown)
                if (images := number(dig(hospital, "images", "train")))
            ],
        )
        for label in labels
    ]
    desc = "; ".join(
        f"{row.label}: " + ", ".join(f"{dot.name} {dot.value:.0%}" for dot in row.dots)
        for row in rows
    )
    highest = max((dot.value for row in rows for dot in row.dots), default=1.0)
    chart = dot_chart(
        "hospitals-mix",
        "Share of training images with each label",
        desc + ".",
        rows,
        "share of training images",
        (0.0, max(highest, 0.01)),
    )
    return chart, legend(
        [(_name(hospital), f"h{i + 1}") for i, hospital in enumerate(shown)], "dot"
    )


def _sizes(run: RunData) -> Markup:
    rows, epsilons = [], {row.name: row.epsilon_text for row in privacy_costs(run)}
    for hospital in run.hospitals:
        images = [text.whole(dig(hospital, "images", split)) for split in SPLITS]
        patients = [text.whole(dig(hospital, "patients", split)) for split in SPLITS]
        seen = next(
            (row.get("images_seen") for row in reversed(_rounds_of(run, _name(hospital)))), None
        )
        rows.append([_name(hospital), *images, *patients, text.whole(seen)])
        rows[-1] += [epsilons.get(_name(hospital), text.DASH)] if epsilons else []
    columns = [Column("Hospital", numeric=False)]
    columns += [Column(f"Images, {split}") for split in SPLITS] + [
        Column(f"Patients, {split}") for split in SPLITS
    ]
    columns.append(
        Column("Images seen", title="Real images shown to the discriminator of this hospital")
    )
    more = "Images seen: real images shown to the hospital's discriminator, with repetitions."
    if epsilons:
        columns.append(Column("ε", title=f"ε of differential privacy; it covers {SCOPE}"))
        more += " The Privacy section explains ε and gives its δ."
    return table("Images and patients per split", columns, rows, "hospitals", more=more)


def _rounds_of(run: RunData, name: str) -> list[Tree]:
    return [
        row
        for line in run.rounds
        for row in trees(line.get("hospitals"))
        if str(row.get("name")) == name
    ]


def _classes(run: RunData, labels: list[str]) -> Markup:
    """Training images: one row per class, one column per hospital."""
    if not labels or not any(tree(hospital.get("counts")) for hospital in run.hospitals):
        return absent("The class counts of the hospitals are not known.")
    if any(map(has_withheld_counts, run.hospitals)):
        return absent(
            f"The class counts of the hospitals: {WITHHELD}. They are exact; ε does not cover them."
        )
    rows = []
    for label in labels:
        train = [dig(hospital, "counts", "train", label) for hospital in run.hospitals]
        total = sum(number(n) or 0.0 for n in train)
        rows.append([label, *(text.whole(n) for n in train), text.whole(total)])
    columns = [
        Column("Class", numeric=False),
        *(Column(_name(hospital)) for hospital in run.hospitals),
        Column("All"),
    ]
    return table("Training images per class", columns, rows, "classes")


SECTION = Section("hospitals", "Hospitals", _render)
