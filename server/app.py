"""The Flower ServerApp that `flwr run .` starts: reads the scenario named in the run-config and federates it.

    flwr run . --federation-config 'num-supernodes=3 client-resources-num-cpus=1'
               -c 'scenario="simulations/three_hospitals.toml" overrides="training.kimg=10" output="/abs/runs/x"'

With `deployed=true` the hospitals are machines of their own (docs/deployment.md): the server opens none of their shards,
waits for those that fail or are absent, and evaluates on `evaluation.root`.

The code runs from a copy, in the working directory of Flower's daemon: give absolute paths. A scenario
that is not found there is looked for in the copy. An `output` that holds a run is gone on with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import fedgan.report
from fedgan.config import Settings, load_scenario
from fedgan.errors import ConfigError, FedganError
from fedgan.report.page import write_report
from fedgan.run_folder import RunFolder
from server.evaluator import Evaluator
from server.federation import Federation
from server.lock import locked, sweep
from server.preparation import evaluation_hospitals, experiment_of, is_deployed, is_prepared, prepare_deployed, prepare_run

TEMPLATES = Path(str(fedgan.report.__file__)).parent / "templates"
DEFAULTS = {"scenario": "simulations/three_hospitals.toml", "overrides": "", "output": "", "deployed": "False"}

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Prepare or find the run folder, train all rounds, evaluate, and write the page."""
    settings, run = find_run(context.run_config)
    deployed = str(context.run_config.get("deployed", False)).lower() == "true"
    with locked(run):
        sweep(run)
        if not is_prepared(run) and deployed:
            prepare_deployed(settings, run)
        elif not is_prepared(run):
            prepare_run(settings, run, tell)
        elif deployed != is_deployed(run):
            begun = "as a deployment" if is_deployed(run) else "where the server has the data"
            raise ConfigError(f"{run.path} was begun {begun}: go on with it in the same way")
        settings = run.settings()
        judge = Evaluator(settings, run, evaluation_hospitals(settings, run))
        federation = Federation(settings, run, experiment_of(run), judge, tell, patient=deployed)
        federation.train(grid)
        federation.conclude()
    if TEMPLATES.is_dir():
        write_report(run)
        print(f"wrote {run.report}", flush=True)
    else:  # the copy that Flower makes of the app holds no templates
        print(f"the run is in {run.path}; write its page with: fedgan report {run.path}", flush=True)


def tell(event: dict[str, Any]) -> None:
    """Show an event in Flower's log, without its long numbers."""
    short = {key: value for key, value in event.items() if not isinstance(value, dict) or key == "images"}
    print(" ".join(f"{key}={value}" for key, value in short.items()), flush=True)


def split_overrides(text: str) -> list[str]:
    """'a.b=1 c.d=[2,3],e.f=x' → three overrides: separators are spaces or commas before the next key."""
    return [part for part in re.split(r"[\s,]+(?=[\w.]+=)", text.strip(" ,")) if part]


def find_run(config: Mapping[str, Any]) -> tuple[Settings, RunFolder]:
    """The scenario with its overrides, and the run folder; a folder that holds a run keeps its own settings."""
    values = DEFAULTS | {key: str(value) for key, value in config.items()}
    if values["output"] and (run := RunFolder.at(values["output"])).config.is_file():
        run.refuse_look()
        print(f"{run.path} holds a run, which goes on with its own config.toml: scenario and overrides are ignored", flush=True)
        return run.settings(), run
    scenario = Path(values["scenario"])
    if not scenario.is_file():
        scenario = Path(__file__).resolve().parent.parent / scenario
    settings = load_scenario(scenario, split_overrides(values["overrides"]))
    run = RunFolder.at(values["output"] or Path("runs") / settings.name)
    if run.config.is_file() and not values["output"]:
        raise FedganError(f'{run.path} already holds a run: go on with it by output="{run.path}", or give another output')
    return settings, run
