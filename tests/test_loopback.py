"""The harness itself: what it waits for in vain is said, and nothing of it is left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from loopback import REPOSITORY, deployment, marked


def test_what_is_waited_for_in_vain_is_said_with_the_ends_of_the_logs(tmp_path: Path) -> None:
    with deployment(tmp_path, start=False) as federation:
        federation.start("filter")
        federation.wait_log("filter", "listening on")
        with pytest.raises(
            AssertionError,
            match=r"waited 0\.5 s for pigs(.|\n)*filter \(running\)(.|\n)*listening on",
        ):
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
