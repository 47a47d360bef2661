"""Disclosures of a private run beside its model: labels, hashes, counts, and epsilon caps."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from small_federation import LocalGrid, NoEvaluator, ledger_in, write_shards
from test_dp_step import images_of, settings_of
from test_private_federation import private

from client import hospital as hospital_module
from client.app import app
from client.hospital import TrainRequest
from client.policy import apply_policy
from fedgan import files
from fedgan.cli import label_sampling
from fedgan.config import Settings, to_dict
from fedgan.data.federation import describe_hospitals
from fedgan.data.shard import Shard
from fedgan.errors import ConfigError, FederationError
from fedgan.privacy import ledger as ledger_module
from fedgan.privacy import step as step_module
from fedgan.privacy.accounting import Mechanism, epsilon_rdp
from fedgan.privacy.ledger import Ledger
from fedgan.privacy.step import PrivateStep
from fedgan.report.cards.collect import hospital_rows, source_rows, totals
from fedgan.report.cards.figures import data_limits
from fedgan.report.comparison import classes
from fedgan.report.comparison import hospitals as comparison_hospitals
from fedgan.report.comparison.data import Comparison
from fedgan.report.run import hospitals as hospitals_section
from fedgan.report.run import provenance
from fedgan.report.run.data import load
from fedgan.run_folder import RunFolder
from fedgan.runs.preparation import data_key, experiment_of, open_prepared, prepare_run
from server.federation import Federation

# --- delta ----------------------------------------------------------------------------------------


def test_delta_above_one_over_n_is_refused(tmp_path):
    def begin(delta: float) -> PrivateStep:
        settings = settings_of(f"privacy.delta={delta}", "privacy.unit=patient")
        return PrivateStep(
            settings,
            images_of(20, patients=10),
            5,
            50,
            Ledger(tmp_path / "l"),
            "run",
            torch.device("cpu"),
        )

    with pytest.raises(ConfigError, match=r"privacy\.delta = 0\.11 is more than 1/n") as found:
        begin(0.11)
    assert "\n" not in str(found.value)
    assert begin(0.1).delta == 0.1


@pytest.mark.parametrize(("units", "delta"), [(10, 1e-5), (10_000, 1e-5), (2_000_000, 5e-8)])
def test_default_delta_is_a_tenth_of_one_over_n_at_most(units, delta):
    for unit in ("image", "patient"):
        privacy = settings_of("privacy.delta=0", f"privacy.unit={unit}").privacy
        assert step_module.delta_of(privacy, units) == pytest.approx(delta)


# --- epsilon cap of a hospital --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("servers", "own", "counts"), [(0.0, "3", 3.0), (8.0, 3, 3.0), (2.0, 3.0, 2.0)]
)
def test_smaller_epsilon_cap_of_hospital_and_server_applies(servers, own, counts):
    request = TrainRequest(settings_of(f"privacy.max_epsilon={servers}"), "e", "run")
    assert apply_policy(request, {"max-epsilon": own}).settings.privacy.max_epsilon == counts
    assert apply_policy(request, {}) == request


def test_misspelled_epsilon_cap_is_refused():
    with pytest.raises(ConfigError, match="has max_epsilon: it is written max-epsilon"):
        apply_policy(TrainRequest(settings_of(), "e", "run"), {"max_epsilon": 3})


@pytest.mark.parametrize("own", ["0", -1, "nan", "inf", "much"])
def test_epsilon_cap_must_be_a_positive_number(own):
    with pytest.raises(ConfigError, match="give a number above 0"):
        apply_policy(TrainRequest(settings_of(), "e", "run"), {"max-epsilon": own})


def steps_by_rdp(
    epsilon: float, delta: float, spent: list[Mechanism], step: Mechanism, most: int
) -> int:
    def costs(steps: int) -> float:
        return (
            epsilon_rdp([*spent, dataclasses.replace(step, steps=steps)], delta)
            if spent or steps
            else 0.0
        )

    return max((steps for steps in range(most + 1) if costs(steps) <= epsilon), default=0)


@pytest.fixture
def capped_nodes(monkeypatch):
    """Simulated hospitals with max-epsilon = 0.3 in their node-config."""
    for module in (ledger_module, step_module):  # the exact accountant has tests of its own
        monkeypatch.setattr(module, "epsilon_of", epsilon_rdp, raising=False)
    monkeypatch.setattr(ledger_module, "steps_within", steps_by_rdp)
    push = LocalGrid._deliver

    def answer(self, message, key):
        def bind(message, context):
            context.node_config["max-epsilon"] = 0.3
            return app(message, context)

        self.app = bind
        push(self, message, key)

    monkeypatch.setattr(LocalGrid, "_deliver", answer)
    hospital_module._open_all.cache_clear()


def train(settings: Settings, run: RunFolder) -> Federation:
    prepare_run(settings, run)
    federation = Federation(run.settings(), run, experiment_of(run), NoEvaluator())
    federation.train(LocalGrid(settings.federation.hospitals, app))  # type: ignore[arg-type]
    return federation


def test_hospital_with_an_epsilon_cap_refuses_a_run_without_privacy(tmp_path, capped_nodes):
    run = RunFolder(tmp_path / "run")
    settings = private(
        write_shards(tmp_path / "data", (48,)), "privacy.noise_multiplier=-1", hospitals=1
    )
    with pytest.raises(FederationError, match="ConfigError while applying its max-epsilon"):
        train(settings, run)
    (log,) = run.path.glob("hospitals/*/client.log")
    assert "max-epsilon = 0.3, and the run has no privacy" in log.read_text()


def test_hospital_stops_at_its_own_epsilon_cap(tmp_path, capped_nodes):
    run, data = RunFolder(tmp_path / "run"), write_shards(tmp_path / "data", (48,))
    train(private(data, "privacy.noise_multiplier=3", rounds=1, hospitals=1), run)
    assert [
        row["name"]
        for row in run.read_json(run.checkpoint(run.last_round()).with_suffix(".json"))["exhausted"]
    ] == ["alpha"]
    assert 0 < ledger_in(data / "alpha").epsilon(1e-3) <= 0.3


# --- labels of generated images -------------------------------------------------------------------


def reported_metrics(exclusive: bool, *overrides: str) -> dict:
    return {
        "label_names": ["a", "b"],
        "exclusive": exclusive,
        "settings": to_dict(settings_of(*overrides)),
    }


def test_labels_of_a_private_run_are_independent_of_real_labels(tmp_path):
    found = label_sampling.requested_labels(
        reported_metrics(exclusive=False), tmp_path, 9, label_sampling.LabelChoice(), seed=0
    )
    assert {
        tuple(row): int(n)
        for row, n in zip(*np.unique(found, axis=0, return_counts=True), strict=True)
    } == {
        (0, 0): 3,
        (0, 1): 3,
        (1, 0): 3,
    }
    assert (
        label_sampling.LabelChoice().description(False, private=True)
        == "every label alone, and none, equally often"
    )


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("source", ["mix", "shards/alpha"])
def test_real_label_mix_of_a_private_run_is_refused(tmp_path, exclusive, source):
    with pytest.raises(
        ConfigError, match=r"does not cover real labels.*--mix, --label or --vector"
    ):
        label_sampling.requested_labels(
            reported_metrics(exclusive),
            tmp_path,
            9,
            label_sampling.LabelChoice(labels_from=source),
            seed=0,
        )


# --- phantoms in a checkpoint ---------------------------------------------------------------------


def phantoms(root: Path) -> Path:
    """The shard of `write_shards` with the card of a drawn one."""
    shard = write_shards(root, (48,)) / "alpha"
    card = json.loads((shard / "card.json").read_text())
    files.write_json(
        shard / "card.json",
        card | {"source": "procedural lesions phantoms, seed 0, hospital 1 of 1"},
    )
    return root


@pytest.mark.parametrize(
    ("write", "drawn"), [(phantoms, True), (lambda root: write_shards(root, (48,)), False)]
)
def test_checkpoint_states_whether_all_hospitals_hold_phantoms(tmp_path, write, drawn):
    settings = private(
        write(tmp_path / "data"), "privacy.noise_multiplier=-1", rounds=1, hospitals=1
    )
    run = RunFolder(tmp_path / "run")
    train(settings, run)
    assert [run.read_json(run.checkpoint(n).with_suffix(".json"))["phantoms"] for n in (0, 1)] == [
        drawn,
        drawn,
    ]


# --- hashes and counts ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(run folder, shards) of a private run that was prepared and not begun."""
    place = tmp_path_factory.mktemp("prepared")
    run, data = RunFolder(place / "run"), write_shards(place / "data", (48, 32))
    prepare_run(private(data, hospitals=2), run)
    return run, data


