"""One training of a comparison in a process of its own (simulations/process.py).

python -m simulations.job JOB.json CORES
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from fedgan import files
from fedgan.config import from_dict, to_dict
from simulations.arms import FEDERATION, HOME, Job, Start
from simulations.process import serve


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
            "after": None if job.after is None else str(job.after),
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
        Path(found["after"]) if found.get("after") else None,
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
    """Do the job of the command line."""
    job = read_job(Path(sys.argv[1]))
    serve(lambda tell: train(job, tell), sys.argv[2])


if __name__ == "__main__":
    main()
