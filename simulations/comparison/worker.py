"""What the processes of a comparison share: events on standard output, cores of their own, an end with their parent.

`simulations.comparison.scheduler` starts such a process, reads its events (JSON lines) and ends it by closing its standard input, so
that a killed comparison leaves nothing behind. The last event is `done` or `failed`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from fedgan.errors import FedganError
from fedgan.machine import pin

OnEvent = Callable[[dict[str, Any]], None]


def serve(work: Callable[[OnEvent], None], cores: str) -> None:
    """Do `work(tell)` on the given cores (numbers with commas; all where the text is empty) and end with its exit code."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no event
    lock = threading.Lock()

    def on_event(event: dict[str, Any]) -> None:
        with lock:
            channel.write(json.dumps(event) + "\n")

    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # also where a shell that began us in the background ignores Ctrl-C
        signal.signal(number, signal.default_int_handler)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    pin({int(core) for core in cores.split(",") if core})
    try:
        work(on_event)
        on_event({"event": "done"})
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:
        traceback.print_exc()
        on_event({"event": "failed", "kind": type(error).__name__, "message": str(error)})
        sys.exit(error.exit_code if isinstance(error, FedganError) else 1)


def _end_with_the_parent() -> None:
    """Wait until our standard input is closed, then stop as Ctrl-C would: engines are ended, whole rounds stay."""
    while os.read(0, 4096):  # not through sys.stdin, whose lock would outlive this thread
        pass
    os.kill(
        os.getpid(), signal.SIGTERM
    )  # to the process: a signal to this thread would not wake the one that works
