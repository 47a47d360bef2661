"""`fedgan generate --release`: a synthetic set to hand on, with its card and hashes. And the marks of every synthetic PNG.

    images/000/00000.png …    at most 1,000 in a folder, each marked as synthetic
    labels.csv                file, a column a label, seed, index
    dataset_card.md, .json    what the set is, where it comes from, what is not known
    SHA256SUMS                hashes of all other files, for sha256sum -c

No path, time or name of this machine stands in any file, so that the same draw gives the same bytes.
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
# The IPTC's word for an image made by a model that was trained on images
# (https://cv.iptc.org/newscodes/digitalsourcetype/), in the XMP packet that picture archives read.
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
    """The metadata of a synthetic PNG: text chunks for people and programs, XMP for picture archives."""
    from PIL import PngImagePlugin

    marks = PngImagePlugin.PngInfo()
    marks.add_text("synthetic", "true")
    marks.add_text("Description", DESCRIPTION)
    marks.add_text("Software", "fedgan")
    marks.add_itxt(XMP_KEYWORD, XMP)
    return marks


def check_release(png: bool, created: str | None) -> None:
    """Raise `ConfigError` for options that a release cannot have. `created` is an ISO date or None."""
    if not png:
        raise ConfigError(
            "--release writes PNG files: a shard has no place for the marks of a synthetic image, for a card or for hashes, and "
            "calls its images a training split; leave --format away (fedgan data import csv makes a shard of the PNG files)"
        )
    if created is not None:
        try:
            datetime.date.fromisoformat(created)
        except ValueError:
            raise ConfigError(f"--created {created}: write a date such as 2026-05-31") from None


def run_of_checkpoint(checkpoint: Path) -> RunFolder:
    """The run folder of a checkpoint. Raises `ConfigError` where there is none: a release states sources and licences."""
    run = RunFolder.at(checkpoint.resolve().parent.parent)
    if not run.config.is_file():
        raise ConfigError(
            f"{console.shown(checkpoint)} lies in no run folder: a release states where the training images came from, "
            "which only the run folder tells; give the run folder"
        )
    return run


def write_card_and_checksums(
    folder: Path,
    run: RunFolder,
    meta: dict[str, Any],
    wanted: np.ndarray,
    *,
    asked: str,
    seed: int,
    psi: float,
    created: str | None,
    release_filter: dict[str, Any] | None = None,
) -> None:
    """Write the card and, last, the hashes beside the images and labels.csv that lie in `folder`.

    `wanted` (N, K) are the label vectors of the images, `meta` the checkpoint's, `asked` the label mix in words, `quarantine`
    what the filter did, where there was one.
    """
    from fedgan.report.cards.collect import collect
    from fedgan.report.cards.subjects import Release, release_facts
    from fedgan.report.cards.writing import write_card

    release = Release(
        images=len(wanted),
        counts={
            name: int(wanted[:, column].sum()) for column, name in enumerate(meta["label_names"])
        },
        unlabelled=int((wanted.sum(axis=1) == 0).sum()),
        asked=asked,
        seed=seed,
        psi=psi,
        meta=meta,
        created=created,
        release_filter=release_filter,
    )
    write_card(folder, "dataset_card", "card_release.md.j2", release_facts(collect(run), release))
    files.write_text(folder / SUMS, hashes(folder))


class FilteredRelease:
    """A release that is drawn past the fences of the hospitals, and whose utility is measured with and without them."""

    def __init__(
        self,
        release_filter: ReleaseFilter,
        vectors: np.ndarray,
        hospitals: Sequence[Any],
        run: RunFolder,
    ) -> None:

        from fedgan.evaluation.mixing import stratified_rows

        self.release_filter, self.vectors, self.hospitals, self.run = (
            release_filter,
            vectors,
            hospitals,
            run,
        )
        self.settings = run.settings()
        most = min(len(vectors), self.settings.evaluation.images)
        self._measured = stratified_rows(
            vectors, most, self.settings.seed
        )  # places on which utility is measured
        self._before: list[np.ndarray] = []
        self._after: list[np.ndarray] = []

    def chunks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(number of the first, images, seed of each) a chunk at a time, as `generate` writes them."""
        from fedgan.audit.release_filter import in_chunks

        for start, images, seeds, first in in_chunks(
            self.release_filter, self.vectors, FILES_PER_FOLDER
        ):
            inside = (
                self._measured[(self._measured >= start) & (self._measured < start + len(images))]
                - start
            )
            self._before.append(first[inside])
            self._after.append(images[inside])
            yield start, images, seeds

    def facts(self) -> dict[str, Any]:
        """What the filter did, for the card; after `chunks` has ended. Trains classifiers."""
        import numpy as np

        from fedgan.audit.release_filter import MOST_DRAWS, PERCENTILE, utility_before_and_after
        from fedgan.data.dataset import ImageDataset
        from fedgan.evaluation.reference import RealReference, pool_hospitals
        from fedgan.runs.evaluator import evaluation_device

        known, filtered = self.run.read_json(self.run.hospitals) or [], self.release_filter
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
            "most_draws": MOST_DRAWS,
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
    """The filter of `--release-filter`, ready to draw. Raises where the hospitals' images are not at hand, or under privacy."""
    from fedgan.audit.release_filter import ReleaseFilter, check_release_filter, distance_thresholds
    from fedgan.cli.audit import open_run_hospitals
    from fedgan.cli.runs import runner
    from fedgan.evaluation.sampling import draw_latents, generate_images

    runner()  # has a message of its own where there is no repository
    from fedgan.runs.evaluator import evaluation_device

    settings = run.settings()
    check_release_filter(settings)
    hospitals = open_run_hospitals(settings, run, shards)
    device = evaluation_device(settings)
    latents = functools.lru_cache(maxsize=2)(
        lambda own_seed: draw_latents(len(vectors), generator.z_dim, own_seed)
    )

    def draw(labels: np.ndarray, own_seed: int, places: np.ndarray) -> np.ndarray:
        return generate_images(
            generator, labels, own_seed, psi, batch, device, latents=latents(own_seed)[places]
        )

    held = hospitals[0].train
    if (held.label_names, held.images.shape[1:]) != (
        tuple(meta["label_names"]),
        (meta["channels"], *2 * (meta["resolution"],)),
    ):
        raise DataError(
            f"the shard of '{held.name}' differs from the model in labels, channels or size: give the run's own shards"
        )
    return FilteredRelease(
        ReleaseFilter(distance_thresholds(hospitals), draw, seed), vectors, hospitals, run
    )


def release_filter_text(facts: dict[str, Any]) -> str:
    """What the filter did, in two lines."""
    dropped = ", ".join(f"{name} {count}" for name, count in facts["dropped"].items())
    lines = [
        f"release filter  {facts['replaced']} images drawn again; too near to a training image of: {dropped}"
    ]
    if utility := facts["utility"]:
        before, after = (utility[name]["macro_auc"] for name in ("unfiltered", "filtered"))
        if before is not None and after is not None:
            lines.append(
                f"macro AUC   {after:.3f} of classifiers trained on this set, {before:.3f} without the filter"
            )
    return "\n".join(lines)


def hashes(folder: Path) -> str:
    """A line `sha256  path` for each file below `folder`, by path, as `sha256sum -c` reads them; not for SHA256SUMS itself."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS):
        with open(path, "rb") as stream:
            lines.append(
                f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {path.relative_to(folder).as_posix()}\n"
            )
    return "".join(lines)
