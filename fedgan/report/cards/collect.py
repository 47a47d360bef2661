"""What the files of a run tell, made fit to be passed on: no path of a machine, no file name of a hospital."""

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
from fedgan.report.facts import all_drawn, content_hash, source_title
from fedgan.report.html.format import number
from fedgan.report.run.data import RunData, Tree, clean, load, tree, trees
from fedgan.run_folder import RunFolder

UNKNOWN = "not known"


@dataclass(frozen=True)
class CardData:
    """One run as the cards see it. `checkpoint`: round, file, sha256 and meta of the newest model, or empty.

    `compared`: one of a comparison's trainings, judged under the comparison's settings of the evaluator.
    """

    run: RunFolder
    data: RunData
    checkpoint: Tree
    problems: tuple[str, ...]
    compared: bool = False

    @property
    def label_names(self) -> list[str]:
        """The generator's labels, of the checkpoint or else of the hospitals' counts."""
        named = self.checkpoint.get("label_names")
        return [str(name) for name in named] if isinstance(named, list) else self.data.data_labels

    @property
    def phantoms(self) -> bool:
        """Whether all training images were drawn by a program, so that there is no patient."""
        return all_drawn(row.get("source") for row in trees(self.data.environment.get("sources")))

    @property
    def arm(self) -> str:
        """How the model was trained, as evaluation.json says; "not known" where it does not, and then nothing is claimed."""
        return str(self.data.evaluation.get("arm") or UNKNOWN)

    @property
    def is_member(self) -> bool:
        """Whether this is one hospital's own training within an arm: its share of a budget that stands elsewhere."""
        return self.compared and self.run.path.parent.name == "members"

    def publish(self, facts: Tree) -> Tree:
        """`facts` with every path of this machine taken out, all the way down."""
        settings = self.data.settings
        roots = [str(self.run.path), settings.data.root, settings.evaluation.root, str(Path.home())]
        return redact(
            facts, tuple(root for root in roots if PurePath(root).is_absolute() and len(root) > 1)
        )


def collect(run: RunFolder) -> CardData:
    """Read a run folder. Raises `ConfigError` when it has no readable config.toml; anything else may lack or be damaged.

    A training of a comparison takes what it does not have itself (environment, hospitals) from the comparison's folder,
    and from there, too, the settings of the evaluator: that is what judged it, whatever its own config.toml says.
    """
    data = load(run)
    problems = list(data.problems)
    above = comparison_of(run.path)
    if above is not None:
        data = _within(run, data, load(RunFolder.at(above)))
    checkpoint: Tree = {}
    if run.evaluated_run.is_file():
        problems.append(
            "This is a second look at another run: the model lies in that run, and its hash is not stated here."
        )
    else:
        checkpoint = _checkpoint(run, problems)
    return CardData(run, data, checkpoint, tuple(problems), above is not None)


def comparison_of(path: Path) -> Path | None:
    """The comparison that a run folder is part of: an arm (arms/NAME-seedK) or a member of one (…/members/HOSPITAL)."""
    arm = path.parent.parent if path.parent.name == "members" else path
    above = arm.parent.parent
    return above if arm.parent.name == "arms" and (above / "config.toml").is_file() else None


def _within(run: RunFolder, data: RunData, whole: RunData) -> RunData:
    """A training of the comparison `whole`, with the hospitals whose images it learned from and no others."""
    settings = dataclasses.replace(data.settings, evaluation=whole.settings.evaluation)
    environment, hospitals = (
        data.environment or whole.environment,
        data.hospitals or whole.hospitals,
    )
    members = settings.federation.members
    alone = run.path.parent.name != "members" or data.evaluation.get("arm") == "local"
    if members and alone:
        taught = [
            row for row in trees(environment.get("sources")) if row.get("hospital") in members
        ]
        environment = environment | ({"sources": taught} if "sources" in environment else {})
        hospitals = tuple(row for row in hospitals if row.get("name") in members)
    elif not alone:  # it began with a federation's model, which learned from all of them
        hospitals = whole.hospitals or hospitals
    return dataclasses.replace(
        data, settings=settings, environment=environment, hospitals=hospitals
    )


def _checkpoint(run: RunFolder, problems: list[str]) -> Tree:
    """Name, sha256 and meta of the newest whole checkpoint; empty, with a sentence, where there is none."""
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
            f"{path.name} or its JSON could not be read: the model's hash is not known."
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
    """A row a hospital: name, images and patients of each split, training images of each class, content hash."""
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
    """Sums over `hospital_rows`; a sum of which a part is unknown is None."""

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
    """A row a source: hospital, title, licence, content hash. A title that may be a file's or a folder's name is None."""
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
    """The licences of the sources, each once."""
    return list(dict.fromkeys(row["licence"] for row in sources if row["licence"]))


def provenance(card: CardData) -> Tree:
    """Settings, seed, versions and the hash of config.toml."""
    settings = to_dict(card.data.settings)
    for section, key in (("data", "root"), ("evaluation", "root"), ("evaluation", "features")):
        if settings[section][key] not in ("", "reference"):
            settings[section][key] = REDACTED
    defaults = to_dict(Settings())
    changed = {
        f"{section}.{key}" if isinstance(held, dict) else section: value
        for section, held in settings.items()
        for key, value in (held.items() if isinstance(held, dict) else [("", held)])
        if value != (defaults[section][key] if isinstance(held, dict) else defaults[section])
    }
    environment = card.data.environment
    return {
        "seed": settings["seed"],
        "settings": settings,
        "settings_changed": {
            key: value for key, value in changed.items() if key not in ("name", "description")
        },
        "evaluation_settings_of": "the comparison" if card.compared else "this run",
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
