"""The installed wheel: verbs that need no repository work, the others give one clear error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from small_federation import federate, tiny, write_shards

from client.app import app
from fedgan.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `fedgan` command of a new environment with the wheel and this environment's packages."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run([*pip, *build], check=True, timeout=120)
    (wheel,) = folder.glob("fedgan-*.whl")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    site = environment / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    assert (site / "fedgan").is_dir()
    assert not (site / "server").exists()
    # appended to sys.path, without the .pth file of this environment's editable installation
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return environment / "bin" / "fedgan"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("finished")
    settings = tiny(write_shards(folder / "data", (120,)), hospitals=1, rounds=1, kimg=0.016)
    found = RunFolder.at(folder / "run")
    federate(settings, found, app)
    return found


def fedgan(command: Path, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a folder outside the repository."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [command, *map(str, words)],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_wheel_evaluates_audits_and_releases_a_run(
    installed: Path, run: RunFolder, tmp_path: Path
) -> None:
    evaluate = ("evaluate", run.path)
    audit = ("audit", run.path, "--images", 50, "--projected", 0, "--embedding-steps", 1)
    release = ("generate", "--release", run.path, "--images", 4, "--output", "release")
    for words in (evaluate, audit, release):
        done = fedgan(installed, tmp_path, *words)
        assert done.returncode == 0, done.stderr
    assert json.loads(run.evaluation.read_text(encoding="utf-8"))["round"] == 1
    assert json.loads(run.audit.read_text(encoding="utf-8"))["hospitals"]
    assert len(list((tmp_path / "release").rglob("*.png"))) >= 4


def test_wheel_reports_verbs_that_need_the_repository(installed: Path, tmp_path: Path) -> None:
    scenario = tmp_path / "scenario.toml"
    scenario.write_text('name = "x"\n', encoding="utf-8")
    for words in (("simulate", scenario), ("compare", scenario), ("deploy", "run", scenario)):
        done = fedgan(installed, tmp_path, *words)
        assert done.returncode == 7, done.stderr
        assert "this command needs the repository" in done.stderr
