"""Exchange between server and hospitals: requests, replies, states, introductions."""

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
from server.metrics import finite_numbers
from server.records import array_bytes, check_reply, personalize, to_record
from server.requests import LATE, MAX_ATTEMPTS, NOT_AWAITED, OFFLINE, send_and_receive
from server.roster import bind_key, find_misfits, kind_of, read_member, wait_for_members


@pytest.fixture(autouse=True)
def identity() -> None:
    """Set the task identity that Flower's Message needs."""
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


def request(node: int = 100, **config: object) -> Message:
    records = {
        "arrays": to_record({"ema/w": np.ones(3, np.float32)}),
        "config": ConfigRecord(config),
    }  # type: ignore[arg-type]
    message = Message(RecordDict(records), node, "train")
    message.metadata.__dict__["_message_id"] = "request"
    return message


def reply_with(arrays: dict[str, np.ndarray], to: Message | None = None) -> Message:
    content = {
        "arrays": ArrayRecord({k: Array(v) for k, v in arrays.items()}),
        "metrics": MetricRecord({"num_examples": 5}),
    }
    return Message(RecordDict(content), reply_to=to or request())


def grid(hospitals: int, fault: Callable[[int, Message], Message | None] | None = None) -> Any:
    return LocalGrid(hospitals, app, fault)


# --- a whole run without Ray ----------------------------------------------------------------------


def test_only_exchanged_parts_travel_and_bytes_are_counted(tmp_path: Path) -> None:
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
    # rounds, hospitals, directions, bytes of float32
    assert meta["bytes_exchanged"] == 2 * 2 * 2 * 4 * numbers
    states = [
        load_tensors(run.hospital_state(name) / "state-00002.safetensors")[0]
        for name in ("alpha", "beta")
    ]
    assert not states[0]["discriminator/" + _first(states[0], "discriminator/")].equal(
        states[1]["discriminator/" + _first(states[1], "discriminator/")]
    )


def _first(tensors: dict[str, object], prefix: str) -> str:
    """Name of the largest tensor of a part."""
    return max(
        (key for key in tensors if key.startswith(prefix)), key=lambda key: tensors[key].numel()
    ).removeprefix(prefix)  # type: ignore[attr-defined]


def test_mean_of_models_is_independent_of_reply_order(
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


def test_image_budgets_of_rounds_add_up_per_hospital(tmp_path: Path) -> None:
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


def test_hospitals_keep_only_their_last_states(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2, rounds=5, kimg=0.04)
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    states = sorted(path.name for path in run.hospital_state("alpha").glob("*.safetensors"))
    assert states == [f"state-{number:05d}.safetensors" for number in (3, 4, 5)]
    assert len(states) == KEEP_STATES
    assert sorted(path.name for path in run.checkpoints.glob("*.safetensors")) == [
        f"round-0000{number}.safetensors" for number in (3, 4, 5)
    ]


def test_failure_of_a_hospital_reveals_only_kind_and_step(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2, rounds=3, kimg=0.024)
    run = RunFolder.at(tmp_path / "run")

    def damage(number: int, message: Message) -> None:
        if message.content.config_records["config"].get("round") == 2:
            (run.hospital_state("beta") / "experiment.json").write_text("{")

    with pytest.raises(FederationError) as caught:
        federate(settings, run, app, damage)
    assert str(caught.value) == (
        "hospital 2 ('beta') failed in round 2: CheckpointError while comparing the request with "
        "its pinned settings"
    )
    log = (run.hospital_state("beta") / "client.log").read_text()
    assert "Traceback" in log
    assert str(run.path) in log


def test_checkpoint_of_another_experiment_is_refused(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2, rounds=2, kimg=0.016)
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    with pytest.raises(CheckpointError, match="another experiment"):
        load_state(run, "another")
    state = load_state(run, experiment_of(run))
    assert state is not None
    assert state.round == 2


def test_deployed_hospital_uses_the_paths_of_its_node_config(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", (16, 24))
    settings = tiny(tmp_path / "nowhere", hospitals=2)
    train_request = TrainRequest(settings, "exp-1", str(tmp_path / "run"))
    local = find_local_hospital(
        train_request,
        {"partition-id": 1, "data-root": str(data / "alpha"), "state-dir": str(tmp_path / "disk")},
    )
    assert (local.number, local.hospital.name, len(local.hospital.train)) == (1, "alpha", 8)
    assert local.folder == tmp_path / "disk" / "exp-1"


def test_server_cannot_choose_the_state_folder_of_a_hospital(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("section", "key", "accepted", "refused"),
    [
        ("training", "learning_rate", (0.0, 0.1), (0.11, 1e30)),
        ("privacy", "max_grad_norm", (1e-3, 1e3), (9e-4, 1.1e3)),
        ("privacy", "client_clip", (1e-3, 1e3), (9e-4, 1.1e3)),
        ("privacy", "images_per_patient", (0, 100), (-1, 10**6)),
    ],
)
def test_hospital_bounds_the_rates_and_clips_of_a_request(
    section: str, key: str, accepted: tuple[float, ...], refused: tuple[float, ...]
) -> None:
    def read(value: float) -> TrainRequest:
        tree = to_dict(tiny(Path("data")))
        tree[section][key] = value
        return TrainRequest.read({"settings": json.dumps(tree), "experiment": "e"})

    for value in accepted:
        assert getattr(getattr(read(value).settings, section), key) == value
    for value in refused:
        with pytest.raises(ConfigError, match=f"{section}.{key}"):
            read(value)


def test_server_paths_are_used_only_in_a_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_shards(tmp_path / "data", (16, 24))
    train_request = TrainRequest(tiny(data, hospitals=2), "e", str(tmp_path / "run"))
    own = {"partition-id": 0, "data-root": str(data / "alpha")}
    for node in ({"partition-id": 0}, {"partition-id": 0, "num-partitions": 2}, own):
        with pytest.raises(ConfigError, match=r"this node names no (data-root|state-dir)"):
            find_local_hospital(train_request, node)
        assert log_folder(train_request, node) is None
    assert (
        log_folder(train_request, {"partition-id": 0, "state-dir": str(tmp_path / "disk")})
        == tmp_path / "disk"
    )

    monkeypatch.setenv(SIMULATION, "1")
    assert log_folder(train_request, own) is None  # own data: never the server's paths
    assert (
        find_local_hospital(train_request, {"partition-id": 0}).folder
        == tmp_path / "run" / "hospitals" / "beta"
    )
    monkeypatch.delenv(SIMULATION)
    # an actor of `flwr run`
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    assert find_local_hospital(train_request, {"partition-id": 1}).hospital.name == "alpha"


def test_partition_id_without_hospital_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SIMULATION, "1")
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2)
    with pytest.raises(ConfigError, match="partition-id = 2, but there are 2 hospitals"):
        find_local_hospital(TrainRequest(settings, "e", str(tmp_path)), {"partition-id": 2})


