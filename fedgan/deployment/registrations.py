"""The registration list: every key ever made for a hospital, and when it was revoked."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedgan import files
from fedgan.errors import ConfigError
from fedgan.redact import printable

LONGEST_NAME = 63  # a DNS label, because container names are DNS labels
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_RESERVED = ("ca", "server")  # `rotate server` is the server's certificate


@dataclass(frozen=True)
class Registration:
    """One key of one hospital: a row of hospitals.json. Times are ISO 8601 in UTC."""

    name: str
    public_key: str  # relative to the key folder
    fingerprint: str
    created: str
    revoked: str | None = None
    images: int | None = None  # the most training images that the hospital may report

    @property
    def node_name(self) -> str:
        """The name at the SuperLink: NAME, or NAME=IMAGES. The server reads the bound from it."""
        return self.name if self.images is None else f"{self.name}={self.images}"


def split_bound(text: str) -> tuple[str, int | None]:
    """Split NAME=IMAGES, the name at the SuperLink or of the command line, into name and bound.

    The bound is None where the text has none. Raises `ConfigError` for one that is no number.
    """
    name, equals, images = text.partition("=")
    if not equals:
        return name, None
    if not re.fullmatch(r"[1-9][0-9]{0,8}", images):
        raise ConfigError(
            f"'{printable(text)}' states no number of images: write NAME=IMAGES with the most "
            "training images that the hospital may report, e.g. hospital1=1200"
        )
    return name, int(images)


def read(path: Path) -> tuple[Registration, ...]:
    """Read a list, oldest row first. Raises `ConfigError` if it is missing or damaged."""
    try:
        rows = tuple(Registration(**row) for row in files.parse_json(files.read_bytes(path)))
        for row in rows:
            _check_row(row)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: restore it from a backup") from error
    return rows


def as_text(rows: Sequence[Registration]) -> str:
    """A list as JSON text."""
    return json.dumps([asdict(row) for row in rows], indent=1) + "\n"


def newest(rows: Sequence[Registration], name: str) -> int:
    """Index of a hospital's newest row. Raises `ConfigError` if it has none."""
    found = [index for index, row in enumerate(rows) if row.name == name]
    if not found:
        known = ", ".join(dict.fromkeys(row.name for row in rows)) or "none"
        raise ConfigError(f"no hospital '{name}' in these keys; known: {known}")
    return found[-1]


def check_names(names: Sequence[str], existing: Sequence[str]) -> None:
    """Raise `ConfigError` for a name that is invalid, given twice, or in `existing`.

    Names become folders and some file systems ignore case, so the comparison ignores it too.
    """
    if not names:
        raise ConfigError(
            "name at least one hospital, e.g. fedgan keys hospital1 hospital2 hospital3"
        )
    seen: set[str] = set()
    taken = {name.casefold() for name in existing}
    for name in names:
        if not _NAME.fullmatch(name) or len(name) > LONGEST_NAME or name.casefold() in _RESERVED:
            raise ConfigError(
                f"'{name}' cannot name a hospital: use up to {LONGEST_NAME} letters, digits, "
                f"- and _, starting with a letter or digit, and not {' or '.join(_RESERVED)}"
            )
        if name.casefold() in seen:
            raise ConfigError(f"hospital '{name}' is given twice")
        if name.casefold() in taken:
            raise ConfigError(
                f"hospital '{name}' already has a key; for a new one: fedgan keys rotate {name}"
            )
        seen.add(name.casefold())


def _check_row(row: Registration) -> None:
    """Raise `ValueError` for a row that `fedgan keys` never writes, e.g. a path elsewhere."""
    texts = (row.name, row.public_key, row.fingerprint, row.created)
    if not all(isinstance(text, str) for text in texts) or not isinstance(row.revoked, str | None):
        raise ValueError("a value that is not text")
    if row.images is not None and (type(row.images) is not int or row.images < 1):
        raise ValueError("a bound that is no number of images")
    if (
        not _NAME.fullmatch(row.name)
        or Path(row.public_key).is_absolute()
        or ".." in Path(row.public_key).parts
    ):
        raise ValueError("a name or path that fedgan keys never writes")
