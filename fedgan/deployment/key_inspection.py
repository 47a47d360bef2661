"""What is wrong with a folder of keys, or with the part of it that a hospital was handed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509

from fedgan.deployment import certificates, node_keys
from fedgan.deployment.key_folder import KeyFolder
from fedgan.errors import ConfigError

SOON = 30  # days before its end that a certificate is warned of
NEW_FOLDER = (
    "make a new folder with fedgan keys NAME … --output DIR, and bring every hospital its part"
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; a `grave` one keeps a hospital or the server from working, or a key from being secret."""

    grave: bool
    found: str
    mend: str


@dataclass(frozen=True)
class Inspection:
    """What a folder holds, in one line, and what is wrong with it."""

    found: str
    problems: tuple[Problem, ...]


def is_there(folder: Path) -> bool:
    """Whether `folder` is a folder of keys, or the part of one that a hospital was handed."""
    return (folder / "hospitals.json").is_file() or (folder / "node.key").is_file()


def inspect(folder: Path, moment: datetime) -> Inspection:
    """Look at every certificate, key, mode and row below `folder`. Raises `ConfigError` where it holds no keys."""
    if not is_there(folder):
        raise ConfigError(
            f"no folder of keys at {folder}: make one with fedgan keys NAME … --output {folder}"
        )
    if (folder / "node.key").is_file():
        return _hospitals_part(folder, moment)
    keys = KeyFolder(folder)
    problems = [
        *_loose_modes(folder),
        *_authority(keys, moment),
        *_server(keys, moment),
        *_hospitals(keys),
    ]
    ends = [
        _ending(path, label, moment)
        for path, label in ((keys.authority, "authority"), (keys.server_certificate, "server"))
    ]
    return Inspection(f"{_active(keys)} hospitals; {', '.join(ends)}", tuple(problems))


def _hospitals_part(folder: Path, moment: datetime) -> Inspection:
    problems = list(_loose_modes(folder))
    try:
        line = node_keys.read_private(folder / "node.key")
        told = f"a hospital's key {node_keys.fingerprint(line)}"
        if node_keys.fingerprint(
            node_keys.read_public(folder / "node.pub")
        ) != node_keys.fingerprint(line):
            problems.append(
                Problem(
                    True,
                    "node.pub is not the public key of node.key",
                    "ask the operator for both anew",
                )
            )
    except ConfigError as error:
        told = "a hospital's part"
        problems.append(Problem(True, str(error), "ask the operator for it anew"))
    problems += _certificate(folder / "ca.crt", moment, "ask the operator for the new ca.crt")
    return Inspection(f"{told}; {_ending(folder / 'ca.crt', 'authority', moment)}", tuple(problems))


def _loose_modes(folder: Path) -> Iterator[Problem]:
    """Private keys that others may read, and folders in which others may change them."""
    if os.name != "posix":
        return
    for path in sorted([folder, *folder.rglob("*")]):
        mode = path.stat().st_mode & 0o777
        shown = path.relative_to(folder) if path != folder else folder
        if path.suffix == ".key" and mode & 0o077:
            mend = f"chmod 600 {path}; where somebody may have read it, make a new one, too"
            yield Problem(True, f"{shown} has mode {mode:04o}: others can use this key", mend)
        elif path.is_dir() and mode & 0o022:
            yield Problem(
                True,
                f"{shown} has mode {mode:04o}: others can replace what it holds",
                f"chmod 700 {path}",
            )


def _authority(keys: KeyFolder, moment: datetime) -> Iterator[Problem]:
    yield from _certificate(keys.authority, moment, NEW_FOLDER)
    if keys.authority_key.is_file():  # kept elsewhere it is safer
        yield from _pair(
            keys.authority_key,
            keys.authority,
            "it can sign no certificate that hospitals believe",
            "put both back from one copy",
        )


def _server(keys: KeyFolder, moment: datetime) -> Iterator[Problem]:
    anew = "fedgan keys rotate server, then restart SuperLink and filter"
    yield from _certificate(keys.server_certificate, moment, anew)
    yield from _pair(keys.server_key, keys.server_certificate, "the server cannot start", anew)
    yield from _same_authority(keys, keys.path / "server" / "ca.crt")
    server, authority = _read(keys.server_certificate), _read(keys.authority)
    if server and authority and not certificates.is_issued_by(server, authority):
        yield Problem(
            True, "server/server.crt is not signed by ca.crt: no hospital will connect", anew
        )


def _hospitals(keys: KeyFolder) -> Iterator[Problem]:
    try:
        rows = {row.name: row for row in keys.registrations()}  # the newest of each
    except ConfigError as error:
        yield Problem(True, str(error), "")
        return
    for name, row in rows.items():
        if row.revoked:
            continue
        place, anew = keys.hospital(name), f"fedgan keys rotate {name}"
        yield from _same_authority(keys, place / "ca.crt")
        try:
            lines = [node_keys.read_public(place / "node.pub")]
            if (place / "node.key").is_file():  # the hospital has it; the operator need not keep it
                lines.append(node_keys.read_private(place / "node.key"))
        except ConfigError as error:
            yield Problem(True, str(error), anew)
            continue
        if any(node_keys.fingerprint(line) != row.fingerprint for line in lines):
            yield Problem(
                True, f"the key in hospitals/{name} is not the one in hospitals.json", anew
            )
    for path in sorted((keys.path / "hospitals").glob("*")):
        if path.name not in rows:
            yield Problem(
                False,
                f"hospitals/{path.name} is not in hospitals.json",
                f"remove it and run fedgan keys {path.name}",
            )


def _certificate(path: Path, moment: datetime, mend: str) -> Iterator[Problem]:
    try:
        certificate = certificates.read_certificate(path)
    except ConfigError as error:
        yield Problem(True, str(error), mend)
        return
    left = certificates.days_left(certificate, moment)
    if left < 0:
        yield Problem(
            True,
            f"{path.name} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: no one can connect",
            mend,
        )
    elif left < SOON:
        yield Problem(False, f"{path.name} expires in {left} days", mend)
    if moment < certificate.not_valid_before_utc:
        begins = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        yield Problem(
            True,
            f"{path.name} is valid from {begins} on only",
            "set the clock of this machine: it is behind",
        )


def _pair(key: Path, certificate: Path, harm: str, mend: str) -> Iterator[Problem]:
    try:
        fits = (
            certificates.read_key(key).public_key()
            == certificates.read_certificate(certificate).public_key()
        )
    except ConfigError as error:
        yield Problem(True, str(error), mend)
        return
    if not fits:
        yield Problem(True, f"{key.name} is not the key of {certificate.name}: {harm}", mend)


def _same_authority(keys: KeyFolder, copy: Path) -> Iterator[Problem]:
    authority = _read(keys.authority)
    if authority and _read(copy) != authority:
        shown = copy.relative_to(keys.path)
        yield Problem(
            True,
            f"{shown} is missing or no copy of ca.crt",
            f"copy ca.crt to {shown}, at the hospital too",
        )


def _read(path: Path) -> x509.Certificate | None:
    try:
        return certificates.read_certificate(path)
    except ConfigError:
        return None


def _ending(path: Path, label: str, moment: datetime) -> str:
    certificate = _read(path)
    return (
        f"{label} {certificates.days_left(certificate, moment)} days left"
        if certificate
        else f"{label} unreadable"
    )


def _active(keys: KeyFolder) -> int:
    try:
        return sum(not row.revoked for row in keys.registrations())
    except ConfigError:
        return 0