def test_unreadable_shard_fails_before_the_first_round(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2)
    run = RunFolder.at(tmp_path / "run")

    def remove(number: int, message: Message) -> None:
        (tmp_path / "data" / "beta" / "images.npy").unlink(missing_ok=True)

    from client import hospital as hospital_module

    hospital_module._open_all.cache_clear()
    with pytest.raises(
        FederationError,
        match=r"a hospital could not join: DataError while opening its shard \(partition-id \d\)$",
    ):
        federate(settings, run, app, remove)


# --- one reply ------------------------------------------------------------------------------------


def test_each_hospital_receives_its_own_number_of_images() -> None:
    message = request(node=7, round=3)
    personal_message = personalize(message, {"images": 11, "planned": 99, "batch": 4}, 30.0)
    assert personal_message.content.config_records["config"]["images"] == 11
    assert personal_message.content.config_records["config"]["batch"] == 4
    assert personal_message.metadata.ttl == 30.0
    assert "images" not in message.content.config_records["config"]


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"ema/w": np.ones(4, np.float32)}, "expected float32"),
        ({"ema/w": np.ones(3, np.float64)}, "with float64"),
        ({"ema/v": np.ones(3, np.float32)}, "other arrays"),
        ({"ema/w": np.array([1, np.nan, 2], np.float32)}, "not finite"),
    ],
)
def test_reply_with_wrong_arrays_is_refused(arrays: dict[str, np.ndarray], text: str) -> None:
    with pytest.raises(FederationError, match=rf"hospital 1 \('clinic-0'\) .*{text}"):
        check_reply(member(0), reply_with(arrays), {"ema/w": np.ones(3, np.float32)})


def test_valid_reply_passes_the_check() -> None:
    sent = {"ema/w": np.ones(3, np.float32)}
    check_reply(member(0), reply_with(sent), sent)
    assert array_bytes(reply_with(sent)) == 12


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
def test_failure_reasons_are_shown_only_if_listed(reason: str, code: int, shown: str) -> None:
    def fault(number: int, message: Message) -> Message | None:
        return error_reply(message, reason, code) if number == 1 else reply_with({}, message)

    found = send_and_receive(
        grid(2, fault), [1000, 999], lambda node, left: request(node), timeout=60
    )
    assert found.failures == {999: shown}
    assert list(found.received) in ([], [1000])  # the wait ends with the first failure


def test_late_hospitals_are_reported() -> None:
    def fault(number: int, message: Message) -> Message | None:
        if number:
            raise LookupError
        return reply_with({}, message)

    found = send_and_receive(
        grid(3, fault), [1000, 999, 998], lambda node, left: request(node), timeout=0.3
    )
    assert (list(found.received), found.failures) == ([1000], {999: LATE, 998: LATE})


