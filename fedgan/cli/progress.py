"""Progress of a run: a bar a hospital and a table of rounds on a terminal, plain lines elsewhere, or JSON (FEDGAN_LOG=json).

`simulations/runner.py` says which events there are. `RunState` follows them and knows nothing of screens.
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
    "phantoms": "drawing phantoms",
    "hospitals": "opening the hospitals' shards",
    "engine": "starting Flower",
}
COLUMNS = ("loss_g", "loss_d", "r_t", "p")
QUIET_SECONDS = 20.0  # between two plain lines inside a round
SHOWN_ROUNDS = 8


@dataclass
class RunState:
    """Where a run stands, by its events."""

    stage: str = "preparing"
    rounds: int = 0
    round: int = 0
    images: int = 0
    images_seen: int = 0
    shown: dict[str, int] = field(default_factory=dict)
    goals: dict[str, int] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def follow(self, event: dict[str, Any]) -> None:
        """Take over one event; unknown ones are ignored."""
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
            self.goals, self.shown = dict(event["images"]), dict.fromkeys(event["images"], 0)
        elif kind == "progress" and event["round"] == self.round:
            self.shown[event["hospital"]] = event["images"]
        elif kind == "evaluation":
            self.stage = "final evaluation" if event["final"] else "sampling"
        elif kind == "status":
            self.stage = event["text"]
        elif kind == "round_end":
            self.lines.append(event["line"])
            self.images_seen, self.shown = event["line"]["images_seen"], {}
            self.stage = "between two rounds"
        elif kind in ("finished", "complete"):
            self.stage = "finished"

    @property
    def images_now(self) -> int:
        """Images seen over all hospitals, with those of the round that is under way."""
        return min(self.images, self.images_seen + sum(self.shown.values()))

    def hospital_shares(self) -> dict[str, float]:
        """Share of its round that each hospital has done, from 0 to 1."""
        between = not self.shown and self.lines
        return {
            name: 1.0 if between else min(1.0, self.shown.get(name, 0) / goal) if goal else 0.0
            for name, goal in self.goals.items()
        }


class Progress:
    """Shows the events of a run on stderr. Use as a context and give `on_event` to the runner.

    `quietly`: shows nothing by itself, for a caller that asks for each event `in_words`.
    """

    def __init__(self, quietly: bool = False) -> None:
        self.state = RunState()
        self.as_json = events.wants_json()
        self.screen = (
            Screen(self.state) if sys.stderr.isatty() and not (quietly or self.as_json) else None
        )
        self._said = time.monotonic()

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
        text = self.in_words(event)
        if self.screen:
            if event.get("event") == "note":
                self.screen.live.console.print(event["text"], highlight=False)
            self.screen.refresh()
        elif text:
            console.note(text)

    def in_words(self, event: dict[str, Any]) -> str:
        """An event as a plain line; most are worth none."""
        self.state.follow(event)
        if text := self._plain(event):
            self._said = time.monotonic()
        return text

    def _plain(self, event: dict[str, Any]) -> str:
        """The line that an event is worth where there is no terminal; most are worth none."""
        kind, state = event.get("event"), self.state
        if kind in ("preparing", "evaluation", "status"):
            return f"{state.stage} ..."
        if kind == "start":
            rounds = f"rounds {event['first_round']} to {state.rounds}"
            return (
                f"hospitals {', '.join(event['hospitals'])}: {rounds}, {state.images} images in all"
            )
        if kind == "progress" and time.monotonic() - self._said > QUIET_SECONDS:
            return f"round {state.round}/{state.rounds}: " + ", ".join(
                f"{name} {share:.0%}" for name, share in state.hospital_shares().items()
            )
        if kind == "round_end":
            return round_text(event["line"], state.rounds)
        if kind == "note":
            return str(event["text"])
        return str(event["message"]) if kind == "complete" else ""


class Screen:
    """The picture on a terminal: a bar for the run and for each hospital, and the newest rounds."""

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
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bars = Bars(*columns)
        self.run = self.bars.add_task("preparing", total=None)
        self.tasks: dict[str, Any] = {}
        self.live = Live(
            get_renderable=self.picture, console=Console(stderr=True), refresh_per_second=4
        )

    def refresh(self) -> None:
        """Bring the bars up to date with the state."""
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
                self.bars.reset(self.tasks[name])  # a new round: its own clock
            self.bars.update(self.tasks[name], completed=share)

    def picture(self) -> Group:
        """What stands on the screen now."""
        from rich.console import Group

        return Group(
            *([rounds_table(self.state.lines[-SHOWN_ROUNDS:])] if self.state.lines else []),
            self.bars,
        )


def rounds_table(lines: list[dict[str, Any]]) -> Table:
    """Rounds as a table: number, images seen, losses, r_t, p, ε with privacy, and the Fréchet distance where measured."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2))
    private = any(privacy_text(line) for line in lines)
    for title in ("round", "kimg", *COLUMNS, *(["ε"] if private else []), "Fréchet"):
        table.add_column(title, justify="right")
    for line in lines:
        mean = line.get("mean") or {}
        numbers = [_number(mean.get(name)) for name in COLUMNS] + (
            [privacy_text(line)] if private else []
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
    stopped = [row["name"] for row in line.get("hospitals") or [] if row.get("exhausted")]
    tail += f"  budget spent: {', '.join(stopped)}" if stopped else ""
    return f"round {line['round']:>{len(str(rounds))}}/{rounds}  {line['images_seen'] / 1000:.1f} kimg  {numbers}{tail}"


def privacy_text(line: dict[str, Any]) -> str:
    """The largest ε of the round's hospitals, ∞ where one adds no noise; empty without privacy."""
    found = [
        row["epsilon"]
        for row in [*(line.get("hospitals") or []), line.get("client_level_dp") or {}]
        if "epsilon" in row
    ]
    if not found:
        return ""
    return "∞" if None in found else f"{max(found):.3g}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
