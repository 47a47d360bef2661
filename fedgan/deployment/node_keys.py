"""The key with which a hospital's SuperNode proves who it is: EC P-384 in OpenSSH's formats, as Flower reads them."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedgan.errors import ConfigError


def new_node_key(comment: str) -> tuple[bytes, bytes]:
    """A new private key, and the line of its public key, which ends with `comment`."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    return private, public_line(key.public_key(), comment)


def public_line(key: ec.EllipticCurvePublicKey, comment: str) -> bytes:
    """A public key as one line of OpenSSH: type, key, comment."""
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line + b" " + comment.encode() + b"\n"


def fingerprint(line: bytes) -> str:
    """SHA-256 of a public key's line as `ssh-keygen -lf` prints it, so that both ends of a telephone can compare."""
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def read_public(path: Path) -> bytes:
    """Read the line of a public key. Raises `ConfigError` where it is missing or no key of P-384."""
    try:
        line = path.read_bytes()
        key = serialization.load_ssh_public_key(line)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no public key of OpenSSH: put it back from a copy") from error
    _check_curve(key, path)
    return line


def read_private(path: Path, comment: str = "") -> bytes:
    """Read a private key and give the line of its public one. Raises `ConfigError` where it is missing or no key of P-384."""
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
        raise ConfigError(
            f"{path} is no private key of OpenSSH without a password: put it back from a copy"
        ) from error
    _check_curve(key, path)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return public_line(key.public_key(), comment)


def _check_curve(key: object, path: Path) -> None:
    if not isinstance(
        key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey
    ) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(
            f"{path} is no key of the curve P-384: the SuperNode needs one that fedgan keys made"
        )
