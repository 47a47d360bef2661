"""The outbound log of a hospital: every message that left it, written down before it left. Append-only.

One JSON line a message: when, of which experiment and round, which kind of message, and what each of its records held: numbers
and words with their values, because these are what left; of an array its name, type, shape, bytes and SHA-256 (of its .npy
file), because its values are the model's, and of arrays that travel together the parcel's SHA-256 (fedgan/exchange/bundle.py). `sha256`
of a line is the hash of its records, by which a reader sees that they were changed. A line that a killed process left
unfinished belongs to a message that was never sent.

A round's line is some 20 kB and more, mostly hashes of arrays, so the log is kept in parts: outbound.jsonl, and once that is
full outbound-00001.jsonl and so on. Lines go to the last part that is there; no part is ever renamed or removed here. Each line
is checked by itself, none knows the line before it: parts may be moved away, and one that is missing between others is told.
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
PART_BYTES = 16 * 2**20  # a part that has as many is full
Record = dict[str, Any]


# --- what a record held ------------------------------------------------------------------------------


def array_row(name: str, dtype: str, shape: Sequence[int], data: bytes) -> list[Any]:
    """One array of a record: name, type, shape, bytes, hash. `data`: the .npy file of its numbers."""
    return [name, dtype, list(shape), len(data), hashlib.sha256(data).hexdigest()]


def arrays_record(name: str, rows: Iterable[list[Any]], parcel: bytes | None = None) -> Record:
    """A record of arrays, by their rows. `parcel`: the bytes in which they travel together, else each as its .npy file."""
    rows = list(rows)
    if parcel is None:
        return {
            "name": name,
            "kind": "arrays",
            "bytes": sum(row[3] for row in rows),
            "arrays": rows,
        }
    digest = hashlib.sha256(parcel).hexdigest()
    return {"name": name, "kind": "arrays", "bytes": len(parcel), "parcel": digest, "arrays": rows}


def values_record(name: str, kind: str, values: Mapping[str, Any]) -> Record:
    """A record of numbers and words with their values. Numbers that JSON cannot hold stand there as words ('inf', 'nan').

    Of bytes there stand the length and the SHA-256: they are keys and shares of keys (`federation.secure`), and who read
    the logs of several hospitals could put shares together.
    """
    plain = {key: _plain(value) for key, value in values.items()}
    size = sum(_extra(value) for value in values.values())
    return {"name": name, "kind": kind, "bytes": len(_json(plain)) + size, "values": plain}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bytes):
        return f"{len(value)} bytes, SHA-256 {hashlib.sha256(value).hexdigest()}"
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _extra(value: Any) -> int:
    """By how much bytes among the values are longer than the words that stand for them."""
    if isinstance(value, bytes):
        return len(value) - len(_plain(value))
    return sum(_extra(item) for item in value) if isinstance(value, list | tuple) else 0


# --- one message -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One line. `bytes`: of arrays as they travel, and of numbers and words as JSON; without the headers of the connection."""

    time: str
    experiment: str
    round: int
    message: str
    bytes: int
    sha256: str
    records: list[Record]

    @staticmethod
    def of(experiment: str, round_number: int, message: str, records: list[Record]) -> Entry:
        """The line of a message that is to leave now."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        total = sum(record["bytes"] for record in records)
        return Entry(now, experiment, round_number, message, total, _hash(records), records)

    @property
    def intact(self) -> bool:
        """Whether the records are those that the line was written with."""
        return self.sha256 == _hash(self.records) and self.bytes == sum(
            record["bytes"] for record in self.records
        )


def _parse(line: bytes) -> Entry:
    """One line of the file. Raises `ValueError`, `KeyError` or `TypeError` when it is none."""
    entry = Entry(**json.loads(line))
    texts = (entry.time, entry.experiment, entry.message, entry.sha256)
    if not all(isinstance(text, str) for text in texts) or not isinstance(entry.records, list):
        raise ValueError("a field has the wrong type")
    if type(entry.round) is not int or type(entry.bytes) is not int:
        raise ValueError("a number has the wrong type")
    for record in entry.records:
        held = record["arrays" if record["kind"] == "arrays" else "values"]
        rows = held if record["kind"] == "arrays" else []
        if type(record["bytes"]) is not int or not isinstance(
            held, list if record["kind"] == "arrays" else dict
        ):
            raise ValueError("a record holds something else than it says")
        if not isinstance(record["name"], str) or not all(
            isinstance(row, list) and len(row) == 5 for row in rows
        ):
            raise ValueError("a record lacks its name, or a row is none of an array")
    return entry


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _hash(records: list[Record]) -> str:
    return hashlib.sha256(
        json.dumps(records, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


# --- the file ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What a log says: its entries, lines whose records were changed (`FILE:LINE`), how many are no entry, parts not there."""

    entries: list[Entry] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unfinished: int = 0
    missing: list[str] = field(default_factory=list)


class OutboundLog:
    """The log whose first part is `path`. Makes no file before the first entry."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def part(self, number: int) -> Path:
        """Where a part lies; 0 is the first."""
        return (
            self.path.with_name(f"{self.path.stem}-{number:05d}{self.path.suffix}")
            if number
            else self.path
        )

    def numbers(self) -> list[int]:
        """Numbers of the parts that are there, in their order. Raises `OSError` where their folder cannot be read."""
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

    def _open_part(self) -> Path:
        """The part that the next line goes to: the last one, or one more where that is full."""
        last = max(self.numbers(), default=0)
        part = self.part(last)
        return self.part(last + 1) if part.is_file() and part.stat().st_size >= PART_BYTES else part

    def append(self, entry: Entry) -> None:
        """Add a line; it is on the disk when this returns. Raises `StorageError` where it cannot be written."""
        line = _json(asdict(entry)) + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self._open_part()
            new = not part.exists()
            # One write at the end of the file: arms of a comparison may write beside one shard at the same time. Which part
            # is full they may find out at once, too: both then begin the same next one, or one more line goes into the old.
            with open(part, "a+b", buffering=0) as stream:
                if end := stream.seek(0, os.SEEK_END):
                    stream.seek(end - 1)
                    line = (
                        line if stream.read(1) == b"\n" else b"\n" + line
                    )  # after a line that was never finished
                if stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(stream.fileno())
            if new:
                files.sync_folder(self.path.parent)
        except OSError as error:
            raise StorageError(
                f"the outbound log {self.path} cannot be written ({error.strerror or error}), so nothing is sent: "
                "make its folder writable, or free some space"
            ) from error

    def read(self) -> Reading:
        """What all parts say. Raises `DataError` where there is none, `StorageError` where one cannot be read."""
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
    entries, changed, unfinished = (
        [],
        [],
        int(bool(lines[-1])),
    )  # what has no line end was never finished
    for number, line in enumerate(lines[:-1], 1):
        if not line:
            continue
        try:
            entry = _parse(line)
        except (ValueError, KeyError, TypeError):
            unfinished += 1
            continue
        entries.append(entry)
        if not entry.intact:
            changed.append(f"{path.name}:{number}")
    return Reading(entries, changed, unfinished)
