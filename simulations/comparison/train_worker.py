"""One training of a comparison in a process of its own (simulations/comparison/worker.py).

python -m simulations.comparison.train_worker JOB.json CORES
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from fedgan import files
from fedgan.config import from_dict, to_dict
from simulations.comparison.plan import FEDERATION, STANDALONE, Job, Start
from simulations.comparison.worker import serve


def write_job(job: Job, path: Path) -> None:
    """Write what a job's process reads."""
    start = (
        None
        if job.start is None
        else dataclasses.asdict(job.start) | {"folder": str(job.start.folder)}
    )
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
    start = found["start"] and Start(
        Path(found["start"]["folder"]), found["start"]["round"], found["start"]["images_seen"]
    )
    return Job(
        Path(found["folder"]),
        found["kind"],
        from_dict(found["settings"], source=str(path)),
        tuple(found["images"]),
        start or None,
        Path(found["after"]) if found.get("after") else None,
    )


def train(job: Job, on_event: Any) -> None:
    """Do what is left of a job."""
    if job.kind == STANDALONE:
        from simulations.comparison.standalone import train_standalone

        train_standalone(job, on_event)
        return
    assert job.kind == FEDERATION
    from simulations.runner import resume, simulate

    if job.run.config.is_file():
        resume(job.run, on_event, judged=False)
    else:
        simulate(job.settings, job.run, on_event, judged=False)


def main() -> None:
    """Do the job of the command line."""
    job = read_job(Path(sys.argv[1]))
    serve(lambda on_event: train(job, on_event), sys.argv[2])


if __name__ == "__main__":
    main()
