"""`fedgan settings`: every key of a scenario with type, default, accepted values and meaning."""

from __future__ import annotations

import dataclasses
import difflib
import json
import shutil
import textwrap
import typing
from itertools import groupby
from typing import Annotated

import typer

from fedgan.cli import console
from fedgan.config import Setting, Settings, describe
from fedgan.errors import ConfigError

TOP_LEVEL = "top level"


def settings(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A section (privacy) or a key (training.r1_gamma). [default: all keys]",
        ),
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Show the keys of a scenario with their meaning.

    Each has its type, default and accepted values. Set a key in the scenario's TOML file or with
    --set section.key=value.
    """
    chosen = find(name)
    text = as_text(chosen, shutil.get_terminal_size().columns)
    console.emit({"settings": [dataclasses.asdict(item) for item in chosen]}, as_json, text)


def find(name: str | None) -> list[Setting]:
    """All settings, those of a section, or one key. Raises `ConfigError` for an unknown name."""
    items = describe()
    if name is None:
        return items
    if found := [item for item in items if name in (item.key, section_of(item))]:
        return found
    names = sorted({section_of(item) for item in items} - {TOP_LEVEL}) + [
        item.key for item in items
    ]
    by_field = {item.key.rpartition(".")[2]: item.key for item in reversed(items)}
    near = difflib.get_close_matches(name, names, n=1) or [
        by_field[field] for field in difflib.get_close_matches(name, by_field, n=1)
    ]
    hint = f"did you mean '{near[0]}'?" if near else "list all keys with: fedgan settings"
    raise ConfigError(f"no section or key '{name}'; {hint}")


def section_of(item: Setting) -> str:
    """Name of the section that a key belongs to."""
    return item.key.partition(".")[0] if "." in item.key else TOP_LEVEL


def section_meaning(section: str) -> str:
    """Description of a section: the docstring of its class."""
    if section == TOP_LEVEL:
        return "Keys outside any section."
    return str(typing.get_type_hints(Settings)[section].__doc__)


def as_text(items: list[Setting], width: int) -> str:
    """Settings grouped by section, wrapped to `width` columns."""
    wrap = textwrap.TextWrapper(max(width, 20), break_long_words=False, break_on_hyphens=False)
    blocks = []
    for section, group in groupby(items, section_of):
        title = "" if section == TOP_LEVEL else f"[{section}] "
        wrap.initial_indent = wrap.subsequent_indent = ""
        blocks.append(wrap.fill(title + section_meaning(section)))
        wrap.initial_indent = wrap.subsequent_indent = " " * 6
        for item in group:
            head = f"  {item.key} = {toml(item.default)}"
            blocks.append("\n".join([head, wrap.fill(accepted(item)), wrap.fill(item.meaning)]))
    return "\n\n".join(blocks)


def accepted(item: Setting) -> str:
    """Type and range or choices of a setting."""
    if item.choices:
        return f"{item.type}: {', '.join(item.choices)}"
    if item.low is None:
        return item.type
    if item.high is None:
        return f"{item.type}, at least {item.low:.10g}"
    return f"{item.type} from {item.low:.10g} to {item.high:.10g}"


def toml(value: object) -> str:
    """A default as TOML writes it."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def reference_markdown() -> str:
    """Reference of all settings in Markdown, one table per section, for the documentation."""
    parts = []
    for section, group in groupby(describe(), section_of):
        rows = [
            f"| `{item.key}` | `{toml(item.default)}` | {accepted(item)} | {escape(item.meaning)} |"
            for item in group
        ]
        head = "| key | default | accepted | meaning |\n|---|---|---|---|"
        title = section.capitalize() if section == TOP_LEVEL else f"`[{section}]`"
        parts.append("\n".join([f"## {title}", "", section_meaning(section), "", head, *rows, ""]))
    return "\n".join(parts)


def escape(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
