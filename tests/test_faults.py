"""A deployment in which nearly every process dies once, and the model that results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from loopback import HEARTBEAT, HOST, TASK_HEARTBEAT, Deployment, deployment, needs_haproxy
from small_federation import NAMES, LocalGrid, NoEvaluator, error_reply, tiny, write_shards

from client.app import app as client_app
from fedgan import files
from fedgan.cli import main
from fedgan.config import Settings
from fedgan.run_folder import RunFolder
from fedgan.runs.preparation import experiment_of, prepare_run
from fedgan.training.checkpoint import load_tensors
from server.federation import Federation

SIZES, HOSPITALS = (48, 32, 24), NAMES[:3]
ALPHA, BETA, GAMMA = HOSPITALS
ROUNDS, ROUND_TIMEOUT = 3, 35
WAIT = 240  # seconds at most: every wait ends with an event
# Seconds between heartbeats: deaths that are noticed soon, and absences that are tolerated.
SHORT, LONG = "5", "20"
HEARTBEATS = {
    "superlink": {TASK_HEARTBEAT: LONG},
    "serverapp": {HEARTBEAT: SHORT},
    "node-1": {HEARTBEAT: SHORT, TASK_HEARTBEAT: LONG},
    "node-2": {HEARTBEAT: LONG, TASK_HEARTBEAT: SHORT},
    "node-3": {HEARTBEAT: LONG, TASK_HEARTBEAT: LONG},
    **{f"clientapp-{number}": {HEARTBEAT: SHORT} for number in (1, 2, 3)},
}


def round_of(message: Message) -> int:
    return int(message.content.config_records["config"].get("round", 0))  # type: ignore[arg-type]


def rounds_of(run: RunFolder) -> list[dict[str, Any]]:
    return files.read_json_lines(run.metrics) if run.metrics.is_file() else []


class SlowTask:
    """A message that a hospital begins to work on, and finishes when released.

    `number` counts the messages of the hospital, from 1 on (tests/loopback_site).
    """

    def __init__(self, federation: Deployment, hospital: str, number: int) -> None:
        self.federation = federation
        self.name = f"clientapp-{federation.hospitals.index(hospital) + 1}"
        folder = federation.folder / self.name
        folder.mkdir(exist_ok=True)
        self.slow, self.waiting = folder / "slow", folder / "waiting"
        self.waiting.unlink(missing_ok=True)
        files.write_text(self.slow, str(number))

    def wait(self) -> None:
        """Wait until the hospital works on the message."""
        self.federation.wait(f"{self.name} to begin", self.waiting.exists, WAIT, self.name)

    def release(self) -> None:
        self.slow.unlink()


def scenario_of(
    tmp_path: Path, rounds: int, timeout: int
) -> tuple[RunFolder, Settings, Callable[[int], dict[str, Any]]]:
    """A folder with the scenario, settings of its repetition without deaths, and node-configs."""
    write_shards(tmp_path / "data", SIZES)
    write_shards(tmp_path / "reference", (40,), names=("delta",))
    rules = (
        "federation.min_hospitals=1",
        "federation.join_timeout=1",
        f"federation.round_timeout={timeout}",
        "federation.exchange=['generator']",
    )
    evaluation = (f"evaluation.root={tmp_path / 'reference'}", "evaluation.suite=quick")
    size: dict[str, Any] = {"rounds": rounds, "kimg": 0.036 * rounds}
    scenario = RunFolder.at(tmp_path / "scenario")
    scenario.write_settings(tiny(tmp_path / "nowhere", *evaluation, *rules, **size))
    (tmp_path / "deployment").mkdir()

    def node_config(index: int) -> dict[str, Any]:
        folders = {"data-root": "data", "state-dir": "state"}
        return {"partition-id": index} | {
            key: str(tmp_path / folder / HOSPITALS[index]) for key, folder in folders.items()
        }

    return scenario, tiny(tmp_path / "data", *rules, **size), node_config


@pytest.mark.slow
@needs_haproxy
def test_run_survives_the_death_of_every_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario, undisturbed, node_config = scenario_of(tmp_path, ROUNDS, ROUND_TIMEOUT)
    run = RunFolder.at(tmp_path / "run")
    with deployment(
        tmp_path / "deployment", hospitals=HOSPITALS, node_config=node_config, start=False
    ) as federation:
        federation.heartbeats = dict(HEARTBEATS)
        monkeypatch.setenv("FEDGAN_SUPERLINK", f"{HOST}:{federation.ports['superlink']}")
        monkeypatch.setenv("FEDGAN_CA", str(federation.keys / "ca.crt"))

        def deploy(*words: str, code: int = 0) -> str:
            """Output of `fedgan deploy`, or its error."""
            capsys.readouterr()
            found = main(["deploy", *words])
            out, err = capsys.readouterr()
            assert found == code, err
            return err if code else out

        def wait_round(number: int) -> None:
            federation.wait(f"round {number}", lambda: len(rounds_of(run)) >= number, WAIT)

        # --- round 1: gamma is absent, alpha's SuperNode dies, and beta's ClientApp
        alpha, beta = (SlowTask(federation, hospital, 2) for hospital in (ALPHA, BETA))
        federation.start_all(absent=[GAMMA])
        words = ("--output", str(run.path), "--detach")
        submitted = int(deploy("run", str(scenario.config), *words))
        alpha.wait()
        federation.kill("node-1")
        beta.wait()
        federation.kill_task("clientapp-2")
        beta = SlowTask(federation, BETA, 4)  # after the second message of round 1
        gamma = SlowTask(federation, GAMMA, 2)
        federation.start_hospital(GAMMA)
        federation.heartbeats["node-1"] = HEARTBEATS["node-3"]
        what = "the SuperLink to miss alpha"
        federation.wait(what, lambda: ALPHA not in federation.online(), WAIT, every=2.0)
        federation.restart_until_activated("node-1")
        wait_round(1)
        alpha.release()

        # --- round 2: gamma is too slow, the proxy dies, and the SuperLink
        for task in (beta, gamma):
            task.wait()
        federation.kill("proxy")
        assert federation.health("proxy") is None
        federation.start("proxy")
        federation.wait_healthy("proxy")
        federation.kill("superlink")
        what = "the proxy to miss the SuperLink"
        federation.wait(what, lambda: federation.health("proxy") == 503, WAIT, "proxy")
        federation.wait_log("proxy", "status=503 end=SC", WAIT)  # a hospital's request
        federation.heartbeats["superlink"] = {TASK_HEARTBEAT: SHORT}
        federation.start("superlink")
        federation.wait_healthy("proxy", WAIT)
        beta.release()
        beta = SlowTask(federation, BETA, 5)
        wait_round(2)
        gamma.release()

        # --- round 3: the ServerApp dies
        beta.wait()
        federation.kill_task("serverapp")
        beta.release()
        what = "the SuperLink to miss the ServerApp"
        status = federation.status
        federation.wait(what, lambda: status(submitted) == "finished:failed", WAIT, every=1.0)
        assert f"fedgan deploy resume {run.path}" in deploy("logs", str(submitted), code=5)
        resumed = int(deploy("resume", str(run.path), "--detach"))
        assert federation.wait_finished(resumed, WAIT) == "finished:completed", federation.tails()

    # --- exactly the missing hospitals are named, with the reason
    lines = rounds_of(run)
    assert [line["round"] for line in lines] == [1, 2, 3]
    present = [[row["name"] for row in line["hospitals"]] for line in lines]
    absences = [{row["name"]: row["why"] for row in line.get("absent", [])} for line in lines]
    assert BETA in present[0]  # its second ClientApp has answered; gamma is not known yet
    assert absences[0].keys() <= {ALPHA}  # back in time, or not
    assert set(absences[0].values()) <= {"is not online", "did not reply in time"}
    assert absences[1:] == [{GAMMA: "did not reply in time"}, {}]
    expected = [{ALPHA, BETA}, set(HOSPITALS), set(HOSPITALS)]
    named = [set(names) | set(gone) for names, gone in zip(present, absences, strict=True)]
    assert named == expected
    (log,) = (tmp_path / "state" / GAMMA).rglob("client.log")
    text = "the reply of round 2 did not count (missing: did not reply in time)"
    assert text in log.read_text()
    assert json.loads(run.evaluation.read_text())["round"] == ROUNDS

    # --- the model is that of a federation without deaths in which they were missing
    replayed = RunFolder.at(tmp_path / "replayed")
    prepare_run(undisturbed, replayed)
    again = Federation(
        replayed.settings(), replayed, experiment_of(replayed), NoEvaluator(), reconnecting=True
    )
    again.train(Replay(present))  # type: ignore[arg-type]
    expected_model, model = (load_tensors(each.checkpoint(ROUNDS))[0] for each in (replayed, run))
    assert expected_model.keys() == model.keys()
    differing = [
        key for key, tensor in expected_model.items() if not torch.equal(tensor, model[key])
    ]
    assert differing == []


class Replay(LocalGrid):
    """A grid whose hospitals fail in the rounds where they were missing.

    The nodes `later` join in round 1.
    """

    def __init__(self, present: list[list[str]], later: tuple[int, ...] = (998,)) -> None:
        super().__init__(len(HOSPITALS), client_app, self._fail_if_missing)
        self.present = present
        self.later = {node: self.nodes.pop(node) for node in later}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        if any(round_of(message) == 1 for message in messages):
            self.nodes |= self.later
        return super().push_messages(messages)

    def _fail_if_missing(self, number: int, message: Message) -> Message | None:
        current = round_of(message)
        if not current or HOSPITALS[number] in self.present[current - 1]:
            return None
        reason = f"hospital: DataError while training round {current}"
        return error_reply(message, reason)
