"""`fedgan outbound`: the messages that left a hospital, from its outbound log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgan.cli import console
from fedgan.cli.ledger import ledger_folders
from fedgan.errors import DataError

if TYPE_CHECKING:
    from fedgan.exchange.outbound_log import Entry, OutboundLog, Record

COLUMNS = ("time", "experiment", "round", "message", "arrays", "values", "bytes", "sha256", "")
HASH_DIGITS = 12  # of a hash in the table


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
    """List the messages that left a hospital.

    Shows time, round, content and bytes of each. Checks the hashes of the log and reports changed
    lines.
    """
    experiment = _experiment(path)
    summaries = [_summary(log, experiment) for log in find_logs(path)]
    summaries = [summary for summary in summaries if summary["messages"] or experiment is None]
    if not summaries:
        raise DataError(
            f"the outbound logs at {console.shown(path)} hold no message of this run: did it begin?"
        )
    console.emit({"logs": summaries}, as_json, "\n\n".join(map(_text, summaries)))


def find_logs(path: Path) -> list[OutboundLog]:
    """The outbound logs at `path`, sorted. Raises `DataError` where there is none."""
    from fedgan.exchange.outbound_log import NAME, OutboundLog

    files = [path] if path.is_file() else [folder / NAME for folder in ledger_folders(path)]
    logs = [log for log in map(OutboundLog, files) if log.numbers()]
    if not logs:
        raise DataError(
            f"no outbound log at {console.shown(path)}: give the state-dir of a deployed hospital, "
            "a shard that was trained on, or a run folder"
        )
    return logs


def _experiment(path: Path) -> str | None:
    """Experiment of the run in `path`; None where `path` is no run."""
    from fedgan.run_folder import RunFolder

    if not (path / "config.toml").is_file():
        return None
    run = RunFolder.at(path)
    return str((run.read_json(run.environment) or {}).get("experiment", ""))


def _summary(log: OutboundLog, experiment: str | None) -> dict[str, Any]:
    """One log as JSON. `experiment`: only the messages of this one."""
    from dataclasses import asdict

    reading = log.read()
    entries = [entry for entry in reading.entries if experiment in (None, entry.experiment)]
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
        "contents": _contents(entries),
    }


def _contents(entries: list[Entry]) -> dict[str, dict[str, Any]]:
    """By kind of message and record: names of values, and parts of arrays, over all messages."""
    contents: dict[str, dict[str, Any]] = {}
    for entry in entries:
        records = contents.setdefault(entry.message, {})
        for record in entry.records:
            if record["kind"] == "arrays":
                names = sorted({str(row[0]).partition("/")[0] for row in record["arrays"]})
            else:
                names = list(record["values"])
            records[record["name"]] = sorted({*records.get(record["name"], []), *names})
    return contents


def _text(summary: dict[str, Any]) -> str:
    table = [COLUMNS, *(_row(message) for message in summary["messages"])]
    lines = [summary["path"], *console.table_lines(table, indent="  ")]
    totals = summary["totals"]
    errors = f" (errors: {totals['errors']})" if totals["errors"] else ""
    lines.append(f"  total: {totals['messages']:,} messages{errors}, {totals['bytes']:,} bytes")
    for message, records in summary["contents"].items():
        lines += [f"  {message} {name}: {', '.join(names)}" for name, names in records.items()]
    if changed := summary["changed_lines"]:
        lines.append(f"  changed after writing: {', '.join(changed)}")
    if count := summary["unfinished_lines"]:
        lines.append(f"  unfinished or damaged: {count} lines (unfinished messages were not sent)")
    if missing := summary["missing_parts"]:
        lines.append(
            f"  missing: {len(missing)} parts of this log, the first is {missing[0]} (moved?)"
        )
    return "\n".join(lines)


def _row(message: dict[str, Any]) -> tuple[str, ...]:
    records: list[Record] = message["records"]
    arrays = sum(len(record["arrays"]) for record in records if record["kind"] == "arrays")
    values = sum(len(record["values"]) for record in records if record["kind"] == "values")
    errors = [record["values"] for record in records if record["kind"] == "error"]
    return (
        message["time"],
        message["experiment"],
        str(message["round"]) if message["round"] else "-",
        message["message"],
        str(arrays),
        str(0 if errors else values),
        f"{message['bytes']:,}",
        message["sha256"][:HASH_DIGITS],
        json.dumps(errors[0]["reason"])[1:-1] if errors else "",
    )
