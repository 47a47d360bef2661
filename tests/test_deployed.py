"""A server without access to shards trains the model of the simulation; its checks of settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from small_federation import NAMES, LocalGrid, federate, tiny, write_shards

from client.app import app as client_app
from fedgan.config import Settings
from fedgan.errors import ConfigError, DataError
from fedgan.run_folder import RunFolder
from fedgan.runs.evaluator import Evaluator
from fedgan.runs.preparation import (
    evaluation_hospitals,
    experiment_of,
    is_deployed,
    prepare_deployed,
)
from server.app import main
from server.federation import Federation
from simulations import runner

SIZES = (48, 32, 24)


def deployed(tmp_path: Path, *overrides: str) -> Settings:
    """Settings of a deployment whose evaluator has a shard of its own, 'delta'."""
    write_shards(tmp_path / "reference", (40,), names=("delta",))
    return tiny(
        tmp_path / "nowhere",
        f"evaluation.root={tmp_path / 'reference'}",
        *overrides,
        rounds=2,
        kimg=0.072,
    )


def node_config(tmp_path: Path) -> Any:
    """Node-config of each hospital by number."""
    folders = {"data-root": "data", "state-dir": "state"}
    return lambda number: {
        key: str(tmp_path / folder / NAMES[number]) for key, folder in folders.items()
    }


def test_deployment_trains_the_same_model_as_the_simulation(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", SIZES)
    simulated, run = RunFolder.at(tmp_path / "simulated"), RunFolder.at(tmp_path / "deployed")
    federate(tiny(data, rounds=2, kimg=0.072), simulated, client_app)
    prepare_deployed(deployed(tmp_path), run)
    settings = run.settings()
    evaluator = Evaluator(settings, run, evaluation_hospitals(settings, run))
    federation = Federation(settings, run, experiment_of(run), evaluator, reconnecting=True)
    federation.train(LocalGrid(3, client_app, node_config=node_config(tmp_path)))
    assert run.checkpoint(2).read_bytes() == simulated.checkpoint(2).read_bytes()
    assert not (run.path / "hospitals").exists()
    assert [(row["name"], row["images"]) for row in json.loads(run.hospitals.read_text())] == [
        ("alpha", {"train": 24}),
        ("beta", {"train": 16}),
        ("gamma", {"train": 12}),
    ]
    assert str(tmp_path / "data") not in (
        run.config.read_text() + run.environment.read_text() + run.metrics.read_text()
    )


def test_serverapp_trains_and_evaluates_a_deployment(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", SIZES)
    settings, run = deployed(tmp_path, "evaluation.suite=quick"), RunFolder.at(tmp_path / "run")
    scenario = RunFolder.at(tmp_path / "scenario")
    scenario.write_settings(settings)
    config: Any = {"scenario": str(scenario.config), "output": str(run.path), "deployed": True}
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    main_function: Any = main
    main_function(LocalGrid(3, client_app, node_config=node_config(tmp_path)), context)
    assert json.loads(run.evaluation.read_text())["round"] == 2
    assert is_deployed(run)
    assert "gamma" in run.report.read_text()
    with pytest.raises(ConfigError, match="trained by deployed hospitals"):
        runner.resume(run)
    context.run_config["deployed"] = False
    with pytest.raises(ConfigError, match="was begun as a deployment"):
        main_function(None, context)


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["evaluation.root="], "evaluation.root is empty: in a deployment"),
        (["data.partition=iid"], "a server cannot partition data"),
        (["federation.strategy=krum", "federation.malicious=1"], "5 hospitals"),
    ],
)
def test_settings_that_a_deployment_cannot_use_are_errors(
    overrides: list[str], error: str, tmp_path: Path
) -> None:
    run = RunFolder.at(tmp_path / "run")
    with pytest.raises(ConfigError, match=error):
        prepare_deployed(deployed(tmp_path, *overrides), run)
    assert not run.path.exists()


def test_evaluator_rejects_labels_that_differ_from_the_hospitals(tmp_path: Path) -> None:
    prepare_deployed(deployed(tmp_path), run := RunFolder.at(tmp_path / "run"))
    evaluator = Evaluator(run.settings(), run, evaluation_hospitals(run.settings(), run))
    evaluator.check_compatible(("dark", "bright"), True, 1, 16)
    with pytest.raises(DataError, match=r"have labels .*'dark'.*hospitals' .*'benign'"):
        evaluator.check_compatible(("benign", "malignant"), True, 1, 16)
