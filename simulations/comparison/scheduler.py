"""Runs jobs of a comparison side by side, each in a process on cores of its own, longest first.

A job that fails does not stop the others: its reason is kept. A stop (Ctrl-C) ends all processes and leaves whole
rounds on the disk.
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
ENDING_SECONDS = 20.0


@dataclass
class Task:
    """A process to run: module and arguments (the cores are added as the last), its name in events, and what it waits for."""

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
    rest: bytes = b""


def core_groups(threads: int, slots: int | None = None) -> list[tuple[int, ...]]:
    """Groups of `threads` of the usable cores (0: one group of all), as many as the cores hold and `slots` allows."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    cores = sorted(affinity(0))[: usable_cores()] if affinity else list(range(usable_cores()))
    each = min(threads or len(cores), len(cores))
    groups = [tuple(cores[start : start + each]) for start in range(0, len(cores) - each + 1, each)]
    return groups[: slots or len(groups)]


def run_tasks(tasks: Sequence[Task], groups: Sequence[tuple[int, ...]], on_event: OnEvent) -> None:
    """Run all tasks that are not done; each ends `done` or with a `failure`. Events carry the task's name as `task`."""
    free, running = list(groups), list[Task]()
    watch = selectors.DefaultSelector()
    try:
        while True:
            for task in _blocked(tasks):
                on_event({"event": "task_end", "task": task.name, "failure": task.failure})
            waiting = _startable(tasks, running)
            while free and waiting:
                task = waiting.pop(0)
                _start(task, free.pop(0), watch)
                running.append(task)
                on_event({"event": "task_start", "task": task.name})
            if not running:
                return
            for key, _ in watch.select(1.0):
                task = key.data
                if not _read(task, on_event):
                    watch.unregister(key.fileobj)
                    _finish(task)
                    running.remove(task)
                    free.append(task.cores)
                    on_event({"event": "task_end", "task": task.name, "failure": task.failure})
    finally:
        for task in running:
            _close(task)  # their standard inputs: the sign to stop, to all at once
        for task in running:
            _stop(task)
        watch.close()


def _blocked(tasks: Sequence[Task]) -> list[Task]:
    """Tasks that can no longer begin, because one that they wait for has failed; they fail with it."""
    by_name = {task.name: task for task in tasks}
    blocked = []
    for task in tasks:
        failed = [name for name in task.after if by_name[name].failure]
        if failed and not task.failure and not task.done:
            task.failure = f"'{failed[0]}', which it builds on, failed"
            blocked.append(task)
    return blocked


def _startable(tasks: Sequence[Task], running: Sequence[Task]) -> list[Task]:
    """Tasks that wait for nothing any more, the heaviest first."""
    by_name = {task.name: task for task in tasks}
    open_ = [task for task in tasks if not (task.done or task.failure or task in running)]
    return sorted(
        (task for task in open_ if all(by_name[name].done for name in task.after)),
        key=lambda task: -task.weight,
    )


def _start(task: Task, cores: tuple[int, ...], watch: selectors.BaseSelector) -> None:
    task.cores, task.rest = cores, b""
    environment = child_environment() | {
        "OMP_NUM_THREADS": str(len(cores)),
        "MKL_NUM_THREADS": str(len(cores)),
    }
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with open(task.log, "ab") as log:
        task.process = subprocess.Popen(
            [sys.executable, "-m", task.module, *task.arguments, ",".join(map(str, cores))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C on a terminal reaches the schedule alone
        )
    assert task.process.stdout is not None
    watch.register(task.process.stdout, selectors.EVENT_READ, task)


def _read(task: Task, on_event: OnEvent) -> bool:
    """Pass on what a task says; False at its end."""
    assert task.process is not None
    assert task.process.stdout is not None
    chunk = os.read(task.process.stdout.fileno(), 65536)
    *lines, task.rest = (task.rest + chunk).split(b"\n")
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
        task.failure = f"its process ended without a word (exit status {code}; out of memory?); see {task.log.name}"
    _close(task)


def _stop(task: Task) -> None:
    """Ask a task to stop as Ctrl-C would, and end it when it does not."""
    assert task.process is not None
    _close(task)  # its standard input: the sign to stop
    try:
        task.process.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        task.process.kill()
        task.process.wait()


def _close(task: Task) -> None:
    assert task.process is not None
    for stream in (task.process.stdin, task.process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
