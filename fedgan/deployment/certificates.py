"""The federation's certificates: an authority of its own, and the one certificate that SuperLink and filter show.

The authority signs server certificates and nothing else: hospitals prove who they are with keys (`node_keys.py`), because
Flower's SuperLink asks for no client certificate. All keys are of the curve P-384.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgan.errors import ConfigError

AUTHORITY_DAYS = 3650
LEAST_HOSTS = (
    "superlink",
    "filter",
    "localhost",
    "127.0.0.1",
)  # as docker-compose.yml and the tests call the server
BACKDATED = timedelta(
    hours=1
)  # so that a hospital whose clock is a little behind can connect at once
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def now() -> datetime:
    """This moment in UTC, in whole seconds, as certificates hold it."""
    return datetime.now(UTC).replace(microsecond=0)


def new_authority(moment: datetime) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A key and its self-signed certificate, which may sign server certificates but no further authority."""
    key = ec.generate_private_key(ec.SECP384R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # each authority has a name of its own: a certificate of another one is then told as "unknown issuer", not as "bad signature"
    name = _name(f"fedgan authority {identifier.digest.hex()[:16]}")
    builder = _builder(
        name, name, key.public_key(), moment, moment + timedelta(days=AUTHORITY_DAYS)
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
    )
    return key, builder.sign(key, hashes.SHA384())


def issue_server(
    authority_key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    hosts: Sequence[str],
    days: int,
    moment: datetime,
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A new key and its certificate for `hosts`; it ends after `days`, or with the authority where that comes first."""
    names = list(dict.fromkeys(map(_general_name, hosts)))
    key = ec.generate_private_key(ec.SECP384R1())
    end = min(moment + timedelta(days=days), authority.not_valid_after_utc)
    builder = _builder(_name("fedgan server"), authority.subject, key.public_key(), moment, end)
    builder = builder.add_extension(
        x509.BasicConstraints(ca=False, path_length=None), critical=True
    )
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
    )
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    signer = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(signer), critical=False
    )
    return key, builder.sign(authority_key, hashes.SHA384())


def check_hosts(hosts: Sequence[str]) -> None:
    """Raise `ConfigError` where one of `hosts` is neither a DNS name nor an IP address."""
    for host in hosts:
        _general_name(host)


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a server certificate stands for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether `authority` signed `certificate`."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate as `openssl x509 -noout -fingerprint -sha256` prints it."""
    return "SHA256:" + certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def days_left(certificate: x509.Certificate, moment: datetime) -> int:
    """Whole days until a certificate ends; negative once it has."""
    return (certificate.not_valid_after_utc - moment).days


def certificate_bytes(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key of an authority or a server as PEM (PKCS #8, no password: servers start by themselves)."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_certificate(path: Path) -> x509.Certificate:
    """Read a PEM certificate. Raises `ConfigError` where it is missing or none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no certificate in PEM: put it back from a copy") from error


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the private key of an authority or a server. Raises `ConfigError` where it is missing or none."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:  # TypeError: it has a password
        raise ConfigError(
            f"{path} is no private key in PEM without a password: put it back from a copy"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{path} is no key of an elliptic curve: put back the one that fedgan keys made"
        )
    return key


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    moment: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = (
        builder.serial_number(x509.random_serial_number())
        .not_valid_before(moment - BACKDATED)
        .not_valid_after(end)
    )
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    """An authority signs certificates and lists of revoked ones, a server its handshakes: neither may do more."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        labels = host.split(".")
        if len(host) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit():
            return x509.DNSName(host.lower())
    else:
        if "%" not in host:  # fe80::1%eth0: the zone has no place in a certificate
            return x509.IPAddress(address)
    raise ConfigError(
        f"'{host}' is no host: give a DNS name or an IP address alone, without https:// and port"
    )
