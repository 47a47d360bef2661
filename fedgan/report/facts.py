"""JSON values as text, paths of null values, and facts about hospitals and sources."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from fedgan.data.shard_files import is_phantom_source
from fedgan.report.html.format import DASH

PHANTOM_NOTE = "All images are phantoms: these figures do not describe patients."
WITHHELD = "withheld: privacy"  # what a private run leaves out of hospitals.json, environment.json
TITLE_NOT_SHOWN = "named by a file: not shown"
_FILE_NAME = re.compile(r"\.[A-Za-z]\w{1,5}(\s|$)|[/\\]")


def flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    """The leaves of a nested dict as (dotted key, text)."""
    if isinstance(value, dict):
        return [
            leaf
            for key, item in value.items()
            for leaf in flatten(item, f"{path}.{key}" if path else str(key))
        ]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [leaf for i, item in enumerate(value) for leaf in flatten(item, f"{path}[{i}]")]
    return [(path, value_text(value))]


def value_text(value: Any) -> str:
    """A value as text. Absolute paths are reduced to their last part, as reports may be shared."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ", ".join(value_text(item) for item in value)
    if isinstance(value, str) and (
        PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    ):
        return "…/" + PureWindowsPath(value).name
    return DASH if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def null_paths(value: Any, path: str = "") -> Iterator[str]:
    """Paths of null values, as "utility › synthetic › macro_auc"."""
    if value is None and path:
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from null_paths(item, f"{path} › {key}" if path else str(key))


def source_title(value: Any) -> str | None:
    """A source's title, or None if it may be a file or folder name (the importers' default)."""
    title = " ".join(str(value or "").split())
    return title if len(title.split()) >= 3 and not _FILE_NAME.search(title) else None


def source_text(value: Any) -> str:
    """A source for a report: its title, a note that it is not shown, or a dash if it is empty."""
    return source_title(value) or (TITLE_NOT_SHOWN if str(value or "").strip() else DASH)


def content_hash(row: Mapping[str, Any]) -> str | None:
    """The content hash in a row of a hospital or source; `WITHHELD` if null, None if absent."""
    found = row.get("content_hash", "")
    return WITHHELD if found is None else str(found) or None


def has_withheld_counts(row: Mapping[str, Any]) -> bool:
    """Whether a hospital's row names its labels without counts, as in a private run."""
    counts = row.get("counts")
    return isinstance(counts, Mapping) and any(
        isinstance(of, Mapping) and None in of.values() for of in counts.values()
    )


def are_all_phantoms(sources: Iterable[Any]) -> bool:
    """Whether all sources are phantoms, by their names; False if no source is known."""
    found = list(sources)
    return bool(found) and all(is_phantom_source(source) for source in found)
