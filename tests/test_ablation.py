"""The ablation of what privacy imposes: a ladder of arms, what each may change, what it cost, and the sentence that says so."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from small_federation import write_shards
from test_compare import here, study
from test_comparison_report import tables
from test_report import Page

from fedgan import files
from fedgan.comparison_folder import ComparisonFolder
from fedgan.config import PrivacySettings, Settings, from_dict, to_dict
from fedgan.errors import ConfigError
from fedgan.evaluation.arms import ablation
from fedgan.evaluation.arms.summary import check_comparable
from fedgan.privacy.accounting import Mechanism, epsilon_of
from fedgan.privacy.ledger import NAME as LEDGER
from fedgan.privacy.ledger import Ledger
from fedgan.report.comparison import write_comparison_report
from fedgan.runs.preparation import open_prepared
from simulations.comparison.arm import check_arm
from simulations.comparison.compare import compare, prepare
from simulations.comparison.notes import not_measured
from simulations.comparison.plan import Arm, plan, plan_of

FOLDER = ComparisonFolder(Path("/nowhere/study"))
SIZES = {"alpha": 32, "beta": 20, "gamma": 12}
OPEN = "plain: model.minibatch_std_group=0; training.r1_gamma=0; training.path_length_weight=0; augment.mode=none"
CLIPPED = "clipped < plain: privacy.noise_multiplier=0; privacy.label_noise=5"
NOISY = "noise 2 < clipped: privacy.noise_multiplier=2"
WIDE = "wide < noise 2: training.batch_size=24; federation.rounds=1"
WARM = "warm < wide: training.warm_start=public"
LADDER = ("federated", OPEN, CLIPPED, NOISY, WIDE, WARM)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def scenario(*arms: str, **changes: Any) -> Settings:
    tree: dict[str, Any] = {
        "training": {"kimg": 0.1, "batch_size": 8},
        "federation": {"hospitals": 3, "rounds": 2, "batch": "shared"},
        "comparison": {"kind": "ablation", "arms": list(arms), "seeds": 1},
    }
    for key, value in changes.items():
        section, _, name = key.partition("_")
        tree.setdefault(section, {})[name] = value
    return from_dict(tree)


def planned(*arms: str, **changes: Any) -> list[Arm]:
    return plan(scenario(*arms, **changes), FOLDER, SIZES, Path("/nowhere/shards"))


# --- the plan --------------------------------------------------------------------------------------


def test_a_rung_has_the_changes_of_all_rungs_below_it_and_the_newest_value_counts() -> None:
    arms = {
        arm.name: arm for arm in planned(*LADDER, "quiet < noise 2: privacy.noise_multiplier=4")
    }
    assert [(arm.name, arm.parent) for arm in arms.values()] == [
        *(
            ("federated", ""),
            ("plain", "federated"),
            ("clipped", "plain"),
            ("noise 2", "clipped"),
            ("wide", "noise 2"),
        ),
        *(("warm", "wide"), ("quiet", "noise 2")),
    ]
    quiet = arms["quiet"].jobs[0].settings
    assert (quiet.privacy.noise_multiplier, quiet.privacy.label_noise, quiet.training.r1_gamma) == (
        4.0,
        5.0,
        0.0,
    )
    assert arms["quiet"].changes == ("privacy.noise_multiplier=4",)
    assert sum(text.startswith("privacy.noise_multiplier") for text in arms["quiet"].overrides) == 1
    assert not arms["federated"].jobs[0].settings.privacy.on


def test_a_ladder_can_stand_on_centralised_training() -> None:
    arms = planned("centralized", OPEN, CLIPPED)
    assert {(arm.kind, arm.jobs[0].kind) for arm in arms} == {("centralized", "home")}
    assert arms[2].jobs[0].settings.privacy.on


@hypothesis_settings(max_examples=30)
@given(batches=st.lists(st.integers(3, 48), min_size=1, max_size=4), kimg=st.floats(0.1, 2.0))
def test_every_rung_shows_the_budget_in_whole_batches_of_its_own(
    batches: list[int], kimg: float
) -> None:
    variants = [
        f"b{i}: training.batch_size={b}; model.minibatch_std_group=0" for i, b in enumerate(batches)
    ]
    for arm in planned("federated", *variants, training_kimg=kimg):
        batch, seen = arm.jobs[0].settings.training.batch_size, sum(arm.hospital_images.values())
        assert seen % batch == 0
        assert 0 <= seen - round(kimg * 1000) < batch


def test_rungs_that_begin_from_phantoms_share_their_training_and_wait_for_it() -> None:
    arms = {
        arm.name: arm
        for arm in planned(
            *LADDER, "warm 2 < warm: training.d_steps=2", "small < warm: model.w_dim=32"
        )
    }
    public = arms["warm"].public
    assert public is not None
    assert public == arms["warm 2"].public
    assert arms["small"].public is not None
    assert arms["small"].public.folder != public.folder, "other networks"
    assert not public.settings.privacy.on
    assert (public.settings.data.root, public.settings.model.minibatch_std_group) == ("", 0)
    job = arms["warm"].jobs[0]
    assert (job.settings.training.warm_start, job.after) == (str(public.folder), public.folder)
    assert sum(arms["warm"].hospital_images.values()) == sum(
        arms["wide"].hospital_images.values()
    ), "not in the budget"


@pytest.mark.parametrize(
    ("arms", "changes", "words"),
    [
        ((OPEN,), {}, "begins with what all rungs come from"),
        (
            ("federated", "a < b: training.d_steps=2"),
            {},
            "'a' comes from 'b', which is no rung before it",
        ),
        (("federated", "a:"), {}, "changes nothing"),
        (("federated", "a: data.resolution=16"), {}, "data and judgement are the same for all"),
        (("federated", "a: evaluation.seeds=1"), {}, "data and judgement are the same for all"),
        (("federated", "a: training.kimg=3"), {}, "the budget that all arms share"),
        (("federated", "a: privacy.max_epsilon=3"), {}, "share their shards' ledgers"),
        (
            ("federated", "a: privacy.unit=patient"),
            {},
            "share their shards' ledgers, which count one unit",
        ),
        (
            ("federated", "a: training.batch_size=no"),
            {},
            "arm 'a': training.batch_size = 'no' must be a whole number",
        ),
        (
            ("federated", "a: privacy.noise_multiplier=1"),
            {},
            "arm 'a': privacy is on, but .*model.minibatch_std_group = 4",
        ),
        (("federated", OPEN, OPEN), {}, "'plain' twice"),
        (("federated", "real: training.d_steps=2"), {}, "a name of its own"),
        (
            LADDER,
            {"comparison_public": ["data.seed=0"]},
            "arm 'warm': .* the very phantoms that the hospitals hold",
        ),
        (LADDER, {"comparison_public": ["privacy.epsilon=1"]}, "no key of a training on phantoms"),
    ],
)
def test_a_ladder_that_cannot_stand_is_refused_by_name(
    arms: tuple[str, ...], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        planned(*arms, **changes)


def test_a_comparison_that_is_no_ablation_still_lets_arms_differ_in_their_federation_alone() -> (
    None
):
    with pytest.raises(ConfigError, match=r"an ablation .* asks for more"):
        planned("federated", "a: training.d_steps=2", comparison_kind="arms")


def test_a_private_step_larger_than_a_hospital_is_refused_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    data = write_shards(tmp_path / "data", (32, 16, 8))
    variants = json.dumps(["federated", OPEN, CLIPPED, "big < clipped: training.batch_size=6"])
    settings = study(data, "comparison.kind=ablation", arms=variants)
    folder = ComparisonFolder.at(tmp_path / "study")
    settings = prepare(settings, folder, lambda event: None)
    hospitals = open_prepared(settings, folder)
    arms = {arm.name: arm for arm in plan_of(settings, folder)}
    check_arm(arms["clipped"], hospitals)
    with pytest.raises(
        ConfigError,
        match=r"arm 'big': training.batch_size = 6 is more than the \d+ images of '\w+': a Poisson",
    ):
        check_arm(arms["big"], hospitals)


def test_an_arm_is_not_begun_where_a_shards_ledger_counts_another_unit(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", (32, 16, 8))
    facts = {
        "run": "earlier",
        "kind": "discriminator steps",
        "unit": "patient",
        "delta": 1e-3,
        "data": "x",
    }
    Ledger(data / "beta" / LEDGER).reserve(Mechanism(1.0, 0.1, 1), 1, **facts)
    settings = study(
        data, "comparison.kind=ablation", arms=json.dumps(["federated", OPEN, CLIPPED])
    )
    folder = ComparisonFolder.at(tmp_path / "study")
    with pytest.raises(
        ConfigError,
        match=r"arm 'clipped': .*for each patient, and this run would count it for each image",
    ):
        compare(settings, folder)
    assert not list(folder.arms.glob("*/config.toml"))


# --- the guard -------------------------------------------------------------------------------------


def trained(
    name: str, images: int, *overrides: str, declared: bool = True, stopped: tuple[str, ...] = ()
) -> dict[str, Any]:
    settings = from_dict(
        {"training": {"kimg": 1.0, "batch_size": 16}, "federation": {"rounds": 2}}, overrides
    )
    keys = [text.partition("=")[0] for text in overrides]
    return {
        "name": name, "seed": 0, "images_seen": images, "settings": to_dict(settings), "resolution": 32,
        "label_names": ["a", "b"], "declared": keys if declared else [], "stopped": list(stopped),
        "evaluator": {"extractor": "x", "classifier": "c", "suite": "quick", "test_hash": "h"},
    }  # fmt: skip


def test_rungs_may_differ_in_what_they_declare_and_in_nothing_else() -> None:
    baseline = trained("federated", 1008)
    check_comparable(
        [
            baseline,
            trained("a", 1008, "privacy.noise_multiplier=1"),
            trained("b", 1024, "training.batch_size=64"),
        ]
    )
    for key in ("privacy.noise_multiplier=1", "training.r1_gamma=0", "augment.p=0.5"):
        with pytest.raises(ConfigError, match=key.partition("=")[0]):
            check_comparable([baseline, trained("a", 1008, key, declared=False)])
    two = [
        trained("a", 1008, "model.w_dim=32"),
        trained("b", 1008),
        trained("c", 1008, "model.w_dim=64", declared=False),
    ]
    with pytest.raises(ConfigError, match=r"model\.w_dim"):
        check_comparable(two)


@pytest.mark.parametrize("images", [960, 1008, 1088])
def test_another_size_of_batch_excuses_no_other_number_of_images(images: int) -> None:
    with pytest.raises(ConfigError, match="images_seen differs"):
        check_comparable(
            [trained("federated", 1008), trained("b", images, "training.batch_size=64")]
        )


def test_an_arm_whose_privacy_budget_ended_may_have_seen_fewer_images_but_no_more() -> None:
    baseline = trained("federated", 1008)
    check_comparable([baseline, trained("a", 512, stopped=("alpha",))])
    with pytest.raises(ConfigError, match="images_seen differs"):
        check_comparable([baseline, trained("a", 512)])


# --- the sentence ----------------------------------------------------------------------------------


def entry(
    name: str, parent: str | None, epsilon: float | None = None, private: bool = False
) -> dict[str, Any]:
    spent = (
        {"hospitals": [{"name": "alpha", "epsilon": epsilon, "unknown": False}]}
        if private
        else None
    )
    return {
        "name": name,
        "parent": parent,
        "changes": {"k": "v"},
        "privacy": spent,
        "images_seen": 10,
        "cost": {},
    }


def pair(a: str, b: str, value: float, clear: bool = True) -> dict[str, Any]:
    p = 0.001 if clear else 0.5
    return {
        "a": a,
        "b": b,
        "difference": value,
        "ci": [value - 0.01, value + 0.01],
        "p_holm": p,
        "seed_differences": None,
    }


def told(clipping: float, noise: float, clear: bool = True) -> tuple[dict[str, Any], str]:
    arms = [
        *(
            entry("federated", None),
            entry("clipped", "federated", None, True),
            entry("noise", "clipped", 3.0, True),
        ),
        entry("wide", "noise", 2.0, True),
    ]
    values = {
        "federated": 0.9,
        "clipped": 0.9 + clipping,
        "noise": 0.9 + clipping + noise,
        "wide": 0.95 + clipping + noise,
    }
    pairs = [
        pair("clipped", "federated", clipping, clear),
        pair("noise", "clipped", noise, clear),
        pair("wide", "noise", 0.05),
    ]
    pairs += [pair(name, "federated", values[name] - 0.9) for name in ("noise", "wide")]
    found = ablation.ladder(
        arms, [{"name": name, "macro_auc": value} for name, value in values.items()], pairs
    )
    assert found is not None
    return found, ablation.answer(found)


def test_the_answer_says_which_rung_costs_most_and_whether_that_is_the_noise() -> None:
    found, words = told(-0.02, -0.2)
    assert [variant["epsilon"] for variant in found["variants"]] == [None, None, 3.0, 2.0]
    assert [variant["private"] for variant in found["variants"]] == [False, True, True, True]
    assert (
        "costs most is 'noise': 'noise' is 0.200 below 'clipped' (−0.210 to −0.190: a loss)"
        in words
    )
    assert "Noise is what costs most: without noise, 'clipped' is 0.020 below 'federated'" in words
    assert "best arm with a guarantee is 'wide', ε ≤ 2: 0.730, 0.170 below 'federated'" in words
    _, words = told(-0.2, -0.02)
    assert (
        "Noise is not what costs most: without noise, 'clipped' is 0.200 below 'federated'" in words
    )
    assert "costs most is 'clipped'" in words
    _, words = told(-0.02, -0.2, clear=False)
    assert "Whether noise costs most is not shown" in words


@pytest.mark.parametrize(
    ("epsilon", "one"),
    [(9.5, "'tight', ε ≤ 9.5: 0.700, 0.200 below 'federated'"), (11.0, "none that was measured")],
)
def test_beside_a_best_arm_of_a_huge_epsilon_stands_the_best_one_that_bounds_something(
    epsilon: float, one: str
) -> None:
    arms = [
        entry("federated", None),
        entry("loose", "federated", 80.0, True),
        entry("tight", "loose", epsilon, True),
    ]
    summary = [
        {"name": arm["name"], "macro_auc": value}
        for arm, value in zip(arms, (0.9, 0.8, 0.7), strict=True)
    ]
    pairs = [
        pair("loose", "federated", -0.1),
        pair("tight", "loose", -0.1),
        pair("tight", "federated", -0.2),
    ]
    found = ablation.ladder(arms, summary, pairs)
    assert found is not None
    words = ablation.answer(found)
    assert "The best arm with a guarantee is 'loose', ε ≤ 80: 0.800" in words
    assert f"The best one at ε ≤ 10 is {one}" in words
    assert "The best one at" not in told(-0.02, -0.2)[1]


@pytest.mark.parametrize(
    ("kind", "privacy", "said"),
    [
        ("federated", {}, "none was trained with differential privacy"),
        (
            "federated",
            {"client_level": "server"},
            "none hides an image or a patient by differential privacy, only whole hospitals",
        ),
        ("local", {"client_level": "server"}, "none was trained with differential privacy"),
        (
            "federated",
            {"client_level": "server", "epsilon": 8.0},
            "what they cost in ε stands beside them",
        ),
    ],
)
def test_a_comparison_says_what_kind_of_privacy_its_arms_had(
    kind: str, privacy: dict[str, Any], said: str
) -> None:
    settings = Settings(privacy=PrivacySettings(**privacy))
    arm: Any = SimpleNamespace(kind=kind, jobs=[SimpleNamespace(settings=settings)])
    outcome: Any = SimpleNamespace(arm=arm, done=True)
    assert not_measured(settings, [outcome])[
        -1
    ] == f"Privacy: no attack was run on these generators and {said}" + (
        ", in what was federated." if "whole" in said else "."
    )


def test_an_ablation_without_rungs_has_no_pairs() -> None:
    assert ablation.families([entry("federated", None)]) == {}


def test_a_ledger_that_cannot_be_read_is_neither_infinite_nor_a_guarantee() -> None:
    arms = [entry("federated", None), entry("a", "federated", None, True)]
    arms[1]["privacy"]["hospitals"][0]["unknown"] = True
    summary = [{"name": "federated", "macro_auc": 0.9}, {"name": "a", "macro_auc": 0.8}]
    found = ablation.ladder(arms, summary, [pair("a", "federated", -0.1)])
    assert found is not None
    assert found["variants"][1]["unknown"]
    assert "Noise was not tested" in ablation.answer(found)


def test_what_was_not_measured_is_said() -> None:
    found = ablation.ladder([entry("federated", None), entry("a", "federated")], [], [])
    assert found is not None
    assert "no rung of the ladder was measured" in ablation.answer(found)
    assert ablation.ladder([entry("federated", None)], [], []) is None


# --- one whole ablation ----------------------------------------------------------------------------


def test_one_command_trains_judges_and_tells_the_ladder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch)
    data = write_shards(tmp_path / "data", (64, 40, 24))
    public = [
        "data.phantoms=chest",
        "data.phantom_images=60",
        "training.kimg=0.024",
        "federation.rounds=1",
    ]
    words = ["kind=ablation", f"public={json.dumps(public)}"]
    settings = study(
        data,
        *(f"comparison.{word}" for word in words),
        *(
            "federation.batch=shared",
            "training.batch_size=12",
            "federation.rounds=2",
            "evaluation.seeds=1",
            "evaluation.every=0",
            "evaluation.epochs=1",
        ),
        arms=json.dumps(list(LADDER)),
    )
    folder = ComparisonFolder.at(tmp_path / "study")
    found = compare(settings, folder)
    assert {row["status"] for row in found["arms"]} == {"done"}, [
        row["failure"] for row in found["arms"]
    ]
    variants = {variant["name"]: variant for variant in found["ablation"]["variants"]}
    assert list(variants) == ["federated", "plain", "clipped", "noise 2", "wide", "warm"]
    assert [variant["images_seen"] for variant in variants.values()] == [60, 60, 60, 60, 72, 72]
    assert variants["warm"]["public_images"] == 24
    assert [variant["private"] for variant in variants.values()] == [
        False,
        False,
        True,
        True,
        True,
        True,
    ]
    assert [variant["epsilon"] is None for variant in variants.values()] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert all(
        variant["wall_seconds"] > 0 and variant["frechet"] is not None
        for variant in variants.values()
    )
    _check_epsilon(found, folder)
    families = {row["family"] for row in found["comparisons"]}
    assert {ablation.STEP, ablation.FOOT} <= families
    assert found["answer"] == ablation.answer(found["ablation"])
    assert "costs most" in found["answer"] or "no rung of the ladder is worse" in found["answer"]
    assert any("federated 60, plain 60" in note for note in found["notes"])
    _check_page(found, folder)

    before = (folder.comparison.read_bytes(), folder.arm("warm", 0).metrics.read_bytes())
    again = compare(settings, folder)
    assert again["ablation"] == json.loads(before[0])["ablation"], (
        "a second call trains nothing and charges no ledger"
    )
    assert folder.arm("warm", 0).metrics.read_bytes() == before[1]


def _check_epsilon(found: dict[str, Any], folder: ComparisonFolder) -> None:
    """ε of a rung is that of its own steps, not what the shards' ledgers hold after all rungs, which is infinite here."""
    for name in ("noise 2", "wide"):
        last = files.read_json_lines(folder.arm(name, 0).metrics)[-1]
        spent = next(row for row in found["arms"] if row["name"] == name)["privacy"]["hospitals"]
        assert [row["name"] for row in spent] == ["alpha", "beta", "gamma"]
        for row, line in zip(spent, last["hospitals"], strict=True):
            batch = round(row["sample_rate"] * line["num_examples"])
            mechanisms = [
                Mechanism(2.0, line["sample_rate"], line["images_seen"] // batch),
                Mechanism(5.0, 1.0, 1),
            ]
            assert row["epsilon"] == pytest.approx(epsilon_of(mechanisms, 1 / line["num_examples"]))
            assert row["steps"] == mechanisms[0].steps
            assert row["ledger_epsilon"] is None
        variant = next(
            variant for variant in found["ablation"]["variants"] if variant["name"] == name
        )
        assert variant["epsilon"] == max(row["epsilon"] for row in spent)


def _check_page(found: dict[str, Any], folder: ComparisonFolder) -> None:
    page = Page(write_comparison_report(folder.path).read_text(encoding="utf-8"))
    rows = tables(page)["ablation.csv"]
    assert [row[0] for row in rows[1:]] == [
        variant["name"] for variant in found["ablation"]["variants"]
    ]
    assert [row[3] for row in rows[1:4]] == ["–", "–", "∞"]
    assert rows[4][3] == f"{found['ablation']['variants'][3]['epsilon']:.3g}"
    assert rows[3][1:3] == ["plain", "privacy.noise_multiplier = 0; privacy.label_noise = 5"]
    assert len(tables(page)["ablation-privacy.csv"]) == 1 + 4 * 3
    assert found["answer"] in page.words
    assert "does the noise cost most?" in page.words
    damaged = copy.deepcopy(found)
    for variant, key in itertools.product(
        damaged["ablation"]["variants"], list(found["ablation"]["variants"][0])
    ):
        variant[key] = None
    files.write_json(folder.comparison, damaged)
    assert "ablation" in write_comparison_report(folder.path).read_text(encoding="utf-8")
    files.write_json(folder.comparison, found)
