"""`fedgan generate --release`: a synthetic set to hand on, with its card and hashes. And the marks of every synthetic PNG.

    images/000/00000.png …    at most 1,000 in a folder, each marked as synthetic
    labels.csv                file, a column a label, seed, index
    dataset_card.md, .json    what the set is, where it comes from, what is not known
    SHA256SUMS                hashes of all other files, for sha256sum -c

No path, time or name of this machine stands in any file, so that the same draw gives the same bytes.
"""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgan import files
from fedgan.cli import console
from fedgan.errors import ConfigError
from fedgan.run_folder import RunFolder

if TYPE_CHECKING:
    import numpy as np
    from PIL import PngImagePlugin

SHELF = 1000  # images in one folder
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


def run_of(checkpoint: Path) -> RunFolder:
    """The run folder of a checkpoint. Raises `ConfigError` where there is none: a release states sources and licences."""
    run = RunFolder.at(checkpoint.resolve().parent.parent)
    if not run.config.is_file():
        raise ConfigError(
            f"{console.shown(checkpoint)} lies in no run folder: a release states where the training images came from, "
            "which only the run folder tells; give the run folder"
        )
    return run


def write_papers(
    folder: Path,
    run: RunFolder,
    meta: dict[str, Any],
    wanted: np.ndarray,
    *,
    asked: str,
    seed: int,
    psi: float,
    created: str | None,
) -> None:
    """Write the card and, last, the hashes beside the images and labels.csv that lie in `folder`.

    `wanted` (N, K) are the label vectors of the images, `meta` the checkpoint's, `asked` the label mix in words.
    """
    from fedgan.report.cards.collect import collect
    from fedgan.report.cards.subjects import Release, release_facts
    from fedgan.report.cards.writing import write_card

    release = Release(
        images=len(wanted),
        counts={name: int(wanted[:, column].sum()) for column, name in enumerate(meta["label_names"])},
        unlabelled=int((wanted.sum(axis=1) == 0).sum()),
        asked=asked,
        seed=seed,
        psi=psi,
        meta=meta,
        created=created,
    )
    write_card(folder, "dataset_card", "card_release.md.j2", release_facts(collect(run), release))
    files.write_text(folder / SUMS, hashes(folder))


def hashes(folder: Path) -> str:
    """A line `sha256  path` for each file below `folder`, by path, as `sha256sum -c` reads them; not for SHA256SUMS itself."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS):
        with open(path, "rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines)
