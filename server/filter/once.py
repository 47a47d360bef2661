"""A signed request passes once.

A SuperNode signs the time of its request and nothing else: neither path nor body. The SuperLink takes such a signature for
305 seconds, as often as it comes and on whatever it is pasted. A node signs each request anew, also when it tries again, so
that the second use of a signature is nobody's honest request.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

from server.filter.rules import TIMESTAMP, Headers, Refused, public_key

# The SuperLink takes a timestamp from 5 s in its future to 305 s in its past; what came before that is refused there.
KEPT_SECONDS = 320.0
ROOM = 100_000


class Once:
    """Which signed timestamps have been used. Forgotten at a restart, and after `kept` seconds.

    The key is (public key, timestamp), not the signature: an ECDSA signature has a second valid form that anybody can write.
    """

    def __init__(
        self,
        kept: float = KEPT_SECONDS,
        room: int = ROOM,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.kept, self.room, self.clock = kept, room, clock
        self.used: dict[bytes, float] = {}

    def take(self, headers: Headers) -> bytes:
        """Use up the timestamp of a request; returns what `give_back` wants. Raises `Refused` where it was used before."""
        key = public_key(headers)
        mark = hashlib.sha256(len(key).to_bytes(8, "big") + key + dict(headers)[TIMESTAMP]).digest()
        self._forget()
        if mark in self.used:
            raise Refused(403, "replayed: this signed timestamp was used before")
        if len(self.used) >= self.room:
            raise Refused(503, "too many signed requests to remember")
        self.used[mark] = self.clock()
        return mark

    def give_back(self, mark: bytes) -> None:
        """The SuperLink did not take the signature: whoever sent it must not have used up another's timestamp."""
        self.used.pop(mark, None)

    def _forget(self) -> None:
        oldest = self.clock() - self.kept
        while self.used and next(iter(self.used.values())) < oldest:
            del self.used[next(iter(self.used))]
