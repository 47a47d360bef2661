"""`make bench`: every benchmark in its own process, one after the other, and one table.

python -m benchmarks [--only step|private|federation|metrics|evaluation|proxy|demo] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fedgan.machine import usable_cores

# (precision, resolution): share reached by a prototype, and the target
MARKS = {
    ("fp32", 32): (0.43, 0.50),
    ("fp32", 64): (0.36, 0.42),
    ("bf16", 32): (0.29, 0.40),
    ("bf16", 64): (0.22, 0.30),
}
METRICS_SECONDS_MARK, METRICS_MEMORY_MARK, EVALUATION_SECONDS_MARK = 20, 1500, 480
PRIVATE_STEP_MARK = 1.6  # maximum ratio to a step of D without privacy
MEMORY_MARK, EFFICIENCY_MARK, DEMO_SECONDS_MARK, DEMO_AUC_MARK = 600, 0.80, 240, 0.85


def call(module: str, *arguments: str) -> dict[str, Any]:
    """Run one benchmark module and read the JSON that it prints last."""
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return dict(json.loads(result.stdout.splitlines()[-1]))


def step_rows(results: dict[str, Any]) -> list[str]:
    rows = []
    # Hospitals of a simulation train with one thread, a single hospital with all cores. bf16 is
    # measured once: it is very slow on processors without instructions for it.
    cases = [
        (*case, threads)
        for case in MARKS
        for threads in sorted({1, usable_cores()})
        if case[0] == "fp32" or threads > 1
    ]
    for precision, resolution, threads in cases:
        mark, aim = MARKS[precision, resolution]
        found = call("step", str(resolution), precision, str(threads))
        results[f"step-{precision}-{resolution}-{threads}"] = found
        rows.append(
            f"training step {precision} {resolution}², threads {threads}: {found['fraction']:.2f} "
            f"of the best convolution rate [{found['fraction_low']:.2f}, "
            f"{found['fraction_high']:.2f}]  (mark {mark:.2f}, target {aim:.2f});  "
            f"{found['images_per_second']:.1f} images/s × {found['gflop_per_image']:.2f} GFLOP "
            f"over {found['conv_gflops']:.0f} GFLOP/s"
        )
        if (precision, resolution, threads) == ("fp32", 32, 1):
            rows.append(
                f"peak memory of that step: {found['memory_of_step_mb']:.0f} MB (mark "
                f"{MEMORY_MARK}) on top of the {found['memory_of_imports_mb']:.0f} MB that the "
                "process had after importing PyTorch"
            )
    return rows


def private_rows(results: dict[str, Any]) -> list[str]:
    rows = []
    for resolution in (32, 64):
        found = results[f"private-step-{resolution}"] = call("private_step", str(resolution))
        rows.append(
            f"private step of D {found['precision']} {resolution}², threads 1: "
            f"{found['ratio']:.2f} times a step without privacy [{found['ratio_low']:.2f}, "
            f"{found['ratio_high']:.2f}]  (mark {PRIVATE_STEP_MARK});  "
            f"{1000 * found['private_seconds']:.0f} ms over {1000 * found['plain_seconds']:.0f} "
            f"ms, batch {found['batch']};  D's gradient alone {found['gradient_ratio']:.2f} times"
        )
    return rows


def federation_rows(results: dict[str, Any]) -> list[str]:
    found = results["federation"] = call("federation", "30")
    return [
        f"federation: {found['efficiency']:.2f} of the cores' time inside Trainer.train (mark "
        f"{EFFICIENCY_MARK:.2f});  {found['images']} images in {found['rounds']} rounds, "
        f"{found['wall_seconds']:.0f} s on {found['cores']} cores"
    ]


def demo_rows(results: dict[str, Any]) -> list[str]:
    found = results["demo"] = call("demo")
    return [
        f"fedgan demo: {found['wall_seconds']:.0f} s (mark {DEMO_SECONDS_MARK});  synthetic-only "
        f"macro AUC {found['synthetic_macro_auc']:.3f} (mark {DEMO_AUC_MARK}), real "
        f"{found['real_macro_auc']:.3f}"
    ]


def metrics_rows(results: dict[str, Any]) -> list[str]:
    found = results["metrics"] = call("metrics")
    return [
        f"kernel distance, precision, recall, density, coverage at {found['images']}² × "
        f"{found['features']}: {found['seconds']:.1f} s (mark {METRICS_SECONDS_MARK}), "
        f"{found['memory_mb']:.0f} MB (mark {METRICS_MEMORY_MARK});  {found['fraction']:.2f} of "
        f"the bare float32 product ({found['product_gflops']:.0f} GFLOP/s, threads "
        f"{found['threads']})"
    ]


def evaluation_rows(results: dict[str, Any]) -> list[str]:
    found = results["evaluation"] = call("evaluation")
    rows = []
    for run in found["runs"]:
        # A comparison evaluates arms in parallel with one thread each; the mark is for all cores.
        is_whole = run["threads"] == max(run["threads"] for run in found["runs"])
        rows.append(
            f"full evaluation of an arm, {found['images']} images of 64², "
            f"threads {run['threads']}: {run['arm_seconds']:.0f} s"
            f"{f' (mark {EVALUATION_SECONDS_MARK})' if is_whole else ''}, and "
            f"{run['real_seconds']:.0f} s once for the real side;  classifier training at "
            f"{run['classifier_share']:.2f} of the rate of its bare steps, "
            f"{run['bf16_gain']:.2f} times as fast in bf16"
        )
    return rows


def proxy_rows(results: dict[str, Any]) -> list[str]:
    found = results["proxy"] = call("proxy")
    fractions = {
        way: f"{found[f'{way}_fraction']:.2f} "
        f"[{found[f'{way}_fraction_low']:.2f}, {found[f'{way}_fraction_high']:.2f}]"
        for way in ("push", "pull")
    }
    return [
        f"proxy: {fractions['push']} of a bare relay's speed up, {fractions['pull']} down;  "
        f"{found['push_mb_per_core_second']:.0f} and {found['pull_mb_per_core_second']:.0f} "
        f"MB per core second over {found['relay_mb_per_core_second']:.0f};  "
        f"{found['memory_mb']:.0f} MB of memory at most in "
        f"{found['moved_megabytes']:,} MB of traffic, {found['memory_idle_mb']:.0f} MB before"
    ]


def machine() -> dict[str, Any]:
    """The machine of the measurement."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """The processor's name, on Linux from /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


PARTS = {
    "step": step_rows,
    "private": private_rows,
    "federation": federation_rows,
    "metrics": metrics_rows,
    "evaluation": evaluation_rows,
    "proxy": proxy_rows,
    "demo": demo_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=tuple(PARTS), help="one part instead of all")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of lines"
    )
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": machine()}
    if not arguments.json:
        print(
            *(f"{key}: {value}" for key, value in results["machine"].items()), sep="  ", flush=True
        )
    for name, rows in PARTS.items():
        if arguments.only in (None, name):
            for row in rows(results):
                if not arguments.json:
                    print(row, flush=True)
    if arguments.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
