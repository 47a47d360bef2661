"""Complete help texts under every combination of typer and click that Flower's pins allow.

Two bugs of typer 0.20 with click 8.5: an argument's help is lost, because click has a field of that
name, which it clears after typer has set it; and brackets are escaped for rich even with rich
switched off.
"""

from __future__ import annotations

import functools
import inspect
import typing

import click
import typer
import typer.core
from typer.models import ArgumentInfo


def build(app: typer.Typer) -> click.Command:
    """The click command of a typer app, with all help texts."""
    typer.core.HAS_RICH = False  # decides only whether help texts are escaped and coloured
    command = typer.main.get_command(app)
    _restore_help(command)
    return command


def _restore_help(command: click.Command) -> None:
    """Restore the declared help of the arguments of a command and its subcommands."""
    if isinstance(command, click.Group):
        for subcommand in command.commands.values():
            _restore_help(subcommand)
    if command.callback is None:
        return
    hints = typing.get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    for parameter in command.params:
        declared = [
            extra
            for extra in getattr(hints.get(parameter.name or ""), "__metadata__", ())
            if isinstance(extra, ArgumentInfo)
        ]
        if declared and declared[0].help and not getattr(parameter, "help", None):
            # not `parameter.help = …`: click would list the argument twice
            record = functools.partial(_help_record, parameter, declared[0].help)
            parameter.get_help_record = record  # type: ignore[method-assign]


def _help_record(parameter: click.Parameter, text: str, context: click.Context) -> tuple[str, str]:
    return parameter.make_metavar(context), f"{text}  [required]" if parameter.required else text
