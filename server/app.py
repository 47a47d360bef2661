"""The Flower ServerApp of `flwr run .`: federates the scenario of the run-config.

    flwr run . --federation-config 'num-supernodes=3 client-resources-num-cpus=1' \\
        -c 'scenario="simulations/three_hospitals.toml" overrides="training.kimg=10" \\
            output="/abs/runs/x"'

With `deployed=true` the hospitals are machines of their own (docs/guides/deploy.md): the server
opens no shard, waits for hospitals that reconnect, evaluates on `evaluation.root` (or
FEDGAN_REFERENCE where that is empty), and prints events as JSON lines for `fedgan deploy`
(fedgan/events.py).
`settings`, a whole scenario as JSON, replaces `scenario` and `overrides`: the operator's files are
not on this machine.

The code runs from a copy, in the working directory of Flower's daemon, so give absolute paths. A
scenario that is not found there is read from the copy. An `output` that holds a run is resumed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import fedgan.report.html
from fedgan import events, files
from fedgan.config import Settings, from_dict, load_scenario
from fedgan.errors import ConfigError, FedganError
from fedgan.report.cards import write_cards
from fedgan.report.run.report import write_report
from fedgan.run_folder import RunFolder
from fedgan.runs.evaluator import Evaluator
from fedgan.runs.lock import locked, remove_temporary_files
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
REPORT_SECONDS = 300.0  # for a report or card in a process of its own
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
    """Prepare or find the run folder, train all rounds, evaluate, and write the report."""
    deployed = str(context.run_config.get("deployed", False)).lower() == "true"
    on_event = print_event_as_json if deployed or events.wants_json() else print_event
    try:
        settings, run = find_run(context.run_config)
        federate(grid, settings, run, deployed, on_event)
        report = write_report_and_cards(run)
    except BaseException as error:
        on_event({"event": "failed", "kind": type(error).__name__, "message": str(error)})
        raise
    on_event({"event": "finished", "run": str(run.path), "report": report})


def federate(
    grid: Grid, settings: Settings, run: RunFolder, deployed: bool, on_event: OnEvent
) -> None:
    """Train all remaining rounds of a run, and evaluate."""
    with locked(run):
        remove_temporary_files(run)
        if not is_prepared(run) and deployed:
            prepare_deployed(settings, run)
        elif not is_prepared(run):
            prepare_run(settings, run, on_event)
        elif deployed != is_deployed(run):
            begun = "as a deployment" if is_deployed(run) else "with the data on the server"
            raise ConfigError(f"{run.path} was begun {begun}: resume it in the same way")
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
        federation.evaluate_final()


def write_report_and_cards(run: RunFolder) -> str:
    """Write report and cards; the report's path, or '' where it could not be written.

    Flower's copy of the app has no templates, but the installed fedgan has.
    """
    if TEMPLATES.is_dir():
        write_report(run)
        write_cards(run)
        return str(run.report)
    for verb in ("report", "cards"):
        command = [sys.executable, "-m", "fedgan.cli", verb, str(run.path)]
        try:
            subprocess.run(
                command,
                cwd=run.path,
                stdout=subprocess.DEVNULL,
                timeout=REPORT_SECONDS,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            print(f"run this where fedgan is installed: fedgan {verb} {run.path}", flush=True)
    return str(run.report) if run.report.is_file() else ""


def print_event(event: dict[str, Any]) -> None:
    """Print an event to Flower's log, without nested values."""
    short = {
        key: value for key, value in event.items() if not isinstance(value, dict) or key == "images"
    }
    print(" ".join(f"{key}={value}" for key, value in short.items()), flush=True)


def print_event_as_json(event: dict[str, Any]) -> None:
    """Print an event as one JSON line, in one write, as other threads print too."""
    sys.stdout.write(events.as_line(event) + "\n")
    sys.stdout.flush()


def split_overrides(text: str) -> list[str]:
    """Split 'a.b=1 c.d=[2,3],e.f=x' at spaces or commas before the next key: three overrides."""
    return [part for part in re.split(r"[\s,]+(?=[\w.]+=)", text.strip(" ,")) if part]


def find_run(config: Mapping[str, Any]) -> tuple[Settings, RunFolder]:
    """The settings and the run folder of a run-config; an existing run keeps its own settings.

    Raises `ConfigError` where `settings` are given that differ from those of an existing run.
    """
    values = DEFAULTS | {key: str(value) for key, value in config.items()}
    if values["output"] and (run := RunFolder.at(values["output"])).config.is_file():
        run.refuse_repeated_evaluation()
        if values["settings"] and as_deployed(given_settings(values["settings"])) != run.settings():
            raise ConfigError(
                f"{run.path} holds a run with other settings: resume it by fedgan deploy resume "
                f"{run.path}, or choose another --output"
            )
        print(
            f"{run.path} holds a run, which resumes with its own config.toml: scenario and "
            "overrides are ignored",
            flush=True,
        )
        return run.settings(), run
    if values["settings"]:
        settings = given_settings(values["settings"])
    elif not values["scenario"]:
        raise ConfigError(
            f"{values['output'] or 'output'} holds no run to resume: begin one with fedgan deploy "
            "run SCENARIO"
        )
    else:
        scenario = Path(values["scenario"])
        if not scenario.is_file():
            scenario = Path(__file__).resolve().parent.parent / scenario
        settings = load_scenario(scenario, split_overrides(values["overrides"]))
    run = RunFolder.at(values["output"] or Path("runs") / settings.name)
    if run.config.is_file() and not values["output"]:
        raise FedganError(
            f'{run.path} already holds a run: resume it by output="{run.path}", or give another '
            "output"
        )
    return settings, run


def given_settings(text: str) -> Settings:
    """Parse the settings that `fedgan deploy` sends. Raises `ConfigError`."""
    try:
        return from_dict(files.parse_json(text), source="settings")
    except ValueError as error:
        raise ConfigError(f"the run-config's `settings` is no JSON: {error}") from None
