"""What travels between server and hospitals, and what does not."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from small_federation import LocalGrid, error_reply, federate, tiny, write_shards

from client.app import app
from client.hospital import KEEP_STATES, SIMULATION, TrainRequest, find_local_hospital, log_folder
from fedgan import files
from fedgan.config import to_dict
from fedgan.errors import CheckpointError, ConfigError, FederationError
from fedgan.run_folder import RunFolder
from fedgan.runs.participants import Member
from fedgan.runs.preparation import experiment_of
from fedgan.runs.round_state import load_state, write_line
from fedgan.training.checkpoint import load_tensors
from server.attendance import Attendance
from server.records import array_bytes, check_reply, personal, to_record
from server.requests import AWAY, LATE, TRIES, UNASKED, send_and_receive
from server.roster import check_members, introduce, read_member


@pytest.fixture(autouse=True)
def identity() -> None:
    """Messages can be made only where Flower knows a task."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def member(number: int, **changes: object) -> Member:
    facts: dict[str, object] = {
        "node": 100 + number,
        "number": number,
        "name": f"clinic-{number}",
        "images": 10,
        "label_names": ("a", "b"),
        "exclusive": True,
        "channels": 1,
        "resolution": 16,
    }
    return Member(**(facts | changes))  # type: ignore[arg-type]


def question(node: int = 100, **config: object) -> Message:
    records = {
        "arrays": to_record({"ema/w": np.ones(3, np.float32)}),
        "config": ConfigRecord(config),
    }  # type: ignore[arg-type]
    message = Message(RecordDict(records), node, "train")
    message.metadata.__dict__["_message_id"] = "question"
    return message


def answer(arrays: dict[str, np.ndarray], to: Message | None = None) -> Message:
    content = {
        "arrays": ArrayRecord({k: Array(v) for k, v in arrays.items()}),
        "metrics": MetricRecord({"num_examples": 5}),
    }
    return Message(RecordDict(content), reply_to=to or question())


def grid(hospitals: int, fault: Callable[[int, Message], Message | None] | None = None) -> Any:
    return LocalGrid(hospitals, app, fault)


# --- a whole run without Ray -----------------------------------------------------------------------


def test_only_the_named_parts_travel_and_bytes_are_counted(tmp_path: Path) -> None:
    settings = tiny(
        write_shards(tmp_path / "data", (24, 16)),
        'federation.exchange=["ema"]',
        hospitals=2,
        rounds=2,
        kimg=0.016,
    )
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    tensors, meta = load_tensors(run.checkpoint(2))
    assert {key.split("/")[0] for key in tensors} == {"ema"}
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert (
        meta["bytes_exchanged"] == 2 * 2 * 2 * 4 * numbers
    )  # rounds, hospitals, directions, float32
    homes = [
        load_tensors(run.hospital_state(name) / "state-00002.safetensors")[0]
        for name in ("alpha", "beta")
    ]
    assert not homes[0]["discriminator/" + _first(homes[0], "discriminator/")].equal(
        homes[1]["discriminator/" + _first(homes[1], "discriminator/")]
    )


def _first(tensors: dict[str, object], prefix: str) -> str:
    """The largest tensor's name of a part."""
    return max(
        (key for key in tensors if key.startswith(prefix)), key=lambda key: tensors[key].numel()
    ).removeprefix(prefix)  # type: ignore[attr-defined]


def test_the_mean_is_that_of_the_hospitals_models_whatever_the_order_of_answers(
    tmp_path: Path,
) -> None:
    settings = tiny(write_shards(tmp_path / "data", (40, 24, 16)), rounds=2, kimg=0.024)
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    for number in (1, 2):
        tensors, _ = load_tensors(run.checkpoint(number))
        states = [
            load_tensors(run.hospital_state(name) / f"state-{number:05d}.safetensors")[0]
            for name in ("alpha", "beta", "gamma")
        ]
        weights = np.array([20, 12, 8]) / 40
        for key, tensor in tensors.items():
            mean = sum(
                w * state[key].double().numpy() for w, state in zip(weights, states, strict=True)
            )
            np.testing.assert_allclose(tensor.numpy(), mean, rtol=1e-6, atol=1e-7)


