"""How much of a bare relay's speed the path filter reaches, and how much memory it takes: both of objects as hospitals move them.

    python -m benchmarks.filter [MEGABYTES]

Two connections at once, as a SuperNode has, push MEGABYTES (200) in pieces of 5 MiB to a stand-in for the SuperLink and then
pull as many, `REPEATS` times. A rate is bytes over the filter's own core seconds, so that it is not the stand-in's or the
clients'. The bare relay does what nobody in its place could leave out: it takes bytes from one TLS connection and puts them into
another, without HTTP, in its own thread's core seconds, in turns with the filter. Prints one JSON object.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import os
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn

from fedgan.deployment.certificates import now
from fedgan.deployment.key_folder import KeyFolder

HOST = "127.0.0.1"
PIECE = 5 * 2**20  # as Flower cuts arrays
AT_ONCE = 2
REPEATS = 5
BUFFER = 2**16
OBJECT = os.urandom(PIECE)


async def stand_in(scope: Any, receive: Any, send: Any) -> None:
    """A SuperLink that takes what is pushed and gives a piece to who pulls."""
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    body = OBJECT if scope["path"].endswith("pull-object") else b""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


class Filter:
    """A filter process before a stand-in in this one."""

    numbers = itertools.count()

    def __init__(self, keys: Path, port: int, process: subprocess.Popen[bytes]) -> None:
        self.trust, self.port, self.process = trust(keys), port, process

    def move(self, path: str, megabytes: int) -> float:
        """Push or pull; returns bytes a core second."""
        each = pieces(megabytes) // AT_ONCE
        begun = self.core_seconds()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            moved = sum(pool.map(lambda _: self._ask(path, each), range(AT_ONCE)))
        return moved / (self.core_seconds() - begun)

    def _ask(self, path: str, count: int) -> int:
        """Move so many pieces over one connection; returns their bytes."""
        with contextlib.closing(
            http.client.HTTPSConnection(HOST, self.port, context=self.trust, timeout=60)
        ) as connection:
            for _ in range(count):
                headers = {
                    "flwr-public-key": base64.b64encode(b"key").decode(),
                    "flwr-signature": "s",
                }
                headers["flwr-timestamp"] = str(next(self.numbers))
                connection.request(
                    "POST", f"/v1/fleet/{path}", OBJECT if path == "push-object" else b"", headers
                )
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    raise RuntimeError(f"the filter answered {answer.status}")
        return count * PIECE

    def core_seconds(self) -> float:
        """Time of a core that the process has had."""
        fields = (
            Path(f"/proc/{self.process.pid}/stat")
            .read_text(encoding="ascii")
            .rpartition(")")[2]
            .split()
        )
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def megabytes(self, what: str) -> float:
        """A line of the process's status: VmRSS (memory now) or VmHWM (most ever)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii").splitlines()
        return next(
            int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{what}:")
        )


def pieces(megabytes: int) -> int:
    """So many objects are that, an even number."""
    return 2 * max(1, round(megabytes * 1e6 / PIECE / 2))


def trust(keys: Path) -> ssl.SSLContext:
    """What a client knows the server by."""
    return ssl.create_default_context(cafile=str(keys / "ca.crt"))


def listener() -> socket.socket:
    """A socket of loopback that listens."""
    return socket.create_server((HOST, 0))


@contextlib.contextmanager
def filtering(keys: Path) -> Iterator[Filter]:
    """A filter that runs, with the stand-in behind it."""
    upstream, free = listener(), listener()
    server, port = keys / "server", free.getsockname()[1]
    free.close()
    files = {"ssl_certfile": server / "server.crt", "ssl_keyfile": server / "server.key"}
    behind = uvicorn.Server(uvicorn.Config(stand_in, lifespan="off", log_level="critical", **files))  # type: ignore[arg-type]
    thread = threading.Thread(target=behind.run, kwargs={"sockets": [upstream]})
    thread.start()
    command = [sys.executable, "-m", "server.filter", "--listen", f"{HOST}:{port}"]
    command += [
        "--upstream",
        f"https://{HOST}:{upstream.getsockname()[1]}",
        "--ca",
        str(server / "ca.crt"),
    ]
    command += ["--certificate", str(server / "server.crt"), "--key", str(server / "server.key")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if b"started" not in process.stdout.readline():
            raise RuntimeError("the filter did not start")
        yield Filter(keys, port, process)
    finally:
        process.terminate()
        process.wait(20)
        behind.should_exit = behind.force_exit = True
        thread.join(20)


def relay(keys: Path, megabytes: int) -> float:
    """Bytes a core second of a thread that hands bytes from one TLS connection to another."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(keys / "server" / "server.crt", keys / "server" / "server.key")
    known, count = trust(keys), pieces(megabytes)

    def drain(end: socket.socket) -> None:
        plain, _ = end.accept()
        with plain, server.wrap_socket(plain, server_side=True) as tls:
            while tls.recv(BUFFER):
                pass

    def fill(port: int) -> None:
        with (
            socket.create_connection((HOST, port)) as plain,
            known.wrap_socket(plain, server_hostname=HOST) as tls,
        ):
            for _ in range(count):
                tls.sendall(OBJECT)

    with listener() as door, listener() as end:
        threads = [
            threading.Thread(target=drain, args=(end,)),
            threading.Thread(target=fill, args=(door.getsockname()[1],)),
        ]
        for thread in threads:
            thread.start()
        inner, _ = door.accept()
        with (
            inner,
            server.wrap_socket(inner, server_side=True) as come,
            socket.create_connection(end.getsockname()) as plain,
            known.wrap_socket(plain, server_hostname=HOST) as go,
        ):
            begun, moved = time.thread_time(), 0
            while piece := come.recv(BUFFER):
                go.sendall(piece)
                moved += len(piece)
            seconds = time.thread_time() - begun
    for thread in threads:
        thread.join()
    return moved / seconds


def measure(megabytes: int = 200) -> dict[str, Any]:
    """Medians over `REPEATS` turns of pushing, pulling and the bare relay."""
    rates: dict[str, list[float]] = {"push": [], "pull": [], "relay": []}
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        KeyFolder.create(keys, ["hospital1"], [], 1, now())
        with filtering(keys) as running:
            idle = running.megabytes("VmRSS")
            turns: dict[str, Callable[[], float]] = {
                "push": lambda: running.move("push-object", megabytes),
                "pull": lambda: running.move("pull-object", megabytes),
                "relay": lambda: relay(keys, megabytes),
            }
            for _ in range(REPEATS):
                for name, turn in turns.items():
                    rates[name].append(turn())
            most = running.megabytes("VmHWM")
    found: dict[str, Any] = {
        "moved_megabytes": round(2 * REPEATS * pieces(megabytes) * PIECE / 1e6),
        "memory_idle_mb": idle,
        "memory_mb": most,
    }
    for name, each in rates.items():
        found[f"{name}_mb_a_core_second"] = statistics.median(each) / 1e6
    for name in ("push", "pull"):
        fractions = [ours / bare for ours, bare in zip(rates[name], rates["relay"], strict=True)]
        found[f"{name}_fraction"] = statistics.median(fractions)
        found |= {f"{name}_fraction_low": min(fractions), f"{name}_fraction_high": max(fractions)}
    return found


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:2]))))