def test_wait_ends_when_too_few_hospitals_can_reply() -> None:
    def fault(number: int, message: Message) -> Message | None:
        if number == 2:
            return error_reply(message, "broken")
        raise LookupError

    found = send_and_receive(
        grid(3, fault), [1000, 999, 998], lambda node, left: request(node), timeout=60
    )
    assert found.failures[998] == "an error that its own log explains"
    assert found.failures[1000] == found.failures[999] == NOT_AWAITED


def test_one_failure_does_not_end_the_wait_with_a_quorum() -> None:
    def fault(number: int, message: Message) -> Message | None:
        return error_reply(message, "broken") if number == 2 else reply_with({}, message)

    found = send_and_receive(
        grid(3, fault),
        [1000, 999, 998],
        lambda node, left: request(node),
        timeout=60,
        min_replies=2,
    )
    assert sorted(found.received) == [999, 1000]


def test_reconnected_hospital_receives_the_request_again() -> None:
    tries: list[int] = []

    def fault(number: int, message: Message) -> Message | None:
        tries.append(number)
        return (
            error_reply(message, "Node Unavailable", 5)
            if tries.count(1) == 1 and number == 1
            else reply_with({}, message)
        )

    found = send_and_receive(
        grid(2, fault),
        [1000, 999],
        lambda node, left: request(node),
        timeout=60,
        reconnecting=True,
    )
    assert sorted(found.received) == [999, 1000]
    assert sorted(tries) == [0, 1, 1]


def test_client_errors_are_not_retried_and_dead_processes_a_few_times() -> None:
    for reason, code, expected_tries in (
        ("hospital: DataError while opening its shard", 2, 1),
        ("ClientApp stopped responding.", 8, MAX_ATTEMPTS),
    ):
        tries: list[int] = []

        def fault(number: int, message: Message) -> Message:
            tries.append(number)  # noqa: B023
            return error_reply(message, reason, code)  # noqa: B023

        with mock.patch("server.requests.ONLINE_POLL", 0.0):
            send_and_receive(
                grid(1, fault),
                [1000],
                lambda node, left: request(node),
                timeout=60,
                reconnecting=True,
            )
        assert len(tries) == expected_tries


def test_absent_hospital_receives_no_request() -> None:
    empty_grid = grid(1)
    empty_grid.nodes = {}
    found = send_and_receive(
        empty_grid, [1000], lambda node, left: request(node), timeout=0.3, reconnecting=True
    )
    assert found.failures == {1000: OFFLINE}
    assert empty_grid.sent == []


# --- introductions --------------------------------------------------------------------------------


def test_wait_for_hospitals_is_bounded(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 40, 24)), "federation.join_timeout=1")
    config = {"settings": json.dumps(to_dict(settings)), "experiment": "e", "run": str(tmp_path)}
    with pytest.raises(FederationError, match="2 of 3 hospitals came online within 1 s"):
        wait_for_members(grid(2), settings, config)
    with pytest.raises(ConfigError, match="4 nodes for"):
        wait_for_members(grid(4), settings, config)


def test_quorum_starts_without_an_absent_hospital(tmp_path: Path) -> None:
    settings = tiny(
        write_shards(tmp_path / "data", (16, 40, 24)),
        "federation.join_timeout=1",
        "federation.min_hospitals=2",
    )
    config = {"settings": json.dumps(to_dict(settings)), "experiment": "e", "run": str(tmp_path)}
    members, refused = wait_for_members(grid(2), settings, config)
    assert ([member.number for member in members], refused) == ([0, 1], {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("number", 3),
        ("number", -1),
        ("name", "../../etc"),
        ("name", "a\nb"),
        ("name", "a\x9bb"),
        ("name", "a\u202eb"),
        ("label_names", ["da\u200brk"]),
        ("name", ".."),
        ("name", "x" * 65),
        ("images", 0),
        ("label_names", ["dark", "../x"]),
        ("label_names", "dark"),
        ("resolution", 64),
        ("channels", 1000),
        ("exclusive", 1),
    ],
)
def test_invalid_introduction_is_refused(key: str, value: Any, tmp_path: Path) -> None:
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
    right = Message(RecordDict({"hospital": ConfigRecord(facts)}), reply_to=request())
    assert read_member(7, right, settings).name == "a"
    wrong = Message(
        RecordDict({"hospital": ConfigRecord(facts | {key: value})}), reply_to=request()
    )
    with pytest.raises(FederationError, match=f"impossible {key}"):
        read_member(7, wrong, settings)


