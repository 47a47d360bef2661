"""python -m server.filter --listen 0.0.0.0:8443 --upstream https://superlink:8000 --certificate … --key … --ca …"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import ssl
import sys
from pathlib import Path

import httpx
import uvicorn

from fedgan.errors import ConfigError, FedganError, MachineError
from server.filter.app import UPSTREAM_CONNECTIONS, Filter
from server.filter.door import Door
from server.filter.journal import Journal
from server.filter.share import MOST

KEEP_ALIVE_SECONDS = 30
UPSTREAM_KEEP_ALIVE_SECONDS = (
    2.0  # below the SuperLink's five: a connection that it has just closed is not used again
)


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit code; an error is one or two lines on standard error."""
    options = _parse(arguments)
    try:
        host, port = _address(options.listen)
        if options.max_at_once < 1:
            raise ConfigError(
                f"--max-at-once {options.max_at_once} would let nobody through: give 1 or more ({MOST} if not given)"
            )
        listening = _bind(host, port)
        with listening:
            asyncio.run(_serve(options, listening))
    except FedganError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m server.filter",
        description="Lets hospitals reach the fleet API and /health only.",
    )
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        default="0.0.0.0:8443",
        help="where hospitals connect (TLS)",
    )
    parser.add_argument(
        "--upstream", metavar="URL", required=True, help="the SuperLink, https://HOST:PORT"
    )
    parser.add_argument(
        "--certificate", metavar="PEM", type=Path, required=True, help="the filter's certificate"
    )
    parser.add_argument("--key", metavar="PEM", type=Path, required=True, help="its private key")
    parser.add_argument(
        "--ca",
        metavar="PEM",
        type=Path,
        required=True,
        help="the CA that the SuperLink's certificate is checked against",
    )
    parser.add_argument(
        "--max-body-mib",
        metavar="N",
        type=float,
        default=16,
        help="largest request body; Flower cuts arrays into 5 MiB",
    )
    parser.add_argument(
        "--max-at-once",
        metavar="N",
        type=int,
        default=MOST,
        help="requests of one hospital that may run at the same time",
    )
    parser.add_argument("--json-logs", action="store_true", help="one JSON object a line")
    return parser.parse_args(arguments)


async def _serve(options: argparse.Namespace, listening: socket.socket) -> None:
    journal = Journal(options.json_logs)
    door: type[Door] = type(
        "Door",
        (Door,),
        {
            "tls": _server_tls(options.certificate, options.key),
            "journal": journal,
            "open_doors": set(),
        },
    )
    upstream = httpx.AsyncClient(
        base_url=_https(options.upstream),
        verify=_upstream_tls(options.ca),
        trust_env=False,
        follow_redirects=False,
        limits=httpx.Limits(
            max_connections=UPSTREAM_CONNECTIONS, keepalive_expiry=UPSTREAM_KEEP_ALIVE_SECONDS
        ),
    )
    logging.basicConfig(
        level=logging.ERROR
    )  # uvicorn's and httpx's own lines hold paths and queries uncleaned
    async with upstream:
        config = uvicorn.Config(
            Filter(upstream, int(options.max_body_mib * 2**20), journal, options.max_at_once),
            http=door,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=5,
        )
        host, port = listening.getsockname()[:2]
        journal.write("started", reason=f"listening on {host}:{port}")
        try:
            await uvicorn.Server(config).serve(sockets=[listening])
        finally:
            journal.write("stopped")


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or not 0 <= int(port) < 2**16:
        raise ConfigError(f"--listen {text} is no HOST:PORT: write it as 0.0.0.0:8443")
    return host.strip("[]"), int(port)


def _https(url: str) -> str:
    parsed = httpx.URL(url)
    if parsed.scheme != "https" or not parsed.host or parsed.path not in ("", "/"):
        raise ConfigError(
            f"--upstream {url} is not of the form https://HOST:PORT: the SuperLink is spoken to over TLS only"
        )
    return url


def _bind(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
        )
    except OSError as error:
        raise MachineError(
            f"cannot listen on {host}:{port}: {error.strerror or error}\ngive another address with --listen"
        ) from error


def _server_tls(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # SSLError too
        raise ConfigError(
            f"{certificate} and {key} are no certificate and key that belong together: {_short(error)}"
        ) from error
    return context


def _upstream_tls(ca: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(ca))
    except OSError as error:
        raise ConfigError(f"{ca} holds no CA certificate: {_short(error)}") from error


def _short(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or type(error).__name__


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(0)
    )  # uvicorn ends its work first, then sends itself the signal again
    sys.exit(main())