def test_budgets_of_the_rounds_add_up_in_every_hospital(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (64, 8)), hospitals=2, rounds=5, kimg=0.043)
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    lines = files.read_json_lines(run.metrics)
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5]
    seen = [row["images_seen"] for row in lines[-1]["hospitals"]]
    assert seen == [40, 4]  # 9.8 and 1.2 of 11 batches of 4, the fewest that hold 43 images
    assert lines[-1]["images_seen"] == sum(seen)
    idle = [line["hospitals"][1] for line in lines if line["hospitals"][1]["images"] == 0]
    assert idle, "the small hospital has rounds without a step"
    assert all("loss_g" not in row for row in idle)


def test_hospitals_keep_their_last_states_only(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2, rounds=5, kimg=0.04)
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    states = sorted(path.name for path in run.hospital_state("alpha").glob("*.safetensors"))
    assert states == [f"state-{number:05d}.safetensors" for number in (3, 4, 5)]
    assert len(states) == KEEP_STATES
    assert sorted(path.name for path in run.checkpoints.glob("*.safetensors")) == [
        f"round-0000{number}.safetensors" for number in (3, 4, 5)
    ]


def test_what_goes_wrong_in_a_hospital_stays_there(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2, rounds=3, kimg=0.024)
    run = RunFolder.at(tmp_path / "run")

    def lose_state(number: int, message: Message) -> None:
        if message.content.config_records["config"].get("round") == 2:
            for path in run.hospital_state("beta").glob("state-*"):
                path.unlink()

    with pytest.raises(FederationError) as caught:
        federate(settings, run, app, lose_state)
    assert (
        str(caught.value)
        == "hospital 2 ('beta') failed in round 2: CheckpointError while loading its state of round 1"
    )
    log = (run.hospital_state("beta") / "client.log").read_text()
    assert "Traceback" in log
    assert str(run.path) in log


def test_a_damaged_state_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2, rounds=2, kimg=0.016)
    run = RunFolder.at(tmp_path / "run")

    def damage(number: int, message: Message) -> None:
        path = run.hospital_state("alpha") / "state-00001.safetensors"
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(
        FederationError,
        match=r"'alpha'\) failed in round 2: CheckpointError while loading its state of round 1$",
    ):
        federate(settings, run, app, damage)


def test_a_state_of_another_experiment_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIMULATION, "1")
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2, rounds=2, kimg=0.016)
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    config = {
        "settings": json.dumps(to_dict(run.settings())),
        "experiment": "another",
        "run": str(run.path),
        "round": 2,
        "since": 1,
    }
    order = TrainRequest.read(config)
    with pytest.raises(CheckpointError, match="another experiment"):
        find_local_hospital(order, {"partition-id": 0}).state_of(order)
    with pytest.raises(CheckpointError, match="another experiment"):
        load_state(run, "another")
    state = load_state(run, experiment_of(run))
    assert state is not None
    assert state.round == 2


