"""Output of every verb: results to stdout, progress and errors to stderr.

So `fedgan … --json | jq` always works.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgan import files
from fedgan.errors import ConfigError, FedganError, MachineError, StorageError
from fedgan.redact import printable

if TYPE_CHECKING:
    from fedgan.run_folder import RunFolder

INTERRUPTED = 130
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; the message says how to continue."""


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a verb's result on stdout: `text`, or one JSON object."""
    typer.echo(json.dumps(result, allow_nan=False) if as_json else escaped(text))


def note(text: str) -> None:
    """Print a line on stderr."""
    typer.echo(escaped(text), err=True)


def escaped(text: str) -> str:
    """Lines of text without what a terminal would obey: names come from files of others."""
    return "\n".join(printable(line, sys.maxsize) for line in text.split("\n"))


def table_lines(rows: Sequence[tuple[str, ...]], indent: str = "") -> list[str]:
    """Rows as lines of aligned columns."""
    rows = [tuple(printable(cell, sys.maxsize) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        indent
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


@contextlib.contextmanager
def stdout_for_results() -> Iterator[None]:
    """Redirect the output of libraries to stderr, so that stdout holds only results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise `KeyboardInterrupt`, so that a verb cleans up. For the main thread."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def stoppable(run: RunFolder) -> Iterator[None]:
    """Turn `KeyboardInterrupt` during a run into `Interrupted`, which says how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; continue with: fedgan resume {shown(run.path)}"
            if run.config.is_file()
            else "stopped before the run began"
        ) from None


def shown(path: Path) -> str:
    """A path for display: relative where it lies below the working directory."""
    with contextlib.suppress(ValueError, OSError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def describe_failure(error: BaseException, debug: bool) -> tuple[str, str, int]:
    """Message, kind and exit code of an exception that ends a verb."""
    if isinstance(error, OSError) and error.errno in _DISK:
        error = files.storage_error(Path(str(error.filename or "the output")), error)
    if isinstance(error, ModuleNotFoundError):
        error = MachineError(
            f"the package '{error.name}' is missing: "
            "pip install -e . in the repository (see fedgan doctor)"
        )
    if isinstance(error, FedganError):
        return str(error), type(error).__name__, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "stopped", "Interrupted", INTERRUPTED
    if isinstance(error, MemoryError):
        return (
            "out of memory: lower training.batch_size, data.resolution or federation.hospitals",
            "MemoryError",
            1,
        )
    advice = "" if debug else " (run again with --debug for the traceback)"
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    return f"unexpected {type(error).__name__}: {first_line}{advice}", type(error).__name__, 1


def fail(error: BaseException, as_json: bool, debug: bool) -> int:
    """Report an exception on stderr and return its exit code."""
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    message, kind, exit_code = describe_failure(error, debug)
    report_failure(message, kind, exit_code, as_json)
    return exit_code


def report_failure(message: str, kind: str, exit_code: int, as_json: bool) -> None:
    """Write one error to stderr, as a line or a JSON object."""
    note(
        json.dumps({"error": message, "kind": kind, "exit_code": exit_code})
        if as_json
        else f"fedgan: {message}"
    )


@contextlib.contextmanager
def staged_output(output: Path) -> Iterator[Path]:
    """A folder that replaces `output` on success. Raises `StorageError` for a failed write."""
    from fedgan.data.shard import staged_folder

    output = output.resolve()
    with staged_folder(output) as folder:
        try:
            yield folder
        except OSError as error:
            raise files.storage_error(output, error) from error


def refuse_existing(output: Path, what: str) -> None:
    """Raise `ConfigError` for a non-empty output, `StorageError` for one that is not writable."""
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(
            f"{shown(output)} is not empty: choose another folder for {what} with --output, "
            "or remove it"
        )
    parent = output.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise StorageError(f"{shown(parent)} is a file: choose a folder for {what} with --output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError(
            f"{shown(parent)} is not writable: choose another folder for {what} with --output"
        )