def test_private_run_publishes_no_hash_and_no_label_counts(prepared):
    run, data = prepared
    for row in run.read_json(run.hospitals):
        assert row["content_hash"] is None
        assert row["counts"] == {
            split: {"dark": None, "bright": None} for split in ("train", "val", "test")
        }
        assert row["images"]["train"] in (24, 16)
    hashes = [Shard.open(data / name).card.content_hash for name in ("alpha", "beta")]
    for path in [path for path in run.path.rglob("*") if path.is_file()]:
        assert not any(found.encode() in path.read_bytes() for found in hashes), path.name
    assert stat.S_IMODE(run.data_key.stat().st_mode) == 0o600


def test_keyed_hash_detects_changed_images_with_the_run_key_only(prepared):
    run, _ = prepared
    rows, key = run.read_json(run.hospitals), data_key(run)
    assert describe_hospitals(open_prepared(run.settings(), run), key) == rows
    assert describe_hospitals(open_prepared(run.settings(), run), "0" * 64) != rows
    hospitals = open_prepared(run.settings(), run)
    other = dataclasses.replace(hospitals[0].train, content_hash="0" * 64)
    changed = [dataclasses.replace(hospitals[0], train=other), hospitals[1]]
    assert describe_hospitals(changed, key) != rows


def test_counts_and_hashes_are_kept_without_privacy_and_for_phantoms(tmp_path):
    open_run, drawn_run = RunFolder(tmp_path / "open"), RunFolder(tmp_path / "drawn")
    prepare_run(
        private(write_shards(tmp_path / "a", (48,)), "privacy.noise_multiplier=-1", hospitals=1),
        open_run,
    )
    prepare_run(private(phantoms(tmp_path / "b"), hospitals=1), drawn_run)
    for run in (open_run, drawn_run):
        (row,), sources = run.read_json(run.hospitals), run.read_json(run.environment)["sources"]
        assert row["content_hash"] == sources[0]["content_hash"] is not None
        assert row["counts"]["train"] == {"dark": 12, "bright": 12}


def test_report_and_cards_state_what_is_withheld(prepared):
    run, _ = prepared
    data = load(run)
    html = provenance.SECTION.render(data)
    assert html.count("withheld: privacy") == 4  # a hash of each hospital and of each source
    assert "class counts of the hospitals: withheld: privacy" in hospitals_section.SECTION.render(
        data
    )
    rows = hospital_rows(data)
    assert {row["content_hash"] for row in [*rows, *source_rows(data)]} == {"withheld: privacy"}
    assert totals(rows)["train_classes"] == {"dark": None, "bright": None}
    assert data_limits(rows) == []


def test_comparison_names_no_missing_class_if_counts_are_withheld(prepared):
    run, _ = prepared
    content = {"label_names": ["dark", "bright"], "hospitals": run.read_json(run.hospitals)}
    found = Comparison(content)
    html = comparison_hospitals.SECTION.render(found) + classes.SECTION.render(found)
    assert "no training image of" not in html
    assert "Counts of each class: withheld: privacy" in html
    assert "Training images of this class: withheld: privacy" in html
