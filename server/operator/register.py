"""Makes a SuperLink agree with the registration list of `fedgan keys`: who may take part, and who no longer.

    python -m server.operator.register --keys keys --superlink superlink:8000

It asks the SuperLink first which keys it knows, so it may run as often as one likes: after each `fedgan keys`, `rotate`
and `revoke`. It speaks to the control API as `flwr supernode register` does, which does not tell whose key a node has.
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
from server.operator.superlink import UNREGISTERED, reach

WAIT = 120.0  # seconds for a SuperLink that was started at the same time


@dataclass(frozen=True)
class Changes:
    """What makes the SuperLink agree: hospitals to let in, with their keys in PEM, and nodes to let go, with their names."""

    register: tuple[tuple[str, bytes], ...]
    unregister: tuple[tuple[str, int], ...]


def changes(keys: KeyFolder, known: Mapping[bytes, int]) -> Changes:
    """Hold the list against the keys that the SuperLink knows, PEM to node id. Raises `ConfigError` for an unreadable key.

    A key that stands on no list is left alone: somebody has registered it by hand.
    """
    rows = [(row, _pem(keys, row)) for row in keys.registrations()]
    return Changes(
        tuple((row.name, pem) for row, pem in rows if row.revoked is None and pem not in known),
        tuple(
            (row.name, known[pem]) for row, pem in rows if row.revoked is not None and pem in known
        ),
    )


def _pem(keys: KeyFolder, row: Registration) -> bytes:
    """A hospital's public key as Flower keeps it."""
    path = keys.path / row.public_key
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} is no public key: make a new one with fedgan keys rotate {row.name}"
        ) from error
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def known_keys(control: ControlHttpClient) -> dict[bytes, int]:
    """The keys that the SuperLink lets in, PEM to node id."""
    nodes = control.ListNodes(ListNodesRequest()).nodes_info
    return {
        bytes(node.public_key): int(node.node_id) for node in nodes if node.status != UNREGISTERED
    }


def agree(keys: KeyFolder, control: ControlHttpClient) -> list[str]:
    """Register and unregister what differs; a line for each. Whoever is no longer wanted goes first."""
    wanted = changes(keys, known_keys(control))
    lines = []
    for name, node in wanted.unregister:
        control.UnregisterNode(UnregisterNodeRequest(node_id=node))
        lines.append(f"unregistered {name}: its key is revoked")
    for name, pem in wanted.register:
        control.RegisterNode(RegisterNodeRequest(public_key=pem, name=name))
        lines.append(f"registered {name}")
    return lines


def register(keys: KeyFolder, superlink: str, seconds: float) -> list[str]:
    """Wait so many seconds for a SuperLink and make it agree with the list; a line for each change.

    Raises `FederationError` where it cannot be reached, is not to be trusted, or refuses.
    """
    reach(superlink, keys.authority, seconds)
    control = ControlHttpClient.from_server_address(
        superlink, False, keys.authority.read_bytes(), []
    )
    try:
        return agree(keys, control)
    except httpx.HTTPError as error:
        raise FederationError(f"the SuperLink at {superlink} refused: {error}") from error
    finally:
        control.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m server.operator.register", description="Register the keys of hospitals."
    )
    parser.add_argument(
        "--keys",
        type=Path,
        default=Path("keys"),
        metavar="DIR",
        help="the folder that fedgan keys made",
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
        default=WAIT,
        metavar="SECONDS",
        help="how long it may take to come up",
    )
    options = parser.parse_args(arguments)
    try:
        lines = register(KeyFolder.open(options.keys), options.superlink, options.wait)
    except FedganError as error:
        print(f"register: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(lines) or "the SuperLink agrees with the list: nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
