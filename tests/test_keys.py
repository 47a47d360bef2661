"""`fedgan keys`: files that TLS, HAProxy and Flower accept; secrecy; all-or-nothing writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import ssl
import stat
import subprocess
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedgan import files
from fedgan.cli import doctor
from fedgan.deployment import certificates, key_inspection, node_keys
from fedgan.deployment.key_folder import KeyFolder
from fedgan.errors import ConfigError, StorageError

NOW = certificates.now()
NAMES = ("hospital1", "hospital2")
Run = Callable[..., tuple[int, str, str]]


def make(path: Path, days: int = 365, ago: int = 0, hosts: tuple[str, ...] = ()) -> KeyFolder:
    """A key folder with two hospitals, made `ago` days ago."""
    return KeyFolder.create(path, NAMES, hosts, days, NOW - timedelta(days=ago))


@pytest.fixture
def keys(tmp_path: Path) -> KeyFolder:
    return make(tmp_path / "keys", hosts=("fl.example.org", "10.0.0.5"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, including hidden ones."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextlib.contextmanager
def failing_rename(monkeypatch: pytest.MonkeyPatch, last: str) -> Iterator[None]:
    """A disk on which renames to a path that ends with `last` fail."""
    original = os.replace

    def refuse(source: Path, target: Path) -> None:
        if str(target).endswith(last):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        yield


# --- files ---


def test_folder_has_all_files_for_server_and_hospitals(keys: KeyFolder) -> None:
    hospitals = {
        f"hospitals/{name}/{file}" for name in NAMES for file in ("node.key", "node.pub", "ca.crt")
    }
    server = {f"server/{file}" for file in ("server.key", "server.crt", "proxy.pem", "ca.crt")}
    assert (
        set(contents(keys.path))
        == {"ca/ca.key", "ca.crt", "register/hospitals.json"}
        | {row.public_key for row in keys.registrations()}
        | server
        | hospitals
    )
    rows = json.loads((keys.path / "register" / "hospitals.json").read_text())
    parts = [re.sub("[^A-Za-z0-9]", "", row["fingerprint"][7:])[:12] for row in rows]
    assert [set(row) for row in rows] == [
        {"name", "public_key", "fingerprint", "created", "revoked", "images"}
    ] * 2
    assert [(row["name"], row["public_key"], row["revoked"]) for row in rows] == [
        (name, f"register/{name}-{part}.pub", None) for name, part in zip(NAMES, parts, strict=True)
    ]


def test_private_keys_are_private_from_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, written, published = os.replace, {}, []

    def look(source: Path, target: Path) -> None:
        written[Path(target).name] = mode(Path(source))
        original(source, target)

    monkeypatch.setattr(os, "replace", look)
    monkeypatch.setattr(files, "publish", lambda path: published.append(Path(path).name))
    before = os.umask(0)
    try:
        keys = make(tmp_path / "keys")
        keys.add(["hospital3"], NOW)
        keys.rotate_hospital("hospital1", NOW)
        keys.rotate_server((), 365, NOW)
    finally:
        os.umask(before)
    private = {name: found for name, found in written.items() if name.endswith((".key", ".pem"))}
    expected = ("ca.key", "server.key", "proxy.pem", "node.key")
    assert private == dict.fromkeys(expected, 0o600)
    assert not any(".key" in name or ".pem" in name for name in published)
    assert {mode(path) for path in [keys.path, *keys.path.rglob("*")] if path.is_dir()} == {0o700}
    assert {mode(path) for path in keys.path.rglob("*.key")} | {mode(keys.proxy_pem)} == {0o600}


def test_flower_reads_the_keys_and_openssh_agrees_on_fingerprints(keys: KeyFolder) -> None:
    from flwr.cli.supernode.register import try_load_public_key

    folder = keys.hospital("hospital1")
    private = load_ssh_private_key((folder / "node.key").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(private.curve, ec.SECP384R1)
    assert load_ssh_public_key((folder / "node.pub").read_bytes()) == private.public_key()
    assert try_load_public_key(folder / "node.pub").startswith(b"-----BEGIN PUBLIC KEY-----")
    if shutil.which("ssh-keygen"):
        shown = subprocess.run(
            ["ssh-keygen", "-lf", folder / "node.pub"], capture_output=True, text=True, check=True
        ).stdout
        assert shown.split()[:3] == ["384", keys.registrations()[0].fingerprint, "hospital1"]


def test_all_keys_differ(keys: KeyFolder, tmp_path: Path) -> None:
    other = make(tmp_path / "other")
    private = [path.read_bytes() for folder in (keys, other) for path in folder.path.rglob("*.key")]
    assert len(set(private)) == len(private) == 8


# --- TLS ---


def handshake(keys: KeyFolder, host: str, authority: Path) -> None:
    """A TLS handshake of a hospital with the server of `keys`, with the strictest checks."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(keys.proxy_pem)
    client = ssl.create_default_context(cafile=str(authority))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(5):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    assert ends[0].version() in ("TLSv1.2", "TLSv1.3")