def test_a_hospital_of_its_own_keeps_data_and_state_where_its_node_says(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", (16, 24))
    settings = tiny(tmp_path / "nowhere", hospitals=2)
    order = TrainRequest(settings, "exp-1", str(tmp_path / "run"))
    site = find_local_hospital(
        order,
        {"partition-id": 1, "data-root": str(data / "alpha"), "state-dir": str(tmp_path / "disk")},
    )
    assert (site.number, site.hospital.name, len(site.hospital.train)) == (1, "alpha", 8)
    assert site.folder == tmp_path / "disk" / "exp-1"


def test_a_server_cannot_choose_where_a_hospital_keeps_its_state(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", (16, 24))
    settings = tiny(tmp_path / "nowhere", hospitals=2)
    with pytest.raises(ConfigError, match="no state-dir"):
        find_local_hospital(
            TrainRequest(settings, "e", str(tmp_path)),
            {"partition-id": 0, "data-root": str(data / "alpha")},
        )
    for experiment in ("../../etc", "", "a/b", "x" * 65):
        with pytest.raises(ConfigError, match="experiment id"):
            TrainRequest.read(
                {"settings": json.dumps(to_dict(settings)), "experiment": experiment, "run": ""}
            )


def test_no_path_of_a_server_is_used_outside_a_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_shards(tmp_path / "data", (16, 24))
    order = TrainRequest(tiny(data, hospitals=2), "e", str(tmp_path / "run"))
    own = {"partition-id": 0, "data-root": str(data / "alpha")}
    for node in ({"partition-id": 0}, {"partition-id": 0, "num-partitions": 2}, own):
        with pytest.raises(ConfigError, match=r"this node names no (data-root|state-dir)"):
            find_local_hospital(order, node)
        assert log_folder(order, node) is None
    assert (
        log_folder(order, {"partition-id": 0, "state-dir": str(tmp_path / "disk")})
        == tmp_path / "disk"
    )

    monkeypatch.setenv(SIMULATION, "1")
    assert log_folder(order, own) is None  # data of its own: never the server's paths
    assert (
        find_local_hospital(order, {"partition-id": 0}).folder
        == tmp_path / "run" / "hospitals" / "beta"
    )
    monkeypatch.delenv(SIMULATION)
    monkeypatch.setitem(
        sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True)
    )  # an actor of `flwr run`
    assert find_local_hospital(order, {"partition-id": 1}).hospital.name == "alpha"


def test_a_partition_id_without_hospital_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIMULATION, "1")
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2)
    with pytest.raises(ConfigError, match="partition-id = 2, but there are 2 hospitals"):
        find_local_hospital(TrainRequest(settings, "e", str(tmp_path)), {"partition-id": 2})


def test_a_shard_that_cannot_be_opened_fails_before_the_first_round(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2)
    run = RunFolder.at(tmp_path / "run")

    def remove(number: int, message: Message) -> None:
        (tmp_path / "data" / "beta" / "images.npy").unlink(missing_ok=True)

    from client import hospital as site

    site._open_all.cache_clear()
    with pytest.raises(
        FederationError,
        match=r"a hospital could not join: DataError while opening its shard \(partition-id \d\)$",
    ):
        federate(settings, run, app, remove)


# --- one answer ------------------------------------------------------------------------------------


def test_each_hospital_gets_its_own_number_of_images() -> None:
    message = question(node=7, round=3)
    mine = personal(message, {"images": 11, "planned": 99, "batch": 4}, 30.0)
    assert mine.content.config_records["config"]["images"] == 11
    assert mine.content.config_records["config"]["batch"] == 4
    assert mine.metadata.ttl == 30.0
    assert "images" not in message.content.config_records["config"]


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"ema/w": np.ones(4, np.float32)}, "sent was float32"),
        ({"ema/w": np.ones(3, np.float64)}, "as float64"),
        ({"ema/v": np.ones(3, np.float32)}, "other arrays"),
        ({"ema/w": np.array([1, np.nan, 2], np.float32)}, "not finite"),
    ],
)
def test_an_answer_that_would_spoil_the_model_is_refused(
    arrays: dict[str, np.ndarray], word: str
) -> None:
    with pytest.raises(FederationError, match=rf"hospital 1 \('clinic-0'\) .*{word}"):
        check_reply(member(0), answer(arrays), {"ema/w": np.ones(3, np.float32)})


def test_an_answer_as_it_should_be_passes() -> None:
    sent = {"ema/w": np.ones(3, np.float32)}
    check_reply(member(0), answer(sent), sent)
    assert array_bytes(answer(sent)) == 12


