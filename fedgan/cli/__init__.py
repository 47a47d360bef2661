"""The command line: verbs, one module per group, and the mapping from errors to exit codes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated

import click
import typer

import fedgan
from fedgan.cli import (
    approve,
    audit,
    compare,
    console,
    data,
    deploy,
    doctor,
    generate,
    help,
    keys,
    ledger,
    outbound,
    outputs,
    runs,
    settings,
)

EXIT_CODES = (
    "Exit codes: 0 done; 1 unexpected failure; 2 scenario, key or usage; 3 data; 4 checkpoint; "
    "5 federation; 6 disk; 7 machine (package, port, device); 130 stopped."
)

app = typer.Typer(
    name="fedgan",
    help="Hospitals train one StyleGAN2-ADA together with Flower. No image leaves a hospital.",
    epilog=f"Example: fedgan demo\n\n{EXIT_CODES}",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog="Example: fedgan demo --output runs/demo")(runs.demo)
app.command(
    epilog="Example: fedgan simulate simulations/three_hospitals.toml --set training.kimg=10 "
    "--output runs/short",
)(runs.simulate)
app.command(
    epilog="Example: fedgan compare simulations/three_hospitals_compare.toml --seeds 3 "
    "--output runs/arms",
)(compare.compare)
app.command(epilog="Example: fedgan resume runs/short")(runs.resume)
app.command(
    epilog="Example: fedgan settings privacy\n\nExample: fedgan settings training.r1_gamma --json"
)(settings.settings)
app.command(
    epilog="Example: fedgan generate runs/demo --images 70 --output synthetic\n\n"
    "Example: fedgan generate runs/demo --images 20 --label mel --psi 0.8 --output melanomas\n\n"
    "Example: fedgan generate --release runs/demo --images 7000 --mix nv=0.5,mel=0.3,bcc=0.2 "
    "--output release",
)(generate.generate)
app.command(epilog="Example: fedgan evaluate runs/demo")(outputs.evaluate)
app.command(epilog="Example: fedgan report runs/demo --tensorboard events")(outputs.report)
app.command(epilog="Example: fedgan cards runs/demo")(outputs.cards)
app.command(
    epilog="Example: fedgan audit runs/demo\n\n"
    "Example: fedgan audit runs/demo --hospital hospital-1 --shadows 4 --shadow-kimg 5",
)(audit.audit)
app.command(
    epilog="Example: fedgan ledger data/north\n\n"
    "Example: fedgan ledger data/north --delta 1e-4 --max-epsilon 10",
)(ledger.ledger)
app.command(
    epilog="Example: fedgan outbound data/north\n\nExample: fedgan outbound runs/demo --json"
)(outbound.outbound)
app.add_typer(data.app, name="data")
app.add_typer(keys.app, name="keys")
app.add_typer(deploy.app, name="deploy")
app.command(
    epilog="Example: fedgan approve\n\nExample: fedgan approve --list /etc/fedgan/approved.txt"
)(approve.approve)
app.command(
    epilog="Example: fedgan doctor simulations/chest_three_hospitals.toml\n\n"
    "Example: fedgan doctor --keys keys",
)(doctor.doctor)


def _print_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"fedgan {fedgan.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="Print the traceback of an error; allowed anywhere on the line."
        ),
    ] = False,
) -> None:
    """Options before the verb. `main` handles --debug, which may stand anywhere."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; no exception leaves this function."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug, as_json = "--debug" in given, "--json" in given
    given = [argument for argument in given if argument != "--debug"]
    command = help.build(app)
    try:  # not command.main(), which swallows Ctrl-C and prints errors in its own format
        with (
            console.sigterm_as_ctrl_c(),
            command.make_context("fedgan", given or ["--help"]) as context,
        ):
            command.invoke(context)
    except click.exceptions.Exit as exit_request:
        return exit_request.exit_code
    except click.UsageError as error:
        if (
            type(error).__name__ == "NoArgsIsHelpError"
        ):  # `fedgan data` alone; click < 8.2 has no such class
            typer.echo(error.format_message())
            return 0
        console.report_failure(_usage_text(error), "UsageError", 2, as_json)
        return 2
    except BrokenPipeError:  # `fedgan settings | head`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - quiet flush at exit
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return console.fail(error, as_json, debug)
    return 0


def _usage_text(error: click.UsageError) -> str:
    verb = error.ctx.command_path if error.ctx else "fedgan"
    message = re.sub(
        r"( Did you mean [^?]*\?)\1", r"\1", error.format_message()
    )  # typer and click both suggest
    return f"{message} (see {verb} --help)"
