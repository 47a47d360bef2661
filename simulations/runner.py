"""Simulates a federation on this machine: `simulate` begins a run, `resume` goes on with one.

The federation itself runs in a process of its own (simulations/engine.py), because a run must end
when it has failed, whatever Flower and Ray still wait for, and must leave no process behind. All
that matters is on the disk after each round, so ending a run at any moment is safe.

Events, each a dict, go to `on_event` in the caller's thread:

    {"event": "preparing", "what": "phantoms" | "hospitals" | "engine"}
    {"event": "start", "hospitals": [name], "rounds": n, "first_round": n, "images": in all, "images_seen": until now}
    {"event": "round_start", "round": n, "rounds": n, "images": {name: images of this round}}
    {"event": "progress", "round": n, "hospital": name, "images": shown in this round, "of": n}
    {"event": "evaluation", "round": n, "final": bool}                     the evaluator begins
    {"event": "status", "text": what the evaluator does}
    {"event": "evaluated", "round": n, "final": bool, "result": dict}
    {"event": "note", "text": what this run's settings mean, once}
    {"event": "round_end", "round": n, "rounds": n, "line": the round's line of metrics.jsonl}
    {"event": "finished"}                                                  all done, evaluation.json is written
    {"event": "complete", "message": text}                                 resume found nothing to do
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import fedgan.errors
from client.hospital import SIMULATION
from fedgan.config import Settings
from fedgan.errors import ConfigError, FederationError, FedganError, MachineError
from fedgan.run_folder import RunFolder
from fedgan.runs.lock import locked, sweep
from fedgan.runs.preparation import is_deployed, is_prepared, prepare_run
from fedgan.runs.round_state import has_line, is_over

OnEvent = Callable[[dict[str, Any]], None]
CLIENT = "client.app:app"
GRACE_AFTER_END = 30.0
GRACE_AFTER_FAILURE = 3.0
REPOSITORY = Path(__file__).resolve().parent.parent
# Flower reads some of these when it is imported: they belong into the engine's environment, not into its code.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # 15 otherwise: any other work on the machine would starve the hospitals
}


def simulate(
    settings: Settings,
    run: RunFolder,
    on_event: OnEvent | None = None,
    client: str = CLIENT,
    judged: bool = True,
) -> RunFolder:
    """Run a scenario from its beginning in the folder `run`; returns when evaluation.json is written.

    `client` is the import path of the hospitals' ClientApp. Without `judged` no evaluator looks at the run, neither
    meanwhile nor at the end: a comparison judges all its arms with one. Raises `ConfigError` when the folder holds a run
    already, `FederationError` when a hospital failed (the run can be resumed then), `KeyboardInterrupt` on Ctrl-C.
    """
    on_event = on_event or (lambda event: None)
    if run.config.exists():
        raise ConfigError(
            f"{run.path} already holds a run: continue it with `fedgan resume {run.path}`, or give another --output"
        )
    with locked(run) as lock:
        prepare_run(settings, run, on_event, simulated=True)
        _engine(run, on_event, client, lock, judged)
    return run


def resume(
    run: RunFolder, on_event: OnEvent | None = None, client: str = CLIENT, judged: bool = True
) -> RunFolder:
    """Go on with a run that was stopped, killed or failed, from its last whole round; `judged` as in `simulate`.

    Raises `ConfigError` when there is no run or a second look at one, and what `simulate` raises.
    """
    on_event = on_event or (lambda event: None)
    run.refuse_look()
    settings = run.settings()
    if is_deployed(run):
        raise ConfigError(
            f"{run.path} was trained by hospitals elsewhere: go on with it by fedgan deploy resume"
        )
    with locked(run) as lock:
        if is_complete(run, settings) if judged else is_trained(run, settings):
            on_event(
                {
                    "event": "complete",
                    "message": f"{run.path} is complete: {run.last_round()} rounds and the evaluation are done",
                }
            )
            return run
        sweep(run)
        if not is_prepared(run):
            prepare_run(settings, run, on_event, simulated=True)
        _engine(run, on_event, client, lock, judged)
    return run


def is_complete(run: RunFolder, settings: Settings) -> bool:
    """Whether no round is left to train and evaluation.json is about the last one."""
    return (
        is_over(run, settings)
        and (run.read_json(run.evaluation) or {}).get("round") == run.last_round()
    )


def is_trained(run: RunFolder, settings: Settings) -> bool:
    """Whether no round is left to train and the line of the last one is in metrics.jsonl."""
    return is_over(run, settings) and has_line(run, run.last_round() or 0)


# --- the engine's process --------------------------------------------------------------------------


def _engine(run: RunFolder, on_event: OnEvent, client: str, lock: int, judged: bool) -> None:
    """Start the engine, pass its events on, and see to it that nothing of it is left."""
    on_event({"event": "preparing", "what": "engine"})
    begun = time.time()
    reading, writing = os.pipe()
    ray_folder = tempfile.mkdtemp(
        prefix="fedgan-"
    )  # short: Ray puts sockets there, and their names are limited
    command = [
        sys.executable,
        "-m",
        "simulations.engine",
        str(run.path),
        str(writing),
        client,
        "judged" if judged else "unjudged",
    ]
    with (
        open(run.path / "flower.log", "ab") as log,
        os.fdopen(reading, "rb", buffering=0) as events,
    ):
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=engine_environment(ray_folder),
            pass_fds=(writing, lock),
            start_new_session=True,
        )
        os.close(writing)
        try:
            ending = _listen(process, events, run, on_event)
        finally:
            _end(process)
            shutil.rmtree(ray_folder, ignore_errors=True)
    _check_ending(run, ending, process.returncode, begun)
    on_event({"event": "finished"})


def engine_environment(ray_folder: str) -> dict[str, str]:
    """The environment of the engine, which Ray's actors inherit: no telemetry, and hospitals that may use the run's folder."""
    return child_environment() | {"FEDGAN_RAY_DIR": ray_folder, SIMULATION: "1"}


def child_environment() -> dict[str, str]:
    """The environment of a process that runs the repository's modules: quiet, and with the repository on its path."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return dict(os.environ) | QUIET | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _listen(
    process: subprocess.Popen[bytes], events: IO[bytes], run: RunFolder, on_event: OnEvent
) -> dict[str, Any] | None:
    """Pass events on until the engine says `finished` or `failed`; None when it ended without a word."""
    rest, shown = b"", dict[str, tuple[int, int]]()
    ending: dict[str, Any] | None = None
    deadline = float("inf")
    while time.monotonic() < deadline:
        ready, _, _ = select.select([events], [], [], 0.5)
        if ready:
            chunk = os.read(events.fileno(), 65536)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for event in map(json.loads, lines):
                if event["event"] in ("finished", "failed"):
                    ending = ending or event
                    deadline = time.monotonic() + (
                        GRACE_AFTER_END if event["event"] == "finished" else GRACE_AFTER_FAILURE
                    )
                else:
                    on_event(event)
        elif ending is None:
            _tell_progress(run, shown, on_event)
    if ending and ending["event"] == "finished":
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_AFTER_END)
    return ending


