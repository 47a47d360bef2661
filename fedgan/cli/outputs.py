"""`fedgan generate`, `evaluate`, `report`, `cards`: what comes out of a run folder that is there already."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgan import files
from fedgan.cli import console, label_sampling, release
from fedgan.cli.audit import Shards
from fedgan.cli.runs import checkpoint_of, headline, headline_text, runner
from fedgan.config import Settings, from_dict, to_dict
from fedgan.errors import ConfigError, FedganError

if TYPE_CHECKING:
    import numpy as np

    from fedgan.comparison_folder import ComparisonFolder
    from fedgan.run_folder import RunFolder

CHUNK = 1024  # images in memory at once


class Format(StrEnum):
    """What `generate` writes."""

    PNG = "png"
    SHARD = "shard"


Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder that fedgan simulate wrote.")]
RunOrComparison = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="Run folder that fedgan simulate wrote, or folder that fedgan compare wrote.",
    ),
]


def generate(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="Run folder (its newest round) or a .safetensors file.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Folder to write; must be absent or empty."
        ),
    ],
    images: Annotated[int, typer.Option("--images", "-n", min=1, help="Number of images in all.")],
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="Class to draw; may be repeated, shared out evenly."),
    ] = None,
    vector: Annotated[
        list[str] | None,
        typer.Option("--vector", metavar="1,0,1", help="Label vector to draw; may be repeated."),
    ] = None,
    labels_from: Annotated[
        str | None,
        typer.Option(
            "--labels-from",
            metavar="mix|SHARD",
            help="Labels as in the run's training images (mix), or of a shard's images.",
        ),
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            "--mix",
            metavar="CLASS=SHARE,…",
            help="Share of each class, e.g. normal=0.7,pneumonia=0.3; 0 where none.",
        ),
    ] = None,
    psi: Annotated[
        float,
        typer.Option(
            "--psi",
            min=0.0,
            max=1.0,
            help="Truncation: 1 none, smaller is more typical, less varied.",
        ),
    ] = 1.0,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, help="Seed of the latents; the same seed gives the same images."
        ),
    ] = 0,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Images that are drawn at once.")
    ] = 64,
    form: Annotated[
        Format, typer.Option("--format", help="PNG files with labels.csv, or one shard.")
    ] = Format.PNG,
    as_release: Annotated[
        bool,
        typer.Option(
            "--release", help="A set to hand on: PNG files in folders, labels.csv, a card, hashes."
        ),
    ] = False,
    release_filter: Annotated[
        bool,
        typer.Option(
            "--release-filter",
            help="With --release: drop and redraw images too near to a training image; utility is measured again.",
        ),
    ] = False,
    shards: Shards = None,
    created: Annotated[
        str | None,
        typer.Option(
            "--created",
            metavar="DATE",
            help="Date to state in the card of --release, e.g. 2026-05-31.",
        ),
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Draw synthetic images, by class or by label vector.

    Without --label, --vector, --mix or --labels-from each class is drawn equally often; a model whose labels may
    occur together (chest findings) follows the run's training images, or, where the run was private, draws each
    label alone, and none, equally often.
    """
    choice = label_sampling.LabelChoice(label or [], vector or [], labels_from, mix or [])
    if created is not None and not as_release:
        raise ConfigError("--created stands in the card of a release: give --release as well")
    if (release_filter or shards) and not (as_release and release_filter):
        raise ConfigError(
            "--release-filter filters a release, and --shards says what it compares with: give --release --release-filter"
        )
    if as_release:
        release.check_release(form is Format.PNG, created)
    console.refuse_existing(output, "the images")
    checkpoint = checkpoint_of(source)
    run = release.run_of_checkpoint(checkpoint) if as_release else None
    from fedgan.training.checkpoint import load_generator

    generator, meta = load_generator(checkpoint)
    vectors = label_sampling.requested_labels(meta, checkpoint, images, choice, seed)
    kept = (
        release.filtered_release(
            run, generator, meta, vectors, shards, psi=psi, seed=seed, batch=batch
        )
        if run and release_filter
        else None
    )
    filtered = None
    with _folder(output) as folder:
        chunks = kept.chunks() if kept else _chunks(generator, vectors, psi, seed, batch)
        if form is Format.SHARD:
            _write_shard(folder, chunks, meta, vectors, psi=psi, seed=seed)
        else:
            _write_pngs(folder, chunks, meta, vectors, shelf=release.FILES_PER_FOLDER if run else 0)
        if run:
            asked = choice.words(
                bool(meta["exclusive"]),
                labelled=bool(meta["label_names"]),
                private=label_sampling.is_private(meta),
            )
            filtered = kept.facts() if kept else None
            release.write_card_and_checksums(
                folder,
                run,
                meta,
                vectors,
                asked=asked,
                seed=seed,
                psi=psi,
                created=created,
                release_filter=filtered,
            )
    counts = {
        name: int(vectors[:, column].sum()) for column, name in enumerate(meta["label_names"])
    }
    result = {
        "output": str(output.resolve()),
        "checkpoint": str(checkpoint),
        "images": images,
        "counts": counts,
        "seed": seed,
        "psi": psi,
    }
    if run:
        result["card"] = str(output.resolve() / "dataset_card.md")
    if filtered:
        result["release_filter"] = filtered
    told = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    line = f"{images} synthetic images in {console.shown(output)}{f' ({told})' if told else ''}"
    papers = (
        f"\ncard        {console.shown(output / 'dataset_card.md')}: its blanks are yours to fill"
        if run
        else ""
    )
    console.emit(
        result,
        as_json,
        line + (f"\n{release.release_filter_text(filtered)}" if filtered else "") + papers,
    )


