"""The comparison folder: where each file of a comparison lies.

config.toml               the resolved scenario, with its [comparison] section
environment.json          versions, machine, licences and content hashes of the data
hospitals.json            counts of each hospital
shards/                   the phantoms, where no data.root was given
arms/NAME-seedK/          an arm with one seed: an ordinary run folder, and its evaluation
  evaluation.json, predictions.npz, curve.json, synthetic.npz
  evaluation_key.json     hash of the checkpoint, data and settings of the evaluation
  members/HOSPITAL/       a run folder per hospital, of arms with one generator per hospital
reference/                evaluation of real images: classifiers, features, predictions
comparison.json           all numbers
report.html               the report
cards/                    model card
jobs/                     input and log of each worker process
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedgan.errors import ConfigError
from fedgan.run_folder import RunFolder

FORMAT = 2  # of comparison.json


@dataclass(frozen=True)
class ComparisonFolder(RunFolder):
    """Paths of one comparison. Creates no file by itself."""

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
        """The run folder of an arm with one seed; `name` is made a valid folder name."""
        return RunFolder(self.arms / f"{name.replace(' ', '-').replace('/', '-')}-seed{seed}")

    def check_format(self) -> None:
        """Raise `ConfigError` where comparison.json has another format number.

        A missing or damaged file passes: `fedgan compare` writes it again.
        """
        try:
            content = json.loads(self.comparison.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return
        found = content.get("format") if isinstance(content, dict) else None
        if isinstance(found, int) and found != FORMAT:
            raise ConfigError(
                f"{self.comparison} has format {found}, and this version of fedgan reads format "
                f"{FORMAT}: run `fedgan compare` with another --output, or use the version that "
                "wrote it"
            )
