"""Progress of a comparison: bars per stage and running task on a terminal, plain lines elsewhere.

`simulations/comparison/compare.py` lists the events. `ComparisonState` follows them and shows
nothing.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from fedgan.cli import console

QUIET_SECONDS = 20.0
STAGES = {
    "training": "training the arms",
    "evaluating": "evaluating the arms",
    "comparing": "comparing the arms",
}
PREPARING = {"phantoms": "generating phantoms", "hospitals": "opening the hospitals' shards"}


@dataclass
class ComparisonState:
    """State of a comparison, from its events."""

    stage: str = "preparing"
    weights: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)  # per started task, 0 to 1
    running: list[str] = field(default_factory=list)
    steps: dict[str, str] = field(default_factory=dict)

    def follow(self, event: dict[str, Any]) -> None:
        """Apply one event; unknown ones are ignored."""
        kind, task = event["event"], event.get("task", "")
        if kind == "plan":
            self.stage, self.weights = event["stage"], dict(event["tasks"])
            self.shares, self.running = dict.fromkeys(event["done"], 1.0), []
        elif kind == "task_start":
            self.running.append(task)
            self.shares[task] = 0.0
        elif kind == "task_end":
            if task in self.running:  # a task with a failed dependency ends without a start
                self.running.remove(task)
            self.shares[task] = 1.0
        elif kind == "start" and event["images"]:
            self.shares[task] = event["images_seen"] / event["images"]
        elif kind == "round_end":
            self.shares[task] = event["round"] / event["rounds"]
        elif kind == "step":
            self.shares[task], self.steps[task] = event["share"], event["text"]

    @property
    def share(self) -> float:
        """Share of the stage that is done, by the weights of its tasks."""
        total = sum(self.weights.values())
        done = sum(self.weights.get(name, 0.0) * share for name, share in self.shares.items())
        return done / total if total else 0.0


class CompareProgress:
    """Context manager whose `on_event` shows the events of a comparison on stderr."""

    def __init__(self) -> None:
        self.state = ComparisonState()
        self.bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._last_line = 0.0

    def __enter__(self) -> CompareProgress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
            )
            self.bars = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bars:
            self.bars.stop()

    def on_event(self, event: dict[str, Any]) -> None:
        """Show one event."""
        self.state.follow(event)
        if self.bars:
            self._update_bars(event)
        elif text := self._line(event):
            self._last_line = time.monotonic()
            console.note(text)

    def _update_bars(self, event: dict[str, Any]) -> None:
        state = self.state
        if event["event"] == "plan":
            for task in self._tasks.values():
                self.bars.remove_task(task)
            self._tasks = {"": self.bars.add_task(STAGES.get(state.stage, state.stage), total=1.0)}
        if not self._tasks:
            return
        self.bars.update(self._tasks[""], completed=state.share)
        for name in state.running:
            if name not in self._tasks:
                self._tasks[name] = self.bars.add_task(f"  {name}", total=1.0)
            text = state.steps.get(name, "")
            self.bars.update(
                self._tasks[name],
                completed=state.shares[name],
                description=f"  {name} {text}".rstrip(),
            )
        for name in [name for name in self._tasks if name and name not in state.running]:
            self.bars.remove_task(self._tasks.pop(name))

    def _line(self, event: dict[str, Any]) -> str:
        """The line of an event where there is no terminal; empty for most events."""
        kind, state = event["event"], self.state
        if kind == "preparing" and "task" not in event:
            return f"{PREPARING.get(event['what'], event['what'])} ..."
        if kind == "plan":
            done = f", {len(event['done'])} already done" if event["done"] else ""
            count = len(event["tasks"])
            tasks = f": {count} {'job' if count == 1 else 'jobs'}{done}" if count else " ..."
            return f"{STAGES.get(state.stage, state.stage)}{tasks}"
        if kind == "task_end":
            result = f"failed: {event['failure']}" if event["failure"] else "done"
            return f"{state.share:>4.0%}  {event['task']}: {result}"
        if kind in ("round_end", "step") and time.monotonic() - self._last_line > QUIET_SECONDS:
            return f"{state.share:>4.0%}  " + ", ".join(
                f"{name} {state.shares[name]:.0%}" for name in state.running
            )
        return ""
