"""The authentication key of a hospital's SuperNode: EC P-384 in OpenSSH format."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedgan.errors import ConfigError


def new_node_key(comment: str) -> tuple[bytes, bytes]:
    """A new private key, and its public key as one line that ends with `comment`."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    return private, public_line(key.public_key(), comment)


def public_line(key: ec.EllipticCurvePublicKey, comment: str) -> bytes:
    """A public key as one line in OpenSSH format: type, key, comment."""
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line + b" " + comment.encode() + b"\n"


def fingerprint(line: bytes) -> str:
    """SHA-256 of a public key's line, as `ssh-keygen -lf` prints it."""
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def read_own_public(path: Path, comment: str) -> bytes:
    """The line of a public key that a hospital made itself, with `comment` in place of its own.

    Raises `ConfigError` if it is missing, a private key, or not a P-384 key.
    """
    key = serialization.load_ssh_public_key(read_public(path))
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return public_line(key, comment)


def read_public(path: Path) -> bytes:
    """Read a public key's line. Raises `ConfigError` if it is missing or not a P-384 key."""
    try:
        line = path.read_bytes()
        if b"PRIVATE KEY" in line:
            raise ConfigError(
                f"{path} is a private key, which must not leave its hospital: ask for the .pub "
                "file, and for a new key"
            )
        key = serialization.load_ssh_public_key(line)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} is not an OpenSSH public key (ssh-keygen -t ecdsa -b 384): restore it"
        ) from error
    _check_curve(key, path)
    return line


def read_private(path: Path, comment: str = "") -> bytes:
    """Read a private key and return its public key's line.

    Raises `ConfigError` if the file is missing or not a P-384 key.
    """
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it has a password
        raise ConfigError(
            f"{path} is not an OpenSSH private key without a password: restore it from a backup"
        ) from error
    _check_curve(key, path)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return public_line(key.public_key(), comment)


def _check_curve(key: object, path: Path) -> None:
    if not isinstance(
        key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey
    ) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(
            f"{path} is not a P-384 key: the SuperNode needs one of fedgan keys, or of ssh-keygen "
            "-t ecdsa -b 384"
        )
