"""Whole runs through Flower and Ray, and checks before the start."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_client import with_fault  # noqa: F401 - Ray imports this module
from small_federation import alive_in, federate, processes_of, tiny, write_shards

from client.app import app
from fedgan import files
from fedgan.data.federation import open_hospitals
from fedgan.errors import (
    ConfigError,
    DataError,
    FederationError,
    FedganError,
    MachineError,
    SplitError,
)
from fedgan.run_folder import RunFolder
from fedgan.runs import lock
from fedgan.runs.preparation import check_evaluation, prepare_run
from fedgan.training.checkpoint import load_generator, load_tensors
from fedgan.training.trainer import Trainer
from simulations import runner

HERE = Path(__file__).parent
ALL = ("generator", "discriminator", "ema")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's processes must find faulty_client.py."""
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    )


class EventRecorder:
    """Collects the events of a run, and the sessions of its processes."""

    def __init__(self, run: RunFolder) -> None:
        self.run, self.events, self.sessions = run, list[dict[str, Any]](), set[int]()

    def __call__(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self.sessions |= processes_of(self.run.path)

    def named(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]


# --- before the start -----------------------------------------------------------------------------


def test_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    run = RunFolder.at(tmp_path / "run")
    settings = tiny(tmp_path)
    run.write_settings(settings)
    with pytest.raises(ConfigError, match="already holds a run"):
        runner.simulate(settings, run)


def test_run_in_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "TIMEOUT", 0.2)
    run = RunFolder.at(tmp_path / "run")
    run.write_settings(tiny(tmp_path))
    with lock.locked(run), pytest.raises(ConfigError, match="in use by another fedgan"):
        runner.resume(run)
    with lock.locked(run):
        pass  # the lock is free again


def test_missing_data_leaves_no_run_folder(tmp_path: Path) -> None:
    run = RunFolder.at(tmp_path / "run")
    with pytest.raises(DataError, match="no data at"):
        runner.simulate(tiny(tmp_path / "nowhere"), run)
    assert not run.path.exists()


def test_resume_of_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run folder"):
        runner.resume(RunFolder.at(tmp_path))


def test_temporary_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    run = RunFolder.at(tmp_path)
    (run.checkpoints / "x").mkdir(parents=True)
    (run.checkpoints / ".round-00001.json.abc.part").touch()
    (run.checkpoints / "round-00001.json").touch()
    lock.remove_temporary_files(run)
    assert [path.name for path in run.checkpoints.iterdir() if path.is_file()] == [
        "round-00001.json"
    ]


def test_invalid_evaluation_or_device_fails_before_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data = write_shards(tmp_path / "data", (16, 16), resolution=32)
    write_shards(tmp_path / "small", (16,), resolution=16)
    (tmp_path / "weights.npz").write_bytes(b"no archive")
    cases: list[tuple[str, type[FedganError], str]] = [
        ("training.device=cuda", MachineError, "no CUDA device"),
        (f"evaluation.features={tmp_path / 'missing.npz'}", ConfigError, "no weights file"),
        (f"evaluation.features={tmp_path / 'weights.npz'}", DataError, "not a SqueezeNet"),
        (f"evaluation.root={tmp_path / 'nowhere'}", DataError, "no data at"),
        (f"evaluation.root={tmp_path / 'small'}", DataError, "images of 16 pixels"),
        ("evaluation.label_map='dark=a'", DataError, "no rule for 'bright'"),
    ]
    for override, kind, text in cases:
        run = RunFolder.at(tmp_path / "run")
        with pytest.raises(kind, match=text):
            runner.simulate(tiny(data, "data.resolution=32", override, hospitals=2), run)
        assert not run.path.exists(), override


def test_evaluation_shards_with_other_labels_are_refused(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2)
    hospitals = open_hospitals(settings)
    check_evaluation(settings, hospitals, hospitals)
    renamed = open_hospitals(
        tiny(tmp_path / "data", "data.label_map='dark=night,bright=day'", hospitals=2)
    )
    with pytest.raises(DataError, match=r"evaluation.root: 'alpha' differs"):
        check_evaluation(settings, hospitals, renamed)