@pytest.mark.parametrize(
    "host", ["superlink", "proxy", "localhost", "127.0.0.1", "fl.example.org", "10.0.0.5"]
)
def test_hospital_connects_by_each_name_of_the_server(keys: KeyFolder, host: str) -> None:
    handshake(keys, host, keys.hospital("hospital1") / "ca.crt")


@pytest.mark.parametrize(
    ("host", "text"),
    [
        ("other.example.org", "Hostname mismatch"),
        ("10.0.0.6", "IP address mismatch"),
        ("example.org", "mismatch"),
    ],
)
def test_other_host_names_are_refused(keys: KeyFolder, host: str, text: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=text):
        handshake(keys, host, keys.authority)


def test_expired_certificate_is_refused_as_expired(tmp_path: Path) -> None:
    keys = make(tmp_path / "keys", days=30, ago=31)
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
        handshake(keys, "superlink", keys.authority)


def test_server_of_another_authority_is_refused_as_unknown(keys: KeyFolder, tmp_path: Path) -> None:
    with pytest.raises(
        ssl.SSLCertVerificationError, match="unable to get local issuer certificate"
    ):
        handshake(make(tmp_path / "other"), "superlink", keys.authority)


def test_certificates_can_sign_no_more_than_needed(
    keys: KeyFolder,
) -> None:
    server, authority = map(
        certificates.read_certificate, (keys.server_certificate, keys.authority)
    )
    assert server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert server.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False
    assert list(server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        x509.OID_SERVER_AUTH
    ]
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (
        True,
        True,
        0,
    )


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_openssl_verifies_the_server_certificate_strictly(keys: KeyFolder) -> None:
    command = [
        "openssl",
        "verify",
        "-x509_strict",
        "-purpose",
        "sslserver",
        "-verify_hostname",
        "proxy",
    ]
    found = subprocess.run(
        [*command, "-CAfile", keys.authority, keys.server_certificate],
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip().endswith("server.crt: OK"), found.stderr


def test_server_certificate_expires_with_its_authority(keys: KeyFolder) -> None:
    keys.rotate_server((), 3650, NOW + timedelta(days=10))
    server, authority = map(
        certificates.read_certificate, (keys.server_certificate, keys.authority)
    )
    assert server.not_valid_after_utc == authority.not_valid_after_utc


# --- all or nothing ---


@pytest.mark.parametrize(
    "last", ["ca/ca.key", "server/server.crt", "hospital2/node.key", "register/hospitals.json"]
)
def test_full_disk_leaves_nothing_of_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    with (
        failing_rename(monkeypatch, last),
        pytest.raises(StorageError, match=r"cannot write .*/keys/.*: the disk is full"),
    ):
        make(tmp_path / "keys")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("last", ["hospital4/node.pub", "register/hospitals.json"])
def test_full_disk_leaves_an_existing_folder_unchanged(
    keys: KeyFolder, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    before, folders = contents(keys.path), sorted(keys.path.rglob("*"))
    with failing_rename(monkeypatch, last), pytest.raises(StorageError, match="the disk is full"):
        keys.add(["hospital3", "hospital4"], NOW)
    assert contents(keys.path) == before
    assert sorted(keys.path.rglob("*")) == folders


def test_existing_files_are_not_overwritten(keys: KeyFolder, tmp_path: Path) -> None:
    before = contents(keys.path)
    with pytest.raises(ConfigError, match="choose another with --output"):
        make(keys.path)
    with pytest.raises(ConfigError, match="choose another with --output"):
        make(keys.authority)
    for name in ("hospital2", "HOSPITAL2"):
        with pytest.raises(
            ConfigError,
            match=f"'{name}' already has a key; for a new one: fedgan keys rotate",
        ):
            keys.add(["hospital3", name], NOW)
    assert contents(keys.path) == before


def test_added_hospital_changes_no_other_files(keys: KeyFolder) -> None:
    before = contents(keys.path)
    keys.authority_key.unlink()  # needed for certificates only
    keys.add(["hospital3"], NOW)
    after = contents(keys.path)
    assert {name for name in before if after.get(name) != before[name]} == {
        "register/hospitals.json",
        "ca/ca.key",
    }
    assert [row.name for row in keys.registrations()] == [*NAMES, "hospital3"]
    handshake(keys, "proxy", keys.hospital("hospital3") / "ca.crt")


def test_simultaneous_changes_are_refused(keys: KeyFolder) -> None:
    handle = os.open(keys.path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another fedgan keys is changing"):
            keys.revoke("hospital1", NOW)
    finally:
        os.close(handle)
    keys.revoke("hospital1", NOW)


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["../evil"],
        ["a/b"],
        [".."],
        [""],
        ["-x"],
        ["a b"],
        ["ä"],
        ["a\n"],
        ["x" * 64],
        ["server"],
        ["CA"],
        ["a", "A"],
    ],
)
def test_invalid_and_duplicate_names_are_refused(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(ConfigError):
        KeyFolder.create(tmp_path / "keys", names, (), 365, NOW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "host",
    [
        "https://fl.example.org",
        "fl.example.org:8443",
        "",
        "a..b",
        "1.2.3.400",
        "*.org",
        "fe80::1%eth0",
    ],
)
def test_invalid_hosts_are_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="without https:// and port"):
        make(tmp_path / "keys", hosts=(host,))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "{}x", "[1]", '[{"name": "a"}]', '[{"name": "..", "public_key": "a"}]']
)
def test_damaged_registration_list_is_named(keys: KeyFolder, text: str) -> None:
    keys.registration_list.write_text(text)
    with pytest.raises(ConfigError, match=r"hospitals\.json is damaged"):
        keys.registrations()


