"""Stopped, killed or damaged runs: resume to the same bytes, or a clear error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_federation import (
    NoEvaluator,
    alive_in,
    error_reply,
    federate,
    processes_of,
    tiny,
    write_shards,
)
from watchdog import watchdog

from client.app import app
from fedgan import files
from fedgan.config import Settings
from fedgan.errors import CheckpointError, ConfigError, FederationError, StorageError
from fedgan.run_folder import RunFolder
from fedgan.runs import lock
from fedgan.runs.preparation import experiment_of, prepare_run
from fedgan.runs.round_state import load_state
from fedgan.training.checkpoint import load_tensors
from server.federation import Federation
from simulations import runner

HERE = Path(__file__).parent


def small(tmp_path: Path, *overrides: str, rounds: int = 3) -> Settings:
    return tiny(
        write_shards(tmp_path / "data", (24, 16)),
        *overrides,
        hospitals=2,
        rounds=rounds,
        kimg=0.008 * rounds,
    )


def end_alike(one: RunFolder, other: RunFolder, last: int) -> bool:
    """Whether two runs end in the same bytes of model and states, and in the same round metrics."""
    pairs = [(one.checkpoint(last), other.checkpoint(last))]
    for path in sorted(one.path.glob(f"hospitals/*/state-{last:05d}.safetensors")):
        pairs.append((path, other.path / path.relative_to(one.path)))
    lines = [
        [_without_times(line) for line in files.read_json_lines(run.metrics)]
        for run in (one, other)
    ]
    return (
        len(pairs) > 1
        and all(a.read_bytes() == b.read_bytes() for a, b in pairs)
        and lines[0] == lines[1]
    )


def _without_times(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without times and evaluation."""
    measured = ("seconds", "core_seconds", "peak_memory_bytes")
    rows = [
        {key: value for key, value in row.items() if key not in measured}
        for row in line["hospitals"]
    ]
    return {
        key: value
        for key, value in line.items()
        if key not in ("wall_seconds", "samples", "fidelity")
    } | {"hospitals": rows}


def fail_in(round_number: int) -> Any:
    def fault(number: int, message: Any) -> Any:
        return (
            error_reply(message, "gone")
            if message.content.config_records["config"].get("round") == round_number
            else None
        )

    return fault


# --- without Ray ----------------------------------------------------------------------------------


def test_run_that_failed_twice_ends_like_an_unbroken_run(tmp_path: Path) -> None:
    settings = small(tmp_path, rounds=3)
    whole, broken = RunFolder.at(tmp_path / "whole"), RunFolder.at(tmp_path / "broken")
    federate(settings, whole, app)
    for round_number in (1, 3):
        with pytest.raises(FederationError, match=f"in round {round_number}"):
            federate(settings, broken, app, fail_in(round_number))
    federate(settings, broken, app)
    assert end_alike(whole, broken, 3)


def test_server_repeats_rounds_whose_checkpoints_are_lost(tmp_path: Path) -> None:
    settings = small(tmp_path, rounds=3)
    whole, back = RunFolder.at(tmp_path / "whole"), RunFolder.at(tmp_path / "back")
    federate(settings, whole, app)
    federate(settings, back, app)
    for number in (2, 3):
        back.checkpoint(number).unlink()
        back.checkpoint(number).with_suffix(".json").unlink()
    federate(settings, back, app)
    assert end_alike(whole, back, 3)


def test_damaged_checkpoint_is_renamed_and_the_previous_one_used(tmp_path: Path) -> None:
    settings = small(tmp_path, rounds=2)
    whole, run = RunFolder.at(tmp_path / "whole"), RunFolder.at(tmp_path / "run")
    federate(settings, whole, app)
    federate(settings, run, app)
    path = run.checkpoint(2)
    path.write_bytes(path.read_bytes()[:-1])
    warnings: list[str] = []
    load_state(run, experiment_of(run), lambda event: warnings.append(event["text"]))
    assert warnings == [
        "round-00002.safetensors is damaged and renamed to round-00002.safetensors.damaged: "
        "resuming from round 1"
    ]
    federate(settings, run, app)
    assert end_alike(whole, run, 2)


