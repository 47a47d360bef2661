"""An upper bound for tests that wait for another process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def watchdog(process: subprocess.Popen[str], seconds: float = 180) -> Iterator[None]:
    """Fail, and kill the process group that `process` leads (`start_new_session`), when the block takes longer."""
    late = threading.Event()

    def end() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        assert not late.is_set(), f"the process was still at work after {seconds:g} s"
