"""Efficiency of a simulated federation: core seconds in Trainer.train over available core seconds.

    python -m benchmarks.federation KIMG

The denominator is the wall time from the first round to the end of the last one (sample grids and
Fréchet distances included) times the cores that hospitals may use.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fedgan.config import load_scenario
from fedgan.files import read_json_lines
from fedgan.machine import share_cores
from fedgan.run_folder import RunFolder
from simulations.runner import simulate

SCENARIO = Path(__file__).resolve().parent.parent / "simulations" / "three_hospitals.toml"


def measure(kimg: float) -> dict[str, Any]:
    """Run the shipped scenario with `kimg` thousand images and sum up."""
    marks: dict[str, float] = {}

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            marks["start"] = time.perf_counter()
        elif event["event"] == "round_end":
            marks["end"] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        settings = load_scenario(SCENARIO, [f"training.kimg={kimg}"])
        run = simulate(settings, RunFolder.at(Path(folder) / "run"), watch)
        rounds = read_json_lines(run.metrics)
    inside = sum(
        hospital["seconds"] * hospital["threads"]
        for line in rounds
        for hospital in line["hospitals"]
    )
    wall = marks["end"] - marks["start"]
    threads, at_once = share_cores(settings.federation.threads, settings.federation.hospitals)
    used = threads * at_once
    images = rounds[-1]["images_seen"]
    return {
        "images": images,
        "rounds": len(rounds),
        "cores": used,
        "wall_seconds": wall,
        "core_seconds_in_training": inside,
        "efficiency": inside / (wall * used),
        "images_per_second": images / wall,
    }


if __name__ == "__main__":
    print(json.dumps(measure(float(sys.argv[1]) if len(sys.argv) > 1 else 30.0)))
