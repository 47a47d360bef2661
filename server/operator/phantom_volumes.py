"""Write a scenario's phantoms into the volumes of hospitals and evaluator, for containers.

    python -m server.operator.phantom_volumes simulations/three_hospitals.toml \\
        --hospitals /hospitals --reference /reference

The shard of hospital 1, the largest, is in `/hospitals/1`, and so on: the same shards as in a
simulation of the scenario. The evaluator's shards show other patients of the same scanners. A
volume that holds a shard is left unchanged.
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

REFERENCE_SEED_OFFSET = 1_000_003  # the evaluator's phantoms have another seed
PREFIX = "reference-"
CARD = "card.json"  # written last: a folder that has it is a complete shard


def write_volumes(settings: Settings, hospitals: Path, reference: Path) -> list[Path]:
    """Write the missing shards; the folders that were written.

    Raises `ConfigError` or `DataError` for a scenario without valid phantoms, `StorageError` for a
    volume that cannot be written.
    """
    numbers = range(1, settings.federation.hospitals + 1)
    folders = [hospitals / str(number) for number in numbers]
    written: list[Path] = []
    if any(not (folder / CARD).is_file() for folder in folders):
        with _generated(settings, reference) as shards:
            written += [f for shard, f in zip(shards, folders, strict=True) if _copy(shard, f)]
    if not any(reference.glob(f"*/{CARD}")):
        with _generated(settings, reference, REFERENCE_SEED_OFFSET, PREFIX) as shards:
            pairs = [(shard, reference / shard.name) for shard in shards]
            written += [folder for shard, folder in pairs if _copy(shard, folder)]
    return written


@contextlib.contextmanager
def _generated(
    settings: Settings, volume: Path, seed_offset: int = 0, prefix: str = ""
) -> Iterator[list[Path]]:
    """The scenario's phantoms in a temporary hidden folder of `volume`, which has enough space."""
    data = settings.data
    try:
        with tempfile.TemporaryDirectory(dir=volume, prefix=".") as folder:
            yield write_phantoms(
                Path(folder) / "shards",
                data.phantoms,
                data.phantom_images,
                data.resolution,
                settings.federation.hospitals,
                settings.data_seed + seed_offset,
                prefix=prefix,
            )
    except OSError as error:
        raise files.storage_error(volume, error) from error


def _copy(shard: Path, folder: Path) -> bool:
    """Copy a shard, its card last; False where the folder has one. Replaces an incomplete copy."""
    if (folder / CARD).is_file():
        return False
    try:
        folder.mkdir(exist_ok=True)
        for path in shard.iterdir():
            if path.name != CARD:
                shutil.copyfile(path, folder / path.name)
        files.write_bytes(folder / CARD, (shard / CARD).read_bytes())
    except OSError as error:
        raise files.storage_error(folder, error) from error
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m server.operator.phantom_volumes",
        description="Write a scenario's phantoms into volumes.",
    )
    parser.add_argument("scenario", type=Path, help="scenario: kind and number of phantoms")
    parser.add_argument("--overrides", default="", help="key=value, separated by spaces or commas")
    parser.add_argument(
        "--hospitals",
        type=Path,
        required=True,
        metavar="DIR",
        help="holds one folder per hospital: 1, 2, …",
    )
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="DIR", help="for the evaluator's shards"
    )
    options = parser.parse_args(arguments)
    try:
        settings = load_scenario(options.scenario, split_overrides(options.overrides))
        written = write_volumes(settings, options.hospitals, options.reference)
    except FedganError as error:
        print(f"phantoms: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(f"wrote phantoms to {folder}" for folder in written) or "nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
