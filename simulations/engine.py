"""Process that holds Flower's simulation engine, Ray and the server of one run.

`simulations.runner` starts it, reads its events from a pipe and ends it. It has a session of its
own, so that Ctrl-C on a terminal reaches the runner alone. It ends itself, and Ray with it, as soon
as its standard input closes: a killed runner leaves no process behind.

    python -m simulations.engine RUN EVENTS_FD CLIENT_APP evaluate|train-only
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

from fedgan.config import Settings
from fedgan.errors import FedganError
from fedgan.machine import share_cores
from fedgan.run_folder import RunFolder


def main() -> None:
    """Run the federation of a prepared run folder; the last event is `finished` or `failed`."""
    path, descriptor, client, mode = sys.argv[1:5]
    threading.Thread(target=_end_with_runner, daemon=True).start()
    channel = open(int(descriptor), "w", encoding="utf-8", buffering=1)  # noqa: SIM115 - until exit
    lock = threading.Lock()

    def on_event(event: dict[str, Any]) -> None:
        with lock:
            channel.write(json.dumps(event) + "\n")

    code = 0
    try:
        _federate(RunFolder(Path(path)), client, on_event, mode == "evaluate")
        on_event({"event": "finished"})
    except BaseException as error:
        traceback.print_exc()
        code = error.exit_code if isinstance(error, FedganError) else 1
        on_event({"event": "failed", "kind": type(error).__name__, "message": str(error)})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # engine threads that still wait for a hospital must not hold the process


class NoEvaluator:
    """Evaluates nothing: a comparison evaluates its arms itself, all with one evaluator."""

    def check_compatible(
        self, label_names: tuple[str, ...], exclusive: bool, channels: int, resolution: int
    ) -> None:
        """Accept any images."""

    def write_real_samples(self) -> None:
        """Do nothing."""

    def evaluate_round(self, generator: Any, round_number: int, images_seen: int) -> dict[str, Any]:
        """Return no metrics of a round."""
        return {}

    def evaluate_final(self, generator: Any, facts: dict[str, Any]) -> dict[str, Any]:
        """Return no metrics of the run."""
        return {}


def _federate(run: RunFolder, client: str, on_event: Any, evaluate: bool) -> None:
    from fedgan.runs.evaluator import Evaluator
    from fedgan.runs.preparation import evaluation_hospitals, experiment_of
    from fedgan.runs.round_state import is_over
    from server.federation import Federation

    settings = run.settings()
    evaluator: Any = NoEvaluator()
    if evaluate:
        hospitals = evaluation_hospitals(settings, run)
        evaluator = Evaluator(
            settings,
            run,
            hospitals,
            progress=lambda text: on_event({"event": "status", "text": text}),
        )
    federation = Federation(settings, run, experiment_of(run), evaluator, on_event)
    if not is_over(run, settings):
        _simulate(settings, federation, client)
    federation.evaluate_final()


def _simulate(settings: Settings, federation: Any, client: str) -> None:
    """Run the rounds in Flower's simulation engine. Raises what the server raised."""
    warnings.simplefilter("ignore")
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    module, _, attribute = client.partition(":")
    client_app = getattr(importlib.import_module(module), attribute)
    server_app = ServerApp()
    failure: list[BaseException] = []
    is_done = False

    @server_app.main()
    def train(grid: Grid, context: Context) -> None:
        nonlocal is_done
        try:
            federation.train(grid)
            is_done = True
        except BaseException as error:
            failure.append(error)
            # emitted at once: the engine may still wait for a hospital that trains or hangs
            kind = type(error).__name__
            federation.on_event({"event": "failed", "kind": kind, "message": str(error)})
            raise

    try:
        run_simulation(
            server_app,
            client_app,
            settings.federation.participants,
            backend_config=backend_config(settings),
        )
    except Exception:
        if not failure:
            raise
    if failure:
        raise failure[0]
    if not is_done:
        raise RuntimeError("Flower's simulation engine ended before the server did")


def backend_config(settings: Settings) -> Any:
    """Ray's resources: one process per hospital that can train at the same time."""
    import torch

    threads, actors = share_cores(settings.federation.threads, settings.federation.participants)
    client: dict[str, Any] = {"num_cpus": threads, "num_gpus": 0.0}
    init: dict[str, Any] = {"num_cpus": actors * threads, "_temp_dir": os.environ["FEDGAN_RAY_DIR"]}
    if settings.training.device != "cpu" and torch.cuda.is_available():
        init["num_gpus"] = torch.cuda.device_count()
        client["num_gpus"] = min(1.0, torch.cuda.device_count() / actors)
    return {"client_resources": client, "init_args": init}


def _end_with_runner() -> None:
    """Wait until standard input closes (the runner is gone), then end Ray and this process."""
    sys.stdin.buffer.read()
    shutil.rmtree(os.environ["FEDGAN_RAY_DIR"], ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
