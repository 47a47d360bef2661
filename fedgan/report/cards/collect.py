"""Collect the facts of a run for its cards, without local paths and without file names."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from fedgan import __version__
from fedgan.config import Settings, to_dict
from fedgan.data.splits import SPLITS
from fedgan.errors import FedganError
from fedgan.redact import REDACTED, redact
from fedgan.report.facts import are_all_phantoms, content_hash, source_title
from fedgan.report.html.format import number
from fedgan.report.run.data import RunData, Tree, clean, load, tree, trees
from fedgan.run_folder import RunFolder

UNKNOWN = "not known"


@dataclass(frozen=True)
class CardData:
    """The data of one run for its cards.

    `checkpoint`: round, file, sha256 and metadata of the newest model, or empty. `is_compared`: the
    run is part of a comparison, whose evaluation settings apply.
    """

    run: RunFolder
    data: RunData
    checkpoint: Tree
    problems: tuple[str, ...]
    is_compared: bool = False

    @property
    def label_names(self) -> list[str]:
        """The labels of the generator, from the checkpoint or else from hospitals.json."""
        named = self.checkpoint.get("label_names")
        return [str(name) for name in named] if isinstance(named, list) else self.data.data_labels

    @property
    def has_only_phantoms(self) -> bool:
        """Whether all training images are phantoms, so that there is no patient."""
        return are_all_phantoms(
            row.get("source") for row in trees(self.data.environment.get("sources"))
        )

    @property
    def arm(self) -> str:
        """The arm in evaluation.json, or "not known": then no claim is made on training."""
        return str(self.data.evaluation.get("arm") or UNKNOWN)

    @property
    def is_member(self) -> bool:
        """Whether this is the training of one hospital within an arm."""
        return self.is_compared and self.run.path.parent.name == "members"

    def redact(self, facts: Tree) -> Tree:
        """`facts` without local paths."""
        settings = self.data.settings
        roots = [str(self.run.path), settings.data.root, settings.evaluation.root, str(Path.home())]
        return redact(
            facts, tuple(root for root in roots if PurePath(root).is_absolute() and len(root) > 1)
        )


def collect(run: RunFolder) -> CardData:
    """Read a run folder. Raises `ConfigError` if config.toml cannot be read; nothing else.

    A run of a comparison takes what it does not have itself (environment, hospitals) from the
    folder of the comparison, and always the evaluation settings: those produced its figures.
    """
    data = load(run)
    problems = list(data.problems)
    comparison = comparison_of(run.path)
    if comparison is not None:
        data = _with_comparison(run, data, load(RunFolder.at(comparison)))
    checkpoint: Tree = {}
    if run.evaluated_run.is_file():
        problems.append(
            "This is another evaluation of a run: that run contains the model, and its hash is "
            "not stated here."
        )
    else:
        checkpoint = _checkpoint(run, problems)
    return CardData(run, data, checkpoint, tuple(problems), comparison is not None)


def comparison_of(path: Path) -> Path | None:
    """The comparison folder of an arm (arms/NAME-seedK) or of a member (…/members/HOSPITAL)."""
    arm = path.parent.parent if path.parent.name == "members" else path
    comparison = arm.parent.parent
    is_arm = arm.parent.name == "arms" and (comparison / "config.toml").is_file()
    return comparison if is_arm else None


def _with_comparison(run: RunFolder, data: RunData, comparison: RunData) -> RunData:
    """A run of a comparison, with exactly the hospitals whose images it was trained on."""
    settings = dataclasses.replace(data.settings, evaluation=comparison.settings.evaluation)
    environment, hospitals = (
        data.environment or comparison.environment,
        data.hospitals or comparison.hospitals,
    )
    members = settings.federation.members
    is_own_data = run.path.parent.name != "members" or data.evaluation.get("arm") == "local"
    if members and is_own_data:
        sources = [
            row for row in trees(environment.get("sources")) if row.get("hospital") in members
        ]
        environment = environment | ({"sources": sources} if "sources" in environment else {})
        hospitals = tuple(row for row in hospitals if row.get("name") in members)
    elif not is_own_data:  # it started from the model of a federation of all hospitals
        hospitals = comparison.hospitals or hospitals
    return dataclasses.replace(
        data, settings=settings, environment=environment, hospitals=hospitals
    )


def _checkpoint(run: RunFolder, problems: list[str]) -> Tree:
    """Name, sha256 and metadata of the newest checkpoint; empty, with a problem, if none."""
    newest = run.last_round()
    if newest is None:
        problems.append("The run has no finished round: there is no model yet.")
        return {}
    path = run.checkpoint(newest)
    try:
        meta = tree(clean(run.read_json(path.with_suffix(".json"))))
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except (FedganError, OSError, ValueError, RecursionError):
        problems.append(
            f"{path.name} or its JSON could not be read: the hash of the model is not known."
        )
        return {}
    if meta.get("sha256") != digest:
        problems.append(f"{path.name} is damaged: its hash differs from that in its JSON.")
        return {}
    kept = (
        "images_seen",
        "wall_seconds",
        "bytes_exchanged",
        "label_names",
        "exclusive",
        "channels",
        "resolution",
    )
    return {"round": newest, "file": path.name, "sha256": digest} | {
        key: meta.get(key) for key in kept
    }


# --- rows that several cards show ----------------------------------------------------------------


def hospital_rows(data: RunData) -> list[Tree]:
    """One row per hospital: images and patients per split, training images per class, hash."""
    return [
        {
            "name": str(row.get("name", "unnamed")),
            "images": {split: _count(tree(row.get("images")).get(split)) for split in SPLITS},
            "patients": {split: _count(tree(row.get("patients")).get(split)) for split in SPLITS},
            "train_classes": {
                label: _count(n) for label, n in tree(tree(row.get("counts")).get("train")).items()
            },
            "content_hash": content_hash(row),
        }
        for row in data.hospitals
    ]


def totals(rows: list[Tree]) -> Tree:
    """Sums over `hospital_rows`; None if a summand is unknown."""

    def total(values: list[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return sum(known) if known and len(known) == len(values) else None

    labels = list(dict.fromkeys(label for row in rows for label in row["train_classes"]))
    return {
        "hospitals": len(rows) or None,
        "images": {split: total([row["images"][split] for row in rows]) for split in SPLITS},
        "patients": {split: total([row["patients"][split] for row in rows]) for split in SPLITS},
        "train_classes": {
            label: total([row["train_classes"].get(label, 0) for row in rows]) for label in labels
        },
    }


def source_rows(data: RunData) -> list[Tree]:
    """One row per source; a title that may be the name of a file or folder is None."""
    return [
        {
            "hospital": str(row.get("hospital", "unnamed")),
            "source": source_title(row.get("source")),
            "licence": str(row["licence"]) if row.get("licence") else None,
            "content_hash": content_hash(row),
        }
        for row in trees(data.environment.get("sources"))
    ]


def licences(sources: list[Tree]) -> list[str]:
    """The distinct licences of the sources."""
    return list(dict.fromkeys(row["licence"] for row in sources if row["licence"]))


def provenance(card: CardData) -> Tree:
    """Settings, seed, versions and the hash of config.toml."""
    settings = to_dict(card.data.settings)
    for section, key in (("data", "root"), ("evaluation", "root"), ("evaluation", "features")):
        if settings[section][key] not in ("", "reference"):
            settings[section][key] = REDACTED
    defaults = to_dict(Settings())
    changed = {
        f"{section}.{key}" if isinstance(values, dict) else section: value
        for section, values in settings.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
        if value != (defaults[section][key] if isinstance(values, dict) else defaults[section])
    }
    environment = card.data.environment
    return {
        "seed": settings["seed"],
        "settings": settings,
        "settings_changed": {
            key: value for key, value in changed.items() if key not in ("name", "description")
        },
        "evaluation_settings_of": "the comparison" if card.is_compared else "this run",
        "settings_sha256": hashlib.sha256(card.run.config.read_bytes()).hexdigest(),
        "experiment": environment.get("experiment"),
        "created": environment.get("created"),
        "python": environment.get("python"),
        "packages": tree(environment.get("packages")),
        "written_by": f"fedgan {__version__}",
    }


def _count(value: Any) -> int | None:
    found = number(value)
    return None if found is None else round(found)
