"""Class folders: SOURCE/class/*.png, or SOURCE/train/class/*.png if the source has a split."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fedgan.data.importers.pixels import SUFFIXES, UnreadableError, decode, read_header
from fedgan.data.importers.source import SPLIT_NAMES, Skipped, Source
from fedgan.errors import DataError
from fedgan.redact import printable

PATTERN_SECONDS = 30.0  # for the patients of all files
MAX_HEADERS = 64  # files whose header is read for size and colour


def read_folder(
    folder: str | Path, name: str = "", patient_pattern: str = "", outside: bool = False
) -> Source:
    """Read the images below the class folders of `folder`, in the order of their paths.

    If all sub-folders are named train, val, test or alike, the classes are one level deeper. `name`
    is the institution (default: the folder name). `patient_pattern` is a regular expression with
    one group for the patient in the file name, e.g. `(person\\d+)_`. `outside`: links may lead out
    of the folder. Raises `DataError` if the folder is missing or has no image, for a link out of
    it, and for a pattern that takes more than `PATTERN_SECONDS`.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"no folder at {folder}: give a folder with one sub-folder per class")
    pattern = _pattern(patient_pattern)
    top_folders = sorted(
        child.name
        for child in folder.iterdir()
        if child.is_dir() and not child.name.startswith(".")
    )
    has_splits = bool(top_folders) and all(name.lower() in SPLIT_NAMES for name in top_folders)
    depth = 2 if has_splits else 1
    skipped: Counter[str] = Counter()
    found: list[tuple[str, ...]] = []
    for parts in _walk(folder):
        if not _is_utf8("/".join(parts)):
            skipped["a name that is not UTF-8"] += 1
        elif Path(parts[-1]).suffix.lower() not in SUFFIXES or parts[-1].startswith("."):
            skipped["not an image file"] += 1
        elif len(parts) <= depth:
            skipped["not in a class folder"] += 1
        else:
            found.append(parts)
    if not found:
        raise DataError(
            f"{folder} has no image in class folders (SOURCE/class/*.png): nothing to import"
        )
    classes = [parts[depth - 1] for parts in found]
    label_names, codes = np.unique(classes, return_inverse=True)
    paths = [folder.joinpath(*parts) for parts in found]
    if not outside:
        refuse_outside(folder, paths)
    with _time_limit(patient_pattern):
        patients = [_patient(pattern, parts[-1]) for parts in found]
    size, colour = read_headers(paths)
    return Source(
        title=folder.resolve().name,
        labels=np.eye(len(label_names), dtype=np.uint8)[codes],
        label_names=tuple(label_names.tolist()),
        exclusive=True,
        patients=np.array(patients, dtype=str),
        institutions=np.full(len(found), name or folder.resolve().name),
        given=np.array([SPLIT_NAMES[parts[0].lower()] for parts in found], dtype=str)
        if has_splits
        else None,
        names=np.array(["/".join(parts) for parts in found], dtype=str),
        images=lambda: decode_images(paths),
        size=size,
        colour=colour,
        skipped=dict(skipped),
    )


def refuse_outside(root: Path, paths: Sequence[Path | Skipped]) -> None:
    """Raise `DataError` for a path that leads out of `root`, by `..`, from `/`, or by a link."""
    inside = os.path.realpath(root).rstrip(os.sep) + os.sep
    for path in paths:
        # with a zero byte it is no path: the row is counted as unreadable
        if isinstance(path, Skipped) or "\0" in str(path):
            continue
        if not os.path.realpath(path).startswith(inside):
            raise DataError(
                f"'{printable(str(path))}' leads out of {root}: with --outside such paths and "
                "links are read"
            )


def decode_images(paths: Sequence[Path | Skipped]) -> Iterator[np.ndarray | Skipped]:
    """Decode files in order; yield `Skipped` for a file that cannot be read."""
    for path in paths:
        if isinstance(path, Skipped):
            yield path
            continue
        try:
            yield decode(path)
        except UnreadableError as error:
            yield Skipped(str(error))


def read_headers(paths: Sequence[Path | Skipped]) -> tuple[tuple[int, int], bool]:
    """Size of the first readable image, and whether any of the first images is in colour."""
    headers = [
        header
        for path in paths[:MAX_HEADERS]
        if isinstance(path, Path) and (header := read_header(path))
    ]
    return (headers[0][0] if headers else (0, 0)), any(colour for _, colour in headers)


def _walk(folder: Path) -> Iterator[tuple[str, ...]]:
    for parent, folders, names in os.walk(folder, followlinks=False):
        folders.sort()
        yield from (Path(parent, name).relative_to(folder).parts for name in sorted(names))


def _is_utf8(name: str) -> bool:
    """Whether a name from the file system can be written; other bytes come as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def _time_limit(pattern: str) -> Iterator[None]:
    """`DataError` after `PATTERN_SECONDS`: a regular expression can need exponential time.

    By a signal, which interrupts Python's `re`, so in the main thread alone.
    """
    if not pattern or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise DataError(
            f"the patient pattern '{pattern}' takes more than {PATTERN_SECONDS:g} s: write it "
            "without nested repetitions such as (a+)+"
        )

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, PATTERN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _pattern(text: str) -> re.Pattern[str] | None:
    if not text:
        return None
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise DataError(f"the patient pattern '{text}' is no regular expression: {error}") from None
    if pattern.groups != 1:
        raise DataError(
            f"the patient pattern '{text}' must have exactly one group in round brackets, e.g. "
            "'(person\\d+)_'"
        )
    return pattern


def _patient(pattern: re.Pattern[str] | None, name: str) -> str:
    found = pattern.search(name) if pattern else None
    return (found.group(1) or "") if found else ""
