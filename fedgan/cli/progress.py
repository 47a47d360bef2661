"""Progress of a run: a bar a hospital and a table of rounds on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from fedgan.cli import console
from fedgan.config import Settings


class Progress:
    """Shows the events of a run on stderr. Use as a context; give `on_event` to the runner."""

    def __init__(self, settings: Settings, begun: int = 0) -> None:
        self.rounds, self.begun = settings.federation.rounds, begun

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def on_event(self, event: dict[str, Any]) -> None:
        """Show one event of the runner."""
        console.note(str(event))
