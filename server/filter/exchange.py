"""One request and its answer, as pieces that come and go, within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from server.filter.rules import Headers, Refused, backward

PAUSE_SECONDS = 30.0  # the longest wait for the next piece of a body
LINGER_SECONDS, LINGER_BYTES = (
    2.0,
    16 * 2**20,
)  # what is still read of a refused body, so that its sender sees the answer


@dataclass(frozen=True)
class Bounds:
    """Of a body: bytes at most, what is said to more of them, and seconds in all."""

    most: int
    over: Refused
    seconds: float = math.inf


class ClientLeft(Exception):
    """The client closed the connection before its request was whole."""


class Exchange:
    """What ASGI gives for one request, with what has happened to it: `begun` an answer, `more` of the body to come."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        self.method: str = scope["method"]
        self.path: bytes = scope["raw_path"]  # as it came: neither decoded nor normalised
        self.query: bytes = scope["query_string"]
        self.headers: Headers = list(scope["headers"])
        self.peer: str = scope["client"][0] if scope.get("client") else ""
        self.begun, self.more = False, True

    async def body(self, bounds: Bounds) -> AsyncIterator[bytes]:
        """The pieces of the body. Raises `Refused` where they are too many, or one, or all, are long in coming."""
        seen, end = 0, time.monotonic() + bounds.seconds
        while self.more:
            left = end - time.monotonic()
            try:
                piece = await asyncio.wait_for(self._piece(), min(PAUSE_SECONDS, left))
            except TimeoutError:
                late = (
                    f"nothing of the body came for {PAUSE_SECONDS:g} s"
                    if left > PAUSE_SECONDS
                    else "the body took too long"
                )
                raise Refused(408, late) from None
            seen += len(piece)
            if seen > bounds.most:
                raise bounds.over
            if piece:
                yield piece

    async def _piece(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.more = False
            raise ClientLeft
        self.more = message.get("more_body", False)
        return message.get("body", b"")

    async def send(self, message: Message) -> None:
        """Send an ASGI message of the answer."""
        self.begun = True
        await self._send(message)

    async def answer(self, content: dict[str, str], status: int) -> None:
        """Answer with JSON."""
        await JSONResponse(content, status)(self.scope, self._receive, self.send)

    async def relay(self, response: httpx.Response) -> None:
        """Give the SuperLink's answer back, piece by piece, as it came (compressed, if it is).

        A 500 becomes a 503. A busy SuperLink answers so when its database was locked for 5 s, and has then done nothing; a
        SuperNode asks again after a 503 and throws its message away after a 500.
        """
        status = 503 if response.status_code == 500 else response.status_code
        start = {
            "type": "http.response.start",
            "status": status,
            "headers": backward(response.headers.raw),
        }
        await self.send(start)
        async for piece in response.aiter_raw():
            await self.send({"type": "http.response.body", "body": piece, "more_body": True})
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, refusal: Refused) -> None:
        """Say no and close. A client that is still sending would lose the answer to the closing: it is read for a moment."""
        text = JSONResponse({"detail": refusal.reason}, refusal.status, {"connection": "close"})
        await self.send(
            {"type": "http.response.start", "status": text.status_code, "headers": text.raw_headers}
        )
        await self.send({"type": "http.response.body", "body": text.body, "more_body": True})
        with contextlib.suppress(TimeoutError, ClientLeft):
            async with asyncio.timeout(LINGER_SECONDS):
                rest = LINGER_BYTES
                while self.more and rest > 0:
                    rest -= len(await self._piece())
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})


def too_large(most: int) -> Refused:
    """The refusal of a body of more than `most` bytes."""
    return Refused(413, f"body over {most / 2**20:g} MiB")
