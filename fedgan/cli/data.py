"""`fedgan data`: import a source, draw phantoms, look at what is there."""

from __future__ import annotations

import contextlib
import dataclasses
import io
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
    help="Turn images into shards, draw phantoms, show what shards hold.",
    epilog="Example: fedgan data show data/chest",
    rich_markup_mode=None,
    no_args_is_help=True,
)
import_app = typer.Typer(
    help="Import images: one shard for each institution, side by side in one folder.",
    epilog="Example: fedgan data import npz chest.npz --output data/chest",
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.add_typer(import_app, name="import")


class Channels(StrEnum):
    """Colour of the shards."""

    AUTO = "auto"
    GREY = "grey"
    RGB = "rgb"


class Duplicates(StrEnum):
    """What happens to an image with the pixels of an earlier one."""

    AUTO = "auto"
    SKIP = "skip"
    KEEP = "keep"


class Kind(StrEnum):
    """Kinds of phantoms."""

    LESIONS = "lesions"
    CHEST = "chest"


Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="Folder to write; must be absent or empty."),
]
Name = Annotated[
    str,
    typer.Option(
        "--name", help="Institution where the source names none. [default: the source's name]"
    ),
]
Resolution = Annotated[
    int,
    typer.Option(
        "--resolution", "-r", min=0, help="Side in pixels, a power of two; 0: as the source."
    ),
]
Colour = Annotated[Channels, typer.Option("--channels", help="auto: as the source.")]
Crop = Annotated[
    bool,
    typer.Option(
        "--crop", help="Take the central square first; else the aspect ratio is not preserved."
    ),
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
        help="Images with the pixels of an earlier one; auto: skip, but keep in an .npz.",
    ),
]
Val = Annotated[
    float,
    typer.Option(
        "--val", help="Share of the (training) patients for validation where the source has none."
    ),
]
Test = Annotated[
    float,
    typer.Option(
        "--test", help="Share of the patients for the test where the source has no split."
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the splits.")]
Licence = Annotated[str, typer.Option("--licence", help="Licence of the images, for the card.")]


@import_app.command(
    "npz",
    epilog="Example: fedgan data import npz chest.npz --output data/chest\n\n"
    "Example: fedgan data import npz chest.npz --label-map 'normal=normal,*=abnormal' --output data/binary\n\n"
    "Example: fedgan data import npz dermamnist.npz --resolution 32 --output data/derma",
)
def import_npz(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="An .npz pack; names of its codes in a .json beside it."
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
    """Import an .npz pack: arrays images, label, institution, split, patient, name, or the MedMNIST layout."""
    from fedgan.data.importers import ImportOptions, read_npz

    console.refuse_existing(output, "the shards")
    options = ImportOptions(
        resolution, channels, crop, label_map, duplicates, val, test, seed, licence
    )
    _import(read_npz(source, name), output, options, as_json)


@import_app.command(
    "folder",
    epilog="Example: fedgan data import folder photos --resolution 64 --output data/photos\n\n"
    "Example: fedgan data import folder xrays --patient '(person[0-9]+)_' --channels grey --resolution 64 --output data/xrays",
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
            help="Finds the patient in a file name: one group in round brackets.",
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
    as_json: console.Json = False,
) -> None:
    """Import class folders: one sub-folder a class, or one a split with the classes inside."""
    from fedgan.data.importers import ImportOptions, read_folder

    console.refuse_existing(output, "the shards")
    options = ImportOptions(
        resolution, channels, crop, label_map, duplicates, val, test, seed, licence
    )
    _import(read_folder(source, name, patient), output, options, as_json)


@import_app.command(
    "csv",
    epilog="Example: fedgan data import csv images.csv --resolution 64 --output data/skin\n\n"
    "Example: fedgan data import csv findings.csv --label-column effusion --label-column nodule --patient-column subject "
    "--resolution 128 --output data/chest",
)
def import_csv(
    source: Annotated[
        Path, typer.Argument(metavar="FILE", help="A CSV with a header, one row an image.")
    ],
    output: Output,
    root: Annotated[
        Path | None,
        typer.Option(
            "--root",
            metavar="DIR",
            help="Folder that paths start from. [default: the CSV's folder]",
        ),
    ] = None,
    path_column: Annotated[
        str, typer.Option("--path-column", help="Column with the image's path.")
    ] = "path",
    label_column: Annotated[
        list[str] | None,
        typer.Option(
            "--label-column",
            help="One column of class names, or several of 0 and 1. [default: label]",
        ),
    ] = None,
    patient_column: Annotated[
        str, typer.Option("--patient-column", help="[default: patient, where there is one]")
    ] = "",
    institution_column: Annotated[
        str, typer.Option("--institution-column", help="[default: institution, where there is one]")
    ] = "",
    split_column: Annotated[
        str, typer.Option("--split-column", help="[default: split, where there is one]")
    ] = "",
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="Take no label at all.")
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
    as_json: console.Json = False,
) -> None:
    """Import a CSV manifest: paths with labels, patient, institution and split."""
    from fedgan.data.importers import Columns, ImportOptions, read_manifest

    console.refuse_existing(output, "the shards")
    labels = () if unconditional else tuple(label_column or ["label"])
    columns = Columns(path_column, labels, patient_column, institution_column, split_column)
    options = ImportOptions(
        resolution, channels, crop, label_map, duplicates, val, test, seed, licence
    )
    _import(read_manifest(source, columns, root, name), output, options, as_json)


@app.command(
    epilog="Example: fedgan data phantoms --kind lesions --images 3000 --resolution 32 --output data/lesions\n\n"
    "Example: fedgan data phantoms --kind chest --images 600 --resolution 64 --hospitals 2 --output data/chest",
)
def phantoms(
    output: Output,
    kind: Annotated[
        Kind, typer.Option("--kind", help="Dermatoscopic lesions (7 classes) or chest radiographs.")
    ] = Kind.LESIONS,
    images: Annotated[
        int, typer.Option("--images", "-n", min=1, help="Images over all hospitals.")
    ] = 3000,
    resolution: Annotated[
        int, typer.Option("--resolution", "-r", min=1, help="Side in pixels, a power of two.")
    ] = 32,
    hospitals: Annotated[
        int, typer.Option("--hospitals", min=1, help="Number of hospitals, a shard each.")
    ] = 3,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="The same seed draws the same images.")
    ] = 0,
    as_json: console.Json = False,
) -> None:
    """Draw phantom images of known truth, each hospital with its own scanner, label mix and size."""
    from fedgan.data.phantoms import write_phantoms
    from fedgan.data.shard import Shard, staged_folder

    console.refuse_existing(output, "the shards")
    with staged_folder(output) as stage:
        names = [
            path.name
            for path in write_phantoms(stage, kind.value, images, resolution, hospitals, seed)
        ]
    _tell(output, [Shard.open(output / name) for name in names], as_json)


