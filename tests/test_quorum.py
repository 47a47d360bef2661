"""A round that goes on without a hospital, answers that do not count, and hospitals that come and come back."""

from __future__ import annotations

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

from client import hospital as site
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


def run_with(
    fault: Fault | None,
    settings: Settings,
    run: RunFolder,
    said: list[dict[str, Any]] | None = None,
) -> LocalGrid:
    """Train all rounds over a grid with that fault; events go to `said`."""
    prepare_run(settings, run)
    grid = LocalGrid(3, app, fault)
    federation = Federation(
        run.settings(),
        run,
        experiment_of(run),
        NoEvaluator(),
        (said if said is not None else []).append,
    )
    federation.train(grid)  # type: ignore[arg-type]
    return grid


def in_round(message: Message) -> int:
    return int(message.content.config_records["config"].get("round", 0))  # type: ignore[arg-type]


def answered(message: Message, number: int) -> Message:
    """What the hospital would have answered."""
    node: Any = {"partition-id": number, "num-partitions": 3}
    return app(
        message,
        Context(
            run_id=1, node_id=1000 - number, node_config=node, state=RecordDict(), run_config={}
        ),
    )


def changed(
    answer: Message, change: Callable[[str, np.ndarray], np.ndarray] | None = None, **numbers: float
) -> Message:
    """An answer with other arrays, or with other numbers in its facts or metrics."""
    arrays = {key: array.numpy() for key, array in answer.content.array_records["arrays"].items()}
    if change:
        arrays = {key: change(key, array) for key, array in arrays.items()}
    facts = dict(answer.content.config_records["facts"])
    metrics = dict(answer.content.metric_records["metrics"])
    for key, value in numbers.items():
        (metrics if key in metrics else facts)[key] = value
    answer.content["arrays"] = ArrayRecord({key: packed(array) for key, array in arrays.items()})
    answer.content["facts"], answer.content["metrics"] = ConfigRecord(facts), MetricRecord(metrics)
    return answer


def packed(value: np.ndarray | bytes) -> Array:
    """An array as it travels; of bytes, one that says it is an array."""
    return (
        Array("float32", (1,), "numpy.ndarray", value) if isinstance(value, bytes) else Array(value)
    )


def lines_of(run: RunFolder) -> list[dict[str, Any]]:
    return files.read_json_lines(run.metrics)


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDGAN_SIMULATION", "1")


# --- a hospital is missing -------------------------------------------------------------------------


