"""`fedgan deploy` at its boundary to Flower: submissions, logs, and every kind of failure."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import ssl
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from fedgan import events
from fedgan.cli import main, progress
from fedgan.config import from_dict, load_scenario, to_dict
from fedgan.deployment import certificates
from fedgan.deployment.key_folder import KeyFolder
from fedgan.errors import ConfigError, FederationError
from fedgan.run_folder import RunFolder
from fedgan.runs.preparation import as_deployed
from server import app as server_app
from server.operator import follow as following
from server.operator import superlink
from server.operator.follow import follow
from server.operator.superlink import Node, Run, SuperLink, wait_until_healthy

RUNNING = Run(7, "running", config={"output": "/runs/tiny"})
COMPLETED = replace(RUNNING, status="finished", sub_status="completed")
FAILED = replace(
    RUNNING, status="finished", sub_status="failed", details="No heartbeat received from the task"
)
STOPPED = replace(RUNNING, status="finished", sub_status="stopped")
GONE = httpx.ConnectError("connection refused")
HANGS = object()  # in a log: no more lines and no error


class FakeLink:
    """A SuperLink with scripted replies.

    Each status request returns the next of `states`, then always the last; each log request
    streams the next of `logs`.
    """

    address = "superlink:8000"

    def __init__(self, states: list[Run | BaseException], logs: list[list[Any]]) -> None:
        self.states, self.logs = states, logs
        self.submitted: list[dict[str, Any]] = []
        self.requested_after: list[float] = []  # timestamps of the log requests
        self.stopped: list[int] = []

    def nodes(self) -> list[Node]:
        return [Node("alpha", 1, "online"), Node("beta", 2, "offline")]

    def runs(self) -> list[Run]:
        return [COMPLETED]

    def run(self, number: int) -> Run:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, BaseException):
            raise state
        return state

    def stop(self, number: int) -> None:
        self.stopped.append(number)

    def submit(self, config: dict[str, Any]) -> int:
        self.submitted.append(config)
        return 7

    def log(self, number: int, after: float) -> Iterator[tuple[str, float]]:
        self.requested_after.append(after)
        for moment, piece in enumerate(self.logs.pop(0) if self.logs else [], int(after) + 1):
            if piece is HANGS:
                threading.Event().wait(60)
            if isinstance(piece, Exception):
                raise piece
            yield piece, float(moment)


@pytest.fixture(autouse=True)
def shorten_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "LAST_LINES", 0.3)
    monkeypatch.setattr(follow, "__defaults__", (follow.__defaults__[0], 0.5, 0.05))
    monkeypatch.delenv(events.FORMAT, raising=False)


def followed(link: FakeLink) -> tuple[Run, list[str], list[str]]:
    """The finished run, the lines of its log, and the notes on the connection."""
    lines, notes = list[str](), list[str]()
    return follow(link, 7, lines.append, notes.append), lines, notes


def test_follow_joins_pieces_to_lines_in_order() -> None:
    link = FakeLink([RUNNING, RUNNING, COMPLETED], [["on", "e\ntw", "o\n\nthr", "ee\nfour"]])
    assert followed(link) == (COMPLETED, ["one", "two", "", "three", "four"], [])


def test_follow_continues_a_broken_log_after_its_last_piece() -> None:
    broken = httpx.RemoteProtocolError("peer closed connection")
    link = FakeLink(
        [RUNNING, RUNNING, COMPLETED],
        [["one\nt", "w", broken], [ValueError("truncated frame")], ["o\nthree\n"]],
    )
    assert followed(link) == (COMPLETED, ["one", "two", "three"], [])
    assert link.requested_after == [0.0, 2.0, 2.0]


def test_follow_requests_a_log_again_that_ends_before_its_run() -> None:
    link = FakeLink([RUNNING, RUNNING, COMPLETED], [["one\n"], ["two\n"], ["three\n"]])
    assert followed(link)[:2] == (COMPLETED, ["one", "two", "three"])


def test_follow_waits_for_a_restarting_superlink_and_reconnects() -> None:
    link = FakeLink([RUNNING, GONE, GONE, RUNNING, COMPLETED], [["one\n", HANGS], ["two\n"]])
    run, lines, notes = followed(link)
    assert (run, lines) == (COMPLETED, ["one", "two"])
    assert [text.partition(" (")[0] for text in notes] == [
        "no reply from the SuperLink",
        "the SuperLink replies again",
    ]


def test_follow_fails_for_a_superlink_that_stays_unreachable() -> None:
    with pytest.raises(FederationError, match="the state of run 7 is unknown"):
        followed(FakeLink([RUNNING, GONE], [["one\n"]]))


def test_follow_ends_with_the_run_even_if_the_log_hangs() -> None:
    assert followed(FakeLink([RUNNING, FAILED], [["one\n", HANGS]]))[:2] == (FAILED, ["one"])


def test_follow_fails_at_once_for_an_unknown_run() -> None:
    with pytest.raises(FederationError, match="no such run"):
        followed(FakeLink([RUNNING], [[FederationError("no such run")]]))


# --- the commands ---


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(
        'name = "small study"\ndata = {root = "my/data"}\n'
        "training = {kimg = 1}\nfederation = {rounds = 2}\n"
    )
    return path


@pytest.fixture
def deploy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs `fedgan deploy ARGUMENTS` against a FakeLink."""

    def run(link: FakeLink, *arguments: str) -> tuple[int, str, str]:
        @contextlib.contextmanager
        def connected(*_: Any) -> Iterator[FakeLink]:
            yield link

        monkeypatch.setattr(superlink, "connected", connected)
        code = main(["deploy", *arguments])
        return code, *capsys.readouterr()

    return run


