"""Outbound log of a hospital: every message that leaves it, written before it is sent. Append-only.

One JSON line per message: time, experiment, round, kind of message, and the content of each record.
Numbers and texts are logged with their values. An array is logged with its name, type, shape, bytes
and SHA-256 (of its .npy file), without its values, which are the model's; a bundle of arrays also
with the bundle's SHA-256 (fedgan/exchange/bundle.py). A line's `sha256` is the hash of its records
and reveals changes. A line that a killed process left unfinished belongs to a message that was
never sent.

A round's line has 20 kB and more, mostly hashes, so the log is split into parts: outbound.jsonl,
then outbound-00001.jsonl and so on when a part is full. Lines go to the last existing part; this
module never renames or removes a part. Each line is checked independently of the line before it:
parts may be moved away, and a missing part between others is reported.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedgan import files
from fedgan.errors import DataError, StorageError

NAME = "outbound.jsonl"
PART_BYTES = 16 * 2**20  # size of a full part
Record = dict[str, Any]


# --- records --------------------------------------------------------------------------------------


def array_row(name: str, dtype: str, shape: Sequence[int], data: bytes) -> list[Any]:
    """Row of one array: name, type, shape, bytes, hash. `data`: the .npy file of its numbers."""
    return [name, dtype, list(shape), len(data), hashlib.sha256(data).hexdigest()]


def arrays_record(name: str, rows: Iterable[list[Any]], bundle: bytes | None = None) -> Record:
    """Record of arrays, by their rows. `bundle`: its bytes where the arrays travel in one."""
    rows = list(rows)
    size = sum(row[3] for row in rows) if bundle is None else len(bundle)
    record = {"name": name, "kind": "arrays", "bytes": size}
    if bundle is not None:
        record["bundle"] = hashlib.sha256(bundle).hexdigest()
    return record | {"arrays": rows}


def values_record(name: str, kind: str, values: Mapping[str, Any]) -> Record:
    """Record of numbers and texts with their values; not-finite numbers become texts ('inf',
    'nan').

    Bytes are replaced by their length and SHA-256: they are keys and shares of keys
    (`federation.secure`), and a reader of several hospitals' logs could combine shares.
    """
    plain = {key: _plain(value) for key, value in values.items()}
    extra = sum(_extra_bytes(value) for value in values.values())
    return {"name": name, "kind": kind, "bytes": len(_json(plain)) + extra, "values": plain}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bytes):
        return f"{len(value)} bytes, SHA-256 {hashlib.sha256(value).hexdigest()}"
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _extra_bytes(value: Any) -> int:
    """Length of bytes values minus the length of the texts that replace them."""
    if isinstance(value, bytes):
        return len(value) - len(_plain(value))
    return sum(_extra_bytes(item) for item in value) if isinstance(value, list | tuple) else 0


# --- one message ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One line. `bytes`: arrays as they travel plus values as JSON, without protocol headers."""

    time: str
    experiment: str
    round: int
    message: str
    bytes: int
    sha256: str
    records: list[Record]

    @staticmethod
    def of(experiment: str, round_number: int, message: str, records: list[Record]) -> Entry:
        """The line of a message that is about to leave."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        total = sum(record["bytes"] for record in records)
        return Entry(now, experiment, round_number, message, total, _hash(records), records)

    @property
    def is_intact(self) -> bool:
        """Whether the records still match the line's hash and size."""
        return self.sha256 == _hash(self.records) and self.bytes == sum(
            record["bytes"] for record in self.records
        )


