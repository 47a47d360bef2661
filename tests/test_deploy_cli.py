"""`fedgan deploy` at its boundary to Flower: what it submits, what it follows, and what it makes of every way to fail."""

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
HANGS = object()  # in a log: nothing comes any more, and no error either


class FakeLink:
    """A SuperLink by script: `states` answers one look after another, the last for ever; `logs` one stream after another."""

    address = "superlink:8000"

    def __init__(self, states: list[Run | BaseException], logs: list[list[Any]]) -> None:
        self.states, self.logs = states, logs
        self.submitted: list[dict[str, Any]] = []
        self.asked: list[float] = []  # the moments after which logs were asked for
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
        self.asked.append(after)
        for moment, piece in enumerate(self.logs.pop(0) if self.logs else [], int(after) + 1):
            if piece is HANGS:
                threading.Event().wait(60)
            if isinstance(piece, Exception):
                raise piece
            yield piece, float(moment)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "LAST_LINES", 0.3)
    monkeypatch.setattr(follow, "__defaults__", (follow.__defaults__[0], 0.5, 0.05))  # type: ignore[index]
    monkeypatch.delenv(events.FORMAT, raising=False)


def followed(link: FakeLink) -> tuple[Run, list[str], list[str]]:
    """How the run ended, the lines that came, and what was said of the connection."""
    lines, said = list[str](), list[str]()
    return follow(link, 7, lines.append, said.append), lines, said


def test_lines_come_whole_once_and_in_order_wherever_the_log_is_cut() -> None:
    link = FakeLink([RUNNING, RUNNING, COMPLETED], [["on", "e\ntw", "o\n\nthr", "ee\nfour"]])
    assert followed(link) == (COMPLETED, ["one", "two", "", "three", "four"], [])


def test_a_log_that_breaks_off_is_read_on_from_where_it_was() -> None:
    broken = httpx.RemoteProtocolError("peer closed connection")
    link = FakeLink(
        [RUNNING, RUNNING, COMPLETED],
        [["one\nt", "w", broken], [ValueError("truncated frame")], ["o\nthree\n"]],
    )
    assert followed(link) == (COMPLETED, ["one", "two", "three"], [])
    assert link.asked == [0.0, 2.0, 2.0]


def test_a_log_that_ends_before_its_run_is_asked_for_again() -> None:
    link = FakeLink([RUNNING, RUNNING, COMPLETED], [["one\n"], ["two\n"], ["three\n"]])
    assert followed(link)[:2] == (COMPLETED, ["one", "two", "three"])


def test_a_superlink_that_restarts_is_waited_for_and_its_dead_connection_forgotten() -> None:
    link = FakeLink([RUNNING, GONE, GONE, RUNNING, COMPLETED], [["one\n", HANGS], ["two\n"]])
    run, lines, said = followed(link)
    assert (run, lines) == (COMPLETED, ["one", "two"])
    assert [text.partition(" (")[0] for text in said] == [
        "no reply from the SuperLink",
        "the SuperLink replies again",
    ]


def test_a_superlink_that_stays_away_is_given_up() -> None:
    with pytest.raises(FederationError, match="what became of run 7 is not known"):
        followed(FakeLink([RUNNING, GONE], [["one\n"]]))


def test_a_run_is_over_when_its_status_says_so_also_where_the_log_hangs() -> None:
    assert followed(FakeLink([RUNNING, FAILED], [["one\n", HANGS]]))[:2] == (FAILED, ["one"])


def test_a_run_that_nobody_knows_is_an_error_at_once() -> None:
    with pytest.raises(FederationError, match="no such run"):
        followed(FakeLink([RUNNING], [[FederationError("no such run")]]))


# --- the commands ---------------------------------------------------------------------------------


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(
        'name = "small study"\n[data]\nroot = "my/data"\n[training]\nkimg = 1\n[federation]\nrounds = 2\n'
    )
    return path