def line(**event: Any) -> str:
    return events.as_line(event) + "\n"


def failed(kind: str, message: str) -> str:
    return line(event="failed", kind=kind, message=message)


LATE = failed("FederationError", "hospital 2 'beta' did not reply\nmore of it")
FINISHED = line(event="finished", run="/runs/tiny", report="/runs/tiny/report.html")


@pytest.mark.parametrize(
    ("last_state", "log", "code", "text"),
    [
        (COMPLETED, [FINISHED], 0, ""),
        (
            FAILED,
            [LATE],
            5,
            "'beta' did not reply\nsee: fedgan deploy logs 7; "
            "continue with: fedgan deploy resume /runs/tiny",
        ),
        (FAILED, [failed("DataError", "no test images")], 3, "fedgan: no test images"),
        (
            FAILED,
            [failed("ConfigError", "other settings")],
            2,
            "other settings\nsee: fedgan deploy logs 7\n",
        ),
        (FAILED, [failed("KeyError", "'x'")], 5, "the ServerApp failed with KeyError: 'x'"),
        (
            FAILED,
            ["Traceback ...\n"],
            5,
            "run 7 is finished:failed: No heartbeat received from the task\n",
        ),
        (FAILED, [FINISHED], 5, "run 7 is finished:failed"),
        (STOPPED, [failed("SystemExit", "")], 5, "run 7 was stopped"),
        (
            replace(RUNNING, status="finished"),
            [FINISHED],
            5,
            "run 7 is finished: the ServerApp gave no reason",
        ),
        (FAILED, ['{"event": "failed"\n', '{"event": 3}\n'], 5, "No heartbeat"),
    ],
)
def test_run_returns_the_exit_code_of_the_run(
    last_state: Run,
    log: list[str],
    code: int,
    text: str,
    scenario: Path,
    deploy: Callable[..., tuple[int, str, str]],
) -> None:
    found, out, err = deploy(FakeLink([RUNNING, last_state], [log]), "run", str(scenario))
    assert found == code
    assert text in err
    assert ("report      /runs/tiny/report.html" in out) == (code == 0)


def test_submitted_config_needs_no_file_of_the_operator(
    scenario: Path,
    deploy: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    link = FakeLink([COMPLETED], [[FINISHED]])
    assert deploy(link, "run", str(scenario), "--set", "seed=3", "--output", "/runs/x")[0] == 0
    settings = load_scenario(scenario, ["seed=3"])
    scenario.unlink()
    monkeypatch.chdir(tmp_path)
    (config,) = link.submitted
    assert all(isinstance(value, str | bool) for value in config.values())
    assert tomllib.loads(Path(__file__).parent.parent.joinpath("pyproject.toml").read_text())[
        "tool"
    ]["flwr"]["app"]["config"].keys() >= set(config)
    assert server_app.find_run(config) == (settings, RunFolder.at("/runs/x"))
    assert config["deployed"] is True


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--set", "training.kimg=many"], "training.kimg"),
        (["--set", "data.partition=iid"], "a server cannot partition data"),
        (["--output", "runs/here"], "'runs/here' is no absolute path on the server's disk"),
    ],
)
def test_invalid_scenario_is_not_submitted(
    options: list[str], error: str, scenario: Path, deploy: Callable[..., tuple[int, str, str]]
) -> None:
    link = FakeLink([COMPLETED], [])
    code, _, err = deploy(link, "run", str(scenario), *options)
    assert (code, link.submitted) == (2, [])
    assert error in err


