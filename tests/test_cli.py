"""The command line: help, errors, exit codes; simulate, evaluate, generate and doctor."""

from __future__ import annotations

import csv
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image
from small_federation import alive_in, processes_of
from watchdog import watchdog

from fedgan import __version__, files
from fedgan.cli import app, console, doctor, generate, help, labels, probe, progress, runs
from fedgan.config import DataSettings, ModelSettings, Settings, to_dict
from fedgan.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FederationError,
    FedganError,
    MachineError,
    StorageError,
)
from fedgan.redact import printable
from fedgan.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
LABELS = ("nevus", "melanoma", "keratosis")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "scenario.toml"
    path.write_text('name = "small study"\n[training]\nkimg = 1\n')
    return path


def make_run(
    path: Path, exclusive: bool = True, label_names: tuple[str, ...] = LABELS
) -> RunFolder:
    """A run folder after one round: an untrained generator of 16 pixels, and its hospitals."""
    from fedgan.models.stylegan2.generator import Generator
    from fedgan.training.checkpoint import save_tensors

    model = ModelSettings(z_dim=8, w_dim=8, channel_base=64, channel_max=8)
    settings = Settings(name="small", model=model, data=DataSettings(resolution=16))
    run = RunFolder.at(path)
    run.write_settings(settings)
    counts = dict(zip(label_names, (6, 3, 1), strict=False))
    files.write_json(run.hospitals, [{"name": "north", "counts": {"train": counts}}])
    generator = Generator(model, 16, 3, len(label_names))
    meta = {
        "round": 1,
        "images_seen": 1000,
        "wall_seconds": 2.0,
        "bytes_exchanged": 10,
        "settings": to_dict(settings),
    }
    meta |= {
        "label_names": list(label_names),
        "exclusive": exclusive,
        "channels": 3,
        "resolution": 16,
    }
    save_tensors(
        run.checkpoint(1),
        {f"ema/{name}": value for name, value in generator.state_dict().items()},
        meta,
    )
    return run


# --- help -----------------------------------------------------------------------------------------


