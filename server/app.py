"""The Flower ServerApp that `flwr run .` starts: reads the scenario named in the run-config and federates it.

    flwr run . --federation-config 'num-supernodes=3 client-resources-num-cpus=1'
               -c 'scenario="simulations/three_hospitals.toml" overrides="training.kimg=10" output="/abs/runs/x"'

With `deployed=true` the hospitals are machines of their own (docs/deployment.md): the server opens none of their shards,
waits for those that fail or are absent, evaluates on `evaluation.root`, or FEDGAN_REFERENCE where that is empty, and prints its
events as JSON lines, which `fedgan deploy` reads (fedgan/events.py). `settings`, a whole scenario as JSON, stands in the place
of `scenario` and `overrides`: the operator's files are not here.

The code runs from a copy, in the working directory of Flower's daemon: give absolute paths. A scenario
that is not found there is looked for in the copy. An `output` that holds a run is gone on with.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import fedgan.report.html
from fedgan import events
from fedgan.config import Settings, from_dict, load_scenario
from fedgan.errors import ConfigError, FedganError
from fedgan.report.cards import write_cards
from fedgan.report.run.report import write_report
from fedgan.run_folder import RunFolder
from fedgan.runs.evaluator import Evaluator
from fedgan.runs.lock import locked, sweep
from fedgan.runs.preparation import (
    as_deployed,
    evaluation_hospitals,
    experiment_of,
    is_deployed,
    is_prepared,
    prepare_deployed,
    prepare_run,
)
from server.federation import Federation

TEMPLATES = Path(str(fedgan.report.html.__file__)).parent / "templates"
PAGE_SECONDS = 300.0
DEFAULTS = {
    "scenario": "simulations/three_hospitals.toml",
    "overrides": "",
    "settings": "",
    "output": "",
    "deployed": "False",
}

OnEvent = Callable[[dict[str, Any]], None]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Prepare or find the run folder, train all rounds, evaluate, and write the page."""
    deployed = str(context.run_config.get("deployed", False)).lower() == "true"
    on_event = print_event_as_json if deployed or events.wants_json() else print_event
    try:
        settings, run = find_run(context.run_config)
        federate(grid, settings, run, deployed, on_event)
        page = write_page(run)
    except BaseException as error:
        on_event({"event": "failed", "kind": type(error).__name__, "message": str(error)})
        raise
    on_event({"event": "finished", "run": str(run.path), "report": page})


def federate(
    grid: Grid, settings: Settings, run: RunFolder, deployed: bool, on_event: OnEvent
) -> None:
    """All that is left of a run, to its evaluation."""
    with locked(run):
        sweep(run)
        if not is_prepared(run) and deployed:
            prepare_deployed(settings, run)
        elif not is_prepared(run):
            prepare_run(settings, run, on_event)
        elif deployed != is_deployed(run):
            begun = "as a deployment" if is_deployed(run) else "where the server has the data"
            raise ConfigError(f"{run.path} was begun {begun}: go on with it in the same way")
        settings = run.settings()
        evaluator = Evaluator(
            settings,
            run,
            evaluation_hospitals(settings, run),
            progress=lambda text: on_event({"event": "status", "text": text}),
        )
        federation = Federation(
            settings, run, experiment_of(run), evaluator, on_event, reconnecting=deployed
        )
        federation.train(grid)
        federation.conclude()


def write_page(run: RunFolder) -> str:
    """Write page and cards; the page's path, or nothing where it could not be written.

    The copy that Flower makes of the app holds no templates, but the fedgan that is installed here does.
    """
    if TEMPLATES.is_dir():
        write_report(run)
        write_cards(run)
        return str(run.report)
    for verb in ("report", "cards"):
        words = [sys.executable, "-m", "fedgan.cli", verb, str(run.path)]
        try:
            subprocess.run(
                words, cwd=run.path, stdout=subprocess.DEVNULL, timeout=PAGE_SECONDS, check=True
            )
        except (OSError, subprocess.SubprocessError):
            print(f"write the page where fedgan is installed: fedgan {verb} {run.path}", flush=True)
    return str(run.report) if run.report.is_file() else ""


def print_event(event: dict[str, Any]) -> None:
    """Show an event in Flower's log, without its long numbers."""
    short = {
        key: value for key, value in event.items() if not isinstance(value, dict) or key == "images"
    }
    print(" ".join(f"{key}={value}" for key, value in short.items()), flush=True)


def print_event_as_json(event: dict[str, Any]) -> None:
    """Print an event as one JSON line, in one piece: other threads print, too."""
    sys.stdout.write(events.as_line(event) + "\n")
    sys.stdout.flush()


def split_overrides(text: str) -> list[str]:
    """'a.b=1 c.d=[2,3],e.f=x' → three overrides: separators are spaces or commas before the next key."""
    return [part for part in re.split(r"[\s,]+(?=[\w.]+=)", text.strip(" ,")) if part]


def find_run(config: Mapping[str, Any]) -> tuple[Settings, RunFolder]:
    """The scenario with its overrides, and the run folder; a folder that holds a run keeps its own settings.

    Where `settings` are given with that folder, they must be the run's own: whoever wants others wants another run.
    """
    values = DEFAULTS | {key: str(value) for key, value in config.items()}
    if values["output"] and (run := RunFolder.at(values["output"])).config.is_file():
        run.refuse_repeated_evaluation()
        if values["settings"] and as_deployed(given_settings(values["settings"])) != run.settings():
            raise ConfigError(
                f"{run.path} holds a run with other settings: go on with it by fedgan deploy resume {run.path}, "
                "or choose another --output"
            )
        print(
            f"{run.path} holds a run, which goes on with its own config.toml: scenario and overrides are ignored",
            flush=True,
        )
        return run.settings(), run
    if values["settings"]:
        settings = given_settings(values["settings"])
    elif not values["scenario"]:
        raise ConfigError(
            f"{values['output'] or 'output'} holds no run to go on with: begin one with fedgan deploy run SCENARIO"
        )
    else:
        scenario = Path(values["scenario"])
        if not scenario.is_file():
            scenario = Path(__file__).resolve().parent.parent / scenario
        settings = load_scenario(scenario, split_overrides(values["overrides"]))
    run = RunFolder.at(values["output"] or Path("runs") / settings.name)
    if run.config.is_file() and not values["output"]:
        raise FedganError(
            f'{run.path} already holds a run: go on with it by output="{run.path}", or give another output'
        )
    return settings, run


def given_settings(text: str) -> Settings:
    """The settings that `fedgan deploy` has checked and sent. Raises `ConfigError`."""
    try:
        return from_dict(json.loads(text), source="settings")
    except ValueError as error:
        raise ConfigError(f"the run-config's `settings` is no JSON: {error}") from None
