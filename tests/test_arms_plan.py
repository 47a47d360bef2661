"""Plan of a comparison: arms of one budget that differ in their federation only."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedgan.apportion import limit_shares
from fedgan.comparison_folder import ComparisonFolder
from fedgan.config import Settings, from_dict, load_scenario, to_dict
from fedgan.errors import ConfigError
from fedgan.evaluation.arms.summary import EVALUATOR_KEYS, check_comparable
from fedgan.runs.budget import apportion_images, images_per_round
from fedgan.runs.round_state import is_evaluated
from simulations.comparison.arm import (
    FEDERATION,
    POOLED,
    STANDALONE,
    Arm,
    FederatedStart,
    Job,
    Outcome,
    read_job,
    write_job,
)
from simulations.comparison.notes import differences_of_arms
from simulations.comparison.plan import plan

FOLDER = ComparisonFolder(Path("/nowhere/study"))
ROOT = Path("/nowhere/shards")
SCENARIOS = Path(__file__).parents[1] / "simulations"
SIZES = {"alpha": 40, "beta": 24, "gamma": 16}
WIDE = "wide: federation.rounds=2; federation.exchange=generator,ema"
PROXIMAL = "fedprox: federation.strategy=fedprox; training.proximal_mu=0.01"
ALL = (
    "centralized",
    "federated",
    "local",
    "generator-only",
    "local-discriminators",
    "finetuned",
    "coalitions",
    WIDE,
    PROXIMAL,
)


def scenario(arms: tuple[str, ...] = ALL, hospitals: int = 3, **changes: Any) -> Settings:
    """Settings with these arms; a change is `section_key=value`."""
    tree: dict[str, Any] = {
        "seed": 5,
        "training": {"kimg": 0.4, "batch_size": 4},
        "federation": {"hospitals": hospitals, "rounds": 5},
        "evaluation": {"every": 1},
        "comparison": {"arms": list(arms), "seeds": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("_")
        tree[section][name] = value
    return from_dict(tree)


def planned(settings: Settings, sizes: dict[str, int] | None = None) -> list[Arm]:
    return plan(settings, FOLDER, sizes or SIZES, ROOT)


def images_of(arm: Arm) -> dict[str, int]:
    """Images that the jobs of an arm will show, by hospital, from the settings of each job."""
    shown: dict[str, int] = {}
    for job in arm.jobs:
        settings = job.settings
        if job.kind == STANDALONE:
            name = job.members[0] if len(job.members) == 1 else POOLED
            shown[name] = sum(job.images)
            continue
        batch, federation = settings.training.batch_size, settings.federation
        totals = images_per_round(settings.training.kimg, federation.rounds, batch)
        rows = apportion_images(
            [SIZES[name] for name in job.members], totals, batch, federation.local_images == "equal"
        )
        for number, name in enumerate(job.members):
            shown[name] = sum(row[number] for row in rows)
    return shown


def varying(settings: Settings) -> dict[str, Any]:
    """The settings without those that arms and seeds may differ in."""
    tree = to_dict(settings)
    del tree["federation"], tree["seed"], tree["training"]["proximal_mu"]
    return tree


# --- one budget ----------------------------------------------------------------------------------


@hypothesis_settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=2, max_size=4).map(
        lambda sizes: sorted(sizes, reverse=True)
    ),
    kimg=st.floats(0.05, 20.0),
    rounds=st.integers(2, 20),
    batch=st.sampled_from([4, 8, 16]),
    local_images=st.sampled_from(["proportional", "equal"]),
    share=st.floats(0.01, 0.9),
    arms=st.permutations([*ALL[:-2], "wide: federation.rounds=1", PROXIMAL]),
)
def test_every_arm_sees_the_same_number_of_images(
    sizes: list[int],
    kimg: float,
    rounds: int,
    batch: int,
    local_images: str,
    share: float,
    arms: list[str],
) -> None:
    assume(kimg * 1000 / rounds >= batch * len(sizes))
    settings = scenario(
        tuple(arms),
        len(sizes),
        training_kimg=kimg,
        training_batch_size=batch,
        federation_rounds=rounds,
        federation_local_images=local_images,
        comparison_finetune_share=share,
    )
    names = {f"hospital-{number}": size for number, size in enumerate(sizes)}
    found = planned(settings, names)
    budget = -(-round(kimg * 1000) // batch) * batch
    assert {sum(arm.hospital_images.values()) for arm in found} == {budget}
    for arm in found:
        if arm.is_per_hospital:
            before = [job.start.images_seen if job.start else 0 for job in arm.jobs]
            assert sum(before) + sum(sum(job.images) for job in arm.jobs) == budget
        elif arm.jobs[0].kind == STANDALONE:
            assert sum(arm.jobs[0].images) == budget
        assert all(images >= 0 and images % batch == 0 for job in arm.jobs for images in job.images)


@pytest.mark.parametrize("local_images", ["proportional", "equal"])
def test_planned_images_equal_those_of_the_jobs(local_images: str) -> None:
    for arm in planned(scenario(federation_local_images=local_images)):
        if arm.name == "finetuned":
            continue
        assert images_of(arm) == dict(arm.hospital_images), arm.label


@hypothesis_settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 500), min_size=2, max_size=5).map(
        lambda sizes: sorted(sizes, reverse=True)
    ),
    batches=st.integers(5, 200),
    equal=st.booleans(),
    share=st.floats(0.01, 0.9),
)
def test_local_hospital_sees_its_federated_images_round_by_round(
    sizes: list[int], batches: int, equal: bool, share: float
) -> None:
    rounds = 5
    assume(batches / rounds >= len(sizes))
    settings = scenario(
        ("federated", "local", "finetuned"),
        len(sizes),
        training_kimg=batches * 4 / 1000,
        federation_local_images="equal" if equal else "proportional",
        comparison_finetune_share=share,
        comparison_seeds=1,
    )
    names = {f"hospital-{number}": size for number, size in enumerate(sizes)}
    federated, local, finetuned = planned(settings, names)
    assert (
        dict(local.hospital_images)
        == dict(federated.hospital_images)
        == dict(finetuned.hospital_images)
    )
    counted = limit_shares(sizes, settings.federation.max_share)
    rows = apportion_images(counted, images_per_round(batches * 4 / 1000, rounds, 4), 4, equal)
    for number, (name, job, tuned) in enumerate(
        zip(names, local.jobs, finetuned.jobs, strict=True)
    ):
        own = tuple(row[number] for row in rows)
        assert (job.members, job.kind, job.images) == ((name,), STANDALONE, own)
        assert tuned.start is not None
        begin = tuned.start.round
        assert tuned.start.folder == federated.folder
        assert is_evaluated(federated.jobs[0].settings, begin)
        assert 1 <= begin < rounds
        assert tuned.images == own[begin:]
        # images of this hospital until then, not of all hospitals
        assert tuned.start.images_seen == sum(own[:begin])
        assert tuned.start.images_seen + sum(tuned.images) == finetuned.hospital_images[name]


def test_finetuning_starts_at_the_kept_round_nearest_to_its_share() -> None:
    def begin(share: float, every: int) -> int:
        settings = scenario(
            ("federated", "finetuned"),
            federation_rounds=10,
            evaluation_every=every,
            comparison_finetune_share=share,
        )
        job = planned(settings)[1].jobs[0]
        assert job.start is not None
        return job.start.round

    assert [begin(share, 1) for share in (0.1, 0.2, 0.5, 0.9)] == [9, 8, 5, 1]
    assert [begin(share, 4) for share in (0.1, 0.5, 0.9)] == [8, 4, 4]


# --- one training --------------------------------------------------------------------------------


def test_jobs_differ_in_federation_and_seed_only() -> None:
    settings = scenario()
    arms = planned(settings)
    expected = varying(settings)
    expected["data"] |= {"root": str(ROOT), "seed": settings.seed}
    for arm in arms:
        for job in arm.jobs:
            assert varying(job.settings) == expected, arm.label
            assert job.settings.seed == arm.seed
            changed = {text.partition("=")[0] for text in arm.overrides}
            if "training.proximal_mu" not in changed:
                assert job.settings.training == settings.training
            known, own = to_dict(settings.federation), to_dict(job.settings.federation)
            assert {f"federation.{key}" for key in own if own[key] != known[key]} <= changed | {
                "federation.members"
            }


def test_seeds_change_training_and_not_data() -> None:
    arms = planned(scenario(comparison_seeds=3))
    assert sorted({arm.seed for arm in arms}) == [5, 6, 7]
    for _, same in itertools.groupby(
        sorted(arms, key=lambda arm: arm.name), key=lambda arm: arm.name
    ):
        one = list(same)
        assert [arm.seed for arm in one] == [5, 6, 7]
        assert len({arm.folder for arm in one}) == 3
        assert (
            len(
                {
                    (arm.kind, arm.members, tuple(arm.hospital_images.items()), arm.overrides)
                    for arm in one
                }
            )
            == 1
        )
        assert len({tuple(job.images for job in arm.jobs) for arm in one}) == 1
    assert {job.settings.data_seed for arm in arms for job in arm.jobs} == {5}
    assert {job.settings.data.root for arm in arms for job in arm.jobs} == {str(ROOT)}
    assert len({job.folder for arm in arms for job in arm.jobs}) == sum(
        len(arm.jobs) for arm in arms
    )


def test_explicit_data_seed_is_kept() -> None:
    settings = from_dict(to_dict(scenario()), ["data.seed=11"])
    assert {job.settings.data_seed for arm in planned(settings) for job in arm.jobs} == {11}


def test_named_arms_have_their_settings() -> None:
    arms = {arm.name: arm for arm in planned(scenario(comparison_seeds=1))}
    central, local = arms["centralized"], arms["local"]
    assert [(job.kind, job.members, job.folder) for job in central.jobs] == [
        (STANDALONE, tuple(SIZES), central.folder)
    ]
    assert [(job.kind, job.members) for job in local.jobs] == [
        (STANDALONE, (name,)) for name in SIZES
    ]
    assert local.is_per_hospital
    assert arms["finetuned"].is_per_hospital
    exchange = {
        name: arms[name].jobs[0].settings.federation.exchange
        for name in ("generator-only", "local-discriminators")
    }
    assert exchange == {
        "generator-only": ("generator",),
        "local-discriminators": ("generator", "ema"),
    }
    proximal = arms["fedprox"].jobs[0].settings
    assert (proximal.federation.strategy, proximal.training.proximal_mu) == ("fedprox", 0.01)
    assert arms["fedprox"].overrides == ("federation.strategy=fedprox", "training.proximal_mu=0.01")
    for name in ("federated", "generator-only", "local-discriminators", "wide", "fedprox"):
        assert [(arms[name].kind, job.kind, job.members) for job in arms[name].jobs] == [
            ("federated", FEDERATION, tuple(SIZES))
        ]


def test_centralized_variant_may_drop_hospital_conditioning() -> None:
    tree = to_dict(
        scenario(
            (
                "centralized",
                "unconditioned < centralized: model.hospitals=0",
                "fedavg: model.hospitals=0",
            )
        )
    )
    settings = from_dict(
        tree, ["federation.share_label_counts=true", "model.hospitals=3", "comparison.seeds=1"]
    )
    central, unconditioned, federated = planned(settings)
    assert [arm.kind for arm in (central, unconditioned, federated)] == [
        "centralized",
        "centralized",
        "federated",
    ]
    assert [
        arm.jobs[0].settings.model.hospitals for arm in (central, unconditioned, federated)
    ] == [
        3,
        0,
        0,
    ]
    assert central.jobs[0].images == unconditioned.jobs[0].images
    assert (unconditioned.jobs[0].kind, unconditioned.overrides) == (
        STANDALONE,
        ("model.hospitals=0",),
    )
    with pytest.raises(ConfigError, match="of a pooled training, which has no federation"):
        planned(
            from_dict(
                tree, ["comparison.arms=unconditioned < centralized: federation.weights=equal"]
            )
        )
    with pytest.raises(ConfigError, match="has the parent 'local': write 'unconditioned: "):
        planned(from_dict(tree, ["comparison.arms=unconditioned < local: model.hospitals=0"]))


@pytest.mark.parametrize("hospitals", [2, 3, 4])
def test_coalitions_are_the_proper_subsets_of_hospitals(hospitals: int) -> None:
    sizes = {f"hospital-{number}": 10 * (hospitals - number) for number in range(hospitals)}
    arms = planned(scenario(("coalitions",), hospitals, comparison_seeds=1), sizes)
    expected = [
        chosen for count in range(1, hospitals) for chosen in itertools.combinations(sizes, count)
    ]
    assert sorted(arm.members for arm in arms) == sorted(expected)
    for arm in arms:
        (job,) = arm.jobs
        assert (arm.kind, job.members, list(arm.hospital_images)) == (
            "coalition",
            arm.members,
            list(arm.members),
        )
        assert job.kind == (STANDALONE if len(arm.members) == 1 else FEDERATION)
        assert job.settings.federation.participants == len(arm.members)


@pytest.mark.parametrize("hospitals", [2, 3, 6])
def test_leave_one_out_has_one_coalition_per_hospital(hospitals: int) -> None:
    sizes = {f"hospital-{number}": 10 * (hospitals - number) for number in range(hospitals)}
    arms = planned(scenario(("leave-one-out",), hospitals, comparison_seeds=1), sizes)
    assert [arm.members for arm in arms] == [
        tuple(name for name in sizes if name != out) for out in sizes
    ]
    assert {arm.kind for arm in arms} == {"coalition"}
    assert len({arm.folder for arm in arms}) == hospitals


@pytest.mark.parametrize(
    "given",
    [("federation.strategy=krum",), ("federation.strategy=fedprox", "training.proximal_mu=0.1")],
)
def test_standalone_training_has_no_strategy_and_no_proximal_term(given: tuple[str, ...]) -> None:
    arms = ("centralized", "federated", "local", "finetuned", "coalitions")
    settings = from_dict(to_dict(scenario(arms, comparison_seeds=1)), given)
    for arm in planned(settings):
        for job in arm.jobs:
            own = (job.settings.federation.strategy, job.settings.training.proximal_mu)
            federated = (settings.federation.strategy, settings.training.proximal_mu)
            assert own == (federated if job.kind == FEDERATION else ("fedavg", 0.0)), arm.label


# --- impossible arms -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arms", "text"),
    [
        (("centralised",), "comparison.arms has 'centralised': give centralized, federated, local"),
        (
            ("federated", "x: model.channel_max=8"),
            "would change model.channel_max: arms may differ in how they federate alone",
        ),
        (("x: training.learning_rate=1",), "would change training.learning_rate"),
        (("x: federation.strategy=fedadam; seed=3",), "would change seed"),
        (("x:",), "names no key"),
        (("x: federation.strategy=fedmean",), "must be one of"),
        (("x: federation.stategy=fedadam",), "did you mean 'federation.strategy'"),
        (("local", "federated", "local"), "comparison.arms has 'local' twice"),
        (("a b: federation.rounds=2", "a-b: federation.rounds=4"), "twice"),
        (("local", "finetuned"), "continues the arm 'federated': add that one too"),
    ],
)
def test_impossible_arms_are_refused(arms: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(scenario(arms))
    assert text in str(caught.value)


@pytest.mark.parametrize("every", [0, 5, 7])
def test_finetuning_needs_a_kept_round_before_the_last(every: int) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"evaluation\.every = {every} keeps none before the last of 5: lower",
    ):
        planned(scenario(("federated", "finetuned"), evaluation_every=every))


def test_coalitions_of_too_many_hospitals_are_refused() -> None:
    sizes = {f"hospital-{number}": 10 for number in range(5)}
    with pytest.raises(
        ConfigError,
        match="would train 30 federations per seed: it is for 4 hospitals at most; 'leave-one-out'",
    ):
        planned(scenario(("coalitions",), 5), sizes)


@pytest.mark.parametrize(
    "name",
    [
        "real",
        "pooled",
        "local",
        "federated",
        "generator-only",
        "leave-one-out",
        "coalitions",
        "coalition a",
        "",
    ],
)
def test_reserved_arm_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"needs a name of its own, not '{name}'"):
        planned(scenario((f"{name}: federation.rounds=2",)))


@pytest.mark.parametrize("change", ["members=alpha,beta", "hospitals=2", "threads=2"])
def test_members_hospitals_and_threads_are_the_same_in_all_arms(change: str) -> None:
    key = change.partition("=")[0]
    with pytest.raises(
        ConfigError,
        match=rf"would change federation\.{key}: arms may differ in how they federate alone",
    ):
        planned(scenario((f"x: federation.rounds=2; federation.{change}",)))


@pytest.mark.parametrize("exchange", ["generator", "generator,ema"])
def test_finetuning_needs_the_federated_discriminator(exchange: str) -> None:
    settings = from_dict(
        to_dict(scenario(("federated", "finetuned"))), [f"federation.exchange={exchange}"]
    )
    with pytest.raises(ConfigError, match=r"discriminator: add it to federation\.exchange"):
        planned(settings)


# --- job files ----------------------------------------------------------------------------------


def test_job_file_round_trip(tmp_path: Path) -> None:
    jobs: list[Job] = [job for arm in planned(scenario(comparison_seeds=1)) for job in arm.jobs]
    assert {job.start is None for job in jobs} == {True, False}
    for number, job in enumerate(jobs):
        write_job(job, tmp_path / f"{number}.json")
        assert read_job(tmp_path / f"{number}.json") == job
    begun = next(job for job in jobs if job.start)
    assert isinstance(begun.start, FederatedStart)


@pytest.mark.parametrize(
    "path", sorted(SCENARIOS.glob("*compare.toml")), ids=lambda path: path.stem
)
def test_arms_of_shipped_comparisons_are_comparable(path: Path) -> None:
    """Otherwise everything would be trained and then refused."""
    alike = {
        "images_seen": 1,
        "may_differ": {},
        "exhausted": [],
        "resolution": 32,
        "label_names": ["a"],
    }
    evaluator = dict.fromkeys(EVALUATOR_KEYS, "one")
    arms = [
        {
            "name": arm.name,
            "seed": arm.seed,
            "settings": to_dict(arm.jobs[0].settings),
            "evaluator": evaluator,
            **alike,
        }
        for arm in planned(load_scenario(path))
    ]
    assert len(arms) > 1
    check_comparable(arms)


def test_notes_name_the_arms_whose_average_is_made_by_the_server() -> None:
    arms = planned(
        scenario(
            (
                "centralized",
                "federated",
                "short: federation.exchange=generator,discriminator",
                "local",
            )
        )
    )
    text = " ".join(differences_of_arms([Outcome(arm) for arm in arms], {}))
    assert "over rounds, by the server, in short; over steps elsewhere" in text
    only_federated = [Outcome(arm) for arm in planned(scenario(("federated",)))]
    assert "average" not in " ".join(differences_of_arms(only_federated, {}))
