"""What a comparison trains: from the scenario to a list of arms, each a list of trainings. Nothing is trained here.

An *arm* is a way to train (centralized, federated, local, …) with one seed. It is made of *jobs*: one training each, in
a run folder of its own, that one process does. All jobs use the scenario's model, augment and training sections as they
are; only `federation.*` (with it fedprox's `training.proximal_mu` and `model.hospitals`) may differ between arms, or
the comparison would be of something else; in an ablation (ablation.py) more. Every arm shows discriminators the same
number of images, summed over its hospitals, and dealt in whole batches.
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
from simulations.comparison.ablation import KIND, ladder
from simulations.comparison.arm import (
    EVERYBODY,
    FEDERATION,
    STANDALONE,
    Arm,
    Job,
    Start,
    alone,
    centralized,
    dealt,
    federated,
    named,
    standalone,
    totals,
)

__all__ = ["EVERYBODY", "FEDERATION", "STANDALONE", "Arm", "Job", "Start", "plan", "plan_of"]

KINDS = ("centralized", "federated", "local", "finetuned", "leave-one-out", "coalitions")
NAMED = {  # federations that have a name of their own
    "generator-only": ("federation.exchange=generator",),
    "local-discriminators": ("federation.exchange=generator,ema",),
}
OVERRIDABLE = (
    "federation.",
    "training.proximal_mu",
    "model.hospitals",
)  # what one federation may have that another has not
NOT_OVERRIDABLE = ("federation.members", "federation.hospitals", "federation.threads")
MOST_PLAYERS = 4  # of a Shapley value: 2^n - 2 federations are trained


def plan_of(settings: Settings, folder: ComparisonFolder) -> list[Arm]:
    """All arms of a comparison that was prepared in `folder`."""
    sizes = {row["name"]: row["images"]["train"] for row in folder.read_json(folder.hospitals)}
    return plan(settings, folder, sizes, shards_of(settings, folder))


def plan(
    settings: Settings, folder: ComparisonFolder, sizes: Mapping[str, int], root: Path
) -> list[Arm]:
    """All arms of a comparison, seed by seed.

    `sizes`: training images of each hospital, in the order of the federation; `root`: the shards.
    Raises `ConfigError` for an arm that is unknown, occurs twice, cannot be had with these settings, or would void the
    guarantee of its privacy.
    """
    base = _fixed_data(settings, root)
    if "finetuned" in settings.comparison.arms and "federated" not in settings.comparison.arms:
        raise ConfigError(
            "comparison.arms has 'finetuned', which goes on from the arm 'federated': name that one too"
        )
    arms: list[Arm] = []
    for number in range(settings.comparison.seeds):
        seed = settings.seed + number
        seeded = dataclasses.replace(base, seed=seed)
        if settings.comparison.kind == KIND:
            arms += ladder(seeded, folder, sizes, not settings.data.root, _arms_of, _check_name)
        else:
            arms += [
                arm
                for spec in settings.comparison.arms
                for arm in _arms_of(spec, seeded, folder, sizes)
            ]
    for arm in arms:
        for job in arm.jobs:
            with named(arm.name):
                check_private(job.settings)
        if sum(other.folder == arm.folder for other in arms) > 1:
            raise ConfigError(
                f"comparison.arms has '{arm.name}' twice: give each arm its own name, e.g. 'wide: …'"
            )
    return arms


def _arms_of(
    spec: str, settings: Settings, folder: ComparisonFolder, sizes: Mapping[str, int]
) -> list[Arm]:
    """The arms that one entry of `comparison.arms` stands for, with the seed of `settings`."""
    name, colon, keys = (part.strip() for part in spec.partition(":"))
    if name in NAMED and not colon:
        return [federated(name, settings, folder, sizes, NAMED[name])]
    if colon:
        name, _, parent = (part.strip() for part in name.partition("<"))
        _check_name(name, spec)
        own = _overrides(spec, keys)
        if parent == "centralized":
            if other := [text for text in own if not text.startswith("model.hospitals")]:
                raise ConfigError(
                    f"comparison.arms: '{spec}' would change {other[0].partition('=')[0]} of a pooled training, which has no "
                    "federation: it may change model.hospitals alone"
                )
            changed = from_dict(to_dict(settings), own, source=f"arm '{name}'")
            return [dataclasses.replace(centralized(name, changed, folder, sizes), overrides=own)]
        if parent not in ("", "federated"):
            raise ConfigError(
                f"comparison.arms: '{spec}' comes from '{parent}': write '{name}: …' or '{name} < centralized: …'"
            )
        return [federated(name, settings, folder, sizes, own)]
    match name:
        case "centralized":
            return [centralized("centralized", settings, folder, sizes)]
        case "federated":
            return [federated(name, settings, folder, sizes)]
        case "local":
            return [_local(settings, folder, sizes)]
        case "finetuned":
            return [_finetuned(settings, folder, sizes)]
        case "leave-one-out" | "coalitions":
            return _coalitions(settings, folder, sizes, only_one_out=name == "leave-one-out")
    raise ConfigError(
        f"comparison.arms has '{spec}': give {', '.join((*KINDS, *NAMED))}, or a federation with keys of its own, "
        "e.g. 'fedadam: federation.strategy=fedadam'"
    )


def _check_name(name: str, spec: str) -> None:
    if name in ("", "real", EVERYBODY, *KINDS, *NAMED) or name.startswith("coalition"):
        raise ConfigError(
            f"comparison.arms: '{spec}' needs a name of its own, not '{name}': write e.g. 'fedadam: …'"
        )


def _overrides(spec: str, keys: str) -> tuple[str, ...]:
    """The `key=value` texts behind an arm's name, separated by semicolons."""
    found = tuple(text.strip() for text in keys.split(";") if text.strip())
    for text in found:
        if not text.startswith(OVERRIDABLE) or text.startswith(NOT_OVERRIDABLE):
            raise ConfigError(
                f"comparison.arms: '{spec}' would change {text.partition('=')[0]}: arms may differ in how they federate alone "
                "(federation.* without members, hospitals and threads; model.hospitals), or they would not be compared but "
                "confused; an ablation (comparison.kind = 'ablation') asks for more"
            )
    if not found:
        raise ConfigError(
            f"comparison.arms: '{spec}' names no key: write e.g. 'fedadam: federation.strategy=fedadam'"
        )
    return found