@pytest.mark.parametrize(
    ("reason", "code", "shown"),
    [
        ("hospital: DataError while opening its shard", 2, "DataError while opening its shard"),
        (
            "<class 'ClientAppException'>:<'/data/p17.png: bad'>",
            2,
            "an error that its own log explains",
        ),
        (
            "<class 'ray.exceptions.ActorDiedError'>:<'...'>",
            0,
            "its process died (killed, or out of memory)",
        ),
        ("ClientApp stopped responding.", 8, "its process died (killed, or out of memory)"),
    ],
)
def test_reasons_are_shown_only_where_they_are_safe(reason: str, code: int, shown: str) -> None:
    def fault(number: int, message: Message) -> Message | None:
        return error_reply(message, reason, code) if number == 1 else answer({}, message)

    found = send_and_receive(
        grid(2, fault), [1000, 999], lambda node, left: question(node), timeout=60
    )
    assert found.failures == {999: shown}
    assert list(found.replies) in ([], [1000])  # nobody waits for the others once one has failed


def test_who_does_not_answer_in_time_is_named() -> None:
    def fault(number: int, message: Message) -> Message | None:
        if number:
            raise LookupError
        return answer({}, message)

    found = send_and_receive(
        grid(3, fault), [1000, 999, 998], lambda node, left: question(node), timeout=0.3
    )
    assert (list(found.replies), found.failures) == ([1000], {999: LATE, 998: LATE})


def test_a_wait_ends_as_soon_as_enough_cannot_answer_any_more() -> None:
    def fault(number: int, message: Message) -> Message | None:
        if number == 2:
            return error_reply(message, "broken")
        raise LookupError

    found = send_and_receive(
        grid(3, fault), [1000, 999, 998], lambda node, left: question(node), timeout=60
    )
    assert found.failures[998] == "an error that its own log explains"
    assert found.failures[1000] == found.failures[999] == UNASKED


def test_with_a_quorum_one_failure_ends_no_wait() -> None:
    def fault(number: int, message: Message) -> Message | None:
        return error_reply(message, "broken") if number == 2 else answer({}, message)

    found = send_and_receive(
        grid(3, fault), [1000, 999, 998], lambda node, left: question(node), timeout=60, enough=2
    )
    assert sorted(found.replies) == [999, 1000]


def test_who_comes_back_is_asked_again_while_time_is_left() -> None:
    tries: list[int] = []

    def fault(number: int, message: Message) -> Message | None:
        tries.append(number)
        return (
            error_reply(message, "Node Unavailable", 5)
            if tries.count(1) == 1 and number == 1
            else answer({}, message)
        )

    found = send_and_receive(
        grid(2, fault),
        [1000, 999],
        lambda node, left: question(node),
        timeout=60,
        reconnecting=True,
    )
    assert sorted(found.replies) == [999, 1000]
    assert sorted(tries) == [0, 1, 1]


def test_a_hospital_s_own_word_is_its_last_and_a_process_that_always_dies_is_given_up() -> None:
    for reason, code, often in (
        ("hospital: DataError while opening its shard", 2, 1),
        ("ClientApp stopped responding.", 8, TRIES),
    ):
        tries: list[int] = []

        def fault(number: int, message: Message) -> Message:
            tries.append(number)  # noqa: B023
            return error_reply(message, reason, code)  # noqa: B023

        with mock.patch("server.requests.ONLINE_POLL", 0.0):
            send_and_receive(
                grid(1, fault),
                [1000],
                lambda node, left: question(node),
                timeout=60,
                reconnecting=True,
            )
        assert len(tries) == often


def test_nobody_is_asked_who_is_away() -> None:
    nobody = grid(1)
    nobody.nodes = {}
    found = send_and_receive(
        nobody, [1000], lambda node, left: question(node), timeout=0.3, reconnecting=True
    )
    assert found.failures == {1000: AWAY}
    assert nobody.sent == []


# --- who takes part --------------------------------------------------------------------------------


def test_the_wait_for_hospitals_is_bounded(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 40, 24)), "federation.join_timeout=1")
    order = {"settings": json.dumps(to_dict(settings)), "experiment": "e", "run": str(tmp_path)}
    with pytest.raises(FederationError, match="2 of 3 hospitals came online within 1 s"):
        introduce(grid(2), settings, order)
    with pytest.raises(ConfigError, match="4 nodes for"):
        introduce(grid(4), settings, order)


