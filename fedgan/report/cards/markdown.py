"""Render the facts of a card as Markdown. Every value is escaped, as names come from users."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedgan.report.html import format as text

_SPECIAL = re.compile(r"[\\`*\[\]<>|~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
_MARK = re.compile(r"^(#{1,6}|[+=-]+)(?=\s|$)")  # starts a heading, a list or a rule
_NUMBER = re.compile(r"^(\d{1,9})([.)])(?=\s|$)")  # starts a numbered list
_NUMERIC = re.compile(r"[\d–−+\\][\d,.–−/ ()e+-]*$")


class Markdown(str):
    """Markdown text that is not escaped again."""

    __slots__ = ()


def render(template: str, facts: dict[str, Any]) -> str:
    """Render `templates/<template>` with `facts`; an undefined variable is an error."""
    markdown = _environment().get_template(template).render(facts=facts)
    return re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n"


def escape(value: Any) -> Markdown:
    """A value as one line of literal Markdown; None is a dash."""
    if isinstance(value, Markdown):
        return value
    line = " ".join((text.DASH if value is None else str(value)).split())
    line = _SPECIAL.sub(lambda found: "\\" + found.group(), line)
    return Markdown(_NUMBER.sub(r"\1\\\2", _MARK.sub(r"\\\1", line)))


def code(value: Any) -> Markdown:
    """A value as a code span, valid in a table as well."""
    if value is None:
        return Markdown(text.DASH)
    line = " ".join(str(value).split()).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    gap = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return Markdown(f"{fence}{gap}{line}{gap}{fence}")


def table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markdown:
    """A Markdown table; numeric columns are right-aligned."""
    cells = [[escape(cell) for cell in row] for row in rows]
    numeric = [
        bool(cells) and all(_NUMERIC.match(row[column]) for row in cells)
        for column in range(len(titles))
    ]
    lines: list[Sequence[str]] = [
        [escape(title) for title in titles],
        ["---:" if right else "---" for right in numeric],
        *cells,
    ]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def bullets(items: Sequence[Any]) -> Markdown:
    """A bullet list."""
    return Markdown("\n".join(f"- {escape(item)}" for item in items))


def rows(items: Sequence[dict[str, Any]], *keys: str) -> list[list[Any]]:
    """Cells of `items` by key; lists are joined with commas."""
    return [
        [
            ", ".join(map(str, value)) if isinstance(value := item.get(key), list) else value
            for key in keys
        ]
        for item in items
    ]


def figure(item: dict[str, Any], key: str, digits: int = 3) -> Markdown:
    """A number with its interval, if any: 0.912 (0.891–0.930)."""
    ends = item.get(f"{key}_ci")
    return Markdown(
        text.decimal(item.get(key), digits)
        + (f" ({text.interval(ends, digits)})" if text.bounds(ends) else "")
    )


def size_category(images: Any) -> Markdown:
    """The size category of the Hugging Face Hub: n<1K, 1K<n<10K, …"""
    count = text.number(images) or 0
    categories = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"))
    return Markdown(next((name for limit, name in categories if count < limit), "n>1M"))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fedgan.report.html"),
        autoescape=False,  # this is Markdown; `finalize` escapes instead
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    helpers: dict[str, Callable[..., Any]] = {
        "table": table,
        "bullets": bullets,
        "rows": rows,
        "figure": figure,
        "size_category": size_category,
    }
    environment.globals.update(helpers)
    environment.filters.update(
        code=code,
        whole=text.whole,
        decimal=text.decimal,
        significant=text.significant,
        interval=text.interval,
        sized_interval=text.sized_interval,
        duration=text.duration,
        bytes=text.size,
        yaml=lambda value: Markdown(json.dumps(value, ensure_ascii=False)),  # JSON is YAML
    )
    return environment
