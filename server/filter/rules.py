"""What may pass the filter. The raw path has to look right: nothing is decoded or normalised before it is judged."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable

HEALTH = b"/health"
FLEET = re.compile(rb"/v1/fleet(?:/[a-z0-9_-]+)+")
LONGEST_PATH = 128
LONGEST_HEAD = 16 * 1024  # bytes of all headers together
METHODS = {True: {"POST"}, False: {"GET", "HEAD"}}  # of the fleet API, of /health

PUBLIC_KEY, TIMESTAMP, SIGNATURE = b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"
# The only headers that reach the SuperLink, beside Flower's own: whatever a client says about proxies, hosts, cookies or
# connections stays here.
ONWARD = {b"accept", b"accept-encoding", b"content-type", b"content-length", b"user-agent"}
ONWARD_PREFIX = b"flwr-"
# Headers of one connection, not of the message (RFC 9110, 7.6.1): they never pass, in either direction.
HOP_BY_HOP = {
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}

Headers = list[tuple[bytes, bytes]]


class Refused(Exception):
    """A request that does not pass: the HTTP status that it gets, and why, in words for the log and the client.

    `quiet`: the log has said so already.
    """

    def __init__(self, status: int, reason: str, quiet: bool = False) -> None:
        super().__init__(reason)
        self.status, self.reason, self.quiet = status, reason, quiet


def check(method: str, raw_path: bytes, query: bytes, headers: Headers) -> None:
    """Raise `Refused` unless the request is one of those that a SuperNode, or a probe of health, sends."""
    fleet = len(raw_path) <= LONGEST_PATH and FLEET.fullmatch(raw_path) is not None
    if not fleet and raw_path != HEALTH:
        raise Refused(403, "path not allowed")
    if query:
        raise Refused(403, "query not allowed")
    if method not in METHODS[fleet]:
        raise Refused(405, "method not allowed")
    if sum(len(name) + len(value) for name, value in headers) > LONGEST_HEAD:
        raise Refused(431, f"headers over {LONGEST_HEAD // 1024} KiB")
    names = [name for name, _ in headers]
    if b"upgrade" in names or b"upgrade" in _connection_tokens(headers):
        raise Refused(403, "upgrade not allowed")
    if b"content-length" in names and b"transfer-encoding" in names:
        raise Refused(400, "content-length and transfer-encoding together")
    if fleet and (
        missing := [name for name in (PUBLIC_KEY, TIMESTAMP, SIGNATURE) if names.count(name) != 1]
    ):
        raise Refused(401, f"not signed by a SuperNode: needs one {missing[0].decode()}")


def public_key(headers: Headers) -> bytes:
    """The key that a request names, decoded: base64 has several spellings. Raises `Refused` where it is none."""
    try:
        return base64.b64decode(dict(headers)[PUBLIC_KEY], validate=True)
    except ValueError:
        raise Refused(401, "flwr-public-key is not base64") from None


def onward(headers: Headers) -> Headers:
    """The headers of a request that go on to the SuperLink."""
    named = _connection_tokens(headers)
    return [
        (name, value)
        for name, value in headers
        if (name in ONWARD or name.startswith(ONWARD_PREFIX))
        and name not in HOP_BY_HOP
        and name not in named
    ]


def backward(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers of an answer that go back to the hospital."""
    lowered = [(name.lower(), value) for name, value in headers]
    named = _connection_tokens(lowered)
    return [
        (name, value) for name, value in lowered if name not in HOP_BY_HOP and name not in named
    ]


def _connection_tokens(headers: Headers) -> set[bytes]:
    """Names that the Connection header declares to be of this connection."""
    return {
        token.strip().lower()
        for name, value in headers
        if name == b"connection"
        for token in value.split(b",")
    }