@pytest.mark.parametrize(
    ("field", "value"),
    [("public_key", "../../x"), ("public_key", "/etc/x"), ("name", "../x"), ("revoked", 3)],
)
def test_registration_list_with_paths_elsewhere_is_refused(
    keys: KeyFolder, field: str, value: object
) -> None:
    rows = json.loads(keys.registration_list.read_text())
    rows[0][field] = value
    keys.registration_list.write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match=r"hospitals\.json is damaged"):
        keys.registrations()


# --- rotate and revoke ---


def test_rotated_key_is_new_and_the_old_public_key_is_kept(keys: KeyFolder) -> None:
    before, old_row = contents(keys.path), keys.registrations()[0]
    old, new = keys.rotate_hospital("hospital1", NOW)
    after = contents(keys.path)
    assert (old.fingerprint, old.revoked) == (old_row.fingerprint, NOW.isoformat())
    assert after[old.public_key] == before["hospitals/hospital1/node.pub"]
    assert new.fingerprint == node_keys.fingerprint(after[new.public_key]) != old.fingerprint
    assert (
        node_keys.read_private(keys.hospital("hospital1") / "node.key", "hospital1")
        == after["hospitals/hospital1/node.pub"]
    )
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {
        "hospitals/hospital1/node.key",
        "hospitals/hospital1/node.pub",
        "register/hospitals.json",
    }
    assert keys.registrations() == (old, keys.registrations()[1], new)
    assert before["hospitals/hospital1/node.key"] not in after.values()


