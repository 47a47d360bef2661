"""`fedgan ledger`: releases of a hospital's images until now, and the spent ε."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgan.cli import console
from fedgan.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fedgan.privacy.ledger import Entry, Ledger

HEADS = ("run", "released", "noise", "rate", "steps", "unit", "epsilon", "delta")


def ledger(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="Shard, folder of shards, run, or ledger file.",
        ),
    ],
    delta: Annotated[
        float | None,
        typer.Option(
            "--delta",
            metavar="DELTA",
            help="Show epsilon at this delta. Default: delta of the last entry.",
        ),
    ] = None,
    max_epsilon: Annotated[
        float | None,
        typer.Option(
            "--max-epsilon",
            metavar="EPSILON",
            help="Show how many more steps like the last ones fit into this epsilon.",
        ),
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Verify a hospital's ledger; show its releases and spent ε."""
    if delta is not None and not 0 < delta < 1:
        raise ConfigError(
            f"--delta {delta:g}: epsilon is defined for 0 < delta < 1 only, "
            "e.g. one over the number of images"
        )
    if max_epsilon is not None and not max_epsilon > 0:
        raise ConfigError(f"--max-epsilon {max_epsilon:g}: give a budget above 0")
    found = [_account(ledger, delta, max_epsilon) for ledger in find_ledgers(path)]
    console.emit({"ledgers": found}, as_json, "\n\n".join(map(_text, found)))


def find_ledgers(path: Path) -> list[Ledger]:
    """The ledgers at `path`, sorted. Raises `DataError` where there is none."""
    from fedgan.privacy.ledger import Ledger
    from fedgan.privacy.register import existing_ledger, ledger_at

    if path.is_file():
        return [ledger_at(path)]
    ledgers = [existing_ledger(folder) for folder in ledger_folders(path)]
    # The run's own, whose units are hospitals (server/aggregation/client_level_dp.py), comes first.
    ledgers = [Ledger(file) for file in sorted(path.glob("hospital-ledger.jsonl"))] + [
        each for each in ledgers if each.exists()
    ]
    if not ledgers:
        raise DataError(
            f"no privacy ledger at {console.shown(path)}: give a shard that was trained on with "
            "privacy, or a run folder"
        )
    return ledgers


def ledger_folders(path: Path) -> list[Path]:
    """Folders at `path` that may hold a ledger, sorted."""
    folders = [path, *_subfolders(path)]
    if (path / "config.toml").is_file():
        shards = _shards_of_run(path)
        folders += [*_subfolders(path / "hospitals"), *_subfolders(path / "shards"), *shards]
    return list(dict.fromkeys(folder.resolve() for folder in folders))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _shards_of_run(path: Path) -> list[Path]:
    """The shards of the run in `path`."""
    from fedgan.run_folder import RunFolder

    root = RunFolder.at(path).settings().data.root
    return [Path(root), *_subfolders(Path(root))] if root else []


def _account(ledger: Ledger, delta: float | None, max_epsilon: float | None) -> dict[str, Any]:
    """One ledger as JSON; an infinite ε is null."""
    from fedgan.privacy.ledger import JointLedger
    from fedgan.privacy.register import related_ledgers

    entries = ledger.entries()
    related = related_ledgers(ledger)
    at = delta if delta is not None else entries[-1].delta if entries else None
    total = JointLedger([ledger, *related]).epsilon(at) if at is not None else 0.0
    account: dict[str, Any] = {
        "path": console.shown(ledger.path),
        "entries": len(entries),
        "runs": len({entry.run for entry in entries}),
        "contents": len({entry.data for entry in entries}),
        "releases": _releases(entries),
        "epsilon": _finite(total),
        "delta": at,
        "related": [console.shown(other.path) for other in related],
    }
    if max_epsilon is not None and entries and at is not None:
        last = entries[-1].mechanism
        account |= {
            "max_epsilon": max_epsilon,
            "steps_left": ledger.steps_left(
                last, 10**8, at, max_epsilon, entries[-1].run, entries[-1].part
            ),
        }
        account |= {
            "steps_like": {
                "noise_multiplier": last.noise_multiplier,
                "sample_rate": last.sample_rate,
            }
        }
    return account


def _releases(entries: list[Entry]) -> list[dict[str, Any]]:
    """One row per group of successive entries that differ in their steps only.

    `epsilon`: after the last of them.
    """

    def key(entry: Entry) -> tuple[Any, ...]:
        return (
            entry.run,
            entry.kind,
            entry.noise_multiplier,
            entry.sample_rate,
            entry.unit,
            entry.delta,
            entry.data,
        )

    rows = []
    for _, group in itertools.groupby(entries, key):
        members = list(group)
        last = members[-1]
        rows.append(
            {
                "run": last.run,
                "kind": last.kind,
                "noise_multiplier": last.noise_multiplier,
                "sample_rate": last.sample_rate,
                "steps": sum(member.steps for member in members),
                "unit": last.unit,
                "epsilon": last.epsilon,
                "delta": last.delta,
                "started": members[0].time,
                "ended": last.time,
            }
        )
    return rows


def _text(account: dict[str, Any]) -> str:
    lines = [account["path"]]
    if not account["entries"]:
        return f"{lines[0]}\n  no release yet"
    table = [HEADS]
    for row in account["releases"]:
        numbers = (
            f"{row['noise_multiplier']:.4g}",
            f"{row['sample_rate']:.4g}",
            f"{row['steps']:,}",
        )
        table.append(
            (
                row["run"],
                row["kind"],
                *numbers,
                row["unit"],
                _number(row["epsilon"]),
                f"{row['delta']:.3g}",
            )
        )
    lines += console.table_lines(table, indent="  ")
    runs, entries = account["runs"], account["entries"]
    count = f"{entries} {'entry' if entries == 1 else 'entries'}"
    count += f" of {runs} {'run' if runs == 1 else 'runs'}"
    total = f"epsilon {_number(account['epsilon'])} at delta {account['delta']:.3g}"
    lines.append(f"  spent: {total}, over {count}; no entry is missing or changed")
    lines.append("  runs without privacy are not entered: nothing bounds what they reveal")
    if account["related"]:
        others = ", ".join(account["related"])
        lines.append(f"  the largest of this ledger and those with images in common: {others}")
    if account["contents"] > 1:
        lines.append(
            f"  the shard's content changed: {account['contents']} versions share this ledger"
        )
    if "steps_left" in account:
        like = account["steps_like"]
        step = f"noise {like['noise_multiplier']:.4g} and rate {like['sample_rate']:.4g}"
        lines.append(
            f"  {account['steps_left']:,} more steps with {step} fit into "
            f"epsilon {account['max_epsilon']:g}"
        )
    return "\n".join(lines)


def _number(epsilon: float | None) -> str:
    return "infinite" if epsilon is None else f"{epsilon:.4g}"


def _finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None
