"""The cards: every number is the file's, what is bad is named, what is unknown is a blank, no path of a hospital."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from card_runs import LABELS, SECRET, evaluation, figures_of, hospitals, make_run
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from small_federation import federate, tiny, write_shards

from fedgan import files
from fedgan.cli import outputs
from fedgan.errors import ConfigError
from fedgan.redact import REDACTED, redact
from fedgan.report.cards import write_cards, write_comparison_cards
from fedgan.report.cards.markdown import code, escape, table
from fedgan.report.html import format as text
from fedgan.run_folder import RunFolder

NAMES = ["dataset_card.json", "dataset_card.md", "model_card.json", "model_card.md"]


def cards_of(path: Path) -> tuple[dict[str, Any], str, dict[str, Any], str]:
    """Model card and dataset card, each as JSON and as Markdown."""
    folder = path / "cards"
    model, dataset = (
        json.loads((folder / f"{name}_card.json").read_text()) for name in ("model", "dataset")
    )
    return (
        model,
        (folder / "model_card.md").read_text(),
        dataset,
        (folder / "dataset_card.md").read_text(),
    )


def plain(page: str) -> str:
    """A page without the backslashes of Markdown."""
    return re.sub(r"\\(\W|_)", r"\1", page)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


# --- what stands in them -------------------------------------------------------------------------


def test_a_run_gives_two_cards_each_as_markdown_and_json(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    written = write_cards(run)
    assert sorted(path.name for path in written) == NAMES
    assert sorted(path.name for path in (run.path / "cards").iterdir()) == NAMES
    first = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in write_cards(run)] == first


def test_every_number_of_the_metrics_is_one_of_the_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_cards(run)
    model, page, *_ = cards_of(run.path)
    there = set(numbers(evaluation()))
    assert set(numbers(model["metrics"])) <= there
    left_out = {5.0, 0.5}  # k stands in no row; the mixed row's share is its name
    carried = set(numbers(model["metrics"])) | set(numbers(model["training"])) | left_out
    assert there - carried == set()
    for row in model["metrics"]["utility"]["rows"]:
        assert text.decimal(row["macro_auc"]) in page
    synthetic = evaluation()["utility"]["synthetic"]
    assert (
        f"{text.decimal(synthetic['macro_auc'])} ({text.interval(synthetic['macro_auc_ci'])})"
        in page
    )
    for key in ("frechet", "frechet_reference", "recall", "recall_reference"):
        assert text.significant(evaluation()["fidelity"][key]) in page


def test_counts_sources_and_the_hash_are_those_of_the_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_cards(run)
    model, page, dataset, data_page = cards_of(run.path)
    for card in (model["data"], dataset):
        assert [row["train_classes"] for row in card["hospitals"]] == [
            row["counts"]["train"] for row in hospitals()
        ]
        assert [row["patients"] for row in card["hospitals"]] == [
            row["patients"] for row in hospitals()
        ]
        assert card["totals"]["images"] == {"train": 811, "val": 94, "test": 112}
        assert card["totals"]["patients"] == {"train": 689, "val": 79, "test": 98}
        assert card["totals"]["train_classes"] == {"normal": 599, "pneumonia": 155, "covid": 57}
        assert card["licences"] == ["CC BY 4.0"]
    assert dataset["without_licence"] == ["south"]
    digest = hashlib.sha256(run.checkpoint(1).read_bytes()).hexdigest()
    assert model["details"]["sha256"] == digest
    assert digest in page
    assert (
        model["provenance"]["settings_sha256"]
        == hashlib.sha256(run.config.read_bytes()).hexdigest()
    )
    assert model["training"]["bytes_exchanged"] == 123_456_789
    assert "507 / 401" in data_page
    assert "| all | 599 | 155 | 57 | 811 / 689 |" in data_page


def test_a_weak_class_and_lost_variety_are_named_under_limits(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_cards(run)
    model, page, *_ = cards_of(run.path)
    limits = "\n".join(model["limits"])
    assert (
        "Class 'covid': a classifier trained on synthetic images only reaches an AUC of 0.553"
        in limits
    )
    assert (
        "Class 'pneumonia': the interval of the AUC from synthetic images (0.490–0.867) reaches 0.5"
        in limits
    )
    assert "Class 'normal'" not in limits
    assert "Class 'covid' has only 7 positive real test images" in limits
    assert "Recall is 0.412; between real images it is 0.733" in limits
    assert (
        "coverage lies below that of real images among themselves: covid (0.21, floor 0.88)"
        in limits
    )
    assert (
        "Fréchet distance to real images is 12.35, that of real images among themselves 2.105"
        in limits
    )
    assert "Only north has training images of 'covid'" in limits
    assert "pneumonia at south (5)" in limits
    for sentence in model["limits"]:
        assert sentence in plain(page)


def test_what_looks_equal_is_not_called_less(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    held = evaluation()
    held["fidelity"] |= {
        "recall": 0.73299,
        "recall_reference": 0.73301,
        "frechet": 2.10501,
        "frechet_reference": 2.10499,
    }
    held["fidelity"]["per_class"]["covid"] |= {"coverage": 0.8799, "coverage_reference": 0.8801}
    files.write_json(run.evaluation, held)
    write_cards(run)
    assert not [
        line
        for line in cards_of(run.path)[0]["limits"]
        if "Recall" in line or "overage" in line or "Fréchet" in line
    ]


def test_intervals_below_zero_can_be_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    held = evaluation()
    held["fidelity"] |= {
        "kernel": 0.00031,
        "kernel_ci": [-0.00012, 0.00084],
        "frechet_ci": [0.0439, 0.1331],
    }
    files.write_json(run.evaluation, held)
    write_cards(run)
    page = cards_of(run.path)[1]
    assert "| −0.000120 to 0.000840 |" in page
    assert "| 0.044–0.133 |" in page


def test_a_good_evaluation_has_no_weak_class(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    good = evaluation()
    good["utility"]["synthetic"] = figures_of(0.93, weak=0.91)
    good["utility"]["synthetic"]["per_class"]["pneumonia"]["auc_ci"] = [0.88, 0.95]
    good["fidelity"] |= {"recall": 0.8, "frechet": 2.0, "per_class": {}}
    files.write_json(run.evaluation, good)
    write_cards(run)
    assert not [
        line
        for line in cards_of(run.path)[0]["limits"]
        if "AUC" in line or ("real images" in line and "Only" not in line)
    ]


def test_privacy_says_what_was_not_measured_and_claims_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_cards(run)
    model, page, *_ = cards_of(run.path)
    unknown = "\n".join(model["privacy"]["unknown"])
    assert "No differential privacy" in unknown
    assert "Membership inference: no attack was run. Not measured." in unknown
    assert "The discriminator, which is fitted to real images, travelled" in "\n".join(
        model["privacy"]["known"]
    )
    assert "none of it says that nobody can be recognised" in page


def judged(run: RunFolder, arm: str | None, **more: Any) -> RunFolder:
    """The run with an evaluation.json as `fedgan compare` writes it: without budget, and `arm`, name and round on top."""
    held = {
        key: value
        for key, value in evaluation().items()
        if key not in ("arm", "name", "round", "images_seen")
    }
    facts = {"arm": arm, "name": arm, "round": 1} if arm else {}
    files.write_json(run.evaluation, {**facts, **held, **more})
    return run


def member_of(path: Path, arm: str | None, **federation: Any) -> tuple[dict[str, Any], str]:
    """The model card of south's own training within an arm of a comparison; JSON and Markdown."""
    study = make_run(path / "study", evaluation={"seeds": 7, "images": 77})
    home = {"hospitals": 2, "rounds": 4, "members": ["south"]} | federation
    run = make_run(study.arms / f"{arm}-seed0" / "members" / "south", federation=home)
    files.write_json(run.hospitals, hospitals()[1:])
    write_cards(judged(run, arm))
    return cards_of(run.path)[:2]


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("centralized", "The images of all hospitals were pooled: they lay in one place"),
        ("local", "Each hospital trained alone: nothing travelled"),
        ("federated", "No image travelled for the training. What travelled: parameters"),
        ("coalition", "No image travelled for the training. What travelled: parameters"),
    ],
)
def test_the_card_of_a_judged_arm_says_how_that_arm_was_trained(
    arm: str, words: str, tmp_path: Path
) -> None:
    make_run(tmp_path / "study")
    run = judged(make_run(tmp_path / "study" / "arms" / f"{arm}-seed0"), arm)
    write_cards(run)
    model, page, *_ = cards_of(run.path)
    assert words in model["privacy"]["known"][0]
    assert model["training"]["federated"] is (arm in ("federated", "coalition"))
    assert ("What travelled" in page) is (arm in ("federated", "coalition"))
    assert ("federated-learning" in page) is (arm in ("federated", "coalition"))
    assert "not known" not in model["training"]["arm_in_words"]


