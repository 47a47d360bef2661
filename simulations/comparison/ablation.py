"""An ablation's rungs: arms that each change something of the one that they come from. Words in, settings out.

A comparison asks what a way to federate is worth, so its arms share everything else. An ablation (comparison.kind =
"ablation") asks what single parts of the training are worth: a rung may also change model, augment, training and privacy.
What it may never change is the data, the judgement and the budget of images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedgan.comparison_folder import ComparisonFolder
from fedgan.config import ModelSettings, PrivacySettings, Settings, from_dict, to_dict
from fedgan.errors import ConfigError
from simulations.comparison.arm import STANDALONE, Arm, Job, centralized, federated, named, totals

KIND = "ablation"
ROOTS = ("federated", "centralized")  # the trainings that a ladder can stand on
PUBLIC = (
    "public"  # as training.warm_start: the training on phantoms that comparison.public describes
)
OVERRIDABLE = ("model.", "augment.", "training.", "privacy.", "federation.")
NOT_OVERRIDABLE = {
    "training.kimg": "it is the budget that all arms share",
    "training.device": "all arms train on one",
    "federation.members": "all arms have the same hospitals",
    "federation.hospitals": "all arms have the same hospitals",
    "federation.threads": "all arms are timed alike",
    "privacy.max_epsilon": "the arms share their shards' ledgers, so one arm's steps would end the next",
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
APART = 1000  # added to the seed of the data: public phantoms are others than the hospitals'


@dataclass(frozen=True)
class Variant:
    """One arm of a ladder. `changes`: its own keys, `overrides`: those of all rungs from the root `kind` up to it."""

    name: str
    parent: str
    kind: str
    changes: tuple[str, ...]
    overrides: tuple[str, ...]


def ladder(
    settings: Settings,
    folder: ComparisonFolder,
    sizes: Mapping[str, int],
    drawn: bool,
    plain: Callable[[str, Settings, ComparisonFolder, Mapping[str, int]], list[Arm]],
    check_name: Callable[[str, str], None],
) -> list[Arm]:
    """The arms of an ablation: `plain` ones as in any comparison, and the rungs, each from one before it.

    `drawn`: the hospitals' images are the scenario's phantoms. Raises `ConfigError` for a rung that cannot be had.
    """
    specs = settings.comparison.arms
    if not specs or specs[0] not in ROOTS:
        raise ConfigError(
            f"an ablation's comparison.arms begins with what all rungs come from: {' or '.join(ROOTS)}"
        )
    arms, variants = list[Arm](), dict[str, Variant]()
    for spec in specs:
        if not is_variant(spec):
            arms += plain(spec, settings, folder, sizes)
            continue
        variant = read_variant(spec, variants, specs[0])
        check_name(variant.name, spec)
        with named(variant.name):
            arms.append(_variant(variant, settings, folder, sizes, drawn))
        variants[variant.name] = variant
    return arms


def _variant(
    variant: Variant,
    settings: Settings,
    folder: ComparisonFolder,
    sizes: Mapping[str, int],
    drawn: bool,
) -> Arm:
    own = from_dict(to_dict(settings), variant.overrides, source=f"arm '{variant.name}'")
    public = None
    if own.training.warm_start == PUBLIC:
        public = _public(public_training(settings, own.model, drawn), folder)
        own = dataclasses.replace(
            own, training=dataclasses.replace(own.training, warm_start=str(public.folder))
        )
    build = federated if variant.kind == "federated" else centralized
    arm = build(variant.name, own, folder, sizes)
    jobs = tuple(
        dataclasses.replace(job, after=public.folder if public else None) for job in arm.jobs
    )
    return dataclasses.replace(
        arm,
        jobs=jobs,
        parent=variant.parent,
        changes=variant.changes,
        overrides=variant.overrides,
        public=public,
    )


def _public(settings: Settings, folder: ComparisonFolder) -> Job:
    """A training on phantoms that belong to nobody. Rungs with the same networks share it."""
    run = folder.arm(public_name(settings), settings.seed)
    return Job(run.path, STANDALONE, settings, tuple(totals(settings)))


# --- words -----------------------------------------------------------------------------------------


def is_variant(spec: str) -> bool:
    """Whether an entry of `comparison.arms` has keys of its own."""
    return ":" in spec


def read_variant(spec: str, before: Mapping[str, Variant], root: str) -> Variant:
    """The rung that 'NAME < PARENT: key=value; …' stands for; without '< PARENT' it comes from `root`.

    `before`: the rungs until now by name, `root`: the first arm of the ladder. Raises `ConfigError` for a parent that does
    not stand before it, or a key that arms share.
    """
    head, _, keys = spec.partition(":")
    name, _, parent = (part.strip() for part in head.partition("<"))
    parent = parent or root
    known = before.get(parent) or (
        Variant(parent, "", parent, (), ()) if parent in ROOTS and parent == root else None
    )
    if known is None:
        raise ConfigError(
            f"comparison.arms: '{name}' comes from '{parent}', which is no rung before it: name one of "
            f"{', '.join([root, *before])}, and begin the list with {' or '.join(ROOTS)}"
        )
    changes = tuple(text.strip() for text in keys.split(";") if text.strip())
    if not changes:
        raise ConfigError(
            f"comparison.arms: '{spec}' changes nothing: write e.g. '{name or 'NAME'}: training.r1_gamma=0'"
        )
    for text in changes:
        _check_key(name, text.partition("=")[0].strip())
    return Variant(name, parent, known.kind, changes, _merged(known.overrides, changes))


def _check_key(name: str, key: str) -> None:
    if key in NOT_OVERRIDABLE:
        raise ConfigError(
            f"comparison.arms: '{name}' would change {key}: {NOT_OVERRIDABLE[key]}; set it for the whole scenario"
        )
    if not key.startswith(OVERRIDABLE):
        raise ConfigError(
            f"comparison.arms: '{name}' would change {key}: the rungs of an ablation may change {', '.join(OVERRIDABLE)[:-1]} "
            "alone; data and judgement are the same for all"
        )


def _merged(old: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
    """Overrides in order, each key once: the newest value counts."""
    return tuple(f"{key}={value}" for key, value in {**keys_of(old), **keys_of(new)}.items())


def keys_of(overrides: tuple[str, ...]) -> dict[str, str]:
    """{key: value} of `key=value` texts."""
    return {
        key.strip(): value.strip() for key, _, value in (text.partition("=") for text in overrides)
    }


# --- a training on public phantoms -----------------------------------------------------------------


def public_training(settings: Settings, model: ModelSettings, drawn: bool) -> Settings:
    """The training at home that a rung with training.warm_start = 'public' begins from: the scenario's own, on other phantoms.

    `model`: the rung's networks, which it has to fit; `drawn`: the hospitals' own images are the scenario's phantoms. No
    privacy: nothing private is seen. Raises `ConfigError` for a key that is not of such a training, and for phantoms that are
    the hospitals' own.
    """
    for text in settings.comparison.public:
        key = text.partition("=")[0].strip()
        if not key.startswith(PUBLIC_KEYS) or key in ("training.warm_start", "training.device"):
            raise ConfigError(
                f"comparison.public: {key} is no key of a training on phantoms: give {', '.join(PUBLIC_KEYS)}"
            )
    data = dataclasses.replace(
        settings.data, root="", partition="institution", seed=settings.data_seed + APART
    )
    training = dataclasses.replace(
        settings.training, warm_start="", sampling="auto", labels="data", proximal_mu=0.0
    )
    federation = dataclasses.replace(settings.federation, strategy="fedavg", members=())
    base = dataclasses.replace(
        settings,
        data=data,
        model=model,
        training=training,
        federation=federation,
        privacy=PrivacySettings(),
    )
    found = from_dict(to_dict(base), settings.comparison.public, source="comparison.public")
    if drawn and (found.data.phantoms, found.data_seed) == (
        settings.data.phantoms,
        settings.data_seed,
    ):
        raise ConfigError(
            "comparison.public draws the very phantoms that the hospitals hold: give it another data.seed"
        )
    return found


def public_name(settings: Settings) -> str:
    """A name for a training on phantoms that tells it from any other one."""
    tree = to_dict(settings)
    facts = {
        section: tree[section] for section in ("data", "model", "augment", "training", "federation")
    }
    return f"{PUBLIC}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]}"
