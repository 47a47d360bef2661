"""Privacy ledger of one shard: its releases and their privacy cost; append-only, keyed chain.

One JSON line per entry, with the keyed hash (HMAC-SHA256) of the line before. An entry is on the
disk before its steps begin: a crash may cost privacy that was not used, but never uses what was not
counted. A line that a killed process left unfinished was never used, and the next entry cuts it
off. A restored checkpoint does not change the ledger, nor does a new import of the shard
(fedgan/data/shard.py keeps it). Images that were added or removed (another `data` hash) continue
the account: most patients are the same. Runs without privacy are not entered: nothing bounds what
they reveal.

A second file, the head, holds the minimum number of entries and the hash of the last of them. It is
written after each entry: a crash in between leaves it one entry behind, which is harmless. A ledger
shorter than its head was truncated or is an older copy, and is refused. The hospital's register
(fedgan/privacy/register.py) has the key and a second head: there a rewrite, and both files deleted
or replaced by older copies, are noticed.

Composition. Entries of one run at one hospital keep noise, sampling rate and δ of the first of
their kind: the mechanisms of a run are fixed in advance, so the accountant's numerical composition
holds for it, wherever the run stops. A limit over *several* runs, whose settings may
follow from what earlier ones released, is a filter by Rényi divergences of one order (Feldman and
Zrnic 2021, arXiv 2008.11193, theorem 4.3): they add up under full adaptivity. Where a run divides
a shard into hospitals, a unit is in one of these parts: of each run the costliest part counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import hmac
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedgan import files
from fedgan.errors import ConfigError, DataError, StorageError
from fedgan.privacy.accounting import (
    Mechanism,
    epsilon_of,
    epsilon_rdp,
    filtered_steps,
    steps_within,
)

try:
    import fcntl
except ModuleNotFoundError:  # Windows: the ledger can be read there
    fcntl = None  # type: ignore[assignment]

NAME = "privacy-ledger.jsonl"
HEAD = ".head.json"
FIX = (
    "put back the newest copy of both the ledger and its head file; "
    "lost entries cannot be recomputed"
)


@dataclass(frozen=True)
class Entry:
    """One line: a mechanism of a run, and `epsilon` at `delta` over all lines up to this one.

    `unit`: image or patient. `part`: the hospital that a run made of some units of the shard, or
    empty. `epsilon` None: infinite; over lines that concern units of this part.
    """

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
    part: str = ""

    @property
    def mechanism(self) -> Mechanism:
        return Mechanism(self.noise_multiplier, self.sample_rate, self.steps)

    @property
    def cost(self) -> float:
        """`epsilon` as a float."""
        return math.inf if self.epsilon is None else self.epsilon

    def hash(self, key: bytes) -> str:
        """The keyed hash of this line."""
        text = json.dumps(vars(self), sort_keys=True).encode()
        return hmac.new(key, text, hashlib.sha256).hexdigest()

    @staticmethod
    def parse(line: bytes) -> Entry:
        """Parse a line. Raises `ValueError` or `TypeError` for anything but a valid entry."""
        entry = Entry(**files.parse_json(line))
        numbers = (entry.noise_multiplier, entry.sample_rate, entry.delta, entry.cost)
        texts = [entry.time, entry.run, entry.kind, entry.unit, entry.data, entry.previous]
        texts.append(entry.part)
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
    """The ledger at `path`. The first entry creates its files.

    `key`: of the chain, the hospital's; empty for images that are nobody's.
    """

    def __init__(self, path: Path, key: bytes = b"") -> None:
        self.path, self.key = path, key

    def exists(self) -> bool:
        """Whether an entry was ever written; a deleted ledger leaves its head."""
        return self.path.is_file() or self._head_path.is_file()

    # --- reading ----------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All entries, verified. Raises `DataError` for changed or missing lines."""
        # The head first: a concurrent writer makes the ledger longer than the head, never shorter.
        count, last = self._head()
        found: list[Entry] = []
        lines = self._read().split(b"\n")[:-1]  # without an unfinished line
        for number, line in enumerate(lines, 1):
            try:
                entry = Entry.parse(line)
            except (ValueError, TypeError):
                raise DataError(
                    f"{self.path.name}, line {number}: not an entry of a privacy ledger; {FIX}"
                ) from None
            previous = found[-1].hash(self.key) if found else self._root
            if not hmac.compare_digest(entry.previous.encode(), previous.encode()):
                raise DataError(
                    f"{self.path.name}, line {number}: does not follow from "
                    + (
                        f"the line before; {FIX}"
                        if found
                        else "the key of this hospital's register: another hospital's ledger, or "
                        f"a lost register ({FIX})"
                    )
                )
            found.append(entry)
        if len(found) < count:
            raise DataError(
                f"{self.path.name} ends after {len(found)} entries, but had {count}: "
                f"an older copy? {FIX}"
            )
        if count and found[count - 1].hash(self.key) != last:
            raise DataError(
                f"{self.path.name}, line {count}: not the entry that was written; {FIX}"
            )
        return found

    def mechanisms(self) -> list[Mechanism]:
        """The mechanisms of all entries, in order."""
        return [entry.mechanism for entry in self.entries()]

    def epsilon(self, delta: float, run: str = "", part: str = "") -> float:
        """Spent ε at `delta` of a unit; never less than an entry states.

        Of every unit; with `part` of those that `run` put there.
        """
        return _epsilon(binding(self.entries(), run, part), delta)

    @property
    def _root(self) -> str:
        """`previous` of the first line."""
        return hmac.new(self.key, b"fedgan-ledger-2", hashlib.sha256).hexdigest()

    # --- writing ----------------------------------------------------------------------------------

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
        """Enter `steps` steps like `step`, or as many as `max_epsilon` (0: no limit) allows.

        Return how many; they are on the disk then. Raises `DataError` for a damaged ledger,
        `StorageError` where it cannot be written, `ConfigError` where earlier entries have another
        unit.
        """
        return JointLedger([self]).reserve(
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
        """Raise `ConfigError` where entries have another unit: image and patient do not compose."""
        if others := sorted({entry.unit for entry in self.entries()} - {unit}):
            raise ConfigError(
                f"{self.path.name} accounts per {others[0]}, this run per {unit}: the two have no "
                f"common epsilon; set privacy.unit = '{others[0]}', as in earlier runs of the shard"
            )

    def frozen(self, new: Entry) -> Entry:
        """`new` with the noise of the first entry of its run, kind and part.

        More noise is entered as that, which costs more: a release with more noise follows from one
        with less. Raises `ConfigError` for less noise, and for another sampling rate or δ.
        """
        own = (new.run, new.kind, new.part)
        for entry in self.entries():
            if (entry.run, entry.kind, entry.part) != own:
                continue
            for key in ("noise_multiplier", "sample_rate", "delta"):
                first, asked = getattr(entry, key), getattr(new, key)
                if asked < first or (asked > first and key != "noise_multiplier"):
                    raise ConfigError(
                        f"{self.path.name}: this run entered {key} = {first:g} and asks for "
                        f"{asked:g}: a run keeps those of its first entry; begin a new run"
                    )
            return dataclasses.replace(new, noise_multiplier=entry.noise_multiplier)
        return new

    def steps_left(
        self, step: Mechanism, steps: int, delta: float, max_epsilon: float, run: str, part: str
    ) -> int:
        """How many of `steps` steps of `run` fit into `max_epsilon` at `delta` (0: no limit)."""
        if not max_epsilon:
            return max(0, steps)
        entries = binding(self.entries(), run, part)
        if _stated_epsilon(entries, delta) > max_epsilon:
            return 0
        spent = [entry.mechanism for entry in entries]
        is_alone = all(entry.run == run for entry in entries)
        within = steps_within if is_alone else filtered_steps
        return within(max_epsilon, delta, spent, step, steps)

    def _enter(self, new: Entry) -> None:
        """Append `new` with its `previous` and `epsilon`. The caller holds the lock."""
        entries = self.entries()
        previous = entries[-1].hash(self.key) if entries else self._root
        new = dataclasses.replace(new, epsilon=0.0, previous=previous)
        epsilon = _epsilon(binding([*entries, new], new.run, new.part), new.delta)
        entry = dataclasses.replace(new, epsilon=epsilon if math.isfinite(epsilon) else None)
        try:
            self._append(entry)
        except OSError as error:
            raise self._unwritable(error) from error
        self._write_head(len(entries) + 1, entry.hash(self.key))

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

    # --- files ------------------------------------------------------------------------------------

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
        """(minimum number of entries, hash of the last of them)."""
        try:
            head = files.parse_json(self._head_path.read_bytes())
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
            raise DataError(f"{self._head_path.name} is damaged; {FIX}") from None
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
        """Lock the ledger against other processes, by a lock file beside it."""
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
            fix = "make the folder writable"
        else:
            fix = "free some space" if error.errno == errno.ENOSPC else "check the disk"
        return StorageError(
            f"the privacy ledger {self.path} cannot be written ({error.strerror or error}), "
            f"so no private step is taken: {fix}"
        )


class JointLedger:
    """All ledgers that know a unit of a training set: each gets every entry.

    `part`: the hospital, where the run made it of some units of its shards. `guard` is held during
    an entry; `refresh` finds ledgers that have come to know a unit since, and `on_entry` gets all
    that were charged.
    """

    def __init__(
        self,
        ledgers: Sequence[Ledger],
        part: str = "",
        *,
        refresh: Callable[[], Sequence[Ledger]] = list,
        guard: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        on_entry: Callable[[Sequence[Ledger]], None] = lambda ledgers: None,
    ) -> None:
        self.part, self._refresh, self._guard, self._on_entry = part, refresh, guard, on_entry
        self.ledgers: list[Ledger] = []
        self._add(ledgers)

    def _add(self, ledgers: Sequence[Ledger]) -> None:
        # Each path once: taking a lock twice would wait forever.
        paths = {ledger.path.resolve() for ledger in self.ledgers}
        for ledger in ledgers:
            if (path := ledger.path.resolve()) not in paths:
                paths.add(path)
                self.ledgers.append(ledger)

    def epsilon(self, delta: float, run: str = "") -> float:
        """The largest spent ε at `delta` of any ledger, of the units of this part in `run`."""
        return max((each.epsilon(delta, run, self.part) for each in self.ledgers), default=0.0)

    def check_unit(self, unit: str) -> None:
        """Raise `ConfigError` where an entry has another unit."""
        for ledger in self.ledgers:
            ledger.check_unit(unit)

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
        """Enter in all ledgers what each of them allows (see `Ledger.reserve`)."""
        with contextlib.ExitStack() as locks:
            locks.enter_context(self._guard())
            self._add(self._refresh())
            # Always in the same order, against deadlocks.
            for ledger in sorted(self.ledgers, key=lambda ledger: str(ledger.path.resolve())):
                locks.enter_context(ledger.locked())
            entry = Entry(
                time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                run=run,
                kind=kind,
                unit=unit,
                noise_multiplier=step.noise_multiplier,
                sample_rate=step.sample_rate,
                steps=steps,
                delta=delta,
                epsilon=None,
                data=data,
                previous="",
                part=self.part,
            )
            self.check_unit(unit)
            for ledger in self.ledgers:
                entry = ledger.frozen(entry)
                step = dataclasses.replace(step, noise_multiplier=entry.noise_multiplier)
                steps = ledger.steps_left(step, steps, delta, max_epsilon, run, self.part)
            if steps > 0:
                for ledger in self.ledgers:
                    ledger._enter(dataclasses.replace(entry, steps=steps))
                self._on_entry(self.ledgers)
        return max(0, steps)


def binding(entries: Sequence[Entry], run: str = "", part: str = "") -> list[Entry]:
    """The entries that concern one unit at worst: of each run the costliest part.

    The parts of a run hold different units. Of `run` the entries of `part`, where it is given.
    """
    found: list[Entry] = []
    for other in dict.fromkeys(entry.run for entry in entries):
        own = [entry for entry in entries if entry.run == other]
        parts = dict.fromkeys(entry.part for entry in own)
        if other == run and part:
            chosen = part
        else:

            def cost(name: str, own: list[Entry] = own) -> float:
                members = [entry for entry in own if entry.part == name]
                return epsilon_rdp([entry.mechanism for entry in members], members[0].delta)

            chosen = max(parts, key=cost) if len(parts) > 1 else next(iter(parts))
        # A run that trained on the whole shard too: those steps concern every unit.
        found += [entry for entry in own if entry.part in (chosen, "")]
    return found


def _stated_epsilon(entries: Sequence[Entry], delta: float) -> float:
    """The largest ε that entries state at δ ≥ `delta`: a lower bound of ε at `delta`."""
    return max((entry.cost for entry in entries if entry.delta >= delta), default=0.0)


def _epsilon(entries: Sequence[Entry], delta: float) -> float:
    return max(
        _stated_epsilon(entries, delta), epsilon_of([entry.mechanism for entry in entries], delta)
    )
