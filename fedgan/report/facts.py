"""Any JSON as rows of (key, text), and the paths of what is null in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from fedgan.report.format import DASH


def leaves(value: Any, path: str = "") -> list[tuple[str, str]]:
    """The leaves of a nested dict as (dotted key, text)."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in leaves(item, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [leaf for i, item in enumerate(value) for leaf in leaves(item, f"{path}[{i}]")]
    return [(path, word(value))]


def word(value: Any) -> str:
    """A value as a person would write it. Of an absolute path only the last part: the page may be passed on."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ", ".join(word(item) for item in value)
    if isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        return "…/" + PureWindowsPath(value).name
    return DASH if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def nulls(value: Any, path: str = "") -> Iterator[str]:
    """Paths of what is null, as "utility › synthetic › macro_auc"."""
    if value is None and path:
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from nulls(item, f"{path} › {key}" if path else str(key))
