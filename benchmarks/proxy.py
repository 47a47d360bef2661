"""Throughput and memory of the proxy, beside a bare TLS relay.

    python -m benchmarks.proxy [MEGABYTES]

Two connections, as a SuperNode has, push MEGABYTES (200) in pieces of 5 MiB to a stand-in for the
SuperLink, then pull as many, `REPEATS` times. A rate is bytes per core second of the proxy's
process, without the stand-in and the clients. The bare relay copies bytes from one TLS connection
to another, without HTTP; its rate is bytes per core second of its thread. Proxy and relay run in
turns. Prints one JSON object.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import http.client
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
from cryptography.hazmat.primitives import serialization

from fedgan.deployment.certificates import now
from fedgan.deployment.key_folder import KeyFolder

HOST = "127.0.0.1"
CONFIGURATION = Path(__file__).resolve().parent.parent / "deploy" / "haproxy.cfg"
PIECE = 5 * 2**20  # as Flower cuts arrays
CONNECTIONS = 2
REPEATS = 5
BUFFER = 2**16
OBJECT = os.urandom(PIECE)


async def stand_in(scope: Any, receive: Any, send: Any) -> None:
    """A SuperLink that accepts what is pushed and answers a pull with one piece."""
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    body = OBJECT if scope["path"].endswith("pull-object") else b""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": body})


class Proxy:
    """A proxy process in front of a stand-in in this process."""

    def __init__(self, keys: KeyFolder, port: int, process: subprocess.Popen[bytes]) -> None:
        self.context, self.port, self.process = tls_context(keys), port, process
        line = (keys.hospital("hospital1") / "node.pub").read_bytes()
        pem, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        self.key = serialization.load_ssh_public_key(line).public_bytes(pem, form)

    def measure_rate(self, path: str, megabytes: int) -> float:
        """Push or pull; returns bytes per core second."""
        count = piece_count(megabytes) // CONNECTIONS
        begin = self.core_seconds()
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            moved = sum(pool.map(lambda _: self._move(path, count), range(CONNECTIONS)))
        return moved / (self.core_seconds() - begin)

    def _move(self, path: str, count: int) -> int:
        """Move `count` pieces over one connection; returns their bytes."""
        with contextlib.closing(
            http.client.HTTPSConnection(HOST, self.port, context=self.context, timeout=60)
        ) as connection:
            # The heartbeat makes the key known to the proxy.
            for method in ("send-node-heartbeat", *[path] * count):
                moment = datetime.datetime.now(datetime.UTC).isoformat()
                key = base64.b64encode(self.key).decode()
                headers = {
                    "flwr-public-key": key,
                    "flwr-signature": "s",
                    "flwr-timestamp": f"{moment}{threading.get_ident()}",
                }
                body = OBJECT if method == "push-object" else b""
                connection.request("POST", f"/v1/fleet/{method}", body, headers)
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    raise RuntimeError(f"the proxy answered {answer.status}")
        return count * PIECE

    def core_seconds(self) -> float:
        """CPU time of the process so far."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii")
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def megabytes(self, field: str) -> float:
        """A field of the process's status: VmRSS (memory now) or VmHWM (peak memory)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii").splitlines()
        return next(
            int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:")
        )


def piece_count(megabytes: int) -> int:
    """The even number of pieces that is nearest to `megabytes`."""
    return 2 * max(1, round(megabytes * 1e6 / PIECE / 2))


def tls_context(keys: KeyFolder) -> ssl.SSLContext:
    """A client's TLS context that verifies the server."""
    return ssl.create_default_context(cafile=str(keys.authority))


def listener() -> socket.socket:
    """A listening socket on loopback."""
    return socket.create_server((HOST, 0))


