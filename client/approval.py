#!/usr/bin/env -S python -P
"""Run the server's ClientApp only where this hospital has approved its code.

    FEDGAN_APPROVED=approved.txt client/approval.py executor --insecure --runtime-api-address …

takes the place of `flower-superexec`, which installs and runs whatever app the SuperLink sends.
The list is the hospital's own, made by `fedgan approve`: a SHA-256 of Flower's app bundle (FAB)
per line. Each task starts as this script again, compares the received bundle with the list before
it is installed, and refuses it with both hashes in the log; the server gets Flower's "cannot load
the ClientApp". Tasks of other kinds (Flower's agents), which a server can request in place of a
ClientApp, are never taken.

Nothing of fedgan is imported here: a package that is already imported would hide the received copy.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any

APPROVED = "FEDGAN_APPROVED"  # environment variable: path of the list
HASH = re.compile(r"^[0-9a-f]{64}(?=\s|$)", re.MULTILINE)


def approved_hashes(path: Path) -> list[str]:
    """The hashes of a list. Raises `OSError` or `ValueError` where it cannot be read."""
    return HASH.findall(path.read_text(encoding="utf-8"))


def objection(fab: Any, run: Any, path: Path) -> str:
    """Why the bundle of a run must not be installed; empty where it is approved."""
    from flwr.cli.config_utils import get_fab_metadata

    try:
        approved = approved_hashes(path)
    except (OSError, ValueError) as error:
        return f"the list of approved code {path} cannot be read: {type(error).__name__}"
    found = hashlib.sha256(fab.content).hexdigest()
    if found not in approved:
        known = ", ".join(approved) or "none"
        return (
            f"the server sent code with SHA-256 {found}, approved is {known}: compare it with the "
            f"code that you have read, then fedgan approve {found} --list {path}"
        )
    # Flower loads the app from the folder that these three name, not from what it has installed.
    if (run.fab_id, run.fab_version, fab.hash_str) != (*get_fab_metadata(fab.content), found):
        return f"the server names the approved code {found} by the name of another app"
    return ""


def run_task() -> None:
    """Run one task of the SuperNode as `flwr-clientapp` does, where its code is approved."""
    from flwr.clientapp.client_app import LoadClientAppError
    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    pull, install = run_clientapp.pull_task_input, run_clientapp.install_from_fab
    pulled: list[Any] = []

    def pull_and_keep(client: Any) -> Any:
        pulled[:] = pull(client)
        return tuple(pulled)

    def install_approved(content: bytes, **options: Any) -> Path:
        _, _, run, fab = pulled
        if why := objection(fab, run, Path(os.environ[APPROVED])):
            raise LoadClientAppError(why)  # Flower logs the text and sends only the kind
        return install(content, **options)

    run_clientapp.pull_task_input = pull_and_keep
    run_clientapp.install_from_fab = install_approved
    flwr_clientapp()


def run_executor() -> None:
    """Run `flower-superexec` for ClientApps alone, each started as a task of this script."""
    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
    from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor

    path = Path(os.environ.get(APPROVED, ""))
    try:
        hashes = approved_hashes(path)
    except (OSError, ValueError):
        hashes = []
    if not hashes:
        sys.exit(
            f"{path} lists no approved code: run fedgan approve, and name its list in {APPROVED}"
        )
    print(f"approved code: {', '.join(hashes)}", flush=True)
    TASK_TYPE_TO_COMMAND[TaskType.CLIENT_APP] = str(Path(__file__).resolve())
    SubprocessExecutor.get_eligible_capacity = lambda self, types, **_: (
        types & {TaskType.CLIENT_APP},
        set(),
    )
    flower_superexec()


if __name__ == "__main__":
    if sys.argv[1:2] == ["executor"]:
        del sys.argv[1]
        run_executor()
    else:
        run_task()
