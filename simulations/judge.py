"""One piece of a comparison's judgement in a process of its own (simulations/process.py).

python -m simulations.judge FOLDER reference:NUMBER CORES      train a classifier on real images
python -m simulations.judge FOLDER arm:FOLDER_OF_THE_ARM CORES
"""

from __future__ import annotations

import sys

import torch

from fedgan.comparison_folder import ComparisonFolder
from simulations.arms import plan_of
from simulations.judging import judge_arm, open_bench, write_real_grid
from simulations.process import Tell, serve


def judge(folder: ComparisonFolder, what: str, tell: Tell) -> None:
    """Do one piece."""
    torch.set_num_threads(1)  # as every classifier of a comparison is trained: rounding depends on it
    kind, _, which = what.partition(":")
    share = 0.0

    def step(done: float, text: str) -> None:
        nonlocal share
        share = done
        tell({"event": "step", "share": done, "text": text})

    bench = open_bench(folder, lambda text: tell({"event": "step", "share": share, "text": text}))
    if kind == "reference":
        if bench.reference.has_classes:
            bench.reference.classifier(int(which))
        write_real_grid(bench)
        return
    arm = next(arm for arm in plan_of(bench.settings, folder) if arm.folder.name == which)
    judge_arm(bench, arm, step)


def main() -> None:
    """Do the piece of the command line."""
    folder, what = ComparisonFolder.at(sys.argv[1]), sys.argv[2]
    serve(lambda tell: judge(folder, what, tell), sys.argv[3])


if __name__ == "__main__":
    main()
