"""The folder of keys of one federation, as `fedgan keys` makes and changes it.

    ca/ca.key  ca.crt                          the authority; ca.key signs server certificates and may be kept elsewhere
    server/server.key  server.crt  ca.crt      for SuperLink and filter
    hospitals/NAME/node.key  node.pub  ca.crt  all that a hospital is handed
    hospitals.json                             every key that was ever made for a hospital, and when it was revoked
    revoked/NAME-….pub                         public keys that a newer one has replaced

Private keys have mode 0600 and folders 0700 from the first byte on. What is made anew is made beside its place and
moved there when whole; what is replaced is written in full before the first file changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from fedgan import files
from fedgan.deployment import certificates, node_keys, registrations
from fedgan.deployment.registrations import Registration
from fedgan.errors import ConfigError, StorageError


@dataclass(frozen=True)
class KeyFolder:
    """A folder of keys that is there."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> KeyFolder:
        """The folder at `path`. Raises `ConfigError` where there is none."""
        if not (path / "hospitals.json").is_file():
            raise ConfigError(
                f"no folder of keys at {path}: make one with fedgan keys NAME … --output {path}"
            )
        return cls(path)

    @classmethod
    def create(
        cls, path: Path, names: Sequence[str], hosts: Sequence[str], days: int, moment: datetime
    ) -> KeyFolder:
        """Make an authority, a server certificate for `hosts` beside the usual ones, and a key for each name.

        Raises `ConfigError` where `path` holds anything, or a name or host cannot be used. Nothing is left behind then.
        """
        registrations.check_names(names, ())
        certificates.check_hosts(hosts)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(
                f"{path} exists and is no folder of keys: choose another place with --output"
            )
        with _stage(path.resolve().parent, f".{path.name}.", path) as stage:
            folder = cls(stage)
            folder._write_authority_and_server([*certificates.LEAST_HOSTS, *hosts], days, moment)
            folder._folder("hospitals")
            rows = [
                _write_hospital(stage / "hospitals" / name, name, folder.authority, moment)
                for name in names
            ]
            files.write_text(folder.registration_list, registrations.as_text(rows))
            os.rename(stage, path.resolve())
        return cls(path)

    @property
    def registration_list(self) -> Path:
        """The registration list."""
        return self.path / "hospitals.json"

    @property
    def authority(self) -> Path:
        """The authority's certificate, which everybody may see."""
        return self.path / "ca.crt"

    @property
    def authority_key(self) -> Path:
        """The authority's private key."""
        return self.path / "ca" / "ca.key"

    @property
    def server_key(self) -> Path:
        """The private key of SuperLink and filter."""
        return self.path / "server" / "server.key"

    @property
    def server_certificate(self) -> Path:
        """The certificate of SuperLink and filter."""
        return self.path / "server" / "server.crt"

    def hospital(self, name: str) -> Path:
        """The folder that a hospital is handed."""
        return self.path / "hospitals" / name

    def registrations(self) -> tuple[Registration, ...]:
        """Every key that was ever made for a hospital, oldest first. Raises `ConfigError` where the list is damaged."""
        return registrations.read(self.registration_list)

    def add(self, names: Sequence[str], moment: datetime) -> tuple[Registration, ...]:
        """Make a key for each of `names`, which are new to this folder. Nothing is left behind on an error."""
        with self._locked():
            rows = self.registrations()
            self._folder("hospitals")
            there = [place.name for place in (self.path / "hospitals").iterdir()]
            registrations.check_names(names, [*(row.name for row in rows), *there])
            moved: list[Path] = []
            with _stage(self.path, ".new.", self.path / "hospitals") as stage:
                new = tuple(
                    _write_hospital(stage / name, name, self.authority, moment) for name in names
                )
                try:
                    for name in names:
                        os.rename(stage / name, self.hospital(name))
                        moved.append(self.hospital(name))
                    files.write_text(self.registration_list, registrations.as_text([*rows, *new]))
                except BaseException:
                    for place in moved:
                        shutil.rmtree(place, ignore_errors=True)
                    raise
        return new

    def rotate_hospital(self, name: str, moment: datetime) -> tuple[Registration, Registration]:
        """Give a hospital a new key and revoke the one it has: (old row, new row). A revoked hospital is so admitted again."""
        with self._locked():
            rows = list(self.registrations())
            index = registrations.newest(rows, name)
            old = rows[index]
            kept = f"revoked/{name}-{_short(old.fingerprint)}.pub"
            self._folder("revoked")
            files.write_bytes(self.path / kept, self._public_key_of(old, self.path / kept))
            private, public = node_keys.new_node_key(name)
            place = f"hospitals/{name}/node.pub"
            new = Registration(name, place, node_keys.fingerprint(public), moment.isoformat())
            rows[index] = old = replace(
                old, public_key=kept, revoked=old.revoked or moment.isoformat()
            )
            _replace_together(
                (self.hospital(name) / "node.key", private, True),
                (self.path / place, public, False),
                (self.registration_list, registrations.as_text([*rows, new]).encode(), False),
            )
        return old, new

    def rotate_server(self, hosts: Sequence[str], days: int, moment: datetime) -> None:
        """A new key and certificate for SuperLink and filter, for the hosts of the old one and `hosts`, by the same authority."""
        certificates.check_hosts(hosts)
        with self._locked():
            if not self.authority_key.is_file():
                raise ConfigError(
                    f"{self.authority_key} is not here: put it back for as long as this takes, it signs certificates"
                )
            signing, authority = (
                certificates.read_key(self.authority_key),
                certificates.read_certificate(self.authority),
            )
            if authority.public_key() != signing.public_key():
                raise ConfigError(
                    f"{self.authority_key} is not the key of {self.authority}: put back the one that is"
                )
            if certificates.days_left(authority, moment) < 0:
                raise ConfigError(
                    f"{self.authority} has expired: make a new folder with fedgan keys NAME … --output DIR"
                )
            before = certificates.hosts_of(certificates.read_certificate(self.server_certificate))
            key, certificate = certificates.issue_server(
                signing, authority, [*certificates.LEAST_HOSTS, *before, *hosts], days, moment
            )
            _replace_together(
                (self.server_key, certificates.key_bytes(key), True),
                (self.server_certificate, certificates.certificate_bytes(certificate), False),
            )

    def revoke(self, name: str, moment: datetime) -> Registration:
        """Mark a hospital's key as revoked. Raises `ConfigError` where it has none or it is revoked already."""
        with self._locked():
            rows = list(self.registrations())
            index = registrations.newest(rows, name)
            if rows[index].revoked:
                raise ConfigError(
                    f"the key of hospital '{name}' was revoked on {rows[index].revoked} already"
                )
            rows[index] = replace(rows[index], revoked=moment.isoformat())
            files.write_text(self.registration_list, registrations.as_text(rows))
        return rows[index]

    def _write_authority_and_server(
        self, hosts: Sequence[str], days: int, moment: datetime
    ) -> None:
        self._folder("ca")
        self._folder("server")
        signing, authority = certificates.new_authority(moment)
        key, certificate = certificates.issue_server(signing, authority, hosts, days, moment)
        public = certificates.certificate_bytes(authority)
        files.write_bytes(self.authority_key, certificates.key_bytes(signing), private=True)
        files.write_bytes(self.authority, public)
        files.write_bytes(self.server_key, certificates.key_bytes(key), private=True)
        files.write_bytes(self.server_certificate, certificates.certificate_bytes(certificate))
        files.write_bytes(self.path / "server" / "ca.crt", public)

    def _public_key_of(self, row: Registration, kept: Path) -> bytes:
        """The public key of a row, wherever it still lies: a rotation that was cut short has replaced node.pub already."""
        for read, place in (
            (node_keys.read_public, self.path / row.public_key),
            (node_keys.read_public, kept),
            (node_keys.read_private, self.hospital(row.name) / "node.key"),
        ):
            with contextlib.suppress(ConfigError):
                line = read(place)
                if node_keys.fingerprint(line) == row.fingerprint:
                    return line
        raise ConfigError(
            f"the public key {row.fingerprint} of hospital '{row.name}' is nowhere below {self.path}, and without it the server "
            f"cannot be told to refuse it: put the hospital's node.pub back as {row.public_key}"
        )

    def _folder(self, name: str) -> None:
        try:
            (self.path / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise files.storage_error(self.path / name, error) from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One change of a folder at a time. The lock is the system's: it ends with the process."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another fedgan keys is changing {self.path}: try again when it has ended"
            ) from None
        else:
            yield
        finally:
            os.close(handle)