def test_run_shows_rounds_hospitals_and_notes(
    scenario: Path, deploy: Callable[..., tuple[int, str, str]]
) -> None:
    numbers = {"round": 1, "images_seen": 500, "mean": {"loss_g": 0.5}}
    log = [
        line(
            event="start", hospitals=["alpha"], rounds=2, first_round=1, images=1000, images_seen=0
        ),
        line(
            event="note",
            text="hospital 2 'beta' is not online; the round continues without it",
        ),
        "INFO : of Flower's own\n",
        line(event="round_end", round=1, rounds=2, line=numbers),
        FINISHED,
    ]
    _, _, err = deploy(FakeLink([RUNNING, COMPLETED], [log]), "run", str(scenario))
    assert "hospitals online: alpha\n" in err
    assert "hospitals alpha: rounds 1 to 2, 1000 images in total\n" in err
    assert "the round continues without it\n" in err
    assert "round 1/2  0.5 kimg  loss_g 0.500" in err
    assert "of Flower's own" not in err
    code, out, _ = deploy(FakeLink([COMPLETED], [log]), "logs")
    assert code == 0
    assert "of Flower's own\nround 1/2  0.5 kimg" in out
    code, out, _ = deploy(FakeLink([COMPLETED], [log]), "logs", "7", "--json")
    assert [json.loads(row)["event"] for row in out.splitlines()] == [
        "start",
        "note",
        "round_end",
        "finished",
    ]


def test_ctrl_c_does_not_stop_the_run(
    scenario: Path, deploy: Callable[..., tuple[int, str, str]]
) -> None:
    link = FakeLink([RUNNING, KeyboardInterrupt()], [["one\n"]])
    code, _, err = deploy(link, "run", str(scenario))
    assert (code, link.stopped) == (130, [])
    assert (
        "run 7 continues without this command; "
        "log: fedgan deploy logs 7; stop: fedgan deploy stop 7" in err
    )


def test_detach_resume_stop_and_status(
    scenario: Path, deploy: Callable[..., tuple[int, str, str]]
) -> None:
    link = FakeLink([RUNNING, STOPPED], [])
    code, out, _ = deploy(link, "run", str(scenario), "--detach", "--json")
    assert (code, json.loads(out)) == (0, {"run": 7, "output": "/runs/small-study"})
    assert deploy(link, "resume", "/runs/x", "--detach")[:2] == (0, "7\n")
    assert link.submitted[1] == {
        "scenario": "",
        "settings": "",
        "output": "/runs/x",
        "deployed": True,
    }
    code, out, _ = deploy(link, "stop", "7")
    assert (code, link.stopped) == (0, [7])
    assert "run 7 is finished:stopped; continue with: fedgan deploy resume /runs/tiny" in out
    assert deploy(FakeLink([COMPLETED], []), "stop")[0] == 2
    code, out, _ = deploy(FakeLink([FAILED], []), "status", "7")
    assert "beta      offline" in out
    assert "7: No heartbeat received" in out


# --- the submission by Flower's command ---


@pytest.fixture
def flwr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], SuperLink]:
    """A SuperLink whose `flwr` is a shell script that copies its input to `given`."""
    keys = KeyFolder.create(tmp_path / "keys", ["alpha"], [], 30, certificates.now())

    def make(script: str) -> SuperLink:
        path = tmp_path / "bin" / "flwr"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f'#!/bin/sh\ncp -r "$FLWR_HOME" {tmp_path}/given\n'
            f'echo "$@" > {tmp_path}/arguments\n{script}\n'
        )
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path.with_name("python")))
        return SuperLink("superlink:8000", keys.authority)

    return make