def _tell_progress(run: RunFolder, shown: dict[str, tuple[int, int]], on_event: OnEvent) -> None:
    """Tell what the hospitals' progress files say, where it is news."""
    for path in sorted(run.path.glob("hospitals/*/progress.json")):
        with contextlib.suppress(OSError, json.JSONDecodeError, KeyError):
            found = json.loads(path.read_text(encoding="utf-8"))
            place = (found["round"], found["images"])
            if shown.get(path.parent.name) != place:
                shown[path.parent.name] = place
                on_event({"event": "progress", "hospital": path.parent.name, **found})


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the engine and all processes of its session's group, Ray's among them, and wait until they are gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()
    end = time.monotonic() + 10
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def _check_ending(run: RunFolder, ending: dict[str, Any] | None, code: int, begun: float) -> None:
    """Raise the error that ended the engine, if one did, with the places where more is written."""
    if ending and ending["event"] == "finished":
        return
    logs = [
        path
        for path in sorted(run.path.glob("hospitals/*/client.log"))
        if path.stat().st_mtime >= begun
    ]
    where = f"see {' and '.join(str(path) for path in [*logs, run.path / 'flower.log'])}"
    advice = f"{where}; go on with: fedgan resume {run.path}"
    if ending is None:
        raise FederationError(
            f"the simulation's process ended without a word (exit status {code}; out of memory?)\n{advice}"
        )
    kind, message = (
        getattr(fedgan.errors, ending["kind"], None),
        ending["message"].strip().splitlines() or ["no reason given"],
    )
    if isinstance(kind, type) and issubclass(kind, FedganError):
        mended_first = issubclass(
            kind, ConfigError | MachineError
        )  # resuming alone would fail in the same way
        raise kind(f"{message[0]}\n{where if mended_first else advice}")
    raise FederationError(f"the simulation failed with {ending['kind']}: {message[0]}\n{advice}")
