"""The path filter before a stand-in for the SuperLink: what passes, what does not, and that pieces pass as they come."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.constant import FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS as OBJ_PULLS
from flwr.supercore.constant import FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES as OBJ_PUSHES
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.retry import make_simple_http_retry_invoker
from loopback import HOST, REPOSITORY, free_ports, make_keys

from fedgan.deployment.node_keys import fingerprint
from fedgan.errors import ConfigError, MachineError
from server.filter import __main__ as program
from server.filter import app, door
from server.filter.journal import Journal, clean
from server.filter.once import Once
from server.filter.rules import Refused, backward, check, onward
from server.filter.share import MOST, Shares

SIGNED = [
    (b"flwr-public-key", base64.b64encode(b"key")),
    (b"flwr-timestamp", b"t"),
    (b"flwr-signature", b"s"),
]

# --- rules ------------------------------------------------------------------------------------------------

TRICKS = [
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
    "/v1/fleet/pull-messages#x",
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


@pytest.mark.parametrize("path", TRICKS)
def test_no_other_path_passes(path: str) -> None:
    for method in ("POST", "GET"):
        with pytest.raises(Refused) as refused:
            check(method, path.encode(), b"", SIGNED)
        assert refused.value.status == 403


@pytest.mark.parametrize(
    "path", ["/v1/fleet/pull-messages", "/v1/fleet/activate-node", "/v1/fleet/v2_x/get-run"]
)
def test_the_fleet_api_passes(path: str) -> None:
    check("POST", path.encode(), b"", SIGNED)
    check("GET", b"/health", b"", [])


@pytest.mark.parametrize(
    ("method", "path", "query", "headers", "status"),
    [
        ("GET", b"/v1/fleet/pull-messages", b"", SIGNED, 405),
        ("DELETE", b"/v1/fleet/pull-messages", b"", SIGNED, 405),
        ("CONNECT", b"/v1/fleet/pull-messages", b"", SIGNED, 405),
        ("POST", b"/health", b"", [], 405),
        ("POST", b"/v1/fleet/pull-messages", b"a=b", SIGNED, 403),
        ("POST", b"/v1/fleet/pull-messages", b"", [*SIGNED, (b"upgrade", b"websocket")], 403),
        (
            "POST",
            b"/v1/fleet/pull-messages",
            b"",
            [*SIGNED, (b"connection", b"keep-alive, Upgrade")],
            403,
        ),
        ("GET", b"/health", b"", [(b"upgrade", b"h2c")], 403),
        (
            "POST",
            b"/v1/fleet/x",
            b"",
            [*SIGNED, (b"content-length", b"1"), (b"transfer-encoding", b"chunked")],
            400,
        ),
        ("POST", b"/v1/fleet/x", b"", SIGNED[:2], 401),
        ("POST", b"/v1/fleet/x", b"", [*SIGNED, (b"flwr-timestamp", b"another")], 401),
    ],
)
def test_other_methods_queries_upgrades_and_unsigned_requests_are_refused(
    method: str, path: bytes, query: bytes, headers: Any, status: int
) -> None:
    with pytest.raises(Refused) as refused:
        check(method, path, query, headers)
    assert refused.value.status == status


def test_only_named_headers_go_on_and_none_of_one_connection_either_way() -> None:
    told = [(b"content-type", b"application/protobuf"), (b"flwr-package-version", b"1.41.0")]
    kept_here = [
        b"host",
        b"cookie",
        b"authorization",
        b"forwarded",
        b"x-forwarded-for",
        b"x-real-ip",
        b"te",
        b"connection",
        b"expect",
    ]
    assert onward([*told, *((name, b"x") for name in kept_here)]) == told
    assert onward([*SIGNED, (b"connection", b"flwr-signature")]) == SIGNED[:2]
    answered = [
        (b"Content-Type", b"a"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Keep-Alive", b"5"),
        (b"X", b"y"),
        (b"Connection", b"x"),
    ]
    assert backward(answered) == [(b"content-type", b"a")]


# --- once -------------------------------------------------------------------------------------------------


def signed(
    key: bytes = b"key", timestamp: str = "t", signature: str = "s"
) -> list[tuple[bytes, bytes]]:
    return [
        (b"flwr-public-key", base64.b64encode(key)),
        (b"flwr-timestamp", timestamp.encode()),
        (b"flwr-signature", signature.encode()),
    ]


def test_a_signed_timestamp_passes_once_whatever_its_signature_looks_like() -> None:
    once = Once()
    once.take(signed())
    with pytest.raises(Refused, match="replayed"):
        once.take(signed(signature="another form of it"))
    once.take(signed(timestamp="t2"))
    once.take(signed(key=b"another key"))


def test_another_spelling_of_the_key_does_not_make_it_another_key() -> None:
    once = Once()
    once.take([(b"flwr-public-key", b"a2V5MQ=="), *signed()[1:]])
    with pytest.raises(Refused, match="replayed"):
        once.take(
            [(b"flwr-public-key", b"a2V5MR=="), *signed()[1:]]
        )  # its unused bits set: the same bytes
    with pytest.raises(Refused, match="base64"):
        once.take([(b"flwr-public-key", b"!"), *signed()[1:]])


def test_what_the_superlink_did_not_take_is_given_back() -> None:
    once = Once()
    once.give_back(once.take(signed()))
    once.take(signed())


def test_old_timestamps_are_forgotten_and_new_ones_refused_where_there_is_no_room() -> None:
    now = 0.0
    once = Once(kept=320, room=2, clock=lambda: now)
    once.take(signed(timestamp="1"))
    now = 300
    once.take(signed(timestamp="2"))
    with pytest.raises(Refused) as refused:
        once.take(signed(timestamp="3"))
    assert refused.value.status == 503
    now = 321
    once.take(signed(timestamp="3"))
    assert len(once.used) == 2


# --- shares -----------------------------------------------------------------------------------------------


def refused_by(shares: Shares, headers: Any, peer: str = "10.0.0.1") -> Refused:
    with pytest.raises(Refused) as refused, shares.place(headers, peer):
        pass
    assert refused.value.status == 503
    return refused.value


def test_a_key_has_no_more_than_its_share_and_takes_nothing_from_another() -> None:
    shares = Shares(most=2)
    for key in (b"one", b"two"):
        shares.know(signed(key))
    with shares.place(signed(b"one"), "10.0.0.1"), shares.place(signed(b"one"), "10.0.0.2"):
        refused_by(shares, signed(b"one"), "10.0.0.3")
        with shares.place(signed(b"two"), "10.0.0.1"), shares.place(signed(b"two"), "10.0.0.1"):
            pass
    with shares.place(signed(b"one"), "10.0.0.1"):
        pass
    assert not shares.running


def test_keys_that_the_superlink_has_not_taken_are_counted_by_their_address() -> None:
    shares = Shares(most=2)
    shares.know(signed(b"hospital"))
    with shares.place(signed(b"made up"), "10.0.0.1"), shares.place(signed(b"another"), "10.0.0.1"):
        assert "from this address" in str(refused_by(shares, signed(b"a third"), "10.0.0.1"))
        with (
            shares.place(signed(b"hospital"), "10.0.0.1"),
            shares.place(signed(b"not known yet"), "10.0.0.2"),
        ):
            pass


def test_a_key_that_the_superlink_has_not_taken_may_send_what_is_short(
    running: Any, upstream: Upstream
) -> None:
    long = b"x" * 100_000
    assert ask(running, "POST", "/v1/fleet/push-object", long, fresh())[0] == 503
    assert not upstream.seen
    assert ask(running, "POST", "/v1/fleet/send-node-heartbeat", b"short", fresh())[0] == 200
    assert ask(running, "POST", "/v1/fleet/push-object", long, fresh())[0] == 200


def test_what_names_no_key_is_counted_by_its_address() -> None:
    shares = Shares(most=1)
    with shares.place([], "10.0.0.1"), shares.place([], "10.0.0.2"):
        assert "from this address" in str(refused_by(shares, [], "10.0.0.2"))


def test_a_burst_has_one_line_and_the_next_one_another() -> None:
    shares = Shares(most=1)
    for _ in range(2):
        with shares.place(signed(), "10.0.0.1"):
            assert [refused_by(shares, signed()).quiet for _ in range(3)] == [False, True, True]


def test_the_line_names_a_hospital_s_key_as_ssh_keygen_does() -> None:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    shares, headers = Shares(most=1), signed(public_key_to_bytes(key))
    shares.know(headers)
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    with shares.place(headers, "10.0.0.1"):
        assert str(refused_by(shares, headers)).endswith(f"by the key {fingerprint(line)}")


def test_no_supernode_meets_its_share() -> None:
    assert OBJ_PUSHES + OBJ_PULLS + 2 <= MOST // 2  # and a heartbeat, and a question for messages


# --- journal ----------------------------------------------------------------------------------------------


def test_a_line_of_the_log_holds_no_control_characters_and_is_bounded() -> None:
    assert (
        clean(b'/a\r\nfake "line\x1b[2J\xff\\', 100)
        == "/a\\x0d\\x0afake\\x20\\x22line\\x1b[2J\\xff\\x5c"
    )
    assert len(clean(b"\x00" * 10_000, 120)) <= 123
    for as_json in (False, True):
        out = io.StringIO()
        Journal(as_json, out).write(
            "refused", "10.0.0.1", "G" * 99, b"/\n" + b"x" * 9999, 403, "why\nso"
        )
        assert out.getvalue().count("\n") == 1
        assert len(out.getvalue()) < 350
        assert "/\\x0axxx" in (json.loads(out.getvalue())["path"] if as_json else out.getvalue())


# --- a filter that runs -----------------------------------------------------------------------------------


class Upstream:
    """A stand-in for the SuperLink: keeps what it is sent, echoes bodies; `go` lets the halves of /v1/fleet/halves pass."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str], int]] = []
        self.pieces = 0
        self.go = threading.Event()
        self.healthy = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
            self.pieces += len(message.get("body", b""))
        path = scope["raw_path"].decode()
        if path != "/health":
            self.seen.append(
                (path, {key.decode(): value.decode() for key, value in scope["headers"]}, len(body))
            )
        status = {
            "/v1/fleet/unknown": 401,
            "/v1/fleet/locked": 500,
            "/health": 200 if self.healthy else 500,
        }.get(path, 200)
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"x-own", b"1"), (b"keep-alive", b"9")],
            }
        )
        if path == "/v1/fleet/halves":
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
            end = time.monotonic() + 20
            while not self.go.is_set() and time.monotonic() < end:
                await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def serving(app: Any, keys: Path) -> Iterator[int]:
    """An ASGI app over TLS in a thread; yields its port."""
    (port,) = free_ports(1)
    tls = {"ssl_certfile": keys / "server/server.crt", "ssl_keyfile": keys / "server/server.key"}
    server = uvicorn.Server(
        uvicorn.Config(app, host=HOST, port=port, lifespan="off", log_level="critical", **tls)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield port
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def command(keys: Path, port: int, upstream: int, *more: str) -> list[str]:
    server = keys / "server"
    tls = [
        "--certificate",
        f"{server}/server.crt",
        "--key",
        f"{server}/server.key",
        "--ca",
        f"{server}/ca.crt",
    ]
    return ["--listen", f"{HOST}:{port}", "--upstream", f"https://{HOST}:{upstream}", *tls, *more]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A filter of 1 MiB as a process: `.port`, `.keys`, `.upstream`, `.log()`."""
    folder = tmp_path_factory.mktemp("filter")
    keys, upstream = make_keys(folder / "keys", []), Upstream()
    (port,) = free_ports(1)
    with serving(upstream, keys) as upstream_port, open(folder / "log", "wb") as log:
        words = command(keys, port, upstream_port, "--max-body-mib", "1", "--json-logs")
        process = subprocess.Popen(
            [sys.executable, "-m", "server.filter", *words], stdout=log, stderr=log, cwd=REPOSITORY
        )
        try:
            until(lambda: b"started" in (folder / "log").read_bytes())
            yield SimpleNamespace(
                port=port,
                keys=keys,
                upstream=upstream,
                log=(folder / "log").read_text,
                upstream_port=upstream_port,
            )
            process.terminate()
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.wait(10)
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    assert (lines[0]["event"], lines[-1]["event"]) == ("started", "stopped")


@pytest.fixture
def upstream(running: Any) -> Upstream:
    """The stand-in, with nothing seen yet."""
    made: Upstream = running.upstream
    made.seen.clear()
    made.go.clear()
    made.healthy, made.pieces = True, 0
    return made


def fresh(**more: str) -> dict[str, str]:
    """Headers of a request that nobody has sent before."""
    return {
        name.decode(): value.decode() for name, value in signed(timestamp=str(time.monotonic_ns()))
    } | more


def connect(running: Any) -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=running.keys / "ca.crt")
    return http.client.HTTPSConnection(HOST, running.port, context=context, timeout=20)


def ask(
    running: Any, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes, Any]:
    with contextlib.closing(connect(running)) as connection:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers


def raw(running: Any, request: bytes) -> bytes:
    """The first line of the answer to bytes that no HTTP library would send; empty where the door was shut before it was read."""
    context = ssl.create_default_context(cafile=running.keys / "ca.crt")
    with (
        socket.create_connection((HOST, running.port), timeout=20) as plain,
        context.wrap_socket(plain, server_hostname=HOST) as tls,
    ):
        with contextlib.suppress(OSError):
            tls.sendall(request)
        try:
            return tls.makefile("rb").readline()
        except OSError:
            return b""


def last_refusals(running: Any) -> list[dict[str, Any]]:
    return [
        event
        for line in running.log().splitlines()
        if (event := json.loads(line))["event"] == "refused"
    ]


def test_a_body_passes_both_ways_without_the_headers_that_are_nobody_s_business(
    running: Any, upstream: Upstream
) -> None:
    sent = bytes(range(256)) * 3000
    strange = {
        "X-Forwarded-For": "10.9.9.9",
        "Forwarded": "for=x",
        "Cookie": "c=1",
        "Authorization": "Basic x",
        "Host": "superlink",
    }
    ask(running, "POST", "/v1/fleet/send-node-heartbeat", b"", fresh())  # by which the key is known
    upstream.seen.clear()
    status, body, headers = ask(
        running,
        "POST",
        "/v1/fleet/push-object",
        sent,
        fresh(**{"flwr-package-name": "flwr"}, **strange),
    )
    assert (status, body) == (200, sent)
    assert headers["x-own"] == "1"
    assert "keep-alive" not in headers
    ((path, told, length),) = upstream.seen
    assert (path, length) == ("/v1/fleet/push-object", len(sent))
    assert told.keys() == {
        "accept-encoding",
        "content-length",
        "flwr-public-key",
        "flwr-timestamp",
        "flwr-signature",
        "flwr-package-name",
        "host",
    }
    assert told["host"] == f"{HOST}:{running.upstream_port}"


def test_pieces_pass_as_they_come_in_both_directions(running: Any, upstream: Upstream) -> None:
    def body() -> Iterator[bytes]:
        yield b"a" * 1000
        until(
            lambda: upstream.pieces >= 1000
        )  # the SuperLink has the first piece before the second exists
        yield b"b" * 1000

    with contextlib.closing(connect(running)) as connection:
        connection.request("POST", "/v1/fleet/halves", body(), fresh(), encode_chunked=True)
        answer = connection.getresponse()
        assert answer.read(5) == b"first"
        upstream.go.set()
        assert answer.read() == b"a" * 1000 + b"b" * 1000


def test_too_large_a_body_is_refused_by_its_announcement_and_while_it_comes(
    running: Any, upstream: Upstream
) -> None:
    status, body, _ = ask(running, "POST", "/v1/fleet/push-object", b"x" * (2**20 + 1), fresh())
    assert (status, json.loads(body)) == (413, {"detail": "body over 1 MiB"})
    assert upstream.pieces == 0
    pieces = (b"x" * 2**17 for _ in range(20))
    with contextlib.closing(connect(running)) as connection:
        connection.request("POST", "/v1/fleet/push-object", pieces, fresh(), encode_chunked=True)
        assert connection.getresponse().status == 413
    assert upstream.pieces <= 2**20
    assert upstream.seen == []
    assert [event["status"] for event in last_refusals(running)[-2:]] == [413, 413]
    assert ask(running, "POST", "/v1/fleet/push-object", b"x" * 2**20, fresh())[0] == 200


def test_a_request_passes_once_and_one_that_the_superlink_refused_uses_up_nothing(
    running: Any, upstream: Upstream
) -> None:
    headers = fresh()
    assert ask(running, "POST", "/v1/fleet/unknown", b"", headers)[0] == 401
    assert ask(running, "POST", "/v1/fleet/push-messages", b"update", headers)[0] == 200
    assert ask(running, "POST", "/v1/fleet/push-messages", b"update", headers)[0] == 403
    assert len(upstream.seen) == 2
    assert "replayed" in last_refusals(running)[-1]["reason"]


def test_a_hospital_that_fills_its_share_keeps_nobody_else_out_and_is_heard_again(
    running: Any, upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    """With Flower's own way of trying again."""
    (port,) = free_ports(1)
    here = SimpleNamespace(port=port, keys=running.keys)
    stuck, trying = threading.Event(), threading.Event()

    def slow_body() -> Iterator[bytes]:
        yield b"x"
        assert stuck.wait(20)

    def push(path: str, key: bytes, body: Any = b"") -> int:
        return ask(here, "POST", f"/v1/fleet/{path}", body, key_headers(key))[0]

    def try_to_push() -> int:
        status = push("push-object", b"greedy")
        if status == 503:
            trying.set()
            stuck.set()  # what filled the share comes to its end
        httpx.Response(status, request=httpx.Request("POST", "https://filter")).raise_for_status()
        return status

    with in_thread(command(running.keys, port, running.upstream_port, "--max-at-once", "2")):
        assert [push("pull-messages", key) for key in (b"greedy", b"other")] == [200, 200]
        threads = [
            threading.Thread(target=push, args=("push-object", b"greedy", slow_body()))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        until(lambda: upstream.pieces >= 2)
        assert [push("push-object", b"greedy") for _ in range(3)] == [503] * 3
        assert [push("push-object", b"other") for _ in range(3)] == [200] * 3
        assert push("push-object", b"made up") == 200
        assert make_simple_http_retry_invoker().invoke(try_to_push) == 200
        assert trying.is_set()
        for thread in threads:
            thread.join(20)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "requests at once" in line]
    assert "refused peer=127.0.0.1 method=POST path=/v1/fleet/push-object status=503" in line


def key_headers(key: bytes) -> dict[str, str]:
    return fresh(**{"flwr-public-key": base64.b64encode(key).decode()})


def test_only_what_the_superlink_answered_with_yes_makes_a_key_known(
    running: Any, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    here, shares = SimpleNamespace(port=port, keys=running.keys), Shares()
    monkeypatch.setattr(app, "Shares", lambda most: shares)
    with in_thread(command(running.keys, port, running.upstream_port)):
        for path in ("unknown", "locked"):
            ask(here, "POST", f"/v1/fleet/{path}", b"", key_headers(b"hospital"))
        assert not shares.taken
        ask(here, "POST", "/v1/fleet/pull-messages", b"", key_headers(b"hospital"))
    assert shares.taken == {b"hospital"}
    assert not shares.running


def test_a_superlink_that_is_too_busy_is_asked_again(running: Any, upstream: Upstream) -> None:
    """A SuperNode asks again after a 503 and throws its update away after a 500."""
    assert ask(running, "POST", "/v1/fleet/locked", b"update", fresh())[0] == 503
    (line,) = [
        json.loads(line) for line in running.log().splitlines() if "/v1/fleet/locked" in line
    ]
    assert (line["event"], line["status"]) == ("answered", 500)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/start-run",
        "//v1/control/start-run",
        "https://127.0.0.1/v1/fleet/pull-messages",
    ],
)
def test_tricks_are_refused_on_the_wire_and_logged(
    running: Any, upstream: Upstream, path: str
) -> None:
    signature = b"".join(b"%s: %s\r\n" % pair for pair in signed())
    assert (
        raw(
            running,
            b"POST %s HTTP/1.1\r\nHost: x\r\n%sContent-Length: 0\r\n\r\n"
            % (path.encode(), signature),
        ).split()[1]
        == b"403"
    )
    assert upstream.seen == []
    refusal = last_refusals(running)[-1]
    assert (refusal["peer"], refusal["method"], refusal["path"], refusal["status"]) == (
        HOST,
        "POST",
        path,
        403,
    )


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (
            b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            b"403",
        ),
        (b"CONNECT superlink:8000 HTTP/1.1\r\nHost: superlink:8000\r\n\r\n", b"403"),
        (b"TRACE /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n\r\n", b"405"),
        (b"POST /v1/fleet/x\x00y HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 30_000 + b"\r\n\r\n", b"431"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 1_000_000, b"400"),
        (b"\x16\x03nonsense\r\n\r\n", b"400"),
        (
            b"POST /v1/fleet/x HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            b"400",
        ),
    ],
)
def test_malformed_and_unwanted_requests_are_refused_and_logged(
    running: Any, upstream: Upstream, request_bytes: bytes, status: bytes
) -> None:
    before = len(last_refusals(running))
    answer = raw(running, request_bytes)
    until(lambda: len(last_refusals(running)) > before)
    assert str(last_refusals(running)[-1]["status"]).encode() == status
    # who still sends a long request when it is refused may find the door shut
    assert answer.split()[1:2] == [status] or (answer == b"" and len(request_bytes) > 100_000)
    assert upstream.seen == []


