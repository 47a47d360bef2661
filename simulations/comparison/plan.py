"""Plan of a comparison: from the scenario to a list of arms, each a list of jobs.

All jobs use the scenario's model, augment and training sections unchanged; only `federation.*`
(with it `training.proximal_mu` of FedProx, and `model.hospitals`) may differ between arms. In an
ablation (ablation.py) more may. Every arm shows its discriminators the same number of images,
summed over its hospitals and apportioned in whole batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from fedgan.comparison_folder import ComparisonFolder
from fedgan.config import Settings, from_dict, to_dict
from fedgan.errors import ConfigError
from fedgan.privacy.validator import check_private
from fedgan.runs.preparation import shards_of
from fedgan.runs.round_state import is_evaluated
from simulations.comparison import ablation
from simulations.comparison.arm import (
    POOLED,
    STANDALONE,
    Arm,
    FederatedStart,
    Job,
    arm_named_in_errors,
    centralized_arm,
    federated_arm,
    images_per_hospital,
    images_per_round,
    local_settings,
    standalone_settings,
)

KINDS = ("centralized", "federated", "local", "finetuned", "leave-one-out", "coalitions")
NAMED = {  # federations with a name of their own
    "generator-only": ("federation.exchange=generator",),
    "local-discriminators": ("federation.exchange=generator,ema",),
}
OVERRIDABLE = ("federation.", "training.proximal_mu", "model.hospitals")
NOT_OVERRIDABLE = ("federation.members", "federation.hospitals", "federation.threads")
MOST_PLAYERS = 4  # of a Shapley value: 2^n - 2 federations are trained


def plan_of(settings: Settings, folder: ComparisonFolder) -> list[Arm]:
    """All arms of a comparison that was prepared in `folder`."""
    sizes = {row["name"]: row["images"]["train"] for row in folder.hospital_rows()}
    return plan(settings, folder, sizes, shards_of(settings, folder))


def plan(
    settings: Settings, folder: ComparisonFolder, sizes: Mapping[str, int], root: Path
) -> list[Arm]:
    """All arms of a comparison, seed by seed.

    `sizes`: training images of each hospital, in the order of the federation; `root`: the shards.
    Raises `ConfigError` for an arm that is unknown, occurs twice, is impossible with these
    settings, or would void its privacy guarantee.
    """
    # data that do not depend on the arm's seed: the same shards, the same partition
    data = dataclasses.replace(settings.data, root=str(root), seed=settings.data_seed)
    specs = settings.comparison.arms
    if "finetuned" in specs and "federated" not in specs:
        raise ConfigError(
            "comparison.arms has 'finetuned', which continues the arm 'federated': add that one too"
        )
    arms: list[Arm] = []
    for number in range(settings.comparison.seeds):
        seeded = dataclasses.replace(settings, data=data, seed=settings.seed + number)
        if settings.comparison.kind == ablation.KIND:
            arms += _ablation_arms(seeded, folder, sizes, has_phantoms=not settings.data.root)
        else:
            arms += [arm for spec in specs for arm in _arms_of(spec, seeded, folder, sizes)]
    for arm in arms:
        for job in arm.jobs:
            with arm_named_in_errors(arm.name):
                check_private(job.settings)
        if sum(other.folder == arm.folder for other in arms) > 1:
            raise ConfigError(
                f"comparison.arms has '{arm.name}' twice: give each arm its own name, "
                "e.g. 'wide: …'"
            )
    return arms


def _ablation_arms(
    settings: Settings, folder: ComparisonFolder, sizes: Mapping[str, int], has_phantoms: bool
) -> list[Arm]:
    """The arms of an ablation: the baseline, and variants that each modify an earlier arm."""
    specs = settings.comparison.arms
    if not specs or specs[0] not in ablation.BASELINES:
        raise ConfigError(
            "the comparison.arms of an ablation begin with the baseline of all variants: "
            f"{' or '.join(ablation.BASELINES)}"
        )
    arms, variants = list[Arm](), dict[str, ablation.Variant]()
    for spec in specs:
        if ":" not in spec:
            arms += _arms_of(spec, settings, folder, sizes)
            continue
        variant = ablation.read_variant(spec, variants, specs[0])
        _check_name(variant.name, spec)
        with arm_named_in_errors(variant.name):
            arms.append(ablation.variant_arm(variant, settings, folder, sizes, has_phantoms))
        variants[variant.name] = variant
    return arms


def _arms_of(
    spec: str, settings: Settings, folder: ComparisonFolder, sizes: Mapping[str, int]
) -> list[Arm]:
    """The arms of one entry of `comparison.arms`, with the seed of `settings`."""
    name, colon, keys = (part.strip() for part in spec.partition(":"))
    if name in NAMED and not colon:
        return [federated_arm(name, settings, folder, sizes, NAMED[name])]
    if colon:
        name, _, parent = (part.strip() for part in name.partition("<"))
        _check_name(name, spec)
        own = _overrides(spec, keys)
        if parent == "centralized":
            if other := [text for text in own if not text.startswith("model.hospitals")]:
                raise ConfigError(
                    f"comparison.arms: '{spec}' would change {other[0].partition('=')[0]} of a "
                    "pooled training, which has no federation: it may change model.hospitals alone"
                )
            changed = from_dict(to_dict(settings), own, source=f"arm '{name}'")
            arm = centralized_arm(name, changed, folder, sizes)
            return [dataclasses.replace(arm, overrides=own)]
        if parent not in ("", "federated"):
            raise ConfigError(
                f"comparison.arms: '{spec}' has the parent '{parent}': write '{name}: …' or "
                f"'{name} < centralized: …'"
            )
        return [federated_arm(name, settings, folder, sizes, own)]
    match name:
        case "centralized":
            return [centralized_arm(name, settings, folder, sizes)]
        case "federated":
            return [federated_arm(name, settings, folder, sizes)]
        case "local":
            return [_per_hospital_arm(name, settings, folder, sizes)]
        case "finetuned":
            return [_finetuned_arm(settings, folder, sizes)]
        case "leave-one-out" | "coalitions":
            return _coalition_arms(settings, folder, sizes, only_one_out=name == "leave-one-out")
    raise ConfigError(
        f"comparison.arms has '{spec}': give {', '.join((*KINDS, *NAMED))}, or a federation with "
        "keys of its own, e.g. 'fedadam: federation.strategy=fedadam'"
    )


def _check_name(name: str, spec: str) -> None:
    if name in ("", "real", POOLED, *KINDS, *NAMED) or name.startswith("coalition"):
        raise ConfigError(
            f"comparison.arms: '{spec}' needs a name of its own, not '{name}': write e.g. "
            "'fedadam: …'"
        )


def _overrides(spec: str, keys: str) -> tuple[str, ...]:
    """The `key=value` texts after an arm's name, separated by semicolons."""
    found = tuple(text.strip() for text in keys.split(";") if text.strip())
    for text in found:
        if not text.startswith(OVERRIDABLE) or text.startswith(NOT_OVERRIDABLE):
            raise ConfigError(
                f"comparison.arms: '{spec}' would change {text.partition('=')[0]}: arms may differ "
                "in how they federate alone (federation.* without members, hospitals and threads; "
                "training.proximal_mu; model.hospitals); use comparison.kind = 'ablation' to "
                "change more"
            )
    if not found:
        raise ConfigError(
            f"comparison.arms: '{spec}' names no key: write e.g. "
            "'fedadam: federation.strategy=fedadam'"
        )
    return found


