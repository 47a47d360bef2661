"""One piece of a comparison's judgement in a process of its own (simulations/comparison/worker.py).

python -m simulations.comparison.evaluate_worker FOLDER reference:NUMBER CORES      train a classifier on real images
python -m simulations.comparison.evaluate_worker FOLDER arm:FOLDER_OF_THE_ARM CORES
"""

from __future__ import annotations

import sys

import torch

from fedgan.comparison_folder import ComparisonFolder
from simulations.comparison.evaluate import evaluate_arm, open_evaluation_context, write_real_grid
from simulations.comparison.plan import plan_of
from simulations.comparison.worker import OnEvent, serve


def evaluator(folder: ComparisonFolder, what: str, on_event: OnEvent) -> None:
    """Do one piece."""
    torch.set_num_threads(
        1
    )  # as every classifier of a comparison is trained: rounding depends on it
    kind, _, which = what.partition(":")
    share = 0.0

    def step(done: float, text: str) -> None:
        nonlocal share
        share = done
        on_event({"event": "step", "share": done, "text": text})

    context = open_evaluation_context(
        folder, lambda text: on_event({"event": "step", "share": share, "text": text})
    )
    if kind == "reference":
        if context.reference.has_classes:
            context.reference.classifier(int(which))
        write_real_grid(context)
        return
    arm = next(arm for arm in plan_of(context.settings, folder) if arm.folder.name == which)
    evaluate_arm(context, arm, step)


def main() -> None:
    """Do the piece of the command line."""
    folder, what = ComparisonFolder.at(sys.argv[1]), sys.argv[2]
    serve(lambda on_event: evaluator(folder, what, on_event), sys.argv[3])


if __name__ == "__main__":
    main()
