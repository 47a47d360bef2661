"""Output of `fedgan compare`: progress, headline, errors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import simulations.comparison.compare
from fedgan.cli import compare as verb
from fedgan.cli import compare_progress, main
from fedgan.cli.compare_progress import CompareProgress, ComparisonState
from fedgan.comparison_folder import ComparisonFolder
from fedgan.config import Settings
from fedgan.errors import ConfigError

PLAN = {
    "event": "plan",
    "stage": "training",
    "tasks": {
        "centralized-seed0": 60.0,
        "federated-seed0": 30.0,
        "local-seed0/members/alpha": 10.0,
    },
    "done": ["local-seed0/members/alpha"],
}
START = {"event": "start", "task": "centralized-seed0", "images": 100, "images_seen": 0}


def ended(task: str, number: int, rounds: int) -> dict[str, Any]:
    return {"event": "round_end", "task": task, "round": number, "rounds": rounds, "line": {}}


def followed(*events: dict[str, Any]) -> ComparisonState:
    state = ComparisonState()
    for event in events:
        state.follow(event)
    return state


# --- state --------------------------------------------------------------------------------------


def test_share_is_weighted_by_tasks() -> None:
    begun = {"event": "task_start", "task": "centralized-seed0"}
    state = followed(PLAN)
    assert (state.stage, state.running, state.share) == (
        "training",
        [],
        pytest.approx(0.1),  # one was already done
    )
    state.follow(begun)
    state.follow(START)
    assert (state.running, state.share) == (["centralized-seed0"], pytest.approx(0.1))
    state.follow(ended("centralized-seed0", 1, 4))
    assert state.share == pytest.approx(0.1 + 0.6 / 4)
    state.follow({"event": "task_end", "task": "centralized-seed0", "failure": ""})
    assert (state.running, state.share) == ([], pytest.approx(0.7))


def test_continued_task_starts_at_its_images_seen() -> None:
    state = followed(
        PLAN,
        {"event": "task_start", "task": "federated-seed0"},
        START | {"task": "federated-seed0", "images_seen": 40},
    )
    assert state.shares["federated-seed0"] == pytest.approx(0.4)


def test_failed_task_counts_as_ended_and_next_stage_resets() -> None:
    state = followed(
        PLAN,
        {"event": "task_start", "task": "federated-seed0"},
        {"event": "task_end", "task": "federated-seed0", "failure": "gone"},
        {
            "event": "plan",
            "stage": "evaluating",
            "tasks": {"real classifier 1": 0.3, "federated, seed 0": 1.0},
            "done": [],
        },
    )
    assert (state.stage, state.share, state.running) == ("evaluating", 0.0, [])
    state.follow({"event": "task_start", "task": "federated, seed 0"})
    state.follow(
        {"event": "step", "task": "federated, seed 0", "share": 0.5, "text": "measuring distances"}
    )
    assert state.share == pytest.approx(0.5 / 1.3)
    assert state.steps == {"federated, seed 0": "measuring distances"}


def test_task_that_never_started_counts_as_ended() -> None:
    state = followed(
        PLAN,
        {"event": "task_end", "task": "federated-seed0", "failure": "a dependency failed"},
    )
    assert (state.running, state.share) == ([], pytest.approx(0.4))


def test_unknown_events_change_nothing() -> None:
    state = followed(PLAN)
    before = (state.stage, dict(state.shares), state.share)
    for event in (
        {"event": "something new"},
        {"event": "preparing", "what": "engine", "task": "federated-seed0"},
    ):
        state.follow(event)
    assert (state.stage, dict(state.shares), state.share) == before
    assert ComparisonState().share == 0.0


@given(
    weights=st.lists(st.floats(0.1, 1000), min_size=1, max_size=5),
    steps=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), max_size=30),
)
def test_share_stays_between_0_and_1(weights: list[float], steps: list[tuple[int, int]]) -> None:
    names = [str(number) for number in range(len(weights))]
    state = followed(
        {
            "event": "plan",
            "stage": "training",
            "tasks": dict(zip(names, weights, strict=True)),
            "done": [],
        }
    )
    for number, done in steps:
        name = names[number % len(names)]
        if name not in state.running:
            state.follow({"event": "task_start", "task": name})
        state.follow(ended(name, done, 5))
        assert 0 <= state.share <= 1 + 1e-9
    for name in list(state.running):
        state.follow({"event": "task_end", "task": name, "failure": ""})
    assert state.share == pytest.approx(
        sum(weights[names.index(name)] for name in state.shares) / sum(weights)
    )


# --- lines and bars ------------------------------------------------------------------------------


EVENTS: list[dict[str, Any]] = [
    {"event": "preparing", "what": "phantoms"},
    PLAN,
    {"event": "task_start", "task": "centralized-seed0"},
    {"event": "preparing", "what": "hospitals", "task": "centralized-seed0"},
    START,
    {
        "event": "progress",
        "task": "centralized-seed0",
        "round": 1,
        "hospital": "pooled",
        "images": 3,
        "of": 10,
    },
    ended("centralized-seed0", 1, 2),
    {"event": "task_end", "task": "centralized-seed0", "failure": ""},
    {"event": "task_start", "task": "federated-seed0"},
    {"event": "task_end", "task": "federated-seed0", "failure": "DataError: the shard is torn"},
    {"event": "plan", "stage": "evaluating", "tasks": {"centralized, seed 0": 1.0}, "done": []},
    {"event": "plan", "stage": "comparing", "tasks": {}, "done": []},
]


def test_without_terminal_stages_and_task_ends_are_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with CompareProgress() as progress:
        for event in EVENTS:
            progress.on_event(event)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "generating phantoms ...",
        "training the arms: 3 jobs, 1 already done",
        " 70%  centralized-seed0: done",
        "100%  federated-seed0: failed: DataError: the shard is torn",
        "evaluating the arms: 1 job",
        "comparing the arms ...",
    ]


def test_after_quiet_seconds_a_line_shows_the_running_tasks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_progress, "QUIET_SECONDS", -1.0)
    with CompareProgress() as progress:
        for event in EVENTS[1:7]:
            progress.on_event(event)
    assert capsys.readouterr().err.splitlines()[-1] == " 40%  centralized-seed0 50%"


def test_on_a_terminal_stage_and_running_tasks_have_bars() -> None:
    from rich.console import Console
    from rich.progress import Progress

    progress = CompareProgress()
    progress.bars = Progress(console=Console(file=io.StringIO(), force_terminal=True, width=100))
    seen = []
    for event in EVENTS:
        progress.on_event(event)
        seen.append(
            [(task.description, round(float(task.completed), 3)) for task in progress.bars.tasks]
        )
    assert seen[0] == []
    assert seen[1] == [("training the arms", 0.1)]
    assert seen[6] == [("training the arms", 0.4), ("  centralized-seed0", 0.5)]
    assert seen[7] == [("training the arms", 0.7)]
    assert seen[-2] == [("evaluating the arms", 0.0)]
    assert seen[-1] == [("comparing the arms", 0.0)]
    with progress:
        pass


# --- headline ------------------------------------------------------------------------------------


FOUND: dict[str, Any] = {
    "answer": "Federation costs nothing.",
    "summary": [
        {
            "arm": "real",
            "name": "real",
            "images_seen": None,
            "macro_auc": 0.9,
            "macro_auc_ci": [0.85, 0.9499],
        },
        {
            "arm": "federated",
            "name": "federated",
            "images_seen": 400,
            "macro_auc": 0.8,
            "macro_auc_ci": None,
        },
        {
            "arm": "local",
            "name": "local",
            "images_seen": None,
            "macro_auc": None,
            "macro_auc_ci": None,
        },
    ],
    "arms": [
        {"name": "federated", "seed": 0, "status": "done", "failure": None},
        {"name": "local", "seed": 1, "status": "failed", "failure": "no disk"},
    ],
}


def test_headline_has_arms_answer_and_report() -> None:
    report = Path("/nowhere/study/report.html")
    assert verb.headline_text(FOUND, report).splitlines() == [
        "real       macro AUC 0.900 (0.850 to 0.950)",
        "federated  macro AUC 0.800",
        "local      macro AUC not measured",
        "",
        "Federation costs nothing.",
        "report      /nowhere/study/report.html",
    ]
    numbers = verb.headline(FOUND, report)
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert (numbers["folder"], numbers["failed"]) == ("/nowhere/study", ["local, seed 1"])
    assert numbers["summary"][1] == {
        "arm": "federated",
        "name": "federated",
        "images_seen": 400,
        "macro_auc": 0.8,
        "macro_auc_ci": None,
    }


def test_headline_without_rows_has_answer_and_report() -> None:
    text = verb.headline_text(
        {"answer": "Nothing is known.", "summary": []}, Path("/nowhere/report.html")
    )
    assert text.split() == ["Nothing", "is", "known.", "report", "/nowhere/report.html"]


# --- options -------------------------------------------------------------------------------------


@pytest.fixture
def called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> list[tuple[Settings, ComparisonFolder, int | None]]:
    """The calls of a `compare` that only records its arguments and raises `KeyboardInterrupt`."""
    seen: list[tuple[Settings, ComparisonFolder, int | None]] = []

    def compare(
        settings: Settings, folder: ComparisonFolder, on_event: Any, jobs: int | None
    ) -> dict[str, Any]:
        seen.append((settings, folder, jobs))
        raise KeyboardInterrupt

    monkeypatch.setattr(simulations.comparison.compare, "compare", compare)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.toml").write_text('name = "A small study"\n[comparison]\nseeds = 3\n')
    return seen


def test_options_reach_compare_and_ctrl_c_says_how_to_continue(
    called: list[tuple[Settings, ComparisonFolder, int | None]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        "compare",
        "study.toml",
        "--seeds",
        "2",
        "--jobs",
        "1",
        "--set",
        "comparison.arms=federated,local",
    ]
    assert main(arguments) == 130
    assert (
        "stopped; the same command continues, and keeps what is finished" in capsys.readouterr().err
    )
    assert main(["compare", "study.toml", "--output", "elsewhere"]) == 130
    (first, folder, jobs), (second, other, _) = called
    assert (first.comparison.seeds, first.comparison.arms, jobs) == (2, ("federated", "local"), 1)
    assert folder.path == tmp_path / "runs" / "A-small-study"
    assert (second.comparison.seeds, other.path) == (3, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--seeds", "0"], "--seeds"),
        (["--jobs", "0"], "--jobs"),
        (["--set", "comparison.arm=local"], "did you mean 'comparison.arms'"),
    ],
)
@pytest.mark.usefixtures("called")
def test_invalid_options_are_one_clear_error(
    options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "study.toml", *options]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert "Traceback" not in err


def test_error_of_the_comparison_gives_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any) -> None:
        raise ConfigError("arms cannot be compared")

    monkeypatch.setattr(simulations.comparison.compare, "compare", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.toml").write_text('name = "x"\n')
    assert main(["compare", "study.toml"]) == 2
    assert capsys.readouterr() == ("", "fedgan: arms cannot be compared\n")
