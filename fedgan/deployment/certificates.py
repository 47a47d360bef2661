"""The federation's certificate authority, and the server certificate of SuperLink and proxy.

The authority signs server certificates only. Hospitals authenticate with keys (`node_keys.py`),
because Flower's SuperLink does not support client certificates. All keys are on the curve P-384.
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
# The names that docker-compose.yml and the tests use for the server.
DEFAULT_HOSTS = ("superlink", "proxy", "localhost", "127.0.0.1")
BACKDATED = timedelta(hours=1)  # a hospital whose clock is slow can connect at once
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def now() -> datetime:
    """The current time in UTC, in whole seconds, as certificates store it."""
    return datetime.now(UTC).replace(microsecond=0)


def new_authority(moment: datetime) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A key and its self-signed certificate, which signs server certificates but no authority."""
    key = ec.generate_private_key(ec.SECP384R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # A unique name per authority: OpenSSL then reports "unknown issuer" for a certificate of
    # another authority, not "bad signature".
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
    """A new key and its certificate for `hosts`, valid for `days` or as long as the authority."""
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
    """Raise `ConfigError` if one of `hosts` is neither a DNS name nor an IP address."""
    for host in hosts:
        _general_name(host)


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The DNS names and IP addresses in a server certificate."""
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
    """SHA-256 of a certificate, as `openssl x509 -noout -fingerprint -sha256` prints it."""
    return "SHA256:" + certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def days_left(certificate: x509.Certificate, moment: datetime) -> int:
    """Whole days until a certificate expires; negative once it has expired."""
    return (certificate.not_valid_after_utc - moment).days


def certificate_bytes(certificate: x509.Certificate) -> bytes:
    """Encode a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Encode a private key as PEM (PKCS #8, no password, because services start unattended)."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_certificate(path: Path) -> x509.Certificate:
    """Read a PEM certificate. Raises `ConfigError` if it is missing or invalid."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a PEM certificate: restore it from a backup") from error


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the private key of an authority or a server. Raises `ConfigError` if it is invalid."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:  # TypeError: it has a password
        raise ConfigError(
            f"{path} is not a PEM private key without a password: restore it from a backup"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{path} is not an elliptic-curve key: restore the one that fedgan keys made"
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
    """Certificates and revocation lists for an authority, TLS handshakes for a server."""
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
        if "%" not in host:  # a certificate cannot hold a zone (fe80::1%eth0)
            return x509.IPAddress(address)
    raise ConfigError(
        f"'{host}' is not a host: give a DNS name or an IP address, without https:// and port"
    )
