"""The comparison folder: one place that knows which file of a comparison lies where.

config.toml               the resolved scenario, its [comparison] section included
environment.json          versions, machine, licences and content hashes of the data
hospitals.json            counts of each hospital
shards/                   the phantoms, where no data.root was given
arms/NAME-seedK/          an arm with one seed: an ordinary run folder, and beside it what the one evaluator found
  evaluation.json, predictions.npz, curve.json, synthetic.npz, judged.json (of which checkpoint and settings)
  members/HOSPITAL/       of arms that end with a generator a hospital (local, finetuned): a run folder each
reference/                the real side of the evaluation: classifiers, features, predictions
comparison.json           all numbers
report.html               the page
cards/                    model card
jobs/                     what each process was told, and its log
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedgan.run_folder import RunFolder


@dataclass(frozen=True)
class ComparisonFolder(RunFolder):
    """Paths of one comparison. Makes no file by itself."""

    @staticmethod
    def at(path: str | Path) -> ComparisonFolder:
        """The comparison folder at `path`, absolute; it need not exist yet."""
        return ComparisonFolder(Path(path).expanduser().resolve())

    @property
    def reference(self) -> Path:
        return self.path / "reference"

    @property
    def comparison(self) -> Path:
        return self.path / "comparison.json"

    def arm(self, name: str, seed: int) -> RunFolder:
        """The run folder of an arm with one seed; `name` is made fit for a folder."""
        return RunFolder(self.arms / f"{name.replace(' ', '-').replace('/', '-')}-seed{seed}")