def test_a_round_goes_on_without_a_hospital_that_failed_and_names_it(tmp_path: Path) -> None:
    def fault(number: int, message: Message) -> Message | None:
        return (
            error_reply(message, "hospital: DataError while training round 2")
            if (number, in_round(message)) == (1, 2)
            else None
        )

    run, said = RunFolder.at(tmp_path / "run"), list[dict[str, Any]]()
    grid = run_with(fault, settings_of(tmp_path), run, said)
    assert [[row["name"] for row in line["hospitals"]] for line in lines_of(run)] == [
        ["alpha", "beta", "gamma"],
        ["alpha", "gamma"],
        ["alpha", "beta", "gamma"],
    ]
    assert [line.get("absent") for line in lines_of(run)] == [
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
    remarks = [event["text"] for event in said if event["event"] == "note"]
    assert remarks == [
        "hospital 2 ('beta') failed in round 2: DataError while training round 2; the round continues without it"
    ]
    orders = {
        (message.metadata.dst_node_id, in_round(message)): message.content["config"]
        for message in grid.sent
    }
    assert [orders[999, number]["since"] for number in (1, 2, 3)] == [0, 1, 1]
    assert [orders[1000, number]["since"] for number in (1, 2, 3)] == [0, 1, 2]


def test_an_answer_that_came_too_late_is_as_if_it_had_never_been_trained(tmp_path: Path) -> None:
    """Two runs that differ in whether beta trained round 2 in vain end alike; its log says what became of it."""
    settings = settings_of(tmp_path, "federation.round_timeout=1.5")

    def absent(number: int, message: Message) -> Message | None:
        if (number, in_round(message)) == (1, 2):
            raise LookupError
        return None

    def late(number: int, message: Message) -> Message | None:
        if (number, in_round(message)) == (1, 2):
            assert not answered(message, number).has_error()
            raise LookupError
        return None

    runs = [RunFolder.at(tmp_path / name) for name in ("absent", "late")]
    for run, fault in zip(runs, (absent, late), strict=True):
        run_with(fault, settings, run)
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


def test_a_hospital_hears_that_its_answer_did_not_count_also_from_a_server_that_was_restarted(
    tmp_path: Path,
) -> None:
    def fault(number: int, message: Message) -> Message | None:
        if (number, in_round(message)) == (1, 1) or in_round(message) == 2:
            return error_reply(
                message, f"hospital: DataError while training round {in_round(message)}"
            )
        return None

    settings, run = settings_of(tmp_path), RunFolder.at(tmp_path / "run")
    with pytest.raises(FederationError):
        run_with(fault, settings, run)
    log = run.hospital_state("beta") / "client.log"
    assert not log.exists()
    federate(settings, run, app)
    assert (
        "the reply of round 1 did not count (missing: DataError while training round 1)"
        in log.read_text()
    )


@pytest.mark.parametrize(
    ("code", "why"),
    [(3, requests.LATE), (4, requests.LATE), (5, requests.OFFLINE), (8, "its process died")],
)
def test_what_flower_says_in_a_hospital_s_place_is_told_in_plain_words(
    code: int, why: str, tmp_path: Path
) -> None:
    def fault(number: int, message: Message) -> Message | None:
        return (
            error_reply(message, "Flower's own words", code)
            if number == 1 and in_round(message)
            else None
        )

    run = RunFolder.at(tmp_path / "run")
    run_with(fault, settings_of(tmp_path, rounds=1), run)
    ((absence,),) = [line["absent"] for line in lines_of(run)]
    assert absence["why"].startswith(why)


def test_with_too_few_answers_the_round_fails_and_can_be_resumed(tmp_path: Path) -> None:
    def fault(number: int, message: Message) -> Message | None:
        if in_round(message) == 2 and number:
            return error_reply(message, "hospital: DataError while training round 2")
        return None

    settings, run = settings_of(tmp_path), RunFolder.at(tmp_path / "run")
    with pytest.raises(
        FederationError,
        match=r"hospital 2 \('beta'\) failed in round 2.*hospital 3 \('gamma'\) failed in round 2",
    ):
        run_with(fault, settings, run)
    assert run.last_round() == 1
    federate(settings, run, app)
    assert run.last_round() == 3


# --- an answer does not count ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "numbers", "words"),
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
    ],
)
def test_an_answer_that_must_not_count_is_named_and_changes_nothing(
    change: Any, numbers: dict[str, float], words: str, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, rounds=2)

    def missing(number: int, message: Message) -> Message | None:
        fails = (number, in_round(message)) == (2, 2)
        return error_reply(message, "hospital: DataError while training round 2") if fails else None

    def hostile(number: int, message: Message) -> Message | None:
        return (
            changed(answered(message, 2), change, **numbers)
            if (number, in_round(message)) == (2, 2)
            else None
        )

    without, run = RunFolder.at(tmp_path / "without"), RunFolder.at(tmp_path / "run")
    run_with(missing, settings, without)
    run_with(hostile, settings, run)
    (row,) = lines_of(run)[1]["absent"]
    assert (row["name"], row["what"]) == ("gamma", "rejected")
    assert words in row["why"]
    assert run.checkpoint(2).read_bytes() == without.checkpoint(2).read_bytes()


def test_an_answer_that_is_only_wrong_passes_the_check_of_lengths(tmp_path: Path) -> None:
    """Which is why there are robust strategies."""
    sent: dict[str, np.ndarray] = {}

    def flip(key: str, array: np.ndarray) -> np.ndarray:
        return 2 * sent[key] - array

    def hostile(number: int, message: Message) -> Message | None:
        if number != 2 or not in_round(message):
            return None
        sent.update(
            {key: array.numpy() for key, array in message.content.array_records["arrays"].items()}
        )
        return changed(answered(message, 2), flip)

    run = RunFolder.at(tmp_path / "run")
    run_with(hostile, settings_of(tmp_path, rounds=1), run)
    assert "absent" not in lines_of(run)[0]


@given(st.lists(st.floats(0.0, 1e6), max_size=9), st.floats(1.01, 1e3))
def test_who_is_rejected_is_longer_than_most(lengths: list[float], scale: float) -> None:
    settings = tiny(Path("data"), "federation.max_update_ratio=10")
    rejected = [
        length for length, out in zip(lengths, find_too_long(settings, lengths), strict=True) if out
    ]
    kept = [
        length for length, out in zip(lengths, find_too_long(settings, lengths), strict=True) if not out
    ]
    assert len(kept) >= len(lengths) / 2
    assert not rejected or min(rejected) > max(kept, default=0.0)
    assert (
        find_too_long(settings, [length * scale for length in lengths]).count(True) <= len(lengths) / 2
    )


