"""The filter's side of a connection: TLS first, then HTTP; a handshake and the head of a request have seconds to come."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.filter.journal import Journal

CONNECTIONS = 256
HANDSHAKE_SECONDS = 10.0
HEAD_SECONDS = (
    15.0  # for the headers of a request, beside the time that a connection may idle before
)


class Door(H11Protocol):
    """uvicorn's HTTP protocol behind a TLS handshake of its own.

    uvicorn and asyncio say nothing when a handshake fails, and wait for a request's head for ever. Here both are bounded,
    and a client that speaks plain HTTP, or does not trust the certificate, leaves a line with its address.
    """

    tls: ClassVar[ssl.SSLContext]
    journal: ClassVar[Journal]
    open_doors: ClassVar[set[Door]]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.early = b""
        self.peer = ""
        self.head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A TCP connection: not a byte is read before TLS stands."""
        self.peer = (transport.get_extra_info("peername") or ("",))[0]
        if len(self.open_doors) >= CONNECTIONS:
            self.journal.write("refused", self.peer, reason=f"more than {CONNECTIONS} connections")
            transport.abort()
            return
        self.open_doors.add(self)
        transport.pause_reading()
        self.handshake = self.loop.create_task(self._shake_hands(transport))

    async def _shake_hands(self, transport: asyncio.Transport) -> None:
        try:
            secure = await self.loop.start_tls(
                transport, self, self.tls, server_side=True, ssl_handshake_timeout=HANDSHAKE_SECONDS
            )
        except (
            OSError,
            TimeoutError,
        ) as error:  # SSLError, a connection that was closed or did not go on
            self.open_doors.discard(self)
            self.journal.write("refused", self.peer, reason=f"no TLS: {_why(error)}")
            transport.abort()
            return
        if secure is None or secure.is_closing():
            self.open_doors.discard(self)
            return
        super().connection_made(secure)
        self._wait_for_head(HEAD_SECONDS)
        if self.early:
            early, self.early = self.early, b""
            self.data_received(early)

    def data_received(self, data: bytes) -> None:
        """TLS may hand the first request over before the handshake's waiter has woken: it is kept for that moment."""
        if self.transport is None:
            self.early += data
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE and self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def on_response_complete(self) -> None:
        """One request is done: the next one's head has its own time, which the time of an idle connection usually ends."""
        super().on_response_complete()
        if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
            self._wait_for_head(self.timeout_keep_alive + HEAD_SECONDS)

    def _wait_for_head(self, seconds: float) -> None:
        if self.head_timer is None:
            self.head_timer = self.loop.call_later(seconds, self._no_head)

    def _no_head(self) -> None:
        self.head_timer = None
        self.journal.write("refused", self.peer, reason="no whole request in time")
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP at all."""
        self.journal.write("refused", self.peer, status=400, reason=msg)
        super().send_400_response(msg)

    def connection_lost(self, exc: Exception | None) -> None:
        """Either side closed."""
        self.open_doors.discard(self)
        if self.head_timer is not None:
            self.head_timer.cancel()
        if self.transport is not None:
            super().connection_lost(exc)


def _why(error: BaseException) -> str:
    """A failed handshake in words: what OpenSSL calls it, and what it usually means."""
    name = getattr(error, "reason", None) or type(error).__name__
    if name in ("HTTP_REQUEST", "HTTPS_PROXY_REQUEST"):
        return f"{name}, the client speaks plain HTTP"
    if any(word in name for word in ("UNKNOWN_CA", "CERTIFICATE", "DECRYPT_ERROR")):
        return f"{name}, the client does not trust this certificate"
    return name
