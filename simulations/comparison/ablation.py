"""Variants of an ablation: arms that each change settings of an earlier arm.

The arms of a comparison share everything but how they federate. A variant of an ablation
(comparison.kind = "ablation") may also change model, augment, training and privacy; never the
data, the evaluation and the budget of images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from fedgan.comparison_folder import ComparisonFolder
from fedgan.config import ModelSettings, PrivacySettings, Settings, from_dict, to_dict
from fedgan.errors import ConfigError
from simulations.comparison.arm import (
    STANDALONE,
    Arm,
    Job,
    centralized_arm,
    federated_arm,
    images_per_round,
)

KIND = "ablation"
BASELINES = ("federated", "centralized")
PUBLIC = "public"  # training.warm_start: the training on phantoms of comparison.public
OVERRIDABLE = ("model.", "augment.", "training.", "privacy.", "federation.")
NOT_OVERRIDABLE = {
    "training.kimg": "it is the budget that all arms share",
    "training.device": "all arms train on one",
    "federation.members": "all arms have the same hospitals",
    "federation.hospitals": "all arms have the same hospitals",
    "federation.threads": "all arms are timed with the same number of threads",
    "privacy.max_epsilon": "the arms share their shards' ledgers: one arm's steps would end the "
    "next",
    "privacy.unit": "the arms share their shards' ledgers, which count one unit",
}
PUBLIC_KEYS = (
    "data.phantoms",
    "data.phantom_images",
    "data.seed",
    "augment.",
    "training.",
    "federation.rounds",
)
PUBLIC_SEED_OFFSET = 1000  # added to the seed of the data: public phantoms are no hospital's own


@dataclass(frozen=True)
class Variant:
    """One variant: `changes` are its own `key=value` texts; `overrides` all since the baseline."""

    name: str
    parent: str
    baseline: str
    changes: tuple[str, ...]
    overrides: tuple[str, ...]


def variant_arm(
    variant: Variant,
    settings: Settings,
    folder: ComparisonFolder,
    sizes: Mapping[str, int],
    has_phantoms: bool,
) -> Arm:
    """The arm of a variant. `has_phantoms`: the hospitals' images are the scenario's phantoms."""
    own = from_dict(to_dict(settings), variant.overrides, source=f"arm '{variant.name}'")
    pretraining = None
    if own.training.warm_start == PUBLIC:
        public = public_training(settings, own.model, has_phantoms)
        run = folder.arm(public_name(public), public.seed)
        pretraining = Job(run.path, STANDALONE, public, tuple(images_per_round(public)))
        training = dataclasses.replace(own.training, warm_start=str(run.path))
        own = dataclasses.replace(own, training=training)
    build = federated_arm if variant.baseline == "federated" else centralized_arm
    arm = build(variant.name, own, folder, sizes)
    source = pretraining.folder if pretraining else None
    return dataclasses.replace(
        arm,
        jobs=tuple(dataclasses.replace(job, pretraining=source) for job in arm.jobs),
        parent=variant.parent,
        changes=variant.changes,
        overrides=variant.overrides,
        pretraining=pretraining,
    )


def read_variant(spec: str, before: Mapping[str, Variant], baseline: str) -> Variant:
    """Parse 'NAME < PARENT: key=value; …'; without '< PARENT' the parent is `baseline`.

    `before`: the variants before it by name. Raises `ConfigError` for a parent that is not among
    them, and for a key that all arms share.
    """
    head, _, keys = spec.partition(":")
    name, _, parent = (part.strip() for part in head.partition("<"))
    parent = parent or baseline
    known = before.get(parent)
    if known is None and parent != baseline:
        raise ConfigError(
            f"comparison.arms: '{name}' has the parent '{parent}', which is no arm before it: "
            f"name one of {', '.join([baseline, *before])}"
        )
    changes = tuple(text.strip() for text in keys.split(";") if text.strip())
    if not changes:
        raise ConfigError(
            f"comparison.arms: '{spec}' changes nothing: write e.g. "
            f"'{name or 'NAME'}: training.r1_gamma=0'"
        )
    for text in changes:
        _check_key(name, text.partition("=")[0].strip())
    # each key once, the newest value
    merged = {**overrides_as_dict(known.overrides if known else ()), **overrides_as_dict(changes)}
    overrides = tuple(f"{key}={value}" for key, value in merged.items())
    return Variant(name, parent, baseline, changes, overrides)


def _check_key(name: str, key: str) -> None:
    if key in NOT_OVERRIDABLE:
        raise ConfigError(
            f"comparison.arms: '{name}' would change {key}: {NOT_OVERRIDABLE[key]}; set it for "
            "the whole scenario"
        )
    if not key.startswith(OVERRIDABLE):
        raise ConfigError(
            f"comparison.arms: '{name}' would change {key}: the variants of an ablation may change "
            f"{', '.join(OVERRIDABLE)[:-1]} alone; data and evaluation are the same for all"
        )


def overrides_as_dict(overrides: tuple[str, ...]) -> dict[str, str]:
    """{key: value} of `key=value` texts."""
    pairs = (text.partition("=") for text in overrides)
    return {key.strip(): value.strip() for key, _, value in pairs}


# --- pretraining on public phantoms --------------------------------------------------------------


def public_training(settings: Settings, model: ModelSettings, has_phantoms: bool) -> Settings:
    """Settings of the training for training.warm_start = 'public'.

    It is the scenario's training on other phantoms, standalone and without privacy. `model`: the
    variant's networks; `has_phantoms`: the hospitals' images are the scenario's phantoms. Raises
    `ConfigError` for a key that does not belong to such a training, and for phantoms that are the
    hospitals' own.
    """
    for text in settings.comparison.public:
        key = text.partition("=")[0].strip()
        if not key.startswith(PUBLIC_KEYS) or key in ("training.warm_start", "training.device"):
            raise ConfigError(
                f"comparison.public: {key} is no key of a training on phantoms: give "
                f"{', '.join(PUBLIC_KEYS)}"
            )
    data_seed = settings.data_seed + PUBLIC_SEED_OFFSET
    data = dataclasses.replace(settings.data, root="", partition="institution", seed=data_seed)
    training = dataclasses.replace(
        settings.training, warm_start="", sampling="auto", labels="data", proximal_mu=0.0
    )
    base = dataclasses.replace(
        settings,
        data=data,
        model=model,
        training=training,
        federation=dataclasses.replace(settings.federation, strategy="fedavg", members=()),
        privacy=PrivacySettings(),
    )
    found = from_dict(to_dict(base), settings.comparison.public, source="comparison.public")
    own = (settings.data.phantoms, settings.data_seed)
    if has_phantoms and (found.data.phantoms, found.data_seed) == own:
        raise ConfigError(
            "comparison.public gives the very phantoms that the hospitals hold: give it another "
            "data.seed"
        )
    return found


def public_name(settings: Settings) -> str:
    """A name for a pretraining, unique per settings."""
    tree = to_dict(settings)
    sections = ("data", "model", "augment", "training", "federation")
    text = json.dumps({section: tree[section] for section in sections}, sort_keys=True)
    return f"{PUBLIC}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
