"""A whole deployment as processes on loopback: TLS, authenticated SuperNodes, process isolation, the filter in between.

    with deployment(tmp_path, app=REPOSITORY) as d:     # starts all, waits until every hospital is online
        run = d.submit({"scenario": "…"})
        d.kill("node-2")                                # kill -9 of whatever runs under that name
        d.start("node-2")
        assert d.finished(run, seconds=120) == "finished:completed"

Names of processes: `superlink`, `filter`, `serverapp` (its SuperExec), and of each hospital `node-1` (SuperNode) and
`clientapp-1` (its SuperExec). Each has a folder of its own (FLWR_HOME, working directory) and a log beside it.

Every process carries MARK in its environment, which its children inherit, Flower's own sessions included: by it all are found
and ended. A reaper does the same when this very process is killed.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import ipaddress
import json
import os
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

MARK, NAME = "FEDGAN_LOOPBACK", "FEDGAN_LOOPBACK_NAME"
REPOSITORY = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
HOST = "127.0.0.1"
SUPERLINK = "hospitals"  # the connection's name in the operator's config.toml
TAIL = 25  # lines of each log in a failure
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


class Deployment:
    """Processes by name. Use `deployment`, which ends them."""

    def __init__(
        self,
        folder: Path,
        app: Path,
        hospitals: Sequence[str],
        node_config: Callable[[int], Mapping[str, Any]],
        environment: Mapping[str, str],
        filter_command: Sequence[str],
        outsiders: Sequence[str],
    ) -> None:
        self.folder, self.app, self.hospitals = folder, app, list(hospitals)
        self.node_config, self.environment, self.filter_command = (
            node_config,
            dict(environment),
            list(filter_command),
        )
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.node_ids: dict[str, int] = {}  # of the registered hospitals
        self.seconds: dict[str, float] = {}  # how long the stages of the start took
        self.keys = make_keys(folder / "keys", [*hospitals, *outsiders])
        names = ["superlink", "filter", *(f"node-{i}" for i in self.numbers)]
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self._write_operator()

    @property
    def numbers(self) -> range:
        """1 to the number of hospitals."""
        return range(1, len(self.hospitals) + 1)

    @property
    def names(self) -> list[str]:
        """All processes, in the order of their start."""
        return [
            "superlink",
            "filter",
            "serverapp",
            *(f"{kind}-{i}" for i in self.numbers for kind in ("node", "clientapp")),
        ]

    # --- processes -----------------------------------------------------------------------------------

    def start_all(self, absent: Sequence[str] = (), seconds: float = 90) -> None:
        """Start everything but the hospitals that are `absent`, register all, and wait until those who are there are online."""
        begun = time.monotonic()
        self.start("superlink")
        self.start("filter")
        self.start("serverapp")
        self.wait(
            "the SuperLink to answer", lambda: self.health("superlink") == 200, seconds, "superlink"
        )
        self.wait(
            "the filter to answer",
            lambda: self.health("filter") == 200,
            seconds,
            "filter",
            "superlink",
        )
        self.seconds["superlink and filter healthy"] = time.monotonic() - begun
        self.register(*self.hospitals)
        self.seconds["hospitals registered"] = time.monotonic() - begun
        there = [hospital for hospital in self.hospitals if hospital not in absent]
        for hospital in there:
            self.start_hospital(hospital)
        self.wait_online(*there, seconds=seconds)
        self.seconds["hospitals online"] = time.monotonic() - begun

    def start(self, name: str) -> None:
        """Start one process (again), its log appended to `NAME.log`."""
        assert name not in self.processes or self.processes[name].poll() is not None, (
            f"{name} is running"
        )
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

    def keep(self, node: str, seconds: float = 90) -> None:
        """Start a SuperNode again whenever it ends, as a container's restart policy does, until the SuperLink has taken it in."""
        before = self.log(node).stat().st_size

        def taken_in() -> bool:
            if not self.alive(node):
                self.start(node)
            return b"SuperNode ID" in self.log(node).read_bytes()[before:]

        self.wait(f"{node} to be taken in", taken_in, seconds, node)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal (kill -9 unless said otherwise) to a process and all that it started; waits for its end."""
        _signal(marked(str(self.folder), name), number)
        self.processes[name].wait(30)

    def kill_task(self, name: str) -> None:
        """Kill -9 what a SuperExec has started, and leave it itself alive."""
        _signal(self.tasks(name), signal.SIGKILL)

    def stop(self, name: str) -> None:
        """End a process as an orderly shutdown does: SIGTERM to it, and to nothing else."""
        self.processes[name].terminate()
        self.processes[name].wait(30)

    def tasks(self, name: str) -> list[int]:
        """Process ids of what a SuperExec has started: the ServerApp of `serverapp`, the ClientApp of `clientapp-1`."""
        return [pid for pid in marked(str(self.folder), name) if pid != self.processes[name].pid]

    def alive(self, name: str) -> bool:
        """Whether the process of that name runs."""
        return name in self.processes and self.processes[name].poll() is None

    def end(self) -> None:
        """End everything at once."""
        sweep(str(self.folder))
        for process in self.processes.values():
            process.wait(30)

    # --- waiting and looking ---------------------------------------------------------------------------

    def log(self, name: str) -> Path:
        """Where a process writes what it says."""
        return self.folder / f"{name}.log"

    def wait(
        self,
        what: str,
        condition: Callable[[], bool],
        seconds: float,
        *names: str,
        every: float = 0.2,
    ) -> None:
        """Wait for a condition; fails with the ends of the logs of `names` (of all, where none is named)."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds:g} s for {what}\n{self.tails(*names)}"
            time.sleep(every)

    def wait_log(self, name: str, text: str, seconds: float = 30) -> None:
        """Wait until a log holds a text."""
        self.wait(
            f"{text!r} in the log of {name}",
            lambda: text in self.log(name).read_text(errors="replace"),
            seconds,
            name,
        )

    def tails(self, *names: str) -> str:
        """The ends of logs, each with whether its process still runs."""
        parts = []
        for name in names or self.names:
            lines = (
                self.log(name).read_text(errors="replace").splitlines()[-TAIL:]
                if self.log(name).exists()
                else ["no log"]
            )
            state = (
                "running"
                if self.alive(name)
                else f"ended with {self.processes[name].returncode}"
                if name in self.processes
                else "-"
            )
            parts.append(f"--- {name} ({state})\n" + "\n".join(lines))
        return "\n".join(parts)

    def health(self, name: str) -> int | None:
        """The status of /health of `superlink` or `filter`; None where nothing answers."""
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

    def wait_online(self, *hospitals: str, seconds: float = 60) -> None:
        """Wait until the SuperLink counts these hospitals (all of them, where none is named) as online."""
        wanted = set(hospitals or self.hospitals)
        numbers = [self.hospitals.index(hospital) + 1 for hospital in sorted(wanted)]
        logs = [f"node-{i}" for i in numbers]
        self.wait(
            f"{sorted(wanted)} online",
            lambda: wanted <= self.online(),
            seconds,
            "superlink",
            "filter",
            *logs,
        )

    def online(self) -> set[str]:
        """The names of the hospitals that the SuperLink counts as online."""
        online = {int(node["node-id"]) for node in self.nodes() if node["status"] == "online"}
        return {hospital for hospital, node_id in self.node_ids.items() if node_id in online}

    # --- the operator -----------------------------------------------------------------------------------

    def flwr(self, *words: str, superlink: str = SUPERLINK, fails: bool | None = False) -> str:
        """What `flwr WORDS SUPERLINK` prints, as the operator types it; the name of the connection comes last.

        `fails`: whether it must fail; None where it may.

        The command line runs in this process, one command at a time: its imports would take most of a second each time.
        """
        from flwr.cli.app import app

        out, code = io.StringIO(), 0
        own = QUIET | {"FLWR_HOME": str(self.folder / "operator"), "COLUMNS": "200"}
        streams = {
            "stdout": out,
            "stderr": out,
            "__stdout__": out,
            "__stderr__": out,
        }  # its JSON goes to sys.__stdout__
        with mock.patch.dict(os.environ, own), mock.patch.multiple(sys, **streams):
            try:
                app([*words, superlink])
            except SystemExit as ending:
                code = int(ending.code or 0)
        assert fails in (None, code != 0), (
            f"flwr {' '.join(words)} ended with {code}\n{out.getvalue()}"
        )
        return out.getvalue()

    def register(self, *hospitals: str) -> None:
        """Let hospitals in by their public keys (keys/hospitals/NAME/node.pub)."""

        for hospital in hospitals:
            words = [
                "--name",
                hospital,
                "--format",
                "json",
                str(self.keys / "hospitals" / hospital / "node.pub"),
            ]
            self.node_ids[hospital] = int(
                json.loads(self.flwr("supernode", "register", *words))["node-id"]
            )

    def unregister(self, hospital: str) -> None:
        """Shut a hospital out."""
        self.flwr("supernode", "unregister", str(self.node_ids.pop(hospital)))

    def nodes(self) -> list[dict[str, Any]]:
        """What `flwr supernode ls` says of each registered hospital."""
        return list(json.loads(self.flwr("supernode", "ls", "--format", "json"))["nodes"])

    def submit(self, run_config: Mapping[str, Any]) -> int:
        """Start a run of the app; returns its id."""
        given = " ".join(f"{key}={toml(value)}" for key, value in run_config.items())
        words = ["run", str(self.app), "--format", "json", *(["-c", given] if given else [])]
        return int(json.loads(self.flwr(*words))["run-id"])

    def status(self, run: int) -> str:
        """`running`, `finished:completed`, `finished:failed` …; nothing where the SuperLink does not answer."""
        try:
            runs = json.loads(
                self.flwr("ls", "--run-id", str(run), "--format", "json", fails=None)
            ).get("runs")
        except json.JSONDecodeError:
            return ""
        return str(runs[0]["status"]) if runs else ""

    def finished(self, run: int, seconds: float) -> str:
        """Wait for the end of a run; returns its last status."""
        self.wait(
            f"the end of run {run}",
            lambda: self.status(run).startswith("finished"),
            seconds,
            every=1.0,
        )
        return self.status(run)

    # --- what is started ----------------------------------------------------------------------------------

    def node_command(
        self, hospital: str, superlink: str, runtime_port: int, config: Mapping[str, Any]
    ) -> list[str]:
        """A SuperNode with the key and CA of that hospital."""
        own = self.keys / "hospitals" / hospital
        given = " ".join(f"{key}={toml(value)}" for key, value in config.items())
        command = [
            BIN / "flower-supernode",
            "--superlink",
            superlink,
            "--root-certificates",
            own / "ca.crt",
        ]
        command += ["--auth-supernode-private-key", own / "node.key", "--node-config", given]
        return [
            *map(str, command),
            "--isolation",
            "process",
            "--host",
            HOST,
            "--port",
            str(runtime_port),
        ]

    def _command(self, name: str) -> list[Any]:
        server, kind, _, number = self.keys / "server", *name.partition("-")
        superlink = f"{HOST}:{self.ports['superlink']}"
        if kind == "superlink":
            tls = [
                "--ssl-certfile",
                server / "server.crt",
                "--ssl-keyfile",
                server / "server.key",
                "--ssl-ca-certfile",
                server / "ca.crt",
            ]
            own = ["--enable-supernode-auth", "--database", "state.db", "--isolation", "process"]
            return [
                BIN / "flower-superlink",
                *tls,
                *own,
                "--host",
                HOST,
                "--port",
                self.ports["superlink"],
            ]
        if kind == "filter":
            tls = [
                "--certificate",
                server / "server.crt",
                "--key",
                server / "server.key",
                "--ca",
                server / "ca.crt",
            ]
            return [
                *self.filter_command,
                "--listen",
                f"{HOST}:{self.ports['filter']}",
                "--upstream",
                f"https://{superlink}",
                *tls,
            ]
        if kind == "serverapp":
            return [
                BIN / "flower-superexec",
                "--runtime-api-address",
                superlink,
                "--root-certificates",
                server / "ca.crt",
            ]
        if kind == "clientapp":
            return [
                BIN / "flower-superexec",
                "--insecure",
                "--runtime-api-address",
                f"{HOST}:{self.ports[f'node-{number}']}",
            ]
        hospital, config = self.hospitals[int(number) - 1], self.node_config(int(number) - 1)
        return self.node_command(
            hospital, f"{HOST}:{self.ports['filter']}", self.ports[name], config
        )

    def environment_of(self, name: str) -> dict[str, str]:
        """The environment of a process that belongs to the deployment under a name, and is ended with it."""
        paths = [str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]
        own = {
            MARK: str(self.folder),
            NAME: name,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        return dict(os.environ) | QUIET | path | self.environment | own

    def _write_operator(self) -> None:
        operator = self.folder / "operator"
        operator.mkdir()
        lines = []
        for name, port in (
            (SUPERLINK, self.ports["superlink"]),
            ("through-filter", self.ports["filter"]),
        ):
            lines += [
                f"[superlink.{name}]",
                f'address = "{HOST}:{port}"',
                f"root-certificates = {toml(str(self.keys / 'ca.crt'))}",
            ]
        (operator / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


@contextlib.contextmanager
def deployment(
    folder: Path,
    app: Path = REPOSITORY,
    hospitals: Sequence[str] = ("hospital-1", "hospital-2", "hospital-3"),
    node_config: Callable[[int], Mapping[str, Any]] = lambda index: {"partition-id": index},
    environment: Mapping[str, str] | None = None,
    filter_command: Sequence[str] = (sys.executable, "-m", "server.filter"),
    outsiders: Sequence[str] = (),
    start: bool = True,
) -> Iterator[Deployment]:
    """A deployment in an empty folder, all of it started and online, or (`start=False`) nothing of it; ended with the block.

    `node_config(index)` is what the hospital of that place (from 0) is configured with; `environment` goes to every process.
    `outsiders` have keys but neither registration nor processes.
    """
    folder = folder.resolve()
    made = Deployment(
        folder, app, hospitals, node_config, environment or {}, filter_command, outsiders
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


# --- the ground below -------------------------------------------------------------------------------------


def toml(value: Any) -> str:
    """A value as Flower's `key=value` lists want it."""
    return json.dumps(value) if isinstance(value, str | bool) else str(value)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def marked(folder: str, name: str | None = None) -> list[int]:
    """Processes of a deployment by the mark in their environment; only those of one name, where it is given."""
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
    """Kill every process of a deployment, and what they start meanwhile."""
    end = time.monotonic() + seconds
    while (left := marked(folder)) and time.monotonic() < end:
        _signal(left, signal.SIGKILL)
        time.sleep(0.05)
        for pid in left:  # those that are children of ours
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def make_keys(keys: Path, hospitals: Sequence[str]) -> Path:
    """Certificates and keys where `fedgan keys` puts them; returns the folder."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def certificate(
        subject: str,
        key: ec.EllipticCurvePrivateKey,
        issuer: x509.Name | None,
        extension: x509.ExtensionType,
    ) -> Any:
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)])
        now = datetime.datetime.now(datetime.UTC)
        built = x509.CertificateBuilder(
            issuer or name, name, key.public_key(), x509.random_serial_number()
        )
        built = built.not_valid_before(now - datetime.timedelta(minutes=5)).not_valid_after(
            now + datetime.timedelta(days=1)
        )
        return built.add_extension(extension, critical=issuer is None).sign(
            authority, hashes.SHA256()
        )

    def write(path: Path, content: bytes, mode: int = 0o644) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)

    pem, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    authority, server = (
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP384R1()),
    )
    names = [
        x509.DNSName("superlink"),
        x509.DNSName("filter"),
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address(HOST)),
    ]
    ca = certificate(
        f"loopback CA {os.urandom(4).hex()}",
        authority,
        None,
        x509.BasicConstraints(ca=True, path_length=0),
    )
    leaf = certificate("superlink", server, ca.subject, x509.SubjectAlternativeName(names))
    for place in ("", "server", *(f"hospitals/{hospital}" for hospital in hospitals)):
        write(keys / place / "ca.crt", ca.public_bytes(pem))
    write(keys / "server/server.crt", leaf.public_bytes(pem))
    write(
        keys / "server/server.key",
        server.private_bytes(pem, serialization.PrivateFormat.PKCS8, no_password),
        0o600,
    )
    for hospital in hospitals:
        node = ec.generate_private_key(ec.SECP384R1())
        write(
            keys / f"hospitals/{hospital}/node.key",
            node.private_bytes(pem, serialization.PrivateFormat.OpenSSH, no_password),
            0o600,
        )
        public = node.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        write(keys / f"hospitals/{hospital}/node.pub", public + b"\n")
    return keys


if __name__ == "__main__":  # the reaper: ends the deployment when the process that made it is gone
    sys.stdin.buffer.read()
    sweep(sys.argv[1])
