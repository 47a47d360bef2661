"""`compare` from scenario to comparison.json: budget, continuation, failures, refused comparisons.

The scheduler is replaced by one that does each task in this process, with a federation without Ray
(`LocalGrid`). The last test uses processes and Flower.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from small_federation import (
    LocalGrid,
    NoEvaluator,
    alive_in,
    error_reply,
    processes_of,
    tiny,
    write_shards,
)

import simulations.comparison.compare
from client.app import app
from fedgan import files
from fedgan.cli import main
from fedgan.comparison_folder import ComparisonFolder
from fedgan.config import Settings, from_dict, to_dict
from fedgan.data.shard import write_shard
from fedgan.errors import ConfigError, FedganError, SplitError
from fedgan.report.comparison import write_comparison_report
from fedgan.run_folder import RunFolder
from fedgan.runs.preparation import experiment_of, is_prepared, prepare_run
from server.federation import Federation
from simulations.comparison.arm import STANDALONE, Job, read_job
from simulations.comparison.compare import compare
from simulations.comparison.evaluate import is_arm_evaluated, open_evaluation_context
from simulations.comparison.plan import plan_of
from simulations.comparison.scheduler import Task, fail_blocked, startable
from simulations.comparison.worker import evaluate, train

SIZES = (64, 40, 24)
BUDGET = 60
SHORT = ("federation.rounds=1", "evaluation.seeds=1")
Fault = Callable[[int, Any], Any]


def keys(text: str) -> set[str]:
    return set(text.split())


TOP = keys(
    """
    format name description created seeds label_names exclusive resolution channels hospitals
    margin images_seen_budget answer arms summary comparisons cross_hospital contribution
    extractor classifier suite frechet_threshold not_measured notes provenance
    """
)
ARM = keys(
    """
    arm name seed folder status failure images_seen hospital_images overrides cost curve losses
    evaluation hospital_models
    """
)
COST = keys("wall_seconds core_seconds bytes_exchanged peak_memory_bytes rounds kimg_to_frechet")
ROW = keys(
    """
    arm name seeds images_seen hospital macro_auc macro_auc_ci macro_auc_seeds balanced_accuracy
    macro_auprc frechet frechet_seeds recall coverage per_class per_institution
    """
)
PAIR = keys(
    """
    family a b metric difference ci p_value p_holm margin non_inferior better images
    """
)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- a scheduler in this process -----------------------------------------------------------------


def run_here(tasks: Sequence[Task], groups: Any, on_event: Any, fault: Fault | None = None) -> None:
    """`simulations.comparison.scheduler.run_tasks`, one task after another in this process."""
    while True:
        for task in fail_blocked(tasks):
            on_event({"event": "task_end", "task": task.name, "failure": task.failure})
        if not (ready := startable(tasks, [])):
            return
        task = ready[0]
        on_event({"event": "task_start", "task": task.name})
        try:
            work(task, lambda event, name=task.name: on_event({**event, "task": name}), fault)
            task.done = True
        except Exception as error:
            task.failure = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        on_event({"event": "task_end", "task": task.name, "failure": task.failure})


def work(task: Task, on_event: Any, fault: Fault | None) -> None:
    if task.arguments[0] == "evaluate":
        evaluate(Path(task.arguments[1]), task.arguments[2], on_event)
        return
    job = read_job(Path(task.arguments[1]))
    if job.kind == STANDALONE:
        train(job, on_event)
    else:
        federate(job, on_event, fault)


def federate(job: Job, on_event: Any, fault: Fault | None) -> None:
    if not is_prepared(job.run):
        prepare_run(job.settings, job.run)
    settings = job.run.settings()
    federation = Federation(settings, job.run, experiment_of(job.run), NoEvaluator(), on_event)
    federation.train(LocalGrid(settings.federation.participants, app, fault))


def here(patch: pytest.MonkeyPatch, fault: Fault | None = None) -> None:
    patch.setattr(
        simulations.comparison.compare, "run_tasks", functools.partial(run_here, fault=fault)
    )


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch)


# --- a small study -------------------------------------------------------------------------------


def study(
    data: Path, *overrides: str, arms: str = "centralized,federated,local", hospitals: int = 3
) -> Settings:
    evaluation = ("every=1", "images=24", "suite=quick", "seeds=2", "epochs=2", "bootstrap=50")
    overrides = (*(f"evaluation.{text}" for text in evaluation), *overrides)
    return tiny(
        data,
        f"comparison.arms={arms}",
        "comparison.seeds=1",
        *overrides,
        hospitals=hospitals,
        kimg=BUDGET / 1000,
    )


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished comparison with its result and its events."""

    folder: ComparisonFolder
    settings: Settings
    found: dict[str, Any]
    events: list[dict[str, Any]]

    def copy(self, parent: Path) -> ComparisonFolder:
        shutil.copytree(self.folder.path, parent / "study")
        return ComparisonFolder.at(parent / "study")

    def changed(self, *overrides: str) -> Settings:
        return from_dict(to_dict(self.settings), overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("compare")
    settings = study(write_shards(root / "data", SIZES))
    folder, events = ComparisonFolder.at(root / "study"), list[dict[str, Any]]()
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        here(patch)
        found = compare(settings, folder, events.append)
    torch.set_num_threads(before)
    return Finished(folder, settings, found, events)


def started(events: Sequence[dict[str, Any]]) -> list[str]:
    return [event["task"] for event in events if event["event"] == "task_start"]


def timeless(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "created"}


def arm_of(found: dict[str, Any], name: str, seed: int = 0) -> dict[str, Any]:
    row: dict[str, Any] = next(
        row for row in found["arms"] if (row["name"], row["seed"]) == (name, seed)
    )
    return row


def contents(folder: ComparisonFolder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


# --- comparison.json -----------------------------------------------------------------------------


def test_comparison_json_has_the_documented_keys(finished: Finished) -> None:
    found = finished.found
    assert json.loads(finished.folder.comparison.read_text()) == json.loads(json.dumps(found))
    assert set(found) >= TOP
    assert (found["format"], found["seeds"], found["label_names"], found["resolution"]) == (
        2,
        [0],
        ["dark", "bright"],
        16,
    )
    assert [row["name"] for row in found["hospitals"]] == ["alpha", "beta", "gamma"]
    assert [
        (row["arm"], row["name"], row["seed"], row["status"], row["failure"])
        for row in found["arms"]
    ] == [(name, name, 0, "done", None) for name in ("centralized", "federated", "local")]
    for row in found["arms"]:
        assert set(row) >= ARM
        assert set(row["cost"]) >= COST
        assert all(value is not None for value in row["cost"].values())
        assert [point["images_seen"] for point in row["losses"]] == [20, 40, 60]
        assert [point["images_seen"] for point in row["curve"]] == [20, 40, 60]
        assert row["evaluation"]["utility"]["synthetic"]["macro_auc"] is not None
        assert (finished.folder.path / row["folder"]).is_dir()
    assert arm_of(found, "federated")["cost"]["bytes_exchanged"] > 0
    assert {
        arm_of(found, name)["cost"]["bytes_exchanged"] for name in ("centralized", "local")
    } == {0}
    members = arm_of(found, "local")["hospital_models"]
    assert [row["hospital"] for row in members] == ["alpha", "beta", "gamma"]
    assert all(
        row["utility"]["synthetic"]["macro_auc"] is not None and row["fidelity"]["frechet"] > 0
        for row in members
    )
    assert sum(row["images_seen"] for row in members) == BUDGET
    assert "/" not in json.dumps(found["provenance"]["settings"])  # no path of this machine
    assert str(finished.folder.path) not in json.dumps(found)


def test_summary_pairs_and_matrix_describe_the_same_arms(finished: Finished) -> None:
    found = finished.found
    names = [
        "real",
        "centralized",
        "federated",
        "local",
        "local: alpha",
        "local: beta",
        "local: gamma",
    ]
    assert [row["name"] for row in found["summary"]] == names
    assert [row["hospital"] for row in found["summary"]] == [None] * 4 + ["alpha", "beta", "gamma"]
    assert all(
        set(row) >= ROW - {"frechet", "frechet_seeds", "recall", "coverage"}
        for row in found["summary"]
    )
    assert all(set(row) >= ROW and 0 <= row["macro_auc"] <= 1 for row in found["summary"][1:])
    pairs = {(row["a"], row["b"]) for row in found["comparisons"]}
    assert {
        ("federated", other) for other in ("centralized", "local", "local: alpha", "local: gamma")
    } <= pairs
    assert {(name, "real") for name in ("centralized", "federated", "local")} <= pairs
    by_name = {row["name"]: row for row in found["summary"]}
    for row in found["comparisons"]:
        assert set(row) >= PAIR
        assert row["difference"] == pytest.approx(
            by_name[row["a"]]["macro_auc"] - by_name[row["b"]]["macro_auc"]
        )
        assert row["margin"] == 0.02
        assert row["images"] == sum(size // 8 * 2 for size in SIZES)
    cross = found["cross_hospital"]
    assert (cross["rows"], cross["columns"]) == (names, ["alpha", "beta", "gamma"])
    assert [np.flatnonzero(row).tolist() for row in cross["is_own"]] == [
        [],
        [],
        [],
        [],
        [0],
        [1],
        [2],
    ]
    assert found["answer"].endswith(".")
    assert found["contribution"] is None
    assert any("leave-one-out" in sentence for sentence in found["not_measured"])


def test_all_arms_see_the_same_number_of_images(finished: Finished) -> None:
    assert (
        {row["images_seen"] for row in finished.found["arms"]}
        == {finished.found["images_seen_budget"]}
        == {BUDGET}
    )
    for row in finished.found["arms"]:
        assert sum(row["hospital_images"].values()) == BUDGET
        lines = [
            files.read_json_lines(path)
            for path in (finished.folder.path / row["folder"]).rglob("metrics.jsonl")
        ]
        shown = [
            hospital["images"] for run in lines for line in run for hospital in line["hospitals"]
        ]
        assert sum(shown) == BUDGET  # counted by the Trainers


def test_tasks_start_longest_first_and_evaluation_after_real_classifiers(
    finished: Finished,
) -> None:
    plans = [event for event in finished.events if event["event"] == "plan"]
    assert [plan["stage"] for plan in plans] == ["training", "evaluating", "comparing"]
    assert all(plan["done"] == [] for plan in plans)
    names = started(finished.events)
    assert names[:2] == ["centralized-seed0", "federated-seed0"]
    assert names[2:5] == [f"local-seed0/members/{name}" for name in ("alpha", "beta", "gamma")]
    assert set(names[:5]) == set(plans[0]["tasks"])
    assert names[5:7] == ["real classifier 1", "real classifier 2"]
    assert set(names[7:]) == {"centralized, seed 0", "federated, seed 0", "local, seed 0"}


# --- a second call -------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
def test_second_call_does_nothing_and_returns_the_same(finished: Finished, tmp_path: Path) -> None:
    folder, events = finished.copy(tmp_path), list[dict[str, Any]]()
    found = compare(finished.settings, folder, events.append)
    assert started(events) == []
    assert timeless(found) == timeless(finished.found)


@pytest.mark.usefixtures("in_process")
def test_new_seed_or_arm_is_the_only_one_trained(finished: Finished, tmp_path: Path) -> None:
    folder, events = finished.copy(tmp_path), list[dict[str, Any]]()
    found = compare(
        finished.changed("comparison.seeds=2", "comparison.arms=centralized"), folder, events.append
    )
    assert [name for name in started(events) if "classifier" not in name] == [
        "centralized-seed1",
        "centralized, seed 1",
    ]
    assert found["seeds"] == [0, 1]
    assert (
        arm_of(found, "centralized")["evaluation"]
        == arm_of(finished.found, "centralized")["evaluation"]
    )
    assert (
        arm_of(found, "centralized", 1)["evaluation"] != arm_of(found, "centralized")["evaluation"]
    )
    row = found["summary"][1]
    assert (row["seeds"], len(row["macro_auc_seeds"]), len(row["frechet_seeds"])) == ([0, 1], 2, 2)
    assert row["macro_auc"] == pytest.approx(np.mean(row["macro_auc_seeds"]))
    one, other = (arm_of(found, "centralized", seed) for seed in (0, 1))
    hashes = [
        json.loads((folder.path / arm["folder"] / "checkpoints/round-00003.json").read_text())
        for arm in (one, other)
    ]
    assert hashes[0]["sha256"] != hashes[1]["sha256"]
    assert [meta["settings"]["data"]["seed"] for meta in hashes] == [0, 0]

    events.clear()
    more = compare(
        finished.changed("comparison.arms=centralized,federated,local,generator-only"),
        folder,
        events.append,
    )
    assert [name for name in started(events) if "classifier" not in name] == [
        "generator-only-seed0",
        "generator-only, seed 0",
    ]
    assert arm_of(more, "generator-only")["overrides"] == {"federation.exchange": "generator"}
    assert (
        arm_of(more, "generator-only")["cost"]["bytes_exchanged"]
        < arm_of(more, "federated")["cost"]["bytes_exchanged"]
    )
    assert [row for row in more["arms"] if row["name"] != "generator-only"] == finished.found[
        "arms"
    ]


@pytest.mark.usefixtures("in_process")
def test_changed_evaluation_settings_train_nothing(finished: Finished, tmp_path: Path) -> None:
    folder, events = finished.copy(tmp_path), list[dict[str, Any]]()
    changes = ("evaluation.bootstrap=20", "name=another", "comparison.margin=0.1")
    found = compare(finished.changed(*changes), folder, events.append)
    assert [name for name in started(events) if "seed0" in name] == []
    assert len([name for name in started(events) if "seed 0" in name]) == 3
    assert (found["name"], found["margin"]) == ("another", 0.1)
    assert {row["margin"] for row in found["comparisons"]} == {0.1}
    assert found["summary"][1]["macro_auc"] == finished.found["summary"][1]["macro_auc"]
    assert folder.settings().evaluation.bootstrap == 20


@pytest.mark.parametrize(
    "change",
    [
        "training.learning_rate=0.001",
        "federation.rounds=2",
        "model.w_dim=16",
        "seed=1",
        "evaluation.every=3",
        "augment.p=0.3",
    ],
)
@pytest.mark.usefixtures("in_process")
def test_changed_training_setting_is_refused_by_its_key(
    change: str, finished: Finished, tmp_path: Path
) -> None:
    folder, events = finished.copy(tmp_path), list[dict[str, Any]]()
    before = contents(folder)
    key, _, value = change.partition("=")
    with pytest.raises(ConfigError) as caught:
        compare(finished.changed(change), folder, events.append)
    assert f"trained with {key} = " in str(caught.value)
    assert f"not {float(value) if '.' in value else value}" in str(caught.value)
    assert "give another --output" in str(caught.value)
    assert events == []
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("evaluation.features=nowhere.npz", "nowhere.npz"),
        ("evaluation.label_map=dark=black", "bright"),
        ("comparison.arms=federated,centralised", "comparison.arms has 'centralised'"),
        ("comparison.arms=real: federation.rounds=2", "needs a name of its own"),
    ],
)
@pytest.mark.usefixtures("in_process")
def test_unusable_settings_are_refused_before_anything_is_written(
    change: str, text: str, finished: Finished, tmp_path: Path
) -> None:
    folder, fresh = finished.copy(tmp_path), ComparisonFolder.at(tmp_path / "fresh")
    before = contents(folder)
    for each in (folder, fresh):
        with pytest.raises(FedganError) as caught:
            compare(finished.changed(change), each)
        assert text in str(caught.value)
    assert contents(folder) == before
    assert not [path for path in contents(fresh) if not path.name.startswith(".")]


@pytest.mark.usefixtures("in_process")
def test_changed_images_are_refused(finished: Finished, tmp_path: Path) -> None:
    folder, data = finished.copy(tmp_path), tmp_path / "data"
    write_shards(data, SIZES)
    moved = finished.changed(f"data.root={data}")
    folder.write_settings(moved)
    shutil.rmtree(data / "beta")
    write_shards(tmp_path / "others", (SIZES[0], SIZES[1] - 8, SIZES[2]))
    shutil.move(tmp_path / "others" / "beta", data / "beta")
    before = contents(folder)
    with pytest.raises(
        ConfigError,
        match="was prepared with other images than its shards hold now: give another --output",
    ):
        compare(moved, folder)
    assert contents(folder) == before


@pytest.mark.usefixtures("in_process")
def test_modified_evaluation_file_is_evaluated_again(finished: Finished, tmp_path: Path) -> None:
    folder, events = finished.copy(tmp_path), list[dict[str, Any]]()
    path = folder.arm("centralized", 0).evaluation
    kept = json.loads(path.read_text())
    files.write_json(
        path, kept | {"utility": kept["utility"] | {"synthetic": kept["utility"]["real"]}}
    )
    found = compare(finished.settings, folder, events.append)
    assert [name for name in started(events) if "seed" in name] == ["centralized, seed 0"]
    assert timeless(found) == timeless(finished.found)


@pytest.mark.usefixtures("in_process")
def test_real_sample_grid_follows_show_real(finished: Finished, tmp_path: Path) -> None:
    folder, events = finished.copy(tmp_path), list[dict[str, Any]]()
    path = folder.samples / "real.png"
    shown = []
    for show in ("phantoms", "all", "none"):
        compare(finished.changed(f"evaluation.show_real={show}"), folder, events.append)
        shown.append(path.exists())
    assert shown == [False, True, False]
    assert started(events) == []  # the setting changes no figure


@pytest.mark.usefixtures("in_process")
def test_stopped_comparison_continues_to_the_same_models(
    finished: Finished, tmp_path: Path
) -> None:
    folder = ComparisonFolder.at(tmp_path / "study")
    for stage in ("centralized-seed0", "federated-seed0", "local-seed0/members/beta"):

        def stop(event: dict[str, Any], name: str = stage) -> None:
            if event.get("task") == name and event["event"] == "round_end" and event["round"] == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compare(finished.settings, folder, stop)
        assert not folder.comparison.exists()
    events: list[dict[str, Any]] = []

    def stop_before_evaluation(event: dict[str, Any]) -> None:
        events.append(event)
        if event.get("stage") == "evaluating":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(finished.settings, folder, stop_before_evaluation)
    rounds = [
        event["round"]
        for event in events
        if event["event"] == "round_end" and event["task"] == "local-seed0/members/beta"
    ]
    assert rounds == [3]
    names = [
        path.relative_to(folder.path)
        for path in sorted(folder.path.rglob("round-00003.safetensors"))
    ]
    assert len(names) == 5
    assert all(
        (folder.path / name).read_bytes() == (finished.folder.path / name).read_bytes()
        for name in names
    )


# --- failures ------------------------------------------------------------------------------------


def test_failed_arm_is_reported_and_others_are_compared(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(number: int, message: Any) -> Any:
        ill = number == 1 and message.content.config_records["config"].get("round") == 2
        return (
            error_reply(message, "hospital says: ValueError while reading an image")
            if ill
            else None
        )

    folder = finished.copy(tmp_path)
    shutil.rmtree(folder.arm("federated", 0).path)
    here(monkeypatch, fault)
    settings = finished.changed("comparison.arms=centralized,federated,local,finetuned")
    events: list[dict[str, Any]] = []
    found = compare(settings, folder, events.append)
    assert {row["name"]: row["status"] for row in found["arms"]} == {
        "centralized": "done",
        "federated": "failed",
        "local": "done",
        "finetuned": "failed",
    }
    failed, tuned = arm_of(found, "federated"), arm_of(found, "finetuned")
    assert "in round 2" in failed["failure"]
    reason = "'federated-seed0', on which it depends, failed"
    assert tuned["failure"] == "; ".join(f"{name}: {reason}" for name in ("alpha", "beta", "gamma"))
    ended = {event["task"]: event["failure"] for event in events if event["event"] == "task_end"}
    assert [ended[f"finetuned-seed0/members/{name}"] for name in ("alpha", "beta", "gamma")] == [
        reason
    ] * 3
    assert not any("finetuned" in name for name in started(events))
    assert failed["evaluation"] is None
    assert failed["curve"] == []
    assert next(row for row in found["summary"] if row["name"] == "federated")["macro_auc"] is None
    assert not any(
        "federated" in (row["a"], row["b"]) and row["difference"] is not None
        for row in found["comparisons"]
    )
    assert "was not measured" in found["answer"]
    assert any(
        sentence.startswith("federated, seed 0 failed") for sentence in found["not_measured"]
    )
    assert arm_of(found, "centralized") == arm_of(finished.found, "centralized")

    here(monkeypatch)
    events.clear()
    # the same call tries again, from the last whole round
    fixed = compare(settings, folder, events.append)
    assert all(row["status"] == "done" for row in fixed["arms"])
    assert {row["images_seen"] for row in fixed["arms"]} == {BUDGET}
    rounds = [
        event["round"]
        for event in events
        if event["event"] == "round_end" and event["task"] == "federated-seed0"
    ]
    assert rounds == [2, 3]
    assert (
        arm_of(fixed, "federated")["evaluation"]
        == arm_of(finished.found, "federated")["evaluation"]
    )
    tuned = arm_of(fixed, "finetuned")
    assert [(point["round"], point["images_seen"]) for point in tuned["curve"]] == [
        (1, 20),
        (2, 40),
        (1, BUDGET),
    ]
    assert tuned["curve"][:2] == arm_of(fixed, "federated")["curve"][:2]  # the same models
    assert all(
        point["split"] in ("val", "train") for row in fixed["arms"] for point in row["curve"]
    )
    assert tuned["losses"][-1]["images_seen"] == BUDGET
    assert {row["hospital"]: row["images_seen"] for row in tuned["hospital_models"]} == arm_of(
        fixed, "federated"
    )["hospital_images"]
    whole = arm_of(fixed, "federated")["cost"]["bytes_exchanged"]
    # of the two federated rounds that it continues
    assert tuned["cost"]["bytes_exchanged"] == whole * 2 // 3

    before = contents(folder)
    with pytest.raises(
        ConfigError,
        match=r"alpha was planned with .* another start \(comparison\.finetune_share",
    ):
        compare(from_dict(to_dict(settings), ["comparison.finetune_share=0.6"]), folder)
    assert {path for path, data in contents(folder).items() if data != before[path]} <= {
        folder.config
    }


def test_command_exits_with_5_and_writes_the_report_when_an_arm_fails(
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    here(monkeypatch)
    folder = finished.copy(tmp_path)
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(to_dict(finished.settings)))
    member = RunFolder(folder.arm("local", 0).path / "members" / "beta")
    path = member.checkpoint(3)
    path.write_bytes(path.read_bytes()[:-1])
    (folder.arm("local", 0).path / "evaluation_key.json").unlink()
    assert main(["compare", "tiny.toml", "--output", "study", "--json"]) == 5
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["failed"] == ["local, seed 0"]
    assert result["report"] == str(folder.report)
    last = json.loads(err.splitlines()[-1])
    assert last["exit_code"] == 5
    assert "1 of 3 arms failed" in last["error"]
    damaged = "arms/local-seed0/members/beta/checkpoints/round-00003.safetensors is damaged"
    assert damaged in last["error"]
    assert str(tmp_path) not in last["error"]
    assert "Traceback" not in err
    report = folder.report.read_text(encoding="utf-8")
    assert "round-00003.safetensors is damaged" in report
    assert str(tmp_path) not in report
    assert json.loads(folder.comparison.read_text())["arms"][2]["status"] == "failed"
    assert any(folder.cards.iterdir())

    for file in (path, path.with_suffix(".json")):
        file.unlink()  # as the message says: continue from the round before
    assert main(["compare", "tiny.toml", "--output", "study"]) == 0
    out, err = capsys.readouterr()
    assert f"{'federated':<12}  macro AUC {finished.found['summary'][2]['macro_auc']:.3f}" in out
    assert finished.found["answer"] in out
    assert "local-seed0/members/beta: done" in err


# --- refused comparisons -------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
def test_arm_trained_with_other_settings_is_refused(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    run = folder.arm("centralized", 0)
    run.write_settings(from_dict(to_dict(run.settings()), ["training.learning_rate=0.01"]))
    with pytest.raises(
        ConfigError,
        match=r"centralized-seed0 was trained with training\.learning_rate = 0\.01, not 0\.00",
    ):
        compare(finished.settings, folder)


@pytest.mark.parametrize("what", ["settings", "images", "evaluator", "labels"])
def test_arms_that_differ_on_disk_are_not_compared(
    what: str, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last check, after those of the plan: it reads the folders."""
    folder = finished.copy(tmp_path)
    run = folder.arm("federated", 0)
    if what == "settings":
        run.write_settings(from_dict(to_dict(run.settings()), ["training.learning_rate=0.01"]))
        monkeypatch.setattr(
            simulations.comparison.compare, "_check_same_training", lambda job: None
        )
        text = "training.learning_rate differs: arm 'federated' (seed 0) has 0.01"
    elif what == "images":
        lines = files.read_json_lines(run.metrics)
        lines[-1]["images_seen"] += 4
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        text = (
            "images_seen differs: arm 'federated' (seed 0) has 64, "
            "arm 'centralized' (seed 0) has 60"
        )
    else:
        found = run.read_json(run.evaluation)
        if what == "evaluator":
            found["evaluator"]["test_hash"] = "0" * 64
        else:
            found["label_names"] = ["bright", "dark"]
        files.write_json(run.evaluation, found)
        monkeypatch.setattr(
            simulations.comparison.compare, "is_arm_evaluated", lambda *given: True
        )  # otherwise it would be evaluated again
        text = {
            "evaluator": "evaluator.test_hash differs: arm 'federated'",
            "labels": "label_names differs: arm 'federated'",
        }[what]
    with pytest.raises(ConfigError) as caught:
        compare(finished.settings, folder)
    assert text in str(caught.value)


@pytest.mark.usefixtures("in_process")
def test_comparison_of_another_format_is_refused(finished: Finished, tmp_path: Path) -> None:
    folder = finished.copy(tmp_path)
    files.write_json(folder.comparison, finished.found | {"format": 1})
    before = contents(folder)
    for act in (
        lambda: compare(finished.settings, folder),
        lambda: write_comparison_report(folder.path),
    ):
        with pytest.raises(
            ConfigError, match="has format 1, and this version of fedgan reads format 2"
        ):
            act()
    assert contents(folder) == before


def test_run_and_comparison_folders_are_not_interchangeable(
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(finished.folder.arm("centralized", 0).path, run)
    with pytest.raises(ConfigError, match="holds a run, not a comparison: give another --output"):
        compare(finished.settings, ComparisonFolder.at(run))
    finished.copy(tmp_path)
    for arguments in (
        ["resume"],
        ["evaluate"],
        ["evaluate", "--output", "look"],
        ["generate", "--images", "3", "--output", "images"],
    ):
        assert main([arguments[0], "study", *arguments[1:]]) == 2, arguments
        _, err = capsys.readouterr()
        assert (
            "is a comparison: continue it with fedgan compare, or give one of its arms, e.g. "
            in err
        )
        assert "arms/centralized-seed0" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "study"]


def test_arm_folder_is_a_run_for_generate(
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = finished.copy(tmp_path)
    for run in (folder.arm("federated", 0).path, folder.arm("local", 0).path / "members" / "gamma"):
        assert (
            main(["generate", str(run), "--images", "2", "--output", f"images-{run.name}"]) == 0
        ), capsys.readouterr().err
        assert len(list((tmp_path / f"images-{run.name}").glob("*.png"))) == 2


@pytest.mark.usefixtures("in_process")
def test_patient_in_training_and_evaluation_images_is_refused_first(
    finished: Finished, tmp_path: Path
) -> None:
    guests = write_shards(tmp_path / "guests", SIZES[:2])
    rows = SIZES[2]
    write_shard(
        guests / "gamma",
        np.zeros((rows, 1, 16, 16), np.uint8),
        np.eye(2, dtype=np.uint8)[np.arange(rows) % 2],
        patients=[f"gamma-{row}" for row in range(rows)],
        splits=["test" if row == 0 else "train" for row in range(rows)],
        label_names=("dark", "bright"),
        name="gamma",
    )
    events: list[dict[str, Any]] = []
    settings = finished.changed(f"evaluation.root={guests}")
    with pytest.raises(
        SplitError, match="1 patient of the training images is also in 'test'"
    ) as caught:
        compare(settings, ComparisonFolder.at(tmp_path / "study"), events.append)
    assert "gamma-0" not in str(caught.value)
    assert started(events) == []


# --- other data ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
def test_coalitions_give_contributions(tmp_path: Path) -> None:
    settings = study(
        write_shards(tmp_path / "data", (40, 24)), *SHORT, arms="federated,coalitions", hospitals=2
    )
    found = compare(settings, ComparisonFolder.at(tmp_path / "study"))
    assert [row["name"] for row in found["arms"]] == [
        "federated",
        "coalition alpha",
        "coalition beta",
    ]
    assert {row["images_seen"] for row in found["arms"]} == {BUDGET}
    values = {row["name"]: row["macro_auc"] for row in found["summary"]}
    contribution = found["contribution"]
    assert contribution["coalition_auc"]["alpha"] == pytest.approx(values["coalition alpha"])
    loss = {row["hospital"]: row["loss"] for row in contribution["leave_one_out"]}
    assert loss["alpha"] == pytest.approx(values["federated"] - values["coalition beta"])
    shapley = {row["hospital"]: row["value"] for row in contribution["shapley"]}
    assert sum(shapley.values()) == pytest.approx(values["federated"] - 0.5)
    pairs = [
        (row["a"], row["b"]) for row in found["comparisons"] if "coalition" in row["a"] + row["b"]
    ]
    assert pairs == [
        ("federated", "coalition alpha"),
        ("federated", "coalition beta"),
    ]
    assert "coalition alpha" not in found["cross_hospital"]["rows"]


@pytest.mark.usefixtures("in_process")
def test_leave_one_out_of_partitioned_hospitals_gives_losses_only(
    tmp_path: Path,
) -> None:
    data = write_shards(tmp_path / "data", (64, 56))
    settings = study(
        data, *SHORT, "data.partition=dirichlet", "data.alpha=5", arms="federated,leave-one-out"
    )
    found = compare(settings, ComparisonFolder.at(tmp_path / "study"))
    assert [row["failure"] for row in found["arms"]] == [None] * 4
    names = [row["name"] for row in found["hospitals"]]
    assert sorted(names) == [
        "hospital-1",
        "hospital-2",
        "hospital-3",
    ]  # not the shards that were partitioned
    assert found["cross_hospital"]["columns"] == names
    assert found["cross_hospital"]["rows"] == ["real", "federated"]
    row = next(row for row in found["summary"] if row["name"] == "federated")
    assert set(row["per_institution"]) == set(names)
    assert set(arm_of(found, "federated")["hospital_images"]) == set(names)

    contribution, auc = found["contribution"], row["macro_auc"]
    without = {
        row["name"]: row["macro_auc"] for row in found["summary"] if row["arm"] == "coalition"
    }
    for out in contribution["leave_one_out"]:
        others = [name for name in names if name != out["hospital"]]
        assert out["loss"] == pytest.approx(auc - without[f"coalition {'+'.join(others)}"])
        assert out["ci"][0] <= out["loss"] <= out["ci"][1]
    assert [out["hospital"] for out in contribution["leave_one_out"]] == names
    assert contribution["shapley"] is None
    assert any("Shapley" in note for note in contribution["notes"])
    assert not any("leave-one-out" in sentence for sentence in found["not_measured"])


def test_failure_reasons_name_the_hospital_and_no_path_of_this_machine(finished: Finished) -> None:
    folder = finished.folder
    local = next(arm for arm in plan_of(finished.settings, folder) if arm.name == "local")
    alpha, beta, _ = (job.folder for job in local.jobs)
    torn = f"CheckpointError: {alpha}/checkpoints/round-00001.safetensors is damaged"
    data = finished.settings.data.root
    outside = f"DataError: no shard at {data}/alpha or {Path.home()}/my scans/a.dcm"
    text = simulations.comparison.compare.failure_reason(
        local, {alpha: torn, beta: outside, local.folder: "no disk"}, folder, finished.settings
    )
    one, other, last = text.split("; ")
    assert one == (
        "alpha: CheckpointError: arms/local-seed0/members/alpha/checkpoints/"
        "round-00001.safetensors is damaged"
    )
    assert other.startswith("beta: DataError: no shard at (path not shown)")
    assert last == "no disk"
    root = finished.settings.data.root
    for path in (str(folder.path), root, str(Path.home()), "scans", ".dcm"):
        assert path not in text


def write_one(root: Path, labels: np.ndarray, names: tuple[str, ...], splits: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    images = (
        rng.integers(0, 128, (len(labels), 1, 16, 16))
        + 100 * np.arange(len(labels))[:, None, None, None] % 2
    )
    write_shard(
        root / "alpha",
        images.astype(np.uint8),
        labels,
        patients=[f"p{row}" for row in range(len(labels))],
        splits=splits,
        label_names=names,
        name="alpha",
    )
    return root


@pytest.mark.usefixtures("in_process")
def test_images_without_classes_are_compared_as_far_as_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    splits = np.array(["train", "train", "test", "val"])[np.arange(40) % 4]
    data = write_one(tmp_path / "data", np.zeros((40, 0), np.uint8), (), splits)
    (tmp_path / "tiny.toml").write_text(
        tomli_w.dumps(to_dict(study(data, *SHORT, arms="centralized,local", hospitals=1)))
    )
    assert main(["compare", "tiny.toml", "--output", "study"]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "study" / "comparison.json").read_text())
    assert [row["status"] for row in found["arms"]] == ["done", "done"]
    assert (
        found["summary"],
        found["comparisons"],
        found["cross_hospital"],
        found["extractor"],
    ) == (
        [],
        [],
        None,
        None,
    )
    assert found["answer"].startswith(
        "Cost and gain of federation are unknown: the images have no classes"
    )
    assert any("no classes to distinguish" in note for note in found["notes"])
    assert found["answer"] in (tmp_path / "study" / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("in_process")
def test_class_without_test_images_is_noted_in_comparison_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kinds = np.arange(60) % 3
    splits = np.where(
        kinds == 2, "train", np.array(["train", "train", "test", "val"])[np.arange(60) // 3 % 4]
    )
    data = write_one(
        tmp_path / "data", np.eye(3, dtype=np.uint8)[kinds], ("dark", "bright", "rare"), splits
    )
    (tmp_path / "tiny.toml").write_text(
        tomli_w.dumps(to_dict(study(data, *SHORT, arms="centralized,local", hospitals=1)))
    )
    assert main(["compare", "tiny.toml", "--output", "study"]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "study" / "comparison.json").read_text())
    row = next(row for row in found["summary"] if row["name"] == "centralized")
    assert row["per_class"]["rare"]["auc"] is None
    assert row["macro_auc"] is not None
    assert any(
        "'rare' has no positive image in the real test split" in note for note in found["notes"]
    )
    report = (tmp_path / "study" / "report.html").read_text(encoding="utf-8")
    assert "has no positive image in the real test split" in report


# --- with processes -----------------------------------------------------------------------------


@pytest.mark.slow
def test_comparison_with_flower_and_processes_equals_the_one_without(
    finished: Finished, tmp_path: Path
) -> None:
    settings = finished.changed("comparison.arms=centralized,federated", "evaluation.seeds=1")
    with pytest.MonkeyPatch.context() as patch:
        here(patch)
        reference = finished.copy(tmp_path / "reference")
        expected = compare(settings, reference)
    folder, events = ComparisonFolder.at(tmp_path / "study"), list[dict[str, Any]]()
    found = compare(settings, folder, events.append)
    assert [row["failure"] for row in found["arms"]] == [None] * 2
    names = [
        path.relative_to(folder.path)
        for path in sorted(folder.path.rglob("round-00003.safetensors"))
    ]
    assert len(names) == 2
    assert all(
        (folder.path / name).read_bytes() == (reference.path / name).read_bytes() for name in names
    )
    for key in ("summary", "comparisons", "cross_hospital", "answer"):
        assert found[key] == expected[key], key
    assert {row["images_seen"] for row in found["arms"]} == {BUDGET}
    assert all(
        is_arm_evaluated(folder.settings(), arm, folder)
        for arm in plan_of(folder.settings(), folder)
    )
    assert not alive_in(processes_of(folder.arm("federated", 0).path))
    assert not list(folder.path.rglob("*.part"))
    assert open_evaluation_context(folder).settings == folder.settings()
    events.clear()
    assert timeless(compare(settings, folder, events.append)) == timeless(found)
    assert started(events) == []
