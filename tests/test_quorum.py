"""Rounds without a hospital, rejected replies, and hospitals that join late or return."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from small_federation import LocalGrid, NoEvaluator, error_reply, federate, tiny, write_shards

from client import hospital as client_hospital
from client.app import app
from fedgan import files
from fedgan.config import Settings
from fedgan.errors import FederationError
from fedgan.run_folder import RunFolder
from fedgan.runs.budget import Plan
from fedgan.runs.participants import Participant
from fedgan.runs.preparation import experiment_of, prepare_run
from fedgan.runs.round_state import load_state
from server import requests
from server.aggregation.update_checks import find_too_long
from server.federation import Federation

SIZES = (48, 32, 24)  # alpha, beta, gamma: the hospitals 1, 2 and 3
Fault = Callable[[int, Message], Message | None]


def settings_of(tmp_path: Path, *overrides: str, rounds: int = 3) -> Settings:
    root = tmp_path / "data"
    data = root if root.exists() else write_shards(root, SIZES)
    return tiny(data, "federation.min_hospitals=2", *overrides, rounds=rounds, kimg=0.036 * rounds)


def train_with(
    fault: Fault | None,
    settings: Settings,
    run: RunFolder,
    events: list[dict[str, Any]] | None = None,
) -> LocalGrid:
    """Train all rounds over a grid with that fault; events are appended to `events`."""
    prepare_run(settings, run)
    grid = LocalGrid(3, app, fault)
    federation = Federation(
        run.settings(),
        run,
        experiment_of(run),
        NoEvaluator(),
        (events if events is not None else []).append,
    )
    federation.train(grid)  # type: ignore[arg-type]
    return grid


def round_of(message: Message) -> int:
    return int(message.content.config_records["config"].get("round", 0))  # type: ignore[arg-type]


def app_reply(message: Message, number: int) -> Message:
    """The reply of the unchanged ClientApp."""
    node: Any = {"partition-id": number, "num-partitions": 3}
    return app(
        message,
        Context(
            run_id=1, node_id=1000 - number, node_config=node, state=RecordDict(), run_config={}
        ),
    )


def with_changes(
    reply: Message, change: Callable[[str, np.ndarray], np.ndarray] | None = None, **numbers: float
) -> Message:
    """Change the arrays of a reply, or numbers of its facts or metrics."""
    arrays = {key: array.numpy() for key, array in reply.content.array_records["arrays"].items()}
    if change:
        arrays = {key: change(key, array) for key, array in arrays.items()}
    facts = dict(reply.content.config_records["facts"])
    metrics = dict(reply.content.metric_records["metrics"])
    for key, value in numbers.items():
        (metrics if key in metrics else facts)[key] = value
    reply.content["arrays"] = ArrayRecord({key: to_array(array) for key, array in arrays.items()})
    reply.content["facts"], reply.content["metrics"] = ConfigRecord(facts), MetricRecord(metrics)
    return reply


def to_array(value: np.ndarray | bytes) -> Array:
    """An array as Flower sends it; bytes become an array record with an invalid payload."""
    return (
        Array("float32", (1,), "numpy.ndarray", value) if isinstance(value, bytes) else Array(value)
    )


def metric_lines(run: RunFolder) -> list[dict[str, Any]]:
    return files.read_json_lines(run.metrics)


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDGAN_SIMULATION", "1")


# --- missing hospitals ----------------------------------------------------------------------------


def test_round_continues_without_a_failed_hospital_and_names_it(tmp_path: Path) -> None:
    def fault(number: int, message: Message) -> Message | None:
        return (
            error_reply(message, "hospital: DataError while training round 2")
            if (number, round_of(message)) == (1, 2)
            else None
        )

    run, events = RunFolder.at(tmp_path / "run"), list[dict[str, Any]]()
    grid = train_with(fault, settings_of(tmp_path), run, events)
    assert [[row["name"] for row in line["hospitals"]] for line in metric_lines(run)] == [
        ["alpha", "beta", "gamma"],
        ["alpha", "gamma"],
        ["alpha", "beta", "gamma"],
    ]
    assert [line.get("absent") for line in metric_lines(run)] == [
        None,
        [
            {
                "name": "beta",
                "number": 1,
                "what": "missing",
                "why": "DataError while training round 2",
            }
        ],
        None,
    ]
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert notes == [
        "hospital 2 ('beta') failed in round 2: DataError while training round 2; "
        "the round continues without it"
    ]
    configs = {
        (message.metadata.dst_node_id, round_of(message)): message.content["config"]
        for message in grid.sent
    }
    assert [configs[999, number]["since"] for number in (1, 2, 3)] == [0, 1, 1]
    assert [configs[1000, number]["since"] for number in (1, 2, 3)] == [0, 1, 2]


def test_late_reply_leaves_the_run_as_if_the_round_was_not_trained(tmp_path: Path) -> None:
    """Runs in which beta is absent or late in round 2 end in the same bytes; its log names why."""
    settings = settings_of(tmp_path, "federation.round_timeout=1.5")

    def absent(number: int, message: Message) -> Message | None:
        if (number, round_of(message)) == (1, 2):
            raise LookupError
        return None

    def late(number: int, message: Message) -> Message | None:
        if (number, round_of(message)) == (1, 2):
            assert not app_reply(message, number).has_error()
            raise LookupError
        return None

    runs = [RunFolder.at(tmp_path / name) for name in ("absent", "late")]
    for run, fault in zip(runs, (absent, late), strict=True):
        train_with(fault, settings, run)
    one, other = (run.checkpoint(3).read_bytes() for run in runs)
    assert one == other
    folder = runs[1].hospital_state("beta")
    assert sorted(path.name for path in folder.glob("state-*.json")) == [
        "state-00001.json",
        "state-00003.json",
    ]
    assert (
        "the reply of round 2 did not count (missing: did not reply in time)"
        in (folder / "client.log").read_text()
    )


def test_restarted_server_reports_rejected_replies_to_the_hospital(
    tmp_path: Path,
) -> None:
    def fault(number: int, message: Message) -> Message | None:
        if (number, round_of(message)) == (1, 1) or round_of(message) == 2:
            return error_reply(
                message, f"hospital: DataError while training round {round_of(message)}"
            )
        return None

    settings, run = settings_of(tmp_path), RunFolder.at(tmp_path / "run")
    with pytest.raises(FederationError):
        train_with(fault, settings, run)
    log = run.hospital_state("beta") / "client.log"
    assert not log.exists()
    federate(settings, run, app)
    assert (
        "the reply of round 1 did not count (missing: DataError while training round 1)"
        in log.read_text()
    )


@pytest.mark.parametrize(
    ("code", "reason"),
    [(3, requests.LATE), (4, requests.LATE), (5, requests.OFFLINE), (8, "its process died")],
)
def test_flower_error_codes_become_plain_reasons(code: int, reason: str, tmp_path: Path) -> None:
    def fault(number: int, message: Message) -> Message | None:
        return (
            error_reply(message, "Flower's own text", code)
            if number == 1 and round_of(message)
            else None
        )

    run = RunFolder.at(tmp_path / "run")
    train_with(fault, settings_of(tmp_path, rounds=1), run)
    ((absence,),) = [line["absent"] for line in metric_lines(run)]
    assert absence["why"].startswith(reason)


def test_round_with_too_few_replies_fails_and_can_be_resumed(tmp_path: Path) -> None:
    def fault(number: int, message: Message) -> Message | None:
        if round_of(message) == 2 and number:
            return error_reply(message, "hospital: DataError while training round 2")
        return None

    settings, run = settings_of(tmp_path), RunFolder.at(tmp_path / "run")
    with pytest.raises(
        FederationError,
        match=r"hospital 2 \('beta'\) failed in round 2.*hospital 3 \('gamma'\) failed in round 2",
    ):
        train_with(fault, settings, run)
    assert run.last_round() == 1
    federate(settings, run, app)
    assert run.last_round() == 3


# --- rejected replies -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "numbers", "text"),
    [
        (lambda key, array: array * np.float32(np.nan), {}, "not finite"),
        (lambda key, array: array * 1000, {}, "more than 10 times as long as the round's median"),
        (lambda key, array: np.full_like(array, 3e38), {}, "more than 10 times as long"),
        (lambda key, array: np.zeros((2000, 2000), np.float32), {}, "expected float32"),
        (lambda key, array: array.astype(np.float64), {}, "with float64"),
        (lambda key, array: b"\x93NUMPY\x01\x00 and no more", {}, "bytes that are no array"),
        (None, {"num_examples": 10**6}, "claims num_examples = 1000000, its introduction said"),
        (None, {"round": 1}, "replied for round 1, the request was for round 2"),
        (None, {"images": 10**6}, "claims 1000000 images in this round"),
        (None, {"threads": -1}, "does not report"),
        (None, {"exhausted": 1.0}, "a spent privacy budget in a run without privacy"),
    ],
    ids=[
        "nan",
        "scaled",
        "overflow",
        "huge",
        "double",
        "bytes",
        "weight",
        "replayed",
        "images",
        "threads",
        "exhausted",
    ],
)
def test_invalid_reply_is_named_and_changes_nothing(
    change: Any, numbers: dict[str, float], text: str, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, rounds=2)

    def missing(number: int, message: Message) -> Message | None:
        fails = (number, round_of(message)) == (2, 2)
        return error_reply(message, "hospital: DataError while training round 2") if fails else None

    def hostile(number: int, message: Message) -> Message | None:
        return (
            with_changes(app_reply(message, 2), change, **numbers)
            if (number, round_of(message)) == (2, 2)
            else None
        )

    without, run = RunFolder.at(tmp_path / "without"), RunFolder.at(tmp_path / "run")
    train_with(missing, settings, without)
    train_with(hostile, settings, run)
    (row,) = metric_lines(run)[1]["absent"]
    assert (row["name"], row["what"]) == ("gamma", "rejected")
    assert text in row["why"]
    assert run.checkpoint(2).read_bytes() == without.checkpoint(2).read_bytes()


def test_reversed_update_passes_the_check_of_lengths(tmp_path: Path) -> None:
    """Only robust strategies protect against it."""
    sent: dict[str, np.ndarray] = {}

    def flip(key: str, array: np.ndarray) -> np.ndarray:
        return 2 * sent[key] - array

    def hostile(number: int, message: Message) -> Message | None:
        if number != 2 or not round_of(message):
            return None
        sent.update(
            {key: array.numpy() for key, array in message.content.array_records["arrays"].items()}
        )
        return with_changes(app_reply(message, 2), flip)

    run = RunFolder.at(tmp_path / "run")
    train_with(hostile, settings_of(tmp_path, rounds=1), run)
    assert "absent" not in metric_lines(run)[0]


@given(st.lists(st.floats(0.0, 1e6), max_size=9), st.floats(1.01, 1e3))
def test_rejected_updates_are_longer_than_the_majority(lengths: list[float], scale: float) -> None:
    settings = tiny(Path("data"), "federation.max_update_ratio=10")
    checked = list(zip(lengths, find_too_long(settings, lengths), strict=True))
    rejected = [length for length, is_too_long in checked if is_too_long]
    kept = [length for length, is_too_long in checked if not is_too_long]
    assert len(kept) >= len(lengths) / 2
    assert not rejected or min(rejected) > max(kept, default=0.0)
    scaled = [length * scale for length in lengths]
    assert find_too_long(settings, scaled).count(True) <= len(lengths) / 2


def test_length_check_is_off_where_it_does_not_apply() -> None:
    lengths = [1.0, 1.0, 1e9]
    assert find_too_long(tiny(Path("data")), lengths) == [False, False, True]
    for override in ("federation.max_update_ratio=0", "privacy.client_level=server"):
        assert find_too_long(tiny(Path("data"), override), lengths) == [False] * 3
    assert find_too_long(tiny(Path("data")), [0.0, 0.0]) == [False, False]


# --- hospitals that join late or return -----------------------------------------------------------


class LateGrid(LocalGrid):
    """A grid on which the last hospital comes online when round 1 is sent."""

    def __init__(self) -> None:
        super().__init__(3, app)
        self.later = {998: self.nodes.pop(998)}

    def push_messages(self, messages: Any) -> list[str]:
        messages = list(messages)
        if any(round_of(message) == 1 for message in messages):
            self.nodes |= self.later
        return super().push_messages(messages)


def test_hospital_absent_at_the_start_joins_between_two_rounds(tmp_path: Path) -> None:
    settings, run, events = (
        settings_of(tmp_path, "federation.join_timeout=1"),
        RunFolder.at(tmp_path / "run"),
        list[Any](),
    )
    prepare_run(settings, run)
    federation = Federation(
        run.settings(), run, experiment_of(run), NoEvaluator(), events.append, reconnecting=True
    )
    federation.train(LateGrid())  # type: ignore[arg-type]
    names = [[row["name"] for row in line["hospitals"]] for line in metric_lines(run)]
    assert names == [["alpha", "beta"], ["alpha", "beta", "gamma"], ["alpha", "beta", "gamma"]]
    assert "hospital 3 ('gamma') has joined after round 1" in [
        event.get("text") for event in events
    ]
    state = load_state(run, experiment_of(run))
    assert state is not None
    assert [(one.number, one.joined) for one in state.participants] == [
        (0, 0),
        (1, 0),
        (2, 1),
    ]
    assert state.since == {0: 3, 1: 3, 2: 3}
    assert [row["name"] for row in json.loads(run.hospitals.read_text())] == [
        "alpha",
        "beta",
        "gamma",
    ]


class RotatingGrid(LocalGrid):
    """A grid on which the last hospital has a new key, so a new node, after round 1 was sent."""

    def push_messages(self, messages: Any) -> list[str]:
        messages = list(messages)
        ids = super().push_messages(messages)
        if 998 in self.nodes and any(round_of(message) == 1 for message in messages):
            self.nodes[500], self.names[500] = self.nodes.pop(998), self.names[998]
            self.states[500] = RecordDict()
        return ids


def test_hospital_with_a_rotated_key_continues_in_the_run(tmp_path: Path) -> None:
    settings, run = settings_of(tmp_path, rounds=2), RunFolder.at(tmp_path / "run")
    prepare_run(settings, run)
    grid = RotatingGrid(3, app)
    grid.names = {1000: "north", 999: "south", 998: "east"}
    federation = Federation(
        run.settings(), run, experiment_of(run), NoEvaluator(), reconnecting=True
    )
    federation.train(grid)  # type: ignore[arg-type]
    for line in metric_lines(run):
        assert [row["name"] for row in line["hospitals"]] == ["north", "south", "east"]
        assert "refused" not in line
    assert grid.sent[-1].metadata.dst_node_id in grid.nodes


def test_hospital_that_returns_with_another_shard_is_refused(tmp_path: Path) -> None:
    settings, run = settings_of(tmp_path, rounds=2), RunFolder.at(tmp_path / "run")

    def fault(number: int, message: Message) -> Message | None:
        return (
            error_reply(message, "hospital: DataError while training round 2")
            if round_of(message) == 2
            else None
        )

    with pytest.raises(FederationError):
        train_with(fault, settings, run)
    for path in (tmp_path / "data").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    write_shards(tmp_path / "data", (64, *SIZES[1:]))
    client_hospital._open_all.cache_clear()  # as in a new process
    federate(settings, run, app)
    line = metric_lines(run)[1]
    assert [row["name"] for row in line["hospitals"]] == ["beta", "gamma"]
    ((refused),) = line["refused"]
    assert refused["why"].startswith("hospital 1 ('alpha') has 32 training images")


def test_stranger_is_left_out_and_named_and_ends_no_run(tmp_path: Path) -> None:
    """A fourth registered node, where all three hospitals are needed."""
    settings, run = settings_of(tmp_path, rounds=2), RunFolder.at(tmp_path / "run")
    settings = dataclasses.replace(
        settings, federation=dataclasses.replace(settings.federation, min_hospitals=0)
    )
    prepare_run(settings, run)
    grid, events = LocalGrid(4, app), list[dict[str, Any]]()
    grid.names = {1000: "north", 999: "south=32", 998: "east=24", 997: "stranger"}
    federation = Federation(
        run.settings(), run, experiment_of(run), NoEvaluator(), events.append, reconnecting=True
    )
    federation.train(grid)  # type: ignore[arg-type]
    for line in metric_lines(run):
        assert [row["name"] for row in line["hospitals"]] == ["north", "south", "east"]
        ((refused),) = line["refused"]
        assert refused["name"] == "stranger"
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert notes == [f"'stranger' did not join: {refused['why']}"]
    state = load_state(run, experiment_of(run))
    assert state is not None
    assert [row.key for row in state.participants] == ["north", "south", "east"]


def test_hostile_error_text_reaches_no_line_note_or_request(tmp_path: Path) -> None:
    hostile = "hospital: \x1b[31mred\n\u202e" * 30_000

    def fault(number: int, message: Message) -> Message | None:
        is_hostile = (number, round_of(message)) == (1, 1)
        return error_reply(message, hostile) if is_hostile else None

    run, events = RunFolder.at(tmp_path / "run"), list[dict[str, Any]]()
    grid = train_with(fault, settings_of(tmp_path, rounds=2), run, events)
    (absent,) = metric_lines(run)[0]["absent"]
    assert absent["why"] == "an error that its own log explains"
    notes = [str(message.content["config"].get("note", "")) for message in grid.sent]
    texts = [*notes, *(json.dumps(event) for event in events)]
    assert not any("red" in text.split() or "\x1b" in text or "u001b" in text for text in texts)
    assert max(map(len, notes)) < 300


def test_image_budgets_do_not_change_when_a_hospital_joins() -> None:
    settings = tiny(Path("data"), rounds=4, kimg=0.2)
    first = [Participant(0, "alpha", 30), Participant(2, "gamma", 10)]
    before, after = (
        Plan(settings, first),
        Plan(settings, [*first, Participant(1, "beta", 20, joined=2)]),
    )
    for participant in first:
        assert [before.images(done, participant.number) for done in range(4)] == [
            after.images(done, participant.number) for done in range(4)
        ]
        assert before.planned(participant.number) == after.planned(participant.number)
    assert [after.images(done, 1) for done in range(2)] == [0, 0]
    assert sum(after.images(done, 1) for done in range(4)) == after.planned(1) > 0


def test_requests_to_a_busy_superlink_are_retried_for_a_limited_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = httpx.Request("POST", "https://superlink:8000/v1/runtime/pull-messages")

    def failing(*codes: int) -> Callable[[], str]:
        remaining = list(codes)

        def call() -> str:
            if remaining:
                raise httpx.HTTPStatusError(
                    "no",
                    request=request,
                    response=httpx.Response(remaining.pop(0), request=request),
                )
            return "reply"

        return call

    monkeypatch.setattr(requests, "ONLINE_POLL", 0.01)
    assert requests.retry_on_5xx(failing(500, 500)) == "reply"
    with pytest.raises(httpx.HTTPStatusError):
        requests.retry_on_5xx(failing(403))
    monkeypatch.setattr(requests, "BUSY_SECONDS", 0.05)
    with pytest.raises(httpx.HTTPStatusError):
        requests.retry_on_5xx(failing(*[500] * 50))
