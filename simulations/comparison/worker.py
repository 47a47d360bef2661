"""Worker process of a comparison: one training, or one part of the evaluation.

    python -m simulations.comparison.worker train JOB.json CORES
    python -m simulations.comparison.worker evaluate FOLDER reference:NUMBER CORES
    python -m simulations.comparison.worker evaluate FOLDER arm:ARM_FOLDER CORES

`simulations.comparison.scheduler` starts it, reads its events (JSON lines on standard output) and
stops it by closing its standard input, so that a killed comparison leaves no process behind. The
last event is `done` or `failed`. What a worker needs is imported in its function: a training
needs no classifier, an evaluation no Flower.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgan.errors import FedganError
from fedgan.machine import pin

if TYPE_CHECKING:
    from simulations.comparison.arm import Job

OnEvent = Callable[[dict[str, Any]], None]


def train(job: Job, on_event: OnEvent) -> None:
    """Do the remaining rounds of a job."""
    from simulations.comparison.arm import STANDALONE

    if job.kind == STANDALONE:
        from simulations.comparison.standalone import train_standalone

        train_standalone(job, on_event)
        return
    from simulations.runner import resume, simulate

    if job.run.config.is_file():
        resume(job.run, on_event, evaluate=False)
    else:
        simulate(job.settings, job.run, on_event, evaluate=False)


def evaluate(folder: Path, part: str, on_event: OnEvent) -> None:
    """Train a classifier on real images (`reference:NUMBER`), or evaluate an arm (`arm:NAME`)."""
    import torch

    from fedgan.comparison_folder import ComparisonFolder
    from simulations.comparison.evaluate import (
        evaluate_arm,
        open_evaluation_context,
        write_real_grid,
    )
    from simulations.comparison.plan import plan_of

    torch.set_num_threads(1)  # for every classifier of a comparison: rounding depends on it
    kind, _, name = part.partition(":")
    share = 0.0

    def on_step(done: float, text: str) -> None:
        nonlocal share
        share = done
        on_event({"event": "step", "share": done, "text": text})

    context = open_evaluation_context(
        ComparisonFolder.at(folder),
        lambda text: on_event({"event": "step", "share": share, "text": text}),
    )
    if kind == "reference":
        if context.reference.has_classes:
            context.reference.classifier(int(name))
        write_real_grid(context)
        return
    arms = plan_of(context.settings, context.folder)
    evaluate_arm(context, next(arm for arm in arms if arm.folder.name == name), on_step)


def run_worker(work: Callable[[OnEvent], None], cores: str) -> None:
    """Do `work(on_event)` on the given cores ("0,1"; empty: all) and exit with its exit code."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no event
    lock = threading.Lock()

    def on_event(event: dict[str, Any]) -> None:
        with lock:
            channel.write(json.dumps(event) + "\n")

    # set explicitly: a shell that starts a job in the background makes it ignore Ctrl-C
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
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


def _stop_with_parent() -> None:
    """Wait until standard input closes, then stop as on Ctrl-C: engines end, whole rounds stay."""
    while os.read(0, 4096):  # not through sys.stdin, whose lock would outlive this thread
        pass
    # to the process: a signal to this thread would not wake the main thread
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Do the work of the command line."""
    match sys.argv[1:]:
        case ["train", path, cores]:
            from simulations.comparison.arm import read_job

            job = read_job(Path(path))
            run_worker(lambda on_event: train(job, on_event), cores)
        case ["evaluate", folder, part, cores]:
            run_worker(lambda on_event: evaluate(Path(folder), part, on_event), cores)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
