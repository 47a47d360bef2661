"""`fedgan approve`: the hospital's list of code that a server may run on its machine."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated

import typer

import fedgan
from fedgan import files
from fedgan.cli import console
from fedgan.errors import ConfigError

APP = Path(fedgan.__file__).parents[1]
HEADER = "# SHA-256 of each Flower app that this hospital runs for a server (fedgan approve).\n"


def approve(
    code: Annotated[
        str,
        typer.Argument(
            metavar="[DIR|SHA256]",
            help="The app's folder, or the hash of code that was read elsewhere. "
            "[default: this installation's repository]",
        ),
    ] = "",
    approved: Annotated[
        Path, typer.Option("--list", metavar="FILE", help="The hospital's list of approved code.")
    ] = Path("approved.txt"),
    only: Annotated[
        bool, typer.Option("--only", help="Withdraw the approval of everything else.")
    ] = False,
    as_json: console.Json = False,
) -> None:
    """Approve code that a server may run at this hospital.

    Adds the SHA-256 of the Flower app in DIR to the list that client/approval.py enforces. Run it
    on the checkout that you have read; equal files give an equal hash on every machine.
    """
    if re.fullmatch(r"[0-9a-f]{64}", code):
        found, source = code, "given as a hash"
    else:
        folder = Path(code) if code else APP
        found, source = bundle_hash(folder), f"fedgan {fedgan.__version__}"
    line = f"{found}  {source}\n"
    try:
        before = approved.read_text(encoding="utf-8") if approved.exists() and not only else HEADER
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {approved}: give another file with --list") from error
    if found not in before.split():
        files.write_text(approved, before + line)
    console.emit(
        {"sha256": found, "list": str(approved)},
        as_json,
        f"approved {found} in {console.shown(approved)}",
    )


def bundle_hash(folder: Path) -> str:
    """SHA-256 of the app bundle (FAB) that Flower makes of `folder`.

    Raises `ConfigError` where there is no Flower app.
    """
    from flwr.cli.build import build_fab_from_disk

    project = folder / "pyproject.toml"
    if not project.is_file() or "[tool.flwr.app]" not in project.read_text(encoding="utf-8"):
        raise ConfigError(
            f"{console.shown(folder)} is no checkout of fedgan: give its folder, or the hash that "
            "the operator's fedgan deploy run prints"
        )
    return hashlib.sha256(build_fab_from_disk(folder)).hexdigest()
