"""The run folder: one place that knows which file of a run lies where.

config.toml               the resolved scenario
environment.json          versions, machine, experiment id, licences
hospitals.json            name, counts for each split and class, content hash, of each hospital; of a private run's real images
                          neither class counts nor hash, but one that is keyed by data.key
data.key                  the key of that hash, which is published nowhere
partition.json            rows for each hospital, when one pool was dealt
metrics.jsonl             one line a round
checkpoints/round-N.*     aggregated model (.safetensors + .json)
samples/*.png             real.png, round-N.png, final.png
evaluation.json           the central evaluator's numbers
audit.json                what `fedgan audit` found: numbers alone
report.html               the page
cards/                    model card and dataset card, Markdown and JSON
look.json                 only in a second look (`fedgan evaluate --output`): the run that it looks at
hospitals/NAME/           what stays in the hospital: its Trainer's state for each round, pictures of its audit
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedgan import files
from fedgan.config import Settings, from_dict, to_dict
from fedgan.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Makes no file by itself."""

    path: Path

    @staticmethod
    def at(path: str | Path) -> RunFolder:
        """The run folder at `path`, absolute; it need not exist yet."""
        return RunFolder(Path(path).expanduser().resolve())

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def hospitals(self) -> Path:
        return self.path / "hospitals.json"

    @property
    def data_key(self) -> Path:
        return self.path / "data.key"

    @property
    def partition(self) -> Path:
        return self.path / "partition.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def audit(self) -> Path:
        return self.path / "audit.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def look(self) -> Path:
        return self.path / "look.json"

    @property
    def cards(self) -> Path:
        return self.path / "cards"

    @property
    def arms(self) -> Path:
        """Where a comparison keeps its arms, a run folder each; a run has no such folder."""
        return self.path / "arms"

    def refuse_comparison(self) -> None:
        """Raise `ConfigError` when this folder holds a comparison, which has many models and not one."""
        if self.arms.is_dir():
            example = next(
                (path for path in sorted(self.arms.iterdir()) if (path / "config.toml").is_file()),
                self.arms / "NAME",
            )
            raise ConfigError(
                f"{self.path} is a comparison: go on with it by fedgan compare, or give one of its arms, e.g. {example}"
            )

    def refuse_look(self) -> None:
        """Raise `ConfigError` when this folder is a second look: it has the page of a run, but no model."""
        if self.look.is_file():
            raise ConfigError(
                f"{self.path} is a second look at the run {self.read_json(self.look)['run']}: give that run"
            )

    def checkpoint(self, round_number: int) -> Path:
        """The `.safetensors` of one round; its meaning stands in the `.json` beside it."""
        return self.checkpoints / f"round-{round_number:05d}.safetensors"

    def hospital_state(self, name: str) -> Path:
        """Folder that stands for the hospital's own disk in a simulation."""
        return self.path / "hospitals" / name

    def last_round(self) -> int | None:
        """Number of the newest round whose checkpoint is complete, or None."""
        rounds = [
            int(found.group(1))
            for file in self.checkpoints.glob("round-*.safetensors")
            if (found := re.fullmatch(r"round-(\d+)", file.stem))
            and file.with_suffix(".json").is_file()
        ]
        return max(rounds, default=None)

    def write_settings(self, settings: Settings) -> None:
        """Write `config.toml`, the resolved scenario."""
        files.write_text(self.config, tomli_w.dumps(to_dict(settings)))

    def settings(self) -> Settings:
        """Read `config.toml`. Raises `ConfigError` when this is no run folder."""
        if not self.config.is_file():
            raise ConfigError(
                f"{self.path} is no run folder: it has no config.toml (give the folder that `fedgan simulate` wrote)"
            )
        try:
            tree = tomllib.loads(self.config.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{self.config} is damaged: {error}") from None
        return from_dict(tree, source=str(self.config))

    def read_json(self, path: Path) -> Any:
        """Read one of the run's JSON files, or None where it is not there yet."""
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
