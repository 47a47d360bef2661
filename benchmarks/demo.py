"""Wall time of `fedgan demo`, and the AUC of its classifiers.

python -m benchmarks.demo
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def measure() -> dict[str, Any]:
    """Run the command in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "demo"
        begun = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "fedgan.cli", "demo", "--output", str(run)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - begun
        utility = json.loads((run / "evaluation.json").read_text())["utility"]
    return {
        "wall_seconds": seconds,
        "synthetic_macro_auc": utility["synthetic"]["macro_auc"],
        "real_macro_auc": utility["real"]["macro_auc"],
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
