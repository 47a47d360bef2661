"""Ablations: variants and what they may change, their ε and cost, the answer and the findings."""

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
from small_federation import ledger_in, write_shards
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
from fedgan.report.comparison import write_comparison_report
from fedgan.runs.preparation import open_prepared
from simulations.comparison.arm import Arm, check_arm
from simulations.comparison.compare import compare, prepare
from simulations.comparison.notes import not_measured
from simulations.comparison.plan import plan, plan_of

FOLDER = ComparisonFolder(Path("/nowhere/study"))
SIZES = {"alpha": 32, "beta": 20, "gamma": 12}
PLAIN = (
    "plain: model.minibatch_std_group=0; training.r1_gamma=0; training.path_length_weight=0; "
    "augment.mode=none"
)
CLIPPED = "clipped < plain: privacy.noise_multiplier=0; privacy.label_noise=5"
NOISY = "noise 2 < clipped: privacy.noise_multiplier=2"
WIDE = "wide < noise 2: training.batch_size=24; federation.rounds=1"
WARM = "warm < wide: training.warm_start=public"
VARIANTS = ("federated", PLAIN, CLIPPED, NOISY, WIDE, WARM)


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


# --- the plan ------------------------------------------------------------------------------------


def test_variant_has_the_changes_of_its_ancestors_and_newest_values() -> None:
    arms = {
        arm.name: arm for arm in planned(*VARIANTS, "quiet < noise 2: privacy.noise_multiplier=4")
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


def test_baseline_can_be_centralized() -> None:
    arms = planned("centralized", PLAIN, CLIPPED)
    assert {(arm.kind, arm.jobs[0].kind) for arm in arms} == {("centralized", "standalone")}
    assert arms[2].jobs[0].settings.privacy.on


@hypothesis_settings(max_examples=30)
@given(batches=st.lists(st.integers(3, 48), min_size=1, max_size=4), kimg=st.floats(0.1, 2.0))
def test_every_variant_sees_the_budget_in_its_own_whole_batches(
    batches: list[int], kimg: float
) -> None:
    variants = [
        f"b{i}: training.batch_size={b}; model.minibatch_std_group=0" for i, b in enumerate(batches)
    ]
    for arm in planned("federated", *variants, training_kimg=kimg):
        batch, seen = arm.jobs[0].settings.training.batch_size, sum(arm.hospital_images.values())
        assert seen % batch == 0
        assert 0 <= seen - round(kimg * 1000) < batch


def test_variants_share_one_public_pretraining_and_wait_for_it() -> None:
    arms = {
        arm.name: arm
        for arm in planned(
            *VARIANTS, "warm 2 < warm: training.d_steps=2", "small < warm: model.w_dim=32"
        )
    }
    public = arms["warm"].pretraining
    assert public is not None
    assert public == arms["warm 2"].pretraining
    assert arms["small"].pretraining is not None
    assert arms["small"].pretraining.folder != public.folder, "other networks"
    assert not public.settings.privacy.on
    assert (public.settings.data.root, public.settings.model.minibatch_std_group) == ("", 0)
    job = arms["warm"].jobs[0]
    assert (job.settings.training.warm_start, job.pretraining) == (
        str(public.folder),
        public.folder,
    )
    assert sum(arms["warm"].hospital_images.values()) == sum(
        arms["wide"].hospital_images.values()
    ), "pretraining is not in the budget"


@pytest.mark.parametrize(
    ("arms", "changes", "message"),
    [
        ((PLAIN,), {}, "begin with the baseline of all variants"),
        (
            ("federated", "a < b: training.d_steps=2"),
            {},
            "'a' has the parent 'b', which is no arm before it",
        ),
        (("federated", "a:"), {}, "changes nothing"),
        (("federated", "a: data.resolution=16"), {}, "data and evaluation are the same for all"),
        (("federated", "a: evaluation.seeds=1"), {}, "data and evaluation are the same for all"),
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
        (("federated", PLAIN, PLAIN), {}, "'plain' twice"),
        (("federated", "real: training.d_steps=2"), {}, "a name of its own"),
        (
            VARIANTS,
            {"comparison_public": ["data.seed=0"]},
            "arm 'warm': .* the very phantoms that the hospitals hold",
        ),
        (
            VARIANTS,
            {"comparison_public": ["privacy.epsilon=1"]},
            "no key of a training on phantoms",
        ),
    ],
)
def test_invalid_ablation_is_refused_by_name(
    arms: tuple[str, ...], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(*arms, **changes)


def test_other_comparisons_may_differ_in_federation_only() -> None:
    with pytest.raises(ConfigError, match=r"use comparison.kind = 'ablation' to change more"):
        planned("federated", "a: training.d_steps=2", comparison_kind="arms")


def test_private_batch_above_a_hospital_is_refused_before_training(
    tmp_path: Path,
) -> None:
    data = write_shards(tmp_path / "data", (32, 16, 8))
    variants = json.dumps(["federated", PLAIN, CLIPPED, "big < clipped: training.batch_size=6"])
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


def test_arm_is_refused_where_a_ledger_counts_another_unit(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", (32, 16, 8))
    facts = {
        "run": "earlier",
        "kind": "discriminator steps",
        "unit": "image",
        "delta": 1e-3,
        "data": "x",
    }
    ledger_in(data / "beta").reserve(Mechanism(1.0, 0.1, 1), 1, **facts)
    settings = study(
        data, "comparison.kind=ablation", arms=json.dumps(["federated", PLAIN, CLIPPED])
    )
    folder = ComparisonFolder.at(tmp_path / "study")
    with pytest.raises(
        ConfigError,
        match=r"arm 'clipped': .*accounts per image, this run per patient",
    ):
        compare(settings, folder)
    assert not list(folder.arms.glob("*/config.toml"))


# --- check ---------------------------------------------------------------------------------------


def trained(
    name: str,
    images: int,
    *overrides: str,
    is_declared: bool = True,
    exhausted: tuple[str, ...] = (),
) -> dict[str, Any]:
    settings = from_dict(
        {"training": {"kimg": 1.0, "batch_size": 16}, "federation": {"rounds": 2}}, overrides
    )
    keys = [text.partition("=")[0] for text in overrides]
    return {
        "name": name, "seed": 0, "images_seen": images, "settings": to_dict(settings),
        "resolution": 32, "label_names": ["a", "b"],
        "may_differ": keys if is_declared else [], "exhausted": list(exhausted),
        "evaluator": {"extractor": "x", "classifier": "c", "suite": "quick", "test_hash": "h"},
    }  # fmt: skip


def test_variants_may_differ_in_their_overrides_only() -> None:
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
            check_comparable([baseline, trained("a", 1008, key, is_declared=False)])
    two = [
        trained("a", 1008, "model.w_dim=32"),
        trained("b", 1008),
        trained("c", 1008, "model.w_dim=64", is_declared=False),
    ]
    with pytest.raises(ConfigError, match=r"model\.w_dim"):
        check_comparable(two)


@pytest.mark.parametrize("images", [960, 1008, 1088])
def test_other_batch_size_allows_no_other_number_of_images(images: int) -> None:
    with pytest.raises(ConfigError, match="images_seen differs"):
        check_comparable(
            [trained("federated", 1008), trained("b", images, "training.batch_size=64")]
        )


def test_exhausted_arm_may_have_seen_fewer_images_but_no_more() -> None:
    baseline = trained("federated", 1008)
    check_comparable([baseline, trained("a", 512, exhausted=("alpha",))])
    with pytest.raises(ConfigError, match="images_seen differs"):
        check_comparable([baseline, trained("a", 512)])


# --- the answer ----------------------------------------------------------------------------------


def entry(
    name: str, parent: str | None, epsilon: float | None = None, private: bool = False
) -> dict[str, Any]:
    hospitals = [{"name": "alpha", "epsilon": epsilon, "unknown": False}]
    return {
        "name": name,
        "parent": parent,
        "changes": {"k": "v"},
        "privacy": {"hospitals": hospitals} if private else None,
        "images_seen": 10,
        "cost": {},
    }


def pair(a: str, b: str, value: float, clear: bool = True) -> dict[str, Any]:
    return {
        "a": a,
        "b": b,
        "difference": value,
        "ci": [value - 0.01, value + 0.01],
        "p_holm": 0.001 if clear else 0.5,
        "seed_differences": None,
    }


def table_of(
    arms: list[dict[str, Any]], values: list[float], pairs: list[dict[str, Any]]
) -> dict[str, Any]:
    summary = [
        {"name": arm["name"], "macro_auc": value} for arm, value in zip(arms, values, strict=True)
    ]
    found = ablation.table(arms, summary, pairs)
    assert found is not None
    return found


def noise_table(clipping: float, noise: float, clear: bool = True) -> dict[str, Any]:
    arms = [
        entry("federated", None),
        entry("clipped", "federated", None, True),
        entry("noise", "clipped", 3.0, True),
        entry("wide", "noise", 2.0, True),
    ]
    values = [0.9, 0.9 + clipping, 0.9 + clipping + noise, 0.95 + clipping + noise]
    pairs = [
        pair("clipped", "federated", clipping, clear),
        pair("noise", "clipped", noise, clear),
        pair("wide", "noise", 0.05),
        pair("noise", "federated", values[2] - 0.9),
        pair("wide", "federated", values[3] - 0.9),
    ]
    return table_of(arms, values, pairs)


def test_answer_names_the_costliest_variant_and_findings_the_noise() -> None:
    found = noise_table(-0.02, -0.2)
    assert [variant["epsilon"] for variant in found["variants"]] == [None, None, 3.0, 2.0]
    assert [variant["private"] for variant in found["variants"]] == [False, True, True, True]
    assert ablation.answer(found) == (
        "In macro AUC 'noise' costs most: 0.200 below 'clipped' "
        "(95 % interval −0.210 to −0.190: a loss). The best arm with a guarantee is 'wide' at "
        "ε ≤ 2: macro AUC 0.730, 0.170 below 'federated' (−0.180 to −0.160)."
    )
    (text,) = ablation.findings(found)
    assert "Noise costs most: without noise, 'clipped' is 0.020 below 'federated'" in text
    found = noise_table(-0.2, -0.02)
    (text,) = ablation.findings(found)
    assert "Noise does not cost most: without noise, 'clipped' is 0.200 below 'federated'" in text
    assert "'clipped' costs most" in ablation.answer(found)
    (text,) = ablation.findings(noise_table(-0.02, -0.2, clear=False))
    assert "Whether noise costs most is not shown" in text


@pytest.mark.parametrize(
    ("epsilon", "best"),
    [
        (9.5, "'tight' at ε ≤ 9.5: macro AUC 0.700, 0.200 below 'federated'"),
        (11.0, "not measured"),
    ],
)
def test_findings_name_the_best_arm_at_moderate_epsilon(epsilon: float, best: str) -> None:
    arms = [
        entry("federated", None),
        entry("loose", "federated", 80.0, True),
        entry("tight", "loose", epsilon, True),
    ]
    pairs = [
        pair("loose", "federated", -0.1),
        pair("tight", "loose", -0.1),
        pair("tight", "federated", -0.2),
    ]
    found = table_of(arms, [0.9, 0.8, 0.7], pairs)
    assert "The best arm with a guarantee is 'loose' at ε ≤ 80: macro AUC 0.800" in (
        ablation.answer(found)
    )
    assert f"The best arm at ε ≤ 10 is {best}" in ablation.findings(found)[1]
    assert len(ablation.findings(noise_table(-0.02, -0.2))) == 1


@pytest.mark.parametrize(
    ("kind", "privacy", "text"),
    [
        ("federated", {}, "none was trained with differential privacy"),
        (
            "federated",
            {"client_level": "server"},
            "none was trained with differential privacy for images or patients; the federated ones "
            "have client-level DP, which protects whole hospitals",
        ),
        ("local", {"client_level": "server"}, "none was trained with differential privacy"),
        (
            "federated",
            {"client_level": "server", "epsilon": 8.0},
            "their ε is in the table",
        ),
    ],
)
def test_not_measured_names_the_kind_of_privacy(
    kind: str, privacy: dict[str, Any], text: str
) -> None:
    settings = Settings(privacy=PrivacySettings(**privacy))
    arm: Any = SimpleNamespace(kind=kind, jobs=[SimpleNamespace(settings=settings)])
    outcome: Any = SimpleNamespace(arm=arm, is_done=True)
    last = not_measured(settings, [outcome])[-1]
    assert last == f"Privacy: no attack was run on these generators and {text}."


def test_ablation_without_variants_has_no_pairs() -> None:
    assert ablation.families([entry("federated", None)]) == {}


def test_unreadable_ledger_is_neither_infinite_nor_a_guarantee() -> None:
    arms = [entry("federated", None), entry("a", "federated", None, True)]
    arms[1]["privacy"]["hospitals"][0]["unknown"] = True
    found = table_of(arms, [0.9, 0.8], [pair("a", "federated", -0.1)])
    assert found["variants"][1]["unknown"]
    assert "The noise was not tested" in ablation.findings(found)[0]
    assert "No arm with a guarantee" in ablation.answer(found)


def test_answer_says_what_was_not_measured() -> None:
    found = ablation.table([entry("federated", None), entry("a", "federated")], [], [])
    assert found is not None
    assert "no variant was measured" in ablation.answer(found)
    assert ablation.findings(found) == []
    assert ablation.table([entry("federated", None)], [], []) is None


# --- one whole ablation --------------------------------------------------------------------------


def test_one_command_trains_evaluates_and_reports_the_ablation(
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
    changes = ["kind=ablation", f"public={json.dumps(public)}"]
    settings = study(
        data,
        *(f"comparison.{text}" for text in changes),
        *(
            "federation.batch=shared",
            "training.batch_size=12",
            "federation.rounds=2",
            "evaluation.seeds=1",
            "evaluation.every=0",
            "evaluation.epochs=1",
        ),
        arms=json.dumps(list(VARIANTS)),
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
    assert {ablation.PARENT, ablation.BASELINE} <= families
    assert found["answer"] == ablation.answer(found["ablation"])
    assert "costs most" in found["answer"] or "no variant is worse" in found["answer"]
    assert any("federated 60, plain 60" in note for note in found["notes"])
    _check_report(found, folder)

    before = (folder.comparison.read_bytes(), folder.arm("warm", 0).metrics.read_bytes())
    again = compare(settings, folder)
    assert again["ablation"] == json.loads(before[0])["ablation"], (
        "a second call trains nothing and charges no ledger"
    )
    assert folder.arm("warm", 0).metrics.read_bytes() == before[1]


def _check_epsilon(found: dict[str, Any], folder: ComparisonFolder) -> None:
    """ε of a variant is that of its own steps, not that of the ledgers, which is infinite here."""
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
            assert row["epsilon"] == pytest.approx(epsilon_of(mechanisms, line["delta"]))
            assert row["steps"] == mechanisms[0].steps
            assert row["ledger_epsilon"] is None
        variant = next(
            variant for variant in found["ablation"]["variants"] if variant["name"] == name
        )
        assert variant["epsilon"] == max(row["epsilon"] for row in spent)


def _check_report(found: dict[str, Any], folder: ComparisonFolder) -> None:
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
