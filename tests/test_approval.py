"""A hospital's approval of code; tests/test_deployment_security.py runs it with real processes."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk
from tiny_app import write_tiny_app

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def approval() -> Any:
    spec = importlib.util.spec_from_file_location("approval", ROOT / "client" / "approval.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_approved_hash_is_that_of_the_bundle_and_listed_once(fedgan: Run, tmp_path: Path) -> None:
    app = write_tiny_app(tmp_path / "app")
    expected = hashlib.sha256(build_fab_from_disk(app)).hexdigest()
    for _ in range(2):
        code, _, err = fedgan("approve", app)
        assert code == 0, err
    fedgan("approve", "a" * 64)
    lines = (tmp_path / "approved.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines[1:]] == [expected, "a" * 64]
    fedgan("approve", "b" * 64, "--only")
    lines = (tmp_path / "approved.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["b" * 64]
    code, _, err = fedgan("approve", tmp_path)
    assert code == 2
    assert "no checkout of fedgan" in err


def test_other_code_or_name_is_refused(approval: Any, tmp_path: Path) -> None:
    content = build_fab_from_disk(write_tiny_app(tmp_path / "app"))
    found = hashlib.sha256(content).hexdigest()
    fab = SimpleNamespace(content=content, hash_str=found)
    run = SimpleNamespace(fab_id="fedgan/tiny", fab_version="0.1.0")
    approved = tmp_path / "approved.txt"
    assert "cannot be read" in approval.objection(fab, run, approved)
    approved.write_text("# a comment\n" + "c" * 64 + "  other code\n")
    why = approval.objection(fab, run, approved)
    assert found in why
    assert "approved is " + "c" * 64 in why
    approved.write_text(f"{found}  read by us\n")
    assert approval.objection(fab, run, approved) == ""
    # Flower loads by these names, whatever it has installed
    for wrong_fab, wrong_run in (
        (SimpleNamespace(content=content, hash_str="d" * 64), run),
        (fab, SimpleNamespace(fab_id="fedgan/../x", fab_version="0.1.0")),
    ):
        assert "the name of another app" in approval.objection(wrong_fab, wrong_run, approved)


def test_executor_takes_client_apps_alone(
    approval: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import flwr.supercore.cli
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
    from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor as Executor

    monkeypatch.setenv("FEDGAN_APPROVED", str(tmp_path / "approved.txt"))
    monkeypatch.setattr(flwr.supercore.cli, "flower_superexec", lambda: None)
    monkeypatch.setattr(Executor, "get_eligible_capacity", None)
    monkeypatch.setitem(TASK_TYPE_TO_COMMAND, TaskType.CLIENT_APP, "flwr-clientapp")
    with pytest.raises(SystemExit, match="lists no approved code"):
        approval.run_executor()
    (tmp_path / "approved.txt").write_text("e" * 64)
    approval.run_executor()
    assert Executor().get_eligible_capacity(set(TaskType)) == ({TaskType.CLIENT_APP}, set())
    assert TASK_TYPE_TO_COMMAND[TaskType.CLIENT_APP] == str(ROOT / "client" / "approval.py")