def evaluate(
    run_path: Run,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change an evaluation.* key, with --output."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Write a second look there and leave the run as it is.",
        ),
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Evaluate the newest round again.

    Rewrites evaluation.json and the page; with --output, writes both to a folder of their own, so that a run can be
    looked at with other classifiers, features or merged labels. An arm of a comparison always needs --output.
    """
    from fedgan.report.cards.collect import comparison_of
    from fedgan.report.run.report import write_report
    from fedgan.run_folder import RunFolder

    run = RunFolder.at(run_path)
    checkpoint_of(run.path)
    if output is not None:
        console.refuse_existing(output, "the second look")
    if output is None and comparison_of(run.path) is not None:
        raise ConfigError(
            f"{console.shown(run.path)} is an arm of a comparison, and an arm is judged by fedgan compare alone: "
            "give --output DIR for a second look"
        )
    if overrides and output is None:
        raise ConfigError(
            "--set would make the run's evaluation.json differ from its config.toml: give --output DIR as well"
        )
    if stray := [text for text in overrides or [] if not text.strip().startswith("evaluation.")]:
        raise ConfigError(
            f"'{stray[0]}' is no evaluation.* key: the training of a finished run cannot be changed"
        )
    runner()  # has a message of its own where there is no repository
    from fedgan.runs.lock import locked
    from fedgan.runs.preparation import with_absolute_paths

    settings = with_absolute_paths(
        from_dict(to_dict(run.settings()), overrides or [], source=str(run.config))
    )
    with (
        locked(run),
        console.stdout_for_results(),
        nullcontext(run.path) if output is None else _folder(output) as folder,
    ):
        place = RunFolder(folder)
        if output is not None:
            _prepare_look(run, settings, place)
        _evaluate(run, settings, place)
        write_report(place)
    place = run if output is None else RunFolder.at(output)
    numbers = headline(place)
    console.emit(numbers, as_json, headline_text(numbers))


def report(
    run_path: RunOrComparison,
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            "--tensorboard",
            metavar="DIR",
            help="Also write the rounds of a run as TensorBoard scalars, into a new or empty folder.",
        ),
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Rewrite the page from the files of a run or of a comparison.

    Trains and measures nothing. --tensorboard needs the extra fedgan[tracking].
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
    page = write_comparison_report(run.path) if _is_comparison(run) else write_report(run)
    result, text = {"run": str(run.path), "report": str(page)}, f"report      {console.shown(page)}"
    if tensorboard is not None:
        result["tensorboard"] = str(tensorboard.resolve())
        text += f"\ntensorboard {console.shown(tensorboard)}"
    console.emit(result, as_json, text)


def cards(
    run_path: RunOrComparison,
    as_json: console.Json = False,
) -> None:
    """Write the model card and the dataset card from the files of a run or of a comparison.

    Markdown and JSON. Trains and measures nothing; what no file tells is a blank that says who has to fill it.
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
    """Whether this is a comparison, be it finished or not: an unfinished one has arms and no numbers yet."""
    return run.comparison.is_file() or run.arms.is_dir()


def _prepare_look(run: RunFolder, settings: Settings, place: RunFolder) -> None:
    """Fill `place` with what the page needs of the run, under other settings of the evaluator."""
    files.write_json(place.look, {"run": str(run.path)})
    place.write_settings(settings)
    for source, target in (
        (run.environment, place.environment),
        (run.hospitals, place.hospitals),
        (run.metrics, place.metrics),
    ):
        if source.is_file():
            files.write_bytes(target, source.read_bytes())
    for picture in sorted(run.samples.glob("*.png")):
        files.write_bytes(place.samples / picture.name, picture.read_bytes())