def test_an_arm_that_no_file_names_is_not_known_and_nothing_is_claimed_of_it(
    tmp_path: Path,
) -> None:
    run = judged(make_run(tmp_path / "run"), None)
    write_cards(run)
    model, page, *_ = cards_of(run.path)
    assert model["training"]["arm"] == "not known"
    assert not [
        line for line in model["privacy"]["known"] if "travelled" in line or "pooled" in line
    ]
    assert any(line.startswith("How the model was trained") for line in model["privacy"]["unknown"])
    assert "- Arm: not known" in page


def test_a_coalition_of_one_hospital_did_not_federate(tmp_path: Path) -> None:
    make_run(tmp_path / "study")
    federation = {"hospitals": 2, "rounds": 1, "members": ["north"]}
    run = judged(
        make_run(tmp_path / "study" / "arms" / "coalition-north-seed0", federation=federation),
        "coalition",
    )
    write_cards(run)
    model, page, dataset, _ = cards_of(run.path)
    assert "trained alone" in model["privacy"]["known"][0]
    assert "What travelled" not in page
    for card in (model["data"], dataset):
        assert [row["hospital"] for row in card["sources"]] == ["north"]
        assert [row["name"] for row in card["hospitals"]] == ["north"]


def test_the_card_of_a_hospital_alone_has_its_own_data_and_no_plan_of_the_whole_arm(
    tmp_path: Path,
) -> None:
    model, page = member_of(tmp_path, "local")
    assert [row["hospital"] for row in model["data"]["sources"]] == ["south"]
    assert (model["training"]["rounds_planned"], model["training"]["images_planned"]) == (
        None,
        None,
    )
    assert "planned" not in page
    assert "not finished" not in page
    assert "its share of the arm's" in page


