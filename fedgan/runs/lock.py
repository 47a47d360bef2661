"""One process at a time in a run folder, whoever started it: `fedgan`, or `flwr run .`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from fedgan import files
from fedgan.errors import ConfigError
from fedgan.run_folder import RunFolder

LOCK = ".lock"
PATIENCE = 10.0


@contextlib.contextmanager
def locked(run: RunFolder) -> Iterator[int]:
    """Hold the run folder for this process and its engine. Raises `ConfigError` when another process holds it.

    The lock is the system's (flock) and passed on to the engine: it ends with the last of the two, however they end.
    Yields the file descriptor that holds it.
    """
    place = run.path / LOCK
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        handle = _take(place)
    except OSError as error:
        raise files.storage_error(run.path, error) from error
    if handle is None:
        raise ConfigError(f"{run.path} is in use by another fedgan: wait for its end, or stop it")
    try:
        yield handle
    finally:
        place.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            run.path.rmdir()  # only where nothing was written
        os.close(handle)


def _take(place: Path) -> int | None:
    """An open file that holds the lock, or None when others keep it. The engine of a killed run needs a moment to end."""
    end = time.monotonic() + PATIENCE
    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(
                os.fstat(handle), os.stat(place)
            ):  # not a file that its holder has just removed
                return handle
        os.close(handle)
        if time.monotonic() > end:
            return None
        time.sleep(0.1)


def sweep(run: RunFolder) -> None:
    """Remove temporary files that a killed process left in the run folder."""
    for path in run.path.rglob(".*.part"):
        path.unlink(missing_ok=True)
