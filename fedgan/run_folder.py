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

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedgan import files
from fedgan.config import FORMAT, Settings, check_format, flat, from_dict, read_toml, to_dict
from fedgan.errors import CheckpointError, ConfigError

LISTS = ("hospitals.json", "partition.json", "curve.json")  # a list of objects; others: one object
# values of a line of metrics.jsonl that every reader needs, and their types
LINE = {
    "round": (int,),
    "images_seen": (int, float),
    "wall_seconds": (int, float),
    "bytes_exchanged": (int, float),
    "mean": (dict,),
    "hospitals": (list,),
}


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
                f"{self.read_json(self.evaluated_run).get('run', 'another run')}: give that run"
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
            if (found := re.fullmatch(r"round-([0-9]+)", file.stem))
            and file == self.checkpoint(int(found.group(1)))
            and file.with_suffix(".json").is_file()
        ]
        return max(rounds, default=None)

    def write_settings(self, settings: Settings) -> None:
        """Write `config.toml`, the resolved scenario."""
        files.write_text(self.config, tomli_w.dumps({"format": FORMAT, **to_dict(settings)}))

    def settings(self) -> Settings:
        """Read `config.toml`.

        Raises `ConfigError` where this is no run folder, for another format, and for a file that is
        damaged or lacks a key: `write_settings` writes all, and a default may be weaker.
        """
        if not self.config.is_file():
            raise ConfigError(
                f"{self.path} is no run folder: it has no config.toml "
                "(give the folder that `fedgan simulate` wrote)"
            )
        try:
            tree = read_toml(self.config)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.config} is damaged: {error}; {self._old_settings}") from None
        check_format(tree.pop("format", None), self.config)
        if lost := sorted(flat(to_dict(Settings())).keys() - flat(tree).keys()):
            more = f" and {len(lost) - 1} more keys" if len(lost) > 1 else ""
            raise ConfigError(
                f"{self.config} lacks {_most_important(lost)}{more}: it was cut, or written by "
                f"another version of fedgan; {self._old_settings}"
            )
        return from_dict(tree, source=str(self.config))

    @property
    def _old_settings(self) -> str:
        """Where the run's settings are found again, for an error message."""
        newest = self.last_round()
        kept = (
            f' ("settings" of {self.checkpoint(newest).with_suffix(".json")} has all values)'
            if newest is not None
            else ""
        )
        return f"restore it from a backup{kept}, or start a new run in another folder"

    def read_json(self, path: Path) -> Any:
        """Content of one of the run's JSON files, or None where it does not exist yet.

        Raises `CheckpointError` for a file that cannot be read or holds no object; of `LISTS`, no
        list of objects.
        """
        if not path.is_file():
            return None
        try:
            value = files.parse_json(files.read_bytes(path))
            if isinstance(value, list) != (path.name in LISTS):
                raise ValueError(f"it holds no {'list' if path.name in LISTS else 'object'}")
            if not all(isinstance(row, dict) for row in (value if path.name in LISTS else [value])):
                raise ValueError("it holds a value that is no object")
        except (OSError, ValueError) as error:
            again = {self.evaluation: "fedgan evaluate", self.audit: "fedgan audit"}.get(path)
            fix = f"{again} writes it again" if again else "restore it from a backup"
            raise CheckpointError(f"{path} is damaged ({error}): {fix}") from None
        return value

    def hospital_rows(self) -> list[dict[str, Any]]:
        """The rows of hospitals.json; empty where it does not exist yet.

        Raises `CheckpointError` for a damaged file, and for a row without a name or numbers.
        """
        rows: list[dict[str, Any]] = self.read_json(self.hospitals) or []
        for row in rows:
            counts, images = row.get("counts"), row.get("images", {})
            if (
                not isinstance(row.get("name"), str)
                or not isinstance(counts, dict | None)
                or not all(map(_is_table, [images, *(counts or {}).values()]))
            ):
                raise CheckpointError(
                    f"{self.hospitals} is damaged (a row has no name, or counts that are no "
                    "numbers): restore it from a backup"
                )
        return rows


def _is_table(value: object) -> bool:
    """Whether a value is a dict of whole numbers or, where they are withheld, of nulls."""
    return isinstance(value, dict) and all(
        number is None or type(number) is int for number in value.values()
    )


def _most_important(keys: list[str]) -> str:
    """The key that an error message names: of privacy or secure aggregation where one is lost."""
    first = ("privacy.epsilon", "federation.secure")
    return next(key for key in (*first, *keys) if key in keys)


# --- metrics.jsonl -------------------------------------------------------------------------------


def is_line(row: object) -> bool:
    """Whether a value is a whole line of metrics.jsonl."""
    return (
        isinstance(row, dict)
        and all(type(row.get(key)) in kinds for key, kinds in LINE.items())
        and all(
            isinstance(hospital, dict)
            and isinstance(hospital.get("name"), str)
            and type(hospital.get("images")) is int
            for hospital in row["hospitals"]
        )
    )


def scan_lines(run: RunFolder) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """The whole lines of metrics.jsonl by round, and the numbers of its damaged lines."""
    rows = files.scan_json_lines(run.metrics)
    damaged = [number for number, row in enumerate(rows, 1) if not is_line(row)]
    return {row["round"]: row for row in rows if row is not None and is_line(row)}, damaged


def read_lines(run: RunFolder) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, by round."""
    lines, _ = scan_lines(run)
    return [lines[number] for number in sorted(lines)]
