"""`fedgan demo`, `simulate`, `resume`: from a scenario to a run folder with its report."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgan.cli import console
from fedgan.config import Settings, load_scenario
from fedgan.errors import CheckpointError, ConfigError, MachineError

if TYPE_CHECKING:
    from fedgan.run_folder import RunFolder

REPOSITORY = (
    "this command needs the repository, not only the installed library: "
    "clone it, then run pip install -e . in it"
)
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a key of the scenario; may be repeated. All keys: fedgan settings.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="RUN", help="Run folder to write. [default: runs/NAME]"),
]


def demo(output: Output = None, overrides: Overrides = None, as_json: console.Json = False) -> None:
    """Train three simulated hospitals; write the report.

    The images are procedural skin lesions. Takes minutes on two cores and downloads nothing.
    """
    from fedgan.run_folder import RunFolder

    scenario = shipped_scenario("three_hospitals")
    if scenario is None:
        raise MachineError(REPOSITORY)
    settings = load_scenario(scenario, overrides or [])
    folder = output or _free_folder(Path("runs/demo"))
    if output is None and folder.name != "demo":
        console.note(f"runs/demo exists: this run is written to {folder}")
    run = RunFolder.at(folder)
    _start(settings, run, as_json)
    if not as_json:
        typer.echo(f"\nReport: {run.report}\nOpen it in a browser: {run.report.as_uri()}")


def simulate(
    scenario: Annotated[
        Path,
        typer.Argument(
            metavar="SCENARIO.toml", help="Scenario, e.g. simulations/three_hospitals.toml."
        ),
    ],
    overrides: Overrides = None,
    output: Output = None,
    as_json: console.Json = False,
) -> None:
    """Train a scenario's hospitals on this machine.

    Ends with the central evaluation and the report.
    """
    from fedgan.run_folder import RunFolder

    settings = load_scenario(scenario, overrides or [])
    run = RunFolder.at(output or Path("runs") / folder_name(settings.name))
    _start(settings, run, as_json)


def resume(
    run_path: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder of a stopped or killed run.")
    ],
    as_json: console.Json = False,
) -> None:
    """Continue a stopped or killed run from its last complete round."""
    from fedgan.cli.progress import Progress
    from fedgan.run_folder import RunFolder

    run = RunFolder.at(run_path)
    run.refuse_comparison()
    run.settings()
    engine = runner()
    with console.stoppable(run), console.stdout_for_results(), Progress() as progress:
        engine.resume(run, on_event=progress.on_event)
    _finish(run, as_json)


def headline(run: RunFolder) -> dict[str, Any]:
    """The main numbers of `evaluation.json`; None for a missing one or one of another type."""
    from fedgan.report.html.format import number
    from fedgan.report.run.data import dig

    evaluation = run.read_json(run.evaluation) or {}

    def known(*keys: str) -> Any:
        value = dig(evaluation, *keys)
        return value if number(value) is not None else None

    def interval(*keys: str) -> Any:
        value = dig(evaluation, *keys)
        return value if isinstance(value, list) and len(value) == 2 else None

    extractor = dig(evaluation, "fidelity", "extractor")
    return {
        "run": str(run.path),
        "report": str(run.report),
        "images_seen": known("images_seen"),
        "wall_seconds": known("wall_seconds"),
        "bytes_exchanged": known("bytes_exchanged"),
        "real_macro_auc": known("utility", "real", "macro_auc"),
        "real_macro_auc_ci": interval("utility", "real", "macro_auc_ci"),
        "synthetic_macro_auc": known("utility", "synthetic", "macro_auc"),
        "synthetic_macro_auc_ci": interval("utility", "synthetic", "macro_auc_ci"),
        "frechet": known("fidelity", "frechet"),
        "frechet_reference": known("fidelity", "frechet_reference"),
        "extractor": extractor if isinstance(extractor, str) else None,
    }


def headline_text(numbers: dict[str, Any]) -> str:
    """`headline` as text."""
    lines = []
    if None not in (numbers[key] for key in ("images_seen", "wall_seconds", "bytes_exchanged")):
        minutes, mebibytes = numbers["wall_seconds"] / 60, numbers["bytes_exchanged"] / 2**20
        lines.append(
            f"trained     {numbers['images_seen'] / 1000:.1f} kimg in {minutes:.1f} min, "
            f"{mebibytes:.0f} MiB exchanged"
        )
    for name, title in (("real", "real images"), ("synthetic", "synthetic images only")):
        if numbers[f"{name}_macro_auc"] is not None:
            low, high = numbers[f"{name}_macro_auc_ci"] or (None, None)
            interval = (
                f" (95 % interval {low:.3f} to {high:.3f})"
                if isinstance(low, float) and isinstance(high, float)
                else ""
            )
            lines.append(
                f"macro AUC   {numbers[f'{name}_macro_auc']:.3f}{interval}, "
                f"classifier trained on {title}, tested on real images"
            )
    if numbers["frechet"] is not None:
        reference = (
            f", {numbers['frechet_reference']:.3g} between halves of the real images"
            if numbers["frechet_reference"] is not None
            else ""
        )
        lines.append(
            f"Fréchet     {numbers['frechet']:.3g}{reference} (features: {numbers['extractor']})"
        )
    return "\n".join([*lines, f"report      {console.shown(Path(numbers['report']))}"])


def _start(settings: Settings, run: RunFolder, as_json: bool) -> None:
    if run.config.is_file():
        path = console.shown(run.path)
        raise ConfigError(
            f"{path} already holds a run: continue it with fedgan resume {path}, "
            "or choose another --output"
        )
    console.refuse_existing(run.path, "the run")
    engine = runner()
    from fedgan.cli.progress import Progress

    console.note(
        f"{settings.name}: {settings.training.kimg:g} kimg in {settings.federation.rounds} rounds "
        f"→ {console.shown(run.path)}"
    )
    with console.stoppable(run), console.stdout_for_results(), Progress() as progress:
        engine.simulate(settings, run, on_event=progress.on_event)
    _finish(run, as_json)


def _finish(run: RunFolder, as_json: bool) -> None:
    from fedgan.report.cards import write_cards
    from fedgan.report.run.report import write_report

    write_report(run)
    write_cards(run)
    numbers = headline(run)
    console.emit(numbers, as_json, headline_text(numbers))


def runner() -> ModuleType:
    """The module `simulations.runner`. Raises `MachineError` where only the wheel is installed."""
    try:
        import simulations.runner
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("simulations", "server", "client"):
            raise  # a missing package such as flwr has its own message
        raise MachineError(REPOSITORY) from None
    return simulations.runner


def shipped_scenario(name: str) -> Path | None:
    """The repository's scenario `name`; None where it is missing (an installed wheel)."""
    try:
        import simulations
    except ModuleNotFoundError:
        return None
    path = Path(str(simulations.__file__)).with_name(f"{name}.toml")
    return path if path.is_file() else None


def _free_folder(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, … that is absent or empty."""
    number, candidate = 1, folder
    while candidate.exists() and (not candidate.is_dir() or any(candidate.iterdir())):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def folder_name(name: str) -> str:
    """A scenario's name as a folder name."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run"


def checkpoint_of(path: Path) -> Path:
    """The checkpoint at `path`: the file itself, or the newest of a run folder.

    Raises `CheckpointError` for no checkpoint, `ConfigError` for a folder without a run's model.
    """
    from fedgan.run_folder import RunFolder

    if path.suffix == ".safetensors":
        if not path.is_file():
            raise CheckpointError(
                f"no checkpoint at {console.shown(path)}: give a .safetensors file or a run folder"
            )
        return path
    run = RunFolder.at(path)
    run.refuse_repeated_evaluation()
    run.refuse_comparison()
    run.settings()
    newest = run.last_round()
    if newest is None:
        raise CheckpointError(
            f"{console.shown(run.path)} has no finished round yet: "
            f"fedgan resume {console.shown(run.path)}"
        )
    return run.checkpoint(newest)
