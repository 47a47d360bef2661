"""Help texts that say all they should, whichever typer and click Flower's pins have brought together.

Two faults of typer 0.20 beside click 8.5: an argument's help is lost, because click now has a field of
that name, which it clears after typer has set it; and brackets are escaped for rich even where rich is off.
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
    """The click command of a typer app, with every help text in its place."""
    typer.core.HAS_RICH = False  # it only decides whether help texts are escaped and coloured
    command = typer.main.get_command(app)
    _restore(command)
    return command


def _restore(command: click.Command) -> None:
    """Give the arguments of a command, and of those below it, the help that they were declared with."""
    if isinstance(command, click.Group):
        for below in command.commands.values():
            _restore(below)
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
            # not `parameter.help = …`: click would then list the argument a second time
            parameter.get_help_record = functools.partial(_record, parameter, declared[0].help)  # type: ignore[method-assign]


def _record(parameter: click.Parameter, text: str, context: click.Context) -> tuple[str, str]:
    return parameter.make_metavar(context), f"{text}  [required]" if parameter.required else text
