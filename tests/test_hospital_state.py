"""What a hospital keeps of an experiment: its pinned settings, its states, and their loss."""

from __future__ import annotations

import copy
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key
from small_federation import NAMES, LocalGrid, NoEvaluator, ledger_in, tiny, write_shards

from client import hospital as hospital_module
from client.app import app
from client.hospital import KEEP_STATES
from fedgan import files
from fedgan.config import from_dict, to_dict
from fedgan.errors import FederationError
from fedgan.files import LOCK
from fedgan.files import locked as held
from fedgan.run_folder import RunFolder
from fedgan.runs.preparation import experiment_of, prepare_run
from fedgan.runs.round_state import load_state
from server.federation import Federation

PRIVATE = (
    "privacy.noise_multiplier=1",
    "privacy.delta=0.01",
    "model.minibatch_std_group=0",
    "augment.mode=fixed",
    "training.r1_gamma=0",
    "training.labels=uniform",
)
Damage = Callable[[Path, int], None]  # state folder of hospital 0, round that begins


class Deployed:
    """A federation of hospitals with a node-config; keeps the requests of hospital 0.

    `damage(folder, round)` is called before hospital 0 gets the first message of a round.
    """

    def __init__(
        self,
        tmp_path: Path,
        *overrides: str,
        rounds: int = 3,
        hospitals: int = 2,
        damage: Damage = lambda folder, number: None,
    ) -> None:
        self.data = write_shards(tmp_path / "data", (24, 16, 16)[:hospitals])
        self.run, self.state = RunFolder.at(tmp_path / "run"), tmp_path / "state"
        kimg = 0.008 * rounds * hospitals
        settings = tiny(self.data, *overrides, hospitals=hospitals, rounds=rounds, kimg=kimg)
        prepare_run(settings, self.run)
        self.folder = self.state / NAMES[0] / experiment_of(self.run)
        self.requests: list[Message] = []
        self.events: list[dict[str, Any]] = []
        self.begun, self.damage = {0}, damage
        self.grid = LocalGrid(hospitals, app, self._before, self.node)

    def node(self, number: int) -> dict[str, str]:
        folders = {"data-root": self.data, "state-dir": self.state}
        return {key: str(folder / NAMES[number]) for key, folder in folders.items()}

    def _before(self, number: int, message: Message) -> None:
        if number == 0:
            self.requests.append(copy.deepcopy(message))
            if (current := self.round_of(message)) not in self.begun:
                self.begun.add(current)
                self.damage(self.folder, current)

    @staticmethod
    def round_of(message: Message) -> int:
        return int(message.content.config_records["config"].get("round", 0))  # type: ignore[arg-type]

    def train(self) -> Deployed:
        settings, experiment = self.run.settings(), experiment_of(self.run)
        federation = Federation(settings, self.run, experiment, NoEvaluator(), self.events.append)
        federation.train(self.grid)  # type: ignore[arg-type]
        return self

    def send(
        self,
        kind: str,
        number: int,
        *overrides: str,
        stage: str = "",
        ttl: float = 60.0,
        **config: Any,
    ) -> str:
        """Reason of the error reply of hospital 0 to a changed request of a round; '' for none."""
        (message, *_) = [
            copy.deepcopy(each)
            for each in self.requests
            if each.metadata.message_type == kind
            and self.round_of(each) == number
            and stage
            in ("", (each.content.config_records.get(RECORD_KEY_CONFIGS) or {}).get(Key.STAGE))
        ]
        message.metadata.ttl = ttl
        record = message.content.config_records["config"]
        settings = from_dict(json.loads(str(record["settings"])), overrides)
        record["settings"] = json.dumps(to_dict(settings))
        for key, value in config.items():
            record[key] = value
        node: Any = {"partition-id": 0, "num-partitions": 2} | self.node(0)
        context = Context(
            run_id=1, node_id=1000, node_config=node, state=RecordDict(), run_config={}
        )
        reply = app(message, context)
        return str(reply.error.reason) if reply.has_error() else ""

    def states(self) -> list[int]:
        return sorted(int(path.stem[-5:]) for path in self.folder.glob("state-*.json"))

    def log(self) -> str:
        return (self.folder / "client.log").read_text()

    def rows(self) -> list[dict[str, Any]]:
        """The part of hospital 0 in each round's line of metrics.jsonl."""
        return [line["hospitals"][0] for line in files.read_json_lines(self.run.metrics)]


# --- pinned settings ------------------------------------------------------------------------------

PINNED = "hospital: ConfigError while comparing the request with its pinned settings"


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """A private run of one round."""
    return Deployed(tmp_path_factory.mktemp("private"), *PRIVATE, rounds=1).train()


