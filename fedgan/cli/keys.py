"""`fedgan keys`: who may take part in a federation, and whom its hospitals believe to be the server."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from typer.core import TyperGroup

from fedgan.cli import console
from fedgan.errors import ConfigError

if TYPE_CHECKING:
    from fedgan.deployment.key_folder import KeyFolder
    from fedgan.deployment.registrations import Registration

DAYS = 365
SERVER = "server"


class _CreateUnlessSaidOtherwise(TyperGroup):
    """`fedgan keys north south` is `fedgan keys create north south`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            meant = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.7)
            if meant:  # a slip of the finger must not found a hospital
                rest = " ".join(args)
                ctx.fail(
                    f"No such command '{args[0]}'. Did you mean '{meant[0]}'? For a hospital: fedgan keys create {rest}"
                )
            args = ["create", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_CreateUnlessSaidOtherwise,
    help="Make, renew and revoke the keys and certificates of a federation.\n\n"
    "`fedgan keys NAME...` is short for `fedgan keys create NAME...`.",
    epilog="Example: fedgan keys hospital1 hospital2 hospital3 --host fl.example.org",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Names = Annotated[
    list[str], typer.Argument(metavar="NAME...", help="Hospitals: letters, digits, - and _.")
]
Folder = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder of keys.")]
Hosts = Annotated[
    list[str] | None,
    typer.Option(
        "--host",
        metavar="NAME|IP",
        help="Hospitals reach the server by this name or address; may be repeated.",
    ),
]
Days = Annotated[
    int | None,
    typer.Option(
        "--days",
        metavar="DAYS",
        min=1,
        max=3650,
        help=f"How long the server's certificate holds. [default: {DAYS}]",
    ),
]


@app.command(
    epilog="Example: fedgan keys create hospital1 hospital2 hospital3 --host fl.example.org\n\n"
    "Example: fedgan keys create hospital4",
)
def create(
    names: Names,
    output: Folder = Path("keys"),
    hosts: Hosts = None,
    days: Days = None,
    as_json: console.Json = False,
) -> None:
    """Make an authority, the server's certificate and a key for each hospital; in a folder that has them, add hospitals."""
    from fedgan.deployment.certificates import now
    from fedgan.deployment.key_folder import KeyFolder

    moment = now()
    if (output / "hospitals.json").is_file():
        if hosts or days:
            raise ConfigError(
                f"{console.shown(output)} has a server certificate: --host and --days go to fedgan keys rotate server"
            )
        folder = KeyFolder.open(output)
        rows: Sequence[Registration] = folder.add(names, moment)
    else:
        folder = KeyFolder.create(output, names, hosts or [], days or DAYS, moment)
        rows = folder.registrations()
    lines = [f"wrote {console.shown(folder.hospital(row.name))}: {row.fingerprint}" for row in rows]
    lines += [
        f"server: {_server_line(folder)}",
        "hand each hospital its own folder over a safe channel, and nothing else of these",
    ]
    lines += _to_apply(folder, rows, ()) if folder.registrations() != tuple(rows) else []
    console.emit(_told(folder), as_json, "\n".join(lines))


@app.command(
    epilog="Example: fedgan keys rotate hospital1\n\nExample: fedgan keys rotate server --host fl.example.org --days 180",
)
def rotate(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|server", help="A hospital, or `server` for the server's certificate."
        ),
    ],
    output: Folder = Path("keys"),
    hosts: Hosts = None,
    days: Days = None,
    as_json: console.Json = False,
) -> None:
    """Give a hospital a new key and revoke its old one, or the server a new key and certificate of the same authority.

    The server's new certificate keeps the names of the old one; --host adds more.
    """
    from fedgan.deployment.certificates import now
    from fedgan.deployment.key_folder import KeyFolder

    folder = KeyFolder.open(output)
    if name == SERVER:
        folder.rotate_server(hosts or [], days or DAYS, now())
        lines = [
            f"new key and certificate in {console.shown(output / SERVER)}: {_server_line(folder)}"
        ]
        lines.append(
            "restart SuperLink and filter; hospitals need nothing new, their ca.crt is the same"
        )
    else:
        if hosts or days:
            raise ConfigError(
                "--host and --days belong to certificates, i.e. to fedgan keys rotate server: a hospital's key has neither"
            )
        old, new = folder.rotate_hospital(name, now())
        lines = [
            f"new key in {console.shown(folder.hospital(name))}: {new.fingerprint}",
            f"revoked: {old.fingerprint}",
        ]
        lines.append(
            f"bring {console.shown(folder.hospital(name))} to the hospital, which then restarts its SuperNode"
        )
        lines += _to_apply(folder, [new], [old])
    console.emit(_told(folder), as_json, "\n".join(lines))