def test_hospitals_are_sorted_by_number(tmp_path: Path) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 40, 24)))
    config = {"settings": json.dumps(to_dict(settings)), "experiment": "e", "run": str(tmp_path)}
    members, _ = wait_for_members(grid(3), settings, config)
    assert [(one.number, one.name, one.images) for one in members] == [
        (0, "beta", 20),
        (1, "gamma", 12),
        (2, "alpha", 8),
    ]
    assert members[0].label_names == ("dark", "bright")


def test_more_images_than_the_key_allows_are_refused(tmp_path: Path) -> None:
    facts = {"number": 0, "name": "a", "images": 5, "label_names": ["dark"], "exclusive": True}
    facts |= {"channels": 1, "resolution": 16}
    reply = Message(RecordDict({"hospital": ConfigRecord(facts)}), reply_to=request())
    settings = tiny(tmp_path)
    for registered in ("north", "north=5", "north=many"):
        assert read_member(7, reply, settings, registered).images == 5
    with pytest.raises(
        FederationError, match=r"'north' reports 5 training images, and its key .* 4"
    ):
        read_member(7, reply, settings, "north=4")
    with pytest.raises(FederationError, match=r"federation\.max_num_examples allows 3"):
        read_member(7, reply, tiny(tmp_path, "federation.max_num_examples=3"), "north=9")


@pytest.mark.parametrize(
    ("members", "misfits", "text"),
    [
        ([member(0), member(1), member(2, resolution=32)], [102], "differ in resolution"),
        ([member(0, label_names=("b",)), member(1), member(2)], [100], "differ in label_names"),
        ([member(0), member(1, exclusive=False), member(2)], [101], "differ in exclusive"),
        ([member(0), member(0, node=7), member(1)], [7, 100], "partition-id"),
        ([member(0, name="x"), member(1, name="x"), member(2)], [100, 101], "unique name"),
    ],
    ids=["resolution", "labels of the first", "exclusive", "number", "name"],
)
def test_misfit_is_left_out_and_the_others_stay(
    members: list[Member], misfits: list[int], text: str
) -> None:
    found = find_misfits(members)
    assert sorted(found) == misfits
    assert all(text in str(error) for error in found.values())


def test_number_and_name_belong_to_the_key_that_joined() -> None:
    joined = [member(0, key="north").participant(0), member(1, key="south").participant(0)]
    rotated = member(0, node=5, key="north")
    assert find_misfits([rotated, member(1, key="south")], joined) == {}
    wrong = {
        "the number of hospital 1": member(0, key="mallory", name="m"),
        "the name of another hospital": member(2, key="mallory", name="clinic-0"),
        "give it partition-id 0 again": member(2, key="north", name="n"),
        "give it the shard that it began with": member(0, key="north", images=11),
    }
    for text, misfit in wrong.items():
        (error,) = find_misfits([rotated, misfit], joined, kind=kind_of(misfit)).values()
        assert text in str(error)
    unbound = [member(0).participant(0)]  # of a run that began without keys
    assert find_misfits([member(0, name="north", key="north")], unbound) == {}


def test_registered_name_holds_whatever_the_introduction_says() -> None:
    names = {100: "north=9", 101: "south"}
    bound = bind_key(member(0), names)
    assert (bound.name, bound.key) == ("north", "north")
    assert bind_key(member(0), {100: ""}).key == "node 100"
    with pytest.raises(FederationError, match=r"\('south'\) has the name of another"):
        bind_key(member(0, name="south"), names)


def test_unlisted_numbers_of_a_reply_reach_no_metrics() -> None:
    facts = {"loss_g": 1.5, "name": 2.0, "\x1b[31m": 3.0, "epsilon": float("inf")}
    assert finite_numbers(facts) == {"loss_g": 1.5, "epsilon": None}


# --- lines ----------------------------------------------------------------------------------------


def test_repeated_round_replaces_its_line_in_metrics(tmp_path: Path) -> None:
    run = RunFolder.at(tmp_path)
    line = {
        "images_seen": 4,
        "wall_seconds": 1.0,
        "bytes_exchanged": 8,
        "mean": {},
        "hospitals": [],
    }
    for number in (1, 2, 3):
        write_line(run, {"round": number, **line})
    with open(run.metrics, "a") as stream:
        stream.write('{"round": 4, "tr')
    again = {"round": 2, **line, "images_seen": 5}
    write_line(run, again)
    assert files.read_json_lines(run.metrics) == [{"round": 1, **line}, again]
    assert run.metrics.read_text().count("\n") == 2


def test_log_holds_no_patient_and_no_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = tiny(write_shards(tmp_path / "data", (16, 16)), hospitals=2, rounds=1, kimg=0.008)
    with caplog.at_level(logging.DEBUG):
        federate(settings, RunFolder.at(tmp_path / "run"), app)
    assert "alpha-" not in caplog.text  # no patient
    assert str(tmp_path) not in caplog.text  # no path
