"""Cut, edited or damaged files of a run: refused with one clear error, or restored and named."""

from __future__ import annotations

import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_federation import NoEvaluator, federate, tiny, write_shards

from client.app import app
from fedgan import files
from fedgan.cli.runs import headline, headline_text
from fedgan.config import Settings
from fedgan.errors import CheckpointError, ConfigError, FedganError
from fedgan.report.run.report import write_report
from fedgan.run_folder import RunFolder, read_lines
from fedgan.runs.preparation import experiment_of, prepare_run
from fedgan.runs.round_state import load_state
from fedgan.training.checkpoint import load_generator, load_tensors, save_tensors
from server.federation import Federation
from simulations import runner
from simulations.comparison.arm import STANDALONE, Job, standalone_settings
from simulations.comparison.standalone import train_standalone

ROUNDS = 4
# what a damaged disk, a killed editor or a stranger may leave in a text file
GARBAGE = {
    "empty": b"",
    "not UTF-8": b'{"round": "\xff\xfe"}',
    "torn": b'{"experiment": "abc", "set',
    "number": b"7",
    "list": b"[1, null]",
    "null": b"null",
    "deep": b"[" * 100_000,
    "deep but whole": b'{"a": ' * 500 + b"1" + b"}" * 500,
    "huge number": b'{"experiment": ' + b"9" * 5000 + b"}",
    "zeros": bytes(100),
}
garbage = pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A private run of four evaluated rounds, so that all checkpoints are kept."""
    folder = tmp_path_factory.mktemp("trained")
    settings = tiny(
        write_shards(folder / "data", (24, 16)),
        *("privacy.epsilon=50", "privacy.delta=0.01", "augment.mode=none", "evaluation.every=1"),
        *("model.minibatch_std_group=0", "training.r1_gamma=0", "training.labels=uniform"),
        "training.path_length_weight=0",
        hospitals=2,
        rounds=ROUNDS,
        kimg=0.008 * ROUNDS,
    )
    run = RunFolder.at(folder / "run")
    federate(settings, run, app)
    return run


@pytest.fixture
def run(trained: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of `trained`."""
    return RunFolder.at(shutil.copytree(trained.path, tmp_path / "run"))


def edit(run: RunFolder, *pairs: tuple[str, str]) -> None:
    """Replace texts of config.toml that occur once."""
    text = run.config.read_text()
    for old, new in pairs:
        assert text.count(old) == 1
        text = text.replace(old, new)
    run.config.write_text(text)


def content(run: RunFolder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


# --- config.toml ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "words"),
    [("privacy", "lacks privacy.epsilon and"), ("federation", "lacks privacy.epsilon and")],
)
def test_cut_config_refuses_to_resume(run: RunFolder, section: str, words: str) -> None:
    text = run.config.read_text()
    run.config.write_text(text[: text.index(f"[{section}]")])
    before = content(run)
    with pytest.raises(ConfigError, match=words) as caught:
        runner.resume(run)
    assert f'"settings" of {run.checkpoint(ROUNDS).with_suffix(".json")}' in str(caught.value)
    with pytest.raises(ConfigError, match=words):
        experiment_of(run)
    assert content(run) == before


def test_config_without_one_key_refuses_to_resume(run: RunFolder) -> None:
    edit(run, ("secure = false\n", ""))
    with pytest.raises(ConfigError, match=r"config.toml lacks federation.secure: it was cut"):
        runner.resume(run)


def test_edited_config_refuses_to_resume_and_names_the_keys(run: RunFolder) -> None:
    edit(run, ("\nepsilon = 50.0", "\nepsilon = 0.0"), ('show_real = "phan', 'show_real = "all'))
    text = run.config.read_text().replace('"alltoms"', '"all"')
    run.config.write_text(text)
    words = (
        r"was changed after the run had begun: privacy.epsilon = 0.0, not 50.0; "
        r"evaluation.show_real = 'all', not 'phantoms'; restore it from \"settings\" of checkpoints"
    )
    with pytest.raises(ConfigError, match=words):
        runner.resume(run)
    with pytest.raises(ConfigError, match=words):
        experiment_of(run)


