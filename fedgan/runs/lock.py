"""An exclusive lock on a run folder, for `fedgan` and `flwr run .` alike."""

from __future__ import annotations

import contextlib

from fedgan import files
from fedgan.run_folder import RunFolder

TIMEOUT = 10.0  # seconds: the engine of a killed run needs a moment to end


def locked(run: RunFolder) -> contextlib.AbstractContextManager[int]:
    """Lock the run folder. Raises `ConfigError` when another process holds the lock.

    The engine inherits the lock, so it ends with the last of the two processes, however they end.
    Yields its file descriptor.
    """
    return files.locked(run.path, TIMEOUT)


def remove_temporary_files(run: RunFolder) -> None:
    """Remove temporary files that a killed process left in the run folder."""
    for path in run.path.rglob(".*.part"):
        path.unlink(missing_ok=True)
