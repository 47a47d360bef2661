"""Scheduler of a comparison: parallel tasks, failures, stops and killed processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watchdog import watchdog

from simulations.comparison import scheduler
from simulations.comparison.scheduler import Task, core_groups, run_tasks

ROOT = Path(__file__).resolve().parent.parent
WORKER = '''
"""python -m worker WHAT PLACE CORES"""
import os, sys, time
from pathlib import Path
from fedgan.errors import DataError
from simulations.comparison.worker import run_worker

what, folder, cores = sys.argv[1], Path(sys.argv[2]), sys.argv[3]

def work(on_event):
    on_event({"event": "begun", "pid": os.getpid(), "cores": cores,
              "threads": os.environ["OMP_NUM_THREADS"],
              "affinity": sorted(os.sched_getaffinity(0))})
    print("chatter of a library")
    if what == "fail":
        raise DataError("the shard is torn: import it again\\nsecond line")
    if what == "break":
        raise ZeroDivisionError
    if what == "die":
        os._exit(9)
    if what == "meet":  # ends when another process runs at the same time
        (folder / str(os.getpid())).touch()
        end = time.monotonic() + 60
        while len(list(folder.iterdir())) < 2:
            if time.monotonic() > end:
                raise TimeoutError("no other process")
            time.sleep(0.02)
    if what == "wait":
        try:
            time.sleep(120)
        finally:
            (folder / f"ended-{os.getpid()}").touch()

run_worker(work, cores)
'''


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `worker` for tasks, and an empty folder for the files of its processes."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder


def task(name: str, folder: Path, what: str = "do", **changes: Any) -> Task:
    return Task(
        name, "worker", (what, str(folder)), folder.parent / "logs" / f"{name}.log", **changes
    )


def one_group() -> list[tuple[int, ...]]:
    return core_groups(1, 1)


# --- cores ---------------------------------------------------------------------------------------


@given(
    cores=st.integers(1, 64),
    threads=st.integers(0, 70),
    slots=st.one_of(st.none(), st.integers(1, 70)),
)
def test_core_groups_are_disjoint_and_equal_in_size(
    cores: int, threads: int, slots: int | None
) -> None:
    own = set(range(3, 3 + cores))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "usable_cores", lambda: cores)
        patch.setattr(os, "sched_getaffinity", lambda pid: own, raising=False)
        groups = core_groups(threads, slots)
    size = min(threads or cores, cores)
    assert {len(group) for group in groups} == {size}
    flat = [core for group in groups for core in group]
    assert len(set(flat)) == len(flat)
    assert set(flat) <= own
    assert len(groups) == min(cores // size, slots or cores)


def test_core_quota_below_affinity_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "usable_cores", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert core_groups(1) == [(0,), (1,)]
    assert core_groups(0) == [(0, 1)]


# --- order ---------------------------------------------------------------------------------------


def test_tasks_run_heaviest_first_and_after_dependencies(worker: Path) -> None:
    tasks = [
        task("light", worker, weight=1),
        task("after", worker, weight=9, after=("light",)),
        task("heavy", worker, weight=3),
        task("before", worker, weight=5, done=True),
    ]
    events: list[dict[str, Any]] = []
    run_tasks(tasks, one_group(), events.append)
    assert [event["task"] for event in events if event["event"] == "task_start"] == [
        "heavy",
        "light",
        "after",
    ]
    assert all(one.done and not one.failure for one in tasks)
    assert [(event["event"], event["task"]) for event in events[:3]] == [
        ("task_start", "heavy"),
        ("begun", "heavy"),
        ("task_end", "heavy"),
    ]
    assert "chatter of a library" in tasks[2].log.read_text()
    begun = [event for event in events if event["event"] == "begun"]
    group = one_group()[0]
    assert all(
        (event["cores"], event["threads"], event["affinity"]) == (str(group[0]), "1", list(group))
        for event in begun
    )


def test_tasks_run_in_parallel(worker: Path) -> None:
    tasks = [task("one", worker, "meet"), task("two", worker, "meet")]
    groups = one_group() * 2  # one core suffices: the processes wait for each other
    events: list[dict[str, Any]] = []
    run_tasks(tasks, groups, events.append)
    assert all(one.done for one in tasks), [one.failure for one in tasks]
    assert [event["event"] for event in events][:2] == ["task_start", "task_start"]


# --- failures ------------------------------------------------------------------------------------


def test_failed_task_keeps_its_reason_and_others_continue(worker: Path) -> None:
    tasks = [
        task("bad", worker, "fail", weight=9),
        task("worse", worker, "break", weight=8),
        task("mute", worker, "die", weight=7),
        task("child", worker, weight=6, after=("bad",)),
        task("grandchild", worker, weight=6, after=("child",)),
        task("good", worker, weight=5),
    ]
    events: list[dict[str, Any]] = []
    run_tasks(tasks, one_group(), events.append)
    failures = {one.name: one.failure for one in tasks}
    assert failures["bad"] == "DataError: the shard is torn: import it again"
    assert failures["worse"] == "ZeroDivisionError: ZeroDivisionError"
    assert (
        failures["mute"]
        == "its process ended without an error message (exit status 9; out of memory?); "
        "see mute.log"
    )
    assert failures["child"] == "'bad', on which it depends, failed"
    assert failures["grandchild"] == "'child', on which it depends, failed"
    assert failures["good"] == ""
    assert [one.name for one in tasks if one.done] == ["good"]
    ends = {event["task"]: event["failure"] for event in events if event["event"] == "task_end"}
    assert ends == failures  # also of those that never started
    begun = {event["task"] for event in events if event["event"] == "task_start"}
    assert begun == {"bad", "worse", "mute", "good"}
    assert "Traceback" in tasks[0].log.read_text()
    assert "second line" in tasks[0].log.read_text()


def test_earlier_failure_blocks_dependents(
    worker: Path,
) -> None:
    tasks = [task("bad", worker, failure="no disk"), task("child", worker, after=("bad",))]
    events: list[dict[str, Any]] = []
    run_tasks(tasks, one_group(), events.append)
    assert events == [
        {"event": "task_end", "task": "child", "failure": "'bad', on which it depends, failed"}
    ]
    assert tasks[1].failure == events[0]["failure"]


# --- stopping ------------------------------------------------------------------------------------


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_ends_every_process_after_its_cleanup(
    worker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [task("one", worker, "wait"), task("two", worker, "wait")]
    pids: list[int] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "begun":
            pids.append(event["pid"])
        if len(pids) == 2:
            time.sleep(0.3)
            raise KeyboardInterrupt

    begun = time.monotonic()
    calls: list[str] = []
    close, stop = scheduler._close, scheduler._stop
    monkeypatch.setattr(
        scheduler, "_close", lambda task: calls.append(f"closed {task.name}") or close(task)
    )
    monkeypatch.setattr(scheduler, "_stop", lambda task: calls.append("waited") or stop(task))
    with pytest.raises(KeyboardInterrupt):
        run_tasks(tasks, one_group() * 2, on_event)
    assert calls[:3] == [
        "closed one",
        "closed two",
        "waited",
    ]  # all are stopped before any is waited for
    assert len(pids) == 2
    assert not any(is_alive(pid) for pid in pids)
    assert sorted(path.name for path in worker.iterdir()) == sorted(f"ended-{pid}" for pid in pids)
    assert time.monotonic() - begun < scheduler.STOP_SECONDS + 10
    assert not any(one.done for one in tasks)


def test_process_that_ignores_the_stop_is_killed(
    worker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "STOP_SECONDS", 0.5)
    (worker.parent / "worker.py").write_text(
        WORKER.replace(
            "time.sleep(120)", "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(120)"
        ).replace("import os,", "import signal, os,")
    )
    pids: list[int] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "begun":
            pids.append(event["pid"])
            time.sleep(0.3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks([task("stubborn", worker, "wait")], one_group(), on_event)
    assert not is_alive(pids[0])


SCRIPT = """
import json, sys
from pathlib import Path
from simulations.comparison.scheduler import Task, core_groups, run_tasks
folder = Path(sys.argv[1])
tasks = [Task("one", "worker", ("wait", str(folder)), folder.parent / "one.log")]
run_tasks(tasks, core_groups(1, 1), lambda event: print(json.dumps(event), flush=True))
"""


@pytest.mark.parametrize("background", [False, True])
def test_killed_scheduler_leaves_no_process_behind(background: bool, worker: Path) -> None:
    """`background`: started by a shell that makes its children ignore Ctrl-C (`command &`)."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(worker.parent), str(ROOT)])}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(worker)],
        stdout=subprocess.PIPE,
        text=True,
        env=environ,
        start_new_session=True,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if background else None,
    )
    assert process.stdout
    with watchdog(process):
        pid = next(
            event["pid"] for event in map(json.loads, process.stdout) if event["event"] == "begun"
        )
        time.sleep(0.3)
        process.kill()
        process.stdout.close()
        process.wait()
    end = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    alive = is_alive(pid)
    if alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive
    assert [path.name for path in worker.iterdir()] == [f"ended-{pid}"]
