"""Make text safe to pass on: no paths or file names of a machine, no invisible characters."""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

REDACTED = "(path not shown)"
# Control characters (C0, C1), formats (bidi controls, zero-width), lone surrogates, line separators
_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
_EXTENSIONS = (  # of images and of tables that list them
    r"dcm|dicom|nii|mha|nrrd|png|jpe?g|tiff?|bmp|gif|webp|svs|csv|tsv|xlsx?|npz|npy|zip|gz"
)
_WORD = r"[^\s,;:)\"']"
# The rest of a path that contains spaces: words that are folders, and words up to the file name.
_REST = rf"(?: [^\W\d]\w*[/\\]{_WORD}*)*(?:(?: {_WORD}+){{0,4}}? {_WORD}*\.(?:{_EXTENSIONS})\b)?"
_QUOTED = re.compile(r"([\"'])(?:~?/|[A-Za-z]:[\\/]|\\\\|file:)[^\n]*?\1", re.IGNORECASE)
_PATHS = re.compile(
    r"(?:file://\S+|(?<![\w:/.])~?(?:/[^\s/,;)\"']+){2,}/?|\b[A-Za-z]:[\\/][^\s,;)\"']*"
    rf"|\\\\\w[^\s,;)\"']*){_REST}",
    re.IGNORECASE,
)
_FILES = re.compile(
    rf"(?<![\w/.:\\-])~?[/\\]?(?:[\w.+-]+[/\\])*[\w.+-]+\.(?:{_EXTENSIONS})\b(?![/\\]\w)",
    re.IGNORECASE,
)


def is_printable(text: str) -> bool:
    """Whether a text has no control, bidi or zero-width character, line separator or surrogate."""
    return not any(unicodedata.category(character) in _INVISIBLE for character in text)


def printable(text: str, limit: int = 300) -> str:
    """A text from outside as one line of at most `limit` characters, cut with an ellipsis.

    Characters for which `is_printable` is false become `\\xNN`, `\\uNNNN` or `\\UNNNNNNNN`.
    """
    shown = "".join(map(_escape, text[: limit + 1]))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _escape(character: str) -> str:
    if is_printable(character):
        return character
    code = ord(character)
    form, width = ("x", 2) if code < 0x100 else ("u", 4) if code < 0x10000 else ("U", 8)
    return f"\\{form}{code:0{width}x}"


def redact(value: Any, roots: tuple[str, ...] = ()) -> Any:
    """Replace local paths and names of image or table files by `REDACTED`; web links stay.

    Recurses into dicts (keys as well) and lists. `roots` are folders whose names may contain
    spaces: everything below one is removed.
    """
    if isinstance(value, str):
        return _redact_text(value, roots)
    if isinstance(value, dict):
        return {_redact_text(str(key), roots): redact(item, roots) for key, item in value.items()}
    return [redact(item, roots) for item in value] if isinstance(value, list | tuple) else value


def _redact_text(text: str, roots: tuple[str, ...]) -> str:
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute():
        return REDACTED
    for root in sorted(roots, key=len, reverse=True):
        pattern = re.escape(root) + r"[^\s,;)\"']*" + _REST
        text = re.sub(pattern, REDACTED, text, flags=re.IGNORECASE)
    text = _QUOTED.sub(lambda match: match.group(1) + REDACTED + match.group(1), text)
    return _FILES.sub(REDACTED, _PATHS.sub(REDACTED, text))
