"""A federation of real processes in which nearly everything dies once, and the model that comes of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from loopback import HOST, deployment
from small_federation import NAMES, LocalGrid, NoEvaluator, error_reply, tiny, write_shards

from client.app import app as client_app
from fedgan import files
from fedgan.cli import main
from fedgan.run_folder import RunFolder
from fedgan.runs.preparation import experiment_of, prepare_run
from fedgan.training.checkpoint import load_tensors
from server.federation import Federation

SIZES, HOSPITALS = (48, 32, 24), NAMES[:3]
ALPHA, BETA, GAMMA = HOSPITALS
WAIT = 240


def round_of(message: Message) -> int:
    return int(message.content.config_records["config"].get("round", 0))  # type: ignore[arg-type]


def rounds_of(run: RunFolder) -> list[dict[str, Any]]:
    return files.read_json_lines(run.metrics) if run.metrics.is_file() else []


@pytest.mark.slow
def test_what_dies_comes_back_and_nothing_that_counted_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "data", SIZES)
    write_shards(tmp_path / "reference", (40,), names=("delta",))
    waits = (
        "min_hospitals=2",
        "join_timeout=1",
        "round_timeout=50",
        "exchange=['generator']",
    )  # few arrays: a request each
    more = (
        f"evaluation.root={tmp_path / 'reference'}",
        "evaluation.suite=quick",
        *(f"federation.{wait}" for wait in waits),
    )
    settings = tiny(tmp_path / "nowhere", *more, rounds=4, kimg=0.144)
    scenario, run = RunFolder.at(tmp_path / "scenario"), RunFolder.at(tmp_path / "run")
    scenario.write_settings(settings)
    place = tmp_path / "deployment"
    place.mkdir()

    def own(index: int) -> dict[str, Any]:
        folders = {"data-root": "data", "state-dir": "state"}
        return {"partition-id": index} | {
            key: str(tmp_path / folder / HOSPITALS[index]) for key, folder in folders.items()
        }

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "faulty_site"))
    with deployment(place, hospitals=HOSPITALS, node_config=own, start=False) as federation:
        monkeypatch.setenv("FEDGAN_SUPERLINK", f"{HOST}:{federation.ports['superlink']}")
        monkeypatch.setenv("FEDGAN_CA", str(federation.keys / "ca.crt"))

        def ended(number: int) -> bool:
            return len(rounds_of(run)) >= number

        def slow(name: str) -> Path:
            """While this lies there, a ClientApp of the SuperExec hangs (tests/faulty_site)."""
            return federation.folder / name / "slow"

        def started(number: int) -> int:
            """How many ClientApps a hospital has started: one for each message."""
            return (
                federation.log(f"clientapp-{number}")
                .read_text()
                .count("Start `flwr-clientapp` process")
            )

        def begun(number: int, messages: int) -> None:
            """Wait until a hospital works on that message: its process has begun, and has yet to import torch."""
            what = f"hospital {number} to begin its message {messages}"
            federation.wait(
                what,
                lambda: started(number) >= messages,
                WAIT,
                f"clientapp-{number}",
                f"node-{number}",
            )

        # --- gamma is absent; the ClientApp of beta dies in round 1, and is asked again
        federation.start_all(absent=[GAMMA])
        capsys.readouterr()
        words = ["deploy", "run", str(scenario.config), "--output", str(run.path), "--detach"]
        assert main(words) == 0, capsys.readouterr().err
        submitted = int(capsys.readouterr().out)
        federation.wait("the run folder", run.checkpoint(0).is_file, WAIT, "serverapp", "superlink")
        slow("clientapp-2").touch()  # Flower never notices one that dies before its first heartbeat
        begun(2, 2)  # after its introduction
        time.sleep(4)
        federation.kill_task("clientapp-2")
        slow("clientapp-2").unlink()
        federation.start_hospital(GAMMA)
        federation.wait("round 1", lambda: ended(1), WAIT)
        assert started(2) == 3

        # --- the SuperNode of alpha dies in round 2, and comes back when the SuperLink has noticed
        begun(1, 3)
        federation.kill("node-1")
        federation.restart_until_activated("node-1")
        federation.wait("round 2", lambda: ended(2), WAIT)

        # --- gamma is too slow in round 3
        slow("clientapp-3").touch()
        federation.wait("round 3", lambda: ended(3), WAIT)
        slow("clientapp-3").unlink()

        # --- the ServerApp dies in round 4
        begun(2, 6)
        federation.kill_task("serverapp")
        federation.wait(
            "the SuperLink to notice",
            lambda: federation.status(submitted) == "finished:failed",
            WAIT,
            every=1.0,
        )
        assert main(["deploy", "logs", str(submitted)]) != 0
        assert f"fedgan deploy resume {run.path}" in capsys.readouterr().err
        assert main(["deploy", "resume", str(run.path), "--detach"]) == 0, capsys.readouterr().err
        resumed = int(capsys.readouterr().out)

        # --- and in the same round, begun anew, the filter and the SuperLink
        begun(2, 8)  # after one more introduction
        federation.kill("proxy")
        assert federation.health("proxy") is None
        federation.start("proxy")
        federation.wait("the filter", lambda: federation.health("proxy") == 200, WAIT, "proxy")
        federation.kill("superlink")
        federation.wait(
            "the filter to miss the SuperLink",
            lambda: federation.health("proxy") == 503,
            WAIT,
            "proxy",
        )
        federation.start("superlink")
        assert federation.wait_finished(resumed, WAIT) == "finished:completed", federation.tails()
        assert "status=502" in federation.log("proxy").read_text()

    # --- who is missing is named with the reason, and nobody else is missing
    lines = rounds_of(run)
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    here = [[row["name"] for row in line["hospitals"]] for line in lines]
    absences = [{row["name"]: row["why"] for row in line.get("absent", [])} for line in lines]
    assert here[0] == [ALPHA, BETA]  # beta was asked again; nobody knew of gamma
    assert absences[1].keys() <= {ALPHA}  # asked again in time, or not
    assert set(absences[1].values()) <= {"is not online", "did not reply in time"}
    assert absences[2] == {GAMMA: "did not reply in time"}
    assert [absences[place] for place in (0, 3)] == [{}, {}]
    assert all(
        set(names) | set(gone) == set(HOSPITALS)
        for names, gone in zip(here[1:], absences[1:], strict=True)
    )
    (log,) = (tmp_path / "state" / GAMMA).rglob("client.log")
    told = log.read_text()
    assert "the reply of round 3 did not count (missing: did not reply in time)" in told
    assert json.loads(run.evaluation.read_text())["round"] == 4

    # --- and the model is that of a federation in which nobody died, but these were missing from these rounds
    replayed = RunFolder.at(tmp_path / "replayed")
    same = tiny(tmp_path / "data", *(f"federation.{wait}" for wait in waits), rounds=4, kimg=0.144)
    prepare_run(same, replayed)
    again = Federation(
        replayed.settings(), replayed, experiment_of(replayed), NoEvaluator(), reconnecting=True
    )
    again.train(Replay(here))  # type: ignore[arg-type]
    expected, got = (load_tensors(each.checkpoint(4))[0] for each in (replayed, run))
    assert expected.keys() == got.keys()
    assert [key for key, tensor in expected.items() if not torch.equal(tensor, got[key])] == []


class Replay(LocalGrid):
    """A grid on which hospitals are there in the rounds that name them, and otherwise fail; gamma is online from round 1 on."""

    def __init__(self, here: list[list[str]]) -> None:
        super().__init__(len(HOSPITALS), client_app, self._absent)
        self.here = here
        self.later = {998: self.nodes.pop(998)}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        if any(round_of(message) == 1 for message in messages):
            self.nodes |= self.later
        return super().push_messages(messages)

    def _absent(self, number: int, message: Message) -> Message | None:
        asked = round_of(message)
        there = not asked or HOSPITALS[number] in self.here[asked - 1]
        return (
            None
            if there
            else error_reply(message, f"hospital: DataError while training round {asked}")
        )
