"""Start-up code of the processes of a deployment on loopback (tests/loopback.py).

A SuperExec imports the modules in FEDGAN_LOOPBACK_PRELOAD once and forks its tasks, in the place of
starting a new interpreter for each, which spends seconds on importing torch. Tasks stay processes
of their own and import fedgan from the app that Flower sends.

Flower notices deaths by missing heartbeats. FEDGAN_LOOPBACK_HEARTBEAT sets the seconds between the
heartbeats that a process sends, FEDGAN_LOOPBACK_TASK_HEARTBEAT those that a SuperLink or SuperNode
expects of its tasks. A SuperLink tolerates two missed ones, a SuperNode one.

The file `slow` in the folder of a hospital's SuperExec names one of its tasks by number, from 1 on.
While it is there, this task cannot import client.app, as on a very slow disk. The task writes the
file `waiting` when it begins to wait, after its first heartbeat.
"""

import contextlib
import importlib
import importlib.metadata
import os
import signal
import sys
import time
from pathlib import Path

NAME = os.environ.get("FEDGAN_LOOPBACK_NAME", "")
COMMAND = Path((sys.orig_argv[1:2] or [""])[0]).name


def set_heartbeats(sent: str, expected: str) -> None:
    """Set the seconds between heartbeats. Flower's modules copy the constants when imported."""
    from flwr.common import constant

    default = constant.HEARTBEAT_DEFAULT_INTERVAL
    constant.HEARTBEAT_MIN_INTERVAL = 1
    constant.HEARTBEAT_CALL_TIMEOUT = 2
    if NAME == "superlink":
        constant.HEARTBEAT_PATIENCE = 3
    constant.HEARTBEAT_DEFAULT_INTERVAL = int(expected or default)
    for module in ("in_memory_corestate", "sql_corestate"):
        importlib.import_module(f"flwr.supercore.corestate.{module}")
    constant.HEARTBEAT_DEFAULT_INTERVAL = int(sent or default)


class SlowDisk:
    """A finder of modules that blocks the import of client.app in one task."""

    task = 0  # number of the task in this process

    @classmethod
    def find_spec(cls, name: str, *_: object) -> None:
        slow = Path(os.environ["FLWR_HOME"]) / "slow"
        while name == "client.app" and slow.exists() and int(slow.read_text()) == cls.task:
            slow.with_name("waiting").touch()
            time.sleep(0.2)


def fork_tasks(modules: list[str]) -> None:
    """Make a SuperExec fork its tasks, with `modules` imported."""
    from flwr.supercore.constant import TASK_TYPE_TO_APPIO_API_ADDRESS_ARG as ADDRESS
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
    from flwr.supercore.superexec.executor import subprocess_executor
    from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult

    scripts = {
        script.name: script for script in importlib.metadata.entry_points(group="console_scripts")
    }
    task = TaskType.CLIENT_APP if NAME.startswith("clientapp") else TaskType.SERVER_APP
    scripts[TASK_TYPE_TO_COMMAND[task]].load()
    for module in modules:
        importlib.import_module(module)

    def launch(_: object, spec: ExecutionSpec) -> LaunchResult:
        with contextlib.suppress(ChildProcessError):  # reap tasks that have ended
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        SlowDisk.task += 1
        if os.fork():
            return LaunchResult.accepted()
        code = 1
        try:
            if spec.suppress_output:
                for stream in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            command = TASK_TYPE_TO_COMMAND[spec.task_type]
            sys.argv = [command, ADDRESS[spec.task_type], spec.runtime_api_address]
            sys.argv += ["--token", spec.token]
            if spec.insecure:
                sys.argv.append("--insecure")
            elif spec.root_certificates_path is not None:
                sys.argv += ["--root-certificates", spec.root_certificates_path]
            if spec.parent_pid is not None:
                sys.argv += ["--parent-pid", str(spec.parent_pid)]
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            scripts[command].load()()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    subprocess_executor.SubprocessExecutor.launch = launch  # type: ignore[method-assign]


intervals = [os.environ.get(f"FEDGAN_LOOPBACK_{kind}HEARTBEAT", "") for kind in ("", "TASK_")]
if any(intervals) and COMMAND.startswith("flower-"):
    set_heartbeats(*intervals)
if COMMAND == "flower-superexec":
    if NAME.startswith("clientapp"):
        sys.meta_path.insert(0, SlowDisk)  # type: ignore[arg-type]
    fork_tasks(os.environ.get("FEDGAN_LOOPBACK_PRELOAD", "").split())
