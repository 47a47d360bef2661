"""`fedgan data import`: images from an .npz pack, class folders or a CSV manifest, as shards."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgan.cli import console

if TYPE_CHECKING:
    from fedgan.data.importers import Source
    from fedgan.data.shard import Shard

app = typer.Typer(
    help="Import images, one shard per institution.",
    epilog="Example: fedgan data import npz chest.npz --output data/chest",
    rich_markup_mode=None,
    no_args_is_help=True,
)


class Channels(StrEnum):
    """Colour of the imported images."""

    AUTO = "auto"
    GREY = "grey"
    RGB = "rgb"


class Duplicates(StrEnum):
    """Treatment of images that repeat an earlier image."""

    AUTO = "auto"
    SKIP = "skip"
    KEEP = "keep"


Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="Folder to write; must be absent or empty."),
]
Name = Annotated[
    str,
    typer.Option(
        "--name",
        help="Institution, if the source has no such column. [default: the source's name]",
    ),
]
Resolution = Annotated[
    int,
    typer.Option(
        "--resolution", "-r", min=0, help="Side in pixels, a power of two; 0: as in the source."
    ),
]
Colour = Annotated[Channels, typer.Option("--channels", help="auto: as in the source.")]
Crop = Annotated[
    bool,
    typer.Option("--crop", help="Crop to the central square; without it the aspect ratio changes."),
]
Map = Annotated[
    str,
    typer.Option(
        "--label-map", metavar="RULES", help="Merge labels, e.g. 'normal=normal,*=abnormal'."
    ),
]
Repeated = Annotated[
    Duplicates,
    typer.Option(
        "--duplicates",
        help="Images that repeat an earlier image; auto: skip, but keep in an .npz.",
    ),
]
Val = Annotated[
    float,
    typer.Option(
        "--val",
        help="Share of the training patients for validation, if the source has no val split.",
    ),
]
Test = Annotated[
    float,
    typer.Option("--test", help="Share of the patients for the test, if the source has no splits."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the splits.")]
Outside = Annotated[
    bool, typer.Option("--outside", help="Follow paths and links out of the source's folder.")
]
Licence = Annotated[str, typer.Option("--licence", help="Licence of the images, for the card.")]


@app.command(
    "npz",
    epilog="Example: fedgan data import npz chest.npz --output data/chest\n\n"
    "Example: fedgan data import npz chest.npz --label-map 'normal=normal,*=abnormal' "
    "--output data/binary\n\n"
    "Example: fedgan data import npz dermamnist.npz --resolution 32 --output data/derma",
)
def import_npz(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="An .npz pack; a .json beside it may name its label codes."
        ),
    ],
    output: Output,
    name: Name = "",
    resolution: Resolution = 0,
    channels: Colour = Channels.AUTO,
    crop: Crop = False,
    label_map: Map = "",
    duplicates: Repeated = Duplicates.AUTO,
    val: Val = 0.1,
    test: Test = 0.2,
    seed: Seed = 0,
    licence: Licence = "",
    as_json: console.Json = False,
) -> None:
    """Import an .npz pack, in the layout of MedMNIST or of fedgan.

    fedgan's layout has the arrays images, label, institution, split, patient and name.
    """
    from fedgan.data.importers import ImportOptions, read_npz

    console.refuse_existing(output, "the shards")
    options = ImportOptions(
        resolution, channels, crop, label_map, duplicates, val, test, seed, licence
    )
    _import(read_npz(source, name), output, options, as_json)


@app.command(
    "folder",
    epilog="Example: fedgan data import folder photos --resolution 64 --output data/photos\n\n"
    "Example: fedgan data import folder xrays --patient '(person[0-9]+)_' --channels grey "
    "--resolution 64 --output data/xrays",
)
def import_folder(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="FOLDER/class/*.png|jpg, or FOLDER/train/class/*.png|jpg."
        ),
    ],
    output: Output,
    patient: Annotated[
        str,
        typer.Option(
            "--patient",
            metavar="REGEX",
            help="Regular expression for the patient in a file name, with one group.",
        ),
    ] = "",
    name: Name = "",
    resolution: Resolution = 0,
    channels: Colour = Channels.AUTO,
    crop: Crop = False,
    label_map: Map = "",
    duplicates: Repeated = Duplicates.AUTO,
    val: Val = 0.1,
    test: Test = 0.2,
    seed: Seed = 0,
    licence: Licence = "",
    outside: Outside = False,
    as_json: console.Json = False,
) -> None:
    """Import class folders: one sub-folder per class, or per split with the classes inside."""
    from fedgan.data.importers import ImportOptions, read_folder

    console.refuse_existing(output, "the shards")
    options = ImportOptions(
        resolution, channels, crop, label_map, duplicates, val, test, seed, licence
    )
    _import(read_folder(source, name, patient, outside), output, options, as_json)


@app.command(
    "csv",
    epilog="Example: fedgan data import csv images.csv --resolution 64 --output data/skin\n\n"
    "Example: fedgan data import csv findings.csv --label-column effusion --label-column nodule "
    "--patient-column subject --resolution 128 --output data/chest",
)
def import_csv(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="A CSV with a header and one row per image.")
    ],
    output: Output,
    root: Annotated[
        Path | None,
        typer.Option(
            "--root",
            metavar="DIR",
            help="Folder that the paths are relative to. [default: the CSV's folder]",
        ),
    ] = None,
    path_column: Annotated[
        str, typer.Option("--path-column", help="Column with the image's path.")
    ] = "path",
    label_column: Annotated[
        list[str] | None,
        typer.Option(
            "--label-column",
            help="A column of class names, or several columns of 0 and 1. [default: label]",
        ),
    ] = None,
    patient_column: Annotated[
        str,
        typer.Option(
            "--patient-column", help="Column with the patient. [default: patient, if present]"
        ),
    ] = "",
    institution_column: Annotated[
        str,
        typer.Option(
            "--institution-column",
            help="Column with the institution. [default: institution, if present]",
        ),
    ] = "",
    split_column: Annotated[
        str,
        typer.Option("--split-column", help="Column with the split. [default: split, if present]"),
    ] = "",
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="Import no labels.")
    ] = False,
    name: Name = "",
    resolution: Resolution = 0,
    channels: Colour = Channels.AUTO,
    crop: Crop = False,
    label_map: Map = "",
    duplicates: Repeated = Duplicates.AUTO,
    val: Val = 0.1,
    test: Test = 0.2,
    seed: Seed = 0,
    licence: Licence = "",
    outside: Outside = False,
    as_json: console.Json = False,
) -> None:
    """Import a CSV manifest: paths of images with labels, patient, institution and split."""
    from fedgan.data.importers import Columns, ImportOptions, read_manifest

    console.refuse_existing(output, "the shards")
    labels = () if unconditional else tuple(label_column or ["label"])
    columns = Columns(path_column, labels, patient_column, institution_column, split_column)
    options = ImportOptions(
        resolution, channels, crop, label_map, duplicates, val, test, seed, licence
    )
    _import(read_manifest(source, columns, root, name, outside), output, options, as_json)


# --- shared ---


def _import(source: Source, output: Path, options: Any, as_json: bool) -> None:
    from fedgan.data.importers import import_source

    with _progress(f"importing {source.title}") as on_image:
        shards = import_source(source, output, options, on_image)
    print_shards(output, shards, as_json)


def print_shards(output: Path, shards: Sequence[Shard], as_json: bool) -> None:
    """Print written shards with skipped files and notes, and the next commands."""
    lines = []
    for shard in shards:
        images = ", ".join(f"{count:,} {split}" for split, count in shard.card.images.items())
        lines.append(f"wrote {console.shown(shard.path)}: {len(shard):,} images ({images})")
        lines += [
            f"  skipped: {reason} ({count:,})" for reason, count in shard.card.skipped.items()
        ]
    notes = list(dict.fromkeys(note for shard in shards for note in shard.card.notes))
    lines += [f"  {note}" for note in notes]
    keys = (
        f"data.root={console.shown(output)}",
        f"data.resolution={shards[0].card.resolution}",
        f"federation.hospitals={len(shards)}",
    )
    lines.append(f"show it: fedgan data show {console.shown(output)}")
    lines.append(
        "train on it: fedgan simulate SCENARIO.toml " + " ".join(f"--set {key}" for key in keys)
    )
    console.emit(
        {"root": str(output), "shards": [card_json(shard) for shard in shards]},
        as_json,
        "\n".join(lines),
    )


def card_json(shard: Shard) -> dict[str, Any]:
    """A shard's path and card as JSON."""
    return {"path": str(shard.path), **dataclasses.asdict(shard.card)}


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on a terminal's stderr, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)