def test_run_without_an_intact_checkpoint_is_an_error(tmp_path: Path) -> None:
    run = RunFolder.at(tmp_path / "run")
    federate(small(tmp_path, rounds=1), run, app)
    for number in (0, 1):
        run.checkpoint(number).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="there is none before it; begin the run again"):
        load_state(run, experiment_of(run))


def test_lost_metrics_line_is_restored_with_its_evaluation(tmp_path: Path) -> None:
    settings = small(tmp_path, "evaluation.every=1", rounds=2)
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    lines = files.read_json_lines(run.metrics)
    files.write_text(run.metrics, json.dumps(lines[0]) + '\n{"round": 2, "ima')
    evaluator = NoEvaluator()
    Federation(run.settings(), run, experiment_of(run), evaluator).evaluate_final()
    assert evaluator.evaluated_rounds == [2]
    assert files.read_json_lines(run.metrics) == lines


def test_final_evaluation_of_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    settings = small(tmp_path, rounds=2)
    run = RunFolder.at(tmp_path / "run")
    with pytest.raises(FederationError):
        federate(settings, run, app, fail_in(2))
    with pytest.raises(FederationError, match="round 1 of 2 is the last complete one"):
        Federation(run.settings(), run, experiment_of(run), NoEvaluator()).evaluate_final()


def test_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(tmp_path, rounds=2)
    run = RunFolder.at(tmp_path / "run")
    prepare_run(settings, run)
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if "round-00001" in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StorageError, match="the disk is full"):
            federate(settings, run, app)
    assert run.last_round() == 0
    assert not list(run.checkpoints.glob(".*"))
    federate(settings, run, app)
    assert run.last_round() == 2


# --- with Flower and Ray --------------------------------------------------------------------------

SCRIPT = """
import json, sys
from fedgan.run_folder import RunFolder
from simulations import runner
from small_federation import tiny
folder, data, client = sys.argv[1:]
on_event = lambda event: print(json.dumps(event), flush=True)
settings = tiny(data, hospitals=2, rounds=3, kimg=0.06)
runner.simulate(settings, RunFolder.at(folder), on_event, client)
"""


def start(run: RunFolder, data: Path, client: str) -> subprocess.Popen[str]:
    """Start a simulation in its own process; events are lines of its standard output."""
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    command = [sys.executable, "-c", SCRIPT, str(run.path), str(data), client]
    environ = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environ, start_new_session=True
    )


def are_gone(sessions: set[int], seconds: float = 10) -> bool:
    """Whether all processes of the sessions end in time."""
    end = time.monotonic() + seconds
    while alive_in(sessions):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.slow
def test_killed_run_ends_like_an_unbroken_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_shards(tmp_path / "data", (40, 24))
    whole, broken = RunFolder.at(tmp_path / "whole"), RunFolder.at(tmp_path / "broken")
    # without Ray: the same bytes
    federate(tiny(data, hospitals=2, rounds=3, kimg=0.06), whole, app)

    process = start(broken, data, "faulty_client:slow")
    assert process.stdout
    with watchdog(process):
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "round_start" and event["round"] == 2:
                break
        else:
            pytest.fail("the run ended before round 2")
        # every hospital sleeps before it trains
        with monkeypatch.context() as patch:
            patch.setattr(lock, "TIMEOUT", 0.2)
            with pytest.raises(ConfigError, match="in use by another fedgan"):
                runner.resume(broken)
        sessions = processes_of(broken.path)
        assert sessions
        process.kill()  # only the engine itself can clean up
        process.stdout.read()
        process.wait()
    assert are_gone(sessions)
    assert broken.last_round() == 1
    assert not broken.evaluation.exists()

    runner.resume(broken)
    assert end_alike(whole, broken, 3)
    images = load_tensors(whole.checkpoint(3))[1]["images_seen"]
    assert load_tensors(broken.checkpoint(3))[1]["images_seen"] == images
    assert broken.read_json(broken.evaluation)["images_seen"] == images
