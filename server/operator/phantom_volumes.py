"""Draws a scenario's phantoms into the volumes of hospitals and evaluator, so that a federation of containers needs no data.

    python -m server.operator.phantom_volumes simulations/three_hospitals.toml --hospitals /hospitals --reference /reference

Hospital 1, the largest, finds its shard in `/hospitals/1`, and so on: the very shards that a simulation of the scenario draws.
The evaluator's are drawn by the same scanners of other patients. A volume that holds a shard is left as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedgan import files
from fedgan.config import Settings, load_scenario
from fedgan.data.phantoms import write_phantoms
from fedgan.errors import FedganError
from server.app import split_overrides

OTHER_PATIENTS = 1_000_003  # what is added to the seed for the evaluator's phantoms
PREFIX = "reference-"
CARD = "card.json"  # written last: a folder that has it is a whole shard


def fill(settings: Settings, hospitals: Path, reference: Path) -> list[Path]:
    """Draw what is missing; the folders that were filled.

    Raises `ConfigError` or `DataError` for a scenario that no phantoms can be drawn for, `StorageError` for a volume that
    cannot be written.
    """
    data, count = settings.data, settings.federation.hospitals
    places = [hospitals / str(number) for number in range(1, count + 1)]
    filled: list[Path] = []
    if any(not (place / CARD).is_file() for place in places):
        with _stage(reference) as stage:
            shards = write_phantoms(
                stage / "shards",
                data.phantoms,
                data.phantom_images,
                data.resolution,
                count,
                settings.data_seed,
            )
            filled += [
                place for shard, place in zip(shards, places, strict=True) if _put(shard, place)
            ]
    if not any(reference.glob(f"*/{CARD}")):
        with _stage(reference) as stage:
            seed = settings.data_seed + OTHER_PATIENTS
            shards = write_phantoms(
                stage / "shards",
                data.phantoms,
                data.phantom_images,
                data.resolution,
                count,
                seed,
                prefix=PREFIX,
            )
            filled += [
                reference / shard.name for shard in shards if _put(shard, reference / shard.name)
            ]
    return filled


@contextlib.contextmanager
def _stage(volume: Path) -> Iterator[Path]:
    """A hidden folder on a disk that has room, for as long as it takes."""
    try:
        with tempfile.TemporaryDirectory(dir=volume, prefix=".") as stage:
            yield Path(stage)
    except OSError as error:
        raise files.storage_error(volume, error) from error


def _put(shard: Path, place: Path) -> bool:
    """Copy a shard into a folder, its card last; False where one is there. What a copy that was cut short left is replaced."""
    if (place / CARD).is_file():
        return False
    try:
        place.mkdir(exist_ok=True)
        for path in shard.iterdir():
            if path.name != CARD:
                shutil.copyfile(path, place / path.name)
        files.write_bytes(place / CARD, (shard / CARD).read_bytes())
    except OSError as error:
        raise files.storage_error(place, error) from error
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m server.operator.phantom_volumes",
        description="Draw a scenario's phantoms into volumes.",
    )
    parser.add_argument(
        "scenario",
        type=Path,
        help="a scenario: what kind of phantoms, how many, for how many hospitals",
    )
    parser.add_argument("--overrides", default="", help="key=value, separated by spaces or commas")
    parser.add_argument(
        "--hospitals",
        type=Path,
        required=True,
        metavar="DIR",
        help="holds a folder 1, 2, … a hospital",
    )
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="DIR", help="for the evaluator's shards"
    )
    options = parser.parse_args(arguments)
    try:
        filled = fill(
            load_scenario(options.scenario, split_overrides(options.overrides)),
            options.hospitals,
            options.reference,
        )
    except FedganError as error:
        print(f"shards: {error}", file=sys.stderr)
        return error.exit_code
    print(
        "\n".join(f"drew phantoms into {place}" for place in filled)
        or "every volume holds its shard"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