def _parse(line: bytes) -> Entry:
    """Parse one line. Raises `ValueError`, `KeyError` or `TypeError` for anything but an entry."""
    entry = Entry(**files.parse_json(line))
    texts = (entry.time, entry.experiment, entry.message, entry.sha256)
    if not all(isinstance(text, str) for text in texts) or not isinstance(entry.records, list):
        raise ValueError("a field has the wrong type")
    if type(entry.round) is not int or type(entry.bytes) is not int:
        raise ValueError("a number has the wrong type")
    for record in entry.records:
        is_arrays = record["kind"] == "arrays"
        content = record["arrays" if is_arrays else "values"]
        rows = content if is_arrays else []
        if type(record["bytes"]) is not int or not isinstance(content, list if is_arrays else dict):
            raise ValueError("a record's content does not match its kind")
        if not isinstance(record["name"], str) or not all(
            isinstance(row, list) and len(row) == 5 for row in rows
        ):
            raise ValueError("a record has no name, or a row of arrays is malformed")
    return entry


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _hash(records: list[Record]) -> str:
    return hashlib.sha256(
        json.dumps(records, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


# --- the file -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """A log's entries, changed lines (`FILE:LINE`), unfinished lines, and missing parts."""

    entries: list[Entry] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unfinished: int = 0
    missing: list[str] = field(default_factory=list)


class OutboundLog:
    """The log whose first part is `path`. Creates no file before the first entry."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def part(self, number: int) -> Path:
        """Path of a part; 0 is the first."""
        return (
            self.path.with_name(f"{self.path.stem}-{number:05d}{self.path.suffix}")
            if number
            else self.path
        )

    def numbers(self) -> list[int]:
        """Sorted numbers of the existing parts. Raises `OSError` for an unreadable folder."""
        name = re.compile(
            rf"{re.escape(self.path.stem)}(?:-([0-9]{{5}}))?{re.escape(self.path.suffix)}"
        )
        try:
            found = [
                match for each in os.listdir(self.path.parent) if (match := name.fullmatch(each))
            ]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(match[1] or 0) for match in found)

    def _current_part(self) -> Path:
        """The part for the next line: the last one, or a new one where that is full."""
        last = max(self.numbers(), default=0)
        part = self.part(last)
        return self.part(last + 1) if part.is_file() and part.stat().st_size >= PART_BYTES else part

    def append(self, entry: Entry) -> None:
        """Add a line and sync it to the disk. Raises `StorageError` where that fails."""
        line = _json(asdict(entry)) + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self._current_part()
            is_new = not part.exists()
            # One write at the end of the file: arms of a comparison may write beside one shard at
            # the same time. If both find a part full, both begin the same next part, or one more
            # line goes into the old one.
            with open(part, "a+b", buffering=0) as stream:
                if end := stream.seek(0, os.SEEK_END):
                    stream.seek(end - 1)
                    if stream.read(1) != b"\n":
                        line = b"\n" + line  # after an unfinished line
                if stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(stream.fileno())
            if is_new:
                files.sync_folder(self.path.parent)
        except OSError as error:
            raise StorageError(
                f"the outbound log {self.path} cannot be written ({error.strerror or error}), "
                "so nothing is sent: make its folder writable, or free some space"
            ) from error

    def read(self) -> Reading:
        """Read all parts. Raises `DataError` for no part, `StorageError` for an unreadable one."""
        try:
            numbers = self.numbers()
        except OSError as error:
            raise StorageError(
                f"{self.path.parent} cannot be read: {error.strerror or error}"
            ) from error
        if not numbers:
            raise DataError(f"no outbound log at {self.path}")
        parts = [_read_part(self.part(number)) for number in numbers]
        return Reading(
            [entry for part in parts for entry in part.entries],
            [line for part in parts for line in part.changed],
            sum(part.unfinished for part in parts),
            [self.part(number).name for number in range(numbers[-1]) if number not in numbers],
        )


def _read_part(path: Path) -> Reading:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error
    entries, changed = list[Entry](), list[str]()
    unfinished = int(bool(lines[-1]))  # a last line without its end
    for number, line in enumerate(lines[:-1], 1):
        if not line:
            continue
        try:
            entry = _parse(line)
        except (ValueError, KeyError, TypeError):
            unfinished += 1
            continue
        entries.append(entry)
        if not entry.is_intact:
            changed.append(f"{path.name}:{number}")
    return Reading(entries, changed, unfinished)