@app.command(epilog="Example: fedgan keys revoke hospital2")
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A hospital.")],
    output: Folder = Path("keys"),
    as_json: console.Json = False,
) -> None:
    """Mark a hospital's key as revoked, so that the server is told to refuse it."""
    from fedgan.deployment.certificates import now
    from fedgan.deployment.key_folder import KeyFolder

    folder = KeyFolder.open(output)
    row = folder.revoke(name, now())
    lines = [f"revoked {name}: {row.fingerprint}", *_to_apply(folder, [], [row])]
    lines.append(f"to admit the hospital again, with a new key: fedgan keys rotate {name}")
    console.emit(_told(folder), as_json, "\n".join(lines))


@app.command(
    "list", epilog="Example: fedgan keys list\n\nExample: fedgan keys list --output keys --json"
)
def list_keys(
    keys: Folder = Path("keys"),
    as_json: console.Json = False,
) -> None:
    """Show every certificate and key: fingerprint, when it was made and revoked, when it ends."""
    from fedgan.deployment.key_folder import KeyFolder

    told = _told(KeyFolder.open(keys))
    table = [("", "fingerprint", "created", "ends", "revoked")]
    for label in ("authority", SERVER):
        row = told[label]
        print_, ends = row["fingerprint"], f"{row['expires'][:10]} ({row['days_left']} days)"
        table.append((label, f"{print_[:30]}...", row["created"][:10], ends, ""))
    for row in told["hospitals"]:
        table.append(
            (row["name"], row["fingerprint"], row["created"][:10], "", (row["revoked"] or "")[:10])
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    console.emit(
        told, as_json, "\n".join([*lines, f"the server is {', '.join(told[SERVER]['hosts'])}"])
    )


# --- what the verbs share ------------------------------------------------------------------------


def _told(folder: KeyFolder) -> dict[str, Any]:
    """All that stands in a folder and is no secret, as JSON."""
    from fedgan.deployment import certificates

    moment = certificates.now()
    told: dict[str, Any] = {"path": str(folder.path)}
    for label, path in (("authority", folder.authority), (SERVER, folder.server_certificate)):
        certificate = certificates.read_certificate(path)
        told[label] = {
            "fingerprint": certificates.fingerprint(certificate),
            "created": certificate.not_valid_before_utc.isoformat(),
            "expires": certificate.not_valid_after_utc.isoformat(),
            "days_left": certificates.days_left(certificate, moment),
        }
    told[SERVER]["hosts"] = certificates.hosts_of(certificate)
    return told | {"hospitals": [dataclasses.asdict(row) for row in folder.registrations()]}


def _server_line(folder: KeyFolder) -> str:
    from fedgan.deployment import certificates

    certificate = certificates.read_certificate(folder.server_certificate)
    return f"{', '.join(certificates.hosts_of(certificate))}, until {certificate.not_valid_after_utc:%Y-%m-%d}"


def _to_apply(
    folder: KeyFolder, admitted: Sequence[Registration], refused: Sequence[Registration]
) -> list[str]:
    """What a federation that runs has to be told, by fedgan or by hand."""
    lines = ["a running federation learns of it by `fedgan deploy register`, or by hand:"]
    lines += [
        "  flwr supernode unregister NODE_ID SUPERLINK   (the number that its registration printed)"
        for _ in refused
    ]
    for row in admitted:
        lines.append(
            f"  flwr supernode register {console.shown(folder.path / row.public_key)} SUPERLINK --name {row.name}"
        )
    return lines
