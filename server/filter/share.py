"""No client has more than its share of the requests that run at once.

A client is the key that a SuperNode names. Whether it holds that key is known when the SuperLink has read the whole request, so
what names a key that the SuperLink has not taken yet is counted by the address that it came from, and has to be short and
quick: who makes up keys can neither hold a hospital's places nor keep it from being known by its next heartbeat.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cryptography.hazmat.primitives import serialization

from fedgan.deployment.node_keys import fingerprint
from server.filter.rules import PUBLIC_KEY, Headers, Refused, public_key

# A SuperNode sends or fetches two objects at once (FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES, …_PULLS), asks for messages and
# sends a heartbeat.
MOST = 16
STRANGER_BYTES, STRANGER_SECONDS = 2**16, 10.0  # a heartbeat has a few hundred bytes


class Shares:
    """How many requests of each client run. Keys that the SuperLink has taken are remembered until a restart."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.taken: set[bytes] = set()
        self.running: dict[bytes | str, int] = {}
        self.told: set[bytes | str] = (
            set()
        )  # clients whose refusal stands in the log, until none of their requests runs

    @contextlib.contextmanager
    def place(self, headers: Headers, peer: str) -> Iterator[None]:
        """Hold a place for one request. Raises `Refused` where its client has no more: with 503, after which it asks again."""
        client = self._client(headers, peer)
        if self.running.get(client, 0) >= self.most:
            first = client not in self.told
            self.told.add(client)
            raise Refused(
                503, f"over {self.most} requests at once {_whose(client)}", quiet=not first
            )
        self.running[client] = self.running.get(client, 0) + 1
        try:
            yield
        finally:
            self.running[client] -= 1
            if not self.running[client]:
                del self.running[client]
                self.told.discard(client)

    def know(self, headers: Headers) -> None:
        """The SuperLink took a request: its key is a hospital's."""
        self.taken.add(public_key(headers))

    def is_stranger(self, headers: Headers) -> bool:
        """Whether a request names a key that the SuperLink has not taken yet."""
        return PUBLIC_KEY in dict(headers) and public_key(headers) not in self.taken

    def _client(self, headers: Headers, peer: str) -> bytes | str:
        if PUBLIC_KEY not in dict(headers) or self.is_stranger(headers):
            return peer
        return public_key(headers)


def too_long_yet() -> Refused:
    """The refusal of a body that is long for a key that the SuperLink has not taken yet; SuperNodes ask again after it."""
    return Refused(
        503, f"over {STRANGER_BYTES // 2**10} KiB by a key that the SuperLink has not taken yet"
    )


def _whose(client: bytes | str) -> str:
    if isinstance(client, str):
        return "from this address"
    try:
        line = serialization.load_pem_public_key(client).public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
    except ValueError:  # the SuperLink knows what it took
        return "by one key"
    return f"by the key {fingerprint(line)}"