@pytest.mark.parametrize(
    "overrides",
    [
        ("privacy.noise_multiplier=-1",),
        ("privacy.noise_multiplier=0.5",),
        ("privacy.max_grad_norm=9",),
        ("privacy.unit=image",),
        ("federation.exchange=generator",),
        ("federation.delta=true",),
        ("federation.secure=true",),
        ("training.labels=data", "privacy.label_noise=1"),
    ],
)
@pytest.mark.parametrize("kind", ["train", "query.hello"])
def test_request_that_differs_from_pinned_settings_is_refused(
    private: Deployed, kind: str, overrides: tuple[str, ...]
) -> None:
    before = private.states()
    assert private.send("query.hello", 0) == ""
    reason = private.send(kind, 1 if kind == "train" else 0, *overrides)
    assert reason == PINNED
    assert f"{overrides[0].partition('=')[0]} = " in private.log()
    assert private.states() == before


def test_request_with_less_noise_than_pinned_is_refused(private: Deployed) -> None:
    assert private.send("train", 1, planned=1) == PINNED
    assert private.send("train", 1, batch=1) == PINNED
    label = private.folder / "experiment.json"
    kept = label.read_text()
    content = json.loads(kept)
    content["pinned"]["least_noise"] = 2.0
    files.write_json(label, content)
    assert private.send("train", 1, least_noise=1.5) == PINNED
    assert private.send("train", 1, least_noise=2.5) == ""  # a hospital has joined
    label.write_text(kept)


def test_request_for_more_images_than_planned_is_refused(private: Deployed) -> None:
    assert private.send("train", 1, images=12) == PINNED
    assert "the noise of this run was chosen for 8 images" in private.log()


def test_other_settings_may_change_between_rounds(private: Deployed) -> None:
    assert private.send("train", 1, "training.learning_rate=0.001", "federation.trim=0.1") == ""


def test_label_counts_stay_where_pinned_settings_exclude_them(tmp_path: Path) -> None:
    run = Deployed(tmp_path, rounds=1).train()
    assert run.send("query.hello", 0) == ""
    assert run.send("query.hello", 0, "federation.share_label_counts=true") == PINNED


@pytest.mark.parametrize("stage", ["setup", "share_keys", "collect_masked_vectors", "unmask"])
def test_pinned_settings_hold_in_every_secure_message(secure: Deployed, stage: str) -> None:
    assert secure.send("train", 1, "federation.secure=false", stage=stage) == PINNED
    assert secure.send("train", 1, "federation.delta=true", stage=stage) == PINNED


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    folder = tmp_path_factory.mktemp("secure")
    return Deployed(folder, "federation.secure=true", rounds=1, hospitals=3).train()


def test_first_message_of_a_secure_round_pins_the_settings(tmp_path: Path) -> None:
    def stop(folder: Path, number: int) -> None:
        raise LookupError  # hospital 0 never gets it

    rules = ("federation.secure=true", "federation.round_timeout=1")
    with pytest.raises(FederationError):
        Deployed(tmp_path, *rules, rounds=1, hospitals=3, damage=stop).train()
    (beta,) = (tmp_path / "state" / "beta").glob("*/experiment.json")
    assert json.loads(beta.read_text())["pinned"]["federation.secure"] is True
    assert not list(beta.parent.glob("state-*"))


