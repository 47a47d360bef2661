"""Cards: figures, limits, blanks, redaction, Markdown, comparisons."""

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


def plain(markdown: str) -> str:
    """Markdown without backslashes."""
    return re.sub(r"\\(\W|_)", r"\1", markdown)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


# --- content -------------------------------------------------------------------------------------


def test_run_has_two_cards_as_markdown_and_json(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    written = write_cards(run)
    assert sorted(path.name for path in written) == NAMES
    assert sorted(path.name for path in (run.path / "cards").iterdir()) == NAMES
    first = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in write_cards(run)] == first


def test_card_metrics_are_the_figures_of_the_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_cards(run)
    model, markdown, *_ = cards_of(run.path)
    there = set(numbers(evaluation()))
    assert set(numbers(model["metrics"])) <= there
    left_out = {5.0, 0.5}  # k is in no row; the share of a mixed row is in its name
    carried = set(numbers(model["metrics"])) | set(numbers(model["training"])) | left_out
    assert there - carried == set()
    for row in model["metrics"]["utility"]["rows"]:
        assert text.decimal(row["macro_auc"]) in markdown
    synthetic = evaluation()["utility"]["synthetic"]
    assert (
        f"{text.decimal(synthetic['macro_auc'])} ({text.interval(synthetic['macro_auc_ci'])})"
        in markdown
    )
    for key in ("frechet", "frechet_reference", "recall", "recall_reference"):
        assert text.significant(evaluation()["fidelity"][key]) in markdown


def test_counts_sources_and_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_cards(run)
    model, markdown, dataset, data_markdown = cards_of(run.path)
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
    assert digest in markdown
    assert (
        model["provenance"]["settings_sha256"]
        == hashlib.sha256(run.config.read_bytes()).hexdigest()
    )
    assert model["training"]["bytes_exchanged"] == 123_456_789
    assert "507 / 401" in data_markdown
    assert "| all | 599 | 155 | 57 | 811 / 689 |" in data_markdown


def test_limits_name_weak_classes_and_low_diversity(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_cards(run)
    model, markdown, *_ = cards_of(run.path)
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
    assert "coverage is below that between real images: covid (0.21, reference 0.88)" in limits
    assert "Fréchet distance to real images is 12.35, that between real images 2.105" in limits
    assert "Only north has training images of 'covid'" in limits
    assert "pneumonia at south (5)" in limits
    for sentence in model["limits"]:
        assert sentence in plain(markdown)


def test_figures_printed_equal_are_no_limit(tmp_path: Path) -> None:
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


def test_intervals_below_zero_are_readable(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    held = evaluation()
    held["fidelity"] |= {
        "kernel": 0.00031,
        "kernel_ci": [-0.00012, 0.00084],
        "frechet_ci": [0.0439, 0.1331],
    }
    files.write_json(run.evaluation, held)
    write_cards(run)
    markdown = cards_of(run.path)[1]
    assert "| −0.000120 to 0.000840 |" in markdown
    assert "| 0.044–0.133 |" in markdown


def test_good_evaluation_has_no_weak_class(tmp_path: Path) -> None:
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


def test_privacy_states_what_was_not_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_cards(run)
    model, markdown, *_ = cards_of(run.path)
    unknown = "\n".join(model["privacy"]["unknown"])
    assert "No differential privacy" in unknown
    assert "Membership inference: no attack was run. Not measured." in unknown
    assert "The discriminator, which is trained on real images, was exchanged" in "\n".join(
        model["privacy"]["known"]
    )
    assert "None of it states that nobody can be recognised" in markdown


def evaluated(run: RunFolder, arm: str | None, **more: Any) -> RunFolder:
    """The run with an evaluation.json of `fedgan compare`: `arm`, name, round, no budget."""
    held = {
        key: value
        for key, value in evaluation().items()
        if key not in ("arm", "name", "round", "images_seen")
    }
    facts = {"arm": arm, "name": arm, "round": 1} if arm else {}
    files.write_json(run.evaluation, {**facts, **held, **more})
    return run


def member_of(path: Path, arm: str | None, **federation: Any) -> tuple[dict[str, Any], str]:
    """The model card of south as a member of an arm of a comparison; JSON and Markdown."""
    study = make_run(path / "study", evaluation={"seeds": 7, "images": 77})
    settings = {"hospitals": 2, "rounds": 4, "members": ["south"]} | federation
    run = make_run(study.arms / f"{arm}-seed0" / "members" / "south", federation=settings)
    files.write_json(run.hospitals, hospitals()[1:])
    write_cards(evaluated(run, arm))
    return cards_of(run.path)[:2]


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("centralized", "The images of all hospitals were pooled in one place"),
        ("local", "Each hospital trained alone: nothing was exchanged"),
        ("federated", "No image left a hospital for training. Exchanged: parameters"),
        ("coalition", "No image left a hospital for training. Exchanged: parameters"),
    ],
)
def test_card_of_an_arm_states_how_it_was_trained(arm: str, words: str, tmp_path: Path) -> None:
    make_run(tmp_path / "study")
    run = evaluated(make_run(tmp_path / "study" / "arms" / f"{arm}-seed0"), arm)
    write_cards(run)
    model, markdown, *_ = cards_of(run.path)
    assert words in model["privacy"]["known"][0]
    assert model["training"]["federated"] is (arm in ("federated", "coalition"))
    assert ("Exchanged:" in markdown) is (arm in ("federated", "coalition"))
    assert ("federated-learning" in markdown) is (arm in ("federated", "coalition"))
    assert "not known" not in model["training"]["arm_description"]


