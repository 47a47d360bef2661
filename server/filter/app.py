"""Passes a hospital's request on to the SuperLink and the answer back; tells about health; refuses everything else."""

from __future__ import annotations

import asyncio
import datetime
import time

import httpx
from starlette.types import Receive, Scope, Send

from server.filter.exchange import Bounds, ClientLeft, Exchange, too_large
from server.filter.journal import Journal
from server.filter.once import Once
from server.filter.rules import HEALTH, TIMESTAMP, Refused, check, onward
from server.filter.share import MOST, STRANGER_BYTES, STRANGER_SECONDS, Shares, too_long_yet

UPSTREAM_CONNECTIONS = 64
UPSTREAM_TIMEOUT = httpx.Timeout(connect=5, read=60, write=60, pool=10)
REQUEST_SECONDS = 600.0  # the longest time of one request
HEALTH_SECONDS = 2.0  # how long an answer about health holds: probes shall not multiply


class Filter:
    """The ASGI application. `upstream` is a client whose base_url is the SuperLink, with TLS verified against the CA.

    502, 503 and 504 are what a SuperNode tries again after; 401 ends it, 403 ends its run.
    """

    def __init__(
        self, upstream: httpx.AsyncClient, max_body: int, journal: Journal, most: int = MOST
    ) -> None:
        self.upstream, self.max_body, self.journal = upstream, max_body, journal
        self.once, self.shares = Once(), Shares(most)
        self.health_lock = asyncio.Lock()
        self.health = (float("-inf"), False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, and log it where it is refused or fails."""
        exchange = Exchange(scope, receive, send)
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                await self._answer(exchange)
        except Refused as refusal:
            await self._refuse("refused", refusal, exchange)
        except TimeoutError:
            await self._refuse(
                "refused", Refused(408, f"the request took over {REQUEST_SECONDS:g} s"), exchange
            )
        except httpx.PoolTimeout:
            await self._refuse("failed", Refused(503, "too many requests at once"), exchange)
        except httpx.TimeoutException:
            await self._refuse("failed", Refused(504, "the SuperLink does not answer"), exchange)
        except httpx.TransportError as error:
            await self._refuse(
                "failed",
                Refused(502, f"the SuperLink cannot be reached ({type(error).__name__})"),
                exchange,
            )
        except ClientLeft:
            self._log(
                "left",
                exchange,
                None,
                "the client closed the connection in the middle of its request",
            )

    async def _answer(self, exchange: Exchange) -> None:
        check(exchange.method, exchange.path, exchange.query, exchange.headers)
        with self.shares.place(exchange.headers, exchange.peer):
            await self._answer_in_place(exchange)

    async def _answer_in_place(self, exchange: Exchange) -> None:
        if exchange.path == HEALTH:
            reachable = await self._reachable()
            await exchange.answer(
                {"filter": "ok", "superlink": "ok" if reachable else "unreachable"},
                200 if reachable else 503,
            )
            return
        bounds = Bounds(self.max_body, too_large(self.max_body))
        if self.shares.is_stranger(exchange.headers):
            bounds = Bounds(min(STRANGER_BYTES, self.max_body), too_long_yet(), STRANGER_SECONDS)
        if int(dict(exchange.headers).get(b"content-length", b"0")) > bounds.most:
            raise bounds.over
        mark = self.once.take(exchange.headers)
        response = await self._pass_on(exchange, bounds)
        try:
            if response.status_code == 401:
                self.once.give_back(mark)
            if response.status_code == 200:
                self.shares.know(exchange.headers)
            if response.status_code >= 400:
                self._log(
                    "answered",
                    exchange,
                    response.status_code,
                    _reason(response.status_code, exchange),
                )
            await exchange.relay(response)
        finally:
            await response.aclose()

    async def _pass_on(self, exchange: Exchange, bounds: Bounds) -> httpx.Response:
        """Send the request on; returns the answer with its body still to be read."""
        request = (
            httpx.Request(  # not the client's build_request, which would add headers of its own
                exchange.method,
                self.upstream.base_url.join(exchange.path.decode("ascii")),
                headers=onward(exchange.headers),
                content=exchange.body(bounds),
                extensions={"timeout": UPSTREAM_TIMEOUT.as_dict()},
            )
        )
        return await self.upstream.send(request, stream=True)

    async def _reachable(self) -> bool:
        """Whether the SuperLink answers its own /health."""
        async with self.health_lock:
            asked, reachable = self.health
            if time.monotonic() - asked > HEALTH_SECONDS:
                try:
                    reachable = (await self.upstream.get("/health", timeout=3)).status_code == 200
                except httpx.HTTPError:
                    reachable = False
                self.health = (time.monotonic(), reachable)
        return reachable

    async def _refuse(self, event: str, refusal: Refused, exchange: Exchange) -> None:
        if not refusal.quiet:
            self._log(event, exchange, refusal.status, refusal.reason)
        if (
            not exchange.begun
        ):  # else uvicorn closes the connection: the client sees an answer that is cut off
            await exchange.refuse(refusal)

    def _log(self, event: str, exchange: Exchange, status: int | None, reason: str) -> None:
        self.journal.write(event, exchange.peer, exchange.method, exchange.path, status, reason)


def _reason(status: int, exchange: Exchange) -> str:
    """What the log says where the SuperLink itself refused; of a signature, how far the hospital's clock is off."""
    if exchange.path.endswith(b"/activate-node") and status == 412:
        return "not activated by the SuperLink: key not registered, or revoked, or its last session has yet to expire"
    if status != 401:
        return "refused by the SuperLink"
    try:
        signed = datetime.datetime.fromisoformat(dict(exchange.headers)[TIMESTAMP].decode("ascii"))
        off = (datetime.datetime.now(datetime.UTC) - signed).total_seconds()
    except (ValueError, TypeError):
        return "refused by the SuperLink: its timestamp cannot be read"
    if not -5 < off < 305:
        return f"refused by the SuperLink: signed {abs(off):.0f} s {'ago' if off > 0 else 'ahead'}, check the clock of the hospital"
    return "refused by the SuperLink: unknown or revoked key, or a wrong signature"
