"""Any JSON as rows of (key, text), the paths of what is null in it, and what a source of images may be called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from fedgan.data.shard_files import is_phantom_source
from fedgan.report.html.format import DASH

DRAWN = "All images were drawn by a program: these figures say nothing of patients."
WITHHELD = (
    "withheld: privacy"  # what hospitals.json or environment.json of a private run leaves out
)
UNTOLD = "named by a file: not shown"
_FILE_NAME = re.compile(r"\.[A-Za-z]\w{1,5}(\s|$)|[/\\]")


def leaves(value: Any, path: str = "") -> list[tuple[str, str]]:
    """The leaves of a nested dict as (dotted key, text)."""
    if isinstance(value, dict):
        return [
            leaf
            for key, item in value.items()
            for leaf in leaves(item, f"{path}.{key}" if path else str(key))
        ]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [leaf for i, item in enumerate(value) for leaf in leaves(item, f"{path}[{i}]")]
    return [(path, word(value))]


def word(value: Any) -> str:
    """A value as a person would write it. Of an absolute path only the last part: the page may be passed on."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ", ".join(word(item) for item in value)
    if isinstance(value, str) and (
        PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    ):
        return "…/" + PureWindowsPath(value).name
    return DASH if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def nulls(value: Any, path: str = "") -> Iterator[str]:
    """Paths of what is null, as "utility › synthetic › macro_auc"."""
    if value is None and path:
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from nulls(item, f"{path} › {key}" if path else str(key))


def source_title(value: Any) -> str | None:
    """A source's title, or None where it may be the name of a file or of a folder (the importers' default)."""
    words = " ".join(str(value or "").split())
    return words if len(words.split()) >= 3 and not _FILE_NAME.search(words) else None


def source_text(value: Any) -> str:
    """A source as a page shows it: its title, or that it is not shown, or a dash where there is none."""
    return source_title(value) or (UNTOLD if str(value or "").strip() else DASH)


def content_hash(row: Mapping[str, Any]) -> str | None:
    """The content hash of a hospital's or a source's row, or that it is withheld; None where the row has none."""
    return (
        WITHHELD
        if row.get("content_hash", "") is None
        else str(row.get("content_hash", "")) or None
    )


def counts_withheld(row: Mapping[str, Any]) -> bool:
    """Whether a hospital's row names its labels without their counts, as a private run's does."""
    counts = row.get("counts")
    return isinstance(counts, Mapping) and any(
        isinstance(of, Mapping) and None in of.values() for of in counts.values()
    )


def all_drawn(sources: Iterable[Any]) -> bool:
    """Whether all images were drawn by a program, by the names of their sources; False where no source is known."""
    found = list(sources)
    return bool(found) and all(is_phantom_source(source) for source in found)
