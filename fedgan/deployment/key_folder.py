"""The key folder of one federation, as `fedgan keys` makes and changes it.

    ca/ca.key  ca.crt                          the authority; ca.key may be kept elsewhere
    server/server.key  server.crt  ca.crt      for the SuperLink
    server/proxy.pem                           for the proxy: server.crt and server.key in one file
    hospitals/NAME/node.key  node.pub  ca.crt  what a hospital receives; no node.key where it made
                                               its own
    register/hospitals.json                    the registration list (`registrations.py`)
    register/NAME-….pub                        every public key that is or was on it

Private keys have mode 0600 and folders 0700 from the first byte on. A new folder is made beside its
final path and renamed when complete. Before existing files change, all new contents are on disk.
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

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedgan import files
from fedgan.deployment import certificates, node_keys, registrations
from fedgan.deployment.registrations import Registration
from fedgan.errors import ConfigError, StorageError


@dataclass(frozen=True)
class KeyFolder:
    """An existing key folder."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> KeyFolder:
        """Open the key folder at `path`. Raises `ConfigError` if there is none."""
        if not cls(path).registration_list.is_file():
            raise ConfigError(
                f"no key folder at {path}: make one with fedgan keys NAME … --output {path}"
            )
        return cls(path)

    @classmethod
    def create(
        cls, path: Path, names: Sequence[str], hosts: Sequence[str], days: int, moment: datetime
    ) -> KeyFolder:
        """Make an authority, a server certificate for `hosts` and `DEFAULT_HOSTS`, a key per name.

        A name may state a bound of training images: NAME=IMAGES. Raises `ConfigError` if `path` is
        not empty, or a name, bound or host is invalid.
        """
        bounds = [registrations.split_bound(name) for name in names]
        registrations.check_names([name for name, _ in bounds], ())
        certificates.check_hosts(hosts)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(
                f"{path} exists and is not a key folder: choose another with --output"
            )
        with _stage(path.resolve().parent, f".{path.name}.", path) as stage:
            folder = cls(stage)
            folder._write_authority_and_server([*certificates.DEFAULT_HOSTS, *hosts], days, moment)
            folder._folder("hospitals")
            folder._folder("register")
            rows = [
                _write_hospital(folder.hospital(name), name, images, folder.authority, moment)
                for name, images in bounds
            ]
            for row in rows:
                folder._copy_public_key(row)
            files.write_text(folder.registration_list, registrations.as_text(rows))
            os.rename(stage, path.resolve())
        return cls(path)

    @property
    def registration_list(self) -> Path:
        """The registration list."""
        return self.path / "register" / "hospitals.json"

    @property
    def authority(self) -> Path:
        """The authority's certificate, which is public."""
        return self.path / "ca.crt"

    @property
    def authority_key(self) -> Path:
        """The authority's private key."""
        return self.path / "ca" / "ca.key"

    @property
    def server_key(self) -> Path:
        """The private key of SuperLink and proxy."""
        return self.path / "server" / "server.key"

    @property
    def server_certificate(self) -> Path:
        """The certificate of SuperLink and proxy."""
        return self.path / "server" / "server.crt"

    @property
    def proxy_pem(self) -> Path:
        """Certificate and private key in one file, as HAProxy reads them."""
        return self.path / "server" / "proxy.pem"

    def hospital(self, name: str) -> Path:
        """The folder that a hospital receives."""
        return self.path / "hospitals" / name

    def registrations(self) -> tuple[Registration, ...]:
        """Every key ever made for a hospital, oldest first. Raises `ConfigError` if damaged."""
        return registrations.read(self.registration_list)

    def add(
        self, names: Sequence[str], moment: datetime, own_key: Path | None = None
    ) -> tuple[Registration, ...]:
        """Make a key for each of the new `names`. An error leaves the folder unchanged.

        `own_key`: file of the public key that the one new hospital has made itself.
        """
        bounds = [registrations.split_bound(name) for name in names]
        names = [name for name, _ in bounds]
        public = node_keys.read_own_public(own_key, names[0]) if own_key else None
        with self._locked():
            self._refuse_known(public)
            rows = self.registrations()
            self._folder("hospitals")
            existing = [path.name for path in (self.path / "hospitals").iterdir()]
            registrations.check_names(names, [*(row.name for row in rows), *existing])
            moved: list[Path] = []
            with _stage(self.path, ".new.", self.path / "hospitals") as stage:
                new = tuple(
                    _write_hospital(stage / name, name, images, self.authority, moment, public)
                    for name, images in bounds
                )
                try:
                    for name in names:
                        os.rename(stage / name, self.hospital(name))
                        moved.append(self.hospital(name))
                    for row in new:
                        self._copy_public_key(row)
                    files.write_text(self.registration_list, registrations.as_text([*rows, *new]))
                except BaseException:
                    for folder in moved:
                        shutil.rmtree(folder, ignore_errors=True)
                    for row in new:
                        (self.path / row.public_key).unlink(missing_ok=True)
                    raise
        return new

    def rotate_hospital(
        self, name: str, moment: datetime, own_key: Path | None = None
    ) -> tuple[Registration, Registration]:
        """Make a new key for a hospital and revoke its old one; returns (old row, new row).

        This also re-admits a revoked hospital. NAME=IMAGES changes its bound of training images.
        `own_key`: as for `add`.
        """
        name, images = registrations.split_bound(name)
        public = node_keys.read_own_public(own_key, name) if own_key else None
        with self._locked():
            self._refuse_known(public)
            rows = list(self.registrations())
            index = registrations.newest(rows, name)
            private, public = (None, public) if public else node_keys.new_node_key(name)
            new = _registration(name, public, moment, images or rows[index].images)
            rows[index] = old = replace(
                rows[index], revoked=rows[index].revoked or moment.isoformat()
            )
            key = self.hospital(name) / "node.key"
            _replace_together(
                (self.path / new.public_key, public, False),
                *([(key, private, True)] if private else []),
                (self.hospital(name) / "node.pub", public, False),
                (self.registration_list, registrations.as_text([*rows, new]).encode(), False),
            )
            if not private:
                key.unlink(missing_ok=True)  # revoked
        return old, new

    def rotate_server(self, hosts: Sequence[str], days: int, moment: datetime) -> None:
        """Make a new server key and certificate, for the old certificate's hosts and `hosts`."""
        certificates.check_hosts(hosts)
        with self._locked():
            if not self.authority_key.is_file():
                raise ConfigError(
                    f"{self.authority_key} is missing: it signs certificates, restore it"
                )
            signing, authority = (
                certificates.read_key(self.authority_key),
                certificates.read_certificate(self.authority),
            )
            if authority.public_key() != signing.public_key():
                raise ConfigError(
                    f"{self.authority_key} is not the key of {self.authority}: restore its key"
                )
            if certificates.days_left(authority, moment) < 0:
                raise ConfigError(
                    f"{self.authority} has expired: "
                    "make a new folder with fedgan keys NAME … --output DIR"
                )
            before = certificates.hosts_of(certificates.read_certificate(self.server_certificate))
            key, certificate = certificates.issue_server(
                signing, authority, [*certificates.DEFAULT_HOSTS, *before, *hosts], days, moment
            )
            _replace_together(*self._server_files(key, certificate))

    def revoke(self, name: str, moment: datetime) -> Registration:
        """Mark a hospital's key as revoked. Raises `ConfigError` if it has no active key."""
        with self._locked():
            rows = list(self.registrations())
            index = registrations.newest(rows, name)
            if rows[index].revoked:
                raise ConfigError(
                    f"the key of hospital '{name}' was already revoked on {rows[index].revoked}"
                )
            rows[index] = replace(rows[index], revoked=moment.isoformat())
            files.write_text(self.registration_list, registrations.as_text(rows))
        return rows[index]

    def _refuse_known(self, public: bytes | None) -> None:
        """Raise `ConfigError` for a hospital's own key that is or was on the list."""
        found = public and node_keys.fingerprint(public)
        for row in self.registrations():
            if row.fingerprint == found:
                raise ConfigError(
                    f"the key {found} is that of hospital '{row.name}'"
                    f"{' and revoked' if row.revoked else ''}: make a new one with ssh-keygen -t "
                    "ecdsa -b 384"
                )

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
        for path, data, private in self._server_files(key, certificate):
            files.write_bytes(path, data, private)
        files.write_bytes(self.path / "server" / "ca.crt", public)

    def _server_files(
        self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate
    ) -> list[tuple[Path, bytes, bool]]:
        """(path, content, is private) of the server's files that hold its key or certificate."""
        secret, public = certificates.key_bytes(key), certificates.certificate_bytes(certificate)
        return [
            (self.server_key, secret, True),
            (self.server_certificate, public, False),
            (self.proxy_pem, public + secret, True),
        ]

    def _copy_public_key(self, row: Registration) -> None:
        """Copy a new hospital's public key beside the registration list."""
        line = node_keys.read_public(self.hospital(row.name) / "node.pub")
        files.write_bytes(self.path / row.public_key, line)

    def _folder(self, name: str) -> None:
        try:
            (self.path / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise files.storage_error(self.path / name, error) from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Allow one change of a folder at a time. The lock ends with the process."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another fedgan keys is changing {self.path}: try again when it has finished"
            ) from None
        else:
            yield
        finally:
            os.close(handle)


