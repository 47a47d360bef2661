"""A long run in which a random process dies every five rounds (`make soak`, a quarter of an hour).

FEDGAN_SOAK is the number of rounds; without it this test is skipped. Each dead process is started
again, as a container with a restart policy is, and a failed run is resumed. At the end the model is
that of a run without deaths that missed the same answers, and nothing has grown beyond its bound.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loopback import HEARTBEAT, HOST, TASK_HEARTBEAT, Deployment, deployment, marked, needs_haproxy
from small_federation import NoEvaluator
from test_faults import HOSPITALS, Replay, rounds_of, scenario_of

from fedgan.cli import main
from fedgan.run_folder import RunFolder
from fedgan.runs.preparation import experiment_of, prepare_run
from fedgan.training.checkpoint import load_tensors
from server.federation import Federation

ROUNDS = int(os.environ.get("FEDGAN_SOAK", "0"))
EVERY, TIMEOUT, STALL, HANG = 5, 25, 12.0, 300.0  # rounds; seconds of a round, of waits
BEATS = {HEARTBEAT: "5", TASK_HEARTBEAT: "5"}
# Growth from the first quarter of the run to its last, and sizes at its end.
MAX_GROWTH, MAX_DATABASE, MAX_STATES = 100 << 20, 64 << 20, 12
MAX_LOG = 20_000  # bytes per round, of all logs


class Soak:
    """The deployment, its run, and what was seen of them."""

    def __init__(self, federation: Deployment, run: RunFolder) -> None:
        self.federation, self.run = federation, run
        self.kills: list[tuple[int, str]] = []
        self.resumes = 0
        self.samples: list[dict[str, Any]] = []

    def heal(self) -> None:
        """Start every dead process again."""
        for name in self.federation.names:
            if not self.federation.is_alive(name):
                self.federation.start(name)

    def kill(self, rng: random.Random) -> None:
        """Kill a process: one that stays, or (half of the time) only the tasks of an executor."""
        name = rng.choice(self.federation.names)
        executor = name.startswith(("clientapp", "serverapp"))
        tasks = executor and rng.random() < 0.5 and bool(self.federation.tasks(name))
        self.kills.append((len(rounds_of(self.run)), f"{name} task" if tasks else name))
        print(f"round {self.kills[-1][0]}: kill {self.kills[-1][1]}", file=sys.stderr, flush=True)
        (self.federation.kill_task if tasks else self.federation.kill)(name)

    def sample(self, number: int) -> None:
        """Measure memory per process name, and bytes on disk."""
        memory = {
            name: sum(map(_resident, marked(str(self.federation.folder), name)))
            for name in self.federation.names
            if not name.startswith("clientapp")  # between tasks: only a template of processes
        }
        folder = self.federation.folder
        self.samples.append(
            {
                "round": number,
                "memory": memory,
                "database": _bytes(folder / "superlink", "state.db*"),
                "logs": _bytes(folder, "*.log"),
                "states": len(list((folder.parent / "state").rglob("state-*"))),
                "checkpoints": len(list(self.run.checkpoints.glob("*"))),
            }
        )


def _resident(pid: int) -> int:
    """Resident bytes of a process; 0 where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _bytes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


@pytest.mark.slow
@needs_haproxy
@pytest.mark.skipif(not ROUNDS, reason="make soak")
def test_run_with_random_deaths_ends_like_an_undisturbed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario, undisturbed, node_config = scenario_of(tmp_path, ROUNDS, TIMEOUT)
    run = RunFolder.at(tmp_path / "run")
    rng, begun = random.Random(0), time.monotonic()
    with deployment(
        tmp_path / "deployment", hospitals=HOSPITALS, node_config=node_config, start=False
    ) as federation:
        federation.heartbeats = dict.fromkeys(federation.names, BEATS)
        monkeypatch.setenv("FEDGAN_SUPERLINK", f"{HOST}:{federation.ports['superlink']}")
        monkeypatch.setenv("FEDGAN_CA", str(federation.keys / "ca.crt"))

        def deploy(*words: str) -> int | None:
            """Number of the submitted run; None where the SuperLink is not there."""
            capsys.readouterr()
            code = main(["deploy", *words, "--detach"])
            out, _ = capsys.readouterr()
            return None if code else int(out)

        federation.start_all()
        submitted = deploy("run", str(scenario.config), "--output", str(run.path))
        assert submitted is not None
        soak = Soak(federation, run)
        done, moved, looked, at = 0, time.monotonic(), 0.0, None
        while done < ROUNDS or federation.status(submitted) != "finished:completed":
            now, number = time.monotonic(), len(rounds_of(run))
            assert now - moved < HANG, f"no progress after round {done}\n{federation.tails()}"
            if number > done:
                done, moved = number, now
                soak.sample(number)
                if number % EVERY == 0 and number < ROUNDS:
                    at = now + rng.uniform(0, 4)  # at any point of the next round
            if at is not None and now > at:
                soak.kill(rng)
                at = None
            soak.heal()
            if now - moved > STALL and now - looked > STALL:
                looked = now
                if federation.status(submitted) in ("finished:failed", "finished:stopped"):
                    again = deploy("resume", str(run.path))
                    submitted, soak.resumes = again or submitted, soak.resumes + bool(again)
            time.sleep(0.5)

    # --- nothing is lost: the model is that of a run which missed the same answers
    lines = rounds_of(run)
    assert [line["round"] for line in lines] == list(range(1, ROUNDS + 1))
    present = [[row["name"] for row in line["hospitals"]] for line in lines]
    replayed = RunFolder.at(tmp_path / "replayed")
    prepare_run(undisturbed, replayed)
    again = Federation(
        replayed.settings(), replayed, experiment_of(replayed), NoEvaluator(), reconnecting=True
    )
    again.train(Replay(present, later=()))  # type: ignore[arg-type]
    expected, model = (load_tensors(each.checkpoint(ROUNDS))[0] for each in (replayed, run))
    assert [key for key, value in expected.items() if not torch.equal(value, model[key])] == []

    # --- nothing grows
    quarter = max(1, ROUNDS // 4)
    first, last = soak.samples[:quarter], soak.samples[-quarter:]
    growth = {
        name: float(np.median([row["memory"][name] for row in last]))
        - float(np.median([row["memory"][name] for row in first]))
        for name in federation.names
        if not name.startswith("clientapp")
    }
    end = soak.samples[-1]
    missed = sum(len(line.get("absent", [])) for line in lines)
    figures = {
        "rounds": ROUNDS,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "kills": soak.kills,
        "resumes": soak.resumes,
        "missed_answers": missed,
        "growth_mib": {name: round(value / 2**20, 1) for name, value in growth.items()},
        "database_mib": [round(row["database"] / 2**20, 1) for row in (first[-1], end)],
        "log_bytes_per_round": round(end["logs"] / ROUNDS),
        "states": end["states"],
        "checkpoints": end["checkpoints"],
    }
    print(json.dumps(figures, indent=1), file=sys.stderr, flush=True)
    assert max(growth.values()) < MAX_GROWTH, growth
    assert end["database"] < MAX_DATABASE
    assert end["logs"] < MAX_LOG * ROUNDS
    assert end["states"] <= MAX_STATES * len(HOSPITALS)