def test_the_card_of_a_fine_tuned_hospital_names_all_that_its_model_learned_from(
    tmp_path: Path,
) -> None:
    model, page = member_of(tmp_path, "finetuned")
    assert [row["hospital"] for row in model["data"]["sources"]] == ["north", "south"]
    assert [row["name"] for row in model["data"]["hospitals"]] == ["north", "south"]
    assert "not finished" not in page
    assert "Rounds, bytes and time are of the training at home" in page
    assert model["training"]["members"] == ["north", "south"]
    assert (
        "Each hospital then trained further alone, and nothing travelled."
        in model["privacy"]["known"]
    )


@pytest.mark.parametrize("place", ["arms/federated-seed0", "arms/local-seed0/members/north"])
def test_the_settings_of_the_evaluator_are_those_that_made_the_figures(
    place: str, tmp_path: Path
) -> None:
    study = make_run(tmp_path / "study", evaluation={"seeds": 7, "images": 77})
    run = judged(
        make_run(study.path / place, evaluation={"seeds": 2, "images": 33}),
        place.split("/")[1].split("-")[0],
    )
    write_cards(run)
    model, page, *_ = cards_of(run.path)
    assert model["provenance"]["settings"]["evaluation"]["seeds"] == 7
    assert model["provenance"]["settings_changed"]["evaluation.images"] == 77
    assert "as the comparison's config.toml has it" in page


