"""Simulate a federation on this machine: `simulate` starts a run, `resume` continues one.

The federation runs in a process of its own (simulations/engine.py): a run must end when it has
failed, whatever Flower and Ray still wait for, and must leave no process behind. Everything that
matters is on the disk after each round, so a run can be ended at any moment.

Events, each a dict, go to `on_event` in the caller's thread:

    {"event": "preparing", "what": "phantoms" | "hospitals" | "engine"}
    {"event": "start", "hospitals": [name], "rounds": n, "first_round": n,
     "images": of the whole run, "images_seen": until now}
    {"event": "round_start", "round": n, "rounds": n, "images": {name: images of this round}}
    {"event": "progress", "round": n, "hospital": name, "images": of this round so far, "of": n}
    {"event": "evaluation", "round": n, "final": bool}             the evaluation starts
    {"event": "status", "text": what the evaluator does}
    {"event": "evaluated", "round": n, "final": bool, "result": dict}
    {"event": "note", "text": a consequence of this run's settings, once}
    {"event": "round_end", "round": n, "rounds": n, "line": its line of metrics.jsonl}
    {"event": "finished"}                                          evaluation.json is written
    {"event": "complete", "message": text}                         resume found nothing to do
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
from fedgan import files
from fedgan.config import Settings
from fedgan.errors import ConfigError, FederationError, FedganError, MachineError
from fedgan.run_folder import RunFolder
from fedgan.runs.lock import locked, remove_temporary_files
from fedgan.runs.preparation import experiment_of, is_deployed, is_prepared, prepare_run
from fedgan.runs.round_state import has_line, is_over

OnEvent = Callable[[dict[str, Any]], None]
CLIENT = "client.app:app"
GRACE_AFTER_END = 30.0
GRACE_AFTER_FAILURE = 3.0
REPOSITORY = Path(__file__).resolve().parent.parent
# Flower reads some of these on import, so they must be set before the engine's process starts.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # default 15: other work on the machine would starve the hospitals
}


def simulate(
    settings: Settings,
    run: RunFolder,
    on_event: OnEvent | None = None,
    client: str = CLIENT,
    evaluate: bool = True,
) -> RunFolder:
    """Run a scenario from its beginning in the folder `run`, until evaluation.json is written.

    `client` is the import path of the hospitals' ClientApp. Without `evaluate` nothing is
    evaluated: a comparison evaluates all its arms with one evaluator. Raises `ConfigError` when the
    folder holds a run already, `FederationError` when a hospital failed (the run can be resumed
    then), `KeyboardInterrupt` on Ctrl-C.
    """
    on_event = on_event or (lambda event: None)
    if run.config.exists():
        raise ConfigError(
            f"{run.path} already holds a run: continue it with `fedgan resume {run.path}`, or "
            "give another --output"
        )
    with locked(run) as lock:
        prepare_run(settings, run, on_event, simulated=True)
        _run_engine(run, on_event, client, lock, evaluate)
    return run


def resume(
    run: RunFolder, on_event: OnEvent | None = None, client: str = CLIENT, evaluate: bool = True
) -> RunFolder:
    """Continue a stopped, killed or failed run from its last whole round; `evaluate` as above.

    Raises `ConfigError` when there is no run, only a second evaluation of one, or a run whose
    settings were changed, and what `simulate` raises.
    """
    on_event = on_event or (lambda event: None)
    run.refuse_repeated_evaluation()
    settings = run.settings()
    if is_deployed(run):
        raise ConfigError(
            f"{run.path} was trained by deployed hospitals: continue it with `fedgan deploy resume`"
        )
    with locked(run) as lock:
        begun = is_prepared(run)
        if begun:
            experiment_of(run)  # refuses changed settings
        if is_complete(run, settings) if evaluate else is_trained(run, settings):
            rounds = run.last_round()
            text = f"{run.path} is complete: {rounds} rounds and the evaluation are done"
            on_event({"event": "complete", "message": text})
            return run
        remove_temporary_files(run)
        if not begun:
            prepare_run(settings, run, on_event, simulated=True)
        _run_engine(run, on_event, client, lock, evaluate)
    return run


def is_complete(run: RunFolder, settings: Settings) -> bool:
    """Whether no round is left to train and evaluation.json is of the last one."""
    evaluated = (run.read_json(run.evaluation) or {}).get("round")
    return is_over(run, settings) and evaluated == run.last_round()


def is_trained(run: RunFolder, settings: Settings) -> bool:
    """Whether no round is left to train and metrics.jsonl has the line of the last one."""
    return is_over(run, settings) and has_line(run, run.last_round() or 0)


# --- the engine's process ------------------------------------------------------------------------


def _run_engine(run: RunFolder, on_event: OnEvent, client: str, lock: int, evaluate: bool) -> None:
    """Run the engine's process to its end, forward its events, and leave no process behind."""
    on_event({"event": "preparing", "what": "engine"})
    begun = time.time()
    reading, writing = os.pipe()
    ray_folder = tempfile.mkdtemp(prefix="fedgan-")  # short: paths of Ray's sockets are limited
    mode = "evaluate" if evaluate else "train-only"
    arguments = [str(run.path), str(writing), client, mode]
    with (
        open(run.path / "flower.log", "ab") as log,
        os.fdopen(reading, "rb", buffering=0) as events,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "simulations.engine", *arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=engine_environment(ray_folder),
            pass_fds=(writing, lock),
            start_new_session=True,
        )
        os.close(writing)
        try:
            last = _forward_events(process, events, run, on_event)
        finally:
            _end_processes(process)
            shutil.rmtree(ray_folder, ignore_errors=True)
    _check_last_event(run, last, process.returncode, begun)
    on_event({"event": "finished"})