def test_a_quorum_begins_without_a_hospital_that_does_not_come(tmp_path: Path) -> None:
    settings = tiny(
        write_shards(tmp_path / "data", (16, 40, 24)),
        "federation.join_timeout=1",
        "federation.min_hospitals=2",
    )
    order = {"settings": json.dumps(to_dict(settings)), "experiment": "e", "run": str(tmp_path)}
    members, problems = introduce(grid(2), settings, order)
    assert ([member.number for member in members], problems) == ([0, 1], [])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("number", 3),
        ("number", -1),
        ("name", "../../etc"),
        ("name", "a\nb"),
        ("name", ".."),
        ("name", "x" * 65),
        ("images", 0),
        ("images", 10**7),
        ("label_names", ["dark", "../x"]),
        ("label_names", "dark"),
        ("resolution", 64),
        ("channels", 1000),
        ("exclusive", 1),
    ],
)
def test_an_impossible_introduction_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    settings = tiny(tmp_path)
    facts = {
        "number": 0,
        "name": "a",
        "images": 5,
        "label_names": ["dark"],
        "exclusive": True,
        "channels": 1,
        "resolution": 16,
    }
    right = Message(RecordDict({"hospital": ConfigRecord(facts)}), reply_to=question())
    assert read_member(7, right, settings).name == "a"
    wrong = Message(
        RecordDict({"hospital": ConfigRecord(facts | {key: value})}), reply_to=question()
    )
    with pytest.raises(FederationError, match=f"impossible {key}"):
        read_member(7, wrong, settings)


def test_hospitals_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 40, 24)))
    order = {"settings": json.dumps(to_dict(settings)), "experiment": "e", "run": str(tmp_path)}
    members, _ = introduce(grid(3), settings, order)
    assert [(one.number, one.name, one.images) for one in members] == [
        (0, "beta", 20),
        (1, "gamma", 12),
        (2, "alpha", 8),
    ]
    assert members[0].label_names == ("dark", "bright")


def test_hospitals_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(
        FederationError, match=r"\('clinic-0'\) and hospital 2 \('clinic-1'\) differ"
    ):
        check_members([member(0), member(1, resolution=32)], 2)
    with pytest.raises(FederationError, match="differ in exclusive"):
        check_members([member(0), member(1, exclusive=False)], 2)
    with pytest.raises(FederationError, match="partition-id"):
        check_members([member(0), member(0)], 2)
    with pytest.raises(FederationError, match="partition-id"):
        check_members([member(0), member(2)], 2)


# --- lines -----------------------------------------------------------------------------------------


def test_a_round_has_one_line_even_when_it_was_repeated_or_torn(tmp_path: Path) -> None:
    run = RunFolder.at(tmp_path)
    for number in (1, 2, 3):
        write_line(run, {"round": number, "try": 1})
    with open(run.metrics, "a") as stream:
        stream.write('{"round": 4, "tr')
    write_line(run, {"round": 2, "try": 2})
    assert files.read_json_lines(run.metrics) == [{"round": 1, "try": 1}, {"round": 2, "try": 2}]
    assert run.metrics.read_text().count("\n") == 2


def test_nothing_of_a_message_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2, rounds=1, kimg=0.008)
    with caplog.at_level(logging.DEBUG):
        federate(settings, RunFolder.at(tmp_path / "run"), app)
    assert "alpha-" not in caplog.text  # no patient
    assert str(tmp_path) not in caplog.text  # no path


def test_two_hospitals_of_one_name_are_refused_whenever_they_come(tmp_path: Path) -> None:
    first, other = member(0, name="xrays"), member(1, name="xrays")
    with pytest.raises(FederationError, match="give each shard a name of its own"):
        check_members([first, other], 2)
    there = Attendance(
        tiny(tmp_path),
        RunFolder.at(tmp_path / "run"),
        {},
        [first],
        lambda event: None,
        reconnecting=True,
    )
    state: Any = SimpleNamespace(participants=[first.participant(0)], phantoms=False, round=3)
    with pytest.raises(
        FederationError, match=r"hospital 2 \('xrays'\) has the name of another hospital"
    ):
        there._admit(other, state)
    assert (len(state.participants), list(there.members)) == (1, [0])