@pytest.fixture
def deploy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`fedgan deploy WORDS` against a FakeLink."""

    def run(link: FakeLink, *words: str) -> tuple[int, str, str]:
        @contextlib.contextmanager
        def connected(*_: Any) -> Iterator[FakeLink]:
            yield link

        monkeypatch.setattr(superlink, "connected", connected)
        code = main(["deploy", *words])
        return code, *capsys.readouterr()

    return run


def line(**event: Any) -> str:
    return events.as_line(event) + "\n"


def failed(kind: str, message: str) -> str:
    return line(event="failed", kind=kind, message=message)


LATE = failed("FederationError", "hospital 2 'beta' did not answer\nmore of it")
FINISHED = line(event="finished", run="/runs/tiny", report="/runs/tiny/report.html")


@pytest.mark.parametrize(
    ("ending", "log", "code", "words"),
    [
        (COMPLETED, [FINISHED], 0, ""),
        (
            FAILED,
            [LATE],
            5,
            "'beta' did not answer\nsee: fedgan deploy logs 7; go on with: fedgan deploy resume /runs/tiny",
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
def test_the_exit_status_is_the_run_s(
    ending: Run,
    log: list[str],
    code: int,
    words: str,
    scenario: Path,
    deploy: Callable[..., tuple[int, str, str]],
) -> None:
    found, out, said = deploy(FakeLink([RUNNING, ending], [log]), "run", str(scenario))
    assert found == code
    assert words in said
    assert ("report      /runs/tiny/report.html" in out) == (code == 0)


def test_what_is_submitted_needs_no_file_of_the_operator_s(
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
    ("words", "said"),
    [
        (["--set", "training.kimg=many"], "training.kimg"),
        (["--set", "data.partition=iid"], "a server cannot partition data"),
        (["--output", "runs/here"], "'runs/here' is no absolute path on the server's disk"),
    ],
)
def test_a_scenario_that_cannot_run_is_not_submitted(
    words: list[str], said: str, scenario: Path, deploy: Callable[..., tuple[int, str, str]]
) -> None:
    link = FakeLink([COMPLETED], [])
    code, _, text = deploy(link, "run", str(scenario), *words)
    assert (code, link.submitted) == (2, [])
    assert said in text


def test_rounds_hospitals_and_remarks_are_shown(
    scenario: Path, deploy: Callable[..., tuple[int, str, str]]
) -> None:
    numbers = {"round": 1, "images_seen": 500, "mean": {"loss_g": 0.5}}
    log = [
        line(
            event="start", hospitals=["alpha"], rounds=2, first_round=1, images=1000, images_seen=0
        ),
        line(
            event="note",
            text="hospital 2 'beta' failed in round 1: is not online; the round continues without it",
        ),
        "INFO : of Flower's own\n",
        line(event="round_end", round=1, rounds=2, line=numbers),
        FINISHED,
    ]
    _, _, said = deploy(FakeLink([RUNNING, COMPLETED], [log]), "run", str(scenario))
    assert "hospitals online: alpha\n" in said
    assert "hospitals alpha: rounds 1 to 2, 1000 images in all\n" in said
    assert "the round continues without it\n" in said
    assert "round 1/2  0.5 kimg  loss_g 0.500" in said
    assert "of Flower's own" not in said
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


def test_ctrl_c_leaves_the_run_alone(
    scenario: Path, deploy: Callable[..., tuple[int, str, str]]
) -> None:
    link = FakeLink([RUNNING, KeyboardInterrupt()], [["one\n"]])
    code, _, said = deploy(link, "run", str(scenario))
    assert (code, link.stopped) == (130, [])
    assert (
        "run 7 goes on without this command; look at it: fedgan deploy logs 7; stop it: fedgan deploy stop 7"
        in said
    )


def test_detached_resumed_stopped(
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
    assert "run 7 is finished:stopped; go on with: fedgan deploy resume /runs/tiny" in out
    assert deploy(FakeLink([COMPLETED], []), "stop")[0] == 2
    code, out, _ = deploy(FakeLink([FAILED], []), "status", "7")
    assert "beta      offline" in out
    assert "7: No heartbeat received" in out


# --- what Flower's own command says ------------------------------------------------------------------


@pytest.fixture
def flwr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], SuperLink]:
    """A SuperLink whose `flwr` is a shell script; what it was given lies in `given` beside it."""
    keys = KeyFolder.create(tmp_path / "keys", ["alpha"], [], 30, certificates.now())

    def make(script: str) -> SuperLink:
        path = tmp_path / "bin" / "flwr"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f'#!/bin/sh\ncp -r "$FLWR_HOME" {tmp_path}/given\necho "$@" > {tmp_path}/words\n{script}\n'
        )
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path.with_name("python")))
        return SuperLink("superlink:8000", keys.authority)

    return make


def test_flower_s_command_is_given_the_connection_and_the_run_config(
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
    words = (tmp_path / "words").read_text().split()
    assert not Path(words[-1]).exists(), "the connection was left behind"
    assert words[:3] == ["run", str(tmp_path), "federation"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            """echo '{"success": false, "error-message": "[code: 15] Invalid run configuration"}'; exit 1""",
            "code: 15",
        ),
        ("""echo '{"success": false, "run-id": null}'""", "refused the run"),
        ("echo 'Connection refused' >&2; exit 1", "flwr run started no run: Connection refused"),
        ("echo '{broken'", "flwr run started no run"),
        ("exit 0", "it said nothing"),
        ("exec sleep 20", "did not end within 0 s"),
    ],
)
def test_a_submission_that_failed_is_an_error_whatever_the_exit_status(
    script: str, said: str, flwr: Callable[[str], SuperLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sleep" in script:
        monkeypatch.setattr(superlink, "SUBMIT_SECONDS", 0.3)
    with pytest.raises(FederationError) as caught:
        flwr(script).submit({"deployed": True})
    assert said in str(caught.value)


# --- whom to trust ------------------------------------------------------------------------------------


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(keys: KeyFolder | None) -> Iterator[str]:
    """The address of a server with this folder's certificate, or without TLS."""
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


