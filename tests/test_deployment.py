"""`fedgan deploy` against a federation of real processes on loopback: TLS, authenticated hospitals, the filter in between."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from loopback import HOST, deployment, make_keys
from small_federation import NAMES, federate, tiny, write_shards

from client.app import app as client_app
from fedgan.cli import main
from fedgan.config import Settings
from fedgan.run_folder import RunFolder

SIZES = (48, 32, 24)


def scenario_file(settings: Settings, path: Path) -> Path:
    """A scenario as its author writes it, who knows neither the hospitals' disks nor the server's."""
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, root=""))
    RunFolder.at(path).write_settings(settings)
    return path / "config.toml"


@pytest.mark.slow
def test_a_deployed_scenario_trains_the_simulation_s_model_to_its_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(write_shards(tmp_path / "data", SIZES), "evaluation.suite=quick", rounds=2, kimg=0.072)
    scenario = scenario_file(settings, tmp_path / "scenario")
    simulated, run = RunFolder.at(tmp_path / "simulated"), RunFolder.at(tmp_path / "runs" / "tiny")
    federate(settings, simulated, client_app)
    write_shards(tmp_path / "reference", (40,), names=("delta",))
    place = tmp_path / "deployment"
    place.mkdir()

    def node_config(index: int) -> dict[str, Any]:
        folders = {"data-root": "data", "state-dir": "state"}
        return {"partition-id": index} | {key: str(tmp_path / folder / NAMES[index]) for key, folder in folders.items()}

    reference = {"FEDGAN_REFERENCE": str(tmp_path / "reference")}
    with deployment(place, hospitals=NAMES[:3], node_config=node_config, environment=reference) as federation:

        def deploy(verb: str, *words: str) -> tuple[int, str, str]:
            code = main(["deploy", verb, *words])
            return code, *capsys.readouterr()

        monkeypatch.setenv("FEDGAN_SUPERLINK", f"{HOST}:{federation.ports['superlink']}")
        monkeypatch.setenv("FEDGAN_CA", str(federation.keys / "ca.crt"))
        capsys.readouterr()

        # --- from the scenario to the page
        code, out, said = deploy("run", str(scenario), "--output", str(run.path), "--json")
        assert code == 0, f"{said}\n{federation.tails()}"
        assert run.checkpoint(2).read_bytes() == simulated.checkpoint(2).read_bytes()
        assert json.loads(run.evaluation.read_text())["round"] == 2
        assert "gamma" in run.report.read_text()
        told = json.loads(out)
        assert (told["status"], told["sub_status"], told["output"]) == ("finished", "completed", str(run.path))
        assert told["report"] == str(run.report)
        assert "hospitals online: alpha, beta, gamma" in said
        assert "round 2/2" in said
        assert str(tmp_path / "data") not in federation.log("serverapp").read_text()

        # --- what is said of it afterwards
        found = json.loads(deploy("status", "--json")[1])
        assert found["hospitals"] == [{"name": name, "status": "online"} for name in NAMES[:3]]
        assert [(row["number"], row["sub_status"], row["output"]) for row in found["runs"]] == [
            (told["number"], "completed", str(run.path))
        ]
        events = [json.loads(line) for line in deploy("logs", "--json")[1].splitlines()]
        assert [event["round"] for event in events if event["event"] == "round_end"] == [1, 2]
        assert {event["hospital"] for event in events if event["event"] == "progress"} == set(NAMES[:3])
        assert events[-1]["event"] == "finished"
        assert deploy("stop")[0] == 2

        # --- the ServerApp's error is the command's own
        code, _, said = deploy("run", str(scenario), "--set", "seed=9", "--output", str(run.path))
        assert code == 2
        assert "holds a run with other settings" in said

        # --- a SuperLink of other keys
        strangers = make_keys(tmp_path / "strangers", ())
        code, _, said = deploy("status", "--ca", str(strangers / "ca.crt"))
        assert code == 5
        assert "has not signed its certificate" in said