def test_unknown_arm_claims_nothing_about_training(tmp_path: Path) -> None:
    run = evaluated(make_run(tmp_path / "run"), None)
    write_cards(run)
    model, markdown, *_ = cards_of(run.path)
    assert model["training"]["arm"] == "not known"
    assert not [
        line for line in model["privacy"]["known"] if "xchanged" in line or "pooled" in line
    ]
    assert any(line.startswith("How the model was trained") for line in model["privacy"]["unknown"])
    assert "- Arm: not known" in markdown


def test_coalition_of_one_hospital_is_not_federated(tmp_path: Path) -> None:
    make_run(tmp_path / "study")
    federation = {"hospitals": 2, "rounds": 1, "members": ["north"]}
    run = evaluated(
        make_run(tmp_path / "study" / "arms" / "coalition-north-seed0", federation=federation),
        "coalition",
    )
    write_cards(run)
    model, markdown, dataset, _ = cards_of(run.path)
    assert "trained alone" in model["privacy"]["known"][0]
    assert "Exchanged:" not in markdown
    for card in (model["data"], dataset):
        assert [row["hospital"] for row in card["sources"]] == ["north"]
        assert [row["name"] for row in card["hospitals"]] == ["north"]


def test_card_of_a_local_member_has_its_own_data_only(tmp_path: Path) -> None:
    model, markdown = member_of(tmp_path, "local")
    assert [row["hospital"] for row in model["data"]["sources"]] == ["south"]
    assert (model["training"]["rounds_planned"], model["training"]["images_planned"]) == (
        None,
        None,
    )
    assert "planned" not in markdown
    assert "not finished" not in markdown
    assert "its share of the budget of the arm" in markdown


def test_card_of_a_finetuned_member_lists_all_hospitals(tmp_path: Path) -> None:
    model, markdown = member_of(tmp_path, "finetuned")
    assert [row["hospital"] for row in model["data"]["sources"]] == ["north", "south"]
    assert [row["name"] for row in model["data"]["hospitals"]] == ["north", "south"]
    assert "not finished" not in markdown
    assert "Rounds, bytes and time cover the fine-tuning only" in markdown
    assert model["training"]["members"] == ["north", "south"]
    assert "Each hospital then fine-tuned alone, without any exchange." in model["privacy"]["known"]


@pytest.mark.parametrize("folder", ["arms/federated-seed0", "arms/local-seed0/members/north"])
def test_evaluation_settings_are_those_of_the_comparison(folder: str, tmp_path: Path) -> None:
    study = make_run(tmp_path / "study", evaluation={"seeds": 7, "images": 77})
    run = evaluated(
        make_run(study.path / folder, evaluation={"seeds": 2, "images": 33}),
        folder.split("/")[1].split("-")[0],
    )
    write_cards(run)
    model, markdown, *_ = cards_of(run.path)
    assert model["provenance"]["settings"]["evaluation"]["seeds"] == 7
    assert model["provenance"]["settings_changed"]["evaluation.images"] == 77
    assert "from config.toml of the comparison" in markdown


