"""Find problems in a key folder, or in the part of it that a hospital received."""

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

WARNING_DAYS = 30  # warn of a certificate that expires within
NEW_FOLDER = (
    "make a new folder with fedgan keys NAME … --output DIR, and give every hospital its part"
)


@dataclass(frozen=True)
class Problem:
    """A problem; a `grave` one stops a hospital or the server, or exposes a key."""

    grave: bool
    found: str
    fix: str


@dataclass(frozen=True)
class Inspection:
    """Summary of a folder in one line, and its problems."""

    found: str
    problems: tuple[Problem, ...]


def has_keys(folder: Path) -> bool:
    """Whether `folder` is a key folder, or a hospital's part of one."""
    return KeyFolder(folder).registration_list.is_file() or (folder / "node.key").is_file()


def inspect(folder: Path, moment: datetime) -> Inspection:
    """Check every certificate, key, mode and row in `folder`. Raises `ConfigError` without keys."""
    if not has_keys(folder):
        raise ConfigError(
            f"no key folder at {folder}: make one with fedgan keys NAME … --output {folder}"
        )
    if (folder / "node.key").is_file():
        return _inspect_hospital_part(folder, moment)
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


def _inspect_hospital_part(folder: Path, moment: datetime) -> Inspection:
    problems = list(_loose_modes(folder))
    try:
        line = node_keys.read_private(folder / "node.key")
        summary = f"a hospital's key {node_keys.fingerprint(line)}"
        if node_keys.fingerprint(
            node_keys.read_public(folder / "node.pub")
        ) != node_keys.fingerprint(line):
            problems.append(
                Problem(
                    True,
                    "node.pub is not the public key of node.key",
                    "request both again from the operator",
                )
            )
    except ConfigError as error:
        summary = "a hospital's part"
        problems.append(Problem(True, str(error), "request it again from the operator"))
    problems += _certificate(folder / "ca.crt", moment, "request the new ca.crt from the operator")
    return Inspection(
        f"{summary}; {_ending(folder / 'ca.crt', 'authority', moment)}", tuple(problems)
    )


def _loose_modes(folder: Path) -> Iterator[Problem]:
    """Private keys that others can read, and folders in which others can replace them."""
    if os.name != "posix":
        return
    for path in sorted([folder, *folder.rglob("*")]):
        mode = path.stat().st_mode & 0o777
        shown = path.relative_to(folder) if path != folder else folder
        if path.suffix in (".key", ".pem") and mode & 0o077:
            fix = f"chmod 600 {path}; make a new key if somebody may have read it"
            yield Problem(True, f"{shown} has mode {mode:04o}: others can use this key", fix)
        elif path.is_dir() and mode & 0o022:
            yield Problem(
                True,
                f"{shown} has mode {mode:04o}: others can replace its files",
                f"chmod 700 {path}",
            )


def _authority(keys: KeyFolder, moment: datetime) -> Iterator[Problem]:
    yield from _certificate(keys.authority, moment, NEW_FOLDER)
    if keys.authority_key.is_file():  # may be kept elsewhere
        yield from _pair(
            keys.authority_key,
            keys.authority,
            "hospitals would trust no certificate that it signs",
            "restore both from one backup",
        )


def _server(keys: KeyFolder, moment: datetime) -> Iterator[Problem]:
    fix = "fedgan keys rotate server, then restart SuperLink and proxy"
    yield from _certificate(keys.server_certificate, moment, fix)
    yield from _pair(keys.server_key, keys.server_certificate, "the server cannot start", fix)
    yield from _same_authority(keys, keys.path / "server" / "ca.crt")
    server, authority = _read(keys.server_certificate), _read(keys.authority)
    if server and authority and not certificates.is_issued_by(server, authority):
        yield Problem(
            True, "server/server.crt is not signed by ca.crt: no hospital will connect", fix
        )
    try:
        parts = [path.read_bytes() for path in (keys.server_certificate, keys.server_key)]
        is_same = keys.proxy_pem.read_bytes() == b"".join(parts)
    except OSError:
        is_same = False
    if not is_same:
        found = (
            "server/proxy.pem is missing or not server.crt and server.key: the proxy cannot start"
        )
        yield Problem(True, found, fix)


def _hospitals(keys: KeyFolder) -> Iterator[Problem]:
    try:
        rows = {row.name: row for row in keys.registrations()}  # the newest row per hospital
    except ConfigError as error:
        yield Problem(True, str(error), "")
        return
    for name, row in rows.items():
        if row.revoked:
            continue
        folder, fix = keys.hospital(name), f"fedgan keys rotate {name}"
        yield from _same_authority(keys, folder / "ca.crt")
        try:
            lines = [node_keys.read_public(folder / "node.pub")]
            lines.append(node_keys.read_public(keys.path / row.public_key))
            if (folder / "node.key").is_file():  # the operator may delete its copy
                lines.append(node_keys.read_private(folder / "node.key"))
        except ConfigError as error:
            yield Problem(True, str(error), fix)
            continue
        if any(node_keys.fingerprint(line) != row.fingerprint for line in lines):
            yield Problem(
                True, f"the key in hospitals/{name} is not the one in hospitals.json", fix
            )
    for path in sorted((keys.path / "hospitals").glob("*")):
        if path.name not in rows:
            yield Problem(
                False,
                f"hospitals/{path.name} is not in hospitals.json",
                f"remove it and run fedgan keys {path.name}",
            )


def _certificate(path: Path, moment: datetime, fix: str) -> Iterator[Problem]:
    try:
        certificate = certificates.read_certificate(path)
    except ConfigError as error:
        yield Problem(True, str(error), fix)
        return
    left = certificates.days_left(certificate, moment)
    if left < 0:
        yield Problem(
            True,
            f"{path.name} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: no connections",
            fix,
        )
    elif left < WARNING_DAYS:
        yield Problem(False, f"{path.name} expires in {left} days", fix)
    if moment < certificate.not_valid_before_utc:
        begins = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        yield Problem(
            True,
            f"{path.name} is not valid before {begins}",
            "correct the clock of this machine: it is slow",
        )


def _pair(key: Path, certificate: Path, harm: str, fix: str) -> Iterator[Problem]:
    try:
        fits = (
            certificates.read_key(key).public_key()
            == certificates.read_certificate(certificate).public_key()
        )
    except ConfigError as error:
        yield Problem(True, str(error), fix)
        return
    if not fits:
        yield Problem(True, f"{key.name} is not the key of {certificate.name}: {harm}", fix)


def _same_authority(keys: KeyFolder, copy: Path) -> Iterator[Problem]:
    authority = _read(keys.authority)
    if authority and _read(copy) != authority:
        shown = copy.relative_to(keys.path)
        yield Problem(
            True,
            f"{shown} is missing or not a copy of ca.crt",
            f"copy ca.crt to {shown}, also at the hospital",
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