def _evaluate(run: RunFolder, settings: Settings, place: RunFolder) -> None:
    """The final evaluation of the run's newest round, written to `place`; its name and budget are those of the run."""
    from fedgan.runs.evaluator import Evaluator
    from fedgan.runs.preparation import evaluation_hospitals
    from fedgan.training.checkpoint import load_generator

    generator, meta = load_generator(checkpoint_of(run.path))
    budget = {
        key: meta[key]
        for key in ("round", "images_seen", "wall_seconds", "bytes_exchanged", "label_names")
    }
    facts = {"arm": _arm_of(run), "name": settings.name, **budget}
    Evaluator(settings, place, evaluation_hospitals(settings, run), progress=console.note).evaluate_final(
        generator, facts
    )


def _arm_of(run: RunFolder) -> str | None:
    """The arm that a run's evaluation names. One that was never judged is federated, unless a comparison trained it."""
    from fedgan.report.cards.collect import comparison_of

    try:
        found = run.read_json(run.evaluation)
    except FedganError:  # damaged: this evaluation replaces it
        found = None
    named = found.get("arm") if isinstance(found, dict) else None
    return str(named) if named else None if comparison_of(run.path) else "federated"


# --- generate ------------------------------------------------------------------------------------


# Number of the first image of a chunk, images (n, C, H, W) uint8, and the seed of each one's latent (n,)
Chunks = Iterable[tuple[int, "np.ndarray", "np.ndarray"]]


def _chunks(generator: Any, vectors: np.ndarray, psi: float, seed: int, batch: int) -> Chunks:
    """A chunk at a time; all latents come from one seed."""
    import numpy as np
    import torch

    from fedgan.evaluation.sampling import draw_latents, generate_images

    device = "cuda" if torch.cuda.is_available() else "cpu"
    latents = draw_latents(len(vectors), generator.z_dim, seed)
    for start in range(0, len(vectors), CHUNK):
        rows = slice(start, start + CHUNK)
        images = generate_images(
            generator, vectors[rows], seed, psi, batch, device, latents=latents[rows]
        )
        yield start, images, np.full(len(images), seed)


def _write_pngs(
    folder: Path, chunks: Chunks, meta: dict[str, Any], vectors: np.ndarray, shelf: int = 0
) -> None:
    """One PNG an image and labels.csv: file, a column a label, seed, index. `shelf`: images in a sub-folder; 0: none."""
    from PIL import Image

    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["file", *meta["label_names"], "seed", "index"])
    digits, marks = max(5, len(str(len(vectors) - 1))), release.synthetic_marks()
    for start, images, seeds in chunks:
        for index, image in enumerate(images, start):
            picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
            place = f"images/{index // shelf:03d}/" if shelf else ""
            name = f"{place}{index:0{digits}d}.png"
            if shelf and index % shelf == 0:
                (folder / place).mkdir(parents=True)
            picture.save(folder / name, pnginfo=marks)
            rows.writerow([name, *vectors[index].tolist(), int(seeds[index - start]), index])
    files.write_text(folder / "labels.csv", table.getvalue())


def _write_shard(
    folder: Path, chunks: Chunks, meta: dict[str, Any], vectors: np.ndarray, psi: float, seed: int
) -> None:
    """A shard whose images are all in the training split; each image is its own patient, because it shows none."""
    from fedgan.data.shard import write_shard

    folder.rmdir()  # write_shard makes its folder whole or not at all
    count = len(vectors)
    write_shard(
        folder,
        (images for _, images, _ in chunks),
        vectors,
        patients=[f"synthetic-{index}" for index in range(count)],
        splits=["train"] * count,
        institutions=["synthetic"] * count,
        label_names=meta["label_names"],
        exclusive=meta["exclusive"],
        name="synthetic",
        source=f"fedgan generate, round {meta['round']}, seed {seed}, psi {psi:g}",
        notes=["synthetic: drawn by a generative model, shows no patient"],
    )


@contextmanager
def _folder(output: Path) -> Iterator[Path]:
    """A folder that takes the place of `output` at the end; what the system refuses while it is filled is a `StorageError`."""
    from fedgan.data.shard import staged_folder

    output = output.resolve()
    with staged_folder(output) as folder:
        try:
            yield folder
        except OSError as error:
            raise files.storage_error(output, error) from error