# --- one function per kind -----------------------------------------------------------------------


def _per_hospital_arm(
    kind: str,
    settings: Settings,
    folder: ComparisonFolder,
    sizes: Mapping[str, int],
    first: int = 0,
    source: Path | None = None,
) -> Arm:
    """Each hospital alone, with as many images of the budget as it sees in the federation.

    `source`, `first`: each continues the model of this federation's round `first`.
    """
    run, images_of = folder.arm(kind, settings.seed), images_per_hospital(settings, sizes)
    jobs = tuple(
        Job(
            run.path / "members" / hospital,
            STANDALONE,
            local_settings(settings, hospital, sizes),
            tuple(images[first:]),
            FederatedStart(source, first, sum(images[:first])) if source else None,
        )
        for hospital, images in images_of.items()
    )
    seen = {hospital: sum(images) for hospital, images in images_of.items()}
    members = tuple(sizes)
    return Arm(
        kind, kind, settings.seed, run.path, jobs, seen, is_per_hospital=True, members=members
    )


def _finetuned_arm(settings: Settings, folder: ComparisonFolder, sizes: Mapping[str, int]) -> Arm:
    """The federation up to a round that it keeps, then each hospital alone with its rest."""
    rounds, share = settings.federation.rounds, settings.comparison.finetune_share
    kept = [number for number in range(1, rounds) if is_evaluated(settings, number)]
    if not kept:
        raise ConfigError(
            "the arm 'finetuned' starts at a round whose checkpoint the federation keeps, and "
            f"evaluation.every = {settings.evaluation.every} keeps none before the last of "
            f"{rounds}: lower evaluation.every"
        )
    if "discriminator" not in settings.federation.exchange:
        raise ConfigError(
            "the arm 'finetuned' continues with the federation's discriminator: add it to "
            "federation.exchange"
        )
    first = min(kept, key=lambda number: abs(number - (1 - share) * rounds))
    source = folder.arm("federated", settings.seed).path
    return _per_hospital_arm("finetuned", settings, folder, sizes, first, source)


def _coalition_arms(
    settings: Settings,
    folder: ComparisonFolder,
    sizes: Mapping[str, int],
    only_one_out: bool = False,
) -> list[Arm]:
    """A federation per proper coalition of hospitals, each with the whole budget.

    All coalitions give Shapley values. `only_one_out`: only the coalitions without a single
    hospital, for the leave-one-out loss.
    """
    names = list(sizes)
    if only_one_out:
        return [
            _coalition_arm(settings, folder, {name: sizes[name] for name in names if name != out})
            for out in names
        ]
    if len(names) > MOST_PLAYERS:
        raise ConfigError(
            f"the arm 'coalitions' would train {2 ** len(names) - 2} federations per seed: it is "
            f"for {MOST_PLAYERS} hospitals at most; 'leave-one-out' trains one per hospital"
        )
    groups = [
        {name: sizes[name] for number, name in enumerate(names) if bits >> number & 1}
        for bits in range(1, 2 ** len(names) - 1)
    ]
    return [_coalition_arm(settings, folder, group) for group in groups]


def _coalition_arm(settings: Settings, folder: ComparisonFolder, sizes: Mapping[str, int]) -> Arm:
    """The federation of some hospitals; a single one trains standalone, which is equivalent."""
    name, members = f"coalition {'+'.join(sizes)}", tuple(sizes)
    if len(members) > 1:
        return federated_arm(name, settings, folder, sizes, kind="coalition")
    run, images = folder.arm(name, settings.seed), tuple(images_per_round(settings))
    job = Job(run.path, STANDALONE, standalone_settings(settings, members), images)
    seen = {members[0]: sum(images)}
    return Arm("coalition", name, settings.seed, run.path, (job,), seen, members=members)
