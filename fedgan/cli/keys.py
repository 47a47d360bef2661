"""`fedgan keys`: keys and certificates of a federation's hospitals and server."""

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


class _CreateByDefault(TyperGroup):
    """`fedgan keys north south` is `fedgan keys create north south`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            similar = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.7)
            if similar:  # a typing error must not make a hospital
                rest = " ".join(args)
                ctx.fail(
                    f"No such command '{args[0]}'. Did you mean '{similar[0]}'? "
                    f"For a hospital: fedgan keys create {rest}"
                )
            args = ["create", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_CreateByDefault,
    help="Create, rotate and revoke the keys of a federation.\n\n"
    "`fedgan keys NAME...` is short for `fedgan keys create NAME...`.",
    epilog="Example: fedgan keys hospital1 hospital2 hospital3 --host fl.example.org",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Names = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME[=IMAGES]...",
        help="Hospitals: letters, digits, - and _; IMAGES: most training images it may report.",
    ),
]
Folder = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The key folder.")]
Hosts = Annotated[
    list[str] | None,
    typer.Option(
        "--host",
        metavar="NAME|IP",
        help="A name or address by which hospitals reach the server; may be repeated.",
    ),
]
Days = Annotated[
    int | None,
    typer.Option(
        "--days",
        metavar="DAYS",
        min=1,
        max=3650,
        help=f"Validity of the server's certificate. [default: {DAYS}]",
    ),
]

OWN_KEY = typer.Option(
    "--public-key", metavar="FILE", help="The public key (.pub) that the hospital has made itself."
)


@app.command(
    epilog="Example: fedgan keys create hospital1=1200 hospital2=900 --host fl.example.org\n\n"
    "Example: fedgan keys create hospital4",
)
def create(
    names: Names,
    output: Folder = Path("keys"),
    hosts: Hosts = None,
    days: Days = None,
    as_json: console.Json = False,
) -> None:
    """Create the keys of a federation, or add hospitals to it.

    Creates an authority, the server's certificate and a key per hospital; in an existing key
    folder only the new hospitals' keys.
    """
    from fedgan.deployment.certificates import now
    from fedgan.deployment.key_folder import KeyFolder

    moment = now()
    if KeyFolder(output).registration_list.is_file():
        if hosts or days:
            raise ConfigError(
                f"{console.shown(output)} has a server certificate: "
                "use --host and --days with fedgan keys rotate server"
            )
        folder = KeyFolder.open(output)
        rows: Sequence[Registration] = folder.add(names, moment)
    else:
        folder = KeyFolder.create(output, names, hosts or [], days or DAYS, moment)
        rows = folder.registrations()
    lines = [f"wrote {console.shown(folder.hospital(row.name))}: {row.fingerprint}" for row in rows]
    lines += [
        f"server: {_server_line(folder)}",
        "give each hospital its own folder over a trusted channel, and no other file",
    ]
    lines += _registration_steps(folder, rows, ()) if folder.registrations() != tuple(rows) else []
    console.emit(_summary(folder), as_json, "\n".join(lines))


@app.command(epilog="Example: fedgan keys add hospital4 --public-key hospital4.pub")
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The new hospital.")],
    public_key: Annotated[Path, OWN_KEY],
    output: Folder = Path("keys"),
    as_json: console.Json = False,
) -> None:
    """Add a hospital that has made its own key, so that no private key travels.

    The hospital runs `ssh-keygen -t ecdsa -b 384 -N "" -f node.key`, keeps node.key, and sends
    node.key.pub.
    """
    from fedgan.deployment.certificates import now
    from fedgan.deployment.key_folder import KeyFolder

    folder = KeyFolder.open(output)
    rows = folder.add([name], now(), public_key)
    lines = [
        f"added {name}: {rows[0].fingerprint}",
        f"compare the fingerprint by telephone, and send it {console.shown(folder.authority)}",
        *_registration_steps(folder, rows, ()),
    ]
    console.emit(_summary(folder), as_json, "\n".join(lines))


@app.command(
    epilog="Example: fedgan keys rotate hospital1\n\n"
    "Example: fedgan keys rotate hospital1=2000\n\n"
    "Example: fedgan keys rotate server --host fl.example.org --days 180",
)
def rotate(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME[=IMAGES]|server",
            help="A hospital, or `server` for the server's certificate; IMAGES: its new bound.",
        ),
    ],
    output: Folder = Path("keys"),
    hosts: Hosts = None,
    days: Days = None,
    public_key: Annotated[Path | None, OWN_KEY] = None,
    as_json: console.Json = False,
) -> None:
    """Replace a hospital's key or the server's certificate.

    A hospital's old key is revoked. The server's new certificate keeps the names of the old one;
    --host adds more.
    """
    from fedgan.deployment.certificates import now
    from fedgan.deployment.key_folder import KeyFolder

    folder = KeyFolder.open(output)
    if name == SERVER:
        if public_key:
            raise ConfigError("--public-key applies to a hospital's key, not to the server's")
        folder.rotate_server(hosts or [], days or DAYS, now())
        lines = [
            f"new key and certificate in {console.shown(output / SERVER)}: {_server_line(folder)}"
        ]
        lines.append("restart SuperLink and proxy; the hospitals' ca.crt stays valid")
    else:
        if hosts or days:
            raise ConfigError(
                "--host and --days apply to the server's certificate, not to a hospital's key: "
                "use them with fedgan keys rotate server"
            )
        old, new = folder.rotate_hospital(name, now(), public_key)
        lines = [
            f"new key in {console.shown(folder.hospital(new.name))}: {new.fingerprint}",
            f"revoked: {old.fingerprint}",
        ]
        if not public_key:
            lines.append(
                f"give {console.shown(folder.hospital(new.name))} to the hospital, "
                "which then restarts its SuperNode"
            )
        lines += _registration_steps(folder, [new], [old])
    console.emit(_summary(folder), as_json, "\n".join(lines))


@app.command(epilog="Example: fedgan keys revoke hospital2")
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A hospital.")],
    output: Folder = Path("keys"),
    as_json: console.Json = False,
) -> None:
    """Revoke a hospital's key.

    The server refuses it after the next `fedgan deploy register`.
    """
    from fedgan.deployment.certificates import now
    from fedgan.deployment.key_folder import KeyFolder

    folder = KeyFolder.open(output)
    row = folder.revoke(name, now())
    lines = [f"revoked {name}: {row.fingerprint}", *_registration_steps(folder, [], [row])]
    lines.append(f"to re-admit the hospital with a new key: fedgan keys rotate {name}")
    console.emit(_summary(folder), as_json, "\n".join(lines))


@app.command(
    "list", epilog="Example: fedgan keys list\n\nExample: fedgan keys list --output keys --json"
)
def list_keys(
    keys: Folder = Path("keys"),
    as_json: console.Json = False,
) -> None:
    """List certificates and keys with their dates."""
    from fedgan.deployment.key_folder import KeyFolder

    summary = _summary(KeyFolder.open(keys))
    table = [("", "fingerprint", "created", "expires", "revoked", "images")]
    for label in ("authority", SERVER):
        row = summary[label]
        shown, expires = row["fingerprint"], f"{row['expires'][:10]} ({row['days_left']} days)"
        table.append((label, f"{shown[:30]}...", row["created"][:10], expires, "", ""))
    for row in summary["hospitals"]:
        dates = (row["created"][:10], "", (row["revoked"] or "")[:10])
        table.append((row["name"], row["fingerprint"], *dates, str(row["images"] or "")))
    lines = console.table_lines(table)
    lines.append(f"the server's names: {', '.join(summary[SERVER]['hosts'])}")
    console.emit(summary, as_json, "\n".join(lines))


# --- shared by the commands ---


def _summary(folder: KeyFolder) -> dict[str, Any]:
    """The public content of a key folder, for --json."""
    from fedgan.deployment import certificates

    moment = certificates.now()
    summary: dict[str, Any] = {"path": str(folder.path)}
    for label, path in (("authority", folder.authority), (SERVER, folder.server_certificate)):
        certificate = certificates.read_certificate(path)
        summary[label] = {
            "fingerprint": certificates.fingerprint(certificate),
            "created": certificate.not_valid_before_utc.isoformat(),
            "expires": certificate.not_valid_after_utc.isoformat(),
            "days_left": certificates.days_left(certificate, moment),
        }
    summary[SERVER]["hosts"] = certificates.hosts_of(certificate)
    return summary | {"hospitals": [dataclasses.asdict(row) for row in folder.registrations()]}


def _server_line(folder: KeyFolder) -> str:
    from fedgan.deployment import certificates

    certificate = certificates.read_certificate(folder.server_certificate)
    hosts = ", ".join(certificates.hosts_of(certificate))
    return f"{hosts}, until {certificate.not_valid_after_utc:%Y-%m-%d}"


def _registration_steps(
    folder: KeyFolder, admitted: Sequence[Registration], refused: Sequence[Registration]
) -> list[str]:
    """Steps that apply changes to a running federation."""
    lines = ["to apply this to a running federation: `fedgan deploy register`, or by hand:"]
    lines += [
        "  flwr supernode unregister NODE_ID SUPERLINK   (NODE_ID: printed at registration)"
        for _ in refused
    ]
    for row in admitted:
        lines.append(
            f"  flwr supernode register {console.shown(folder.path / row.public_key)} SUPERLINK "
            f"--name {row.node_name}"
        )
    return lines