def test_run_resumes_with_keys_that_may_change(run: RunFolder) -> None:
    for path in (run.checkpoint(ROUNDS), run.checkpoint(ROUNDS).with_suffix(".json")):
        path.unlink()
    edit(run, ("round_timeout = 180.0", "round_timeout = 90.0"), ('wire = "fp32', 'wire = "fp16'))
    federate(run.settings(), run, app)
    assert run.last_round() == ROUNDS


def test_checkpoint_of_other_settings_is_refused(run: RunFolder) -> None:
    edit(run, ("\nepsilon = 50.0", "\nepsilon = 0.0"))
    whole = RunFolder.at(run.path.parent / "other")
    prepare_run(run.settings(), whole)
    found = run.read_json(run.environment)
    found["settings_hash"] = whole.read_json(whole.environment)["settings_hash"]
    files.write_json(run.environment, found)
    with pytest.raises(CheckpointError, match=r"other settings .*: privacy.epsilon = 0.0, not 50"):
        load_state(run, experiment_of(run))


def test_edited_config_of_a_comparison_arm_is_refused(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (24, 16)), hospitals=2, rounds=2, kimg=0.016)
    alone = standalone_settings(settings, ("alpha",))
    job = Job(tmp_path / "arms" / "local", STANDALONE, alone, images=(8, 8))
    train_standalone(job, lambda event: None)
    for path in (job.run.checkpoint(2), job.run.checkpoint(2).with_suffix(".json")):
        path.unlink()
    edit(job.run, ('show_real = "phantoms"', 'show_real = "all"'))
    with pytest.raises(ConfigError, match=r"evaluation.show_real = 'all', not 'phantoms'"):
        train_standalone(job, lambda event: None)


@garbage
def test_damaged_config_is_one_error_with_its_path(run: RunFolder, data: bytes) -> None:
    run.config.write_bytes(data)
    with pytest.raises(ConfigError, match=r"config.toml (is damaged|has format none)"):
        runner.resume(run)


# --- environment.json and other JSON --------------------------------------------------------------


def test_run_without_environment_is_not_begun_again(run: RunFolder) -> None:
    run.environment.unlink()
    before = content(run)
    with pytest.raises(CheckpointError, match=r"environment.json is missing, although rounds"):
        runner.resume(run)
    assert content(run) == before


@garbage
@pytest.mark.parametrize("name", ["environment", "hospitals", "evaluation"])
def test_damaged_json_of_a_run_is_one_error(run: RunFolder, name: str, data: bytes) -> None:
    path = getattr(run, name)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name}.json is damaged"):
        run.hospital_rows() if name == "hospitals" else run.read_json(path)


def test_headline_leaves_out_values_of_wrong_types(run: RunFolder) -> None:
    real = {"macro_auc": 0.5, "macro_auc_ci": ["low", "high"]}
    files.write_json(
        run.evaluation,
        {"images_seen": 9, "wall_seconds": "x", "utility": {"real": real}, "fidelity": 7},
    )
    text = headline_text(headline(run))
    assert text.startswith("macro AUC   0.500, classifier trained on real images")


@pytest.mark.parametrize(
    "row", [{}, {"name": "a", "images": {"train": "x"}}, {"name": 1, "images": {"train": 1}}]
)
def test_row_of_hospitals_without_its_values_is_an_error(
    run: RunFolder, row: dict[str, Any]
) -> None:
    files.write_json(run.hospitals, [row])
    with pytest.raises(CheckpointError, match=r"hospitals.json is damaged \(a row has no name"):
        run.hospital_rows()


# --- metrics.jsonl --------------------------------------------------------------------------------


