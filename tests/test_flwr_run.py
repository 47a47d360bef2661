"""`flwr run .` in the repository."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_federation import write_shards

from fedgan import files
from fedgan.errors import ConfigError
from fedgan.run_folder import RunFolder
from fedgan.runs import lock
from server import app
from server.app import find_run, split_overrides

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("training.kimg=2 seed=1", ["training.kimg=2", "seed=1"]),
        ("training.kimg=2, seed=1", ["training.kimg=2", "seed=1"]),
        ("data.quantities=[10, 20,30],seed=1", ["data.quantities=[10, 20,30]", "seed=1"]),
        (
            "data.label_map='normal=normal,*=abnormal'",
            ["data.label_map='normal=normal,*=abnormal'"],
        ),
    ],
)
def test_overrides_are_split_before_the_next_key(text: str, parts: list[str]) -> None:
    assert split_overrides(text) == parts


def test_find_run_finds_scenarios_and_existing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings, run = find_run({"overrides": "training.kimg=3", "output": str(tmp_path / "run")})
    assert (settings.name, settings.training.kimg, run.path) == (
        "three-hospitals",
        3.0,
        tmp_path / "run",
    )
    run.write_settings(settings)
    assert (
        find_run({"overrides": "training.kimg=9", "output": str(run.path)})[0].training.kimg == 3.0
    )
    assert "scenario and overrides are ignored" in capsys.readouterr().out
    files.write_json(run.evaluated_run, {"run": "elsewhere"})
    with pytest.raises(ConfigError, match="repeated evaluation of elsewhere"):
        find_run({"output": str(run.path)})
    with pytest.raises(ConfigError, match="no scenario at"):
        find_run({"scenario": "nowhere.toml"})


def test_server_app_refuses_a_run_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "TIMEOUT", 0.2)
    run = RunFolder.at(tmp_path / "run")
    context: Any = SimpleNamespace(run_config={"output": str(run.path)})
    with lock.locked(run), pytest.raises(ConfigError, match="in use by another fedgan"):
        app.main(None, context)
    assert not run.config.exists()


def flower_processes(home: Path) -> list[int]:
    """Processes with this FLWR_HOME: Flower's daemon and its children."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if f"FLWR_HOME={home}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_flwr_run_trains_and_evaluates(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", (40, 24))
    home = tmp_path / "flower"
    home.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    tiny = (
        f"data.root={data} data.resolution=16 "
        "model.z_dim=4 model.w_dim=8 model.channel_base=64 model.channel_max=8 "
        "training.kimg=0.03 training.batch_size=4 federation.hospitals=2 federation.rounds=2 "
        "evaluation.every=0 evaluation.images=16 evaluation.seeds=1 evaluation.epochs=1 "
        "evaluation.bootstrap=10"
    )
    output = tmp_path / "run"
    command = [
        "flwr",
        "run",
        ".",
        "--stream",
        "--federation-config",
        "num-supernodes=2 client-resources-num-cpus=1",
    ]
    command += ["-c", f'overrides="{tiny}" output="{output}"']
    try:
        finished = subprocess.run(
            command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=600
        )
        listed = subprocess.run(
            ["flwr", "ls", "--format", "json"],
            cwd=REPOSITORY,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert json.loads(listed.stdout)["runs"][0]["status"] == "finished:completed", (
            finished.stdout + finished.stderr
        )
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in flower_processes(home):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(1)
    run = RunFolder.at(output)
    assert run.last_round() == 2
    assert run.read_json(run.evaluation)["arm"] == "federated"
    assert str(run.path) in finished.stdout
