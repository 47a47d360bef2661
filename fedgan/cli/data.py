"""`fedgan data`: import images, generate phantoms, show shards."""

from __future__ import annotations

import io
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgan.cli import console, data_import
from fedgan.cli.data_import import Output, card_json, print_shards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedgan.data.shard import Shard

app = typer.Typer(
    help="Import images, generate phantoms, show shards.",
    epilog="Example: fedgan data show data/chest",
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.add_typer(data_import.app, name="import")


class Kind(StrEnum):
    """Kinds of phantoms."""

    LESIONS = "lesions"
    CHEST = "chest"


@app.command(
    epilog="Example: fedgan data phantoms --kind lesions --images 3000 --resolution 32 "
    "--output data/lesions\n\n"
    "Example: fedgan data phantoms --kind chest --images 600 --resolution 64 --hospitals 2 "
    "--output data/chest",
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
        int, typer.Option("--hospitals", min=1, help="Number of hospitals; one shard per hospital.")
    ] = 3,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed; the same seed gives the same images.")
    ] = 0,
    as_json: console.Json = False,
) -> None:
    """Generate phantoms with known labels.

    Hospitals differ in scanner, label mix and size.
    """
    from fedgan.data.phantoms import write_phantoms
    from fedgan.data.shard import Shard, staged_folder

    console.refuse_existing(output, "the shards")
    with staged_folder(output) as stage:
        names = [
            path.name
            for path in write_phantoms(stage, kind.value, images, resolution, hospitals, seed)
        ]
    print_shards(output, [Shard.open(output / name) for name in names], as_json)


@app.command(
    epilog="Example: fedgan data show data/chest --output sheet.png\n\n"
    "Example: fedgan data show data/chest --json",
)
def show(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of shards, or one shard.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PNG",
            help="File of the contact sheet. [default: DIR/contact-sheet.png]",
        ),
    ] = None,
    sheet: Annotated[
        bool, typer.Option("--sheet/--no-sheet", help="Write the contact sheet.")
    ] = True,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read every image and check the card's content hash."),
    ] = False,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed of the choice of images on the sheet.")
    ] = 0,
    as_json: console.Json = False,
) -> None:
    """Count the images of shards; draw a contact sheet.

    Counts images per class, institution and split, and prints warnings. The sheet shows real
    images: keep it where the shards may be kept.
    """
    from fedgan.data.contact_sheet import write_contact_sheet
    from fedgan.data.federation import find_shards
    from fedgan.data.overview import shard_warnings
    from fedgan.data.shard import Shard

    shards = [Shard.open(path, verify) for path in find_shards(source)]
    warnings = shard_warnings(shards)
    sheet_path = (
        write_contact_sheet(output or source / "contact-sheet.png", shards, seed=seed)
        if sheet
        else None
    )
    result: dict[str, Any] = {
        "root": str(source),
        "shards": [card_json(shard) for shard in shards],
        "warnings": warnings,
        "contact_sheet": str(sheet_path) if sheet_path else None,
    }
    lines = [
        _table(shards),
        *(f"! {warning}" for warning in warnings),
        *([f"wrote {console.shown(sheet_path)}"] if sheet_path else []),
    ]
    console.emit(result, as_json, "\n".join(lines))


def _table(shards: Sequence[Shard]) -> str:
    """Table of counts, as wide as the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from fedgan.data.overview import count_rows
    from fedgan.data.splits import SPLITS

    card = shards[0].card
    kind = "classes" if card.exclusive else "findings, several per image"
    colour = "grey" if card.channels == 1 else "RGB"
    size = f"{card.resolution}×{card.resolution}"
    title = f"{size} {colour}, {len(card.label_names)} {kind}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("institution", "class"):
        table.add_column(heading)
    for heading in (*SPLITS, "all"):
        table.add_column(heading, justify="right")
    previous = ""
    for row in count_rows(shards):
        numbers = [*row.counts.values(), sum(row.counts.values())]
        cells = [f"{number:,}" if number else "·" for number in numbers]
        table.add_row(
            row.institution if row.institution != previous else "",
            row.label or "images",
            *cells,
            end_section=not row.label,
        )
        previous = row.institution
    text = io.StringIO()
    Console(file=text, width=None if sys.stdout.isatty() else 100, markup=False).print(table)
    return text.getvalue().rstrip()