@garbage
def test_damaged_metrics_line_is_restored_and_named(run: RunFolder, data: bytes) -> None:
    data = data.replace(b"\n", b"")
    whole = read_lines(run)
    lines = run.metrics.read_bytes().split(b"\n")
    lines[1] = data
    run.metrics.write_bytes(b"\n".join(lines))
    assert [line["round"] for line in read_lines(run)] == [1, 3, 4]
    notes, evaluator = list[str](), NoEvaluator()

    def on_event(event: dict[str, Any]) -> None:
        notes.extend([event["text"]] if event["event"] == "note" else [])

    for _ in range(2):  # named once
        Federation(run.settings(), run, experiment_of(run), evaluator, on_event).evaluate_final()
    assert notes == [
        "metrics.jsonl: line 2 is damaged and left out; round 2 is restored from the checkpoint"
    ]
    assert evaluator.evaluated_rounds == [2]
    assert files.read_json_lines(run.metrics) == whole


def test_lost_metrics_line_without_a_checkpoint_is_named(run: RunFolder) -> None:
    run.checkpoint(2).with_suffix(".json").unlink()
    run.metrics.write_bytes(run.metrics.read_bytes().replace(b'"round": 2', b'"ro\xffnd": 2', 1))
    notes: list[str] = []
    Federation(
        run.settings(),
        run,
        experiment_of(run),
        NoEvaluator(),
        lambda event: notes.extend([event["text"]] if event["event"] == "note" else []),
    ).evaluate_final()
    assert notes == [
        "metrics.jsonl: line 2 is damaged and left out; round 2 is lost: no checkpoint holds its "
        "line"
    ]
    assert [line["round"] for line in read_lines(run)] == [1, 3, 4]


def test_report_names_a_damaged_metrics_line(run: RunFolder) -> None:
    run.metrics.write_bytes(run.metrics.read_bytes().replace(b'"round": 2', b'"ro\xffnd": 2', 1))
    write_report(run)
    text = run.report.read_text(encoding="utf-8")
    assert "metrics.jsonl is damaged: line 2 is left out." in text
    assert "The run had 3 of 4 rounds" in text


# --- checkpoints ----------------------------------------------------------------------------------

Damage = Callable[[Path], None]


def meta_with(**changed: Any) -> Damage:
    """Change values of a checkpoint's JSON; the hash of the tensors stays right."""

    def damage(path: Path) -> None:
        side = path.with_suffix(".json")
        side.write_text(json.dumps(json.loads(side.read_text()) | changed))

    return damage