def test_plain_http_gets_no_service_and_leaves_a_line(running: Any, upstream: Upstream) -> None:
    with socket.create_connection((HOST, running.port), timeout=20) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP" not in plain.recv(1000)
    until(lambda: "plain HTTP" in last_refusals(running)[-1]["reason"])
    assert last_refusals(running)[-1]["peer"] == HOST


def test_a_client_that_trusts_another_ca_leaves_a_line(running: Any, tmp_path: Path) -> None:
    other = ssl.create_default_context(cafile=make_keys(tmp_path / "other", []) / "ca.crt")
    with (
        socket.create_connection((HOST, running.port), timeout=20) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        other.wrap_socket(plain, server_hostname=HOST)
    until(lambda: "does not trust" in last_refusals(running)[-1]["reason"])


def test_health_is_the_superlink_s_and_probes_do_not_multiply(
    running: Any, upstream: Upstream
) -> None:
    until(lambda: ask(running, "GET", "/health")[0] == 200)
    assert json.loads(ask(running, "GET", "/health")[1]) == {"filter": "ok", "superlink": "ok"}
    assert ask(running, "HEAD", "/health")[:2] == (200, b"")
    upstream.healthy = False
    until(lambda: ask(running, "GET", "/health")[0] == 503, 10)
    assert json.loads(ask(running, "GET", "/health")[1])["superlink"] == "unreachable"
    upstream.healthy = True
    until(lambda: ask(running, "GET", "/health")[0] == 200, 10)


@contextlib.contextmanager
def in_thread(words: list[str]) -> Iterator[Any]:
    """A filter in this process, so that its bounds can be made small."""
    servers: list[uvicorn.Server] = []
    original = uvicorn.Server.__init__

    def kept(self: uvicorn.Server, config: uvicorn.Config) -> None:
        original(self, config)
        servers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.Server, "__init__", kept)
        thread = threading.Thread(target=program.main, args=(words,))
        thread.start()
        try:
            until(lambda: bool(servers) and servers[0].started)
            yield servers[0]
        finally:
            servers[0].should_exit = True
            thread.join(15)


