"""Register and unregister the hospitals of `fedgan keys` at a SuperLink.

    python -m server.operator.register --keys keys --superlink superlink:8000

It compares the registration list with the SuperLink's keys, so it can run any number of times:
after each `fedgan keys`, `rotate` and `revoke`. It uses the control API of `flwr supernode
register`, whose own output does not show which key a node has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.control import ControlHttpClient

from fedgan.deployment.key_folder import KeyFolder
from fedgan.deployment.registrations import Registration
from fedgan.errors import ConfigError, FederationError, FedganError
from server.operator.superlink import UNREGISTERED, wait_until_healthy

TIMEOUT = 120.0  # seconds for a SuperLink that starts at the same time


@dataclass(frozen=True)
class Changes:
    """Hospitals to register (name as NAME=IMAGES, key in PEM), nodes to unregister (name, id)."""

    register: tuple[tuple[str, bytes], ...]
    unregister: tuple[tuple[str, int], ...]


def find_changes(keys: KeyFolder, known: Mapping[bytes, int]) -> Changes:
    """Compare the list with the SuperLink's keys, PEM to node id.

    Keys that are on no list are left alone: they were registered by hand. Raises `ConfigError` for
    an unreadable key.
    """
    rows = [(row, _pem(keys, row)) for row in keys.registrations()]
    return Changes(
        tuple(
            (row.node_name, pem) for row, pem in rows if row.revoked is None and pem not in known
        ),
        tuple(
            (row.name, known[pem]) for row, pem in rows if row.revoked is not None and pem in known
        ),
    )


def _pem(keys: KeyFolder, row: Registration) -> bytes:
    """A hospital's public key in PEM, as Flower stores it."""
    path = keys.path / row.public_key
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} is no public key: create a new one with fedgan keys rotate {row.name}"
        ) from error
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def known_keys(control: ControlHttpClient) -> dict[bytes, int]:
    """The keys that the SuperLink accepts, PEM to node id."""
    nodes = control.ListNodes(ListNodesRequest()).nodes_info
    return {
        bytes(node.public_key): int(node.node_id) for node in nodes if node.status != UNREGISTERED
    }


def apply_changes(keys: KeyFolder, control: ControlHttpClient) -> list[str]:
    """Unregister, then register what differs; one line per change."""
    changes = find_changes(keys, known_keys(control))
    lines = []
    for name, node in changes.unregister:
        control.UnregisterNode(UnregisterNodeRequest(node_id=node))
        lines.append(f"unregistered {name}: its key is revoked")
    for name, pem in changes.register:
        control.RegisterNode(RegisterNodeRequest(public_key=pem, name=name))
        lines.append(f"registered {name}")
    return lines


def register(keys: KeyFolder, superlink: str, timeout: float) -> list[str]:
    """Apply the list to a SuperLink that is healthy within `timeout` seconds; one line per change.

    Raises `FederationError` where it cannot be reached, is not trusted, or refuses.
    """
    wait_until_healthy(superlink, keys.authority, timeout)
    control = ControlHttpClient.from_server_address(
        superlink, False, keys.authority.read_bytes(), []
    )
    try:
        return apply_changes(keys, control)
    except httpx.HTTPError as error:
        raise FederationError(f"the SuperLink at {superlink} refused: {error}") from error
    finally:
        control.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m server.operator.register", description="Register the keys of hospitals."
    )
    parser.add_argument(
        "--keys",
        type=Path,
        default=Path("keys"),
        metavar="DIR",
        help="the folder of fedgan keys",
    )
    parser.add_argument(
        "--superlink",
        default="superlink:8000",
        metavar="HOST:PORT",
        help="the SuperLink's own address",
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=TIMEOUT,
        metavar="SECONDS",
        help="how long it may take to start",
    )
    options = parser.parse_args(arguments)
    try:
        lines = register(KeyFolder.open(options.keys), options.superlink, options.wait)
    except FedganError as error:
        print(f"register: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(lines) or "the SuperLink matches the list: nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
