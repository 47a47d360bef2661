"""One job of a comparison in a process of its own, on cores of its own.

`simulations.schedule` starts it, reads its events (JSON lines) from its standard output and ends it by closing its
standard input, so that a killed comparison leaves no training behind.

    python -m simulations.job JOB.json CORES        CORES: numbers with commas, or "" for all
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from fedgan import files
from fedgan.config import from_dict, to_dict
from fedgan.errors import FedganError
from fedgan.machine import pin
from simulations.arms import FEDERATION, HOME, Job, Start


def write_job(job: Job, path: Path) -> None:
    """Write what a job's process reads."""
    start = None if job.start is None else dataclasses.asdict(job.start) | {"folder": str(job.start.folder)}
    files.write_json(
        path,
        {
            "folder": str(job.folder),
            "kind": job.kind,
            "settings": to_dict(job.settings),
            "images": list(job.images),
            "start": start,
        },
    )


def read_job(path: Path) -> Job:
    """Read what `write_job` wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    start = found["start"] and Start(Path(found["start"]["folder"]), found["start"]["round"], found["start"]["images_seen"])
    return Job(
        Path(found["folder"]),
        found["kind"],
        from_dict(found["settings"], source=str(path)),
        tuple(found["images"]),
        start or None,
    )


def train(job: Job, tell: Any) -> None:
    """Do what is left of a job."""
    if job.kind == HOME:
        from simulations.home import train_at_home

        train_at_home(job, tell)
        return
    assert job.kind == FEDERATION
    from simulations.runner import resume, simulate

    if job.run.config.is_file():
        resume(job.run, tell, judged=False)
    else:
        simulate(job.settings, job.run, tell, judged=False)


def main() -> None:
    """Do the job; the last event is `done` or `failed`."""
    job, cores = read_job(Path(sys.argv[1])), sys.argv[2]
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no event
    lock = threading.Lock()

    def tell(event: dict[str, Any]) -> None:
        with lock:
            channel.write(json.dumps(event) + "\n")

    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    threading.Thread(target=_end_with_the_schedule, daemon=True).start()
    pin({int(core) for core in cores.split(",") if core})
    try:
        train(job, tell)
        tell({"event": "done"})
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:
        traceback.print_exc()
        tell({"event": "failed", "kind": type(error).__name__, "message": str(error)})
        sys.exit(error.exit_code if isinstance(error, FedganError) else 1)


def _end_with_the_schedule() -> None:
    """Wait until our standard input is closed, then stop as Ctrl-C would: engines are ended, whole rounds stay."""
    while os.read(0, 4096):  # not through sys.stdin, whose lock would outlive this thread
        pass
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    main()