def test_interrupted_rotation_is_reported_and_fixed_by_the_next(
    keys: KeyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = keys.registrations()[0]
    line = (keys.path / old.public_key).read_bytes()
    with failing_rename(monkeypatch, "hospitals.json"), pytest.raises(StorageError):
        keys.rotate_hospital("hospital1", NOW)
    assert keys.registrations()[0] == old
    problems = key_inspection.inspect(keys.path, NOW).problems
    assert [(problem.found, problem.fix) for problem in problems] == [
        (
            "the key in hospitals/hospital1 is not the one in hospitals.json",
            "fedgan keys rotate hospital1",
        )
    ]
    revoked, _ = keys.rotate_hospital("hospital1", NOW)
    assert revoked.fingerprint == old.fingerprint
    assert (keys.path / revoked.public_key).read_bytes() == line
    assert key_inspection.inspect(keys.path, NOW).problems == ()


def test_rotation_needs_nothing_of_a_lost_hospital_folder(keys: KeyFolder) -> None:
    shutil.rmtree(keys.hospital("hospital1"))
    old, _ = keys.rotate_hospital("hospital1", NOW)
    line = node_keys.read_public(keys.path / old.public_key)
    assert node_keys.fingerprint(line) == old.fingerprint


def test_folder_of_the_registration_list_has_no_private_key(keys: KeyFolder) -> None:
    """The container `register` mounts it."""
    keys.rotate_hospital("hospital1", NOW)
    keys.add(["hospital3"], NOW)
    found = contents(keys.registration_list.parent)
    assert sorted(found) == sorted(
        ["hospitals.json", *(Path(row.public_key).name for row in keys.registrations())]
    )
    assert not [name for name, data in found.items() if b"PRIVATE" in data]


def test_revoked_hospital_is_readmitted_with_a_new_key(keys: KeyFolder) -> None:
    row = keys.revoke("hospital1", NOW)
    assert [each.revoked for each in keys.registrations()] == [NOW.isoformat(), None]
    with pytest.raises(ConfigError, match="was already revoked on"):
        keys.revoke("hospital1", NOW)
    with pytest.raises(
        ConfigError,
        match="no hospital 'hospital9' in these keys; known: hospital1, hospital2",
    ):
        keys.revoke("hospital9", NOW)
    old, new = keys.rotate_hospital("hospital1", NOW + timedelta(days=1))
    assert (old.revoked, old.fingerprint) == (row.revoked, row.fingerprint)
    assert new.revoked is None


def test_hospitals_trust_a_rotated_server_certificate(keys: KeyFolder) -> None:
    before = contents(keys.path)
    keys.rotate_server(["new.example.org"], 90, NOW)
    after = contents(keys.path)
    assert {name for name in before if before[name] != after[name]} == {
        "server/server.key",
        "server/server.crt",
        "server/proxy.pem",
    }
    assert after["server/proxy.pem"] == after["server/server.crt"] + after["server/server.key"]
    for host in ("superlink", "fl.example.org", "10.0.0.5", "new.example.org"):
        handshake(keys, host, keys.hospital("hospital1") / "ca.crt")
    assert certificates.days_left(certificates.read_certificate(keys.server_certificate), NOW) == 90


def test_server_rotation_needs_its_authority(keys: KeyFolder, tmp_path: Path) -> None:
    before = contents(keys.path / "server")
    with pytest.raises(ConfigError, match=r"ca\.crt has expired"):
        keys.rotate_server((), 365, NOW + timedelta(days=certificates.AUTHORITY_DAYS + 1))
    shutil.copy(make(tmp_path / "other").authority_key, keys.authority_key)
    with pytest.raises(ConfigError, match=r"is not the key of .*ca\.crt"):
        keys.rotate_server((), 365, NOW)
    keys.authority_key.unlink()
    with pytest.raises(ConfigError, match=r"ca\.key is missing"):
        keys.rotate_server((), 365, NOW)
    assert contents(keys.path / "server") == before


# --- commands ---


def test_keys_are_made_without_a_subcommand_and_listed(fedgan: Run) -> None:
    code, out, _ = fedgan("keys", "--host", "fl.example.org", "north", "south")
    assert code == 0
    assert "wrote keys/hospitals/north: SHA256:" in out
    assert fedgan("keys", "create", "west")[0] == 0
    listed = json.loads(fedgan("keys", "list", "--json")[1])
    assert [row["name"] for row in listed["hospitals"]] == ["north", "south", "west"]
    assert listed["server"]["hosts"] == [*certificates.DEFAULT_HOSTS, "fl.example.org"]
    assert (listed["server"]["days_left"], listed["authority"]["days_left"]) in (
        (364, 3649),
        (365, 3650),
    )  # made in this second or before
    out = fedgan("keys", "list")[1]
    assert all(row["fingerprint"] in out for row in listed["hospitals"])


def test_output_contains_no_secrets(fedgan: Run) -> None:
    printed, secrets = "", set()
    for words in (
        ["north"],
        ["rotate", "north", "--json"],
        ["rotate", "server"],
        ["revoke", "north"],
        ["list", "--json"],
    ):
        _, out, err = fedgan("keys", *words)
        printed += out + err
        paths = [*Path("keys").rglob("*.key"), Path("keys/server/proxy.pem")]
        texts = [path.read_text().rpartition("BEGIN PRIVATE KEY")[2] for path in paths]
        secrets |= {line for text in texts for line in text.splitlines() if "-----" not in line}
    assert len(secrets) > 20
    assert not [line for line in secrets if line in printed]


def test_mistyped_subcommand_makes_no_hospital(fedgan: Run) -> None:
    code, _, err = fedgan("keys", "rotat", "north")
    assert code == 2
    assert "Did you mean 'rotate'?" in err
    assert not Path("keys").exists()


def test_output_explains_how_to_apply_changes(fedgan: Run) -> None:
    fedgan("keys", "north", "south")
    code, out, _ = fedgan("keys", "rotate", "north")
    assert code == 0
    assert "flwr supernode unregister" in out
    assert re.search(r"register keys/register/north-\w+\.pub SUPERLINK --name north", out)
    code, out, _ = fedgan("keys", "revoke", "south")
    assert code == 0
    assert "flwr supernode unregister" in out
    assert "flwr supernode register" not in out
    code, out, _ = fedgan("keys", "rotate", "server", "--host", "fl.example.org", "--days", "10")
    assert code == 0
    assert "fl.example.org" in out
    assert "restart SuperLink and proxy" in out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["north"], "hospital 'north' already has a key"),
        (["east", "--host", "x.org"], "use --host and --days with fedgan keys rotate server"),
        (["rotate", "north", "--days", "3"], "not to a hospital's key"),
        (["rotate", "east"], "no hospital 'east' in these keys; known: north"),
        (
            ["revoke", "north", "--output", "none"],
            "no key folder at none: make one with fedgan keys",
        ),
        (["list", "--output", "none"], "no key folder at none"),
    ],
)
def test_wrong_usage_has_one_clear_error(fedgan: Run, words: list[str], text: str) -> None:
    fedgan("keys", "north")
    before = contents(Path("keys"))
    code, _, err = fedgan("keys", *words)
    assert code == 2
    assert text in err
    assert contents(Path("keys")) == before


