"""A deployment as real processes on loopback: TLS, authenticated SuperNodes, HAProxy in front.

    with deployment(tmp_path, app=REPOSITORY) as d:  # starts all and waits until all are online
        run = d.submit({"scenario": "…"})
        d.kill("node-2")                             # SIGKILL for the process of that name
        d.start("node-2")
        assert d.wait_finished(run, seconds=120) == "finished:completed"

Process names: `superlink`, `proxy`, `serverapp` (its SuperExec), and per hospital `node-1`
(SuperNode) and `clientapp-1` (its SuperExec); `recorder` if a deployment records requests. Each has
its own folder (FLWR_HOME, working directory) and a log beside it.

Every process has MARK in its environment, which its children inherit; this finds and ends all of
them. A reaper process does so when the test process itself is killed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

MARK, NAME = "FEDGAN_LOOPBACK", "FEDGAN_LOOPBACK_NAME"
PRELOAD = "FEDGAN_LOOPBACK_PRELOAD"  # of loopback_site/sitecustomize.py
HEARTBEAT, TASK_HEARTBEAT = "FEDGAN_LOOPBACK_HEARTBEAT", "FEDGAN_LOOPBACK_TASK_HEARTBEAT"
# What the app's tasks spend their start on; a SuperExec imports it once.
PRELOADED = {
    "clientapp": "torch torch._dynamo safetensors.torch",
    "serverapp": "torch torch._dynamo torchvision safetensors.torch scipy.stats PIL.Image",
}
REPOSITORY = Path(__file__).resolve().parent.parent
PROXY_CONFIGURATION = REPOSITORY / "deploy" / "haproxy.cfg"
BIN = Path(sys.executable).parent
HOST = "127.0.0.1"
SUPERLINK = "hospitals"  # the connection's name in the operator's config.toml
TAIL = 25  # log lines per process in an assertion message
REQUIRE_HAPROXY = "FEDGAN_REQUIRE_HAPROXY"  # "1": a missing HAProxy fails the tests, not skips them
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
needs_haproxy = pytest.mark.skipif(
    shutil.which("haproxy") is None and os.environ.get(REQUIRE_HAPROXY) != "1",
    reason="no haproxy here (Debian: apt-get install haproxy)",
)


class Deployment:
    """Processes by name; made and ended by `deployment`."""

    def __init__(
        self,
        folder: Path,
        app: Path,
        hospitals: Sequence[str],
        node_config: Callable[[int], Mapping[str, Any]],
        environment: Mapping[str, str],
        recording: Path | None,
        outsiders: Sequence[str],
        approved: Path | None,
    ) -> None:
        self.folder, self.app, self.hospitals = folder, app, list(hospitals)
        self.node_config, self.environment = node_config, dict(environment)
        self.recording, self.approved = recording, approved
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.node_ids: dict[str, int] = {}  # of the registered hospitals
        self.seconds: dict[str, float] = {}  # duration of the stages of the start
        self.heartbeats: dict[str, dict[str, str]] = {}  # HEARTBEAT and TASK_HEARTBEAT of processes
        self.keys = make_keys(folder / "keys", [*hospitals, *outsiders])
        names = ["superlink", "proxy", "recorder", *(f"node-{i}" for i in self.numbers)]
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self._write_operator()

    @property
    def numbers(self) -> range:
        """1 to the number of hospitals."""
        return range(1, len(self.hospitals) + 1)

    @property
    def names(self) -> list[str]:
        """All process names, in the order of their start."""
        server = ["superlink", "proxy", *(["recorder"] if self.recording else []), "serverapp"]
        return [*server, *(f"{kind}-{i}" for i in self.numbers for kind in ("node", "clientapp"))]

    # --- processes ---

    def start_all(self, absent: Sequence[str] = (), seconds: float = 90) -> None:
        """Start all but the `absent` hospitals, register every hospital, and wait until online."""
        begin = time.monotonic()
        for name in self.names:
            if not name.startswith(("node", "clientapp")):
                self.start(name)
        self.wait_healthy("superlink", seconds)
        self.wait_healthy("proxy", seconds)
        self.seconds["superlink and proxy healthy"] = time.monotonic() - begin
        self.register(*self.hospitals)
        self.seconds["hospitals registered"] = time.monotonic() - begin
        present = [hospital for hospital in self.hospitals if hospital not in absent]
        for hospital in present:
            self.start_hospital(hospital)
        self.wait_online(*present, seconds=seconds)
        self.seconds["hospitals online"] = time.monotonic() - begin

    def start(self, name: str) -> None:
        """Start (or restart) one process; its log is appended to `NAME.log`."""
        assert not self.is_alive(name), f"{name} is running"
        home = self.folder / name
        home.mkdir(exist_ok=True)
        with open(self.log(name), "ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(word) for word in self._command(name)],
                cwd=home,
                env=self.environment_of(name) | {"FLWR_HOME": str(home)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_hospital(self, hospital: str) -> None:
        """Start both processes of a hospital."""
        number = self.hospitals.index(hospital) + 1
        self.start(f"node-{number}")
        self.start(f"clientapp-{number}")

    def restart_until_activated(self, node: str, seconds: float = 90) -> None:
        """Restart a SuperNode whenever it ends, until the SuperLink activates it."""
        before = self.log(node).stat().st_size

        def is_activated() -> bool:
            if not self.is_alive(node):
                self.start(node)
            return b"SuperNode ID" in self.log(node).read_bytes()[before:]

        self.wait(f"the activation of {node}", is_activated, seconds, node)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to a process and all its children, and wait for its end."""
        _signal(marked(str(self.folder), name), number)
        self.processes[name].wait(30)

    def kill_task(self, name: str) -> None:
        """Send SIGKILL to what a SuperExec has started, but not to the SuperExec."""
        _signal(self.tasks(name), signal.SIGKILL)

    def stop(self, name: str) -> None:
        """Send SIGTERM to a process alone, and wait for its end."""
        self.processes[name].terminate()
        self.processes[name].wait(30)

    def tasks(self, name: str) -> list[int]:
        """Process ids of what a SuperExec has started (a ServerApp or a ClientApp)."""
        return [pid for pid in marked(str(self.folder), name) if pid != self.processes[name].pid]

    def is_alive(self, name: str) -> bool:
        """Whether the process of that name runs."""
        return name in self.processes and self.processes[name].poll() is None

    def end(self) -> None:
        """Kill all processes."""
        sweep(str(self.folder))
        for process in self.processes.values():
            process.wait(30)

    # --- waiting and looking ---

    def log(self, name: str) -> Path:
        """The log file of a process."""
        return self.folder / f"{name}.log"

    def wait(
        self,
        what: str,
        condition: Callable[[], bool],
        seconds: float,
        *names: str,
        every: float = 0.2,
    ) -> None:
        """Wait for a condition; a failure shows the ends of the logs of `names` (default: all)."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds:g} s for {what}\n{self.tails(*names)}"
            time.sleep(every)

    def wait_log(self, name: str, text: str, seconds: float = 30) -> None:
        """Wait until a log contains a text."""
        self.wait(
            f"{text!r} in the log of {name}",
            lambda: text in self.log(name).read_text(errors="replace"),
            seconds,
            name,
        )

    def tails(self, *names: str) -> str:
        """The ends of logs, and whether their processes run."""
        parts = []
        for name in names or self.names:
            log = self.log(name)
            text = log.read_text(errors="replace") if log.exists() else "no log"
            state = (
                "running"
                if self.is_alive(name)
                else f"ended with {self.processes[name].returncode}"
                if name in self.processes
                else "-"
            )
            parts.append("\n".join([f"--- {name} ({state})", *text.splitlines()[-TAIL:]]))
        return "\n".join(parts)

    def health(self, name: str) -> int | None:
        """HTTP status of /health of `superlink` or `proxy`; None if nothing answers."""
        context = ssl.create_default_context(cafile=self.keys / "ca.crt")
        try:
            with urllib.request.urlopen(
                f"https://{HOST}:{self.ports[name]}/health", timeout=5, context=context
            ) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return int(error.code)
        except OSError:
            return None

    def wait_healthy(self, name: str, seconds: float = 90) -> None:
        """Wait until `superlink` or `proxy` answers /health with 200."""
        self.wait(f"the health of {name}", lambda: self.health(name) == 200, seconds, name)

    def wait_online(self, *hospitals: str, seconds: float = 60) -> None:
        """Wait until these hospitals (default: all) are online at the SuperLink."""
        wanted = set(hospitals or self.hospitals)
        logs = [f"node-{self.hospitals.index(hospital) + 1}" for hospital in sorted(wanted)]
        for log in logs:  # cheaper than asking the SuperLink
            self.wait_log(log, "SuperNode ID", seconds)
        self.wait(
            f"{sorted(wanted)} online",
            lambda: wanted <= self.online(),
            seconds,
            "superlink",
            "proxy",
            *logs,
            every=0.5,
        )

    def online(self) -> set[str]:
        """The names of the hospitals that are online at the SuperLink."""
        online = {int(node["node-id"]) for node in self.nodes() if node["status"] == "online"}
        return {hospital for hospital, node_id in self.node_ids.items() if node_id in online}

    # --- the operator ---

    def flwr(self, *words: str, superlink: str = SUPERLINK, fails: bool | None = False) -> str:
        """Output of `flwr WORDS SUPERLINK`; `fails`: whether it must fail (None: it may).

        The command runs in this process, because its imports take most of a second.
        """
        from flwr.cli.app import app

        out, code = io.StringIO(), 0
        own = QUIET | {"FLWR_HOME": str(self.folder / "operator"), "COLUMNS": "200"}
        # Flower writes JSON to sys.__stdout__.
        streams = dict.fromkeys(("stdout", "stderr", "__stdout__", "__stderr__"), out)
        with mock.patch.dict(os.environ, own), mock.patch.multiple(sys, **streams):
            try:
                app([*words, superlink])
            except SystemExit as ending:
                code = int(ending.code or 0)
        command = f"flwr {' '.join(words)}"
        assert fails in (None, code != 0), f"{command} ended with {code}\n{out.getvalue()}"
        return out.getvalue()

    def register(self, *hospitals: str) -> None:
        """Register the public keys of hospitals."""
        for hospital in hospitals:
            key = str(self.keys / "hospitals" / hospital / "node.pub")
            words = ["register", "--name", hospital, "--format", "json", key]
            node = json.loads(self.flwr("supernode", *words))
            self.node_ids[hospital] = int(node["node-id"])

    def unregister(self, hospital: str) -> None:
        """Unregister a hospital."""
        self.flwr("supernode", "unregister", str(self.node_ids.pop(hospital)))

    def nodes(self) -> list[dict[str, Any]]:
        """Output of `flwr supernode ls`."""
        return list(json.loads(self.flwr("supernode", "ls", "--format", "json"))["nodes"])

    def submit(self, run_config: Mapping[str, Any], app: Path | None = None) -> int:
        """Start a run of the deployment's app or another one; returns its id."""
        given = " ".join(f"{key}={toml(value)}" for key, value in run_config.items())
        words = ["run", str(app or self.app), "--format", "json", *(["-c", given] if given else [])]
        return int(json.loads(self.flwr(*words))["run-id"])

    def status(self, run: int) -> str:
        """`running`, `finished:completed`, `finished:failed` …; "" if the SuperLink is down."""
        words = ["ls", "--run-id", str(run), "--format", "json"]
        try:
            runs = json.loads(self.flwr(*words, fails=None)).get("runs")
        except json.JSONDecodeError:
            return ""
        return str(runs[0]["status"]) if runs else ""

    def wait_finished(self, run: int, seconds: float) -> str:
        """Wait for the end of a run; returns its last status."""
        what, status = f"the end of run {run}", self.status
        self.wait(what, lambda: status(run).startswith("finished"), seconds, every=1.0)
        return status(run)

    # --- commands ---

    def node_command(
        self, hospital: str, superlink: str, runtime_port: int, config: Mapping[str, Any]
    ) -> list[str]:
        """A SuperNode with the key and CA of a hospital."""
        own = self.keys / "hospitals" / hospital
        options = {
            "--superlink": superlink,
            "--root-certificates": own / "ca.crt",
            "--auth-supernode-private-key": own / "node.key",
            "--node-config": " ".join(f"{key}={toml(value)}" for key, value in config.items()),
            "--isolation": "process",
            "--host": HOST,
            "--port": runtime_port,
        }
        return _words(BIN / "flower-supernode", options)

    def _command(self, name: str) -> list[str]:
        server, kind, _, number = self.keys / "server", *name.partition("-")
        superlink = f"{HOST}:{self.ports['superlink']}"
        if kind == "superlink":
            options = {
                "--ssl-certfile": server / "server.crt",
                "--ssl-keyfile": server / "server.key",
                "--ssl-ca-certfile": server / "ca.crt",
                "--database": "state.db",
                "--isolation": "process",
                "--host": HOST,
                "--port": self.ports["superlink"],
            }
            return [*_words(BIN / "flower-superlink", options), "--enable-supernode-auth"]
        if kind == "proxy":
            return ["haproxy", "-db", "-f", str(PROXY_CONFIGURATION)]
        if kind == "recorder":
            return [
                *(sys.executable, "-m", "recording_proxy", str(server), str(self.recording)),
                *(str(self.ports["recorder"]), str(self.ports["proxy"])),
            ]
        if kind == "serverapp":
            options = {"--runtime-api-address": superlink, "--root-certificates": server / "ca.crt"}
            return _words(BIN / "flower-superexec", options)
        if kind == "clientapp":
            address = f"{HOST}:{self.ports[f'node-{number}']}"
            program = [BIN / "flower-superexec"]
            if self.approved:
                program = [sys.executable, "-P", REPOSITORY / "client" / "approval.py", "executor"]
            return [*map(str, program), "--runtime-api-address", address, "--insecure"]
        hospital, config = self.hospitals[int(number) - 1], self.node_config(int(number) - 1)
        entrance = self.ports["recorder" if self.recording else "proxy"]
        return self.node_command(hospital, f"{HOST}:{entrance}", self.ports[name], config)

    def environment_of(self, name: str) -> dict[str, str]:
        """Environment of a process that belongs to the deployment and is ended with it."""
        tests = REPOSITORY / "tests"
        paths = [str(tests / "loopback_site"), str(REPOSITORY), str(tests)]
        paths.append(os.environ.get("PYTHONPATH", ""))
        own = {
            MARK: str(self.folder),
            NAME: name,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            PRELOAD: PRELOADED.get(name.partition("-")[0], "") if self.app == REPOSITORY else "",
            "OMP_NUM_THREADS": "1",
        }
        addresses = (self.ports["proxy"], self.ports["superlink"])
        proxy = proxy_environment(self.keys, *addresses) if name == "proxy" else {}
        if name.startswith("clientapp") and self.approved:
            own["FEDGAN_APPROVED"] = str(self.approved)
        beats = self.heartbeats.get(name, {})
        return dict(os.environ) | QUIET | self.environment | own | beats | proxy

    def _write_operator(self) -> None:
        operator = self.folder / "operator"
        operator.mkdir()
        ports = {SUPERLINK: self.ports["superlink"], "through-proxy": self.ports["proxy"]}
        ca = toml(str(self.keys / "ca.crt"))
        lines = [
            f'[superlink.{name}]\naddress = "{HOST}:{port}"\nroot-certificates = {ca}\n'
            for name, port in ports.items()
        ]
        (operator / "config.toml").write_text("".join(lines), encoding="utf-8")


