"""The privacy ledger of one shard: what was released of it, and what that costs. Append-only, hash-chained.

One JSON line an entry. An entry is on the disk before the steps that it pays for begin, so that a crash may cost privacy
that was not used, but never uses what was not counted. Each line holds the hash of the line before.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgan.errors import DataError
from fedgan.privacy.accounting import Mechanism, epsilon_of, steps_within

NAME = "privacy-ledger.jsonl"


@dataclass(frozen=True)
class Entry:
    """One line: a mechanism, of which run, in which unit, and `epsilon` at `delta` over all lines up to this one."""

    time: str
    run: str
    kind: str
    unit: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    delta: float
    epsilon: float | None  # None: infinite
    data: str
    previous: str

    @property
    def mechanism(self) -> Mechanism:
        return Mechanism(self.noise_multiplier, self.sample_rate, self.steps)

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()


class Ledger:
    """The ledger at `path`. Makes no file before the first entry."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self) -> list[Entry]:
        """All entries, checked. Raises `DataError` when a line was changed, or lines are missing."""
        if not self.path.is_file():
            return []
        found: list[Entry] = []
        for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], 1):  # what has no line end was never finished
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError):
                raise DataError(f"{self.path.name}, line {number}: not an entry of a privacy ledger; restore the file") from None
            if entry.previous != (found[-1].hash if found else ""):
                raise DataError(f"{self.path.name}, line {number}: does not follow from the line before; restore the file")
            found.append(entry)
        return found

    def mechanisms(self) -> list[Mechanism]:
        return [entry.mechanism for entry in self.entries()]

    def reserve(
        self, step: Mechanism, steps: int, *, run: str, kind: str, unit: str, delta: float, data: str, max_epsilon: float = 0.0
    ) -> int:
        """Enter `steps` steps like `step`, or as many as `max_epsilon` (0: no limit) allows, and return how many."""
        with self._locked():
            entries = self.entries()
            spent = [entry.mechanism for entry in entries]
            if max_epsilon:
                steps = steps_within(max_epsilon, delta, spent, step, steps)
            if steps > 0:
                mechanism = Mechanism(step.noise_multiplier, step.sample_rate, steps)
                before = max((entry.epsilon for entry in entries if entry.epsilon is not None), default=0.0)
                epsilon = max(before, epsilon_of([*spent, mechanism], delta))
                self._append(
                    Entry(
                        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                        run=run,
                        kind=kind,
                        unit=unit,
                        noise_multiplier=step.noise_multiplier,
                        sample_rate=step.sample_rate,
                        steps=steps,
                        delta=delta,
                        epsilon=epsilon if epsilon != float("inf") else None,
                        data=data,
                        previous=entries[-1].hash if entries else "",
                    )
                )
        return steps

    def _append(self, entry: Entry) -> None:
        data = self.path.read_bytes() if self.path.is_file() else b""
        whole = data.rfind(b"\n") + 1
        with open(self.path, "r+b" if data else "wb") as stream:
            stream.seek(whole)
            stream.truncate()
            stream.write(json.dumps(vars(entry)).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class JointLedger:
    """The ledgers of several shards that are trained on as one pool: what is released is entered in each of them."""

    def __init__(self, ledgers: Sequence[Ledger]) -> None:
        self.ledgers = list(ledgers)

    def mechanisms(self) -> list[Mechanism]:
        return max((ledger.mechanisms() for ledger in self.ledgers), key=len)

    def reserve(self, step: Mechanism, steps: int, **facts: Any) -> int:
        for ledger in self.ledgers:
            steps = ledger.reserve(step, steps, **facts)
        return steps
