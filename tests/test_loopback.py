"""The harness itself: a deployment on loopback comes up, trains through the filter, survives kill -9, leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loopback import REPOSITORY, deployment, marked
from tiny_app import expected_sums, write_tiny_app


def test_three_hospitals_register_authenticate_and_exchange_two_rounds_through_the_filter(tmp_path: Path) -> None:
    app = write_tiny_app(tmp_path / "app")
    place = tmp_path / "deployment"
    place.mkdir()
    with deployment(place, app) as federation:
        assert federation.online() == {"hospital-1", "hospital-2", "hospital-3"}
        run = federation.submit({"output": str(tmp_path / "sums.json")})
        assert federation.finished(run, 120) == "finished:completed", federation.tails()
        assert json.loads((tmp_path / "sums.json").read_text()) == expected_sums()
        assert "failed" not in federation.log("filter").read_text()
        print(federation.seconds)
    assert marked(str(place)) == []


def test_what_is_waited_for_in_vain_is_said_with_the_ends_of_the_logs(tmp_path: Path) -> None:
    with deployment(tmp_path, start=False) as federation:
        federation.start("filter")
        federation.wait_log("filter", "listening on")
        with pytest.raises(AssertionError, match=r"waited 0\.5 s for pigs(.|\n)*filter \(running\)(.|\n)*listening on"):
            federation.wait("pigs to fly", lambda: False, 0.5, "filter")
        federation.stop("filter")
        assert not federation.alive("filter")


ABANDONED = """
import sys, time
from pathlib import Path
from loopback import deployment
with deployment(Path(sys.argv[1]), start=False) as federation:
    federation.start("filter")
    federation.wait_log("filter", "listening on")
    print("up", flush=True)
    time.sleep(60)
"""


def test_nothing_stays_behind_when_the_test_itself_is_killed(tmp_path: Path) -> None:
    words = [sys.executable, "-c", ABANDONED, str(tmp_path)]
    test = subprocess.Popen(words, cwd=REPOSITORY / "tests", stdout=subprocess.PIPE, text=True)
    assert test.stdout
    assert test.stdout.readline() == "up\n"
    assert marked(str(tmp_path))
    test.kill()
    test.wait(10)
    end = time.monotonic() + 20
    while marked(str(tmp_path)):
        assert time.monotonic() < end, "the filter outlived its test"
        time.sleep(0.1)
