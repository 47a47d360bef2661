"""Paired comparisons on the same test images: difference, interval, p-value and verdict."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.comparison.charts import dot_figure
from fedgan.report.comparison.data import Comparison, numbers
from fedgan.report.comparison.measures import p_value
from fedgan.report.html import format as text
from fedgan.report.html.charts import Dot, Row
from fedgan.report.html.format import bounds, number
from fedgan.report.html.scales import span
from fedgan.report.html.section import Section
from fedgan.report.html.tables import Column, table
from fedgan.report.html.templating import absent, render
from fedgan.report.run.data import Tree, trees

LEVEL = 0.05
COLUMNS = (
    Column("Compared", numeric=False),
    Column("Difference", title="Macro AUC of the first minus that of the second"),
    Column("Difference, 95% interval"),
    Column("p, Holm", title="Adjusted within the family"),
    Column("Verdict", numeric=False),
    Column("p"),
    Column("Margin"),
    Column("By generator seed"),
    Column("Test images"),
    Column("Family", numeric=False, title="The p-values of a family are adjusted together"),
)


def _render(comparison: Comparison) -> Markup:
    if not comparison.pairs:
        return absent("No arms were compared in pairs: comparison.json has no comparisons.")
    rows = [_cells(_with_labels(comparison, row)) for row in comparison.pairs]
    return render(
        "comparison_paired.html.j2",
        charts=_charts(comparison),
        table=table("Differences of macro AUC", COLUMNS, rows, "pairs"),
        margin=text.decimal(comparison.content.get("margin")),
    )


def _with_labels(comparison: Comparison, row: Tree) -> Tree:
    """The pair with the labels of its two arms."""
    names = {key: row[key] for key in ("a", "b") if row.get(key) is not None}
    return row | {key: comparison.label(str(name)) for key, name in names.items()}


def _cells(row: Tree) -> list[str]:
    return [
        f"{row.get('a', 'unnamed')} − {row.get('b', 'unnamed')}",
        text.signed(row.get("difference")),
        text.spread(row.get("ci")),
        p_value(row.get("p_holm")),
        verdict(row),
        p_value(row.get("p_value")),
        text.decimal(row.get("margin")),
        ", ".join(text.signed(value) for value in _by_seed(row)) or text.DASH,
        text.whole(row.get("images")),
        str(row.get("family") or text.DASH),
    ]


def verdict(row: Tree) -> str:
    """Verdict on a paired difference, from its interval, adjusted p-value, margin and seeds."""
    value, p, ends = number(row.get("difference")), number(row.get("p_holm")), bounds(row.get("ci"))
    a, b = str(row.get("a", "the first")), str(row.get("b", "the second"))
    if value is None:
        return "Not measured: one of the two has no figures."
    if ends is None or p is None:
        return "No verdict: there is no interval or no p-value."
    margin = number(row.get("margin")) or 0.0
    first, second = (f"{name} {'are' if name.endswith('images') else 'is'}" for name in (a, b))
    signs = {(n > 0) - (n < 0) for n in _by_seed(row)}
    if p < LEVEL and len(signs) > 1:
        return "A difference is shown, but not with the same sign in every seed."
    if p < LEVEL and value > 0:
        return f"{first} better."
    is_within = ends[0] > -margin
    if p < LEVEL and value < 0:
        if ends[1] < -margin:
            return f"{second} better, by more than the margin."
        if is_within:
            return f"{second} better, but by less than the margin."
        return f"{second} better; whether by more than the margin is not shown."
    if is_within:
        return f"No difference shown; {first} not inferior."
    return "Undecided: neither a difference nor non-inferiority is shown."


def _charts(comparison: Comparison) -> list[Markup]:
    """Differences with intervals on one common axis, one chart per subtracted or first arm."""
    values = []
    for row in comparison.pairs:
        found = (number(row.get("difference")), *(bounds(row.get("ci")) or ()))
        values += [n for n in found if n is not None] + _by_seed(row)
    references, margin = [("equal", 0.0)], comparison.margin
    if margin is not None:
        # The labels of both reference lines need room beside each other.
        if max([0.0, *values]) - min([-margin, *values]) < 6 * margin:
            references.append(("−margin", -margin))
        values.append(-margin)
    domain = span([*values, 0.0])
    charts = []
    for i, (title, rows) in enumerate(_groups(comparison).items(), 1):
        chart_rows = [_row(comparison, label, row) for label, row in rows]
        x_label = "difference of macro AUC"
        charts.append(dot_figure(f"pairs-{i}", title, chart_rows, x_label, domain, references))
    return [chart for chart in charts if chart]


def _groups(comparison: Comparison) -> dict[str, list[tuple[str, Tree]]]:
    """(row label, pair) of each chart, by its title."""
    families: dict[str, list[Tree]] = {}
    for row in comparison.pairs:
        families.setdefault(str(row.get("family") or "pairs"), []).append(row)
    groups: dict[str, list[tuple[str, Tree]]] = {}
    for family, members in families.items():
        seconds = {str(row.get("b")) for row in members}
        for row in members:
            a, b = (comparison.label(str(row.get(key))) for key in ("a", "b"))
            title, label = (f"… minus {b}", a) if len(seconds) == 1 else (f"{a} minus …", b)
            groups.setdefault(f"{title} ({family})", []).append((label, row))
    return groups


def _row(comparison: Comparison, label: str, row: Tree) -> Row:
    value = number(row.get("difference"))
    if value is None:
        return Row(label)
    style = comparison.style(str(row.get("a")))
    return Row(label, [Dot("difference", value, bounds(row.get("ci")), style, _by_seed(row))])


def _by_seed(row: Tree) -> list[float]:
    """Differences of the single generator seeds."""
    return numbers([item.get("difference") for item in trees(row.get("seed_differences"))])


SECTION = Section("pairs", "Paired differences", _render)
