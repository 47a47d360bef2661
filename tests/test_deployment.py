"""`fedgan deploy` with a deployment of real processes on loopback, behind the proxy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from capture import PUSH_MESSAGES, PUSH_OBJECT, Capture
from cryptography.hazmat.primitives import serialization
from loopback import HOST, REPOSITORY, Deployment, deployment, make_keys, needs_haproxy
from small_federation import NAMES, federate, tiny, write_shards

from client.app import app as client_app
from client.gate import records_of
from fedgan.cli import main
from fedgan.config import Settings
from fedgan.exchange.outbound_log import NAME, OutboundLog
from fedgan.run_folder import RunFolder
from fedgan.training.checkpoint import load_tensors

pytestmark = [pytest.mark.slow, needs_haproxy]

SIZES = (48, 32, 24)
HOSPITALS = NAMES[:3]
Deploy = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the hospitals and of the evaluator."""
    made = tmp_path_factory.mktemp("federation")
    write_shards(made / "data", SIZES)
    write_shards(made / "reference", (40,), names=("delta",))
    return made


@pytest.fixture(scope="module")
def federation(folder: Path) -> Iterator[Deployment]:
    """Three hospitals whose requests are recorded."""
    for name in ("deployment", "recording"):
        (folder / name).mkdir()

    def node_config(index: int) -> dict[str, Any]:
        folders = {"data-root": "data", "state-dir": "state"}
        return {"partition-id": index} | {
            key: str(folder / place / HOSPITALS[index]) for key, place in folders.items()
        }

    environment = {"FEDGAN_REFERENCE": str(folder / "reference")}
    recording = folder / "recording"
    with deployment(
        folder / "deployment", REPOSITORY, HOSPITALS, node_config, environment, recording
    ) as running:
        yield running


@pytest.fixture
def deploy(
    federation: Deployment, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Deploy:
    """Run `fedgan deploy VERB …`; returns exit code, stdout and stderr."""
    monkeypatch.setenv("FEDGAN_SUPERLINK", f"{HOST}:{federation.ports['superlink']}")
    monkeypatch.setenv("FEDGAN_CA", str(federation.keys / "ca.crt"))
    capsys.readouterr()

    def run(verb: str, *words: str) -> tuple[int, str, str]:
        code = main(["deploy", verb, *words])
        return code, *capsys.readouterr()

    return run


def scenario_file(settings: Settings, path: Path) -> Path:
    """A scenario file without paths of the hospitals."""
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, root=""))
    RunFolder.at(path).write_settings(settings)
    return path / "config.toml"


def test_deployed_scenario_trains_the_simulations_model(
    folder: Path, federation: Deployment, deploy: Deploy
) -> None:
    settings = tiny(folder / "data", "evaluation.suite=quick", rounds=2, kimg=0.072)
    scenario = scenario_file(settings, folder / "scenario")
    simulated, run = RunFolder.at(folder / "simulated"), RunFolder.at(folder / "runs" / "tiny")
    federate(settings, simulated, client_app)

    # --- from the scenario to the report
    code, out, err = deploy("run", str(scenario), "--output", str(run.path), "--json")
    assert code == 0, f"{err}\n{federation.tails()}"
    assert run.checkpoint(2).read_bytes() == simulated.checkpoint(2).read_bytes()
    assert json.loads(run.evaluation.read_text())["round"] == 2
    assert "gamma" in run.report.read_text()
    result = json.loads(out)
    assert (result["status"], result["sub_status"], result["output"]) == (
        "finished",
        "completed",
        str(run.path),
    )
    assert result["report"] == str(run.report)
    assert "hospitals online: alpha, beta, gamma" in err
    assert "round 2/2" in err
    assert str(folder / "data") not in federation.log("serverapp").read_text()

    # --- status and logs
    found = json.loads(deploy("status", "--json")[1])
    assert found["hospitals"] == [{"name": name, "status": "online"} for name in HOSPITALS]
    assert [(row["number"], row["sub_status"], row["output"]) for row in found["runs"]] == [
        (result["number"], "completed", str(run.path))
    ]
    events = [json.loads(line) for line in deploy("logs", "--json")[1].splitlines()]
    assert [event["round"] for event in events if event["event"] == "round_end"] == [1, 2]
    assert {event["hospital"] for event in events if event["event"] == "progress"} == set(HOSPITALS)
    assert events[-1]["event"] == "finished"
    assert deploy("stop")[0] == 2

    # --- an error of the ServerApp
    code, _, err = deploy("run", str(scenario), "--set", "seed=9", "--output", str(run.path))
    assert code == 2
    assert "holds a run with other settings" in err

    # --- a SuperLink of other keys
    strangers = make_keys(folder / "strangers")
    code, _, err = deploy("status", "--ca", str(strangers / "ca.crt"))
    assert code == 5
    assert "has not signed its certificate" in err


