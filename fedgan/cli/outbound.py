"""`fedgan outbound`: every message that left a hospital, from the log that the hospital wrote before it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgan.cli import console
from fedgan.cli.ledger import places_of
from fedgan.errors import DataError

if TYPE_CHECKING:
    from fedgan.exchange.outbound_log import Entry, OutboundLog, Record

HEADS = ("time", "experiment", "round", "message", "arrays", "values", "bytes", "sha256", "")
SHORT = 12  # digits of a hash that a table shows


def outbound(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A shard, a hospital's state-dir, a folder of shards, a run, or a log file.",
        ),
    ],
    as_json: console.Json = False,
) -> None:
    """List every message that left a hospital: when, in which round, what it held and how many bytes; check the log's hashes."""
    only = _experiment(path)
    found = [_account(log, only) for log in find_logs(path)]
    found = [account for account in found if account["messages"] or only is None]
    if not found:
        raise DataError(
            f"no message of this run is in the outbound logs at {console.shown(path)}: did it begin?"
        )
    console.emit({"logs": found}, as_json, "\n\n".join(map(_text, found)))


def find_logs(path: Path) -> list[OutboundLog]:
    """The outbound logs at `path`, sorted. Raises `DataError` where there is none."""
    from fedgan.exchange.outbound_log import NAME, OutboundLog

    files = [path] if path.is_file() else [place / NAME for place in places_of(path)]
    logs = [log for log in map(OutboundLog, files) if log.numbers()]
    if not logs:
        raise DataError(
            f"no outbound log at {console.shown(path)}: give the state-dir of a deployed hospital, a shard that was "
            "trained on, or a run folder"
        )
    return logs


def _experiment(path: Path) -> str | None:
    """The experiment of the run in `path`, whose messages alone are of interest there; None where it is no run."""
    from fedgan.run_folder import RunFolder

    if not (path / "config.toml").is_file():
        return None
    run = RunFolder.at(path)
    return str((run.read_json(run.environment) or {}).get("experiment", ""))


def _account(log: OutboundLog, only: str | None) -> dict[str, Any]:
    """What one log says, as JSON. `only`: leave out the messages of other experiments."""
    from dataclasses import asdict

    reading = log.read()
    entries = [entry for entry in reading.entries if only is None or entry.experiment == only]
    return {
        "path": console.shown(log.path),
        "messages": [asdict(entry) for entry in entries],
        "totals": {
            "messages": len(entries),
            "errors": sum(
                record["kind"] == "error" for entry in entries for record in entry.records
            ),
            "experiments": len({entry.experiment for entry in entries}),
            "bytes": sum(entry.bytes for entry in entries),
        },
        "changed_lines": reading.changed,
        "unfinished_lines": reading.unfinished,
        "missing_parts": reading.missing,
        "held": _held(entries),
    }


def _held(entries: list[Entry]) -> dict[str, dict[str, Any]]:
    """Of each kind of message all that any of them held: names of values, and arrays by their part."""
    held: dict[str, dict[str, Any]] = {}
    for entry in entries:
        names = held.setdefault(entry.message, {})
        for record in entry.records:
            if record["kind"] == "arrays":
                found = sorted({str(row[0]).partition("/")[0] for row in record["arrays"]})
            else:
                found = list(record["values"])
            names[record["name"]] = sorted({*names.get(record["name"], []), *found})
    return held


def _text(account: dict[str, Any]) -> str:
    table = [HEADS, *(_row(message) for message in account["messages"])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [account["path"]]
    lines += [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    totals = account["totals"]
    errors = f", {totals['errors']} of them errors" if totals["errors"] else ""
    lines.append(f"  in all: {totals['messages']:,} messages{errors}, {totals['bytes']:,} bytes")
    for message, records in account["held"].items():
        lines += [f"  {message} {name}: {', '.join(names)}" for name, names in records.items()]
    if account["changed_lines"]:
        lines.append(f"  changed after they were written: {', '.join(account['changed_lines'])}")
    if account["unfinished_lines"]:
        lines.append(
            f"  no entries: {account['unfinished_lines']} lines (what was never finished was not sent)"
        )
    if missing := account["missing_parts"]:
        lines.append(
            f"  not here: {len(missing)} parts of this log, {missing[0]} the first of them (moved away?)"
        )
    return "\n".join(lines)


def _row(message: dict[str, Any]) -> tuple[str, ...]:
    records: list[Record] = message["records"]
    arrays = sum(len(record["arrays"]) for record in records if record["kind"] == "arrays")
    errors = [record["values"] for record in records if record["kind"] == "error"]
    values = (
        0
        if errors
        else sum(len(record["values"]) for record in records if record["kind"] == "values")
    )
    return (
        message["time"],
        message["experiment"],
        str(message["round"]) if message["round"] else "-",
        message["message"],
        str(arrays),
        str(values),
        f"{message['bytes']:,}",
        message["sha256"][:SHORT],
        json.dumps(errors[0]["reason"])[1:-1] if errors else "",
    )
