"""Progress of a run: bars and a table of rounds on a terminal, plain lines elsewhere, or JSON
lines.

FEDGAN_LOG=json selects JSON. `simulations/runner.py` lists the events. `RunState` follows them
without any output.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fedgan import events
from fedgan.cli import console

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

PREPARING = {
    "phantoms": "generating phantoms",
    "hospitals": "opening the hospitals' shards",
    "engine": "starting Flower",
}
COLUMNS = ("loss_g", "loss_d", "r_t", "p")
QUIET_SECONDS = 20.0  # between two plain lines inside a round
SHOWN_ROUNDS = 8


@dataclass
class RunState:
    """State of a run, by its events."""

    stage: str = "preparing"
    rounds: int = 0
    round: int = 0
    images: int = 0
    images_seen: int = 0
    seen: dict[str, int] = field(default_factory=dict)
    goals: dict[str, int] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def follow(self, event: dict[str, Any]) -> None:
        """Apply one event; unknown events are ignored."""
        kind = event.get("event")
        if kind == "preparing":
            self.stage = PREPARING.get(event["what"], event["what"])
        elif kind == "start":
            self.stage = "waiting for the first round"
            self.rounds, self.round = event["rounds"], event["first_round"] - 1
            self.images, self.images_seen = event["images"], event["images_seen"]
            self.goals = dict.fromkeys(event["hospitals"], 0)
        elif kind == "round_start":
            self.stage, self.round, self.rounds = "training", event["round"], event["rounds"]
            self.goals, self.seen = dict(event["images"]), dict.fromkeys(event["images"], 0)
        elif kind == "progress" and event["round"] == self.round:
            self.seen[event["hospital"]] = event["images"]
        elif kind == "evaluation":
            self.stage = "final evaluation" if event["final"] else "sampling"
        elif kind == "status":
            self.stage = event["text"]
        elif kind == "round_end":
            self.lines.append(event["line"])
            self.images_seen, self.seen = event["line"]["images_seen"], {}
            self.stage = "between rounds"
        elif kind in ("finished", "complete"):
            self.stage = "finished"

    @property
    def images_now(self) -> int:
        """Images seen over all hospitals, including the current round."""
        return min(self.images, self.images_seen + sum(self.seen.values()))

    def hospital_shares(self) -> dict[str, float]:
        """Finished share of the current round per hospital, from 0 to 1."""
        is_between_rounds = not self.seen and self.lines
        return {
            name: 1.0
            if is_between_rounds
            else min(1.0, self.seen.get(name, 0) / goal)
            if goal
            else 0.0
            for name, goal in self.goals.items()
        }


class Progress:
    """Shows the events of a run on stderr. Use as a context and pass `on_event` to the runner.

    `is_quiet`: prints nothing, for a caller that prints each event's `as_text`.
    """

    def __init__(self, is_quiet: bool = False) -> None:
        self.state = RunState()
        self.as_json = events.wants_json()
        self.screen = (
            Screen(self.state) if sys.stderr.isatty() and not (is_quiet or self.as_json) else None
        )
        self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if self.screen:
            self.screen.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.screen:
            self.screen.refresh()
            self.screen.live.stop()

    def on_event(self, event: dict[str, Any]) -> None:
        """Show one event of the runner."""
        if self.as_json:
            console.note(events.as_line(event))
            return
        text = self.as_text(event)
        if self.screen:
            if event.get("event") == "note":
                text = console.escaped(str(event["text"]))
                self.screen.live.console.print(text, highlight=False, markup=False)
            self.screen.refresh()
        elif text:
            console.note(text)

    def as_text(self, event: dict[str, Any]) -> str:
        """An event as a plain line; "" for most events."""
        self.state.follow(event)
        if text := self._plain_line(event):
            self._last_line = time.monotonic()
        return text

    def _plain_line(self, event: dict[str, Any]) -> str:
        kind, state = event.get("event"), self.state
        if kind in ("preparing", "evaluation", "status"):
            return f"{state.stage} ..."
        if kind == "start":
            names, first = ", ".join(event["hospitals"]), event["first_round"]
            rounds = f"rounds {first} to {state.rounds}"
            return f"hospitals {names}: {rounds}, {state.images} images in total"
        if kind == "progress" and time.monotonic() - self._last_line > QUIET_SECONDS:
            return f"round {state.round}/{state.rounds}: " + ", ".join(
                f"{name} {share:.0%}" for name, share in state.hospital_shares().items()
            )
        if kind == "round_end":
            return round_text(event["line"], state.rounds)
        if kind == "note":
            return str(event["text"])
        return str(event["message"]) if kind == "complete" else ""


class Screen:
    """Terminal display: a bar for the run and for each hospital, and the newest rounds."""

    def __init__(self, state: RunState) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        self.state = state
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bars = Bars(*columns)
        self.run = self.bars.add_task("preparing", total=None)
        self.tasks: dict[str, Any] = {}
        self.live = Live(
            get_renderable=self.render, console=Console(stderr=True), refresh_per_second=4
        )

    def refresh(self) -> None:
        """Update the bars."""
        state = self.state
        title = (
            f"round {state.round}/{state.rounds}, {state.stage}" if state.rounds else state.stage
        )
        self.bars.update(
            self.run, description=title, completed=state.images_now, total=state.images or None
        )
        for name, share in state.hospital_shares().items():
            if name not in self.tasks:
                self.tasks[name] = self.bars.add_task(f"  {name}", total=1.0)
            if share < (self.bars.tasks[self.tasks[name]].completed or 0):
                self.bars.reset(self.tasks[name])  # a new round: restart its clock
            self.bars.update(self.tasks[name], completed=share)

    def render(self) -> Group:
        """Table of rounds and bars."""
        from rich.console import Group

        return Group(
            *([rounds_table(self.state.lines[-SHOWN_ROUNDS:])] if self.state.lines else []),
            self.bars,
        )


def rounds_table(lines: list[dict[str, Any]]) -> Table:
    """Table of rounds: number, images seen, losses, r_t, p, ε with privacy, Fréchet distance."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2))
    is_private = any(privacy_text(line) for line in lines)
    for title in ("round", "kimg", *COLUMNS, *(["ε"] if is_private else []), "Fréchet"):
        table.add_column(title, justify="right")
    for line in lines:
        mean = line.get("mean") or {}
        numbers = [_number(mean.get(name)) for name in COLUMNS] + (
            [privacy_text(line)] if is_private else []
        )
        distance = (line.get("fidelity") or {}).get("frechet")
        table.add_row(
            str(line["round"]),
            f"{line['images_seen'] / 1000:.1f}",
            *numbers,
            "" if distance is None else f"{distance:.3g}",
        )
    return table


def round_text(line: dict[str, Any], rounds: int) -> str:
    """One round as one plain line."""
    mean = line.get("mean") or {}
    numbers = "  ".join(f"{name} {_number(mean.get(name))}" for name in COLUMNS)
    distance = (line.get("fidelity") or {}).get("frechet")
    tail = f"  ε {spent}" if (spent := privacy_text(line)) else ""
    tail += f"  Fréchet {distance:.3g}" if distance is not None else ""
    exhausted = [row["name"] for row in line.get("hospitals") or [] if row.get("exhausted")]
    tail += f"  budget spent: {', '.join(exhausted)}" if exhausted else ""
    head = (
        f"round {line['round']:>{len(str(rounds))}}/{rounds}  {line['images_seen'] / 1000:.1f} kimg"
    )
    return f"{head}  {numbers}{tail}"


def privacy_text(line: dict[str, Any]) -> str:
    """Largest ε of the round's hospitals; ∞ without noise, "" without privacy."""
    epsilons = [
        row["epsilon"]
        for row in [*(line.get("hospitals") or []), line.get("client_level_dp") or {}]
        if "epsilon" in row
    ]
    if not epsilons:
        return ""
    return "∞" if None in epsilons else f"{max(epsilons):.3g}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
