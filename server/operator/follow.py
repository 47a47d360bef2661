"""Follow a run on a SuperLink line by line to its end, across restarts and broken connections."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import httpx

from fedgan.errors import FederationError
from server.operator.superlink import Run

POLL = 15.0  # seconds between two polls of the run's status while its log is open
PAUSE = 1.0  # seconds before a log is requested again
TIMEOUT = 300.0  # seconds without a reply of the SuperLink
LAST_LINES = 15.0  # seconds for the rest of the log when the run is over


class Link(Protocol):
    """The part of `SuperLink` that `follow` needs."""

    def run(self, number: int) -> Run:
        """The run's status; `httpx.RequestError` where the SuperLink does not reply."""

    def log(self, number: int, after: float) -> Iterator[tuple[str, float]]:
        """Pieces of the run's log after a timestamp, each with its own."""


def follow(
    link: Link,
    number: int,
    on_line: Callable[[str], None],
    on_loss: Callable[[str], None] = lambda text: None,
    timeout: float = TIMEOUT,
    poll: float = POLL,
) -> Run:
    """Pass each line of a run's log to `on_line`, once and in order, until the run is over.

    Returns the finished run. The log may break off at any moment; the run's status decides whether
    it is over. `on_loss` gets a text when the SuperLink stops replying and when it is back. Raises
    `FederationError` where it does not reply for `timeout` seconds, or has no such run.
    """
    reader, lost_since = _Reader(link, number), None
    while True:
        reader.read_lines(on_line, poll)
        try:
            run = link.run(number)
        except httpx.RequestError as error:
            if lost_since is None:
                lost_since = time.monotonic()
                on_loss(
                    f"no reply from the SuperLink ({error}): run {number} may continue, retrying "
                    f"for {timeout:.0f} s"
                )
            elif time.monotonic() - lost_since > timeout:
                raise FederationError(
                    f"the SuperLink has not replied for {timeout:.0f} s, and the state of run "
                    f"{number} is unknown: see fedgan deploy status, then fedgan deploy logs "
                    f"{number}"
                ) from error
            continue
        if lost_since is not None:
            on_loss("the SuperLink replies again")
        if run.is_over:
            if lost_since is not None or reader.is_broken:
                reader = reader.restart()
            reader.read_lines(on_line, LAST_LINES, to_the_end=True)
            return run
        if lost_since is not None or reader.has_ended:
            time.sleep(min(PAUSE, poll))
            reader, lost_since = reader.restart(), None


class _Reader:
    """Reads a log in a thread: a silent log blocks without end, also on a dead connection."""

    def __init__(self, link: Link, number: int, after: float = 0.0, partial: str = "") -> None:
        self.link, self.number, self.after = link, number, after
        self.partial = partial  # the last line until its end
        self.has_ended = self.is_broken = False
        self._pieces: queue.Queue[tuple[str, float] | Exception | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def read_lines(
        self, on_line: Callable[[str], None], seconds: float, to_the_end: bool = False
    ) -> None:
        """Pass on the lines of so many seconds, or until the log ends.

        `to_the_end`: an unfinished last line as well.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self.has_ended and to_the_end:
                break
            try:
                piece = self._pieces.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(piece, FederationError):
                raise piece
            if piece is None or isinstance(piece, Exception):
                self.has_ended, self.is_broken = True, piece is not None
                break  # the run's status gives the reason
            text, self.after = self.partial + piece[0], max(self.after, piece[1])
            *lines, self.partial = text.split("\n")
            for line in lines:
                on_line(line)
        if to_the_end and self.partial:
            on_line(self.partial)
            self.partial = ""

    def restart(self) -> _Reader:
        """A new reader that continues after this one's lines."""
        return _Reader(self.link, self.number, self.after, self.partial)

    def _read(self) -> None:
        try:
            for piece in self.link.log(self.number, self.after):
                self._pieces.put(piece)
            self._pieces.put(None)
        except Exception as error:  # a connection can end with any error
            self._pieces.put(error)
