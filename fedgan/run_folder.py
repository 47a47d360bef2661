"""The run folder: the layout of a run's files.

config.toml               the resolved scenario
environment.json          versions, machine, experiment id, licences
hospitals.json            per hospital: name, counts per split and class, content hash;
                          in a private run no class counts, and the hash is keyed with data.key
data.key                  the key of that hash; never published
partition.json            rows per hospital, where one pool was partitioned
metrics.jsonl             one line per round
checkpoints/round-N.*     aggregated model (.safetensors + .json)
samples/*.png             real.png, round-N.png, final.png
evaluation.json           results of the central evaluator
audit.json                results of `fedgan audit`, without images
report.html               the report
cards/                    model card and dataset card, Markdown and JSON
evaluated-run.json        in a repeated evaluation (`fedgan evaluate --output`): the evaluated run
hospitals/NAME/           local to the hospital: the state of its Trainer per round, audit pictures
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
from fedgan.config import FORMAT, Settings, check_format, from_dict, to_dict
from fedgan.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; creates no files."""

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
    def evaluated_run(self) -> Path:
        return self.path / "evaluated-run.json"

    @property
    def cards(self) -> Path:
        return self.path / "cards"

    @property
    def arms(self) -> Path:
        """The arms of a comparison, one run folder each; a run has no such folder."""
        return self.path / "arms"

    def refuse_comparison(self) -> None:
        """Raise `ConfigError` where this folder is a comparison, which has several models."""
        if self.arms.is_dir():
            example = next(
                (path for path in sorted(self.arms.iterdir()) if (path / "config.toml").is_file()),
                self.arms / "NAME",
            )
            raise ConfigError(
                f"{self.path} is a comparison: continue it with fedgan compare, or give one of its "
                f"arms, e.g. {example}"
            )

    def refuse_repeated_evaluation(self) -> None:
        """Raise `ConfigError` where this folder is a repeated evaluation, which has no model."""
        if self.evaluated_run.is_file():
            raise ConfigError(
                f"{self.path} is a repeated evaluation of "
                f"{self.read_json(self.evaluated_run)['run']}: give that run"
            )

    def checkpoint(self, round_number: int) -> Path:
        """The `.safetensors` of one round; its meaning is in the `.json` beside it."""
        return self.checkpoints / f"round-{round_number:05d}.safetensors"

    def hospital_state(self, name: str) -> Path:
        """Folder in place of the hospital's own disk in a simulation."""
        return self.path / "hospitals" / name

    def last_round(self) -> int | None:
        """Number of the newest round with a complete checkpoint, or None."""
        rounds = [
            int(found.group(1))
            for file in self.checkpoints.glob("round-*.safetensors")
            if (found := re.fullmatch(r"round-(\d+)", file.stem))
            and file.with_suffix(".json").is_file()
        ]
        return max(rounds, default=None)

    def write_settings(self, settings: Settings) -> None:
        """Write `config.toml`, the resolved scenario."""
        files.write_text(self.config, tomli_w.dumps({"format": FORMAT, **to_dict(settings)}))

    def settings(self) -> Settings:
        """Read `config.toml`.

        Raises `ConfigError` where this is no run folder, or one of another format.
        """
        if not self.config.is_file():
            raise ConfigError(
                f"{self.path} is no run folder: it has no config.toml "
                "(give the folder that `fedgan simulate` wrote)"
            )
        try:
            tree = tomllib.loads(self.config.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{self.config} is damaged: {error}") from None
        check_format(tree.pop("format", None), self.config)
        return from_dict(tree, source=str(self.config))

    def read_json(self, path: Path) -> Any:
        """Content of one of the run's JSON files, or None where it does not exist yet."""
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
