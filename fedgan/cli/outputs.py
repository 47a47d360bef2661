"""`fedgan evaluate`, `report`, `cards`: outputs of a finished run."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgan import files
from fedgan.cli import console
from fedgan.cli.runs import checkpoint_of, headline, headline_text
from fedgan.config import Settings, from_dict, to_dict
from fedgan.errors import ConfigError, FedganError

if TYPE_CHECKING:
    from fedgan.comparison_folder import ComparisonFolder
    from fedgan.run_folder import RunFolder

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder that fedgan simulate wrote.")]
RunOrComparison = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Run folder that fedgan simulate wrote, or folder that fedgan compare wrote.",
    ),
]


def evaluate(
    run_path: Run,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change an evaluation.* key; needs --output."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Write the evaluation and its report there; leave the run unchanged.",
        ),
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Evaluate the newest round again.

    Rewrites evaluation.json and the report. With --output both go to a separate folder: use it to
    evaluate a run with other classifiers, features or merged labels. An arm of a comparison always
    needs --output.
    """
    from fedgan.report.cards.collect import comparison_of
    from fedgan.report.run.report import write_report
    from fedgan.run_folder import RunFolder

    run = RunFolder.at(run_path)
    checkpoint_of(run.path)
    if output is not None:
        console.refuse_existing(output, "the evaluation")
    if output is None and comparison_of(run.path) is not None:
        raise ConfigError(
            f"{console.shown(run.path)} is an arm of a comparison; only fedgan compare may replace "
            "its evaluation: give --output DIR for a separate one"
        )
    if overrides and output is None:
        raise ConfigError(
            "--set would make the run's evaluation.json differ from its config.toml: "
            "give --output DIR as well"
        )
    if stray := [text for text in overrides or [] if not text.strip().startswith("evaluation.")]:
        raise ConfigError(
            f"'{stray[0]}' is no evaluation.* key: the training of a finished run cannot be changed"
        )
    from fedgan.runs.lock import locked
    from fedgan.runs.preparation import with_absolute_paths

    settings = with_absolute_paths(
        from_dict(to_dict(run.settings()), overrides or [], source=str(run.config))
    )
    with (
        locked(run),
        console.stdout_for_results(),
        nullcontext(run.path) if output is None else console.staged_output(output) as folder,
    ):
        target = RunFolder(folder)
        if output is not None:
            _copy_run_facts(run, settings, target)
        _evaluate(run, settings, target)
        write_report(target)
    numbers = headline(run if output is None else RunFolder.at(output))
    console.emit(numbers, as_json, headline_text(numbers))


def report(
    run_path: RunOrComparison,
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            "--tensorboard",
            metavar="DIR",
            help="Also write the rounds as TensorBoard scalars to a new or empty folder.",
        ),
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Rewrite the report of a run or comparison.

    Trains and evaluates nothing. --tensorboard needs the extra fedgan[tracking].
    """
    from fedgan.comparison_folder import ComparisonFolder
    from fedgan.report.comparison.report import write_comparison_report
    from fedgan.report.run.report import write_report
    from fedgan.report.tensorboard import write_tensorboard

    run = ComparisonFolder.at(run_path)
    run.settings()
    if tensorboard is not None:
        run.refuse_comparison()
        console.refuse_existing(tensorboard, "the event files")
        write_tensorboard(run, tensorboard)
    path = write_comparison_report(run.path) if _is_comparison(run) else write_report(run)
    result, text = {"run": str(run.path), "report": str(path)}, f"report      {console.shown(path)}"
    if tensorboard is not None:
        result["tensorboard"] = str(tensorboard.resolve())
        text += f"\ntensorboard {console.shown(tensorboard)}"
    console.emit(result, as_json, text)


def cards(
    run_path: RunOrComparison,
    as_json: console.Json = False,
) -> None:
    """Write the model card and the dataset card.

    For a run or comparison, as Markdown and JSON. Trains and evaluates nothing. Missing facts are
    blanks that name who fills them in.
    """
    from fedgan.comparison_folder import ComparisonFolder
    from fedgan.report.cards import write_cards, write_comparison_cards

    run = ComparisonFolder.at(run_path)
    run.settings()
    written = write_comparison_cards(run.path) if _is_comparison(run) else write_cards(run)
    result = {"run": str(run.path), "cards": [str(path) for path in written]}
    console.emit(
        result, as_json, "\n".join(f"card        {console.shown(path)}" for path in written)
    )


def _is_comparison(run: ComparisonFolder) -> bool:
    """Whether this is a comparison, finished or not: an unfinished one has arms but no numbers."""
    return run.comparison.is_file() or run.arms.is_dir()


def _copy_run_facts(run: RunFolder, settings: Settings, target: RunFolder) -> None:
    """Copy the files that the report needs, with other settings of the evaluator."""
    files.write_json(target.evaluated_run, {"run": str(run.path)})
    target.write_settings(settings)
    for source, copy in (
        (run.environment, target.environment),
        (run.hospitals, target.hospitals),
        (run.metrics, target.metrics),
    ):
        if source.is_file():
            files.write_bytes(copy, source.read_bytes())
    for picture in sorted(run.samples.glob("*.png")):
        files.write_bytes(target.samples / picture.name, picture.read_bytes())


def _evaluate(run: RunFolder, settings: Settings, target: RunFolder) -> None:
    """Write the final evaluation of the run's newest round to `target`."""
    from fedgan.runs.evaluator import Evaluator
    from fedgan.runs.preparation import evaluation_hospitals
    from fedgan.training.checkpoint import load_generator

    generator, meta = load_generator(checkpoint_of(run.path))
    budget = {
        key: meta[key]
        for key in ("round", "images_seen", "wall_seconds", "bytes_exchanged", "label_names")
    }
    facts = {"arm": _arm_of(run), "name": settings.name, **budget}
    hospitals = evaluation_hospitals(settings, run)
    Evaluator(settings, target, hospitals, progress=console.note).evaluate_final(generator, facts)


def _arm_of(run: RunFolder) -> str | None:
    """Arm in a run's evaluation; without one "federated", or None for an arm of a comparison."""
    from fedgan.report.cards.collect import comparison_of

    try:
        evaluation = run.read_json(run.evaluation)
    except FedganError:  # damaged: this evaluation replaces it
        evaluation = None
    arm = evaluation.get("arm") if isinstance(evaluation, dict) else None
    return str(arm) if arm else None if comparison_of(run.path) else "federated"