def verbs(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """All verbs of the command line, each as its sequence of arguments."""
    if not isinstance(command, click.Group):
        return [path]
    return [
        verb
        for name, subcommand in command.commands.items()
        for verb in verbs(subcommand, (*path, name))
    ]


VERBS = verbs(help.build(app))


@pytest.mark.parametrize("arguments", VERBS, ids="-".join)
def test_help_of_each_verb_has_arguments_and_an_example(
    arguments: tuple[str, ...], fedgan: Run
) -> None:
    code, out, _ = fedgan(*arguments, "--help")
    assert code == 0
    assert f"Example: fedgan {' '.join(arguments)}" in " ".join(out.split())
    assert "\\[" not in out
    commands = out.partition("Commands:")[2].partition("Example:")[0]
    assert "..." not in commands, "a summary is longer than its line"
    described = out.partition("Arguments:")[2].partition("Options:")[0].splitlines()
    assert all(
        len(line.split()) > 2 for line in described if line.startswith("  ") and line[2] != " "
    ), out


def test_all_verbs_exist() -> None:
    expected = {
        "demo",
        "simulate",
        "compare",
        "resume",
        "generate",
        "evaluate",
        "report",
        "cards",
        "doctor",
        "data",
        "keys",
    }
    assert expected <= {arguments[0] for arguments in VERBS}
    assert ("data", "import", "npz") in VERBS


def test_no_arguments_print_help_with_exit_codes(fedgan: Run) -> None:
    code, out, err = fedgan()
    assert (code, err) == (0, "")
    for kind in (
        ConfigError,
        DataError,
        CheckpointError,
        FederationError,
        StorageError,
        MachineError,
    ):
        assert f" {kind.exit_code} " in " ".join(out.partition("Exit codes:")[2].split())


def test_version_is_printed(fedgan: Run) -> None:
    assert fedgan("--version") == (0, f"fedgan {__version__}\n", "")


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["simulte"], 2, "No such command 'simulte'. Did you mean 'simulate'? (see fedgan --help)"),
        (["simulate"], 2, "see fedgan simulate --help"),
        (["simulate", "scenario.toml", "--ouput", "x"], 2, "--output"),
        (["generate", "run", "--output", "x", "--images", "many"], 2, "--images"),
        (["generate", "run", "--output", "x", "--images", "0"], 2, "--images"),
        (["simulate", "missing.toml"], 2, "no scenario at missing.toml"),
        (
            ["simulate", "scenario.toml", "--set", "training.kimgs=3"],
            2,
            "did you mean 'training.kimg'?",
        ),
        (["simulate", "scenario.toml", "--set", "data.resolution=48"], 2, "no power of two"),
        (
            ["simulate", "scenario.toml", "--set", "federation.strategy=fedmean"],
            2,
            "must be one of",
        ),
        (["simulate", "scenario.toml", "--set", "data.root=nowhere"], 3, "nowhere"),
        (["simulate", "scenario.toml", "--output", "full"], 2, "is not empty"),
        (["simulate", "scenario.toml", "--output", "scenario.toml"], 6, "is a file"),
        (["simulate", "scenario.toml", "--output", "scenario.toml/run"], 6, "is a file"),
        (["demo", "--set", "federation.round=3"], 2, "did you mean 'federation.rounds'?"),
        (["resume", "full"], 2, "is no run folder"),
        (["report", "nowhere"], 2, "is no run folder"),
        (["evaluate", "nowhere"], 2, "is no run folder"),
        (["generate", "nowhere", "--images", "3", "--output", "x"], 2, "is no run folder"),
        (
            ["generate", "none.safetensors", "--images", "3", "--output", "x"],
            4,
            "no checkpoint at none.safetensors",
        ),
        (["generate", "young", "--images", "3", "--output", "x"], 4, "no finished round"),
        (["evaluate", "young"], 4, "no finished round"),
        (["data", "show", "nowhere"], 3, "nowhere"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_error_with_its_exit_code(
    arguments: list[str], code: int, text: str, fedgan: Run, scenario: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    RunFolder.at(tmp_path / "young").write_settings(Settings())
    before = set(tmp_path.rglob("*"))

    found, out, err = fedgan(*arguments)
    assert (found, out) == (code, "")
    message = " ".join(err.replace("small study: 1 kimg in 10 rounds → ", "").split())
    assert text in message
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("fedgan: ")]) == 1
    left = {path for path in tmp_path.rglob("*") if path.name != "runs"}
    assert left == before  # nothing half-written

    found, out, err = fedgan(*arguments, "--json")
    assert (found, out) == (code, "")
    printed = json.loads(err.splitlines()[-1])
    assert printed["exit_code"] == code
    assert set(printed) == {"error", "kind", "exit_code"}


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (FedganError("something"), 1, "something"),
        (ConfigError("a key"), 2, "a key"),
        (DataError("a shard"), 3, "a shard"),
        (CheckpointError("a file"), 4, "a file"),
        (FederationError("hospital 2 died"), 5, "hospital 2 died"),
        (StorageError("a disk"), 6, "a disk"),
        (MachineError("a port"), 7, "a port"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/full/place"),
            6,
            "cannot write /full/place: the disk is full",
        ),
        (
            ModuleNotFoundError("No module named 'flwr'", name="flwr"),
            7,
            "the package 'flwr' is missing",
        ),
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "continue with: fedgan resume runs/small-study"),
        (
            ZeroDivisionError("division by zero\nand more"),
            1,
            "unexpected ZeroDivisionError: division by zero (run again with --debug",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_failure_of_a_run_has_its_exit_code(
    error: BaseException,
    code: int,
    text: str,
    fedgan: Run,
    scenario: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def simulate(settings: Settings, run: RunFolder, on_event: Any) -> None:
        run.write_settings(settings)
        raise error

    monkeypatch.setattr(runs, "runner", lambda: types.SimpleNamespace(simulate=simulate))
    found, out, err = fedgan("simulate", scenario)
    assert (found, out) == (code, "")
    assert text in err
    assert "Traceback" not in err


def test_debug_prints_the_traceback_at_any_position(fedgan: Run) -> None:
    for arguments in (["--debug", "simulate", "none.toml"], ["simulate", "none.toml", "--debug"]):
        code, _, err = fedgan(*arguments)
        assert code == 2
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("fedgan: no scenario at none.toml")


def test_stop_before_the_start_is_reported(
    fedgan: Run, scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def simulate(settings: Settings, run: RunFolder, on_event: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(runs, "runner", lambda: types.SimpleNamespace(simulate=simulate))
    code, _, err = fedgan("simulate", scenario)
    assert code == 130
    assert "stopped before the run began" in err


def test_sigterm_ends_a_verb_like_ctrl_c(
    fedgan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")

    def write(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(generate, "_write_pngs", write)
    before = signal.getsignal(signal.SIGTERM)
    code, out, err = fedgan("generate", run.path, "--images", "3", "--output", "images")
    assert (code, out, err) == (130, "", "fedgan: stopped\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert signal.getsignal(signal.SIGTERM) is before


# --- evaluate -------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Replace the evaluator by one that writes fixed results; return the settings it received."""
    from fedgan.runs import evaluator, preparation

    seen: list[Settings] = []

    class FakeEvaluator:
        def __init__(
            self, settings: Settings, place: RunFolder, hospitals: Any, progress: Any
        ) -> None:
            seen.append(settings)
            self.place = place

        def evaluate_final(self, generator: Any, facts: dict[str, Any]) -> None:
            files.write_json(self.place.evaluation, EVALUATION | facts)

    monkeypatch.setattr(evaluator, "Evaluator", FakeEvaluator)
    monkeypatch.setattr(preparation, "evaluation_hospitals", lambda settings, run: [])
    return seen


def test_evaluate_with_output_writes_a_separate_folder(
    fedgan: Run, tmp_path: Path, evaluated: list[Settings]
) -> None:
    run = make_run(tmp_path / "run")
    files.write_json(run.environment, {"experiment": "first"})
    files.write_text(run.metrics, '{"round": 1, "images_seen": 1000}\n')
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    arguments = [
        "evaluate",
        "run",
        "--output",
        "look",
        "--json",
        "--set",
        "evaluation.root=shards",
        "--set",
    ]
    code, out, err = fedgan(*arguments, "evaluation.features=weights.npz")
    assert code == 0, err
    look = RunFolder.at(tmp_path / "look")
    assert json.loads(out)["report"] == str(look.report)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    assert look.settings() == evaluated[0]
    assert evaluated[0].evaluation.root == str(tmp_path / "shards")
    assert evaluated[0].evaluation.features == str(tmp_path / "weights.npz")
    assert look.read_json(look.evaluated_run) == {"run": str(run.path)}
    assert look.read_json(look.evaluation)["round"] == 1
    assert "fedgan resume" not in look.report.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["look", "run"]

    for again in (["resume"], ["evaluate"], ["generate", "--images", "3", "--output", "images"]):
        code, _, err = fedgan(again[0], "look", *again[1:])
        assert (code, f"repeated evaluation of {run.path}" in err) == (2, True), err
    assert fedgan("report", "look")[0] == 0


@pytest.mark.parametrize("place", ["arms/centralized-seed0", "arms/local-seed0/members/north"])
def test_evaluate_of_an_arm_needs_output(
    place: str, fedgan: Run, tmp_path: Path, evaluated: list[Settings]
) -> None:
    make_run(tmp_path / "study")
    run = make_run(tmp_path / "study" / place)
    kind = place.split("/")[1].split("-")[0]
    files.write_json(run.evaluation, {"arm": kind, "name": kind, "round": 1})
    before = run.evaluation.read_bytes()
    code, _, err = fedgan("evaluate", run.path)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "only fedgan compare may replace its evaluation: give --output DIR" in err
    assert evaluated == []
    assert fedgan("evaluate", run.path, "--output", "look")[0] == 0
    assert run.evaluation.read_bytes() == before
    assert json.loads((tmp_path / "look" / "evaluation.json").read_text())["arm"] == kind


@pytest.mark.parametrize("held", [None, "{", '{"arm": "centralized"}'])
def test_evaluate_keeps_the_arm_of_a_run(
    held: str | None, fedgan: Run, tmp_path: Path, evaluated: list[Settings]
) -> None:
    run = make_run(tmp_path / "run")
    if held:
        run.evaluation.write_text(held)
    code, _, err = fedgan("evaluate", run.path)
    assert code == 0, err
    assert run.read_json(run.evaluation)["arm"] == (
        "centralized" if held and "arm" in held else "federated"
    )


@pytest.mark.parametrize("error", [DataError("no such shard"), KeyboardInterrupt()])
def test_failed_evaluate_with_output_leaves_nothing(
    error: BaseException,
    fedgan: Run,
    tmp_path: Path,
    evaluated: list[Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fedgan.runs import preparation

    def fail(settings: Settings, run: RunFolder) -> None:
        raise error

    monkeypatch.setattr(preparation, "evaluation_hospitals", fail)
    make_run(tmp_path / "run")
    before = set(tmp_path.rglob("*"))
    assert fedgan("evaluate", "run", "--output", "look")[0] == (
        3 if isinstance(error, DataError) else 130
    )
    assert set(tmp_path.rglob("*")) == before


def test_installed_wheel_reports_that_simulate_needs_the_repository(
    fedgan: Run, scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "simulations"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "simulations", None)
    for arguments in (["demo"], ["simulate", scenario], ["doctor", "none.toml"]):
        code, _, err = fedgan(*arguments)
        assert code == (7 if arguments[0] != "doctor" else 2)
        assert arguments[0] == "doctor" or "pip install -e ." in err


# --- simulate, demo, resume -----------------------------------------------------------------------

EVALUATION = {
    "images_seen": 2000,
    "wall_seconds": 90.0,
    "bytes_exchanged": 3 * 2**20,
    "utility": {
        "real": {"macro_auc": 0.9, "macro_auc_ci": [0.85, 0.95]},
        "synthetic": {"macro_auc": 0.8, "macro_auc_ci": None},
    },
    "fidelity": {"frechet": 1.25, "frechet_reference": 0.5, "extractor": "reference classifier"},
}
EVENTS: list[dict[str, Any]] = [
    {"event": "preparing", "what": "phantoms"},
    {
        "event": "start",
        "hospitals": ["north", "south"],
        "rounds": 2,
        "first_round": 1,
        "images": 2000,
        "images_seen": 0,
    },
    {"event": "round_start", "round": 1, "rounds": 2, "images": {"north": 600, "south": 400}},
    {"event": "progress", "round": 1, "hospital": "north", "images": 300, "of": 600},
    {
        "event": "round_end",
        "round": 1,
        "rounds": 2,
        "line": {"round": 1, "images_seen": 1000, "mean": {"loss_g": 0.5, "r_t": 0.25}},
    },
    {"event": "something new"},
    {"event": "round_start", "round": 2, "rounds": 2, "images": {"north": 600, "south": 400}},
    {
        "event": "round_end",
        "round": 2,
        "rounds": 2,
        "line": {
            "round": 2,
            "images_seen": 2000,
            "mean": {"p": 0.125},
            "fidelity": {"frechet": 12.5},
        },
    },
    {"event": "evaluation", "round": 2, "final": True},
    {"event": "finished"},
]


@pytest.fixture
def short_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the runner by one that emits `EVENTS` and writes `EVALUATION`."""

    def simulate(
        settings: Settings, run: RunFolder, on_event: Callable[[dict[str, Any]], None]
    ) -> None:
        run.write_settings(settings)
        for event in EVENTS:
            on_event(event)
        print("chatter of a library")
        files.write_json(run.evaluation, EVALUATION)

    monkeypatch.setattr(runs, "runner", lambda: types.SimpleNamespace(simulate=simulate))


@pytest.mark.usefixtures("short_run")
def test_simulate_prints_rounds_on_stderr_and_the_result_on_stdout(
    fedgan: Run, scenario: Path, tmp_path: Path
) -> None:
    code, out, err = fedgan("simulate", scenario)
    assert code == 0
    assert "round 1/2  1.0 kimg  loss_g 0.500  loss_d –  r_t 0.250  p –" in err
    assert "round 2/2  2.0 kimg  loss_g –  loss_d –  r_t –  p 0.125  Fréchet 12.5" in err
    assert "2.0 kimg in 1.5 min, 3 MiB exchanged" in out
    assert "0.900 (95 % interval 0.850 to 0.950)" in out
    assert "0.800, classifier trained on synthetic images only" in out
    assert "1.25, 0.5 between halves" in out
    assert "runs/small-study/report.html" in out
    assert (tmp_path / "runs" / "small-study" / "report.html").is_file()


@pytest.mark.usefixtures("short_run")
def test_simulate_with_json_prints_one_object(fedgan: Run, scenario: Path) -> None:
    code, out, _ = fedgan("simulate", scenario, "--json", "--set", "seed=5")
    numbers = json.loads(out)
    assert code == 0
    assert (numbers["synthetic_macro_auc"], numbers["frechet"], numbers["images_seen"]) == (
        0.8,
        1.25,
        2000,
    )
    assert RunFolder(Path(numbers["run"])).settings().seed == 5


@pytest.mark.usefixtures("short_run")
def test_second_run_does_not_overwrite_the_first(fedgan: Run, scenario: Path) -> None:
    assert fedgan("simulate", scenario)[0] == 0
    code, _, err = fedgan("simulate", scenario)
    assert code == 2
    assert "already holds a run: continue it with fedgan resume runs/small-study" in err


@pytest.mark.usefixtures("short_run")
def test_demo_prints_the_report_path_and_uses_a_free_folder(fedgan: Run, tmp_path: Path) -> None:
    for folder in ("demo", "demo-2"):
        code, out, err = fedgan("demo")
        report = tmp_path / "runs" / folder / "report.html"
        assert code == 0
        assert report.is_file()
        assert report.as_uri() in out
    assert "runs/demo exists: this run is written to runs/demo-2" in err


def test_headline_of_a_run_without_evaluation(tmp_path: Path) -> None:
    numbers = runs.headline(make_run(tmp_path / "run"))
    assert numbers["real_macro_auc"] is None
    assert runs.headline_text(numbers).startswith("report ")


@pytest.mark.parametrize("name", ["a/b", "../up", "..", "  ", "Größe 3"])
def test_folder_name_is_one_safe_path_component(name: str) -> None:
    folder = runs.folder_name(name)
    assert folder
    assert Path(folder).name == folder
    assert not folder.startswith(".")


def test_progress_screen_follows_a_run() -> None:
    state = progress.RunState()
    screen = progress.Screen(state)
    seen = []
    for event in EVENTS:
        state.follow(event)
        screen.refresh()
        screen.render()
        seen.append((state.images_now, state.hospital_shares()))
    assert seen[3] == (300, {"north": 0.5, "south": 0.0})
    assert seen[4] == (1000, {"north": 1.0, "south": 1.0})
    assert seen[6] == (1000, {"north": 0.0, "south": 0.0})
    assert seen[-1][0] == 2000
    assert state.stage == "finished"
    assert progress.rounds_table(state.lines).row_count == 2


# --- generate -------------------------------------------------------------------------------------


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "labels.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_generate_writes_each_class_equally_often(fedgan: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    code, out, _ = fedgan("generate", run.path, "--images", "7", "--output", "out", "--seed", "3")
    assert code == 0
    assert "7 synthetic images in out (nevus 3, melanoma 2, keratosis 2)" in out
    rows = table(tmp_path / "out")
    assert [sum(int(row[name]) for row in rows) for name in LABELS] == [3, 2, 2]
    assert [(row["seed"], row["index"]) for row in rows] == [
        ("3", str(index)) for index in range(7)
    ]
    for row in rows:
        with Image.open(tmp_path / "out" / row["file"]) as picture:
            assert (picture.size, picture.mode) == ((16, 16), "RGB")
            assert picture.text["synthetic"] == "true"  # type: ignore[attr-defined]


def test_generate_is_independent_of_the_batch_size(fedgan: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name, seed, batch in (("a", 3, 2), ("b", 3, 64), ("c", 4, 64)):
        assert (
            fedgan(
                "generate",
                run.checkpoint(1),
                "--images",
                "5",
                "--output",
                name,
                "--seed",
                seed,
                "--batch",
                batch,
            )[0]
            == 0
        )
    pixels = {
        name: [
            np.asarray(Image.open(file)).astype(int)
            for file in sorted((tmp_path / name).glob("*.png"))
        ]
        for name in "abc"
    }
    assert np.abs(np.subtract(pixels["a"], pixels["b"])).max() <= 1
    assert np.abs(np.subtract(pixels["a"], pixels["c"])).max() > 1


def test_generate_writes_a_valid_shard(fedgan: Run, tmp_path: Path) -> None:
    from fedgan.data.shard import Shard

    run = make_run(tmp_path / "run")
    arguments = ["--labels-from", "mix", "--format", "shard", "--json"]
    code, out, _ = fedgan("generate", run.path, "--images", "20", "--output", "out", *arguments)
    assert code == 0
    shard = Shard.open(tmp_path / "out", verify=True)
    assert shard.labels.sum(axis=0).tolist() == [12, 6, 2]
    assert json.loads(out)["counts"] == {"nevus": 12, "melanoma": 6, "keratosis": 2}
    code, *_ = fedgan(
        "generate", run.path, "--images", "10", "--output", "again", "--labels-from", "out"
    )
    assert code == 0
    assert len(table(tmp_path / "again")) == 10


def test_generate_takes_label_vectors_and_names(fedgan: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", exclusive=False)
    vectors = ["--vector", "1,0,1", "--vector", "0,0,0"]
    assert fedgan("generate", run.path, "--images", "3", "--output", "out", *vectors)[0] == 0
    assert [[int(row[name]) for name in LABELS] for row in table(tmp_path / "out")] == [
        [1, 0, 1],
        [1, 0, 1],
        [0, 0, 0],
    ]
    names = ["--label", "melanoma", "--label", "nevus"]
    assert fedgan("generate", run.path, "--images", "2", "--output", "named", *names)[0] == 0
    assert [[int(row[name]) for name in LABELS] for row in table(tmp_path / "named")] == [
        [0, 1, 0],
        [1, 0, 0],
    ]


def test_generate_with_an_unconditional_model_has_no_labels(fedgan: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", label_names=())
    assert fedgan("generate", run.path, "--images", "2", "--output", "out")[0] == 0
    assert list(table(tmp_path / "out")[0]) == ["file", "seed", "index"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--label", "melanom"], 3, "no label 'melanom'; did you mean 'melanoma'?"),
        (["--label", "xyz"], 3, "its labels: nevus, melanoma, keratosis"),
        (["--vector", "1,0"], 2, "give 3 numbers 0 or 1"),
        (["--vector", "1,2,0"], 2, "give 3 numbers 0 or 1"),
        (["--vector", "1,1,0"], 2, "exclude each other"),
        (["--label", "nevus", "--vector", "1,0,0"], 2, "give one of them"),
        (["--labels-from", "nowhere"], 3, "no shard at nowhere"),
        (["--psi", "2"], 2, "--psi"),
    ],
)
def test_generate_refuses_labels_that_the_model_lacks(
    arguments: list[str], code: int, text: str, fedgan: Run, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    found, _, err = fedgan("generate", run.path, "--images", "2", "--output", "out", *arguments)
    assert found == code
    assert text in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_generate_on_a_full_disk_leaves_nothing(
    fedgan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    save, written = Image.Image.save, []

    def fills_up(picture: Image.Image, path: Path, **options: Any) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        save(picture, path, **options)

    monkeypatch.setattr(Image.Image, "save", fills_up)
    code, _, err = fedgan("generate", run.path, "--images", "5", "--output", "out")
    assert code == 6
    assert "the disk is full" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("damage", ["truncated", "no json", "other model"])
def test_generate_refuses_an_unusable_checkpoint(damage: str, fedgan: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    checkpoint = run.checkpoint(1)
    if damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    elif damage == "no json":
        checkpoint.with_suffix(".json").unlink()
    else:
        meta = json.loads(checkpoint.with_suffix(".json").read_text())
        meta["settings"]["model"]["z_dim"] = 9
        checkpoint.with_suffix(".json").write_text(json.dumps(meta))
    code, _, err = fedgan("generate", checkpoint, "--images", "5", "--output", "out")
    assert code == 4
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_report_rewrites_only_the_report(fedgan: Run, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    code, out, _ = fedgan("report", run.path)
    assert code == 0
    assert "run/report.html" in out
    assert run.report.is_file()
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_report_refuses_an_unfinished_comparison(fedgan: Run, tmp_path: Path) -> None:
    study = make_run(tmp_path / "study")
    make_run(study.arms / "federated-seed0")
    code, _, err = fedgan("report", study.path)
    assert code == 2
    assert "let `fedgan compare` finish first" in err
    assert not study.report.exists()


def test_spread_evenly_gives_the_remainder_to_the_first() -> None:
    vectors = np.eye(3, dtype=np.uint8)
    assert labels.spread_evenly(vectors, 2).sum(axis=0).tolist() == [1, 1, 0]
    assert labels.spread_evenly(vectors, 10).sum(axis=0).tolist() == [4, 3, 3]


# --- doctor ---------------------------------------------------------------------------------------


@pytest.fixture
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the probe, which takes five seconds."""
    measured = probe.Measured(
        images_per_second=100.0,
        classifier_images_per_second=1000.0,
        memory=2**29,
        device="cpu",
        update_bytes=12_000_000,
    )
    monkeypatch.setattr(probe, "measure", lambda *arguments, **options: measured)


def give_machine(
    monkeypatch: pytest.MonkeyPatch, memory: float | None = 8, disk: float = 100
) -> None:
    """Set the free memory and disk in GiB."""
    monkeypatch.setattr(
        doctor, "_free_memory", lambda: None if memory is None else int(memory * doctor.GIB)
    )
    monkeypatch.setattr(
        shutil, "disk_usage", lambda place: types.SimpleNamespace(free=int(disk * doctor.GIB))
    )


@pytest.mark.usefixtures("quick_probe")
def test_doctor_lists_checks_and_forecasts_the_scenario(
    fedgan: Run, scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_machine(monkeypatch)
    code, out, _ = fedgan("doctor", scenario)
    assert code == 0
    assert "FAILED" not in out
    for word in (
        "Python",
        "torch",
        "flwr",
        "CPU",
        "memory",
        "GPU",
        "disk",
        "loopback",
        "small study takes about",
    ):
        assert word in out
    printed = json.loads(fedgan("doctor", scenario, "--json")[1])
    assert printed["ready"] is True
    assert printed["forecast"]["seconds"]["training"] > 0


@pytest.mark.usefixtures("quick_probe")
def test_doctor_fails_for_missing_and_broken_packages(
    fedgan: Run, scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    def load(name: str) -> None:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setitem(doctor.PACKAGES, "no-such-distribution", "nosuch")
    monkeypatch.setattr(importlib, "import_module", load)
    code, out, _ = fedgan("doctor", scenario)
    assert code == 7
    text = " ".join(out.split())
    assert "FAILED no-such-distribution missing → pip install -e ." in text
    assert "cannot be imported: operator torchvision::nms does not exist" in text
    assert "pip install --force-reinstall torch torchvision" in text


@pytest.mark.usefixtures("quick_probe")
def test_doctor_fails_for_unusable_data_of_the_scenario(
    fedgan: Run, scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_machine(monkeypatch)
    code, out, _ = fedgan("doctor", scenario, "--set", "data.root=nowhere")
    assert code == 7
    assert "FAILED   training" in out
    assert "nowhere" in out


def test_doctor_fails_for_too_little_memory_or_disk(
    fedgan: Run, scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_machine(monkeypatch, memory=1.9, disk=0.9)
    code, out, _ = fedgan("doctor", scenario)
    assert code == 7
    text = " ".join(out.split())
    assert "FAILED memory 1.9 GiB free → close other programs: 2 GiB are needed" in text
    assert "FAILED disk 0.9 GiB free → free some space: a run needs about 1 GiB" in text
    assert "takes about" not in text  # it trains only where training can work


def test_doctor_accepts_the_limits_of_memory_and_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_machine(monkeypatch, memory=2, disk=1)
    assert (doctor.memory_check().status, doctor.disk_check(tmp_path).status) == ("ok", "ok")
    give_machine(monkeypatch, memory=None)
    assert (doctor.memory_check().status, doctor.memory_check().found) == (
        "ok",
        "unknown on this system",
    )
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    assert doctor.disk_check(tmp_path).found == "this folder cannot be written"
    assert doctor.disk_check(tmp_path).status == "failed"


def test_doctor_warns_about_a_port_in_use() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        original, doctor.FLOWER_PORT = doctor.FLOWER_PORT, port
        try:
            checks = doctor.port_checks()
        finally:
            doctor.FLOWER_PORT = original
    assert [(check.name, check.status) for check in checks][-1] == (f"port {port}", "warning")


def test_doctor_fails_for_a_missing_gpu_that_the_scenario_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = Settings()
    assert doctor.gpu_check(settings).status == "ok"
    assert (
        doctor.gpu_check(
            replace(settings, training=replace(settings.training, device="cuda"))
        ).status
        == "failed"
    )


def test_busiest_share_is_the_longest_worker_of_a_round() -> None:
    assert probe.busiest_share([0.5, 0.3, 0.2], 1) == pytest.approx(1.0)
    assert probe.busiest_share([0.5, 0.3, 0.2], 2) == pytest.approx(0.5)
    assert probe.busiest_share([0.5, 0.3, 0.2], 3) == pytest.approx(0.5)
    assert probe.busiest_share([0.25] * 4, 3) == pytest.approx(0.5)


@pytest.mark.usefixtures("quick_probe")
def test_doctor_derives_the_proxys_bytes_per_minute(
    fedgan: Run, scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_machine(monkeypatch)
    _, out, _ = fedgan("doctor", scenario)
    assert "an update has 12.0 MB" in out
    assert f"FEDGAN_PROXY_MAX_MINUTE={4 * (3 + 1) * 6 * 2**20}\n" in out
    proxy = (ROOT / "deploy" / "haproxy.cfg").read_text()
    assert f"FEDGAN_PROXY_MAX_BODY {doctor.MAX_BODY} " in proxy


def test_forecast_is_images_over_rate() -> None:
    settings = Settings()
    measured = probe.Measured(
        images_per_second=100.0,
        classifier_images_per_second=1000.0,
        memory=0,
        device="cpu",
        update_bytes=0,
    )
    seconds = probe.predict(settings, measured, sizes=(500, 300, 200), parallel=2)
    assert seconds["training"] == pytest.approx(20_000 * 0.5 / 100)
    assert seconds["evaluation"] == pytest.approx(2 * 2 * 12 * 1000 / 1000)
    assert seconds["total"] == pytest.approx(
        seconds["training"] + seconds["evaluation"] + probe.START_SECONDS
    )


@pytest.mark.slow
def test_probe_measures_a_real_training() -> None:
    model = ModelSettings(z_dim=8, w_dim=8, channel_base=64, channel_max=8)
    settings = Settings(model=model, data=DataSettings(resolution=16))
    measured = probe.measure(settings, channels=1, labels=2, exclusive=True, parallel=2, threads=1)
    assert measured.images_per_second > 1
    assert measured.classifier_images_per_second > 1
    assert measured.memory > 2**26
    assert 10_000 < measured.update_bytes < 1_000_000


def test_failed_probe_is_a_machine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false") or "/bin/false")
    with pytest.raises(MachineError, match="the training probe failed"):
        probe.measure(Settings(), 3, 7, True, parallel=1, threads=1)


# --- the real thing -------------------------------------------------------------------------------

TINY = """
name = "tiny"
data = {resolution = 16, phantom_images = 240}
model = {channel_base = 256, channel_max = 16, z_dim = 16, w_dim = 16}
training = {kimg = 1.2, batch_size = 8}
federation = {rounds = 4}
evaluation = {suite = "quick", every = 0, images = 64, epochs = 1, bootstrap = 20}
"""


@pytest.mark.slow
def test_ctrl_c_in_a_round_exits_130_and_the_run_can_be_resumed(
    fedgan: Run, tmp_path: Path
) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fedgan.cli", "simulate", "tiny.toml", "--output", "run"]
    # a background job of a script ignores SIGINT, and its children would, too
    restore_sigint = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    stopped = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environ,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=restore_sigint,
    )
    assert stopped.stderr is not None
    with watchdog(stopped):
        for line in stopped.stderr:
            if line.startswith("round 1/4"):
                break
        run = RunFolder.at(tmp_path / "run")
        sessions = processes_of(run.path)
        assert sessions
        stopped.send_signal(signal.SIGINT)
        rest = stopped.stderr.read()
        assert stopped.wait() == 130, rest
    assert alive_in(sessions) == []
    assert "continue with: fedgan resume run" in rest
    assert run.last_round() in (1, 2, 3)
    assert not run.evaluation.exists()

    for verb in ("resume", "evaluate"):
        code, out, err = fedgan(verb, "run", "--json")
        assert code == 0, err
        assert json.loads(out)["images_seen"] >= 1200
        assert run.report.is_file()
        assert run.evaluation.is_file()
    assert not list(run.path.rglob("*.part"))

    # A separate evaluation with merged labels has its own report and leaves the run unchanged.
    before = run.evaluation.read_bytes()
    label_map = "evaluation.label_map=nv=nevus,*=other"
    code, _, err = fedgan("evaluate", "run", "--output", "look", "--set", label_map, "--json")
    assert code == 0, err
    second = RunFolder.at(tmp_path / "look")
    assert second.read_json(second.evaluation)["label_names"] == ["nevus", "other"]
    assert second.report.is_file()
    assert run.evaluation.read_bytes() == before
    for extra in (
        ["--set", "evaluation.epochs=2"],
        ["--set", "training.kimg=2", "--output", "third"],
    ):
        code, _, err = fedgan("evaluate", "run", *extra)
        assert code == 2, err


def test_only_results_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with console.stdout_for_results():
        print("chatter")
    console.emit({"a": 1}, True, "text")
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ({"a": 1}, "chatter\n")


def test_terminal_gets_no_control_bidi_or_zero_width_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "né\x1b[31m\x9b\u202e\u200b\u2028\U000e0041"
    shown = r"né\x1b[31m\x9b\u202e\u200b\u2028\U000e0041"
    assert printable(text) == shown
    assert printable("x" * 600_000) == "x" * 299 + "…"
    console.emit({}, False, f"{text}\nb")
    console.note(text)
    console.note("\n".join(console.table_lines([("a\nb", text)])))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{shown}\nb\n", f"{shown}\na\\x0ab  {shown}\n")
