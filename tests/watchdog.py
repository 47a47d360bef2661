"""Time limit for tests that wait for another process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def watchdog(process: subprocess.Popen[str], seconds: float = 180) -> Iterator[None]:
    """Kill the process group of `process` (`start_new_session`) and fail after `seconds`."""
    is_late = threading.Event()

    def end() -> None:
        is_late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        assert not is_late.is_set(), f"the process was still running after {seconds:g} s"
