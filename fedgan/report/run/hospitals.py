"""Who took part, with how many images of which classes."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.facts import WITHHELD, counts_withheld
from fedgan.report.html import format as text
from fedgan.report.html.charts import Dot, Row, dot_chart, legend, stacked_bars
from fedgan.report.html.format import number
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import RunData, Tree, dig, tree, trees
from fedgan.report.run.privacy.guarantee import counted_over, spent

SPLITS = ("train", "val", "test")
MOST_MARKS = 6  # hospitals in one row of marks
MOST_PARTS = 8  # parts of a bar that can still be told apart


def _render(run: RunData) -> Markup:
    if not run.hospitals:
        return absent(
            "hospitals.json is not there yet: it is written when the hospitals have opened their shards."
        )
    labels = run.data_labels
    exclusive = all(_is_exclusive(hospital, labels) for hospital in run.hospitals)
    if not labels or any(map(counts_withheld, run.hospitals)):
        figure, marks = Markup(""), Markup("")
    elif exclusive:
        figure, marks = _mix(run.hospitals, labels)
    else:
        figure, marks = _prevalence(run.hospitals, labels)
    left_out = 0 if exclusive or not labels else max(0, len(run.hospitals) - MOST_MARKS)
    return render(
        "hospitals.html.j2",
        figure=figure,
        legend=marks,
        sizes=_sizes(run),
        classes=_classes(run, labels),
        exclusive=exclusive,
        left_out=left_out,
    )


def _name(hospital: Tree) -> str:
    return str(hospital.get("name", "unnamed"))


def _count(hospital: Tree, split: str, label: str) -> float:
    return max(number(dig(hospital, "counts", split, label)) or 0.0, 0.0)


def _is_exclusive(hospital: Tree, labels: list[str]) -> bool:
    """True where each training image has exactly one of the labels, as far as the counts tell."""
    images = number(dig(hospital, "images", "train"))
    return images is None or sum(_count(hospital, "train", label) for label in labels) == images


def _mix(hospitals: tuple[Tree, ...], labels: list[str]) -> tuple[Markup, Markup]:
    """A bar a hospital, divided by class; beyond eight classes the rarest share one part."""
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


def _prevalence(hospitals: tuple[Tree, ...], labels: list[str]) -> tuple[Markup, Markup]:
    """For labels that may stand together: the share of images that have each, a mark a hospital."""
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
    rows, paid = [], {row.name: row.words for row in spent(run)}
    for hospital in run.hospitals:
        images = [text.whole(dig(hospital, "images", split)) for split in SPLITS]
        patients = [text.whole(dig(hospital, "patients", split)) for split in SPLITS]
        seen = next(
            (row.get("images_seen") for row in reversed(_own_rounds(run, _name(hospital)))), None
        )
        rows.append([_name(hospital), *images, *patients, text.whole(seen)])
        rows[-1] += [paid.get(_name(hospital), text.DASH)] if paid else []
    columns = [Column("Hospital", numeric=False)]
    columns += [Column(f"Images, {split}") for split in SPLITS] + [
        Column(f"Patients, {split}") for split in SPLITS
    ]
    columns.append(
        Column("Images shown", title="Real images shown to this hospital's discriminator so far")
    )
    more = "Images shown: real images that the hospital's discriminator has seen so far, each as often as it was drawn."
    if paid:
        columns.append(
            Column("ε", title=f"Of differential privacy, over {counted_over(run.settings)}")
        )
        more += " What the ε of differential privacy means, and its δ, stand under privacy."
    return table("Images and patients in each split", columns, rows, "hospitals", more=more)


def _own_rounds(run: RunData, name: str) -> list[Tree]:
    return [
        row
        for line in run.rounds
        for row in trees(line.get("hospitals"))
        if str(row.get("name")) == name
    ]


def _classes(run: RunData, labels: list[str]) -> Markup:
    """A row a class, a column a hospital: training images."""
    if not labels or not any(tree(hospital.get("counts")) for hospital in run.hospitals):
        return absent("The class counts of the hospitals are not known.")
    if any(map(counts_withheld, run.hospitals)):
        return absent(
            f"The class counts of the hospitals: {WITHHELD}. They are exact, and no epsilon covers them."
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
    return table("Training images of each class", columns, rows, "classes")


SECTION = Section("hospitals", "Hospitals", _render)
