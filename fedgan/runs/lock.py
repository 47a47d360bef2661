"""An exclusive lock on a run folder, for `fedgan` and `flwr run .` alike."""

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
TIMEOUT = 10.0  # seconds: the engine of a killed run needs a moment to end


@contextlib.contextmanager
def locked(run: RunFolder) -> Iterator[int]:
    """Lock the run folder. Raises `ConfigError` when another process holds the lock.

    The lock is the system's (flock). The engine inherits it, so it ends with the last of the two
    processes, however they end. Yields its file descriptor.
    """
    path = run.path / LOCK
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path)
    except OSError as error:
        raise files.storage_error(run.path, error) from error
    if handle is None:
        raise ConfigError(f"{run.path} is in use by another fedgan: wait for its end, or stop it")
    try:
        yield handle
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            run.path.rmdir()  # succeeds only where nothing was written
        os.close(handle)


def _acquire(path: Path) -> int | None:
    """An open file that holds the lock; None after the timeout."""
    end = time.monotonic() + TIMEOUT
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # not a file that its holder has just removed
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)
        if time.monotonic() > end:
            return None
        time.sleep(0.1)


def remove_temporary_files(run: RunFolder) -> None:
    """Remove temporary files that a killed process left in the run folder."""
    for path in run.path.rglob(".*.part"):
        path.unlink(missing_ok=True)