# --- one kind each ---------------------------------------------------------------------------------


def _local(settings: Settings, folder: ComparisonFolder, sizes: Mapping[str, int]) -> Arm:
    """Each hospital alone, with as many images of the budget as it sees in the federation."""
    run = folder.arm("local", settings.seed)
    images_of = dealt(settings, sizes)
    jobs = tuple(
        Job(
            run.path / "members" / hospital,
            STANDALONE,
            alone(settings, hospital, sizes),
            tuple(images),
        )
        for hospital, images in images_of.items()
    )
    shown = {hospital: sum(images) for hospital, images in images_of.items()}
    return Arm(
        "local",
        "local",
        settings.seed,
        run.path,
        jobs,
        shown,
        by_hospital=True,
        members=tuple(sizes),
    )


def _finetuned(settings: Settings, folder: ComparisonFolder, sizes: Mapping[str, int]) -> Arm:
    """The federation up to a round that it keeps, then each hospital at home with the rest of its budget."""
    rounds, share = settings.federation.rounds, settings.comparison.finetune_share
    kept = [number for number in range(1, rounds) if is_evaluated(settings, number)]
    if not kept:
        raise ConfigError(
            "the arm 'finetuned' begins at a round that the federation keeps, and "
            f"evaluation.every = {settings.evaluation.every} keeps none before the last of {rounds}: lower evaluation.every"
        )
    if "discriminator" not in settings.federation.exchange:
        raise ConfigError(
            "the arm 'finetuned' goes on with the federation's discriminator: add it to federation.exchange"
        )
    begin = min(kept, key=lambda number: abs(number - (1 - share) * rounds))
    run, source = folder.arm("finetuned", settings.seed), folder.arm("federated", settings.seed)
    images_of = dealt(settings, sizes)
    jobs = tuple(
        Job(
            run.path / "members" / hospital,
            STANDALONE,
            alone(settings, hospital, sizes),
            tuple(images[begin:]),
            Start(source.path, begin, sum(images[:begin])),
        )
        for hospital, images in images_of.items()
    )
    shown = {hospital: sum(images) for hospital, images in images_of.items()}
    return Arm(
        "finetuned",
        "finetuned",
        settings.seed,
        run.path,
        jobs,
        shown,
        by_hospital=True,
        members=tuple(sizes),
    )


def _coalitions(
    settings: Settings,
    folder: ComparisonFolder,
    sizes: Mapping[str, int],
    only_one_out: bool = False,
) -> list[Arm]:
    """A federation of each proper coalition of hospitals, each with the whole budget: what Shapley values need.

    `only_one_out`: only those that lack a single hospital, which is what its loss needs.
    """
    names = list(sizes)
    if only_one_out:
        return [
            _coalition(settings, folder, {name: sizes[name] for name in names if name != out})
            for out in names
        ]
    if len(names) > MOST_PLAYERS:
        raise ConfigError(
            f"the arm 'coalitions' would train {2 ** len(names) - 2} federations a seed: it is for {MOST_PLAYERS} hospitals at "
            "most; 'leave-one-out' trains one a hospital"
        )
    chosen = range(1, 2 ** len(names) - 1)
    groups = [
        {name: sizes[name] for number, name in enumerate(names) if group >> number & 1}
        for group in chosen
    ]
    return [_coalition(settings, folder, group) for group in groups]


def _coalition(settings: Settings, folder: ComparisonFolder, members: Mapping[str, int]) -> Arm:
    """The federation of some hospitals; a single one trains at home, which is the same training without the wire."""
    name = f"coalition {'+'.join(members)}"
    if len(members) > 1:
        return federated(name, settings, folder, members, kind="coalition")
    run, images = folder.arm(name, settings.seed), tuple(totals(settings))
    job = Job(run.path, STANDALONE, standalone(settings, tuple(members)), images)
    return Arm(
        "coalition",
        name,
        settings.seed,
        run.path,
        (job,),
        {next(iter(members)): sum(images)},
        members=tuple(members),
    )


def _fixed_data(settings: Settings, root: Path) -> Settings:
    """Settings whose data do not depend on the arm's seed: the same shards, the same dealing."""
    data = dataclasses.replace(settings.data, root=str(root), seed=settings.data_seed)
    return dataclasses.replace(settings, data=data)
