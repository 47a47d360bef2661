"""The registration list of a federation: every key that was ever made for a hospital, and when it was revoked."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedgan.errors import ConfigError

LONGEST_NAME = 63  # a label of DNS, so that a hospital's name may be a container's
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TAKEN = ("ca", "server")  # what `rotate` means by them is no hospital


@dataclass(frozen=True)
class Registration:
    """One key of one hospital: a row of hospitals.json. Times are ISO 8601 in UTC."""

    name: str
    public_key: str  # below the folder of keys
    fingerprint: str
    created: str
    revoked: str | None = None


def read(path: Path) -> tuple[Registration, ...]:
    """The rows of a list, oldest first. Raises `ConfigError` where it is missing or damaged."""
    try:
        rows = tuple(Registration(**row) for row in json.loads(path.read_text(encoding="utf-8")))
        for row in rows:
            _check_row(row)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: put it back from a copy") from error
    return rows


def as_text(rows: Sequence[Registration]) -> str:
    """A list as it stands in its file."""
    return json.dumps([asdict(row) for row in rows], indent=1) + "\n"


def newest(rows: Sequence[Registration], name: str) -> int:
    """Where the newest row of a hospital stands. Raises `ConfigError` where it has none."""
    found = [index for index, row in enumerate(rows) if row.name == name]
    if not found:
        known = ", ".join(dict.fromkeys(row.name for row in rows)) or "none"
        raise ConfigError(f"no hospital '{name}' among these keys; there are: {known}")
    return found[-1]


def check_names(names: Sequence[str], there: Sequence[str]) -> None:
    """Raise `ConfigError` for a name that is none, that stands twice, or that is `there` already.

    Case makes no difference: names become folders, on whatever disk.
    """
    if not names:
        raise ConfigError(
            "name at least one hospital, e.g. fedgan keys hospital1 hospital2 hospital3"
        )
    seen: set[str] = set()
    taken = {name.casefold() for name in there}
    for name in names:
        if not _NAME.fullmatch(name) or len(name) > LONGEST_NAME or name.casefold() in _TAKEN:
            raise ConfigError(
                f"'{name}' cannot name a hospital: take up to {LONGEST_NAME} letters, digits, - and _, a letter or digit first, "
                f"and neither of {', '.join(_TAKEN)}"
            )
        if name.casefold() in seen:
            raise ConfigError(f"hospital '{name}' is named twice")
        if name.casefold() in taken:
            raise ConfigError(
                f"hospital '{name}' has a key already: a new one is made by fedgan keys rotate {name}"
            )
        seen.add(name.casefold())


def _check_row(row: Registration) -> None:
    """Raise `ValueError` where a row is none that `fedgan keys` writes, e.g. would lead out of the folder."""
    texts = (row.name, row.public_key, row.fingerprint, row.created)
    if not all(isinstance(text, str) for text in texts) or not isinstance(row.revoked, str | None):
        raise ValueError("a value that is no text")
    if (
        not _NAME.fullmatch(row.name)
        or Path(row.public_key).is_absolute()
        or ".." in Path(row.public_key).parts
    ):
        raise ValueError("a name or place that no fedgan keys writes")
