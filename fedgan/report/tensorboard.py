"""Export the rounds of a run as TensorBoard scalars (optional extra `tracking`).

It copies the numbers of metrics.jsonl and measures nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedgan import files
from fedgan.errors import ConfigError, MachineError
from fedgan.run_folder import RunFolder, read_lines

FEDERATION = "federation"
TOTALS = ("images_seen", "wall_seconds", "bytes_exchanged")  # cumulative over the run


def write_tensorboard(run: RunFolder, folder: Path) -> int:
    """Write event files into `folder` and return the number of rounds. The step is the round.

    `federation/` holds the run's totals, the bytes per round (`round/bytes`), means over hospitals
    and the evaluator's distances. `1-NAME/`, `2-NAME/` … hold the values of each hospital under the
    same tags, so that one chart shows all.

    Raises `MachineError` if TensorBoard is not installed, `ConfigError` if no round is recorded.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MachineError(
            "TensorBoard is not installed: pip install 'fedgan[tracking]' "
            "(in the repository: pip install -e '.[tracking]')"
        ) from None
    lines = read_lines(run)
    if not lines:
        raise ConfigError(f"{run.metrics} has no round yet: there is nothing to export")
    writers: dict[str, Any] = {}
    try:
        for subfolder, tag, value, step in scalars(lines):
            if subfolder not in writers:
                writers[subfolder] = SummaryWriter(str(folder / subfolder))
            writers[subfolder].add_scalar(tag, value, step)
    except OSError as error:
        raise files.storage_error(folder, error) from None
    finally:
        for writer in writers.values():
            writer.close()
    return len(lines)


def scalars(lines: list[dict[str, Any]]) -> Iterator[tuple[str, str, float, int]]:
    """(subfolder, tag, value, round) of every number in the lines of metrics.jsonl."""
    subfolders: dict[str, str] = {}
    before = 0.0
    for line in lines:
        step = int(line["round"])
        for key in TOTALS:
            yield from _numbers(FEDERATION, "total", {key: line.get(key)}, step)
        if isinstance(line.get("bytes_exchanged"), int | float):
            yield FEDERATION, "round/bytes", line["bytes_exchanged"] - before, step
            before = line["bytes_exchanged"]
        yield from _numbers(FEDERATION, "training", line.get("mean") or {}, step)
        yield from _numbers(FEDERATION, "fidelity", line.get("fidelity") or {}, step)
        for row in line.get("hospitals", []):
            # Hospitals choose their names: a number keeps them unique, the pattern keeps them safe.
            safe_name = re.sub(r"[^A-Za-z0-9_-]+", "_", row["name"])
            subfolder = subfolders.setdefault(row["name"], f"{len(subfolders) + 1}-{safe_name}")
            yield from _numbers(subfolder, "training", row, step)


def _numbers(
    subfolder: str, group: str, values: Mapping[str, Any], step: int
) -> Iterator[tuple[str, str, float, int]]:
    for key, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield subfolder, f"{group}/{key}", float(value), step