def test_no_length_decides_where_it_must_not() -> None:
    lengths = [1.0, 1.0, 1e9]
    assert find_too_long(tiny(Path("data")), lengths) == [False, False, True]
    assert find_too_long(tiny(Path("data"), "federation.max_update_ratio=0"), lengths) == [False] * 3
    assert find_too_long(tiny(Path("data"), "privacy.client_level=server"), lengths) == [False] * 3
    assert find_too_long(tiny(Path("data")), [0.0, 0.0]) == [False, False]


# --- hospitals come and come back ------------------------------------------------------------------


class LateGrid(LocalGrid):
    """A grid on which the last hospital comes online with the second round."""

    def __init__(self) -> None:
        super().__init__(3, app)
        self.later = {998: self.nodes.pop(998)}

    def push_messages(self, messages: Any) -> list[str]:
        messages = list(messages)
        if any(in_round(message) == 1 for message in messages):
            self.nodes |= self.later
        return super().push_messages(messages)


def test_a_hospital_that_was_absent_from_the_start_joins_between_two_rounds(tmp_path: Path) -> None:
    settings, run, said = (
        settings_of(tmp_path, "federation.join_timeout=1"),
        RunFolder.at(tmp_path / "run"),
        list[Any](),
    )
    prepare_run(settings, run)
    federation = Federation(
        run.settings(), run, experiment_of(run), NoEvaluator(), said.append, reconnecting=True
    )
    federation.train(LateGrid())  # type: ignore[arg-type]
    names = [[row["name"] for row in line["hospitals"]] for line in lines_of(run)]
    assert names == [["alpha", "beta"], ["alpha", "beta", "gamma"], ["alpha", "beta", "gamma"]]
    assert "hospital 3 ('gamma') has joined after round 1" in [event.get("text") for event in said]
    state = load_state(run, experiment_of(run))
    assert state is not None
    assert [(share.number, share.joined) for share in state.participants] == [
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


def test_a_hospital_that_comes_back_with_another_shard_is_refused(tmp_path: Path) -> None:
    settings, run = settings_of(tmp_path, rounds=2), RunFolder.at(tmp_path / "run")

    def fault(number: int, message: Message) -> Message | None:
        return (
            error_reply(message, "hospital: DataError while training round 2")
            if in_round(message) == 2
            else None
        )

    with pytest.raises(FederationError):
        run_with(fault, settings, run)
    for path in (tmp_path / "data").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    write_shards(tmp_path / "data", (64, *SIZES[1:]))
    site._open_all.cache_clear()  # another process would not have it
    with pytest.raises(
        FederationError,
        match=r"hospital 1 \('alpha'\) has 32 training images.*as 'alpha' with 24",
    ):
        federate(settings, run, app)


def test_shares_never_change_whoever_comes_later() -> None:
    settings = tiny(Path("data"), rounds=4, kimg=0.2)
    first = [Participant(0, "alpha", 30), Participant(2, "gamma", 10)]
    before, after = (
        Plan(settings, first),
        Plan(settings, [*first, Participant(1, "beta", 20, joined=2)]),
    )
    for share in first:
        assert [before.images(done, share.number) for done in range(4)] == [
            after.images(done, share.number) for done in range(4)
        ]
        assert before.planned(share.number) == after.planned(share.number)
    assert [after.images(done, 1) for done in range(2)] == [0, 0]
    assert sum(after.images(done, 1) for done in range(4)) == after.planned(1) > 0


def test_a_superlink_that_is_too_busy_to_answer_is_asked_again_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = httpx.Request("POST", "https://superlink:8000/v1/runtime/pull-messages")

    def failing(*codes: int) -> Callable[[], str]:
        active_members = list(codes)

        def look() -> str:
            if active_members:
                raise httpx.HTTPStatusError(
                    "no",
                    request=request,
                    response=httpx.Response(active_members.pop(0), request=request),
                )
            return "answer"

        return look

    monkeypatch.setattr(requests, "ONLINE_POLL", 0.01)
    assert requests.retry_on_5xx(failing(500, 500)) == "answer"
    with pytest.raises(httpx.HTTPStatusError):
        requests.retry_on_5xx(failing(403))
    monkeypatch.setattr(requests, "BUSY_SECONDS", 0.05)
    with pytest.raises(httpx.HTTPStatusError):
        requests.retry_on_5xx(failing(*[500] * 50))
