"""deploy/haproxy.cfg in a real HAProxy, in front of a stand-in for the SuperLink."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.constant import FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS as OBJ_PULLS
from flwr.supercore.constant import FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES as OBJ_PUSHES
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.retry import make_simple_http_retry_invoker
from loopback import (
    HOST,
    PROXY_CONFIGURATION,
    free_ports,
    make_keys,
    needs_haproxy,
    proxy_environment,
)

from fedgan.deployment.node_keys import fingerprint, public_line

pytestmark = needs_haproxy

CONFIGURATION = PROXY_CONFIGURATION.read_text(encoding="utf-8")
DEFAULTS = dict(re.findall(r"presetenv (\w+) (\S+)", CONFIGURATION))
MANY_NEW = {"sc2_conn_rate gt 200": "sc2_conn_rate gt 20000"}  # a test opens one per request
KEYS = [ec.generate_private_key(ec.SECP384R1()).public_key() for _ in range(4)]
ALPHA, BETA, GAMMA, DELTA = map(public_key_to_bytes, KEYS)


class Upstream:
    """A stand-in for the SuperLink that keeps requests and echoes their bodies.

    `/v1/fleet/halves` sends the second half of its answer once `go` is set.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str], int]] = []
        self.received = 0
        self.go = threading.Event()
        self.healthy = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        path = scope["raw_path"].decode()
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
            self.received += len(message.get("body", b""))
        if path != "/health":
            headers = {key.decode(): value.decode() for key, value in scope["headers"]}
            self.seen.append((path, headers, len(body)))
        status = {
            "/v1/fleet/unknown": 401,
            "/v1/fleet/locked": 500,
            "/v1/fleet/activate-node": 412,
            "/health": 200 if self.healthy else 500,
        }.get(path, 200)
        headers = [(b"x-own", b"1"), (b"keep-alive", b"9")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if path == "/v1/fleet/halves":
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
            end = time.monotonic() + 20
            while not self.go.is_set() and time.monotonic() < end:
                await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def serving(app: Any, keys: Path) -> Iterator[int]:
    """Serve an ASGI app over TLS in a thread; yields its port."""
    (port,) = free_ports(1)
    tls = {"ssl_certfile": keys / "server/server.crt", "ssl_keyfile": keys / "server/server.key"}
    server = uvicorn.Server(
        uvicorn.Config(app, host=HOST, port=port, lifespan="off", log_level="critical", **tls)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield port
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.02)


@contextlib.contextmanager
def proxying(
    folder: Path,
    keys: Path,
    upstream_port: int,
    changes: dict[str, str] | None = None,
    **settings: str,
) -> Iterator[Any]:
    """A running HAProxy: `.port`, `.keys`, `.log()`, `.lines()`.

    `changes` replaces texts of the configuration, each of which must be there once.
    """
    text = CONFIGURATION
    for old, new in (changes or {}).items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    folder.mkdir(exist_ok=True)
    configuration, log, (port,) = folder / "haproxy.cfg", folder / "log", free_ports(1)
    configuration.write_text(text, encoding="utf-8")
    environment = proxy_environment(keys, port, upstream_port) | settings
    with open(log, "wb") as out:
        process = subprocess.Popen(
            ["haproxy", "-db", "-f", configuration], stdout=out, env=os.environ | environment
        )
    running = SimpleNamespace(
        port=port,
        keys=keys,
        upstream_port=upstream_port,
        log=log.read_text,
        lines=lambda: [line for line in log.read_text().splitlines() if "peer=" in line],
    )
    try:
        wait_until(lambda: is_listening(port))
        yield running
        process.terminate()
        assert process.wait(10) in (0, -15)
    finally:
        process.kill()
        process.wait(10)


def is_listening(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((HOST, port), timeout=5).close()
        return True
    return False


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A proxy that accepts bodies of 1 MiB, with `.upstream`."""
    folder = tmp_path_factory.mktemp("proxy")
    keys, upstream = make_keys(folder / "keys"), Upstream()
    with (
        serving(upstream, keys) as port,
        proxying(
            folder / "haproxy", keys, port, MANY_NEW, FEDGAN_PROXY_MAX_BODY=str(2**20)
        ) as proxy,
    ):
        proxy.upstream = upstream
        wait_until(lambda: request(proxy, "GET", "/health")[0] == 200)
        yield proxy


@pytest.fixture
def upstream(running: Any) -> Upstream:
    """The stand-in, reset; the proxy knows the key ALPHA."""
    made: Upstream = running.upstream
    made.healthy = True
    make_known(running, ALPHA)
    made.seen.clear()
    made.go.clear()
    made.received = 0
    return made


def signed(key: bytes = ALPHA, **more: str) -> dict[str, str]:
    """Headers of a new signed request; `more` uses _ for - in names."""
    moment = datetime.datetime.now(datetime.UTC).isoformat()
    headers = {
        "flwr-public-key": base64.b64encode(key).decode(),
        "flwr-timestamp": f"{moment}{threading.get_ident()}",
        "flwr-signature": "s",
    }
    return headers | {name.replace("_", "-"): value for name, value in more.items()}


def connect(running: Any, source: str = HOST) -> http.client.HTTPSConnection:
    """A connection to the proxy, from an address of loopback."""
    context = ssl.create_default_context(cafile=running.keys / "ca.crt")
    return http.client.HTTPSConnection(
        HOST, running.port, context=context, timeout=20, source_address=(source, 0)
    )


def request(
    running: Any,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    source: str = HOST,
) -> tuple[int, bytes, Any]:
    """Status, body and headers of the answer. An answer may come before the body is written."""
    with contextlib.closing(connect(running, source)) as connection:
        with contextlib.suppress(OSError):
            connection.request(method, path, body, headers or {})
        if connection.sock is None:
            raise ConnectionRefusedError("closed before the handshake")
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers


def post(running: Any, method: str, body: Any = b"", headers: dict[str, str] | None = None) -> int:
    """Status of a POST to the fleet API."""
    return request(running, "POST", f"/v1/fleet/{method}", body, headers or signed())[0]


def make_known(running: Any, key: bytes) -> None:
    """Send a heartbeat, by which the proxy learns a key."""
    assert post(running, "send-node-heartbeat", b"short", signed(key)) == 200


def send_raw(running: Any, content: bytes) -> bytes:
    """The first line of the answer to raw bytes; b"" if the connection was closed."""
    context = ssl.create_default_context(cafile=running.keys / "ca.crt")
    with (
        socket.create_connection((HOST, running.port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname=HOST) as tls,
    ):
        with contextlib.suppress(OSError):
            tls.sendall(content)
        try:
            return tls.makefile("rb").readline()
        except OSError:
            return b""


def raw_headers(headers: dict[str, str]) -> bytes:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()


# --- requests that pass ---


def test_configuration_has_under_120_lines_of_100_characters() -> None:
    lines = CONFIGURATION.splitlines()
    assert len(lines) < 120
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("method", ["pull-messages", "activate/node", "v2_x/get-run"])
def test_fleet_requests_pass(running: Any, upstream: Upstream, method: str) -> None:
    assert post(running, method) == 200
    assert [path for path, *_ in upstream.seen] == [f"/v1/fleet/{method}"]


def test_bodies_pass_without_foreign_headers(running: Any, upstream: Upstream) -> None:
    sent = bytes(range(256)) * 3000
    foreign = {
        "X-Forwarded-For": "10.9.9.9",
        "Forwarded": "for=x",
        "X-Real-IP": "10.9.9.9",
        "Cookie": "c=1",
        "Authorization": "Basic x",
        "TE": "trailers",
        "Host": "superlink",
    }
    headers = signed(flwr_package_name="flwr", content_type="application/protobuf") | foreign
    status, body, answered = request(running, "POST", "/v1/fleet/push-object", sent, headers)
    assert (status, body) == (200, sent)
    assert answered["x-own"] == "1"
    assert "keep-alive" not in answered
    ((path, received, length),) = upstream.seen
    assert (path, length) == ("/v1/fleet/push-object", len(sent))
    assert received.keys() == {
        "accept-encoding",
        "content-length",
        "content-type",
        "flwr-public-key",
        "flwr-timestamp",
        "flwr-signature",
        "flwr-package-name",
        "host",
    }
    assert received["host"] == f"{HOST}:{running.upstream_port}"


def test_bodies_stream_in_both_directions(running: Any, upstream: Upstream) -> None:
    def body() -> Iterator[bytes]:
        yield b"a" * 1000
        wait_until(lambda: upstream.received >= 1000)  # before the second piece exists
        yield b"b" * 1000

    with contextlib.closing(connect(running)) as connection:
        connection.request("POST", "/v1/fleet/halves", body(), signed(content_length="2000"))
        answer = connection.getresponse()
        assert answer.read(5) == b"first"
        upstream.go.set()
        assert answer.read() == b"a" * 1000 + b"b" * 1000


# --- paths, methods and headers ---

REFUSED_PATHS = [
    "/",
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/docs",
    "/openapi.json",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet%2f..%2fcontrol/start-run",
    "/v1/fleet/..%2fcontrol",
    "/v1/fleet/%2e%2e%2fcontrol",
    "/v1/fleet/./pull-messages",
    "/v1/fleet/..;/control",
    "/v1/fleet\\..\\control",
    "//v1/control/start-run",
    "/v1//fleet/pull-messages",
    "/v1/fleet//pull-messages",
    "/v1/FLEET/pull-messages",
    "/V1/fleet/pull-messages",
    "/v1/fleet/PULL-messages",
    "/v1/fleet/pull-messages%00",
    "/v1/fleet/pull-messages%0d%0aHost:x",
    "/v1/fleet/pull-messages;x=y",
    "/v1/fleet/pull-messages?a=b",
    "/health?a=b",
    "/v1/fleetx/pull-messages",
    "/v1/control/v1/fleet/pull-messages",
    "/v1/fleet/" + "a" * 200,
    "/health/",
    "/health/../docs",
    "/HEALTH",
    "https://superlink:8000/v1/control/start-run",
    "https://superlink:8000/v1/fleet/pull-messages",
    "superlink:8000",
    "*",
]


def test_other_paths_are_refused_and_logged(running: Any, upstream: Upstream) -> None:
    with contextlib.closing(connect(running)) as connection:
        for path in REFUSED_PATHS:
            for method in ("POST", "GET"):
                sent = signed() | {"Host": "superlink:8000", "Content-Length": "0"}
                connection.putrequest(method, path, skip_host=True)
                for name, value in sent.items():
                    connection.putheader(name, value)
                connection.endheaders()
                answer = connection.getresponse()
                answer.read()
                # HAProxy itself refuses some absolute targets.
                assert answer.status in ((400, 403) if path[0] != "/" else (403,)), path
                logged = path.partition("?")[0][:120]
                if answer.status == 403:
                    line = f"peer={HOST} method={method} path={logged} status=403 "
                    wait_until(lambda line=line: line in running.lines()[-1])
    assert upstream.seen == []


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET /v1/fleet/x\n", 405),
        ("DELETE /v1/fleet/x\n", 405),
        ("TRACE /v1/fleet/x\n", 405),
        ("CONNECT superlink:8000\n", 403),
        ("POST /v1/fleet/x\nUpgrade: websocket", 403),
        ("POST /v1/fleet/x\nConnection: keep-alive, Upgrade", 403),
        ("POST /v1/fleet/x\nConnection: flwr-signature", 403),
        ("POST /v1/fleet/x\nConnection: Upgrade\nUpgrade: h2c", 403),
        ("POST /v1/fleet/x\nX: " + "y" * 30_000, 431),
        ("POST /v1/fleet/x\nX: " + "y" * 1_000_000, 400),
        ("POST /v1/fleet/x\nflwr-timestamp: another", 401),
        ("POST /v1/fleet/x\nContent-Length: 1\nContent-Length: 2", 400),
        ("POST /v1/fleet/x\nContent-Length: 1\nTransfer-Encoding: chunked", 413),
        ("POST /v1/fleet/x\0y\n", 400),
        ("POST /v1/fleet/x#y\n", 400),
    ],
)
def test_other_methods_and_headers_are_refused_and_logged(
    running: Any, upstream: Upstream, head: str, status: int
) -> None:
    before = len(running.lines())
    target, _, fields = head.partition("\n")
    host = "superlink:8000" if target.startswith("CONNECT") else "x"
    lines = [f"{target} HTTP/1.1", f"Host: {host}", *fields.split("\n")]
    content = "\r\n".join(filter(None, lines)).encode() + b"\r\n" + raw_headers(signed())
    answer = send_raw(running, content + b"\r\n")
    # A client that sends a long head may find the connection closed.
    assert answer.split()[1:2] == [str(status).encode()] or (not answer and len(head) > 100_000)
    wait_until(lambda: len(running.lines()) > before)
    assert f"status={status} " in running.lines()[-1]
    assert upstream.seen == []


@pytest.mark.parametrize("missing", ["flwr-public-key", "flwr-timestamp", "flwr-signature"])
def test_unsigned_requests_are_refused(running: Any, upstream: Upstream, missing: str) -> None:
    headers = signed()
    del headers[missing]
    assert post(running, "x", b"", headers) == 401
    assert upstream.seen == []


def test_other_kinds_of_keys_are_refused(running: Any, upstream: Upstream) -> None:
    other = public_key_to_bytes(ec.generate_private_key(ec.SECP256R1()).public_key())
    for key in ("!", "key", base64.b64encode(other).decode()):
        assert post(running, "x", b"", signed(flwr_public_key=key)) == 401
    assert upstream.seen == []


# --- bodies ---


def test_bodies_that_are_large_or_of_unknown_size_are_refused(
    running: Any, upstream: Upstream
) -> None:
    status, body, _ = request(
        running, "POST", "/v1/fleet/push-object", b"x" * (2**20 + 1), signed()
    )
    assert (status, json.loads(body)) == (413, {"detail": "body too large or of unknown size"})
    pieces = (b"x" * 2**17 for _ in range(20))
    assert post(running, "push-object", pieces) == 413  # sent in chunks
    assert (upstream.received, upstream.seen) == (0, [])
    wait_until(lambda: all("status=413 " in line for line in running.lines()[-2:]))
    assert post(running, "push-object", b"x" * 2**20) == 200


# --- replays ---


def test_signed_timestamp_passes_once_and_again_after_a_401(
    running: Any, upstream: Upstream
) -> None:
    headers = signed()
    assert post(running, "unknown", b"", headers) == 401
    assert post(running, "push-messages", b"update", headers) == 200
    assert post(running, "push-messages", b"update", headers) == 403
    assert post(running, "pull-messages", b"", headers | {"flwr-signature": "another"}) == 403
    assert len(upstream.seen) == 2
    wait_until(lambda: 'status=403 end=PR reason="replayed timestamp"' in running.lines()[-1])
    timestamp = {"flwr-timestamp": headers["flwr-timestamp"]}
    assert post(running, "pull-messages", b"", signed(BETA) | timestamp) == 200


def test_another_spelling_of_a_key_is_the_same_key(running: Any, upstream: Upstream) -> None:
    headers = signed()
    key = headers["flwr-public-key"]
    assert key.endswith("o=")  # the last character has two unused bits
    spelled = key.replace("o=", "p=")
    assert base64.b64decode(spelled) == base64.b64decode(key)
    assert post(running, "x", b"", headers) == 200
    assert post(running, "x", b"", headers | {"flwr-public-key": spelled}) == 403


def test_timestamps_are_kept_longer_than_the_superlink_accepts_them() -> None:
    from flwr.supercore.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    (table,) = re.findall(r"backend used\n +stick-table (.+)", CONFIGURATION)
    seconds = int(re.search(r"expire (\d+)s", table).group(1))
    assert seconds > TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
    assert "nopurge" in table


def test_replayed_timestamp_of_an_unknown_key_is_refused(
    running: Any, upstream: Upstream, tmp_path: Path
) -> None:
    with proxying(tmp_path / "unknown", running.keys, running.upstream_port) as proxy:
        headers = signed(BETA)
        assert post(proxy, "x", b"", headers) == 200
        assert post(proxy, "x", b"", headers) == 403


def test_made_up_keys_take_no_place_in_the_table_of_timestamps(
    running: Any, upstream: Upstream, tmp_path: Path
) -> None:
    small = {"len 32 size 100k": "len 32 size 4"}
    with proxying(tmp_path / "full", running.keys, running.upstream_port, small) as proxy:
        make_known(proxy, ALPHA)
        for key in (BETA, GAMMA, DELTA) * 3:
            assert post(proxy, "unknown", b"", signed(key)) == 401
        assert [post(proxy, "x") for _ in range(3)] == [200] * 3
        assert post(proxy, "x") == 503  # the table is full: nothing is forgotten


# --- simultaneous requests ---


def test_no_supernode_reaches_the_limit_of_simultaneous_requests() -> None:
    # A SuperNode also sends a heartbeat and asks for messages.
    assert int(DEFAULTS["FEDGAN_PROXY_MAX_REQUESTS"]) // 2 >= OBJ_PUSHES + OBJ_PULLS + 2


def test_limit_of_simultaneous_requests_is_per_key_and_recovers(
    running: Any, upstream: Upstream, tmp_path: Path
) -> None:
    """The refused hospital tries again as Flower does."""
    stuck, retrying = threading.Event(), threading.Event()

    def slow_body() -> Iterator[bytes]:
        yield b"x"
        assert stuck.wait(20)
        yield b"x"

    def push(key: bytes, body: Any = b"", **more: str) -> int:
        return post(proxy, "push-object", body, signed(key, **more))

    def push_again() -> int:
        status = push(BETA)
        if status == 503:
            retrying.set()
            stuck.set()  # the slow requests finish
        httpx.Response(status, request=httpx.Request("POST", "https://proxy")).raise_for_status()
        return status

    two = {"FEDGAN_PROXY_MAX_REQUESTS": "2"}
    with proxying(tmp_path / "two", running.keys, running.upstream_port, None, **two) as proxy:
        for key in (BETA, GAMMA):
            make_known(proxy, key)
        threads = [
            threading.Thread(target=push, args=(BETA, slow_body()), kwargs={"content_length": "2"})
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: upstream.received >= 12)  # two heartbeats and two bytes
        assert [push(BETA) for _ in range(3)] == [503] * 3
        assert [push(GAMMA) for _ in range(3)] == [200] * 3
        assert push(DELTA) == 200  # unknown: counted by its address
        assert make_simple_http_retry_invoker().invoke(push_again) == 200
        assert retrying.is_set()
        for thread in threads:
            thread.join(20)
        name = fingerprint(public_line(KEYS[1], ""))
        (line,) = [line for line in proxy.lines() if "too many requests" in line]
    assert f'status=503 end=PR reason="too many requests by {name}"' in line


def test_refused_requests_of_a_key_have_one_log_line_in_a_minute(
    running: Any, upstream: Upstream, tmp_path: Path
) -> None:
    one = {"FEDGAN_PROXY_MAX_REQUESTS": "1"}
    with proxying(tmp_path / "one", running.keys, running.upstream_port, None, **one) as proxy:
        for key in (BETA, GAMMA):
            make_known(proxy, key)
        for number, key in enumerate((BETA, GAMMA, BETA), len(upstream.seen) + 1):
            upstream.go.clear()
            thread = threading.Thread(target=post, args=(proxy, "halves", b"", signed(key)))
            thread.start()
            try:
                wait_until(lambda number=number: len(upstream.seen) == number)
                assert [post(proxy, "x", b"", signed(key)) for _ in range(3)] == [503] * 3
            finally:
                upstream.go.set()
                thread.join(20)
        lines = [line for line in proxy.lines() if "too many requests" in line]
    names = [fingerprint(public_line(key, "")) for key in KEYS[1:3]]
    assert [line.rpartition(" by ")[2].rstrip('"') for line in lines] == names


# --- bytes per minute ---


def test_bytes_per_minute_are_limited_per_key_and_heartbeats_pass(
    running: Any, upstream: Upstream, tmp_path: Path
) -> None:
    """A reply of any size is refused before the SuperLink assembles it."""
    limits = {"FEDGAN_PROXY_MAX_BODY": str(2**20), "FEDGAN_PROXY_MAX_MINUTE": str(4 * 2**20)}
    piece = b"x" * 2**20

    def push(key: bytes, body: bytes = piece) -> int:
        return post(proxy, "push-object", body, signed(key))

    with proxying(tmp_path / "few", running.keys, running.upstream_port, None, **limits) as proxy:
        for key in (ALPHA, BETA):
            make_known(proxy, key)
        before = upstream.received
        assert [push(ALPHA) for _ in range(20)] == [200] * 4 + [503] * 16
        assert upstream.received - before == 4 * 2**20
        make_known(proxy, ALPHA)  # a heartbeat: the hospital stays online
        assert [push(BETA) for _ in range(4)] == [200] * 4
        (line,) = [line for line in proxy.lines() if "too many bytes" in line]
    assert (
        f'status=503 end=PR reason="too many bytes by {fingerprint(public_line(KEYS[0], ""))}'
        in line
    )


def test_short_requests_are_limited_per_minute(
    running: Any, upstream: Upstream, tmp_path: Path
) -> None:
    few = {"sc1_http_req_rate gt 600": "sc1_http_req_rate gt 5"}
    with proxying(tmp_path / "short", running.keys, running.upstream_port, few) as proxy:
        make_known(proxy, ALPHA)
        assert [post(proxy, "x") for _ in range(8)] == [200] * 4 + [503] * 4


# --- unknown keys ---


def test_unknown_keys_may_send_a_short_body_only(running: Any, upstream: Upstream) -> None:
    long, known = b"x" * 100_000, len(upstream.seen)
    assert post(running, "push-object", long, signed(DELTA)) == 503
    assert len(upstream.seen) == known
    make_known(running, DELTA)
    assert post(running, "push-object", long, signed(DELTA)) == 200


def test_only_a_200_makes_a_key_known(running: Any, upstream: Upstream) -> None:
    long = b"x" * 100_000
    for method in ("unknown", "locked"):
        post(running, method, b"", signed(GAMMA))
        assert post(running, "x", long, signed(GAMMA)) == 503
    make_known(running, GAMMA)
    assert post(running, "x", long, signed(GAMMA)) == 200


def test_unknown_keys_of_an_address_cannot_fail_without_end(
    running: Any, upstream: Upstream, tmp_path: Path
) -> None:
    few = {"sc2_http_err_rate gt 200": "sc2_http_err_rate gt 5"}
    with proxying(tmp_path / "few", running.keys, running.upstream_port, few) as proxy:
        make_known(proxy, ALPHA)
        codes = [post(proxy, "unknown", b"", signed(BETA)) for _ in range(8)]
        assert codes[0] == 401
        assert codes[-1] == 503
        assert post(proxy, "unknown", b"", signed(ALPHA)) == 401


# --- the SuperLink ---


def test_a_500_of_the_superlink_becomes_503(running: Any, upstream: Upstream) -> None:
    """A SuperNode repeats a request after 503, and drops its update after 500."""
    assert post(running, "locked", b"update") == 503
    wait_until(lambda: "path=/v1/fleet/locked status=503 " in running.lines()[-1])
    assert 'reason="answered 500, signed 20' in running.lines()[-1]


def test_the_log_shows_the_minute_that_a_refused_hospital_signed(
    running: Any, upstream: Upstream
) -> None:
    assert (
        post(running, "unknown", b"", signed(flwr_timestamp="2001-02-03T04:05:06.7+00:00")) == 401
    )
    wait_until(lambda: "path=/v1/fleet/unknown status=401 " in running.lines()[-1])
    assert running.lines()[-1].endswith('reason="answered 401, signed 2001-02-03T04:05"')


def test_health_is_the_superlinks_health(running: Any, upstream: Upstream) -> None:
    lines = len(running.lines())
    assert request(running, "GET", "/health")[0] == 200
    assert request(running, "HEAD", "/health")[:2] == (200, b"")
    upstream.healthy = False
    wait_until(lambda: request(running, "GET", "/health")[0] == 503, 10)
    upstream.healthy = True
    wait_until(lambda: request(running, "GET", "/health")[0] == 200, 10)
    assert len(running.lines()) == lines


def test_an_upstream_of_another_authority_is_not_used(
    running: Any, upstream: Upstream, tmp_path: Path
) -> None:
    keys = make_keys(tmp_path / "other")
    with proxying(tmp_path / "wrong", keys, running.upstream_port, MANY_NEW) as proxy:
        wait_until(lambda: request(proxy, "GET", "/health")[0] == 503)
        assert post(proxy, "push-object", b"x") == 503
        wait_until(lambda: "path=/v1/fleet/push-object status=503 end=SC" in proxy.log())
        assert "SSL handshake failure" in proxy.log()
    assert upstream.seen == []


# --- connections ---


def test_plain_http_is_refused_and_logged(running: Any) -> None:
    with socket.create_connection((HOST, running.port), timeout=20) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP" not in plain.recv(1000)
    wait_until(lambda: "http request" in running.lines()[-1])
    assert f"peer={HOST} " in running.lines()[-1]


def test_a_client_with_another_authority_is_logged(running: Any, tmp_path: Path) -> None:
    other = ssl.create_default_context(cafile=make_keys(tmp_path / "other") / "ca.crt")
    with (
        socket.create_connection((HOST, running.port), timeout=20) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        other.wrap_socket(plain, server_hostname=HOST)
    wait_until(lambda: "SSL handshake failure" in running.lines()[-1])


def test_old_versions_of_tls_are_refused(running: Any) -> None:
    context = ssl.create_default_context(cafile=running.keys / "ca.crt")
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection((HOST, running.port), timeout=20) as plain,
        pytest.raises(OSError, match=r"PROTOCOL_VERSION|reset|NO_PROTOCOLS"),
    ):
        context.wrap_socket(plain, server_hostname=HOST)


def test_slow_connections_are_closed(running: Any, upstream: Upstream, tmp_path: Path) -> None:
    small = {
        "timeout client 10s": "timeout client 500ms",
        "timeout http-request 5s": "timeout http-request 500ms",
        "timeout http-keep-alive 15s": "timeout http-keep-alive 500ms",
        "timeout server 60s": "timeout server 1s",
        "wait-for-body time 10s": "wait-for-body time 500ms",
    }
    with proxying(tmp_path / "small", running.keys, running.upstream_port, small) as proxy:
        # a handshake that does not begin
        with (
            socket.create_connection((HOST, proxy.port), timeout=10) as silent,
            contextlib.suppress(ConnectionResetError),
        ):
            assert silent.recv(1) == b""
        assert "Timeout during SSL handshake" in proxy.log()
        # a head, and a body of an unknown key, that do not end
        head = b"POST /v1/fleet/x HTTP/1.1\r\nHost: x\r\n"
        assert send_raw(proxy, head).split()[1:2] == [b"408"]
        head += b"Content-Length: 9\r\n"
        assert b" 408 " in send_raw(proxy, head + raw_headers(signed()) + b"\r\nx")
        assert upstream.seen == []
        # a body of a known key that does not go on
        make_known(proxy, ALPHA)
        assert b" 504 " in send_raw(proxy, head + raw_headers(signed()) + b"\r\nx")
        # a connection that stays idle after an answer
        with contextlib.closing(connect(proxy)) as idle:
            idle.request("POST", "/v1/fleet/x", b"", signed())
            idle.getresponse().read()
            assert idle.sock.recv(1) == b""


def idle_connections(port: int, source: str, count: int, stack: contextlib.ExitStack) -> int:
    """Open silent connections from an address; how many of them the proxy keeps open."""
    sockets, kept = [], 0
    for _ in range(count):
        with contextlib.suppress(ConnectionResetError):
            made = socket.create_connection((HOST, port), 20, source_address=(source, 0))
            sockets.append(stack.enter_context(made))
    time.sleep(0.5)  # the proxy closes the surplus at once
    for each in sockets:
        each.setblocking(False)
        try:
            each.recv(1)
        except BlockingIOError:
            kept += 1
        except ConnectionResetError:
            pass
    return kept


def test_one_address_cannot_take_the_places_of_all(running: Any, tmp_path: Path) -> None:
    with (
        proxying(tmp_path / "idle", running.keys, running.upstream_port) as proxy,
        contextlib.ExitStack() as stack,
    ):
        assert idle_connections(proxy.port, "127.0.0.2", 256, stack) == 64
        assert post(proxy, "x") == 200  # another address


def test_last_places_are_for_addresses_of_known_keys(running: Any, tmp_path: Path) -> None:
    few = {"fe_conn gt 192": "fe_conn gt 2"}
    with (
        proxying(tmp_path / "last", running.keys, running.upstream_port, few) as proxy,
        contextlib.ExitStack() as stack,
    ):
        make_known(proxy, ALPHA)
        time.sleep(0.2)  # its connection is closed
        for stranger, kept in (("127.0.0.2", 1), ("127.0.0.3", 1), ("127.0.0.4", 0)):
            assert idle_connections(proxy.port, stranger, 1, stack) == kept
        assert post(proxy, "x") == 200


def test_connections_of_all_addresses_are_limited(running: Any, tmp_path: Path) -> None:
    few = {"fe_conn gt 256": "fe_conn gt 2"}
    with (
        proxying(tmp_path / "all", running.keys, running.upstream_port, few) as proxy,
        contextlib.ExitStack() as stack,
    ):
        for stranger, kept in (("127.0.0.2", 1), ("127.0.0.3", 1), ("127.0.0.4", 0)):
            assert idle_connections(proxy.port, stranger, 1, stack) == kept


def test_new_connections_of_an_address_are_limited(running: Any, tmp_path: Path) -> None:
    few = {"sc2_conn_rate gt 200": "sc2_conn_rate gt 5"}
    with proxying(tmp_path / "new", running.keys, running.upstream_port, few) as proxy:
        codes = [quiet_health(proxy, "127.0.0.2") for _ in range(8)]
        assert codes[-3:] == [None] * 3
        assert quiet_health(proxy) is not None


def test_limits_of_connections_can_be_set(running: Any, tmp_path: Path) -> None:
    two = {"FEDGAN_PROXY_MAX_CONNECTIONS": "2"}
    with (
        proxying(tmp_path / "two", running.keys, running.upstream_port, None, **two) as proxy,
        contextlib.ExitStack() as stack,
    ):
        assert idle_connections(proxy.port, "127.0.0.2", 5, stack) == 2


def quiet_health(running: Any, source: str = HOST) -> int | None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return request(running, "GET", "/health", source=source)[0]
    return None


# --- the log, and errors at the start ---


def test_the_log_has_no_queries_headers_or_bodies(running: Any, upstream: Upstream) -> None:
    headers = signed(cookie="secret-cookie")
    request(running, "POST", "/v1/fleet/x?secret-query", b"secret-body", headers)
    post(running, "unknown", b"secret-body", headers)
    wait_until(lambda: "path=/v1/fleet/unknown" in running.lines()[-1])
    text = running.log()
    assert "secret" not in text
    assert not [value for value in headers.values() if len(value) > 10 and value in text]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"FEDGAN_PROXY_LISTEN": "nowhere.invalid:1"}, "invalid address"),
        ({"FEDGAN_PROXY_KEYS": "/nowhere"}, "/nowhere/proxy.pem"),
        ({"FEDGAN_PROXY_MAX_BODY": "16 MiB"}, "'16 MiB'"),
        ({"FEDGAN_PROXY_LISTEN": "taken"}, "cannot bind socket"),
    ],
)
def test_errors_at_the_start_name_the_cause(
    running: Any, settings: dict[str, str], text: str
) -> None:
    with socket.create_server((HOST, 0)) as taken:
        address = f"{HOST}:{taken.getsockname()[1]}"
        chosen = {name: value.replace("taken", address) for name, value in settings.items()}
        ports = free_ports(1)[0], running.upstream_port
        done = subprocess.run(
            ["haproxy", "-db", "-f", PROXY_CONFIGURATION],
            env=os.environ | proxy_environment(running.keys, *ports) | chosen,
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert done.returncode == 1
    assert text.casefold() in done.stderr.casefold()
