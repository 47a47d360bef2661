"""Register of a hospital's ledgers: the key of their chains, and which units each of them knows.

It lies outside the shards, in `$FEDGAN_LEDGERS` (default ~/.local/state/fedgan/ledgers; a relative
path counts from the folder of the shard), for one hospital on one machine:

    key             256 random bits, readable by the owner only
    ID.json         path of a ledger, its number of entries and the hash of the last
    ID.units        keyed hashes of the units and images that it was charged for

A private training is charged to the ledger of its shard and to every ledger that knows one of its
patients or images: a copy, another import, a subset or a new partition of known images continues
their account. Refused are a fresh ledger in the place of a registered one, a ledger older than its
record, and images whose ledger is gone. Hashes are keyed: the register tells nobody which patients
it knows. Not seen: what another machine trained, and a register that was deleted with its ledgers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedgan import files
from fedgan.config import Settings
from fedgan.data.dataset import ImageDataset, unit_names
from fedgan.data.federation import Hospital
from fedgan.data.shard_files import is_phantom_source
from fedgan.errors import ConfigError, DataError, StorageError
from fedgan.privacy.ledger import HEAD, NAME, JointLedger, Ledger

FOLDER = "ledger"  # of a shard
VARIABLE = "FEDGAN_LEDGERS"
DEFAULT = "~/.local/state/fedgan/ledgers"
KEY_BYTES = 32
DIGITS = 24  # of a keyed hash, hexadecimal
BLOCK = 256  # images hashed at once
WAIT_SECONDS = 600.0  # for another process that makes an entry
LOST = "put back the newest copy of that folder, or restore FEDGAN_LEDGERS"


@dataclass(frozen=True)
class Record:
    """What the register holds of one ledger."""

    id: str
    path: Path
    entries: int
    last: str


class Register:
    """The register in `folder`. Files are written with the first entry of a ledger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, shard: Path) -> Register:
        """The register of the hospital that has this shard."""
        try:
            place = Path(os.environ.get(VARIABLE) or DEFAULT).expanduser()
        except RuntimeError:
            raise ConfigError(
                "this user has no home folder for the register of privacy ledgers: name a folder "
                f"in {VARIABLE}"
            ) from None
        return cls(shard.resolve().parent / place)

    @property
    def key(self) -> bytes:
        """The key of the chains; made where there is none. Raises `StorageError`, `DataError`."""
        path = self.folder / "key"
        try:
            if not path.exists():
                self._make_key(path)
            found = path.read_bytes()
        except OSError as error:
            raise StorageError(
                f"the register of privacy ledgers {self.folder} cannot be used "
                f"({error.strerror or error}): name a writable folder in {VARIABLE}"
            ) from error
        if len(found) != KEY_BYTES:
            raise DataError(f"{path} is damaged: {LOST}")
        return found

    @staticmethod
    def _make_key(path: Path) -> None:
        """Write a key, unless another process does so at the same time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f".key-{os.getpid()}")
        files.write_bytes(own, secrets.token_bytes(KEY_BYTES), private=True)
        with contextlib.suppress(FileExistsError):
            os.link(own, path)
        own.unlink()

    # --- ledgers ----------------------------------------------------------------------------------

    def path_of(self, shard: Path) -> Path:
        """The ledger of a shard: inside it, or in the register where the shard is read-only."""
        inside = shard / FOLDER
        if os.access(inside if inside.is_dir() else shard, os.W_OK):
            return inside / NAME
        name = hashlib.sha256(str(shard.resolve()).encode()).hexdigest()[:DIGITS]
        return self.folder / name / NAME

    def ledger(self, shard: Path) -> Ledger:
        """The ledger of a shard with the key of its chain."""
        return Ledger(self.path_of(shard), self.key)

    def open(
        self, shards: Sequence[Path], datasets: Sequence[ImageDataset], part: str = ""
    ) -> JointLedger:
        """All ledgers that a training on `datasets`, of `shards`, is charged to.

        `part`: the hospital, where a run made it of some units. Nothing is entered. They are looked
        up again before each entry, one process at a time: a training that began at the same time on
        a copy is charged too. Raises `DataError` for a ledger that is gone, cut, replaced or
        rewritten, `StorageError`.
        """
        for shard in shards:
            check_no_earlier_ledger(shard)
            self.check_key(self.path_of(shard))
        units = set().union(*map(self._units, datasets))
        return JointLedger(
            self._related(shards, units),
            part,
            refresh=lambda: self._related(shards, units),
            guard=lambda: files.locked(self.folder / "in-use", WAIT_SECONDS),
            on_entry=lambda ledgers: self._write(ledgers, units),
        )

    def check_key(self, ledger: Path) -> None:
        """Raise `DataError` where there is a ledger, and no key to verify it."""
        if ledger.exists() and not (self.folder / "key").is_file():
            raise DataError(
                f"{ledger} cannot be verified here: the key of this hospital's register is "
                f"missing; name its folder in {VARIABLE}"
            )

    def _related(self, shards: Sequence[Path], units: set[str]) -> list[Ledger]:
        """The ledgers of `shards`, and all that know one of `units`, verified."""
        key = self.key
        own = [self.ledger(shard) for shard in shards]
        records = {record.path: record for record in self.records()}
        for ledger in own:
            here = ledger.path.resolve()
            if here not in records and (moved := _moved(ledger, records)):
                del records[moved.path]
                records[here] = dataclasses.replace(moved, path=here)
        places = {ledger.path.resolve(): ledger for ledger in own}
        for path, record in records.items():
            if path in places or not units.isdisjoint(self.known(record)):
                _check(places.setdefault(path, Ledger(path, key)), record)
        return list(places.values())

    # --- records ----------------------------------------------------------------------------------

    def records(self) -> list[Record]:
        """All records, by file name. Raises `DataError` for a damaged one."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                content = files.parse_json(path.read_bytes())
                entries, last = content["entries"], content["last"]
                if type(entries) is not int or entries < 1 or not isinstance(last, str):
                    raise ValueError("wrong type")
                found.append(Record(path.stem, Path(str(content["path"])), entries, last))
            except (OSError, ValueError, TypeError, KeyError):
                raise DataError(f"{path} is damaged: {LOST}") from None
        return found

    def known(self, record: Record) -> set[str]:
        """Keyed hashes of the units and images that a ledger was charged for."""
        try:
            return set((self.folder / f"{record.id}.units").read_text().split())
        except (OSError, ValueError):
            raise DataError(f"{self.folder / record.id}.units cannot be read: {LOST}") from None

    def _write(self, ledgers: Sequence[Ledger], units: set[str]) -> None:
        """Record the newest entry of each of `ledgers`, and that it knows `units`."""
        by_path = {record.path: record for record in self.records()}
        for ledger in ledgers:
            if not ledger.key:  # of phantoms
                continue
            here, entries = ledger.path.resolve(), ledger.entries()
            record = by_path.get(here) or _moved(ledger, by_path)
            name = record.id if record else secrets.token_hex(DIGITS // 2)
            known = self.known(record) if record else set()
            if not units <= known:
                files.write_text(
                    self.folder / f"{name}.units", "\n".join(sorted(known | units)) + "\n"
                )
            last = entries[-1].hash(ledger.key)
            content = {"path": str(here), "entries": len(entries), "last": last}
            files.write_json(self.folder / f"{name}.json", content)

    def _units(self, dataset: ImageDataset) -> set[str]:
        """Keyed hashes of the patients and of the images of a training set."""
        key, rows = self.key, np.arange(len(dataset))
        names = set(unit_names(dataset).tolist())
        found = {_keyed(key, b"patient\0" + name.encode()) for name in names}
        for start in range(0, len(rows), BLOCK):
            for image in dataset.images[rows[start : start + BLOCK]]:
                digest = hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()
                found.add(_keyed(key, b"image\0" + digest))
        return found


def ledger_of(settings: Settings, hospitals: Sequence[Hospital]) -> JointLedger:
    """All ledgers that a training on the training images of `hospitals` is charged to.

    None without privacy. Phantoms are nobody's: their shard's ledger has no key and no register.
    Raises what `Register.open` raises.
    """
    if not settings.privacy.on:
        return JointLedger([])
    is_part = len(hospitals) == 1 and hospitals[0].repartitioned is not None
    part = hospitals[0].name if is_part else ""
    real = [hospital for hospital in hospitals if not hospital.phantoms]
    plain = [
        Ledger(shard / FOLDER / NAME)
        for hospital in hospitals
        if hospital.phantoms
        for shard in hospital.shards
    ]
    if not real:
        return JointLedger(plain, part)
    shards = list(dict.fromkeys(shard for hospital in real for shard in hospital.shards))
    known = Register.of(shards[0]).open(shards, [hospital.train for hospital in real], part)
    known.ledgers += plain
    return known


def check_no_earlier_ledger(folder: Path) -> None:
    """Raise `DataError` for a ledger of an earlier version in `folder`: a shard or a state-dir."""
    old = folder / NAME
    if old.exists() or old.with_name(f"{old.stem}{HEAD}").exists():
        raise DataError(
            f"{old} is a ledger of an earlier version, whose costs this one cannot count: move it "
            "away only where its runs may be forgotten"
        )


def existing_ledger(shard: Path) -> Ledger:
    """The ledger of a shard to read it, with the key of its chain; it may have no entry."""
    return ledger_at(Register.of(shard).path_of(shard))


def ledger_at(path: Path) -> Ledger:
    """The ledger at `path` with the key of its chain; none for phantoms and for hospitals as units.

    Raises `DataError` where this machine has no key for it.
    """
    register = _register_of(path)
    if register is None:
        return Ledger(path)
    register.check_key(path)
    return Ledger(path, register.key if path.exists() else b"")


def related_ledgers(ledger: Ledger) -> list[Ledger]:
    """The other ledgers that know a patient or an image of `ledger`, as far as they exist."""
    register = _register_of(ledger.path)
    records = register.records() if register else []
    own = [record for record in records if record.path == ledger.path.resolve()]
    if register is None or not own:
        return []
    units = register.known(own[0])
    return [
        Ledger(record.path, ledger.key)
        for record in records
        if record != own[0]
        and record.path.exists()
        and not units.isdisjoint(register.known(record))
    ]


def _register_of(ledger: Path) -> Register | None:
    """The register of a ledger; None for phantoms and for hospitals as units."""
    folder = ledger.absolute().parent.parent
    if (folder / "key").is_file():  # of a read-only shard, in the register
        return Register(folder)
    is_plain = ledger.absolute().parent.name != FOLDER or _has_phantoms(folder)
    return None if is_plain else Register.of(folder)


def _has_phantoms(shard: Path) -> bool:
    try:
        return is_phantom_source(files.parse_json((shard / "card.json").read_bytes())["source"])
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _keyed(key: bytes, text: bytes) -> str:
    return hmac.new(key, text, "sha256").hexdigest()[:DIGITS]


def _moved(ledger: Ledger, records: Mapping[Path, Record]) -> Record | None:
    """The record of `ledger` at a path that is gone: its folder was moved here."""
    entries = ledger.entries()
    for path, record in records.items():
        count = record.entries
        is_same = len(entries) >= count and entries[count - 1].hash(ledger.key) == record.last
        if is_same and not path.exists():
            return record
    return None


def _check(ledger: Ledger, record: Record) -> None:
    """Raise `DataError` where `ledger` is gone, or is not the one of its record."""
    if not ledger.path.exists():
        raise DataError(
            f"images of this training are charged to the privacy ledger {ledger.path}, which is "
            f"gone, so their cost is unknown: {LOST}"
        )
    entries = ledger.entries()
    if len(entries) < record.entries or entries[record.entries - 1].hash(ledger.key) != record.last:
        raise DataError(
            f"{ledger.path} is not the ledger with {record.entries} entries that the register "
            f"knows: an older copy, or another one in its place; {LOST}"
        )