def test_evaluation_shards_with_training_patients_are_refused(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2)
    hospitals = open_hospitals(settings)
    known = [dataclasses.replace(hospitals[0], test=hospitals[0].train), hospitals[1]]
    with pytest.raises(
        SplitError, match="8 patients of the training images are also in 'test'"
    ) as caught:
        check_evaluation(settings, hospitals, known)
    assert "alpha-" not in str(caught.value)


def test_failed_preparation_keeps_the_config(tmp_path: Path) -> None:
    run = RunFolder.at(tmp_path / "run")
    settings = tiny(tmp_path / "data", hospitals=2)
    run.write_settings(settings)
    for prepare in (lambda: prepare_run(settings, run), lambda: runner.resume(run)):
        with pytest.raises(DataError, match="no data at"):
            prepare()
        assert run.settings() == settings
    phantoms = tiny(
        tmp_path,
        "data.root=''",
        "evaluation.label_map='x=y'",
        "data.phantom_images=64",
        hospitals=2,
    )
    run.write_settings(phantoms)
    with pytest.raises(FedganError, match="label"):
        prepare_run(phantoms, run)
    assert [path.name for path in run.path.iterdir()] == ["config.toml"]


def test_engine_disables_flower_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    code = (
        "import server.federation, flwr.supercore.telemetry as t; print(t.FLWR_TELEMETRY_ENABLED)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=runner.engine_environment("/none"),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.split() == ["0"], done.stderr


def test_run_is_complete_after_the_evaluation_of_its_last_round(tmp_path: Path) -> None:
    settings, run = tiny(tmp_path, rounds=3), RunFolder.at(tmp_path)
    for number in (2, 3):
        for path in (run.checkpoint(number), run.checkpoint(number).with_suffix(".json")):
            path.parent.mkdir(exist_ok=True)
            path.touch()
    assert not runner.is_complete(run, settings)
    for number, complete in ((2, False), (3, True)):
        files.write_json(run.evaluation, {"round": number})
        assert runner.is_complete(run, settings) == complete


@pytest.mark.parametrize(
    ("kind", "has_advice"),
    [("ConfigError", False), ("MachineError", False), ("FederationError", True)],
)
def test_error_advises_to_resume_only_where_it_can_help(
    kind: str, has_advice: bool, tmp_path: Path
) -> None:
    failed = {"event": "failed", "kind": kind, "message": "why"}
    with pytest.raises(FedganError, match="why") as caught:
        runner._check_last_event(RunFolder.at(tmp_path), failed, 1, 0.0)
    assert type(caught.value).__name__ == kind
    assert "flower.log" in str(caught.value)
    assert ("fedgan resume" in str(caught.value)) == has_advice


def test_resume_of_a_repeated_evaluation_is_refused(tmp_path: Path) -> None:
    repeated = RunFolder.at(tmp_path / "repeated")
    repeated.write_settings(tiny(tmp_path))
    files.write_json(repeated.evaluated_run, {"run": "/runs/first"})
    with pytest.raises(ConfigError, match="repeated evaluation of /runs/first"):
        runner.resume(repeated)


# --- with Flower and Ray --------------------------------------------------------------------------


@pytest.mark.slow
def test_federation_of_one_hospital_equals_centralized_training(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (40,)), hospitals=1, rounds=3, kimg=0.1)
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)  # without Ray, which gives the same bytes (tests/test_resume.py)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer = Trainer(settings, open_hospitals(settings)[0].train, "cpu", stream=0)
        start = trainer.get_parameters(ALL)
        trainer.train(100)
    finally:
        torch.set_num_threads(threads)
    central = trainer.get_parameters(ALL)
    tensors, meta = load_tensors(run.checkpoint(3))
    assert meta["images_seen"] == trainer.images_seen == 100
    assert set(tensors) == set(central)
    different = [key for key in central if not np.array_equal(central[key], tensors[key].numpy())]
    assert different == []
    assert any(not np.array_equal(start[key], central[key]) for key in central)
    state, _ = load_tensors(run.hospital_state("alpha") / "state-00003.safetensors")
    trainer.save(tmp_path / "central.safetensors")
    own, _ = load_tensors(tmp_path / "central.safetensors")
    assert all(own[key].equal(state[key]) for key in own)  # optimisers and random states too


