"""`fedgan generate --release`: a synthetic set with card and checksums; metadata of synthetic PNGs.

    images/000/00000.png …    at most 1,000 per folder, each marked as synthetic
    labels.csv                file, one column per label, seed, index
    dataset_card.md, .json    contents, origin, and open fields of the set
    SHA256SUMS                checksums of all other files, for sha256sum -c

No file contains a path, time or name of this machine, so the same draw gives the same bytes.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgan import files
from fedgan.cli import console
from fedgan.errors import ConfigError, DataError
from fedgan.run_folder import RunFolder

if TYPE_CHECKING:
    import numpy as np
    from PIL import PngImagePlugin

    from fedgan.audit.release_filter import ReleaseFilter

FILES_PER_FOLDER = 1000  # images in one folder
SUMS = "SHA256SUMS"
DESCRIPTION = "Synthetic image drawn by a generative model; not taken of a patient."
# IPTC digital source type of an image by a model trained on images
# (https://cv.iptc.org/newscodes/digitalsourcetype/), in XMP, which picture archives read.
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
XMP_KEYWORD = "XML:com.adobe.xmp"
XMP = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
   <Iptc4xmpExt:DigitalSourceType>{SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


def synthetic_marks() -> PngImagePlugin.PngInfo:
    """The metadata of a synthetic PNG: text chunks, and XMP for picture archives."""
    from PIL import PngImagePlugin

    marks = PngImagePlugin.PngInfo()
    marks.add_text("synthetic", "true")
    marks.add_text("Description", DESCRIPTION)
    marks.add_text("Software", "fedgan")
    marks.add_itxt(XMP_KEYWORD, XMP)
    return marks


def check_release(png: bool, created: str | None) -> None:
    """Raise `ConfigError` for options that exclude a release. `created` is an ISO date or None."""
    if not png:
        raise ConfigError(
            "--release writes PNG files: a shard cannot hold the marks of a synthetic image, a "
            "card or checksums, and calls its images a training split; omit --format (fedgan data "
            "import csv converts the PNG files to a shard)"
        )
    if created is not None:
        try:
            datetime.date.fromisoformat(created)
        except ValueError:
            raise ConfigError(f"--created {created}: write a date such as 2026-05-31") from None


def run_of_checkpoint(checkpoint: Path) -> RunFolder:
    """The run folder of a checkpoint. Raises `ConfigError` if there is none."""
    run = RunFolder.at(checkpoint.resolve().parent.parent)
    if not run.config.is_file():
        raise ConfigError(
            f"{console.shown(checkpoint)} is not in a run folder: a release states the sources of "
            "the training images, which only the run folder contains; give the run folder"
        )
    return run


def write_card_and_checksums(
    folder: Path,
    run: RunFolder,
    meta: dict[str, Any],
    labels: np.ndarray,
    *,
    label_mix: str,
    seed: int,
    psi: float,
    created: str | None,
    release_filter: dict[str, Any] | None = None,
) -> None:
    """Write the card and then the checksums beside the images and labels.csv in `folder`.

    `labels` (N, K): label vectors of the images; `meta`: the checkpoint's; `label_mix`: the
    requested mix as text; `release_filter`: result of the filter, if any.
    """
    from fedgan.report.cards.collect import collect
    from fedgan.report.cards.subjects import Release, release_facts
    from fedgan.report.cards.writing import write_card

    release = Release(
        images=len(labels),
        counts={
            name: int(labels[:, column].sum()) for column, name in enumerate(meta["label_names"])
        },
        unlabelled=int((labels.sum(axis=1) == 0).sum()),
        label_mix=label_mix,
        seed=seed,
        psi=psi,
        meta=meta,
        created=created,
        release_filter=release_filter,
    )
    write_card(folder, "dataset_card", "card_release.md.j2", release_facts(collect(run), release))
    files.write_text(folder / SUMS, checksums(folder))


class FilteredRelease:
    """A release outside all distance thresholds; measures utility with and without the filter."""

    def __init__(
        self,
        release_filter: ReleaseFilter,
        vectors: np.ndarray,
        hospitals: Sequence[Any],
        run: RunFolder,
    ) -> None:
        from fedgan.evaluation.mixing import stratified_rows

        self.release_filter, self.vectors = release_filter, vectors
        self.hospitals, self.run, self.settings = hospitals, run, run.settings()
        count = min(len(vectors), self.settings.evaluation.images)
        # Positions on which utility is measured.
        self._measured = stratified_rows(vectors, count, self.settings.seed)
        self._before: list[np.ndarray] = []
        self._after: list[np.ndarray] = []

    def chunks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first position, images, seed of each) per chunk."""
        from fedgan.audit.release_filter import in_chunks

        for start, images, seeds, first in in_chunks(
            self.release_filter, self.vectors, FILES_PER_FOLDER
        ):
            rows = self._measured - start
            rows = rows[(rows >= 0) & (rows < len(images))]
            self._before.append(first[rows])
            self._after.append(images[rows])
            yield start, images, seeds

    def summary(self) -> dict[str, Any]:
        """Result of the filter, for the card; call after `chunks` has ended. Trains classifiers."""
        import numpy as np

        from fedgan.audit.release_filter import MAX_DRAWS, PERCENTILE, utility_before_and_after
        from fedgan.data.dataset import ImageDataset
        from fedgan.evaluation.reference import RealReference, pool_hospitals
        from fedgan.runs.evaluator import evaluation_device

        known, filtered = self.run.hospital_rows(), self.release_filter
        train, val, test = (
            pool_hospitals(
                [(hospital.name, getattr(hospital, split)) for hospital in self.hospitals], split
            )
            for split in ("train", "val", "test")
        )
        settings, labels = self.settings, self.vectors[self._measured]
        before, after = (
            ImageDataset(
                "synthetic", np.concatenate(part), labels, train.label_names, train.exclusive
            )
            for part in (self._before, self._after)
        )
        reference = RealReference(
            train, val, test, settings.evaluation, settings.seed, evaluation_device(settings)
        )
        return {
            "space": "pixels",
            "percentile": PERCENTILE,
            "most_draws": MAX_DRAWS,
            "hospitals_compared": len(self.hospitals),
            "hospitals_trained": max(len(known), len(self.hospitals)),
            "drawn": filtered.drawn,
            "replaced": filtered.redrawn,
            "dropped": dict(filtered.dropped),
            "utility": utility_before_and_after(reference, before, after, console.note),
        }