@contextlib.contextmanager
def deployment(
    folder: Path,
    app: Path = REPOSITORY,
    hospitals: Sequence[str] = ("hospital-1", "hospital-2", "hospital-3"),
    node_config: Callable[[int], Mapping[str, Any]] = lambda index: {"partition-id": index},
    environment: Mapping[str, str] | None = None,
    recording: Path | None = None,
    outsiders: Sequence[str] = (),
    start: bool = True,
    approved: Path | None = None,
) -> Iterator[Deployment]:
    """A deployment in an empty folder, started and online unless `start` is False.

    `node_config(index)` is the node-config of the hospital with that index (from 0); `environment`
    is added to every process. SuperNodes' requests are written to `recording`, if given (see
    recording_proxy.py). `outsiders` have keys but neither registration nor processes. `approved`:
    list of the code that the hospitals run (client/approval.py); without it they run any.
    """
    folder = folder.resolve()
    made = Deployment(
        folder, app, hospitals, node_config, environment or {}, recording, outsiders, approved
    )
    reaper = subprocess.Popen(
        [sys.executable, __file__, str(folder)], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        if start:
            made.start_all()
        yield made
    finally:
        made.end()
        assert reaper.stdin
        reaper.stdin.close()
        reaper.wait(30)


# --- helpers ---


def toml(value: Any) -> str:
    """A value in the syntax of Flower's `key=value` lists."""
    return json.dumps(value) if isinstance(value, str | bool) else str(value)


def _words(program: Path, options: Mapping[str, Any]) -> list[str]:
    """A command line of a program with options."""
    return [str(program), *(str(word) for option in options.items() for word in option)]


def free_ports(count: int) -> list[int]:
    """Loopback ports on which nothing listens."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def marked(folder: str, name: str | None = None) -> list[int]:
    """Processes of a deployment, found by their environment; only those of one name, if given."""
    wanted = {f"{MARK}={folder}".encode()} | ({f"{NAME}={name}".encode()} if name else set())
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def sweep(folder: str, seconds: float = 10) -> None:
    """Kill every process of a deployment, including those started meanwhile."""
    end = time.monotonic() + seconds
    while (left := marked(folder)) and time.monotonic() < end:
        _signal(left, signal.SIGKILL)
        time.sleep(0.05)
        for pid in left:  # reap children of this process
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def make_keys(keys: Path, hospitals: Sequence[str] = ("nobody",)) -> Path:
    """Certificates and keys as `fedgan keys` makes them; returns their folder."""
    from fedgan.deployment.certificates import now
    from fedgan.deployment.key_folder import KeyFolder

    return KeyFolder.create(keys, hospitals, (), 1, now()).path


def proxy_environment(keys: Path, port: int, superlink_port: int) -> dict[str, str]:
    """Settings of deploy/haproxy.cfg."""
    return {
        "FEDGAN_PROXY_LISTEN": f"{HOST}:{port}",
        "FEDGAN_PROXY_SUPERLINK": f"{HOST}:{superlink_port}",
        "FEDGAN_PROXY_KEYS": str(keys / "server"),
    }


if __name__ == "__main__":  # the reaper: ends the deployment when its maker's pipe closes
    sys.stdin.buffer.read()
    sweep(sys.argv[1])