def engine_environment(ray_folder: str) -> dict[str, str]:
    """Environment of the engine and of Ray's actors: hospitals may use the run's folder."""
    return child_environment() | {"FEDGAN_RAY_DIR": ray_folder, SIMULATION: "1"}


def child_environment() -> dict[str, str]:
    """Environment of a process of the repository: no telemetry, the repository on its path."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return dict(os.environ) | QUIET | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _forward_events(
    process: subprocess.Popen[bytes], events: IO[bytes], run: RunFolder, on_event: OnEvent
) -> dict[str, Any] | None:
    """Forward events until `finished` or `failed`, and return that event; None without one."""
    buffer, shown = b"", dict[str, tuple[int, int]]()
    last: dict[str, Any] | None = None
    deadline = float("inf")
    while time.monotonic() < deadline:
        ready, _, _ = select.select([events], [], [], 0.5)
        if ready:
            chunk = os.read(events.fileno(), 65536)
            if not chunk:
                break
            *lines, buffer = (buffer + chunk).split(b"\n")
            for event in map(json.loads, lines):
                if event["event"] in ("finished", "failed"):
                    last = last or event
                    is_finished = event["event"] == "finished"
                    grace = GRACE_AFTER_END if is_finished else GRACE_AFTER_FAILURE
                    deadline = time.monotonic() + grace
                else:
                    on_event(event)
        elif last is None:
            _emit_progress(run, shown, on_event)
    if last and last["event"] == "finished":
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_AFTER_END)
    return last


def _emit_progress(run: RunFolder, shown: dict[str, tuple[int, int]], on_event: OnEvent) -> None:
    """Emit the content of the hospitals' progress files where it has changed."""
    for path in sorted(run.path.glob("hospitals/*/progress.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            found = files.parse_json(path.read_bytes())
            progress = (found["round"], found["images"])
            if shown.get(path.parent.name) != progress:
                shown[path.parent.name] = progress
                on_event({"event": "progress", "hospital": path.parent.name, **found})


def _end_processes(process: subprocess.Popen[bytes]) -> None:
    """Kill the engine and its process group, Ray's processes included, and wait for their end."""
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


def _check_last_event(run: RunFolder, last: dict[str, Any] | None, code: int, begun: float) -> None:
    """Raise the error with which the engine ended, if one, and name the logs."""
    if last and last["event"] == "finished":
        return
    logs = [
        path
        for path in sorted(run.path.glob("hospitals/*/client.log"))
        if path.stat().st_mtime >= begun
    ]
    where = f"see {' and '.join(str(path) for path in [*logs, run.path / 'flower.log'])}"
    advice = f"{where}; continue with: fedgan resume {run.path}"
    if last is None:
        raise FederationError(
            "the simulation's process ended without an error message "
            f"(exit status {code}; out of memory?)\n{advice}"
        )
    kind = getattr(fedgan.errors, last["kind"], None)
    message = (last["message"].strip().splitlines() or ["no reason given"])[0]
    if isinstance(kind, type) and issubclass(kind, FedganError):
        # resuming alone would fail in the same way
        needs_fix = issubclass(kind, ConfigError | MachineError)
        raise kind(f"{message}\n{where if needs_fix else advice}")
    raise FederationError(f"the simulation failed with {last['kind']}: {message}\n{advice}")