def keys_made(path: Path, days_ago: int) -> KeyFolder:
    return KeyFolder.create(path, ["alpha"], [], 30, certificates.now() - timedelta(days=days_ago))


def test_a_superlink_is_trusted_by_its_own_authority_alone(tmp_path: Path) -> None:
    keys, others, old = (
        keys_made(tmp_path / name, days) for name, days in (("keys", 0), ("others", 0), ("old", 31))
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


def test_a_superlink_that_is_not_there_is_waited_for_not_for_ever(tmp_path: Path) -> None:
    keys = keys_made(tmp_path / "keys", 0)
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


# --- the ServerApp's side -----------------------------------------------------------------------------


def test_events_are_lines_that_hold_nothing_else() -> None:
    event = {"event": "evaluated", "round": 2, "text": 'a "quoted"\nline', "result": {"much": 1}}
    told = events.from_line(events.as_line(event))
    assert told
    assert told.pop("time")[-6:] == "+00:00"
    assert told == {"event": "evaluated", "round": 2, "text": 'a "quoted"\nline'}
    for other in ("", "INFO : x", '{"event": ', '{"event": 3}', "[1]", '{"round": 1}'):
        assert events.from_line(other) is None


def test_progress_is_json_where_the_environment_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(events.FORMAT, "json")
    with progress.Progress() as shown:
        shown.on_event({"event": "note", "text": "one"})
    assert json.loads(capsys.readouterr().err)["text"] == "one"


def test_a_folder_goes_on_with_its_own_settings_or_not_at_all(
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


def test_the_serverapp_says_why_it_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"settings": '{"trainings": {}}', "output": str(tmp_path / "run"), "deployed": True}
    context: Any = SimpleNamespace(run_config=words)
    main_function: Any = server_app.main
    with pytest.raises(ConfigError, match="unknown key 'trainings'"):
        main_function(None, context)
    told = [
        found for row in capsys.readouterr().out.splitlines() if (found := events.from_line(row))
    ]
    assert [(event["event"], event["kind"]) for event in told] == [("failed", "ConfigError")]