@pytest.mark.slow
def test_run_of_three_hospitals_from_shards_to_evaluation(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "data", (40, 32, 24))
    settings = tiny(shards, "evaluation.every=1", "evaluation.show_real=all", rounds=2, kimg=0.1)
    run = RunFolder.at(tmp_path / "run")
    recorder = EventRecorder(run)
    runner.simulate(settings, run, recorder)

    # the model is the mean of the hospitals' models
    tensors, meta = load_tensors(run.checkpoint(2))
    states = [
        load_tensors(run.hospital_state(name) / "state-00002.safetensors")[0]
        for name in ("alpha", "beta", "gamma")
    ]
    weights = np.array([20, 16, 12]) / 48
    for key, tensor in tensors.items():
        mean = sum(
            weight * state[key].double().numpy()
            for weight, state in zip(weights, states, strict=True)
        )
        np.testing.assert_allclose(tensor.numpy(), mean, rtol=1e-6, atol=1e-7)
    assert load_generator(run.checkpoint(2))[1]["label_names"] == ["dark", "bright"]

    # files of the run folder
    lines = files.read_json_lines(run.metrics)
    assert [line["round"] for line in lines] == [1, 2]
    assert [row["name"] for row in lines[0]["hospitals"]] == ["alpha", "beta", "gamma"]
    assert (
        lines[1]["images_seen"]
        == meta["images_seen"]
        == sum(row["images_seen"] for row in lines[1]["hospitals"])
    )
    assert (
        lines[1]["bytes_exchanged"]
        == 2 * lines[0]["bytes_exchanged"]
        == 4 * 3 * 4 * sum(t.numel() for t in tensors.values())
    )
    assert all(
        (run.samples / name).is_file()
        for name in ("real.png", "round-00001.png", "round-00002.png", "final.png")
    )
    evaluation = run.read_json(run.evaluation)
    assert (evaluation["arm"], evaluation["round"]) == ("federated", 2)
    assert evaluation["images_seen"] == meta["images_seen"]
    assert run.read_json(run.environment)["threads_per_hospital"] == 1
    assert [row["name"] for row in run.read_json(run.hospitals)] == ["alpha", "beta", "gamma"]
    assert run.settings() == settings

    # events and remaining processes
    names = [event["event"] for event in recorder.events]
    assert names[0] == "preparing"
    assert names[-1] == "finished"
    assert len(recorder.named("round_end")) == len(recorder.named("round_start")) == 2
    assert {event["hospital"] for event in recorder.named("progress")} <= {"alpha", "beta", "gamma"}
    assert recorder.sessions, "the engine was seen while it ran"
    assert alive_in(recorder.sessions) == []
    assert not list(run.path.rglob("*.part"))

    # a complete run is not resumed
    again = EventRecorder(run)
    runner.resume(run, again)
    assert [event["event"] for event in again.events] == ["complete"]
    assert "is complete" in again.events[0]["message"]


@pytest.mark.slow
def test_failed_hospitals_fail_the_run_and_are_named(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", (40, 32, 24))
    # two failures of three prevent a quorum of two, one alone does not
    settings = tiny(data, "federation.min_hospitals=2", rounds=3, kimg=0.06)
    run = RunFolder.at(tmp_path / "run")
    recorder = EventRecorder(run)
    with pytest.raises(FederationError) as caught:
        runner.simulate(settings, run, recorder, client="faulty_client:fails")
    first, second = str(caught.value).splitlines()
    assert first == (
        "hospital 2 ('beta') failed in round 2: ValueError while training round 2; "
        "hospital 3 ('gamma') failed in round 2: its process died (killed, or out of memory)"
    )
    assert f"fedgan resume {run.path}" in second
    assert caught.value.exit_code == 5
    assert run.last_round() == 1
    assert not run.evaluation.exists()
    assert not recorder.named("finished")
    assert alive_in(recorder.sessions) == []
    assert str(run.hospital_state("beta") / "client.log") in second
    assert "patient-0017" in (run.hospital_state("beta") / "client.log").read_text()
    assert "patient-0017" not in (run.path / "flower.log").read_text()
