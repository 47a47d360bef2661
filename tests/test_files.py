"""Atomic writes: a reader sees the old or the new file, and failures leave no temporary file."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgan import files
from fedgan.errors import CheckpointError, StorageError
from fedgan.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_creates_folders_and_leaves_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "text.txt"
    files.write_text(path, "Grüße")
    assert path.read_text(encoding="utf-8") == "Grüße"
    assert names(path.parent) == ["text.txt"]


@pytest.mark.parametrize(
    ("umask", "file", "folder"),
    [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o077, 0o600, 0o700)],
)
def test_new_files_and_folders_follow_the_umask(
    umask: int, file: int, folder: int, tmp_path: Path
) -> None:
    """In a separate process, because the umask is read once per process."""
    code = """if True:
        from pathlib import Path
        from fedgan import files
        from fedgan.data.shard import staged_folder
        files.write_text("file", "x")
        with staged_folder(Path("folder")) as stage:
            files.write_text(stage / "inside", "x")
    """
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, umask=umask, check=True, timeout=60
    )
    modes = {
        name: (tmp_path / name).stat().st_mode & 0o777
        for name in ("file", "folder", "folder/inside")
    }
    assert modes == {"file": file, "folder": folder, "folder/inside": file}


def test_rename_flushes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def spy(handle: int) -> None:
        synced.append((os.fstat(handle).st_ino, (tmp_path / "file").exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    files.write_text(tmp_path / "file", "x")
    assert synced == [((tmp_path / "file").stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_exception_during_a_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")

    def fail() -> None:
        with files.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_interrupt_during_a_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.atomic_path(tmp_path / "file"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_reader_sees_the_old_or_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")
    with files.atomic_path(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        temporary.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("refused", ["write", "fsync", "replace"])
def test_full_disk_raises_storage_error(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner, name = {
        "write": (Path, "write_bytes"),
        "fsync": (os, "fsync"),
        "replace": (os, "replace"),
    }[refused]
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(StorageError, match="disk is full: free some space") as caught:
        files.write_text(path, "new")
    monkeypatch.undo()
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB, where this machine allows mounting one."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here; the same is tested with a simulated one")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_really_full_disk_keeps_the_old_file(small_disk: Path) -> None:
    files.write_text(small_disk / "file", "old")
    with pytest.raises(StorageError, match="disk is full"):
        files.write_bytes(small_disk / "file", bytes(2**20))
    assert (small_disk / "file").read_text() == "old"
    assert names(small_disk) == ["file"]


def test_path_through_a_file_raises_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        files.write_text(tmp_path / "file" / "below", "x")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_finite_json_round_trips(
    tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("json") / "value.json"
    files.write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value


def test_nan_and_infinity_become_null(tmp_path: Path) -> None:
    files.write_json(
        tmp_path / "value.json",
        {"a": math.nan, "b": [math.inf, (1.5, -math.inf)], "c": {"d": math.nan}},
    )
    assert json.loads((tmp_path / "value.json").read_text()) == {
        "a": None,
        "b": [None, [1.5, None]],
        "c": {"d": None},
    }


def test_torn_last_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert files.read_json_lines(path) == []
    path.write_text('{"round": 1, "loss": null}\n{"round": 2}\n{"round": 3, "lo')
    assert files.read_json_lines(path) == [{"round": 1, "loss": None}, {"round": 2}]


@given(cut=st.integers(0, 60))
def test_lines_before_a_torn_line_are_read(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    rows = [{"round": number, "name": "ä"} for number in range(1, 4)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(data[: len(data) - cut])
    found = files.read_json_lines(path)
    assert found == rows[: len(found)]
    assert len(found) >= data[: len(data) - cut].count(b"\n")


def test_checkpoint_without_json_is_ignored(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.last_round() is None
    for number in (1, 2, 10):
        files.write_bytes(run.checkpoint(number), b"")
        files.write_json(run.checkpoint(number).with_suffix(".json"), {})
    files.write_bytes(run.checkpoint(11), b"")
    (run.checkpoints / ".round-00012.safetensors.x.part").write_bytes(b"")
    assert run.last_round() == 10


def test_damaged_json_of_a_run_is_an_error(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_json(run.evaluation) is None
    run.evaluation.write_text('{"arm": ')
    with pytest.raises(CheckpointError, match="is damaged"):
        run.read_json(run.evaluation)