def tensors_with(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Write other tensors with a right hash."""

    def damage(path: Path) -> None:
        tensors, meta = load_tensors(path)
        change(tensors)
        del meta["format"], meta["sha256"]
        save_tensors(path, tensors, meta)

    return damage


def raw(data: bytes, hashed: bool = False) -> Damage:
    """Write other bytes, with or without their right hash."""

    def damage(path: Path) -> None:
        if hashed:
            save_tensors(path, {}, {})
            import hashlib

            meta_with(sha256=hashlib.sha256(data).hexdigest())(path)
        path.write_bytes(data)

    return damage


def header(text: str, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text.encode()


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _first(tensors: dict[str, torch.Tensor]) -> str:
    return next(key for key in tensors if key.startswith("ema/"))


DAMAGES: dict[str, Damage] = {
    "empty": raw(b""),
    "random": raw(random.Random(0).randbytes(1000)),
    "folder": to_folder,
    "empty, hashed": raw(b"", True),
    "random, hashed": raw(random.Random(1).randbytes(1000), True),
    "header of 2^60 bytes": raw(header("{}", 2**60), True),
    "offsets of 2^60": raw(
        header('{"ema/a":{"dtype":"F32","shape":[4],"data_offsets":[0,1152921504606846976]}}'), True
    ),
    "shape of 2^60": raw(
        header('{"ema/a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}')
        + bytes(4),
        True,
    ),
    "unknown type": raw(
        header('{"ema/a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}') + bytes(1), True
    ),
    "no tensors": tensors_with(dict.clear),
    "tensor missing": tensors_with(lambda tensors: tensors.pop(_first(tensors))),
    "tensor more": tensors_with(lambda tensors: tensors.update({"ema/x": torch.zeros(1)})),
    "other shape": tensors_with(lambda tensors: tensors.update({_first(tensors): torch.zeros(3)})),
    "other type": tensors_with(
        lambda tensors: tensors.update({_first(tensors): tensors[_first(tensors)].to(torch.int8)})
    ),
    **{f"JSON {name}": (lambda path, data=data: path.with_suffix(".json").write_bytes(data))
       for name, data in GARBAGE.items()},
    "settings of a wrong type": meta_with(settings=7),
    "settings of a huge network": meta_with(
        settings={"model": {"channel_base": 2**18, "channel_max": 4096, "z_dim": 4096}}
    ),
    "settings of 2^63": meta_with(settings={"model": {"z_dim": 2**63}}),
    "labels no list": meta_with(label_names=7),
    "labels of a wrong type": meta_with(label_names=[1, {}]),
    "a million labels": meta_with(label_names=["a"] * 1_000_000),
    "channels of 2^40": meta_with(channels=2**40),
    "channels no number": meta_with(channels="1"),
    "resolution of 2^20": meta_with(resolution=2**20),
    "resolution no number": meta_with(resolution=[16]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_checkpoint_is_a_checkpoint_error(run: RunFolder, damage: Damage) -> None:
    path = run.checkpoint(ROUNDS)
    damage(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as caught:
        load_generator(path)
    assert len(str(caught.value)) < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    if path.is_file():  # else the folder takes the place of the file
        state = load_state(run, experiment_of(run)) if _is_damage_of_a_state(damage) else None
        assert state is None or state.round == ROUNDS - 1


def _is_damage_of_a_state(damage: Damage) -> bool:
    """Whether a resume falls back to the round before: not where single tensors are exchanged,
    which no damage does, nor for other settings, which are an error of their own."""
    kept = ("tensor", "no tensors", "other shape", "settings of a huge", "a million")
    name = next(name for name, other in DAMAGES.items() if other is damage)
    return not name.startswith(kept)


@pytest.mark.parametrize(
    "changed",
    [
        {"images_seen": "many"},
        {"since": {"x": 1}},
        {"since": 3},
        {"participants": [{"number": 0}]},
        {"participants": 7},
        {"exhausted": [7]},
        {"line": {"round": "one"}},
        {"round": 1},
        {"wall_seconds": None},
    ],
    ids=str,
)
def test_state_of_wrong_types_falls_back_a_round(run: RunFolder, changed: dict[str, Any]) -> None:
    meta_with(**changed)(run.checkpoint(ROUNDS))
    notes: list[str] = []
    state = load_state(run, experiment_of(run), lambda event: notes.append(event["text"]))
    assert state is not None
    assert state.round == ROUNDS - 1
    assert len(notes) == 1


def test_any_bytes_of_a_checkpoint_give_an_own_error(run: RunFolder) -> None:
    path, rng = run.checkpoint(ROUNDS), np.random.default_rng(0)
    side = path.with_suffix(".json")
    files_ = {path: path.read_bytes(), side: side.read_bytes()}
    for number in range(300):
        target = (path, side)[number % 2]
        data = bytearray(files_[target])
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        target.write_bytes(bytes(data[: rng.integers(len(data))] if number % 3 == 0 else data))
        try:
            load_generator(path)
        except FedganError as error:
            assert isinstance(error, CheckpointError)  # noqa: PT017 - a changed digit may be valid
        target.write_bytes(files_[target])


def test_settings_hash_is_of_what_is_read_back(tmp_path: Path) -> None:
    run = RunFolder.at(tmp_path / "run")
    settings: Settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2, rounds=1)
    prepare_run(settings, run)
    assert len(experiment_of(run)) == 16