@pytest.mark.parametrize(
    ("arm", "words"), [("centralized", "lay in one place"), ("local", "nothing travelled")]
)
def test_an_arm_that_sends_nothing_does_not_claim_to_be_federated(
    arm: str, words: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    files.write_json(run.evaluation, evaluation() | {"arm": arm})
    write_cards(run)
    model, page, *_ = cards_of(run.path)
    assert words in model["privacy"]["known"][0]
    assert "What travelled" not in page
    assert "what travelled" not in page


def test_each_blank_names_who_has_to_fill_it_and_has_no_value(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_cards(run)
    model, page, dataset, data_page = cards_of(run.path)
    for card, shown in ((model, page), (dataset, data_page)):
        assert card["blanks"]
        for blank in card["blanks"]:
            assert blank["value"] is None
            assert f"To be filled by {blank['who']}" in blank["sentence"]
            assert blank["sentence"] in plain(shown)
    fields = {blank["field"] for blank in dataset["blanks"]}
    assert {
        "contact",
        "ethics approval",
        "consent or legal basis",
        "licence of south",
        "source of south",
    } <= fields
    assert "licence of north" not in fields


def test_phantoms_have_no_patients_whose_consent_is_open(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    environment = json.loads(run.environment.read_text())
    for row in environment["sources"]:
        row |= {
            "source": "procedural chest phantoms, seed 0, hospital 1 of 2",
            "licence": "CC0-1.0",
        }
    files.write_json(run.environment, environment)
    write_cards(run)
    model, _, dataset, data_page = cards_of(run.path)
    assert {blank["field"] for blank in dataset["blanks"]} == {"contact", "maintenance"}
    assert "there is no patient" in data_page
    assert any("phantoms" in line for line in model["limits"])


# --- what must not stand in them -----------------------------------------------------------------


def test_no_path_and_no_file_name_of_a_hospital_is_told(tmp_path: Path) -> None:
    description = f"Images from {SECRET}/a.png, see https://example.org/a/b and C:\\scans\\doe.dcm"
    run = make_run(tmp_path / "run", description=description)
    for path in write_cards(run):
        told = path.read_text()
        for word in ("doe", "pacs", "St Elm", "scans", str(tmp_path), tmp_path.name):
            assert word not in told, f"{word} in {path.name}"
        assert "https://example.org/a/b" in told
    assert cards_of(run.path)[0]["data"]["sources"][1]["source"] is None


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        ("/data/x/y.csv", REDACTED),
        ("from /data/x/y.csv, 2020", f"from {REDACTED}, 2020"),
        ("~/scans/a and 3/4 of 16/32/64", f"{REDACTED} and 3/4 of 16/32/64"),
        ("\\\\server\\share\\a.dcm", REDACTED),
        ("file:///home/a.png", REDACTED),
        (
            "CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/)",
            "CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/)",
        ),
        ("cannot read /data/pacs/doe_john.dcm", f"cannot read {REDACTED}"),
        ("cannot read /srv/St Elm/doe john.dcm: broken", f"cannot read {REDACTED}: broken"),
        ("in '/srv/St Elm/doe john' today", f"in '{REDACTED}' today"),
        ("at C:\\scans\\St Elm\\doe john.dcm, 2020", f"at {REDACTED}, 2020"),
        ("at C:/scans/doe.dcm, 2020", f"at {REDACTED}, 2020"),
        (
            "doe_john.DCM is damaged, as is pacs/doe.nii.gz",
            f"{REDACTED} is damaged, as is {REDACTED}",
        ),
        (
            "round-00001.safetensors and evaluation.json",
            "round-00001.safetensors and evaluation.json",
        ),
        ("see https://example.org/a/b.png", "see https://example.org/a/b.png"),
        ("doi 10.6084/m9.figshare.12275009", "doi 10.6084/m9.figshare.12275009"),
    ],
)
def test_paths_are_taken_out_and_links_stay(given_text: str, shown: str) -> None:
    assert redact(given_text) == shown
    assert redact({given_text: [given_text]}) == {shown: [shown]}


def test_a_root_with_spaces_is_taken_out_whole() -> None:
    assert redact("in /srv/St Elm/a.png today", ("/srv/St Elm",)) == f"in {REDACTED} today"
    assert redact("in /srv/St Elm/doe john.dcm today", ("/srv/St Elm",)) == f"in {REDACTED} today"
    assert redact("in C:\\St Elm\\doe john.dcm today", ("C:\\St Elm",)) == f"in {REDACTED} today"


_HOSPITAL = st.from_regex(r"[A-Z][a-z]{2,8}( [A-Z][a-z]{2,8})?", fullmatch=True)


@given(
    st.sampled_from(
        [
            "/srv/{}/",
            "/{}/b/",
            "~/pacs/{}/",
            "C:\\scans\\{}\\",
            "D:/{}/",
            "\\\\pacs\\{}\\",
            "file:///srv/",
        ]
    ),
    _HOSPITAL,
    st.from_regex(r"doe[-_]?[a-z]{0,5}[0-9]{0,3}", fullmatch=True),
    st.sampled_from(["dcm", "PNG", "nii.gz", "csv", "jpeg"]),
    st.sampled_from(
        ["cannot read {}", "{}: damaged", "skipped ({}), see below", 'no image "{}" there']
    ),
)
def test_no_name_of_a_hospital_s_file_survives(
    root: str, folder: str, file: str, kind: str, sentence: str
) -> None:
    told = redact(sentence.format(f"{root.format(folder)}{file}.{kind}"))
    assert "doe" not in told
    assert REDACTED in told


# --- files that lack or are damaged --------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["evaluation.json", "environment.json", "hospitals.json", "metrics.jsonl", "checkpoints"],
)
@pytest.mark.parametrize("damage", ["absent", "damaged", "other"])
def test_a_file_that_lacks_or_is_damaged_gives_cards_with_blanks(
    name: str, damage: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    path = run.checkpoint(1) if name == "checkpoints" else run.path / name
    if damage == "absent":
        path.unlink()
    else:
        path.write_text(
            '{"half": '
            if damage == "damaged"
            else '[{"name": null, "counts": 3, "sources": "none"}, 7]'
        )
    write_cards(run)
    model, page, dataset, _ = cards_of(run.path)
    assert None not in (model["details"]["resolution"], dataset["resolution"])
    if name == "evaluation.json":
        assert "Nothing was measured" in "\n".join(model["limits"])
        assert "Nothing was measured, or evaluation.json could not be read." in page
    if name == "environment.json":
        assert {"sources and licences"} <= {blank["field"] for blank in dataset["blanks"]}
    if name == "checkpoints":
        assert model["details"]["sha256"] is None
        assert model["problems"]
    if damage == "damaged" and name not in ("metrics.jsonl", "checkpoints"):
        assert f"{name} is damaged" in plain(page)


def test_a_run_without_classes_or_distances_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", label_names=())
    files.write_json(
        run.hospitals, [{"name": "north", "counts": {"train": {}}, "images": {"train": 5}}]
    )
    files.write_json(
        run.evaluation,
        evaluation() | {"utility": None, "fidelity": {"frechet": None, "notes": ["no features"]}},
    )
    write_cards(run)
    _, page, *_ = cards_of(run.path)
    assert "The utility of the synthetic images was not measured." in page
    assert "Fidelity was not measured." in page
    assert "without labels" in page


def test_a_second_look_has_cards_without_a_model(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    files.write_json(run.evaluated_run, {"run": f"{SECRET}/other"})
    write_cards(run)
    model, page, *_ = cards_of(run.path)
    assert model["details"]["sha256"] is None
    assert "second look" in page
    assert "doe" not in page


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder"):
        write_cards(RunFolder.at(tmp_path))
    assert not (tmp_path / "cards").exists()


# --- Markdown ------------------------------------------------------------------------------------


@example("1. a").via("a list")
@example("12) a").via("a list")
@example("# a").via("a heading")
@example("- a").via("a list")
@example("---").via("a rule")
@example("> a").via("a quotation")
@example("[a]: b").via("a link's address")
@example("a &amp; _b_ c_d __e__ *f* `g` ~~h~~ <i> ![j](k) \\ l").via("marks within a line")
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1))
def test_an_escaped_text_is_shown_letter_by_letter(words: str) -> None:
    tokens = MarkdownIt().parse(escape(words))
    shown = "".join(
        token.content
        for part in tokens
        for token in part.children or []
        if token.type in ("text", "text_special")
    )
    assert " ".join(shown.split()) == " ".join(words.split())
    assert {token.type for token in tokens} <= {"paragraph_open", "inline", "paragraph_close"}