def filtered_release(
    run: RunFolder,
    generator: Any,
    meta: dict[str, Any],
    vectors: np.ndarray,
    shards: Path | None,
    *,
    psi: float,
    seed: int,
    batch: int,
) -> FilteredRelease:
    """The release of `--release-filter`, ready to draw.

    Raises if the hospitals' images are absent, or for a private run.
    """
    from fedgan.audit.release_filter import ReleaseFilter, check_release_filter, distance_thresholds
    from fedgan.cli.audit_subject import open_run_hospitals
    from fedgan.evaluation.sampling import draw_latents, generate_images
    from fedgan.runs.evaluator import evaluation_device

    settings = run.settings()
    check_release_filter(settings)
    hospitals = open_run_hospitals(settings, run, shards)
    device = evaluation_device(settings)
    latents = functools.lru_cache(maxsize=2)(
        lambda own_seed: draw_latents(len(vectors), generator.z_dim, own_seed)
    )

    def draw(labels: np.ndarray, own_seed: int, positions: np.ndarray) -> np.ndarray:
        return generate_images(
            generator, labels, own_seed, psi, batch, device, latents=latents(own_seed)[positions]
        )

    train = hospitals[0].train
    if (train.label_names, train.images.shape[1:]) != (
        tuple(meta["label_names"]),
        (meta["channels"], *2 * (meta["resolution"],)),
    ):
        raise DataError(
            f"the shard of '{train.name}' differs from the model in labels, channels or size: "
            "give the run's own shards"
        )
    return FilteredRelease(
        ReleaseFilter(distance_thresholds(hospitals), draw, seed), vectors, hospitals, run
    )


def release_filter_text(summary: dict[str, Any]) -> str:
    """Result of the filter, in two lines."""
    dropped = ", ".join(f"{name} {count}" for name, count in summary["dropped"].items())
    lines = [
        f"filter      {summary['replaced']} images redrawn; "
        f"too near to a training image of: {dropped}"
    ]
    if utility := summary["utility"]:
        before, after = (utility[name]["macro_auc"] for name in ("unfiltered", "filtered"))
        if before is not None and after is not None:
            lines.append(
                f"macro AUC   {after:.3f} of classifiers trained on this set, "
                f"{before:.3f} without the filter"
            )
    return "\n".join(lines)


def checksums(folder: Path) -> str:
    """Lines `sha256  path` for all files below `folder` by path, in the format of `sha256sum -c`.

    SHA256SUMS itself is left out.
    """
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS):
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines)
