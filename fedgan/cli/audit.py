"""`fedgan audit`: privacy attacks on the generator of a finished run, per hospital."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgan import files
from fedgan.cli import console
from fedgan.cli.audit_subject import load_audited_model, open_run_hospitals, select_hospitals
from fedgan.cli.runs import checkpoint_of
from fedgan.errors import ConfigError

if TYPE_CHECKING:
    from fedgan.audit.audit import HospitalAudit
    from fedgan.audit.subject import AuditedModel, AuditSettings, OnProgress
    from fedgan.data.federation import Hospital
    from fedgan.run_folder import RunFolder

Shards = Annotated[
    Path | None,
    typer.Option(
        "--shards",
        metavar="DIR",
        help="The hospitals' shards, or one hospital's, if they were moved.",
    ),
]


def audit(
    run_path: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder that fedgan simulate wrote.")
    ],
    images: Annotated[
        int,
        typer.Option("--images", "-n", min=50, help="Synthetic images per hospital."),
    ] = 2000,
    shadows: Annotated[
        int,
        typer.Option(
            "--shadows",
            min=0,
            help="Shadow trainings per hospital, an even number; the most expensive part.",
        ),
    ] = 0,
    shadow_kimg: Annotated[
        float,
        typer.Option(
            "--shadow-kimg", min=0.001, help="Images seen by one shadow model, in thousands."
        ),
    ] = 2.0,
    canaries: Annotated[
        int,
        typer.Option(
            "--canaries",
            min=0,
            help="Canaries of each kind (200 or more) in one more private training per hospital.",
        ),
    ] = 0,
    canary_kimg: Annotated[
        float,
        typer.Option(
            "--canary-kimg",
            min=0.0,
            help="Images seen by that training, in thousands; 0: as in the run.",
        ),
    ] = 0.0,
    hospital: Annotated[
        list[str] | None,
        typer.Option(
            "--hospital", metavar="NAME", help="Audit this hospital only; may be repeated."
        ),
    ] = None,
    shards: Shards = None,
    projected: Annotated[
        int,
        typer.Option(
            "--projected",
            min=0,
            help="Training images, and as many held-out ones, to project; 0: none.",
        ),
    ] = 64,
    embedding_steps: Annotated[
        int,
        typer.Option(
            "--embedding-steps",
            min=1,
            help="Training steps of the contrastive copy detector.",
        ),
    ] = 300,
    psi: Annotated[
        float,
        typer.Option(
            "--psi",
            min=0.0,
            max=1.0,
            help="Truncation of the audited images, as in the release.",
        ),
    ] = 1.0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed; the same seed gives the same numbers.")
    ] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Write audit.json there; pictures of pairs still go to RUN/hospitals/NAME/audit.",
        ),
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Attack a finished run: copies, membership, projection, and the ε of a private run.

    Writes audit.json: numbers only, each beside the same figure for held-out real images. It is
    valid only if its controls passed. Pictures of the nearest pairs stay in the hospital's folder.
    """
    from fedgan.run_folder import RunFolder

    run = RunFolder.at(run_path)
    checkpoint = checkpoint_of(run.path)
    if shadows % 2:
        raise ConfigError(
            f"--shadows {shadows}: shadow models come in pairs that share the images: "
            "give an even number"
        )
    if output is not None:
        console.refuse_existing(output, "the audit")
    from fedgan.audit.audit import audit_hospitals, audit_report
    from fedgan.audit.canaries import check_has_claim
    from fedgan.audit.subject import AuditSettings
    from fedgan.runs.lock import locked

    chosen = AuditSettings(
        seed,
        images,
        projected,
        embedding_steps=embedding_steps,
        shadows=shadows,
        shadow_kimg=shadow_kimg,
        canaries=canaries,
        canary_kimg=canary_kimg,
        psi=psi,
    )
    with locked(run), console.stdout_for_results():
        settings = run.settings()
        if canaries:
            check_has_claim(settings)
        hospitals = select_hospitals(open_run_hospitals(settings, run, shards), hospital or [])
        if shadows:
            total = shadows * len(hospitals)
            console.note(
                f"{total} shadow trainings of {shadow_kimg:g} kimg: "
                f"{total * shadow_kimg:g} kimg in total"
            )
        audited, meta = load_audited_model(checkpoint, settings)
        with progress_reporter(len(hospitals)) as on_progress:
            found = audit_hospitals(audited, hospitals, chosen, on_progress)
            tested = _test_claims(audited, hospitals, chosen, on_progress) if canaries else {}
        report = audit_report(found, audited, chosen, meta.get("round"), str(meta["sha256"]))
        report["notes"] += tested.pop("notes", [])
        report |= tested
        path = (output.resolve() / run.audit.name) if output else run.audit
        pictures = write_pictures(run, found)
        files.write_json(path, report)
        if output is None and run.report.is_file():
            from fedgan.report.run.report import write_report

            write_report(run)
    _emit(report, path, pictures, as_json)


