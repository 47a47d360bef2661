"""Read the files of a run folder for its report and cards.

Every file except `config.toml` may be missing (a new run) or damaged (a failed run). Neither raises
an error: `problems` names what cannot be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedgan import files
from fedgan.config import Settings, from_dict, to_dict
from fedgan.errors import FedganError
from fedgan.report.facts import are_all_phantoms
from fedgan.report.html.format import number
from fedgan.run_folder import RunFolder

Tree = dict[str, Any]

MOST_PROBLEMS = 20  # damaged lines that are named

# Control characters, lone surrogates, and marks that change the text direction.
_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufffe\uffff]"
)


@dataclass(frozen=True)
class RunData:
    """The content of a run folder (docs/reference/files.md); a missing file gives an empty dict."""

    settings: Settings
    environment: Tree
    hospitals: tuple[Tree, ...]
    rounds: tuple[Tree, ...]
    evaluation: Tree
    pictures: dict[str, Path]
    problems: tuple[str, ...] = ()
    audit: Tree = field(default_factory=dict)

    @property
    def evaluation_labels(self) -> list[str]:
        """The labels of the classifiers, after `evaluation.label_map`."""
        named = self.evaluation.get("label_names")
        return [str(name) for name in named] if isinstance(named, list) else []

    @property
    def data_labels(self) -> list[str]:
        """The labels of the images, the generator and the grids, in the order of hospitals.json."""
        return labels_in_counts(self.hospitals)

    @property
    def hospital_names(self) -> list[str]:
        """Names in hospitals.json, then names that occur only in the rounds."""
        rows = [
            *self.hospitals,
            *(row for line in self.rounds for row in trees(line.get("hospitals"))),
        ]
        return list(dict.fromkeys(str(row["name"]) for row in rows if row.get("name") is not None))

    @property
    def last_round(self) -> Tree:
        """The newest line of metrics.jsonl, or an empty dict."""
        return self.rounds[-1] if self.rounds else {}

    def total(self, key: str) -> float | None:
        """A cumulative count of the run (`images_seen`, `wall_seconds`, `bytes_exchanged`)."""
        evaluated = number(self.evaluation.get(key))
        return evaluated if evaluated is not None else number(self.last_round.get(key))

    @property
    def has_only_phantoms(self) -> bool:
        """Whether all images are phantoms, so that no figure describes patients."""
        return not self.settings.evaluation.root and are_all_phantoms(
            row.get("source") for row in trees(self.environment.get("sources"))
        )

    @property
    def round_pictures(self) -> list[tuple[int, Path]]:
        """The sample grids of the rounds, oldest first."""
        found = [(re.fullmatch(r"round-(\d+)", name), path) for name, path in self.pictures.items()]
        return sorted((int(match.group(1)), path) for match, path in found if match)


def load(run: RunFolder) -> RunData:
    """Read a run folder. Raises only `ConfigError`, if `config.toml` cannot be read."""
    problems: list[str] = []
    settings = from_dict(clean(to_dict(run.settings())), source=str(run.config))
    return RunData(
        settings=settings,
        environment=tree(_json(run, run.environment, problems)),
        hospitals=tuple(trees(_json(run, run.hospitals, problems))),
        rounds=tuple(_rounds(run, problems)),
        evaluation=tree(_json(run, run.evaluation, problems)),
        pictures={path.stem: path for path in sorted(run.samples.glob("*.png"))},
        audit=tree(_json(run, run.audit, problems)),
        problems=tuple(problems),
    )


def dig(value: Any, *keys: str) -> Any:
    """The value at a path of keys, or None if a key is missing."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def tree(value: Any) -> Tree:
    """`value` if it is a dict, else an empty dict."""
    return value if isinstance(value, dict) else {}


def trees(value: Any) -> list[Tree]:
    """The dicts of a list; empty for anything else."""
    return (
        [item for item in value if isinstance(item, dict)]
        if isinstance(value, list | tuple)
        else []
    )


def labels_in_counts(hospitals: Iterable[Tree]) -> list[str]:
    """Labels in the counts of hospitals, in their order."""
    counts = (split for row in hospitals for split in tree(row.get("counts")).values())
    return list(dict.fromkeys(label for split in counts for label in tree(split)))


def sentences(value: Any) -> list[str]:
    """Texts from a string, or from a nested list or dict of strings."""
    if isinstance(value, str):
        return [value] if value.strip() else []
    if isinstance(value, dict):
        return [f"{key}: {text}" for key, item in value.items() for text in sentences(item)]
    return [text for item in value for text in sentences(item)] if isinstance(value, list) else []


def clean(value: Any) -> Any:
    """Replace control characters, lone surrogates and direction marks, recursively."""
    if isinstance(value, str):
        return _HARMFUL.sub("\ufffd", value)
    if isinstance(value, dict):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list) else value


def _json(run: RunFolder, path: Path, problems: list[str]) -> Any:
    try:
        return clean(run.read_json(path))
    except FedganError:
        problems.append(
            f"{path.name} is damaged and could not be read; its part of the report is empty."
        )
        return None


def _rounds(run: RunFolder, problems: list[str]) -> Iterable[Tree]:
    """One line per round, in order; of a round repeated after a resume, the last line."""
    try:
        lines = files.scan_json_lines(run.metrics)
    except OSError:
        problems.append(
            f"{run.metrics.name} is damaged and could not be read; the curves are empty."
        )
        return []
    problems += [
        f"{run.metrics.name} is damaged: line {number} is left out."
        for number, line in enumerate(lines, 1)
        if line is None
    ][:MOST_PROBLEMS]
    rows = trees(clean(lines))
    newest = {n: line for line in rows if (n := number(line.get("round"))) is not None}
    return [newest[n] for n in sorted(newest)]
