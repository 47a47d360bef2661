"""`fedgan generate`: synthetic images of a run as PNG files, as a shard, or as a release."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedgan import files
from fedgan.cli import console, label_sampling, release
from fedgan.cli.audit import Shards
from fedgan.cli.runs import checkpoint_of
from fedgan.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

CHUNK = 1024  # images in memory at once


class Format(StrEnum):
    """What `generate` writes."""

    PNG = "png"
    SHARD = "shard"


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
        typer.Option("--label", help="Class to generate; may be repeated, equally often each."),
    ] = None,
    vector: Annotated[
        list[str] | None,
        typer.Option(
            "--vector", metavar="1,0,1", help="Label vector to generate; may be repeated."
        ),
    ] = None,
    labels_from: Annotated[
        str | None,
        typer.Option(
            "--labels-from",
            metavar="mix|SHARD",
            help="Labels as frequent as in the run's training images (mix) or in a shard.",
        ),
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            "--mix",
            metavar="CLASS=SHARE,…",
            help="Share of each class, e.g. normal=0.7,pneumonia=0.3; others 0.",
        ),
    ] = None,
    psi: Annotated[
        float,
        typer.Option(
            "--psi",
            min=0.0,
            max=1.0,
            help="Truncation; 1: none, smaller: more typical, less varied images.",
        ),
    ] = 1.0,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, help="Seed of the latents; the same seed gives the same images."
        ),
    ] = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images per batch.")] = 64,
    form: Annotated[
        Format, typer.Option("--format", help="PNG files with labels.csv, or one shard.")
    ] = Format.PNG,
    as_release: Annotated[
        bool,
        typer.Option(
            "--release",
            help="Write a release: PNG files in folders, labels.csv, a card, checksums.",
        ),
    ] = False,
    release_filter: Annotated[
        bool,
        typer.Option(
            "--release-filter",
            help="With --release: replace images too near to a training image.",
        ),
    ] = False,
    shards: Shards = None,
    created: Annotated[
        str | None,
        typer.Option(
            "--created",
            metavar="DATE",
            help="Date on the card of --release, e.g. 2026-05-31.",
        ),
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Generate synthetic images, by class or by label vector.

    Without --label, --vector, --mix or --labels-from, each class is equally often; a model
    whose labels may occur together (chest findings) follows the run's training images, or, where
    the run was private, gives each label alone, and none, equally often.
    """
    choice = label_sampling.LabelChoice(label or [], vector or [], labels_from, mix or [])
    if created is not None and not as_release:
        raise ConfigError("--created is a date on the card of a release: give --release as well")
    if (release_filter or shards) and not (as_release and release_filter):
        raise ConfigError(
            "--release-filter and --shards belong to a release: give --release --release-filter"
        )
    if as_release:
        release.check_release(form is Format.PNG, created)
    console.refuse_existing(output, "the images")
    checkpoint = checkpoint_of(source)
    run = release.run_of_checkpoint(checkpoint) if as_release else None
    from fedgan.training.checkpoint import load_generator

    generator, meta = load_generator(checkpoint)
    vectors = label_sampling.requested_labels(meta, checkpoint, images, choice, seed)
    filtered = (
        release.filtered_release(
            run, generator, meta, vectors, shards, psi=psi, seed=seed, batch=batch
        )
        if run and release_filter
        else None
    )
    filter_facts = None
    with console.staged_output(output) as folder:
        chunks = filtered.chunks() if filtered else _chunks(generator, vectors, psi, seed, batch)
        if form is Format.SHARD:
            _write_shard(folder, chunks, meta, vectors, psi=psi, seed=seed)
        else:
            per_folder = release.FILES_PER_FOLDER if run else 0
            _write_pngs(folder, chunks, meta, vectors, per_folder)
        if run:
            label_mix = choice.description(
                bool(meta["exclusive"]),
                labelled=bool(meta["label_names"]),
                private=label_sampling.is_private(meta),
            )
            filter_facts = filtered.summary() if filtered else None
            release.write_card_and_checksums(
                folder,
                run,
                meta,
                vectors,
                label_mix=label_mix,
                seed=seed,
                psi=psi,
                created=created,
                release_filter=filter_facts,
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
    per_label = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    lines = [f"{images} synthetic images in {console.shown(output)}"]
    lines[0] += f" ({per_label})" if per_label else ""
    if filter_facts:
        result["release_filter"] = filter_facts
        lines.append(release.release_filter_text(filter_facts))
    if run:
        card = console.shown(output / "dataset_card.md")
        lines.append(f"card        {card}: fill in its blanks")
    console.emit(result, as_json, "\n".join(lines))


# Number of the first image of a chunk, images (n, C, H, W) uint8, and the seed of each one's latent
# (n,)
Chunks = Iterable[tuple[int, "np.ndarray", "np.ndarray"]]


def _chunks(generator: Any, vectors: np.ndarray, psi: float, seed: int, batch: int) -> Chunks:
    """Generate images in chunks; all latents come from one seed."""
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
    folder: Path, chunks: Chunks, meta: dict[str, Any], vectors: np.ndarray, per_folder: int = 0
) -> None:
    """Write one PNG per image, and labels.csv with file, one column per label, seed and index.

    `per_folder`: images per sub-folder; 0: no sub-folders.
    """
    from PIL import Image

    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["file", *meta["label_names"], "seed", "index"])
    digits, marks = max(5, len(str(len(vectors) - 1))), release.synthetic_marks()
    for start, images, seeds in chunks:
        for index, image in enumerate(images, start):
            picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
            parent = f"images/{index // per_folder:03d}/" if per_folder else ""
            name = f"{parent}{index:0{digits}d}.png"
            if per_folder and index % per_folder == 0:
                (folder / parent).mkdir(parents=True)
            picture.save(folder / name, pnginfo=marks)
            rows.writerow([name, *vectors[index].tolist(), int(seeds[index - start]), index])
    files.write_text(folder / "labels.csv", table.getvalue())


def _write_shard(
    folder: Path, chunks: Chunks, meta: dict[str, Any], vectors: np.ndarray, psi: float, seed: int
) -> None:
    """Write a shard with all images in the training split and one synthetic patient per image."""
    from fedgan.data.shard import write_shard

    folder.rmdir()  # write_shard creates its folder atomically
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
        notes=["synthetic: made by a generative model, shows no patient"],
    )
