"""The operator's access to a SuperLink: check it, submit a run, read its status and its log.

Only the control API has all of this: `flwr run --stream` exits with 0 whatever happened to the run,
`flwr log` begins again after each broken connection, `flwr supernode ls` has no names. `flwr run`
builds and submits the app.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import tomli_w
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    StopRunRequest,
    StreamLogsRequest,
)
from flwr.supercore.control import ControlHttpClient

from fedgan.errors import ConfigError, FederationError, MachineError

POLL = 1.0
PROBE_SECONDS = 5.0  # for one request to /health
SUBMIT_SECONDS = 180.0
UNREGISTERED = "unregistered"  # Flower's status of a removed node
REPOSITORY = Path(__file__).resolve().parents[2]
CONNECTION = "federation"  # its name in the temporary Flower configuration of one command
CERTIFICATE_ADVICE = {  # by OpenSSL's words
    "certificate has expired": "its certificate has expired: fedgan keys rotate server, then "
    "restart SuperLink and proxy",
    "not yet valid": "its certificate is not yet valid: set this machine's clock",
    "mismatch": "its certificate is for other names: fedgan keys rotate server --host NAME, or "
    "address it by a name that it has",
}
NO_TLS = (
    "WRONG_VERSION_NUMBER",
    "RECORD_LAYER_FAILURE",
    "UNEXPECTED_MESSAGE",
    "disconnected without sending",
)


@dataclass(frozen=True)
class Run:
    """A run at the SuperLink: `status` is pending, starting, running or finished."""

    number: int
    status: str
    sub_status: str = ""  # of a finished run: completed, failed or stopped
    details: str = ""
    submitted: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)  # the submitted run-config

    @property
    def is_over(self) -> bool:
        return self.status == "finished"

    @property
    def is_complete(self) -> bool:
        """Whether it succeeded."""
        return (self.status, self.sub_status) == ("finished", "completed")

    @property
    def text(self) -> str:
        return f"{self.status}:{self.sub_status}" if self.sub_status else self.status

    @property
    def output(self) -> str:
        """Its run folder on the ServerApp's disk."""
        return str(self.config.get("output", ""))


@dataclass(frozen=True)
class Node:
    """A registered hospital; `status` is registered (never seen), online or offline.

    `name`: as registered, NAME or NAME=IMAGES with the most training images that it may report.
    """

    name: str
    number: int
    status: str


class SuperLink:
    """The control API of the SuperLink at `address` (HOST:PORT), trusted by `authority`.

    A context manager. Every call but `log` returns or fails within half a minute. Raises
    `FederationError` where the SuperLink refuses; `httpx.RequestError` where it cannot be reached,
    so that a caller can retry.
    """

    def __init__(self, address: str, authority: Path) -> None:
        self.address, self.authority = address, authority
        tls_context(authority)  # fails first, with a clear error
        self._control = ControlHttpClient.from_server_address(
            address, False, authority.read_bytes(), []
        )

    def __enter__(self) -> SuperLink:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()

    def run(self, number: int) -> Run:
        """One run. Raises `FederationError` where there is no run of that number."""
        with self._refusals():
            found = self._control.ListRuns(ListRunsRequest(run_id=number)).run_dict
        return _run(found[number])

    def runs(self) -> list[Run]:
        """The newest twenty runs, newest first."""
        with self._refusals():
            found = self._control.ListRuns(ListRunsRequest()).run_dict
        return sorted(map(_run, found.values()), key=lambda run: run.submitted, reverse=True)

    def stop(self, number: int) -> None:
        """Stop a run. Raises `FederationError` where it is already over."""
        with self._refusals():
            if not self._control.StopRun(StopRunRequest(run_id=number)).success:
                raise FederationError(
                    f"the SuperLink did not stop run {number}: see fedgan deploy status"
                )

    def nodes(self) -> list[Node]:
        """Every registered hospital, by name."""
        with self._refusals():
            found = self._control.ListNodes(ListNodesRequest()).nodes_info
        rows = [
            Node(str(row.name), int(row.node_id), str(row.status))
            for row in found
            if row.status != UNREGISTERED
        ]
        return sorted(rows, key=lambda row: (row.name, row.number))

    def log(self, number: int, after: float) -> Iterator[tuple[str, float]]:
        """Pieces of a run's log after a timestamp, each with its own timestamp, to the run's end.

        Pieces end anywhere. The wait for the next one has no limit: read it in a thread.
        """
        with self._refusals():
            for piece in self._control.StreamLogs(
                StreamLogsRequest(run_id=number, after_timestamp=after)
            ):
                yield str(piece.log_output), float(piece.latest_timestamp)

    def submit(self, config: Mapping[str, str | bool], app: Path = REPOSITORY) -> int:
        """Start a run of the app; returns its number. `FederationError` has Flower's reason."""
        command = Path(sys.executable).with_name("flwr")
        flwr_run = [
            str(command) if command.is_file() else shutil.which("flwr") or "flwr",
            "run",
            str(app),
            CONNECTION,
        ]
        with tempfile.TemporaryDirectory(prefix="fedgan-") as home:
            connection = {
                "address": self.address,
                "root-certificates": str(self.authority.resolve()),
            }
            Path(home, "config.toml").write_text(
                tomli_w.dumps({"superlink": {CONNECTION: connection}}), encoding="utf-8"
            )
            run_config = Path(home, "run.toml")
            run_config.write_text(tomli_w.dumps(dict(config)), encoding="utf-8")
            environment = {
                "FLWR_HOME": home,
                "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_DISABLE_UPDATE_CHECK": "1",
            }
            try:
                done = subprocess.run(
                    [*flwr_run, "--format", "json", "-c", str(run_config)],
                    env=dict(os.environ) | environment,
                    capture_output=True,
                    text=True,
                    timeout=SUBMIT_SECONDS,
                )
            except FileNotFoundError:
                raise MachineError(
                    "the command flwr is missing: pip install -e . in the repository (see fedgan "
                    "doctor)"
                ) from None
            except subprocess.TimeoutExpired:
                raise FederationError(
                    f"flwr run did not end within {SUBMIT_SECONDS:.0f} s; fedgan deploy status "
                    "shows whether the SuperLink accepted the run"
                ) from None
        return _submitted(done.stdout, done.stderr)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """Convert a refusal of the SuperLink into `FederationError`."""
        try:
            yield
        except httpx.HTTPStatusError as error:
            if error.response.status_code >= 500:
                raise httpx.RequestError(
                    f"it replied {error.response.status_code}"
                ) from error  # it starts or stops
            raise FederationError(
                f"the SuperLink at {self.address} refused: {_reason(error.response)}"
            ) from error


