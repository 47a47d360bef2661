"""The test harness itself: failures show the logs, and no process is left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from loopback import REPOSITORY, deployment, marked, needs_haproxy

pytestmark = needs_haproxy


def test_wait_fails_with_the_ends_of_the_logs(tmp_path: Path) -> None:
    with deployment(tmp_path, start=False) as federation:
        federation.start("proxy")
        federation.wait_log("proxy", "superlink is DOWN")
        with pytest.raises(
            AssertionError,
            match=r"waited 0\.5 s for pigs(.|\n)*proxy \(running\)(.|\n)*superlink is DOWN",
        ):
            federation.wait("pigs to fly", lambda: False, 0.5, "proxy")
        federation.stop("proxy")
        assert not federation.is_alive("proxy")


ABANDONED = """
import sys, time
from pathlib import Path
from loopback import deployment
with deployment(Path(sys.argv[1]), start=False) as federation:
    federation.start("proxy")
    federation.wait_log("proxy", "superlink is DOWN")
    print("up", flush=True)
    time.sleep(60)
"""


def test_no_process_outlives_a_killed_test(tmp_path: Path) -> None:
    words = [sys.executable, "-c", ABANDONED, str(tmp_path)]
    test = subprocess.Popen(words, cwd=REPOSITORY / "tests", stdout=subprocess.PIPE, text=True)
    assert test.stdout
    assert test.stdout.readline() == "up\n"
    assert marked(str(tmp_path))
    test.kill()
    test.wait(10)
    end = time.monotonic() + 20
    while marked(str(tmp_path)):
        assert time.monotonic() < end, "the proxy outlived its test"
        time.sleep(0.1)