@pytest.mark.parametrize(
    ("arm", "words"), [("centralized", "pooled in one place"), ("local", "nothing was exchanged")]
)
def test_arm_without_exchange_is_not_called_federated(arm: str, words: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    files.write_json(run.evaluation, evaluation() | {"arm": arm})
    write_cards(run)
    model, markdown, *_ = cards_of(run.path)
    assert words in model["privacy"]["known"][0]
    assert "Exchanged:" not in markdown
    assert "exchanged:" not in markdown


def test_each_blank_names_who_fills_it_and_has_no_value(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_cards(run)
    model, markdown, dataset, data_markdown = cards_of(run.path)
    for card, shown in ((model, markdown), (dataset, data_markdown)):
        assert card["blanks"]
        for blank in card["blanks"]:
            assert blank["value"] is None
            assert f"To be filled in by {blank['who']}" in blank["sentence"]
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


def test_phantoms_need_no_patient_blanks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    environment = json.loads(run.environment.read_text())
    for row in environment["sources"]:
        row |= {
            "source": "procedural chest phantoms, seed 0, hospital 1 of 2",
            "licence": "CC0-1.0",
        }
    files.write_json(run.environment, environment)
    write_cards(run)
    model, _, dataset, data_markdown = cards_of(run.path)
    assert {blank["field"] for blank in dataset["blanks"]} == {"contact", "maintenance"}
    assert "there are no patients" in data_markdown
    assert any("phantoms" in line for line in model["limits"])


# --- redaction -----------------------------------------------------------------------------------


def test_cards_contain_no_local_path_or_file_name(tmp_path: Path) -> None:
    description = f"Images from {SECRET}/a.png, see https://example.org/a/b and C:\\scans\\doe.dcm"
    run = make_run(tmp_path / "run", description=description)
    for path in write_cards(run):
        content = path.read_text()
        for word in ("doe", "pacs", "St Elm", "scans", str(tmp_path), tmp_path.name):
            assert word not in content, f"{word} in {path.name}"
        assert "https://example.org/a/b" in content
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
        ("doe_john.DCM is bad, as is pacs/doe.nii.gz", f"{REDACTED} is bad, as is {REDACTED}"),
        (
            "round-00001.safetensors and evaluation.json",
            "round-00001.safetensors and evaluation.json",
        ),
        ("see https://example.org/a/b.png", "see https://example.org/a/b.png"),
        ("doi 10.6084/m9.figshare.12275009", "doi 10.6084/m9.figshare.12275009"),
    ],
)
def test_redact_removes_paths_and_keeps_links(given_text: str, shown: str) -> None:
    assert redact(given_text) == shown
    assert redact({given_text: [given_text]}) == {shown: [shown]}


def test_redact_removes_roots_with_spaces() -> None:
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
def test_redact_removes_file_names_in_any_sentence(
    root: str, folder: str, file: str, kind: str, sentence: str
) -> None:
    redacted = redact(sentence.format(f"{root.format(folder)}{file}.{kind}"))
    assert "doe" not in redacted
    assert REDACTED in redacted