# --- doctor ---


def checks(folder: Path) -> list[tuple[str, str]]:
    return [(check.status, check.found) for check in doctor.key_checks(folder)]


def test_doctor_reports_days_left_and_finds_keys_by_default(
    keys: KeyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    [(status, found)] = checks(keys.path)
    assert status == "ok"
    assert found.startswith("2 hospitals; authority 36")
    assert "server 364 days left" in found or "server 365 days left" in found
    monkeypatch.chdir(keys.path.parent)
    assert len(doctor.key_checks(None)) == 1
    monkeypatch.chdir(keys.path)
    assert doctor.key_checks(None) == []
    assert checks(keys.path / "server")[0][0] == "failed"


def test_doctor_warns_before_a_certificate_expires_and_fails_after(tmp_path: Path) -> None:
    assert [status for status, _ in checks(make(tmp_path / "fresh", days=31).path)] == ["ok"]
    found = checks(make(tmp_path / "soon", days=30, ago=10).path)
    assert found[1] in (
        ("warning", "server.crt expires in 19 days"),
        ("warning", "server.crt expires in 20 days"),
    )
    [(status, found)] = checks(make(tmp_path / "late", days=30, ago=40).path)
    assert (status, found[:18]) == ("failed", "server.crt expired")
    [(status, found), *_] = checks(make(tmp_path / "early", ago=-2).path)
    assert (status, "is not valid before" in found) == ("failed", True)


def test_doctor_finds_keys_that_others_can_read(keys: KeyFolder) -> None:
    (keys.hospital("hospital1") / "node.key").chmod(0o640)
    keys.proxy_pem.chmod(0o644)
    (keys.path / "server").chmod(0o770)
    assert checks(keys.path) == [
        ("failed", "hospitals/hospital1/node.key has mode 0640: others can use this key"),
        ("failed", "server has mode 0770: others can replace its files"),
        ("failed", "server/proxy.pem has mode 0644: others can use this key"),
    ]


def test_doctor_finds_files_that_do_not_match(keys: KeyFolder, tmp_path: Path) -> None:
    other = make(tmp_path / "other")
    shutil.copy(other.server_key, keys.server_key)
    shutil.copy(other.authority_key, keys.authority_key)
    shutil.copy(other.hospital("hospital1") / "node.key", keys.hospital("hospital1") / "node.key")
    shutil.copy(other.authority, keys.hospital("hospital2") / "ca.crt")
    shutil.copytree(keys.hospital("hospital2"), keys.hospital("hospital3"))
    found = dict.fromkeys(found for _, found in checks(keys.path))
    assert list(found) == [
        "ca.key is not the key of ca.crt: hospitals would trust no certificate that it signs",
        "server.key is not the key of server.crt: the server cannot start",
        "server/proxy.pem is missing or not server.crt and server.key: the proxy cannot start",
        "the key in hospitals/hospital1 is not the one in hospitals.json",
        "hospitals/hospital2/ca.crt is missing or not a copy of ca.crt",
        "hospitals/hospital3 is not in hospitals.json",
    ]
    shutil.copy(other.server_certificate, keys.server_certificate)
    assert "server/server.crt is not signed by ca.crt: no hospital will connect" in dict(
        map(reversed, checks(keys.path))
    )


def test_doctor_checks_a_hospitals_part_on_its_own(keys: KeyFolder) -> None:
    part = keys.hospital("hospital1")
    [(status, found)] = checks(part)
    assert status == "ok"
    assert keys.registrations()[0].fingerprint in found
    shutil.copy(keys.hospital("hospital2") / "node.pub", part / "node.pub")
    (part / "ca.crt").write_text("no certificate")
    assert [status for status, _ in checks(part)] == ["failed", "failed"]
    (part / "node.key").write_text("no key")
    assert "node.key is not an OpenSSH private key" in checks(part)[0][1]


def test_doctor_reports_missing_files_of_active_hospitals_only(keys: KeyFolder) -> None:
    (keys.hospital("hospital1") / "node.key").unlink()  # the operator may delete its copy
    assert [status for status, _ in checks(keys.path)] == ["ok"]
    shutil.rmtree(keys.hospital("hospital1"))
    assert {status for status, _ in checks(keys.path)} == {"failed"}
    keys.revoke("hospital1", NOW)
    assert [status for status, _ in checks(keys.path)] == ["ok"]


def test_hospital_keeps_the_key_that_it_made(fedgan: Run, tmp_path: Path) -> None:
    fedgan("keys", "north")
    for name in ("own", "next"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", tmp_path / name],
            check=True,
        )
    keys = KeyFolder.open(tmp_path / "keys")
    code, out, err = fedgan("keys", "add", "south", "--public-key", "own.pub")
    assert code == 0, err
    assert node_keys.fingerprint((tmp_path / "own.pub").read_bytes()) in out
    assert sorted(path.name for path in keys.hospital("south").iterdir()) == ["ca.crt", "node.pub"]
    assert [problem for problem in checks(keys.path) if problem[0] == "failed"] == []

    code, _, err = fedgan("keys", "add", "west", "--public-key", "own.pub")
    assert code == 2
    assert "that of hospital 'south'" in err
    code, _, err = fedgan("keys", "add", "west", "--public-key", "own")
    assert code == 2
    assert "must not leave its hospital" in err
    assert not keys.hospital("west").exists()

    code, _, err = fedgan("keys", "rotate", "north", "--public-key", "next.pub")
    assert code == 0, err
    assert not (keys.hospital("north") / "node.key").exists()
    assert [row.revoked is None for row in keys.registrations()] == [False, True, True]
