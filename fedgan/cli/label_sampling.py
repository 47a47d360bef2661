"""Label vectors of the images of `fedgan generate`, from the options of the user."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgan.apportion import apportion
from fedgan.cli import console, labels
from fedgan.config import from_dict
from fedgan.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

# A name may hold commas and equals signs; a share holds neither.
_SHARE = re.compile(r"\s*(?P<name>.+?)\s*=\s*(?P<share>[^,=]*?)\s*(?:,|$)")


@dataclass(frozen=True)
class LabelChoice:
    """The label options of `generate`; at most one of them is given."""

    named: Sequence[str] = ()
    vectors: Sequence[str] = ()
    labels_from: str | None = None
    mix: Sequence[str] = ()

    def __post_init__(self) -> None:
        given = (bool(self.named), bool(self.vectors), self.labels_from is not None, bool(self.mix))
        if sum(given) > 1:
            raise ConfigError(
                "--label, --vector, --labels-from and --mix exclude each other: give one of them"
            )

    def description(self, exclusive: bool, labelled: bool = True, private: bool = False) -> str:
        """The choice as text, for a card, without the path of a shard.

        `labelled`: whether the model has labels.
        """
        if not labelled:
            return "none: the model has no labels"
        if self.named:
            return f"evenly over {', '.join(self.named)}"
        if self.vectors:
            return f"evenly over the label vectors {'; '.join(self.vectors)}"
        if self.mix:
            return ", ".join(self.mix)
        if self.labels_from is None and exclusive:
            return "every class equally often"
        if self.labels_from is None and private:
            return "every label alone, and none, equally often"
        return (
            "as in the run's training images"
            if self.labels_from in (None, "mix")
            else "as in the images of a shard"
        )


def requested_labels(
    meta: dict[str, Any], checkpoint: Path, images: int, choice: LabelChoice, seed: int
) -> np.ndarray:
    """Label vectors (images, K) uint8. Raises `ConfigError` or `DataError` for unusable labels.

    Real labels of a private run are not used: labels.csv would contain their mix without noise,
    including rare combinations, and the run's epsilon covers the images that the generator was
    trained on, not this. Instead, labels are those of `training.labels = "uniform"`.
    """
    import numpy as np

    names, exclusive = tuple(meta["label_names"]), bool(meta["exclusive"])
    if choice.named:
        return labels.spread_evenly(labels.named_vectors(choice.named, names), images)
    if choice.vectors:
        return labels.spread_evenly(labels.parsed_vectors(choice.vectors, names, exclusive), images)
    if choice.mix:
        shares = parsed_mix(choice.mix, names).values()
        total = sum(shares, Fraction(0))
        counts = apportion([images * share / total for share in shares], images)
        return np.repeat(np.eye(len(names), dtype=np.uint8), counts, axis=0)
    if not names:
        return np.zeros((images, 0), np.uint8)
    if choice.labels_from is None and exclusive:
        return labels.spread_evenly(np.eye(len(names), dtype=np.uint8), images)
    if is_private(meta):
        if choice.labels_from is not None:
            raise ConfigError(
                f"--labels-from {choice.labels_from}: the run is private, and its epsilon does "
                "not cover real labels, whose mix would be in the set without noise; use --mix, "
                "--label or --vector, or none of them for equal shares"
            )
        return labels.spread_evenly(np.eye(len(names) + 1, len(names), dtype=np.uint8), images)
    from fedgan.evaluation.sampling import synthetic_labels

    mix = choice.labels_from in (None, "mix")
    real = (
        _training_labels(checkpoint, names, exclusive)
        if mix
        else _shard_labels(str(choice.labels_from), names)
    )
    return synthetic_labels(real, images, seed)


def is_private(meta: dict[str, Any]) -> bool:
    """Whether a checkpoint's meta states training with differential privacy."""
    return from_dict(meta["settings"]).privacy.on


def parsed_mix(texts: Sequence[str], label_names: Sequence[str]) -> dict[str, Fraction]:
    """Shares of all `label_names` from texts such as `normal=0.5,pneumonia=0.3`; 0 if not named.

    Shares need not add up to 1. Raises `ConfigError` with the known classes for an unknown class, a
    repeated class, a share that is not a number or negative, or no share above zero.
    """
    classes = f"the classes {', '.join(label_names)}" if label_names else "no labels"
    known = f"the model has {classes}"
    shares = dict.fromkeys(label_names, Fraction(0))
    seen: set[str] = set()
    for text in texts:
        pairs = list(_SHARE.finditer(text))
        if "".join(pair.group() for pair in pairs) != text or not pairs:
            raise ConfigError(f"--mix {text}: write CLASS=SHARE,CLASS=SHARE; {known}")
        for pair in pairs:
            name = pair["name"]
            if name not in shares:
                raise ConfigError(f"--mix: there is no class '{name}'; {known}")
            if name in seen:
                raise ConfigError(f"--mix names the class '{name}' twice; {known}")
            seen.add(name)
            shares[name] = _share(name, pair["share"], known)
    if not any(shares.values()):
        raise ConfigError(f"--mix has no share above zero; {known}")
    return shares


def _share(name: str, text: str, known: str) -> Fraction:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"--mix {name}={text}: a share is a number of at least 0; {known}")
    return Fraction(repr(value))  # 0.3 is 3/10, not the nearest binary number


def _shard_labels(path: str, names: tuple[str, ...]) -> np.ndarray:
    """Label vectors (N, K) of a shard that has the model's labels."""
    import numpy as np

    from fedgan.data.shard import Shard

    shard = Shard.open(path)
    if tuple(shard.card.label_names) != names:
        raise DataError(
            f"{path} has the labels {', '.join(shard.card.label_names)}, the model "
            f"{', '.join(names)}: give another shard"
        )
    return np.asarray(shard.labels)


def _training_labels(checkpoint: Path, names: tuple[str, ...], exclusive: bool) -> np.ndarray:
    """Label vectors (N, K) of the run's training images.

    For exclusive classes the counts of hospitals.json suffice. Otherwise combinations are needed,
    so the run's shards must be present.
    """
    import numpy as np

    from fedgan.run_folder import RunFolder

    run = RunFolder.at(checkpoint.resolve().parent.parent)
    if exclusive:
        hospitals = run.hospital_rows()
        if not hospitals:
            raise DataError(
                f"{console.shown(run.path)} has no hospitals.json with the label mix: "
                "use --label or --vector"
            )
        if not all((hospital["counts"] or {}).get("train") for hospital in hospitals):
            raise DataError(
                f"{console.shown(run.path)} has no counts of images per class of its hospitals: "
                "use --label"
            )
        counts = [
            sum(hospital["counts"]["train"].get(name, 0) for hospital in hospitals)
            for name in names
        ]
        return np.repeat(np.eye(len(names), dtype=np.uint8), counts, axis=0)
    if not run.config.is_file():
        raise DataError(
            "the label mix is in the run folder: give the run folder, or use --label, --vector or "
            "--labels-from SHARD"
        )
    from fedgan.runs.preparation import open_prepared

    return np.concatenate(
        [hospital.train.labels for hospital in open_prepared(run.settings(), run)]
    )
