"""The arms in pairs, on the same test images: difference, interval, p-value, and the verdict in words."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.comparison.data import Comparison
from fedgan.report.comparison.parts import chart_figure, p_value
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
    Column("p, Holm", title="Adjusted over the family"),
    Column("Verdict", numeric=False),
    Column("p"),
    Column("Margin"),
    Column("By generator seed"),
    Column("Test images"),
    Column("Family", numeric=False, title="The p-values of a family are adjusted together"),
)


def _render(comparison: Comparison) -> Markup:
    found = comparison.comparisons
    if not found:
        return absent("No arms were compared in pairs: comparison.json has no comparisons.")
    return render(
        "comparison_pairs.html.j2",
        charts=_charts(comparison),
        table=table(
            "Differences of macro AUC",
            COLUMNS,
            [_cells(_named(comparison, row)) for row in found],
            "pairs",
        ),
        margin=text.decimal(comparison.content.get("margin")),
    )


def _named(comparison: Comparison, row: Tree) -> Tree:
    """The pair under the names that the rest of the page gives its two rows."""
    return row | {
        key: comparison.label(str(row[key])) for key in ("a", "b") if row.get(key) is not None
    }


def _title(row: Tree) -> str:
    return f"{row.get('a', 'unnamed')} − {row.get('b', 'unnamed')}"


def _cells(row: Tree) -> list[str]:
    return [
        _title(row),
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
    """What a paired difference says, in words, from its interval, adjusted p-value, margin and seeds."""
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
        return "A difference is shown, but not the same in every seed."
    if p < LEVEL and value > 0:
        return f"{first} better."
    within = ends[0] > -margin
    if p < LEVEL and value < 0:
        if ends[1] < -margin:
            return f"{second} better, by more than the margin."
        return (
            f"{second} better, but by less than the margin."
            if within
            else f"{second} better; by more or less than the margin is open."
        )
    return (
        f"No difference shown; {first} not inferior."
        if within
        else "Undecided: neither a difference nor non-inferiority is shown."
    )


def _charts(comparison: Comparison) -> list[Markup]:
    """The differences with their intervals on one common axis: a chart for what is always subtracted, else for each first arm."""
    margin = number(comparison.content.get("margin"))
    references = [("equal", 0.0)]
    known = [
        (number(row.get("difference")), *(bounds(row.get("ci")) or ()))
        for row in comparison.comparisons
    ]
    values = [n for row in known for n in row if n is not None] + [
        n for row in comparison.comparisons for n in _by_seed(row)
    ]
    if margin is not None and margin > 0:
        references = (
            [("equal", 0.0), ("−margin", -margin)] if _apart(values, margin) else references
        )
        values.append(-margin)
    domain = span([0.0, *values])
    charts = []
    for i, (title, members) in enumerate(_groups(comparison).items()):
        rows = [_row(comparison, label, row) for label, row in members]
        charts.append(
            chart_figure(
                f"pairs-{i + 1}", title, rows, "difference of macro AUC", domain, references
            )
        )
    return [chart for chart in charts if chart]


def _apart(values: list[float], margin: float) -> bool:
    """Whether the labels of 0 and of the margin have room beside each other."""
    return max([0.0, *values]) - min([-margin, *values]) < 6 * margin


def _groups(comparison: Comparison) -> dict[str, list[tuple[str, Tree]]]:
    """(name of the row, pair) of each chart, by its title."""
    families: dict[str, list[Tree]] = {}
    for row in comparison.comparisons:
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
    return Row(
        label,
        [
            Dot(
                "difference",
                value,
                bounds(row.get("ci")),
                comparison.style(str(row.get("a"))),
                _by_seed(row),
            )
        ],
    )


def _by_seed(row: Tree) -> list[float]:
    """The differences of the single generator seeds."""
    return [
        n
        for item in trees(row.get("seed_differences"))
        if (n := number(item.get("difference"))) is not None
    ]


SECTION = Section("pairs", "Paired differences", _render)
