"""Training curves by images seen: the mean and one line per hospital."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.html import format as text
from fedgan.report.html.charts import Line, legend, line_chart
from fedgan.report.html.format import number, short
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import RunData, Tree, dig, trees

MOST_HOSPITALS = 6  # lines that remain distinguishable
MOST_ROWS = 60
CURVES = (
    ("loss_g", "Generator loss", "Non-saturating loss of the generator."),
    ("loss_d", "Discriminator loss", "Logistic loss of the discriminator, without R1."),
    (
        "r_t",
        "Overfitting heuristic r_t",
        "Mean sign of the discriminator on real images; ADA controls it to its target.",
    ),
    ("p", "Augmentation strength p", "Probability of each ADA transform."),
    ("r1", "R1 penalty", "Squared gradient of the discriminator at real images."),
    (
        "path_length",
        "Path length",
        "Mean path length of the generator, which path length regularisation equalises.",
    ),
)


def _render(run: RunData) -> Markup:
    if not run.rounds:
        return absent("No round has finished yet: metrics.jsonl has no line.")
    names = run.hospital_names
    figures = [_curve(run, names[:MOST_HOSPITALS], *curve) for curve in CURVES]
    shown = (
        [(name, f"h{i + 1}") for i, name in enumerate(names[:MOST_HOSPITALS])]
        if _has_hospitals(run.rounds)
        else []
    )
    return render(
        "curves.html.j2",
        figures=[curve for curve in figures if curve],
        legend=legend([("mean over hospitals", "main"), *shown], "line"),
        not_shown=max(0, len(names) - MOST_HOSPITALS),
        missing=[
            title for (_, title, _), curve in zip(CURVES, figures, strict=True) if curve is None
        ],
        table=_table(run),
    )


def points(rounds: tuple[Tree, ...], *keys: str) -> list[tuple[float, float]]:
    """(images seen, value) of the rounds that have both, by increasing images seen."""
    found = [(number(line.get("images_seen")), number(dig(line, *keys))) for line in rounds]
    return sorted((x, y) for x, y in found if x is not None and y is not None)


def _of_hospital(rounds: tuple[Tree, ...], name: str, key: str) -> list[tuple[float, float]]:
    """A hospital's values at the images seen by the run, so that all lines share one axis."""
    found = [
        (number(line.get("images_seen")), number(row.get(key)))
        for line in rounds
        for row in trees(line.get("hospitals"))
        if str(row.get("name")) == name
    ]
    return sorted((x, y) for x, y in found if x is not None and y is not None)


def _has_hospitals(rounds: tuple[Tree, ...]) -> bool:
    return any(trees(line.get("hospitals")) for line in rounds)


def _curve(run: RunData, names: list[str], key: str, title: str, desc: str) -> Markup | None:
    mean = points(run.rounds, "mean", key)
    lines = [Line("mean", mean, "main")]
    lines += [
        Line(name, _of_hospital(run.rounds, name, key), f"h{i + 1}") for i, name in enumerate(names)
    ]
    if not any(line.points for line in lines):
        return None
    target = (
        [("target", run.settings.augment.target)]
        if key == "r_t" and run.settings.augment.mode == "ada"
        else []
    )
    return figure(f"curves-{key.replace('_', '-')}", title, desc, lines, target)


def figure(
    key: str, title: str, desc: str, lines: list[Line], references: list[tuple[str, float]]
) -> Markup:
    """A curve by images seen, with title, meaning and last mean."""
    last = lines[0].points[-1][1] if lines[0].points else None
    long_desc = f"{desc} By images seen." + (
        f" Last mean value: {short(last)}." if last is not None else ""
    )
    chart = line_chart(key, title, long_desc, lines, "images seen", references)
    end = short(last) if last is not None else ""
    return Markup(
        '<figure><figcaption>{} <span class="last">{}</span><small>{}</small></figcaption>'
        "{}</figure>"
    ).format(title, end, desc, chart)


def _table(run: RunData) -> Markup:
    columns = [
        Column("Round", numeric=False),
        Column("Images seen"),
        Column("Wall time"),
        Column("Bytes exchanged"),
    ]
    columns += [Column(title) for _, title, _ in CURVES] + [Column("Fréchet distance")]
    rows = [
        [
            text.whole(line.get("round")),
            text.whole(line.get("images_seen")),
            text.duration(line.get("wall_seconds")),
            text.size(line.get("bytes_exchanged")),
            *(text.significant(dig(line, "mean", key)) for key, _, _ in CURVES),
            text.significant(dig(line, "fidelity", "frechet")),
        ]
        for line in run.rounds
    ]
    more = (
        f"The last {MOST_ROWS} of {len(rows)} rounds; metrics.jsonl has all."
        if len(rows) > MOST_ROWS
        else ""
    )
    return table("Means over hospitals per round", columns, rows[-MOST_ROWS:], "rounds", more=more)


SECTION = Section("curves", "Training", _render)
