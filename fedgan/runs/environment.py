"""The content of environment.json: experiment id, versions, machine and sources of the data."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedgan.config import Settings, settings_hash
from fedgan.data.shard import Shard
from fedgan.data.shard_files import is_phantom_source
from fedgan.machine import usable_cores

PACKAGES = ("flwr", "ray", "torch", "torchvision", "numpy", "scipy", "scikit-learn", "safetensors")


def environment(settings: Settings, shards: Sequence[Path]) -> dict[str, Any]:
    """Describe this machine and the data of `shards`, with a new experiment id.

    The content hash of a private run's real images is null. `settings_hash` is the hash of the
    settings, with which each resume compares config.toml. A comparison's own is not compared: each
    call gives the scenario anew, and each arm has its own.
    """
    return {
        "experiment": uuid.uuid4().hex[:16],
        "settings_hash": settings_hash(settings),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": {
            "processor": _processor(),
            "cores": usable_cores(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
            if hasattr(os, "sysconf")
            else None,
            "gpus": [
                torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
            ],
        },
        "threads_per_hospital": settings.federation.threads or usable_cores(),
        "sources": [
            {
                "hospital": card.name,
                "source": card.source,
                "licence": card.licence,
                "content_hash": None
                if settings.privacy.on and not is_phantom_source(card.source)
                else card.content_hash,
            }
            for card in (Shard.open(path).card for path in shards)
        ],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name from the operating system."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
