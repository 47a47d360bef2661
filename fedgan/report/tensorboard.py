"""A run's rounds as TensorBoard scalars, for those who watch all their trainings there.

metrics.jsonl stays the record; this copies its numbers and measures nothing. TensorBoard is an optional extra.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedgan import files
from fedgan.errors import ConfigError, MachineError
from fedgan.run_folder import RunFolder

FEDERATION = "federation"
TOTALS = ("images_seen", "wall_seconds", "bytes_exchanged")  # cumulative over the run


def write_tensorboard(run: RunFolder, folder: Path) -> int:
    """Write event files into `folder`; the number of rounds. The step is the round.

    `federation/` holds the run's totals, the bytes of each round (`round/bytes`), means over hospitals and the evaluator's
    distances; `1-NAME/`, `2-NAME/` … the same means of one hospital under the same tags, so that a chart shows all.

    Raises `MachineError` where TensorBoard is not installed, `ConfigError` where the run has no round yet.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MachineError(
            "TensorBoard is not installed: pip install 'fedgan[tracking]' (in the repository: pip install -e '.[tracking]')"
        ) from None
    lines = files.read_json_lines(run.metrics)
    if not lines:
        raise ConfigError(
            f"{run.metrics} tells of no round yet: there is nothing to show in TensorBoard"
        )
    writers: dict[str, Any] = {}
    try:
        for place, tag, value, step in scalars(lines):
            if place not in writers:
                writers[place] = SummaryWriter(str(folder / place))
            writers[place].add_scalar(tag, value, step)
    except OSError as error:
        raise files.storage_error(folder, error) from None
    finally:
        for writer in writers.values():
            writer.close()
    return len(lines)


def scalars(lines: list[dict[str, Any]]) -> Iterator[tuple[str, str, float, int]]:
    """(folder, tag, value, round) of every number in the lines of metrics.jsonl."""
    places: dict[str, str] = {}
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
            # A name is what a hospital called itself: a number keeps two apart, and nothing but words becomes a folder.
            place = places.setdefault(
                row["name"], f"{len(places) + 1}-{re.sub(r'[^A-Za-z0-9_-]+', '_', row['name'])}"
            )
            yield from _numbers(place, "training", row, step)


def _numbers(
    place: str, group: str, values: Mapping[str, Any], step: int
) -> Iterator[tuple[str, str, float, int]]:
    for key, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield place, f"{group}/{key}", float(value), step