def test_an_upstream_with_another_s_certificate_is_not_spoken_to(
    running: Any, upstream: Upstream, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, (port,) = make_keys(tmp_path / "other", []), free_ports(1)
    words = command(running.keys, port, running.upstream_port)
    words[words.index("--ca") + 1] = str(other / "ca.crt")
    here = SimpleNamespace(port=port, keys=running.keys)
    with in_thread(words):
        assert ask(here, "GET", "/health")[0] == 503
        assert ask(here, "POST", "/v1/fleet/push-object", b"x", fresh())[0] == 502
    assert upstream.seen == []
    assert (
        "failed peer=127.0.0.1 method=POST path=/v1/fleet/push-object status=502"
        in capsys.readouterr().out
    )


def test_slow_handshakes_heads_and_too_many_connections_are_ended(
    running: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(door, "HANDSHAKE_SECONDS", 0.5)
    monkeypatch.setattr(door, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(door, "CONNECTIONS", 2)
    (port,) = free_ports(1)
    here = SimpleNamespace(port=port, keys=running.keys)
    with in_thread(command(running.keys, port, running.upstream_port)):
        with (
            socket.create_connection((HOST, port), timeout=10) as silent,
            contextlib.suppress(ConnectionResetError),
        ):
            assert silent.recv(1) == b""
        with pytest.raises((ssl.SSLError, ConnectionResetError, IndexError)):
            raw(here, b"GET /health HTTP/1.1\r\nHost: x\r\n").split()[1]
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                last = stack.enter_context(socket.create_connection((HOST, port), timeout=10))
            with contextlib.suppress(ConnectionResetError):
                assert last.recv(1) == b""
        until(lambda: ask_quietly(here) == 200)
    said = capsys.readouterr().out
    assert "no TLS" in said
    assert "no whole request in time" in said
    assert "more than 2 connections" in said


def ask_quietly(running: Any) -> int | None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return ask(running, "GET", "/health")[0]
    return None


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"--listen": "8443"}, ConfigError.exit_code, "no HOST:PORT"),
        ({"--max-at-once": "0"}, ConfigError.exit_code, "would let nobody through"),
        ({"--upstream": "http://superlink:8000"}, ConfigError.exit_code, "over TLS only"),
        ({"--ca": "/nowhere.crt"}, ConfigError.exit_code, "no CA certificate"),
        ({"--key": "/nowhere.key"}, ConfigError.exit_code, "belong together"),
        ({"--listen": "taken"}, MachineError.exit_code, "cannot listen"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(
    running: Any, capsys: pytest.CaptureFixture[str], change: dict[str, str], code: int, text: str
) -> None:
    words = command(running.keys, free_ports(1)[0], running.upstream_port, "--max-at-once", "16")
    for option, value in change.items():
        words[words.index(option) + 1] = f"{HOST}:{running.port}" if value == "taken" else value
    assert program.main(words) == code
    said = capsys.readouterr().err
    assert text in said
    assert len(said.splitlines()) <= 2
