"""A run on a SuperLink, followed line by line to its real end, over restarts of the SuperLink and broken connections."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import httpx

from fedgan.errors import FederationError
from server.operator.superlink import Run

POLL = 15.0  # seconds between two looks at the run's status, while its log is open
PAUSE = 1.0  # seconds before a log is asked for again
PATIENCE = 300.0  # seconds without the SuperLink
LAST_LINES = 15.0  # seconds for what is left of the log when the run is over


class Link(Protocol):
    """What following needs of `SuperLink`."""

    def run(self, number: int) -> Run:
        """The run as it stands; `httpx.RequestError` where nobody answers."""

    def log(self, number: int, after: float) -> Iterator[tuple[str, float]]:
        """Pieces of its log after a moment, each with its own."""


def follow(
    link: Link,
    number: int,
    on_line: Callable[[str], None],
    on_loss: Callable[[str], None] = lambda text: None,
    patience: float = PATIENCE,
    poll: float = POLL,
) -> Run:
    """Give each line of a run's log to `on_line`, once and in order, until the run is over; returns how it ended.

    The log may break off at any moment: its status says when a run is over. `on_loss` is told when the SuperLink has gone and
    when it is back. Raises `FederationError` where it stays away for `patience` seconds, or knows no such run.
    """
    reader, lost = _Reader(link, number), None
    while True:
        reader.take(on_line, poll)
        try:
            run = link.run(number)
        except httpx.RequestError as error:
            if lost is None:
                lost = time.monotonic()
                on_loss(
                    f"no answer from the SuperLink ({error}): run {number} may go on, asking again for {patience:.0f} s"
                )
            elif time.monotonic() - lost > patience:
                raise FederationError(
                    f"the SuperLink has not answered for {patience:.0f} s, and what became of run {number} is not known: "
                    f"see fedgan deploy status, then fedgan deploy logs {number}"
                ) from error
            continue
        if lost is not None:
            on_loss("the SuperLink answers again")
        if run.over:
            if lost is not None or reader.broken:
                reader = reader.is_new()
            reader.take(on_line, LAST_LINES, to_the_end=True)
            return run
        if lost is not None or reader.ended:
            time.sleep(min(PAUSE, poll))
            reader, lost = reader.is_new(), None


class _Reader:
    """Reads a log in a thread, because a log that is still waits without end, also on a connection that is dead."""

    def __init__(self, link: Link, number: int, after: float = 0.0, begun: str = "") -> None:
        self.link, self.number, self.after, self.begun = link, number, after, begun
        self.ended = self.broken = False
        self._pieces: queue.Queue[tuple[str, float] | Exception | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def take(
        self, on_line: Callable[[str], None], seconds: float, to_the_end: bool = False
    ) -> None:
        """Pass on the lines that come within so many seconds, or until the log ends; `to_the_end`: the last line, too."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.ended and to_the_end:
                break
            try:
                piece = self._pieces.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(piece, FederationError):
                raise piece
            if piece is None or isinstance(piece, Exception):
                self.ended, self.broken = True, piece is not None
                break  # the run's status tells why
            text, self.after = self.begun + piece[0], max(self.after, piece[1])
            *lines, self.begun = text.split("\n")
            for line in lines:
                on_line(line)
        if to_the_end and self.begun:
            on_line(self.begun)
            self.begun = ""

    def is_new(self) -> _Reader:
        """Another reader that goes on where this one's lines ended; what this one still reads is forgotten."""
        return _Reader(self.link, self.number, self.after, self.begun)

    def _read(self) -> None:
        try:
            for piece in self.link.log(self.number, self.after):
                self._pieces.put(piece)
            self._pieces.put(None)
        except Exception as error:  # whatever a connection can end with
            self._pieces.put(error)