def test_flwr_run_gets_the_connection_and_the_run_config(
    flwr: Callable[[str], SuperLink], tmp_path: Path
) -> None:
    config = {
        "settings": json.dumps({"description": "quotes ' and \" and [brackets]\n"}),
        "deployed": True,
    }
    link = flwr("""echo 'Loading...'; echo '{"success": true, "run-id": "18446744073709551615"}'""")
    assert link.submit(config, tmp_path) == 18446744073709551615
    assert tomllib.loads((tmp_path / "given/run.toml").read_text()) == config
    connection = tomllib.loads((tmp_path / "given/config.toml").read_text())["superlink"][
        "federation"
    ]
    assert connection == {
        "address": "superlink:8000",
        "root-certificates": str(tmp_path / "keys/ca.crt"),
    }
    arguments = (tmp_path / "arguments").read_text().split()
    assert not Path(arguments[-1]).exists(), "the temporary configuration still exists"
    assert arguments[:3] == ["run", str(tmp_path), "federation"]


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (
            """echo '{"success": false, "error-message": "[code: 15] Invalid"}'; exit 1""",
            "code: 15",
        ),
        ("""echo '{"success": false, "run-id": null}'""", "refused the run"),
        ("echo 'Connection refused' >&2; exit 1", "flwr run started no run: Connection refused"),
        ("echo '{broken'", "flwr run started no run"),
        ("exit 0", "no output"),
        ("exec sleep 20", "did not end within 0 s"),
    ],
)
def test_failed_submission_is_an_error_with_any_exit_code(
    script: str, text: str, flwr: Callable[[str], SuperLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sleep" in script:
        monkeypatch.setattr(superlink, "SUBMIT_SECONDS", 0.3)
    with pytest.raises(FederationError) as caught:
        flwr(script).submit({"deployed": True})
    assert text in str(caught.value)


# --- the certificate of the SuperLink ---


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(keys: KeyFolder | None) -> Iterator[str]:
    """Run a server with the certificate of `keys`, or without TLS; yields its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy)
    if keys:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(
            keys.server_certificate, keys.server_certificate.with_name("server.key")
        )
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def create_keys(path: Path, days_ago: int) -> KeyFolder:
    return KeyFolder.create(path, ["alpha"], [], 30, certificates.now() - timedelta(days=days_ago))


def test_superlink_is_trusted_by_its_own_authority_only(tmp_path: Path) -> None:
    keys, others, old = (
        create_keys(tmp_path / name, days)
        for name, days in (("keys", 0), ("others", 0), ("old", 31))
    )
    with serving(keys) as address:
        wait_until_healthy(address, keys.authority, 5.0)
        with pytest.raises(FederationError, match=r"others/ca\.crt has not signed its certificate"):
            wait_until_healthy(address, others.authority, 60.0)
    with (
        serving(old) as address,
        pytest.raises(FederationError, match="has expired: fedgan keys rotate server"),
    ):
        wait_until_healthy(address, old.authority, 60.0)
    with serving(None) as address, pytest.raises(FederationError, match="does not use TLS"):
        wait_until_healthy(address, keys.authority, 60.0)


def test_unreachable_superlink_is_an_error_after_the_timeout(tmp_path: Path) -> None:
    keys = create_keys(tmp_path / "keys", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(FederationError, match=f"no SuperLink replies at {address}"):
            wait_until_healthy(address, keys.authority, 0.1)
    for wrong in ("superlink", "https://superlink:8000", "superlink:http"):
        with pytest.raises(ConfigError, match="is no address of a SuperLink"):
            wait_until_healthy(wrong, keys.authority, 60.0)
    with pytest.raises(ConfigError, match="cannot read the certificate"):
        wait_until_healthy(address, tmp_path / "nowhere.crt", 60.0)


# --- the ServerApp ---


def test_events_survive_a_line_and_other_lines_are_no_events() -> None:
    event = {"event": "evaluated", "round": 2, "text": 'a "quoted"\nline', "result": {"much": 1}}
    parsed = events.from_line(events.as_line(event))
    assert parsed
    assert parsed.pop("time")[-6:] == "+00:00"
    assert parsed == {"event": "evaluated", "round": 2, "text": 'a "quoted"\nline'}
    for other in ("", "INFO : x", '{"event": ', '{"event": 3}', "[1]", '{"round": 1}'):
        assert events.from_line(other) is None


def test_progress_is_json_with_fedgan_log_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(events.FORMAT, "json")
    with progress.Progress() as shown:
        shown.on_event({"event": "note", "text": "one"})
    assert json.loads(capsys.readouterr().err)["text"] == "one"


def test_run_folder_is_continued_with_its_own_settings_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGAN_REFERENCE", str(tmp_path / "reference"))
    settings, run = (
        from_dict({"name": "tiny", "data": {"root": "/hospital"}}),
        RunFolder.at(tmp_path / "run"),
    )
    given = {"settings": json.dumps(to_dict(settings)), "output": str(run.path), "deployed": True}
    resumed = {"settings": "", "scenario": "", "output": str(run.path), "deployed": True}
    with pytest.raises(ConfigError, match="holds no run to resume"):
        server_app.find_run(resumed)
    run.write_settings(as_deployed(settings))
    kept = run.settings()
    assert (kept.data.root, kept.evaluation.root) == ("", str(tmp_path / "reference"))
    assert server_app.find_run(given) == server_app.find_run(resumed) == (kept, run)
    with pytest.raises(ConfigError, match="other settings: resume it by fedgan deploy resume"):
        server_app.find_run(given | {"settings": json.dumps(to_dict(replace(settings, seed=1)))})


def test_serverapp_prints_the_reason_of_its_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"settings": '{"trainings": {}}', "output": str(tmp_path / "run"), "deployed": True}
    context: Any = SimpleNamespace(run_config=config)
    main_function: Any = server_app.main
    with pytest.raises(ConfigError, match="unknown key 'trainings'"):
        main_function(None, context)
    printed = [
        found for row in capsys.readouterr().out.splitlines() if (found := events.from_line(row))
    ]
    assert [(event["event"], event["kind"]) for event in printed] == [("failed", "ConfigError")]
