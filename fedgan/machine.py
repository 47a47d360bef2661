"""Cores and memory of this machine, and how hospitals share the cores."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use, by its affinity and the quota of its container."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max": no quota
        pass
    return cores


def share_cores(threads: int, hospitals: int) -> tuple[int, int]:
    """(threads per hospital, hospitals in parallel) for `federation.threads` (0: all cores)."""
    cores = usable_cores()
    each = threads or cores
    return each, max(1, min(cores // each, hospitals))


def peak_memory() -> int:
    """Peak memory of this process in bytes, libraries included."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts bytes, Linux KiB


def pin(cores: set[int]) -> None:
    """Pin this process and its children to `cores` where the system can; `usable_cores` follows."""
    setter: Callable[[int, set[int]], None] | None = getattr(os, "sched_setaffinity", None)
    if setter and cores:
        threads = (
            [int(name) for name in os.listdir("/proc/self/task")]
            if os.path.isdir("/proc/self/task")
            else []
        )
        for thread in {0, *threads}:  # libraries start threads on import
            with contextlib.suppress(OSError):  # it has ended
                setter(thread, cores)
