"""`fedgan compare`: centralised, federated and local training of one scenario, one evaluator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fedgan.cli import console
from fedgan.cli.runs import REPOSITORY, Overrides, folder_name
from fedgan.config import load_scenario
from fedgan.errors import FederationError, MachineError


def compare(
    scenario: Annotated[
        Path,
        typer.Argument(
            metavar="SCENARIO.toml",
            help="The study, e.g. simulations/three_hospitals_compare.toml.",
        ),
    ],
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", min=1, help="Trainings of each arm. [default: comparison.seeds]"),
    ] = None,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Comparison folder to write. [default: runs/NAME]"
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", min=1, help="Most trainings at once. [default: as many as the cores hold]"
        ),
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Train and evaluate every arm of a scenario at one budget.

    Writes the report. Finished arms are kept: the same command continues a stopped comparison, and
    adds seeds or arms.
    """
    from fedgan.comparison_folder import ComparisonFolder

    changes = [*(overrides or []), *([f"comparison.seeds={seeds}"] if seeds else [])]
    settings = load_scenario(scenario, changes)
    folder = ComparisonFolder.at(output or Path("runs") / folder_name(settings.name))
    try:
        import simulations.comparison.compare
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("simulations", "server", "client"):
            raise
        raise MachineError(REPOSITORY) from None
    from fedgan.cli.compare_progress import CompareProgress
    from fedgan.report.cards import write_comparison_cards
    from fedgan.report.comparison.report import write_comparison_report

    with interruptible(), console.stdout_for_results(), CompareProgress() as progress:
        found = simulations.comparison.compare.compare(settings, folder, progress.on_event, jobs)
        report = write_comparison_report(folder.path)
        write_comparison_cards(folder.path)
    console.emit(headline(found, report), as_json, headline_text(found, report))
    if failed := [row for row in found["arms"] if row["status"] != "done"]:
        names = "; ".join(f"{row['name']}, seed {row['seed']}: {row['failure']}" for row in failed)
        raise FederationError(
            f"{len(failed)} of {len(found['arms'])} arms failed, see the report ({names}); "
            "the same command tries them again"
        )


def headline(found: dict[str, Any], report: Path) -> dict[str, Any]:
    """The main numbers, for `--json`."""
    keys = ("arm", "name", "images_seen", "macro_auc", "macro_auc_ci")
    return {
        "folder": str(report.parent),
        "report": str(report),
        "answer": found["answer"],
        "summary": [{key: row.get(key) for key in keys} for row in found["summary"]],
        "failed": [
            f"{row['name']}, seed {row['seed']}" for row in found["arms"] if row["status"] != "done"
        ],
    }


def headline_text(found: dict[str, Any], report: Path) -> str:
    """`headline` as text: one line per arm, the answer, and the path of the report."""
    width = max((len(row["name"]) for row in found["summary"]), default=0)
    lines = []
    for row in found["summary"]:
        value, interval = row.get("macro_auc"), row.get("macro_auc_ci")
        figure = "not measured" if value is None else f"{value:.3f}"
        span = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
        lines.append(f"{row['name']:<{width}}  macro AUC {figure}{span}")
    return "\n".join([*lines, "", found["answer"], f"report      {console.shown(report)}"])


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn `KeyboardInterrupt` into `Interrupted`, with the way to continue."""
    try:
        yield
    except KeyboardInterrupt:
        raise console.Interrupted(
            "stopped; the same command continues, and keeps what is finished"
        ) from None
