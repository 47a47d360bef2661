"""Scheduler of a comparison: tasks in parallel, each in a process on its own cores, longest first.

A task that fails does not stop the others: its reason is kept. Ctrl-C ends all processes and
leaves whole rounds on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedgan.machine import usable_cores
from simulations.runner import child_environment

OnEvent = Callable[[dict[str, Any]], None]
STOP_SECONDS = 20.0


@dataclass
class Task:
    """A process `python -m module *arguments CORES`. `after`: names of tasks to wait for."""

    name: str
    module: str
    arguments: tuple[str, ...]
    log: Path
    weight: float = 1.0
    after: tuple[str, ...] = ()
    failure: str = ""
    done: bool = False
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    cores: tuple[int, ...] = ()
    buffer: bytes = b""


def core_groups(threads: int, slots: int | None = None) -> list[tuple[int, ...]]:
    """Disjoint groups of `threads` usable cores (0: all cores), at most `slots`."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    cores = sorted(affinity(0))[: usable_cores()] if affinity else list(range(usable_cores()))
    size = min(threads or len(cores), len(cores))
    groups = [tuple(cores[start : start + size]) for start in range(0, len(cores) - size + 1, size)]
    return groups[: slots or len(groups)]


def run_tasks(tasks: Sequence[Task], groups: Sequence[tuple[int, ...]], on_event: OnEvent) -> None:
    """Run all tasks that are not done; each ends `done` or with a `failure`.

    Every event carries the name of its task as `task`.
    """
    free, running = list(groups), list[Task]()
    selector = selectors.DefaultSelector()
    try:
        while True:
            for task in fail_blocked(tasks):
                on_event({"event": "task_end", "task": task.name, "failure": task.failure})
            ready = startable(tasks, running)
            while free and ready:
                task = ready.pop(0)
                _start(task, free.pop(0), selector)
                running.append(task)
                on_event({"event": "task_start", "task": task.name})
            if not running:
                return
            for key, _ in selector.select(1.0):
                task = key.data
                if not _read(task, on_event):
                    selector.unregister(key.fileobj)
                    _finish(task)
                    running.remove(task)
                    free.append(task.cores)
                    on_event({"event": "task_end", "task": task.name, "failure": task.failure})
    finally:
        for task in running:
            _close(task)  # the signal to stop, to all of them before any is waited for
        for task in running:
            _stop(task)
        selector.close()


def fail_blocked(tasks: Sequence[Task]) -> list[Task]:
    """Mark tasks whose dependency has failed as failed, and return them."""
    by_name = {task.name: task for task in tasks}
    blocked = []
    for task in tasks:
        failed = [name for name in task.after if by_name[name].failure]
        if failed and not task.failure and not task.done:
            task.failure = f"'{failed[0]}', on which it depends, failed"
            blocked.append(task)
    return blocked


def startable(tasks: Sequence[Task], running: Sequence[Task]) -> list[Task]:
    """Tasks whose dependencies are done, the heaviest first."""
    by_name = {task.name: task for task in tasks}
    waiting = [task for task in tasks if not (task.done or task.failure or task in running)]
    ready = [task for task in waiting if all(by_name[name].done for name in task.after)]
    return sorted(ready, key=lambda task: -task.weight)


def _start(task: Task, cores: tuple[int, ...], selector: selectors.BaseSelector) -> None:
    task.cores, task.buffer = cores, b""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(len(cores)))
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with open(task.log, "ab") as log:
        task.process = subprocess.Popen(
            [sys.executable, "-m", task.module, *task.arguments, ",".join(map(str, cores))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=child_environment() | threads,
            start_new_session=True,  # Ctrl-C on a terminal reaches the scheduler alone
        )
    assert task.process.stdout is not None
    selector.register(task.process.stdout, selectors.EVENT_READ, task)


def _read(task: Task, on_event: OnEvent) -> bool:
    """Forward the events of a task; False when its output has ended."""
    assert task.process is not None
    assert task.process.stdout is not None
    chunk = os.read(task.process.stdout.fileno(), 65536)
    *lines, task.buffer = (task.buffer + chunk).split(b"\n")
    for line in lines:
        event = json.loads(line)
        if event["event"] == "done":
            task.done = True
        elif event["event"] == "failed":
            first = (event["message"].strip().splitlines() or [event["kind"]])[0]
            task.failure = f"{event['kind']}: {first}"
        else:
            on_event({**event, "task": task.name})
    return bool(chunk)


def _finish(task: Task) -> None:
    assert task.process is not None
    code = task.process.wait()
    if not task.done and not task.failure:
        task.failure = (
            f"its process ended without an error message (exit status {code}; out of memory?); "
            f"see {task.log.name}"
        )
    _close(task)


def _stop(task: Task) -> None:
    """Stop a task as Ctrl-C would; kill it after `STOP_SECONDS`."""
    assert task.process is not None
    _close(task)
    try:
        task.process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        task.process.kill()
        task.process.wait()


def _close(task: Task) -> None:
    """Close the pipes of a task; the end of its standard input is the signal to stop."""
    assert task.process is not None
    for stream in (task.process.stdin, task.process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