def _write_hospital(
    folder: Path,
    name: str,
    images: int | None,
    authority: Path,
    moment: datetime,
    public: bytes | None = None,
) -> Registration:
    """Make the folder that a hospital receives, without a private key where it has `public`."""
    folder.mkdir(mode=0o700)
    if public is None:
        private, public = node_keys.new_node_key(name)
        files.write_bytes(folder / "node.key", private, private=True)
    files.write_bytes(folder / "node.pub", public)
    files.write_bytes(
        folder / "ca.crt", certificates.certificate_bytes(certificates.read_certificate(authority))
    )
    return _registration(name, public, moment, images)


def _registration(name: str, public: bytes, moment: datetime, images: int | None) -> Registration:
    """The row of a new key, whose file keeps its name for ever."""
    shown = node_keys.fingerprint(public)
    short = re.sub(r"[^A-Za-z0-9]", "", shown.removeprefix("SHA256:"))[:12]
    path = f"register/{name}-{short}.pub"
    return Registration(name, path, shown, moment.isoformat(), images=images)


@contextlib.contextmanager
def _stage(parent: Path, prefix: str, shown: Path) -> Iterator[Path]:
    """A private temporary folder in `parent`. Errors name `shown` in its place."""
    stage = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=parent, prefix=prefix, suffix=".part"))  # mode 0700
        yield stage
    except OSError as error:
        raise files.storage_error(shown, error) from error
    except StorageError as error:
        raise StorageError(str(error).replace(str(stage), str(shown))) from error
    finally:
        if stage:
            shutil.rmtree(stage, ignore_errors=True)


def _replace_together(*contents: tuple[Path, bytes, bool]) -> None:
    """Write all (path, content, is private), then rename all: a full disk changes none of them."""
    with contextlib.ExitStack() as stack:
        for path, data, private in reversed(contents):  # an ExitStack closes in reverse order
            stack.enter_context(files.atomic_path(path, private)).write_bytes(data)