def _write_hospital(folder: Path, name: str, authority: Path, moment: datetime) -> Registration:
    """Make the folder that a hospital is handed."""
    folder.mkdir(mode=0o700)
    private, public = node_keys.new_node_key(name)
    files.write_bytes(folder / "node.key", private, private=True)
    files.write_bytes(folder / "node.pub", public)
    files.write_bytes(
        folder / "ca.crt", certificates.certificate_bytes(certificates.read_certificate(authority))
    )
    return Registration(
        name, f"hospitals/{name}/node.pub", node_keys.fingerprint(public), moment.isoformat()
    )


@contextlib.contextmanager
def _stage(parent: Path, prefix: str, shown: Path) -> Iterator[Path]:
    """A private folder in `parent` that is gone afterwards, unless it was moved."""
    stage = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=parent, prefix=prefix, suffix=".part"))  # mode 0700
        yield stage
    except OSError as error:
        raise files.storage_error(shown, error) from error
    except StorageError as error:  # the user knows the place, not the folder beside it
        raise StorageError(str(error).replace(str(stage), str(shown))) from error
    finally:
        if stage:
            shutil.rmtree(stage, ignore_errors=True)


def _replace_together(*contents: tuple[Path, bytes, bool]) -> None:
    """Write (path, bytes, private) all in full, then rename them in this order: a full disk changes none of them."""
    with contextlib.ExitStack() as stack:
        for path, data, private in reversed(contents):  # the stack leaves the last first
            stack.enter_context(files.atomic_path(path, private)).write_bytes(data)


def _short(fingerprint: str) -> str:
    """A fingerprint as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]", "", fingerprint.removeprefix("SHA256:"))[:12]