@app.command(
    epilog="Example: fedgan data show data/chest --output sheet.png\n\nExample: fedgan data show data/chest --json",
)
def show(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of shards, or one shard.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PNG",
            help="The contact sheet. [default: DIR/contact-sheet.png]",
        ),
    ] = None,
    sheet: Annotated[
        bool, typer.Option("--sheet/--no-sheet", help="Write the contact sheet.")
    ] = True,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read every image and compare with the card's content hash."),
    ] = False,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Which images stand on the sheet.")
    ] = 0,
    as_json: console.Json = False,
) -> None:
    """Show images per class, institution and split, what to beware of, and a contact sheet.

    The sheet shows real images: it stays where the shards may stay.
    """
    from fedgan.data.contact_sheet import write_contact_sheet
    from fedgan.data.federation import find_shards
    from fedgan.data.overview import warnings_of
    from fedgan.data.shard import Shard

    shards = [Shard.open(path, verify) for path in find_shards(source)]
    warnings = warnings_of(shards)
    place = (
        write_contact_sheet(output or source / "contact-sheet.png", shards, seed=seed)
        if sheet
        else None
    )
    result: dict[str, Any] = {
        "root": str(source),
        "shards": [_card(shard) for shard in shards],
        "warnings": warnings,
        "contact_sheet": str(place) if place else None,
    }
    lines = [
        _table(shards),
        *(f"! {warning}" for warning in warnings),
        *([f"wrote {console.shown(place)}"] if place else []),
    ]
    console.emit(result, as_json, "\n".join(lines))


# --- what the verbs share ------------------------------------------------------------------------


def _import(source: Source, output: Path, options: Any, as_json: bool) -> None:
    from fedgan.data.importers import import_source

    with _progress(f"importing {source.title}") as on_image:
        shards = import_source(source, output, options, on_image)
    _tell(output, shards, as_json)


def _tell(output: Path, shards: Sequence[Shard], as_json: bool) -> None:
    """Print what was written: a line for each shard, skipped files, notes, and how to use it."""
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
    lines.append(f"look at it: fedgan data show {console.shown(output)}")
    lines.append(
        "train on it: fedgan simulate SCENARIO.toml " + " ".join(f"--set {key}" for key in keys)
    )
    console.emit(
        {"root": str(output), "shards": [_card(shard) for shard in shards]},
        as_json,
        "\n".join(lines),
    )


def _card(shard: Shard) -> dict[str, Any]:
    return {"path": str(shard.path), **dataclasses.asdict(shard.card)}


def _table(shards: Sequence[Shard]) -> str:
    """Counts as text, as wide as the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from fedgan.data.overview import count_rows
    from fedgan.data.splits import SPLITS

    card = shards[0].card
    kind = "classes" if card.exclusive else "findings, several an image"
    title = f"{card.resolution}×{card.resolution} {'grey' if card.channels == 1 else 'RGB'}, {len(card.label_names)} {kind}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("institution", "class"):
        table.add_column(heading)
    for heading in (*SPLITS, "all"):
        table.add_column(heading, justify="right")
    before = ""
    for row in count_rows(shards):
        numbers = [*row.counts.values(), sum(row.counts.values())]
        cells = [f"{number:,}" if number else "·" for number in numbers]
        table.add_row(
            row.institution if row.institution != before else "",
            row.label or "images",
            *cells,
            end_section=not row.label,
        )
        before = row.institution
    text = io.StringIO()
    Console(file=text, width=None if sys.stdout.isatty() else 100).print(table)
    return text.getvalue().rstrip()


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal's stderr, nothing elsewhere: an import of thousands of images takes a minute at most."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)