# --- missing or damaged files --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["evaluation.json", "environment.json", "hospitals.json", "metrics.jsonl", "checkpoints"],
)
@pytest.mark.parametrize("damage", ["absent", "damaged", "other"])
def test_missing_or_damaged_file_gives_cards_with_blanks(
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
    model, markdown, dataset, _ = cards_of(run.path)
    assert None not in (model["details"]["resolution"], dataset["resolution"])
    if name == "evaluation.json":
        assert "Nothing was measured" in "\n".join(model["limits"])
        assert "Nothing was measured, or evaluation.json could not be read." in markdown
    if name == "environment.json":
        assert {"sources and licences"} <= {blank["field"] for blank in dataset["blanks"]}
    if name == "checkpoints":
        assert model["details"]["sha256"] is None
        assert model["problems"]
    if damage == "damaged" and name not in ("metrics.jsonl", "checkpoints"):
        assert f"{name} is damaged" in plain(markdown)


def test_run_without_classes_or_distances_states_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", label_names=())
    files.write_json(
        run.hospitals, [{"name": "north", "counts": {"train": {}}, "images": {"train": 5}}]
    )
    files.write_json(
        run.evaluation,
        evaluation() | {"utility": None, "fidelity": {"frechet": None, "notes": ["no features"]}},
    )
    write_cards(run)
    _, markdown, *_ = cards_of(run.path)
    assert "The utility of the synthetic images was not measured." in markdown
    assert "Fidelity was not measured." in markdown
    assert "without labels" in markdown


def test_other_evaluation_of_a_run_has_cards_without_a_model(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    files.write_json(run.evaluated_run, {"run": f"{SECRET}/other"})
    write_cards(run)
    model, markdown, *_ = cards_of(run.path)
    assert model["details"]["sha256"] is None
    assert "another evaluation of a run" in markdown
    assert "doe" not in markdown


def test_folder_without_a_run_has_no_cards(tmp_path: Path) -> None:
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
def test_escaped_text_is_shown_literally(words: str) -> None:
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
def test_table_keeps_its_cells_for_any_content(words: list[str]) -> None:
    html = MarkdownIt().enable("table").render(table(["a", "b"], [[words[0], code(words[1])]]))
    assert html.count("<td") == 2
    assert "<code>" in html


def test_names_with_markdown_or_html_are_escaped(tmp_path: Path) -> None:
    name = "# x | <script>alert(1)</script> [a](b) *c* `d`"
    run = make_run(tmp_path / "run", name=name, description="1. <b>bold</b>\n\n# heading")
    rows = hospitals()
    rows[0]["name"] = name
    files.write_json(run.hospitals, rows)
    write_cards(run)
    for markdown in cards_of(run.path)[1::2]:
        html = MarkdownIt().enable("table").render(markdown.partition("\n---\n")[2])
        assert "<script>" not in html
        assert "<b>" not in html
        assert "<h1>heading" not in html
        assert "&lt;script&gt;" in html


def test_front_matter_is_yaml(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    run = make_run(tmp_path / "run", name='"a": [b')
    write_cards(run)
    _, markdown, _, data_markdown = cards_of(run.path)
    assert "federated-learning" in yaml.safe_load(markdown.split("---\n")[1])["tags"]
    front = yaml.safe_load(data_markdown.split("---\n")[1])
    assert (front["pretty_name"], front["size_categories"]) == ('"a": [b', ["n<1K"])


# --- comparisons ---------------------------------------------------------------------------------


def make_comparison(path: Path) -> dict[str, Any]:
    """comparison.json of a federated arm (two seeds), a centralised arm and a failed arm."""
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


def test_comparison_card_describes_the_federated_model_and_all_arms(tmp_path: Path) -> None:
    found = make_comparison(tmp_path / "study")
    files.write_json(tmp_path / "study" / "comparison.json", found)
    assert sorted(path.name for path in write_comparison_cards(tmp_path / "study")) == NAMES
    model, markdown, dataset, _ = cards_of(tmp_path / "study")
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
        assert words in plain(markdown)
    assert "local, seed 0: no disk at" in plain(markdown)
    assert "doe" not in markdown
    assert dataset["totals"]["images"]["train"] == 811


@pytest.mark.parametrize("damage", ["no federated arm", "nothing done", "damaged", "outside"])
def test_incomplete_comparison_has_cards(damage: str, tmp_path: Path) -> None:
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
    model, markdown, *_ = cards_of(tmp_path / "study")
    assert "stranger" not in markdown
    if damage == "no federated arm":
        assert model["training"]["arm"] == "centralized"
    else:
        assert model["details"]["sha256"] is None
        assert model["problems"]


def test_cards_of_an_unfinished_comparison_state_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_comparison(tmp_path / "study")
    outputs.cards(tmp_path / "study", as_json=True)
    assert sorted(Path(path).name for path in json.loads(capsys.readouterr().out)["cards"]) == NAMES
    model, markdown, *_ = cards_of(tmp_path / "study")
    assert "comparison.json is missing: the comparison is not finished." in model["problems"]
    assert model["training"]["arm"] == "not known"
    assert "Exchanged:" not in markdown


@pytest.mark.parametrize("compared", [False, True])
def test_cards_command_writes_cards_of_runs_and_comparisons(
    compared: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    if compared:
        files.write_json(folder / "comparison.json", make_comparison(folder))
    else:
        make_run(folder)
    outputs.cards(folder, as_json=True)
    output = json.loads(capsys.readouterr().out)
    assert sorted(Path(path).name for path in output["cards"]) == NAMES
    assert ("comparison" in cards_of(folder)[0]) is compared


# --- a trained run -------------------------------------------------------------------------------


def test_cards_of_a_federation_have_its_counts_and_model(tmp_path: Path) -> None:
    from client.app import app

    settings = tiny(
        write_shards(tmp_path / "private shards", (24, 16)), hospitals=2, rounds=2, kimg=0.05
    )
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    write_cards(run)
    model, markdown, dataset, data_markdown = cards_of(run.path)
    rows = json.loads(run.hospitals.read_text())
    assert [row["train_classes"] for row in dataset["hospitals"]] == [
        row["counts"]["train"] for row in rows
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
    assert LABELS[0] not in markdown
    for word in ("private shards", "alpha-0", str(tmp_path)):
        assert word not in markdown + data_markdown + json.dumps([model, dataset])
