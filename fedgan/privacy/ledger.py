"""The privacy ledger of one shard: what was released of it, and what that costs. Append-only, hash-chained.

One JSON line an entry, which holds the hash of the line before. An entry is on the disk before the steps that it pays for
begin, so that a crash may cost privacy that was not used, but never uses what was not counted. A line that a killed
process left unfinished was never paid with, and is cut off by the next entry. A restored checkpoint of a training does
not touch the ledger; neither does a new import of the shard (fedgan/data/shard.py keeps it). Images that were
added or removed (another `data` hash) do not begin a new account: most patients are the same. Runs without privacy
are not entered: nothing bounds what they gave away, whatever stands here.

Beside it a second file, the head, says how many entries there are at least, and the hash of the last of these. It is written
after each entry, so that a crash between both leaves it one entry behind, which is harmless; a ledger that ends before
its head was cut or is an older copy, and is refused. What cannot be seen: that both files were deleted or put back to
older copies, or that the head was deleted and the end of the ledger with it. So never restore the ledger of a backup
while the present one can be read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedgan import files
from fedgan.errors import ConfigError, DataError, StorageError
from fedgan.privacy.accounting import Mechanism, epsilon_of, steps_within

try:
    import fcntl
except ModuleNotFoundError:  # Windows: the ledger can be read there
    fcntl = None  # type: ignore[assignment]

NAME = "privacy-ledger.jsonl"
HEAD = ".head.json"
MEND = "put back the newest copy of both the ledger and its head file; what is lost cannot be computed again"


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
    def cost(self) -> float:
        """`epsilon` as a number."""
        return math.inf if self.epsilon is None else self.epsilon

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()

    @staticmethod
    def parse(line: bytes) -> Entry:
        """One line of the file. Raises `ValueError` or `TypeError` when it is none, or holds what no entry can hold."""
        entry = Entry(**json.loads(line))
        numbers = (entry.noise_multiplier, entry.sample_rate, entry.delta, entry.cost)
        texts = (entry.time, entry.run, entry.kind, entry.unit, entry.data, entry.previous)
        if not all(isinstance(text, str) for text in texts) or type(entry.steps) is not int:
            raise ValueError("a field has the wrong type")
        if (
            any(not number >= 0 for number in numbers)
            or entry.sample_rate > 1
            or not 0 < entry.delta < 1
            or entry.steps < 1
        ):
            raise ValueError("a number is out of range")
        return entry


class Ledger:
    """The ledger at `path`. Makes no file before the first entry."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        """Whether an entry was ever written: the head alone is what a deleted ledger leaves."""
        return self.path.is_file() or self._head_path.is_file()

    # --- what it says ------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All entries, checked. Raises `DataError` when a line was changed, or lines are missing, at the end too."""
        count, last = (
            self._head()
        )  # first: a writer beside us makes the ledger longer than the head, never shorter
        found: list[Entry] = []
        for number, line in enumerate(
            self._read().split(b"\n")[:-1], 1
        ):  # what has no line end was never finished
            try:
                entry = Entry.parse(line)
            except (ValueError, TypeError):
                raise DataError(
                    f"{self.path.name}, line {number}: not an entry of a privacy ledger; {MEND}"
                ) from None
            if entry.previous != (found[-1].hash if found else ""):
                raise DataError(
                    f"{self.path.name}, line {number}: does not follow from the line before; {MEND}"
                )
            found.append(entry)
        if len(found) < count:
            raise DataError(
                f"{self.path.name} ends after {len(found)} entries, but has had {count}: an older copy? {MEND}"
            )
        if count and found[count - 1].hash != last:
            raise DataError(
                f"{self.path.name}, line {count}: is not the entry that was written there; {MEND}"
            )
        return found

    def mechanisms(self) -> list[Mechanism]:
        """What all entries released, in order."""
        return [entry.mechanism for entry in self.entries()]

    def epsilon(self, delta: float) -> float:
        """ε at `delta` of all entries; never less than an entry has said before."""
        return _epsilon(self.entries(), delta)

    # --- what is entered ---------------------------------------------------------------------------

    def reserve(
        self,
        step: Mechanism,
        steps: int,
        *,
        run: str,
        kind: str,
        unit: str,
        delta: float,
        data: str,
        max_epsilon: float = 0.0,
    ) -> int:
        """Enter `steps` steps like `step`, or as many as `max_epsilon` (0: no limit) allows, and return how many.

        They are on the disk when this returns. Raises `DataError` for a damaged ledger, `StorageError` where none can be written,
        `ConfigError` where earlier entries count another unit.
        """
        pool = JointLedger([self])
        return pool.reserve(
            step,
            steps,
            run=run,
            kind=kind,
            unit=unit,
            delta=delta,
            data=data,
            max_epsilon=max_epsilon,
        )

    def check_unit(self, unit: str) -> None:
        """Raise `ConfigError` where entries count another unit: what hides an image does not hide a patient with many of them."""
        if others := sorted({entry.unit for entry in self.entries()} - {unit}):
            raise ConfigError(
                f"{self.path.name} counts what was released for each {others[0]}, and this run would count it for each "
                f"{unit}: the two have no common epsilon; set privacy.unit = '{others[0]}', as in the shard's earlier runs"
            )

    def _allowed(self, step: Mechanism, steps: int, delta: float, max_epsilon: float) -> int:
        if not max_epsilon:
            return max(0, steps)
        entries = self.entries()
        if _said(entries, delta) > max_epsilon:
            return 0
        return steps_within(max_epsilon, delta, [entry.mechanism for entry in entries], step, steps)

    def _enter(self, new: Entry) -> None:
        """Append `new`, whose place in the chain and `epsilon` follow from what is there. For who holds the lock."""
        entries = self.entries()
        new = dataclasses.replace(new, epsilon=0.0, previous=entries[-1].hash if entries else "")
        epsilon = _epsilon([*entries, new], new.delta)
        entry = dataclasses.replace(new, epsilon=epsilon if math.isfinite(epsilon) else None)
        try:
            self._append(entry)
        except OSError as error:
            raise self._unwritable(error) from error
        self._write_head(len(entries) + 1, entry.hash)

    def _append(self, entry: Entry) -> None:
        line = json.dumps(vars(entry), allow_nan=False).encode() + b"\n"
        data = self._read()
        whole = data.rfind(b"\n") + 1
        with open(self.path, "r+b" if self.path.exists() else "wb") as stream:
            stream.seek(whole)
            stream.truncate()
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())  # the head, written next, flushes the folder

    # --- its files ---------------------------------------------------------------------------------

    @property
    def _head_path(self) -> Path:
        return self.path.with_name(self.path.name.removesuffix(".jsonl") + HEAD)

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error.strerror or error}") from error

    def _head(self) -> tuple[int, str]:
        """(number of entries, hash of the last of them) that there were at least."""
        try:
            head = json.loads(self._head_path.read_bytes())
            count, last = head["entries"], head["last"]
            if type(count) is not int or not isinstance(last, str):
                raise ValueError("wrong type")
        except FileNotFoundError:
            return 0, ""
        except OSError as error:
            raise StorageError(
                f"{self._head_path} cannot be read: {error.strerror or error}"
            ) from error
        except (ValueError, TypeError, KeyError):
            raise DataError(f"{self._head_path.name} is damaged; {MEND}") from None
        return count, last

    def _write_head(self, count: int, last: str) -> None:
        try:
            files.write_json(self._head_path, {"entries": count, "last": last})
        except StorageError as error:
            raise self._unwritable(
                error.__cause__ if isinstance(error.__cause__, OSError) else OSError(str(error))
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from this ledger: its own file is locked, which lies beside the ledger."""
        if fcntl is None:
            raise StorageError(
                "this system has no file locks (fcntl): train with privacy on Linux or macOS"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = open(self.path.with_suffix(".lock"), "a")  # noqa: SIM115 - closed below
        except OSError as error:
            raise self._unwritable(error) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _unwritable(self, error: OSError) -> StorageError:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            mend = "make the folder writable, or name a place for it (state-dir in the node-config of a deployed hospital)"
        else:
            mend = "free some space" if error.errno == errno.ENOSPC else "see to the disk"
        return StorageError(
            f"the privacy ledger {self.path} cannot be written ({error.strerror or error}), so no private step is done: {mend}"
        )


class JointLedger:
    """The ledgers of several shards that are trained on as one pool: what is released is entered in each of them."""

    def __init__(self, ledgers: Sequence[Ledger]) -> None:
        self.ledgers = list(
            {ledger.path.resolve(): ledger for ledger in ledgers}.values()
        )  # a lock taken twice waits for ever

    def epsilon(self, delta: float) -> float:
        """The largest ε at `delta` of any of the shards."""
        return max((ledger.epsilon(delta) for ledger in self.ledgers), default=0.0)

    def reserve(
        self,
        step: Mechanism,
        steps: int,
        *,
        run: str,
        kind: str,
        unit: str,
        delta: float,
        data: str,
        max_epsilon: float = 0.0,
    ) -> int:
        """Enter in each shard's ledger what all of them allow (see `Ledger.reserve`): all are asked before one is charged."""
        with contextlib.ExitStack() as locks:
            for ledger in sorted(
                self.ledgers, key=lambda ledger: str(ledger.path.resolve())
            ):  # always in the same order
                locks.enter_context(ledger.locked())
            for ledger in self.ledgers:
                ledger.check_unit(unit)
                steps = ledger._allowed(step, steps, delta, max_epsilon)
            if steps > 0:
                now, noise, rate = (
                    time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                    step.noise_multiplier,
                    step.sample_rate,
                )
                entry = Entry(
                    now,
                    run,
                    kind,
                    unit,
                    noise,
                    rate,
                    steps,
                    delta,
                    epsilon=None,
                    data=data,
                    previous="",
                )
                for ledger in self.ledgers:
                    ledger._enter(entry)
        return max(0, steps)


def _said(entries: Sequence[Entry], delta: float) -> float:
    """The most that an entry says; ε at a larger δ is a lower bound of that at `delta`."""
    return max((entry.cost for entry in entries if entry.delta >= delta), default=0.0)


def _epsilon(entries: Sequence[Entry], delta: float) -> float:
    return max(_said(entries, delta), epsilon_of([entry.mechanism for entry in entries], delta))