def _test_claims(
    audited: AuditedModel,
    hospitals: Sequence[Hospital],
    chosen: AuditSettings,
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Sections `canaries` and `notes` of audit.json."""
    from fedgan.audit.canaries import EVIDENCE, audit_canaries

    if missing := [one.name for one in hospitals if one.name not in audited.trainings]:
        raise ConfigError(
            f"--canaries: the checkpoint has no plan of {missing[0]}'s training: it is not among "
            "the run's participants"
        )
    found = [
        audit_canaries(
            audited.settings,
            one.train,
            audited.trainings[one.name],
            chosen.canaries,
            chosen.canary_kimg,
            on_progress,
        )
        for one in hospitals
    ]
    return {"canaries": found, "notes": [EVIDENCE]}


def write_pictures(run: RunFolder, found: Sequence[HospitalAudit]) -> list[Path]:
    """Write each hospital's pairs of images to its own folder only; returns the folders."""
    from fedgan.evaluation.grids import png_bytes

    folders = []
    for one in found:
        folder = run.hospital_state(one.numbers["name"]) / "audit"
        for space, picture in one.pictures.items():
            files.write_bytes(folder / f"pairs-{space}.png", png_bytes(picture))
        if one.pictures:
            folders.append(folder)
    return folders


@contextmanager
def progress_reporter(hospitals: int) -> Iterator[OnProgress]:
    """Progress on stderr: a spinner with the time on a terminal, plain lines elsewhere."""
    if not sys.stderr.isatty():
        yield lambda text: console.note(f"{text} ...")
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(f"auditing {hospitals} hospitals", total=None)
        yield lambda text: bars.update(task, description=text)


def _emit(report: dict[str, Any], path: Path, pictures: list[Path], as_json: bool) -> None:
    from fedgan.audit.audit import headline

    result = {
        "audit": str(path),
        "valid": report["valid"],
        "headline": headline(report),
        "hospitals": {
            hospital["name"]: {"valid": hospital["valid"], "signs": hospital["signs"]}
            for hospital in report["hospitals"]
        },
        "pictures": [str(folder) for folder in pictures],
    }
    lines = [headline_text(report), *(hospital_text(hospital) for hospital in report["hospitals"])]
    lines += [canary_text(entry) for entry in report.get("canaries", [])]
    lines += [
        f"pictures    {console.shown(folder)}: show patients, keep them in the hospital"
        for folder in pictures
    ]
    console.emit(result, as_json, "\n".join([*lines, f"audit       {console.shown(path)}"]))


def headline_text(report: dict[str, Any]) -> str:
    """The verdict, one line per sentence."""
    from fedgan.audit.audit import headline

    return "\n".join(f"verdict     {line}" for line in headline(report).splitlines())


def hospital_text(hospital: dict[str, Any]) -> str:
    """One hospital's figures in three lines."""
    copies = [
        f"{space} {found['copying_share']:.1%} (held-out {found['held_out_share']:.1%})"
        for space, found in hospital["copies"].items()
        if found
    ]
    attacks = [
        f"{row['attack']} {row['auc']:.2f} (held-out {row['null_auc']:.2f})"
        for row in hospital["membership"]
    ]
    power = [
        f"{space} {found['outliers']} (finds one copy with {found['power']['one']:.0%}, 1 % with "
        f"{found['power']['1 %']:.0%})"
        for space, found in hospital["copies"].items()
        if found
    ]
    lines = [f"copies      {hospital['name']}: {', '.join(copies) or 'not measured'}"]
    lines.append(f"single      {hospital['name']}: {', '.join(power) or 'not measured'}")
    lines.append(f"membership  {hospital['name']}, AUC: {', '.join(attacks) or 'not measured'}")
    return "\n".join(lines)


def canary_text(entry: dict[str, Any]) -> str:
    """One hospital's empirical ε, by kind of canaries, beside the ledger's."""
    bounds = [
        f"{kind} at least {found['epsilon_low']:.2f} ({found['correct']} of {found['guesses']})"
        for kind, found in entry["kinds"].items()
    ]
    stated = "infinite" if entry["epsilon"] is None else f"{entry['epsilon']:.2f}"
    return f"epsilon     {entry['name']}: {', '.join(bounds)}; ledger {stated}"