def test_settings_pinned_by_another_process_are_compared_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another first request pins its settings while this one waits for the lock."""
    run = Deployed(tmp_path, rounds=1).train()
    pinned = json.loads((run.folder / "experiment.json").read_text())
    pinned["pinned"]["federation.delta"] = True
    shutil.rmtree(run.folder)
    locked = hospital_module.LocalHospital.locked

    def wait(local: Any, *arguments: Any) -> Any:
        files.write_json(run.folder / "experiment.json", pinned)
        return locked(local, *arguments)

    monkeypatch.setattr(hospital_module.LocalHospital, "locked", wait)
    assert run.send("train", 1) == PINNED
    assert run.states() == []


def test_hospital_added_on_a_resume_changes_no_plan_of_others(tmp_path: Path) -> None:
    """Two of three pin their plans in a round 1 that fails; the third comes with the resume."""

    def lose(folder: Path, number: int) -> None:
        raise LookupError

    rules = (
        "federation.min_hospitals=2",
        "federation.join_timeout=1",
        "federation.round_timeout=1",
    )
    run = Deployed(tmp_path, *PRIVATE, *rules, rounds=2, hospitals=3, damage=lose)
    last = run.grid.nodes.pop(998)
    with pytest.raises(FederationError, match="did not reply in round 1"):
        run.train()
    run.grid.nodes[998] = last
    run.train()
    state = load_state(run.run, experiment_of(run.run))
    assert state is not None
    assert [(row.number, row.joined) for row in state.participants] == [(0, 0), (1, 0), (2, 1)]


def test_lost_states_do_not_lose_the_pinned_settings(tmp_path: Path) -> None:
    run = Deployed(tmp_path, rounds=1).train()
    for path in run.folder.glob("state-*"):
        path.unlink()
    assert run.send("train", 1, "federation.exchange=generator") == PINNED
    (run.folder / "experiment.json").write_text('{"experiment": ')
    reason = run.send("train", 1)
    assert reason == PINNED.replace("ConfigError", "CheckpointError")
    assert "put back a copy, or delete it" in run.log()


# --- lost states ----------------------------------------------------------------------------------


def cut(folder: Path, suffix: str) -> None:
    for path in folder.glob(f"state-00002{suffix}"):
        path.write_bytes(path.read_bytes()[:-100])


def foreign(folder: Path) -> None:
    """State 2 becomes that of the other hospital."""
    (other,) = (folder.parent.parent / NAMES[1]).glob("*/state-00002.json")
    for source in (other, other.with_suffix(".safetensors")):
        shutil.copy(source, folder / source.name)


def remove(folder: Path, *names: str) -> None:
    for name in names:
        for path in folder.glob(name):
            path.unlink()


@pytest.mark.parametrize(
    ("damage", "continued_from"),
    [
        (lambda folder: cut(folder, ".safetensors"), 1),
        (lambda folder: cut(folder, ".json"), 1),
        (lambda folder: remove(folder, "state-00002.json"), 1),
        (lambda folder: remove(folder, "state-00002.safetensors"), 1),
        (lambda folder: (folder / "state-00002.json").write_text("[]"), 1),
        (foreign, 1),
        (lambda folder: remove(folder, "state-*"), 0),
        (shutil.rmtree, 0),
    ],
    ids=["tensors", "json", "no json", "no tensors", "list", "foreign", "states", "folder"],
)
def test_hospital_continues_after_the_loss_of_its_state(
    tmp_path: Path, damage: Callable[[Path], object], continued_from: int
) -> None:
    def lose(folder: Path, number: int) -> None:
        if number == 3:
            damage(folder)

    run = Deployed(tmp_path, rounds=4, damage=lose).train()
    assert run.run.last_round() == 4
    rows = run.rows()
    assert [row.get("continued_from") for row in rows] == [None, None, continued_from, None]
    assert rows[2]["images_seen"] == 8 * (continued_from + 1)
    assert rows[2]["images"] == 8
    (note,) = [event["text"] for event in run.events if event["event"] == "note"]
    assert note.startswith("in round 3 'alpha' had lost its state and ")
    whole = f"round 3 continues from its state of round {continued_from}"
    assert (whole if continued_from else "round 3 starts anew from the server's model") in run.log()
    assert str(tmp_path) not in run.run.metrics.read_text()
    assert json.loads((run.folder / "experiment.json").read_text())["pinned"]


def test_missing_experiment_json_is_written_again_and_logged(tmp_path: Path) -> None:
    def lose(folder: Path, number: int) -> None:
        if number == 2:
            (folder / "experiment.json").unlink()

    run = Deployed(tmp_path, rounds=2, damage=lose).train()
    assert "continued_from" not in run.rows()[1]
    assert "experiment.json was lost: this experiment's settings are pinned anew" in run.log()
    assert run.send("train", 2, "federation.exchange=generator") == PINNED


def test_lost_state_loses_no_entry_of_the_privacy_ledger(tmp_path: Path) -> None:
    counts: list[int] = []

    def lose(folder: Path, number: int) -> None:
        counts.append(len(ledger_in(tmp_path / "data" / "alpha").entries()))
        remove(folder, "state-*")

    run = Deployed(tmp_path, *PRIVATE, rounds=3, damage=lose).train()
    ledger = ledger_in(tmp_path / "data" / "alpha")
    assert [*counts, len(ledger.entries())] == [0, 1, 2, 3]
    spent = [row["epsilon"] for row in run.rows()]
    assert spent == sorted(set(spent))
    assert [row.get("continued_from") for row in run.rows()] == [None, 0, 0]


def test_lost_state_with_control_variates_is_an_error(tmp_path: Path) -> None:
    def lose(folder: Path, number: int) -> None:
        if number == 2:
            remove(folder, "state-00001.json")

    rules = ("federation.control_variates=true", "federation.local_images=equal")
    with pytest.raises(
        FederationError, match=r"'alpha'\) failed in round 2: CheckpointError while loading"
    ):
        Deployed(tmp_path, *rules, rounds=2, damage=lose).train()


def test_other_name_of_the_training_handler_is_refused(tmp_path: Path) -> None:
    """Flower calls the same handler for train.default, past every rule about `train`."""
    fresh = Deployed(tmp_path, *PRIVATE, rounds=1)
    fresh.train()
    (message, *_) = [each for each in fresh.requests if each.metadata.message_type == "train"]
    shutil.rmtree(fresh.folder)
    message.metadata.message_type = "train.default"
    assert fresh.send("train.default", 1).startswith(
        "hospital: ConfigError while reading the request"
    )
    assert not fresh.states()
    assert not (fresh.folder / "experiment.json").exists()


def test_state_of_another_device_is_an_error_and_kept(tmp_path: Path) -> None:
    def move(folder: Path, number: int) -> None:
        if number == 2:
            path = folder / "state-00001.json"
            path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
            assert '"cuda"' in path.read_text()

    deployed = Deployed(tmp_path, rounds=2, damage=move)
    with pytest.raises(FederationError, match="CheckpointError while loading its state of round 1"):
        deployed.train()
    assert deployed.states() == [1]


def test_state_of_other_images_is_an_error(tmp_path: Path) -> None:
    def change(folder: Path, number: int) -> None:
        if number == 2:
            shutil.rmtree(tmp_path / "data" / "alpha")
            names = (*("x", "y"), NAMES[0])
            write_shards(tmp_path / "other", (16, 16, 24), names=names)
            (tmp_path / "other" / NAMES[0]).rename(tmp_path / "data" / "alpha")
            hospital_module._open_own.cache_clear()

    with pytest.raises(FederationError, match="CheckpointError while loading its state of round 1"):
        Deployed(tmp_path, rounds=2, damage=change).train()


# --- old requests and processes -------------------------------------------------------------------

STATES = "hospital: CheckpointError while comparing the request with its states"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """A run of five rounds."""
    return Deployed(tmp_path_factory.mktemp("trained"), rounds=5).train()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_old_request_is_refused_and_deletes_nothing(trained: Deployed, number: int) -> None:
    before = {path.name: path.read_bytes() for path in trained.folder.glob("state-*")}
    assert trained.send("train", number) == STATES
    assert {path.name: path.read_bytes() for path in trained.folder.glob("state-*")} == before
    assert "is older than this hospital's state of round 5" in trained.log()


def test_repeated_round_keeps_the_states_of_later_rounds(trained: Deployed) -> None:
    assert trained.states() == [3, 4, 5]
    assert len(trained.states()) == KEEP_STATES
    assert trained.send("train", 4) == ""  # a server that lost rounds 4 and 5
    assert trained.states() == [3, 4, 5]
    assert trained.send("train", 5) == ""
    assert trained.states() == [3, 4, 5]


def test_first_round_can_be_repeated_without_losing_states(tmp_path: Path) -> None:
    run = Deployed(tmp_path, rounds=2).train()
    assert run.send("train", 1) == ""
    assert run.states() == [1, 2]
    assert run.send("train", 2) == ""


def test_request_waits_for_the_process_that_trains(trained: Deployed) -> None:
    def release_later() -> None:
        with held(trained.folder, 0.0):
            entered.set()
            time.sleep(0.5)

    entered = threading.Event()
    thread = threading.Thread(target=release_later)
    thread.start()
    entered.wait(10)
    assert trained.send("train", 5) == ""
    thread.join()
    assert "round 5 waits for another process that trains this hospital" in trained.log()
    assert not (trained.folder / LOCK).exists()


def test_request_is_refused_when_the_other_process_does_not_end(trained: Deployed) -> None:
    with held(trained.folder, 0.0):
        assert trained.send("train", 5, ttl=0.3) == (
            "hospital: ConfigError while waiting for its other process"
        )
        assert trained.send("query.hello", 0) == ""  # describes the hospital, and trains nothing


def test_files_of_killed_processes_are_removed(trained: Deployed) -> None:
    names = (".state-00005.safetensors.abc.part", "progress.part", "x.tmp")
    for name in names:
        (trained.folder / name).write_bytes(b"half")
    assert trained.send("train", 5) == ""
    assert not any((trained.folder / name).exists() for name in names)


# --- client.log -----------------------------------------------------------------------------------


def test_texts_of_the_server_are_one_visible_line_of_the_log(trained: Deployed) -> None:
    note = (
        "late\n--- 2026-01-01 00:00:00, all is well \x1b[2J\x9b\u202e\u200b\u2028" + "x" * 600_000
    )
    before = trained.log()
    assert trained.send("train", 5, note=note) == ""
    (line,) = [line for line in trained.log()[len(before) :].splitlines() if "note of" in line]
    assert r"late\x0a--- 2026-01-01 00:00:00, all is well \x1b[2J\x9b\u202e\u200b\u2028" in line
    assert len(line) < 400
    assert trained.send("train", 5, settings='{"\x1b[2J\\n--- forged": 1}')
    added = trained.log()[len(before) :]
    assert "\x1b" not in added
    assert not any(text.startswith("--- forged") for text in added.splitlines())