@contextlib.contextmanager
def running_proxy(keys: KeyFolder) -> Iterator[Proxy]:
    """A running proxy with the stand-in behind it."""
    upstream, free = listener(), listener()
    port = free.getsockname()[1]
    free.close()
    files: Any = {"ssl_certfile": keys.server_certificate, "ssl_keyfile": keys.server_key}
    config = uvicorn.Config(stand_in, lifespan="off", log_level="critical", **files)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [upstream]})
    thread.start()
    settings = {
        "FEDGAN_PROXY_LISTEN": f"{HOST}:{port}",
        "FEDGAN_PROXY_SUPERLINK": f"{HOST}:{upstream.getsockname()[1]}",
        "FEDGAN_PROXY_KEYS": str(keys.server_key.parent),
        "FEDGAN_PROXY_MAX_MINUTE": "1000000000000",  # the limit is not what is measured
    }
    process = subprocess.Popen(
        ["haproxy", "-db", "-q", "-f", str(CONFIGURATION)],
        env=os.environ | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(port)
        yield Proxy(keys, port, process)
    finally:
        process.terminate()
        process.wait(20)
        server.should_exit = server.force_exit = True
        thread.join(20)


def wait_for_port(port: int, seconds: float = 20) -> None:
    """Wait until something listens on a port of loopback."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return


def relay_rate(keys: KeyFolder, megabytes: int) -> float:
    """Bytes per core second of a thread that copies bytes from one TLS connection to another."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(keys.server_certificate, keys.server_key)
    client, count = tls_context(keys), piece_count(megabytes)

    def drain(end: socket.socket) -> None:
        plain, _ = end.accept()
        with plain, server.wrap_socket(plain, server_side=True) as tls:
            while tls.recv(BUFFER):
                pass

    def fill(port: int) -> None:
        with (
            socket.create_connection((HOST, port)) as plain,
            client.wrap_socket(plain, server_hostname=HOST) as tls,
        ):
            for _ in range(count):
                tls.sendall(OBJECT)

    with listener() as front, listener() as end:
        threads = [
            threading.Thread(target=drain, args=(end,)),
            threading.Thread(target=fill, args=(front.getsockname()[1],)),
        ]
        for thread in threads:
            thread.start()
        inner, _ = front.accept()
        with (
            inner,
            server.wrap_socket(inner, server_side=True) as source,
            socket.create_connection(end.getsockname()) as plain,
            client.wrap_socket(plain, server_hostname=HOST) as target,
        ):
            begin, moved = time.thread_time(), 0
            while piece := source.recv(BUFFER):
                target.sendall(piece)
                moved += len(piece)
            seconds = time.thread_time() - begin
    for thread in threads:
        thread.join()
    return moved / seconds


def measure(megabytes: int = 200) -> dict[str, Any]:
    """Medians over `REPEATS` turns of pushing, pulling and the bare relay."""
    rates: dict[str, list[float]] = {"push": [], "pull": [], "relay": []}
    with tempfile.TemporaryDirectory() as folder:
        keys = KeyFolder.create(Path(folder) / "keys", ["hospital1"], [], 1, now())
        with running_proxy(keys) as proxy:
            idle = proxy.megabytes("VmRSS")
            turns: dict[str, Callable[[], float]] = {
                "push": lambda: proxy.measure_rate("push-object", megabytes),
                "pull": lambda: proxy.measure_rate("pull-object", megabytes),
                "relay": lambda: relay_rate(keys, megabytes),
            }
            for _ in range(REPEATS):
                for name, turn in turns.items():
                    rates[name].append(turn())
            peak = proxy.megabytes("VmHWM")
    found: dict[str, Any] = {
        "moved_megabytes": round(2 * REPEATS * piece_count(megabytes) * PIECE / 1e6),
        "memory_idle_mb": idle,
        "memory_mb": peak,
    }
    for name, values in rates.items():
        found[f"{name}_mb_per_core_second"] = statistics.median(values) / 1e6
    for name in ("push", "pull"):
        pairs = zip(rates[name], rates["relay"], strict=True)
        fractions = [ours / bare for ours, bare in pairs]
        found[f"{name}_fraction"] = statistics.median(fractions)
        found |= {f"{name}_fraction_low": min(fractions), f"{name}_fraction_high": max(fractions)}
    return found


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:2]))))