def test_deployed_secure_round_gives_the_plain_model(
    folder: Path, federation: Deployment, deploy: Deploy
) -> None:
    few = "federation.exchange=['generator']"
    plain, run = RunFolder.at(folder / "plain"), RunFolder.at(folder / "runs" / "secure")
    federate(tiny(folder / "data", few, rounds=1, kimg=0.036), plain, client_app)
    settings = tiny(
        folder / "data",
        few,
        "evaluation.suite=quick",
        "federation.secure=true",
        rounds=1,
        kimg=0.036,
    )
    code, _, err = deploy(
        "run", str(scenario_file(settings, folder / "secure")), "--output", str(run.path)
    )
    assert code == 0, f"{err}\n{federation.tails()}"
    expected, got = (load_tensors(each.checkpoint(1))[0] for each in (plain, run))
    assert expected.keys() == got.keys()
    for key, tensor in expected.items():
        assert float((got[key] - tensor).abs().max()) < 1e-4, key
    entries = OutboundLog(folder / "state" / "alpha" / NAME).read().entries
    assert [entry.message for entry in entries][-5:] == ["query.hello", *["train"] * 4]


@pytest.mark.parametrize("hospital", HOSPITALS)
def test_outbound_log_lists_all_that_left_a_hospital(
    hospital: str, folder: Path, federation: Deployment
) -> None:
    """The requests of the runs above: a plain one of two rounds and one with secure aggregation."""
    public = serialization.load_ssh_public_key(
        (federation.keys / "hospitals" / hospital / "node.pub").read_bytes()
    )
    pem, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    seen = Capture(folder / "recording", public.public_bytes(pem, form))
    entries = OutboundLog(folder / "state" / hospital / NAME).read().entries
    assert [entry.message for entry in entries] == [
        "query.hello",
        "train",
        "train",
        "query.hello",
        *["train"] * 4,
    ]

    # --- each reply is a line of the log, with the same records and hashes
    for (key, message), entry in zip(seen.messages.items(), entries, strict=True):
        for travelled, listed in zip(records_of(message), entry.records, strict=True):
            if listed["kind"] == "arrays":
                assert listed.pop("bundle") == seen.bundles[key]
                travelled["bytes"] = listed["bytes"]  # of the bundle, compared by its hash
                listed["arrays"].sort()  # a bundle has its own order
                travelled["arrays"].sort()
            assert travelled == listed

    # --- nothing else left the hospital
    assert seen.strays == set()
    methods = {
        "activate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "push-object",
        "pull-object",
    }
    methods |= {"get-run", "get-fab", "confirm-message-received"}
    assert {path.rpartition("/")[2] for path in seen.largest} <= methods
    known = {
        "accept",
        "accept-encoding",
        "connection",
        "content-length",
        "content-type",
        "host",
        "user-agent",
    }
    flower = {name for name in seen.headers - known if not name.startswith("flwr-")}
    assert not flower, flower
    carriers = (PUSH_OBJECT, PUSH_MESSAGES)
    assert (
        max(size for path, size in seen.largest.items() if path not in carriers) < 600
    )  # a key, ids, times
    everything = b"".join(seen.objects.values())
    for secret in (
        folder,
        *(f"{hospital}-{row}" for row in range(SIZES[HOSPITALS.index(hospital)])),
    ):
        assert str(secret).encode() not in everything