def wait_until_healthy(address: str, authority: Path, timeout: float) -> None:
    """Return when the SuperLink is healthy, within `timeout` seconds.

    Raises `FederationError` where it does not reply in that time, and at once for an untrusted
    certificate or no TLS; `ConfigError` for an unreadable `authority` or an invalid `address`.
    """
    context, end = tls_context(authority), time.monotonic() + timeout
    if not address.rpartition(":")[2].isdigit() or "/" in address:
        raise ConfigError(
            f"'{address}' is no address of a SuperLink: write HOST:PORT, e.g. superlink:8000"
        )
    while True:
        try:
            httpx.get(
                f"https://{address}/health", verify=context, timeout=PROBE_SECONDS, trust_env=False
            ).raise_for_status()
            return
        except httpx.InvalidURL:
            raise ConfigError(
                f"'{address}' is no address of a SuperLink: write HOST:PORT, e.g. superlink:8000"
            ) from None
        except httpx.HTTPError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise FederationError(
                    f"the SuperLink at {address} is not trusted: "
                    f"{_certificate_advice(str(error), authority)}"
                ) from error
            if any(word in str(error) for word in NO_TLS):
                raise FederationError(
                    f"the server at {address} does not use TLS: it is no SuperLink of a deployment"
                ) from error
            if time.monotonic() > end:
                raise FederationError(
                    f"no SuperLink replies at {address} (waited {timeout:.0f} s: {error}): is it "
                    "running, and is this machine in its network?"
                ) from error
        time.sleep(POLL)


def tls_context(authority: Path) -> ssl.SSLContext:
    """TLS that trusts one authority only. Raises `ConfigError` for an unreadable certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=str(authority))
    except OSError as error:  # SSLError too
        raise ConfigError(
            f"cannot read the certificate {authority}: give --ca, or create keys with fedgan keys "
            "NAME..."
        ) from error
    return context


def _certificate_advice(text: str, authority: Path) -> str:
    default = (
        f"{authority} has not signed its certificate: give the ca.crt of the keys that it was "
        "started with"
    )
    return next((advice for words, advice in CERTIFICATE_ADVICE.items() if words in text), default)


def _reason(response: httpx.Response) -> str:
    """Flower's reason in an error response."""
    try:
        found = response.json()
        return " ".join(str(found[key]) for key in ("detail", "extra") if key in found) or str(
            found
        )
    except (ValueError, TypeError):
        return f"{response.status_code} {response.reason_phrase}"


def _run(found: Any) -> Run:
    status = found.status
    config = {
        key: getattr(value, value.WhichOneof("scalar"))
        for key, value in found.override_config.items()
    }
    return Run(
        int(found.run_id),
        str(status.status),
        str(status.sub_status),
        str(status.details),
        str(found.pending_at),
        config,
    )


def _submitted(stdout: str, stderr: str) -> int:
    """The run's number from the output of `flwr run --format json`."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = json.loads(stdout[stdout.index("{") :])
        if found.get("success"):
            return int(found["run-id"])
        raise FederationError(
            f"the SuperLink refused the run: {found.get('error-message') or found}"
        )
    lines = (stderr or stdout).strip().splitlines()
    raise FederationError(f"flwr run started no run: {lines[-1] if lines else 'no output'}")


@contextlib.contextmanager
def connected(address: str, authority: Path, timeout: float) -> Iterator[SuperLink]:
    """A healthy SuperLink.

    Raises as `wait_until_healthy`, and `FederationError` where the connection is lost later.
    """
    wait_until_healthy(address, authority, timeout)
    try:
        with SuperLink(address, authority) as link:
            yield link
    except httpx.RequestError as error:
        raise FederationError(f"the SuperLink at {address} no longer replies: {error}") from error