@given(
    st.lists(
        st.text(st.characters(codec="ascii", exclude_categories=("Cc",))), min_size=2, max_size=2
    )
)
def test_a_table_keeps_its_cells_whatever_stands_in_them(words: list[str]) -> None:
    html = MarkdownIt().enable("table").render(table(["a", "b"], [[words[0], code(words[1])]]))
    assert html.count("<td") == 2
    assert "<code>" in html


def test_names_that_are_markdown_or_html_stay_text(tmp_path: Path) -> None:
    name = "# x | <script>alert(1)</script> [a](b) *c* `d`"
    run = make_run(tmp_path / "run", name=name, description="1. <b>bold</b>\n\n# heading")
    rows = hospitals()
    rows[0]["name"] = name
    files.write_json(run.hospitals, rows)
    write_cards(run)
    for page in cards_of(run.path)[1::2]:
        html = MarkdownIt().enable("table").render(page.partition("\n---\n")[2])
        assert "<script>" not in html
        assert "<b>" not in html
        assert "<h1>heading" not in html
        assert "&lt;script&gt;" in html


def test_the_front_matter_is_yaml(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    run = make_run(tmp_path / "run", name='"a": [b')
    write_cards(run)
    _, page, _, data_page = cards_of(run.path)
    assert "federated-learning" in yaml.safe_load(page.split("---\n")[1])["tags"]
    front = yaml.safe_load(data_page.split("---\n")[1])
    assert (front["pretty_name"], front["size_categories"]) == ('"a": [b', ["n<1K"])


# --- comparisons ---------------------------------------------------------------------------------


def make_comparison(path: Path) -> dict[str, Any]:
    """A comparison of a federated arm with two seeds, a centralised one and one that failed; its comparison.json."""
    whole = make_run(path)
    for file in (whole.evaluation, whole.checkpoint(1), whole.checkpoint(1).with_suffix(".json")):
        file.unlink()
    rows = []
    for arm, seed in (("centralized", 0), ("federated", 1), ("federated", 0)):
        run = make_run(path / "arms" / f"{arm}-seed{seed}", seed=seed)
        run.environment.unlink()
        run.evaluation.unlink()
        held = {key: value for key, value in evaluation().items() if key not in ("arm", "name")}
        rows.append(
            {
                "arm": arm,
                "name": arm,
                "seed": seed,
                "folder": f"arms/{arm}-seed{seed}",
                "status": "done",
                "evaluation": held,
            }
        )
    rows.append(
        {
            "arm": "local",
            "name": "local",
            "seed": 0,
            "folder": "",
            "status": "failed",
            "failure": f"no disk at {SECRET}",
        }
    )
    summary = [
        {
            "arm": "federated",
            "name": "federated",
            "seeds": [0, 1],
            "images_seen": 1000,
            "macro_auc": 0.8467,
            "macro_auc_ci": [0.82, 0.87],
        },
        {
            "arm": "centralized",
            "name": "centralized",
            "seeds": [0],
            "images_seen": 1000,
            "macro_auc": 0.8911,
            "frechet": 9.75,
        },
    ]
    difference = {
        "a": "federated",
        "b": "centralized",
        "difference": -0.0444,
        "ci": [-0.06, -0.02],
        "p_holm": 0.013,
    }
    return {
        "answer": "Federation costs 0.044 macro AUC.",
        "arms": rows,
        "summary": summary,
        "comparisons": [difference | {"margin": 0.02, "non_inferior": False}],
        "not_measured": ["No privacy attack."],
    }


def test_a_comparison_has_the_card_of_its_federated_model_and_a_line_for_each_arm(
    tmp_path: Path,
) -> None:
    found = make_comparison(tmp_path / "study")
    files.write_json(tmp_path / "study" / "comparison.json", found)
    assert sorted(path.name for path in write_comparison_cards(tmp_path / "study")) == NAMES
    model, page, dataset, _ = cards_of(tmp_path / "study")
    weights = (
        tmp_path / "study" / "arms" / "federated-seed0" / "checkpoints" / "round-00001.safetensors"
    )
    assert model["details"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert model["provenance"]["seed"] == 0
    assert model["training"]["arm"] == "federated"
    assert model["data"]["licences"] == ["CC BY 4.0"]
    assert set(numbers(model["metrics"])) <= set(numbers(evaluation()))
    for words in (
        found["answer"],
        "federated, seed 0",
        "0.847 (0.820–0.870)",
        "0.891",
        "9.75",
        "−0.044",
        "[−0.060, −0.020]",
        "not shown",
    ):
        assert words in plain(page)
    assert "local, seed 0: no disk at" in plain(page)
    assert "doe" not in page
    assert dataset["totals"]["images"]["train"] == 811


@pytest.mark.parametrize("damage", ["no federated arm", "nothing done", "damaged", "outside"])
def test_a_comparison_that_lacks_something_has_cards_all_the_same(
    damage: str, tmp_path: Path
) -> None:
    found = make_comparison(tmp_path / "study")
    path = tmp_path / "study" / "comparison.json"
    if damage == "no federated arm":
        found["arms"] = [row for row in found["arms"] if row["arm"] != "federated"]
    elif damage == "nothing done":
        found["arms"] = found["arms"][-1:]
    elif damage == "outside":
        make_run(tmp_path / "other", name="stranger")
        found["arms"] = [found["arms"][1] | {"folder": "../other", "seed": 7}]
    files.write_json(path, found)
    if damage == "damaged":
        path.write_text("{")
    write_comparison_cards(tmp_path / "study")
    model, page, *_ = cards_of(tmp_path / "study")
    assert "stranger" not in page
    if damage == "no federated arm":
        assert model["training"]["arm"] == "centralized"
    else:
        assert model["details"]["sha256"] is None
        assert model["problems"]


def test_an_unfinished_comparison_has_cards_that_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_comparison(tmp_path / "study")
    outputs.cards(tmp_path / "study", as_json=True)
    assert sorted(Path(path).name for path in json.loads(capsys.readouterr().out)["cards"]) == NAMES
    model, page, *_ = cards_of(tmp_path / "study")
    assert "comparison.json is not there: the comparison is not finished." in model["problems"]
    assert model["training"]["arm"] == "not known"
    assert "What travelled" not in page


@pytest.mark.parametrize("compared", [False, True])
def test_the_verb_writes_the_cards_of_a_run_and_of_a_comparison(
    compared: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "study"
    if compared:
        files.write_json(place / "comparison.json", make_comparison(place))
    else:
        make_run(place)
    outputs.cards(place, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert sorted(Path(path).name for path in told["cards"]) == NAMES
    assert ("comparison" in cards_of(place)[0]) is compared


# --- a run that was really trained ---------------------------------------------------------------


def test_the_cards_of_a_small_federation_tell_its_counts_and_its_model(tmp_path: Path) -> None:
    from client.app import app

    settings = tiny(
        write_shards(tmp_path / "private shards", (24, 16)), hospitals=2, rounds=2, kimg=0.05
    )
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    write_cards(run)
    model, page, dataset, data_page = cards_of(run.path)
    told = json.loads(run.hospitals.read_text())
    assert [row["train_classes"] for row in dataset["hospitals"]] == [
        row["counts"]["train"] for row in told
    ]
    meta = json.loads(run.checkpoint(2).with_suffix(".json").read_text())
    assert (model["training"]["rounds"], model["training"]["images_seen"]) == (
        2,
        meta["images_seen"],
    )
    assert (model["training"]["bytes_exchanged"], model["details"]["sha256"]) == (
        meta["bytes_exchanged"],
        meta["sha256"],
    )
    assert model["details"]["label_names"] == ["dark", "bright"]
    assert LABELS[0] not in page
    for word in ("private shards", "alpha-0", str(tmp_path)):
        assert word not in page + data_page + json.dumps([model, dataset])
