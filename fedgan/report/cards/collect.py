"""What the files of a run tell, made fit to be passed on: no path of a machine, no file name of a hospital."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from fedgan import __version__
from fedgan.config import describe, to_dict
from fedgan.data.splits import SPLITS
from fedgan.errors import FedganError
from fedgan.report.format import number
from fedgan.report.run_data import RunData, Tree, clean, load, tree, trees
from fedgan.run_folder import RunFolder

HIDDEN = "(path not shown)"
_PATHS = re.compile(r"file://\S+|(?<![\w:/.])~?(?:/[^\s/,;)\"']+){2,}/?|\b[A-Za-z]:\\\S+|\\\\\w\S+")
_FILE_NAME = re.compile(r"\.[A-Za-z]\w{1,5}(\s|$)|[/\\]")
PHANTOMS = re.compile(r"procedural \w+ phantoms\b")


@dataclass(frozen=True)
class CardData:
    """One run as the cards see it. `checkpoint`: round, file, sha256 and meta of the newest model, or empty."""

    run: RunFolder
    data: RunData
    checkpoint: Tree
    problems: tuple[str, ...]

    @property
    def label_names(self) -> list[str]:
        """The generator's labels, of the checkpoint or else of the hospitals' counts."""
        named = self.checkpoint.get("label_names")
        return [str(name) for name in named] if isinstance(named, list) else self.data.data_labels

    @property
    def phantoms(self) -> bool:
        """Whether all training images were drawn by a program, so that there is no patient."""
        sources = trees(self.data.environment.get("sources"))
        return bool(sources) and all(PHANTOMS.match(str(row.get("source"))) for row in sources)

    def publish(self, facts: Tree) -> Tree:
        """`facts` with every path of this machine taken out, all the way down."""
        settings = self.data.settings
        roots = [str(self.run.path), settings.data.root, settings.evaluation.root, str(Path.home())]
        return public(facts, tuple(root for root in roots if PurePath(root).is_absolute() and len(root) > 1))


def collect(run: RunFolder) -> CardData:
    """Read a run folder. Raises `ConfigError` when it has no readable config.toml; anything else may lack or be damaged.

    An arm of a comparison takes what it does not have itself (environment, hospitals) from the comparison's folder.
    """
    data = load(run)
    problems = list(data.problems)
    above = run.path.parent.parent
    if run.path.parent.name == "arms" and (above / "config.toml").is_file():
        whole = load(RunFolder.at(above))
        data = dataclasses.replace(
            data, environment=data.environment or whole.environment, hospitals=data.hospitals or whole.hospitals
        )
    checkpoint: Tree = {}
    if run.look.is_file():
        problems.append("This is a second look at another run: the model lies in that run, and its hash is not stated here.")
    else:
        checkpoint = _checkpoint(run, problems)
    return CardData(run, data, checkpoint, tuple(problems))


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
        problems.append(f"{path.name} or its JSON could not be read: the model's hash is not known.")
        return {}
    if meta.get("sha256") != digest:
        problems.append(f"{path.name} is damaged: its hash differs from that in its JSON.")
        return {}
    kept = ("images_seen", "wall_seconds", "bytes_exchanged", "label_names", "exclusive", "channels", "resolution")
    return {"round": newest, "file": path.name, "sha256": digest} | {key: meta.get(key) for key in kept}


# --- rows that several cards show ----------------------------------------------------------------


def hospital_rows(data: RunData) -> list[Tree]:
    """A row a hospital: name, images and patients of each split, training images of each class, content hash."""
    return [
        {
            "name": str(row.get("name", "unnamed")),
            "images": {split: _count(tree(row.get("images")).get(split)) for split in SPLITS},
            "patients": {split: _count(tree(row.get("patients")).get(split)) for split in SPLITS},
            "train_classes": {label: _count(n) for label, n in tree(tree(row.get("counts")).get("train")).items()},
            "content_hash": row.get("content_hash"),
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
        "train_classes": {label: total([row["train_classes"].get(label, 0) for row in rows]) for label in labels},
    }


def source_rows(data: RunData) -> list[Tree]:
    """A row a source: hospital, title, licence, content hash. A title that may be a file's or a folder's name is None."""
    return [
        {
            "hospital": str(row.get("hospital", "unnamed")),
            "source": _title(row.get("source")),
            "licence": str(row["licence"]) if row.get("licence") else None,
            "content_hash": row.get("content_hash"),
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
            settings[section][key] = HIDDEN
    flat = dict(_flat(settings))
    changed = {key: flat[key] for key, _, default in describe() if key in flat and flat[key] != _plain(default)}
    environment = card.data.environment
    return {
        "seed": settings["seed"],
        "settings": settings,
        "settings_changed": {key: value for key, value in changed.items() if key not in ("name", "description")},
        "settings_sha256": hashlib.sha256(card.run.config.read_bytes()).hexdigest(),
        "experiment": environment.get("experiment"),
        "created": environment.get("created"),
        "python": environment.get("python"),
        "packages": tree(environment.get("packages")),
        "written_by": f"fedgan {__version__}",
    }


def public(value: Any, roots: tuple[str, ...] = ()) -> Any:
    """`value` without paths of a machine: an absolute path, and any text of `roots`, becomes a mark."""
    if isinstance(value, str):
        return _public_text(value, roots)
    if isinstance(value, dict):
        return {_public_text(str(key), roots): public(item, roots) for key, item in value.items()}
    return [public(item, roots) for item in value] if isinstance(value, list | tuple) else value


def _public_text(text: str, roots: tuple[str, ...]) -> str:
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute():
        return HIDDEN
    for root in sorted(roots, key=len, reverse=True):
        text = re.sub(re.escape(root) + r"[^\s,;)\"']*", HIDDEN, text)
    return _PATHS.sub(HIDDEN, text)


def _title(text: Any) -> str | None:
    """A source's title, unless it looks like the name of a file or of a folder (the importers' default)."""
    words = str(text or "").split()
    return " ".join(words) if len(words) >= 3 and not _FILE_NAME.search(" ".join(words)) else None


def _flat(value: Tree, path: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, item in value.items():
        rows += _flat(item, f"{path}{key}.") if isinstance(item, dict) else [(path + key, item)]
    return rows


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _count(value: Any) -> int | None:
    found = number(value)
    return None if found is None else round(found)
