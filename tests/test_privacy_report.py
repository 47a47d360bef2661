"""Privacy section of the report and privacy facts of the card."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CONTRAST, SIZES, Browser, open_browser
from card_runs import make_run as make_card_run
from hypothesis import given
from hypothesis import strategies as st
from privacy_runs import (
    ATTACKS,
    audit,
    copy_figures,
    hospital_audit,
    privacy_cost,
    read_lines,
    write_lines,
    write_run,
)
from test_report import HOSPITALS, Page, page_of

from fedgan import files
from fedgan.audit.audit import signs
from fedgan.report.cards import write_cards
from fedgan.report.html import format as text
from fedgan.report.run.data import clean
from fedgan.report.run.privacy.findings import Audit
from fedgan.report.run.privacy.guarantee import attack_bound, percent
from fedgan.report.run.privacy.statements import CRITERIA
from fedgan.run_folder import RunFolder

PRIVATE = {"unit": "image", "epsilon": 10.0, "label_noise": 20.0, "max_epsilon": 12.0}


def part_of(run: RunFolder) -> str:
    """The privacy section as HTML."""
    html = page_of(run)
    start = html.index('<section id="privacy"')
    return html[start : html.index("</section>", start) + len("</section>")]


def words_of(run: RunFolder) -> str:
    return Page(part_of(run)).words


def paragraph(html: str, key: str) -> str:
    """The part of the section under one criterion."""
    start = html.index(f'id="privacy-{key}"')
    return html[start : html.index("<h3", start + 1)]


# --- the guarantee -------------------------------------------------------------------------------


def test_run_without_privacy_and_audit_states_both(tmp_path: Path) -> None:
    words = words_of(write_run(tmp_path))
    assert "There is no guarantee: this run was trained without differential privacy." in words
    assert "No audit was run" in words
    assert "fedgan audit RUN" in words
    assert "there is no guarantee, only the figures of the attacks that were run" in words
    assert words.count("No attack was run.") == 3
    assert "Terms of this ε" not in words


def test_each_hospital_has_epsilon_delta_noise_and_sampling_rate(tmp_path: Path) -> None:
    words = words_of(write_run(tmp_path, PRIVATE))
    for i, name in enumerate(HOSPITALS):
        cost = privacy_cost(i, 10)
        row = [
            name,
            *(
                text.significant(cost[key], 3)
                for key in ("epsilon", "delta", "noise_multiplier", "sample_rate")
            ),
        ]
        assert " ".join(row) in words
    assert "ε from 3.21 to 9.87 for one image" in words


def test_epsilon_is_stated_with_all_its_terms(tmp_path: Path) -> None:
    words = words_of(write_run(tmp_path, PRIVATE))
    for fact in (
        "(ε, δ)-differential privacy",
        "the default is the smaller of 1e-5 and 1 / (10 n), n the number of images of the hospital",
        "(zero-out: added or removed, while the number of units is public)",
        "Poisson",
        "PRV",
        "RDP",
        "All steps of the discriminator in all private runs on the images of that hospital that "
        "its register of ledgers knows",
        "Anything that was trained on these images without privacy: no ledger records it.",
        "about two and a half times the ε at the same δ",
        "label counts, released with a noise multiplier of 20",
        "ChaCha20 (RFC 8439) with 256 bits",
        "clipped to norm 1; the gradients are summed and Gaussian noise is added",
        "NIST SP 800-226",
        "the number of images of each hospital".capitalize(),
        "Settings chosen after looking at earlier private runs",
        "The time that a hospital takes for a round",
        "A patient of two hospitals",
        "A patient with several images: ε holds for one image",
    ):
        assert fact in words, fact


def test_unit_and_composition_follow_the_settings(tmp_path: Path) -> None:
    run = write_run(
        tmp_path,
        {
            "epsilon": 8.0,
            "unit": "patient",
            "images_per_patient": 3,
            "r_t_noise": 4.0,
            "delta": 1e-6,
        },
    )
    words = words_of(run)
    assert "One patient with all their images, of which a step uses at most 3" in words
    assert (
        "signs of the discriminator on real images, released with a noise multiplier of 4" in words
    )
    assert "Label counts were not released." in words
    assert "Here δ = 1e−06." in words
    assert "A patient with several images" not in words


@pytest.mark.parametrize(
    ("sampling", "labels"), [("uniform", ("a", "b")), ("data", ())], ids=["uniform", "no labels"]
)
def test_unused_label_noise_releases_no_label_counts(
    sampling: str, labels: tuple[str, ...], tmp_path: Path
) -> None:
    run = write_run(tmp_path, PRIVATE, training={"labels": sampling})
    rows = run.read_json(run.hospitals)
    for row in rows:
        row["counts"] = {split: dict.fromkeys(labels, 1) for split in row["counts"]}
    files.write_json(run.hospitals, rows)
    words = words_of(run)
    assert "Label counts were not released." in words
    assert "the label counts, released with" not in words


def test_clipping_without_noise_is_no_guarantee_and_infinite_epsilon(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"noise_multiplier": 0.0})
    html = part_of(run)
    words = Page(html).words
    assert "Clipping without noise: no guarantee." in words
    for name in HOSPITALS:
        assert f"{name} infinite" in words
    assert "no bound" in words
    assert "there is no guarantee, only the figures" in words
    assert "Terms of this ε" not in words
    assert 'id="privacy-epsilon-title"' not in html


def test_hospital_with_infinite_epsilon_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, PRIVATE)
    lines = read_lines(run)
    for line in lines:
        line["hospitals"][1]["epsilon"] = None
    write_lines(run, lines)
    words = words_of(run)
    assert f"There is no guarantee for {HOSPITALS[1]}" in words
    assert f"{HOSPITALS[1]} infinite" in words
    assert f"{HOSPITALS[0]} 9.87" in words


def test_epsilon_curve_has_one_line_per_hospital_and_the_limit(tmp_path: Path) -> None:
    html, free = (
        part_of(write_run(tmp_path / str(i), PRIVATE | {"max_epsilon": most}))
        for i, most in enumerate((12.0, 0.0))
    )
    chart, other = (
        part[part.index('aria-labelledby="privacy-epsilon-title') :].split("</svg>")[0]
        for part in (html, free)
    )
    assert chart.count("<polyline") == 3
    assert (">limit<" in chart, ">target<" in chart) == (True, False)
    assert (">limit<" in other, ">target<" in other) == (False, True)
    assert f"{HOSPITALS[0]} 9.87 after round 10" in chart


def test_hospital_stopped_by_its_budget_is_shown_with_its_round(tmp_path: Path) -> None:
    run = write_run(tmp_path, PRIVATE)
    lines = read_lines(run)
    for line in lines:
        if line["round"] == 7:
            line["hospitals"][2]["exhausted"] = 1.0
        elif line["round"] > 7:
            del line["hospitals"][2]
    write_lines(run, lines)
    words = words_of(run)
    assert "to round 7: its budget allowed no further step" in words
    assert words.count("to round 10") == 2


def test_rounds_without_epsilon_state_no_guarantee(tmp_path: Path) -> None:
    run = write_run(tmp_path, PRIVATE)
    lines = read_lines(run)
    for line in lines:
        for row in line["hospitals"]:
            del row["epsilon"]
    write_lines(run, lines)
    assert "no guarantee can be stated" in words_of(run)


def test_client_level_guarantee_states_its_limits(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    lines = read_lines(run)
    lines[-1]["client_level_dp"] = {
        "epsilon": 31.4,
        "delta": 1e-5,
        "noise_multiplier": 1.2,
        "clip": 1.0,
        "releases": 10,
    }
    lines[-1]["client_level_dp"] |= {"hospitals": 3}
    write_lines(run, lines)
    words = words_of(run)
    assert "There is no guarantee for an image or a patient" in words
    assert "ε = 31.4 and δ = 1e−05 over 10 releases" in words
    assert "but not against the server" in words
    assert (
        "over a million 1,200 times. delta = 1/3 would allow the full disclosure of one hospital."
        in words
    )
    assert "there is no guarantee, only the figures" not in words
    assert "are protected only as part of their hospital" in words
    lines[-1]["client_level_dp"] |= {"epsilon": None, "noise_multiplier": 0.0}
    write_lines(run, lines)
    words = words_of(run)
    assert "at an infinite ε, which is no guarantee" in words
    assert "there is no guarantee, only the figures" in words


def test_client_level_dp_is_stated_before_the_first_round(tmp_path: Path) -> None:
    run = write_run(tmp_path, {"client_level": "server"})
    assert "Client-level DP" not in words_of(run), "rounds without client-level DP"
    write_lines(run, [])
    words = words_of(run)
    assert "Client-level DP is on, but no round has finished" in words
    assert "trained without differential privacy" not in words


def test_hospital_table_has_epsilon_only_with_privacy_on(tmp_path: Path) -> None:
    private, plain = page_of(write_run(tmp_path / "a", PRIVATE)), page_of(write_run(tmp_path / "b"))
    sizes = [
        html[html.index("Images and patients per split</caption>") :].split("</table>")[0]
        for html in (private, plain)
    ]
    for name, epsilon in zip(HOSPITALS, ("9.87", "6.54", "3.21"), strict=True):
        row = sizes[0][sizes[0].index(f">{name}</th>") :].split("</tr>")[0]
        assert row.strip().endswith(f'<td class="n">{epsilon}</td>')
    assert "ε" not in sizes[1]


# --- what an epsilon bounds ----------------------------------------------------------------------


def test_attack_bound_equals_the_rate_of_optimal_mechanisms() -> None:
    # Randomised response that is true with e^ε / (1 + e^ε) is ε-private; its best test reaches
    # the bound.
    for epsilon in (0.1, 1.0, 3.0, 9.0):
        truth = math.exp(epsilon) / (1 + math.exp(epsilon))
        assert attack_bound(epsilon, 0.0, 1 - truth) == pytest.approx(truth)
    assert attack_bound(0.0, 0.0, 0.01) == pytest.approx(0.01)
    assert attack_bound(0.0, 0.3, 0.01) == pytest.approx(0.31)
    assert attack_bound(1e9, 0.0, 0.01) == 1.0


@given(st.floats(0, 800), st.floats(0, 800), st.floats(0, 0.5), st.floats(0, 1))
def test_attack_bound_is_between_chance_and_one_and_grows(
    one: float, other: float, delta: float, rate: float
) -> None:
    low, high = sorted((one, other))
    bounds = attack_bound(low, delta, rate), attack_bound(high, delta, rate)
    assert rate - 1e-9 <= bounds[0] <= bounds[1] + 1e-12
    assert bounds[1] <= 1.0


def test_large_epsilon_is_reported_as_almost_no_bound(tmp_path: Path) -> None:
    assert "This bound excludes almost nothing" in words_of(write_run(tmp_path / "a", PRIVATE))
    run = write_run(tmp_path / "b", PRIVATE)
    lines = read_lines(run)
    for line in lines:
        for row in line["hospitals"]:
            row["epsilon"] = 0.5
    write_lines(run, lines)
    words = words_of(run)
    assert "excludes almost nothing" not in words
    assert percent(attack_bound(0.5, privacy_cost(2, 10)["delta"], 0.01)) in words
    assert percent(0.999996) == "99.999 %"


# --- the audit -----------------------------------------------------------------------------------


def test_audit_figures_are_shown_beside_held_out_figures(tmp_path: Path) -> None:
    content = audit()
    words = words_of(write_run(tmp_path, content=content))
    for hospital in content["hospitals"]:
        for found in hospital["copies"].values():
            for key, ci in (
                ("copying_share", "copying_ci"),
                ("memorised_matched", "memorised_matched_ci"),
            ):
                assert f"{text.decimal(found[key])} {text.interval(found[ci])}" in words
            pair = [("copying_share", "copying_ci"), ("held_out_share", "held_out_ci")]
            assert (
                " ".join(
                    f"{text.decimal(found[key])} {text.interval(found[ci])}" for key, ci in pair
                )
                in words
            )
        for row in hospital["membership"]:
            pair = [("auc", "auc_ci"), ("null_auc", "null_auc_ci")]
            figures = " ".join(
                f"{text.decimal(row[key])} {text.interval(row[ci])}" for key, ci in pair
            )
            figures += f" {text.decimal(row['leak_auc'])} 2.1 % (0.3–5.8) 1.3 % (0.1–4.3) 180 / 170"
            assert f"{hospital['name']}, {row['attack']} {figures}" in words
        for figure in ("12.17", "12.21", "0.522", "0.508"):
            assert figure in words


def test_rate_without_enough_images_has_no_column(tmp_path: Path) -> None:
    content = audit()
    assert "Found at 0.1 %" not in words_of(write_run(tmp_path / "few", content=content))
    content["hospitals"][0]["membership"][0] |= {
        "tpr_at_01": 0.0042,
        "tpr_at_01_ci": [0.001, 0.009],
    }
    words = words_of(write_run(tmp_path / "many", content=content))
    assert words.count("Found at 0.1 %") == 1, "under inference only (discriminator attack)"
    assert "0.4 % (0.1–0.9)" in words


def test_each_criterion_has_its_own_evidence(tmp_path: Path) -> None:
    html = part_of(write_run(tmp_path, content=audit()))
    parts = {key: paragraph(html, key) for key in ("singling-out", "linkability", "inference")}
    titles = [title for title, *_ in CRITERIA.values()]
    assert [title for title in titles if f">{title}</h3>" in html] == titles
    for words in (
        "Copies among the synthetic images",
        "Memorised training images",
        "projections",
    ):
        assert words in parts["singling-out"]
    assert "Nearest real image: training or held-out" in parts["linkability"]
    assert [parts[key].count('<svg class="chart"') for key in parts] == [4, 2, 4], (
        "a chart for each figure"
    )
    criteria = {
        attack: [key for key, part in parts.items() if f"{HOSPITALS[0]}, {attack}</th>" in part]
        for attack in ATTACKS
    }
    assert criteria["distance"] == ["linkability"]
    assert {tuple(keys) for attack, keys in criteria.items() if attack != "distance"} == {
        ("inference",)
    }
    for key, part in parts.items():
        assert part.count(CRITERIA[key][2]) == 1


def test_clean_verdict_names_insensitive_figures_and_few_patients(
    tmp_path: Path,
) -> None:
    few = hospital_audit(HOSPITALS[2]) | {"held_out_patients": 17}
    words = words_of(write_run(tmp_path, content=audit(hospital_audit(HOSPITALS[0]), few)))
    # of each hospital's twelve: the features, the density and its ratio
    assert "none of 24 figures of 2 hospitals" in words
    assert (
        "6 of these figures come from a search or an attack that did not detect the planted leak "
        "either (insensitive)." in words
    )
    assert (
        f"Held-out patients are few at {HOSPITALS[2]} (17): only a large leak would show there."
        in words
    )


def test_shared_audit_notes_are_shown_once(tmp_path: Path) -> None:
    words = words_of(write_run(tmp_path, content=audit()))
    text_of_rate = "a false-positive rate of 0.1% needs 1,000 non-members, here are 170"
    assert words.count(text_of_rate) == 1
    assert f"{', '.join(HOSPITALS)}: {', '.join(ATTACKS)}: {text_of_rate}" in words


def test_excess_and_confidence_levels_are_stated(tmp_path: Path) -> None:
    words = words_of(write_run(tmp_path, content=audit()))
    near = copy_figures(0.047, False)
    pair = [
        ("near_training_share", "near_training_ci"),
        ("near_held_out_share", "near_held_out_ci"),
    ]
    assert (
        " ".join(f"{text.decimal(near[key])} {text.interval(near[ci])}" for key, ci in pair)
        in words
    )
    assert f"{HOSPITALS[0]}, negative: copies by pixels – – – – – +0.002 97% of 100" in words
    assert "Confidence level: 95 %; for membership in the negative control 99.4 %" in words


def test_clean_audit_is_evidence_and_no_proof(tmp_path: Path) -> None:
    words = words_of(write_run(tmp_path, content=audit()))
    assert "The controls passed, and none of 36 figures of 3 hospitals stands out" in words
    assert "does not prove that other attacks would find nothing" in words
    assert "Evidence of a leak" not in words


def test_leak_is_the_first_verdict_with_its_figures(tmp_path: Path) -> None:
    leaking = hospital_audit(HOSPITALS[1], share=0.21, auc=0.61)
    html = part_of(write_run(tmp_path, content=audit(hospital_audit(HOSPITALS[0]), leaking)))
    words = Page(html).words
    assert words.index("Evidence of a leak: 8 of 24 figures") < words.index("Controls")
    assert (
        f"share of copies (pixels) at {HOSPITALS[1]}: 0.210 (0.196–0.226), held-out real images "
        "0.050" in words
    )
    assert f"Not audited: {HOSPITALS[2]}." in words


@pytest.mark.parametrize(
    ("share", "auc"),
    list(itertools.product((0.047, 0.08, 0.12, 0.3), (0.45, 0.54, 0.56, 0.6, 0.9))),
)
def test_report_and_audit_agree_on_signs_of_a_leak(share: float, auc: float) -> None:
    numbers = hospital_audit("a", share, auc)
    out = [figure for figure in Audit(audit(numbers)).figures if figure.stands_out]
    assert len(out) == len(signs(numbers))


def test_images_near_to_all_real_images_are_no_copies() -> None:
    blurred, copying = (hospital_audit("a") for _ in range(2))
    blurred["copies"] = {"pixels": copy_figures(0.3, False, near_held_out=0.28)}
    copying["copies"] = {"pixels": copy_figures(0.3, False)}
    measures = [
        [figure.measure for figure in Audit(audit(part)).figures if figure.stands_out]
        for part in (blurred, copying)
    ]
    assert measures == [[], ["share of copies (pixels)"]]
    assert [len(signs(part)) for part in (blurred, copying)] == [0, 1]


def test_audit_with_failed_controls_is_not_valid_and_grey(
    tmp_path: Path,
) -> None:
    failed = hospital_audit(HOSPITALS[1], share=0.3, auc=0.9, positive=False)
    run = write_run(tmp_path, content=audit(hospital_audit(HOSPITALS[0]), failed))
    html = part_of(run)
    words = Page(html).words
    assert words.removeprefix("Privacy").strip().startswith("This audit is not valid:")
    assert (
        f"at {HOSPITALS[1]} the positive control did not pass (no space finds the planted copies)"
        in words
    )
    assert "Evidence of a leak" not in words
    assert html.count('class="invalid"') == 3
    assert html.count("(not valid)</caption>") == 8
    assert "not-valid.csv" in html
    assert (
        f"{HOSPITALS[0]} passed passed 0.999 0.297 / 0.300 extractor features 0.993 500 / 180 97"
        in words
    )
    assert (
        f"{HOSPITALS[1]} NOT passed passed 0.712 0.297 / 0.300 pixels, extractor features 0.993"
        in words
    )
    assert 'class="invalid"' not in part_of(write_run(tmp_path / "valid", content=audit()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"valid": False}, "does not state that it is valid"),
        ({"valid": None}, "does not state that it is valid"),
        ({"hospitals": []}, "no hospital was audited"),
        (
            {"hospitals": [hospital_audit("a") | {"valid": False}]},
            "the audit of a does not state that it is valid",
        ),
        (
            {"hospitals": [hospital_audit("a") | {"controls": None, "notes": ["too few"]}]},
            "no control was run at a (too few)",
        ),
        (
            {"hospitals": [hospital_audit("a") | {"controls": {"positive": {"passed": True}}}]},
            "the negative control was not run",
        ),
        (
            {"hospitals": [hospital_audit("a", negative=False)]},
            "the negative control did not pass (halves differ)",
        ),
    ],
)
def test_audit_is_valid_only_if_all_parts_state_it(change: dict[str, Any], reason: str) -> None:
    found = Audit(audit() | change)
    assert not found.is_valid
    assert reason in found.verdict()


def test_report_states_the_audited_round_and_later_rounds(tmp_path: Path) -> None:
    run = write_run(tmp_path, content=audit(round_number=8))
    words = words_of(run)
    assert "Audited: the model of round 8, on 1,000 synthetic images per hospital." in words
    assert "The last round is 10: the audit does not cover that model." in words
    files.write_json(run.audit, audit())
    assert "does not cover that model" not in words_of(run)


def test_insensitive_space_is_marked(tmp_path: Path) -> None:
    html = part_of(write_run(tmp_path, content=audit()))
    rows = re.findall(
        r'<th scope="row">([^<]*)</th>(.*?)</tr>', paragraph(html, "singling-out"), re.DOTALL
    )
    detects = {
        name.split(", ")[1]: re.findall(r"<td[^>]*>([^<]*)</td>", cells)[-1]
        for name, cells in rows[:3]
    }
    assert detects == {"pixels": "yes", "extractor features": "no", "contrastive embedding": "yes"}


def test_hospital_with_too_few_images_has_a_reason_only(tmp_path: Path) -> None:
    few = hospital_audit(HOSPITALS[2]) | {
        "copies": dict.fromkeys(("pixels", "features", "embedding")),
        "membership": [],
        "projection": None,
        "controls": None,
        "valid": False,
        "notes": [
            "20 training and 9 held-out images are too few to measure: 30 of each are needed."
        ],
    }
    words = words_of(write_run(tmp_path, content=audit(few)))
    assert "20 training and 9 held-out images are too few" in words
    assert words.count("The audit has no figure for this criterion.") == 3


@pytest.mark.parametrize("damage", [b"", b'{"valid": tr', b"\xff\xfe\x00", b"[1, null]", b"7"])
def test_damaged_audit_is_reported_and_is_no_evidence(tmp_path: Path, damage: bytes) -> None:
    run = write_run(tmp_path)
    run.audit.write_bytes(damage)
    page = Page(page_of(run))
    assert "audit.json is damaged: the results of the audit are unknown" in page.words
    assert "0.971" in page.words


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.data())
def test_verdict_of_any_audit_content_is_readable(data: st.DataObject) -> None:
    """Replace any part of an audit by anything: no error, and never valid by mistake."""
    content = json.loads(json.dumps(audit(hospital_audit("a"))))
    here: Any = content
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(here[key], dict | list) or not here[key] or data.draw(st.booleans()):
            break
        here = here[key]
    here[key] = data.draw(JSON)
    found = Audit(clean(content))
    assert found.verdict()
    assert found.notes is not None
    assert not found.is_valid or (
        content["valid"] is True and all(h["valid"] is True for h in content["hospitals"])
    )


# --- properties of the report --------------------------------------------------------------------


def variants(folder: Path) -> dict[str, RunFolder]:
    """Runs in all states that the report distinguishes."""
    return {
        "plain": write_run(folder / "plain"),
        "private": write_run(folder / "private", PRIVATE, audit()),
        "noiseless": write_run(folder / "noiseless", {"noise_multiplier": 0.0}),
        "invalid": write_run(
            folder / "invalid",
            PRIVATE,
            audit(hospital_audit(HOSPITALS[0], 0.3, 0.8, positive=False)),
        ),
        "leak": write_run(
            folder / "leak",
            {"epsilon": 3.0, "unit": "patient"},
            audit(hospital_audit(HOSPITALS[0], 0.3, 0.8)),
        ),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    return variants(tmp_path_factory.mktemp("privacy"))


def test_the_word_is_evidence_and_never_the_other_one(runs: dict[str, RunFolder]) -> None:
    for run in runs.values():
        page = page_of(run)
        assert "anonym" not in page.lower()
        assert "evidence" in page


def test_privacy_section_is_small_without_paths_and_images(
    runs: dict[str, RunFolder],
) -> None:
    part = part_of(runs["private"])
    assert len(part) < 120_000
    assert "<img" not in part
    assert "pairs-" not in part
    assert str(runs["private"].path) not in part


def test_hostile_names_in_an_audit_are_escaped(tmp_path: Path) -> None:
    hostile = '</section><script>alert(1)</script>{{ 7*7 }}\u202e"'
    content = audit(hospital_audit(hostile))
    content["hospitals"][0]["copies"][hostile] = copy_figures(0.1, False)
    content["hospitals"][0]["membership"][0]["attack"] = hostile
    content["hospitals"][0]["controls"]["positive"]["copies"][hostile] = {
        "passed": False,
        "found_share": 0.1,
    }
    run = write_run(tmp_path, content=content)
    html = page_of(run)
    assert "<script" not in html
    assert "\u202e" not in html
    assert Page(html).tags["section"] == 9


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("name", ["private", "invalid"])
@pytest.mark.parametrize(
    ("scheme", "size"),
    [("light", "desktop"), ("dark", "phone"), ("dark", "desktop"), ("light", "phone")],
)
def test_privacy_section_fits_the_window_with_enough_contrast(
    browser: Browser, runs: dict[str, RunFolder], name: str, scheme: str, size: str
) -> None:
    page_of(runs[name])
    browser.show(runs[name].report, scheme, size)
    browser.run("for (const part of document.querySelectorAll('details')) part.open = true")
    assert browser.run("return document.documentElement.scrollWidth") == SIZES[size][0]
    assert browser.run(CONTRAST)[1] == []
    levels = browser.run(
        "return [...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))"
    )
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = browser.run("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert browser.logs()[0] == []


# --- the card ------------------------------------------------------------------------------------


def card_of(run: RunFolder) -> tuple[dict[str, Any], str]:
    write_cards(run)
    markdown = (run.cards / "model_card.md").read_text()
    facts = json.loads((run.cards / "model_card.json").read_text())
    return facts, re.sub(r"\\(\W|_)", r"\1", markdown)


def private_card(path: Path, content: dict[str, Any] | None) -> RunFolder:
    run = make_card_run(path, privacy=PRIVATE)
    rows = [
        {"name": name, "images_seen": 500, **privacy_cost(i, 10)}
        for i, name in enumerate(("north", "south"))
    ]
    files.write_text(run.metrics, json.dumps(read_lines_or_one(run) | {"hospitals": rows}) + "\n")
    if content is not None:
        files.write_json(run.audit, content)
    return run


def read_lines_or_one(run: RunFolder) -> dict[str, Any]:
    lines = read_lines(run)
    return lines[-1] if lines else {"round": 1, "images_seen": 1000}


def test_card_states_epsilon_with_terms_and_audit_findings(tmp_path: Path) -> None:
    facts, markdown = card_of(
        private_card(tmp_path, audit(hospital_audit("north"), hospital_audit("south", 0.3, 0.8)))
    )
    privacy = facts["privacy"]
    for i, row in enumerate(privacy["guarantee"]["hospitals"]):
        cost = privacy_cost(i, 10)
        assert {key: row[key] for key in cost} == cost
        epsilon, delta = (text.significant(cost[key]) for key in ("epsilon", "delta"))
        assert f"| {row['name']} | {epsilon} | {delta} |" in markdown
    for words in (
        "Neighbouring relation: ",
        "Accountant: Opacus",
        "ChaCha20",
        "Evidence of a leak",
        "Not protected:",
    ):
        assert words in markdown
    worst = {row["measure"]: row for row in privacy["audit"]["figures"]}
    assert worst["share of copies (pixels)"]["hospital"] == "south"
    assert (
        "| share of copies (pixels) | south | 0.300 (0.286–0.316) | 0.050 (0.028–0.087) | yes |"
        in markdown
    )
    assert not any(
        "No differential privacy" in line or "no attack was run. Not" in line
        for line in privacy["unknown"][:-1]
    )
    assert "anonym" not in markdown.lower()


def test_card_of_an_invalid_audit_has_no_figure(tmp_path: Path) -> None:
    facts, markdown = card_of(
        private_card(tmp_path, audit(hospital_audit("north", 0.3, positive=False)))
    )
    assert facts["privacy"]["audit"]["figures"] == []
    assert "This audit is not valid" in markdown
    assert any(
        "the audit that was run is not valid" in line for line in facts["privacy"]["unknown"]
    )


def test_card_without_privacy_and_audit_claims_neither(tmp_path: Path) -> None:
    facts, markdown = card_of(make_card_run(tmp_path))
    assert "No differential privacy" in facts["privacy"]["unknown"][0]
    assert facts["privacy"]["guarantee"]["hospitals"] == []
    assert facts["privacy"]["audit"]["verdict"] in markdown
    assert "Differential privacy: " not in markdown


@pytest.mark.parametrize("private", [False, True])
def test_card_with_client_level_dp_states_it(private: bool, tmp_path: Path) -> None:
    run = make_card_run(
        tmp_path, privacy={"client_level": "server", **(PRIVATE if private else {})}
    )
    cost = {
        "epsilon": 31.4,
        "delta": 1e-5,
        "noise_multiplier": 2.0,
        "clip": 1.0,
        "releases": 10,
        "hospitals": 2,
    }
    files.write_text(
        run.metrics,
        json.dumps(read_lines_or_one(run) | {"client_level_dp": cost}) + "\n",
    )
    facts, markdown = card_of(run)
    privacy = facts["privacy"]
    stated = privacy["guarantee"]["client_level"]
    assert {key: stated[key] for key in cost} == cost
    assert stated["statement"] in markdown
    assert "delta = 1/2 would allow the full disclosure of one hospital" in markdown
    assert "losses" not in privacy["known"][0]
    assert ("epsilon" in privacy["known"][0]) is private
    assert not any("No differential privacy:" in line for line in privacy["unknown"])
    assert any("for an image or a patient" in line for line in privacy["unknown"]) is not private


def test_card_of_a_private_run_lists_the_exchanged_losses(tmp_path: Path) -> None:
    facts, _ = card_of(private_card(tmp_path, None))
    assert "losses of the generator, and epsilon with its delta" in facts["privacy"]["known"][0]
    assert facts["privacy"]["guarantee"]["client_level"] == {"statement": ""}
