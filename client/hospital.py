"""A hospital's own shard, state and logs. Nothing here is shared with other hospitals.

In a simulation the state lies in a folder of the run (`hospitals/NAME`), and the shard is the one
with the hospital's number. In a deployment both come from the SuperNode's node-config (`data-root`,
`state-dir`), and no path from the server is read or written; `max-epsilon` and `require-secure` in
the node-config override the server's request. A hospital is simulated when its process was started
by `fedgan simulate` (`SIMULATION` in its environment) or by Flower's own engine (Ray's actors).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgan import files
from fedgan.config import Settings, from_dict
from fedgan.data.federation import Hospital, open_hospital, open_hospitals
from fedgan.errors import CheckpointError, ConfigError
from fedgan.exchange.outbound_log import NAME as OUTBOUND
from fedgan.privacy.ledger import NAME as LEDGER
from fedgan.run_folder import RunFolder

SIMULATION = "FEDGAN_SIMULATION"  # environment variable, "1" in simulated hospitals
KEEP_STATES = 3  # a server that lost its last round goes back by one; one more as reserve
PROGRESS_SECONDS = 0.5


@dataclass(frozen=True)
class TrainRequest:
    """A request of the server. `images`: real images of this round, `planned`: of all rounds.

    `batch`: images per step at this hospital; `since`: the round whose state is continued (0:
    none); `least_noise`: lower bound of the noise multiplier; `note`: why this hospital's last
    reply did not count.
    """

    settings: Settings
    experiment: str
    run: str
    round: int = 0
    since: int = 0
    images: int = 0
    planned: int = 0
    batch: int = 0
    least_noise: float = 0.0
    note: str = ""

    @staticmethod
    def read(config: Mapping[str, Any]) -> TrainRequest:
        """Parse a message's ConfigRecord. Raises `ConfigError` for an unsafe experiment id."""
        experiment = str(config["experiment"])
        if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}", experiment):
            raise ConfigError(
                "the server's experiment id is no name of up to 64 letters, digits, '-' and '_': "
                "it names a folder of this hospital"
            )
        settings = from_dict(json.loads(str(config["settings"])), source="the server's settings")
        numbers = {
            key: int(config.get(key, 0)) for key in ("round", "since", "images", "planned", "batch")
        }
        return TrainRequest(
            settings,
            experiment,
            str(config["run"]),
            **numbers,
            least_noise=float(config.get("least_noise", 0.0)),
            note=str(config.get("note", "")),
        )


@dataclass(frozen=True)
class LocalHospital:
    """A hospital with its shard and the paths of its state, ledger and outbound log."""

    number: int
    hospital: Hospital
    folder: Path
    ledger: Path
    outbound: Path

    def state(self, round_number: int) -> Path:
        """Path of the Trainer's state after `round_number`."""
        return self.folder / f"state-{round_number:05d}.safetensors"

    def state_of(self, request: TrainRequest) -> Path:
        """State that the request continues. Raises `CheckpointError` if missing or foreign."""
        label = self.folder / "experiment.json"
        path = self.state(request.since)
        if not path.with_suffix(".json").is_file():
            raise CheckpointError(
                f"{path} is missing: this hospital cannot continue from round {request.since}"
            )
        if (
            not label.is_file()
            or json.loads(label.read_text(encoding="utf-8")).get("experiment") != request.experiment
        ):
            raise CheckpointError(
                f"{self.folder} holds the state of another experiment than {request.experiment}"
            )
        return path

    def prepare_folder(self, request: TrainRequest) -> None:
        """Remove all states and label the folder with the experiment, before its first round."""
        label = self.folder / "experiment.json"
        for old in self.folder.glob("state-*"):
            old.unlink()
        files.write_json(label, {"experiment": request.experiment, "hospital": self.hospital.name})

    def remove_old_states(self, request: TrainRequest) -> None:
        """Keep this round's state, the one that it continued, and the last few before; remove the
        others.

        States between the two belong to replies that did not count.
        """
        rounds = {
            path: int(path.stem.removeprefix("state-")) for path in self.folder.glob("state-*")
        }
        counted = sorted(
            {number for number in rounds.values() if number <= request.since}, reverse=True
        )[: KEEP_STATES - 1]
        for path, number in rounds.items():
            if number not in counted and number != request.round:
                path.unlink(missing_ok=True)


def trusts_paths(node: Mapping[str, Any]) -> bool:
    """Whether this hospital may use the server's paths: simulated, and no data-root of its own."""
    ray = sys.modules.get("ray")
    simulated = os.environ.get(SIMULATION) == "1" or (ray is not None and ray.is_initialized())
    return simulated and not node.get("data-root")


def find_local_hospital(request: TrainRequest, node: Mapping[str, Any]) -> LocalHospital:
    """This node's hospital. Raises `DataError` or `ConfigError` when its shard cannot be opened."""
    number = int(node["partition-id"])
    own_data, own_state = str(node.get("data-root", "")), str(node.get("state-dir", ""))
    if not trusts_paths(node):
        if missing := [key for key in ("data-root", "state-dir") if not node.get(key)]:
            raise ConfigError(
                f"this node names no {missing[0]}: "
                "set data-root and state-dir (shard and state) in its node-config"
            )
        hospital = _open_own(request.settings, own_data)
    else:
        hospitals = _open_all(
            request.settings, request.settings.data.root or str(Path(request.run) / "shards")
        )
        if number >= len(hospitals):
            raise ConfigError(
                f"partition-id = {number}, but there are {len(hospitals)} hospitals "
                "(counted from 0)"
            )
        hospital = hospitals[number]
    folder = (
        Path(own_state) / request.experiment
        if own_state
        else RunFolder(Path(request.run)).hospital_state(hospital.name)
    )
    # The ledger outlives every run: it lies beside the shard, or in this node's state-dir.
    shard_folder = Path(own_state) if own_state else hospital.shard_path or folder
    # In a simulation the shard's folder may be read-only.
    log_place = shard_folder if own_state or os.access(shard_folder, os.W_OK) else folder
    return LocalHospital(number, hospital, folder, shard_folder / LEDGER, log_place / OUTBOUND)


def apply_epsilon_cap(request: TrainRequest, node: Mapping[str, Any]) -> TrainRequest:
    """Lower the request's `privacy.max_epsilon` to this node's own `max-epsilon`.

    Raises `ConfigError` where it is no number above 0, and for a run without privacy, where epsilon
    is unbounded.
    """
    if _node_value(node, "max-epsilon") is None:
        return request
    try:
        limit = float(node["max-epsilon"])
    except ValueError:
        limit = math.nan
    if not (math.isfinite(limit) and limit > 0):
        raise ConfigError(
            f"max-epsilon = {node['max-epsilon']} in this node's config: give a number above 0"
        )
    privacy = request.settings.privacy
    if not privacy.on:
        raise ConfigError(
            f"this node's config has max-epsilon = {limit:g}, and the run has no privacy: refused; "
            "set privacy.epsilon in the scenario, or remove max-epsilon here"
        )
    smaller = min(limit, privacy.max_epsilon or limit)
    settings = dataclasses.replace(
        request.settings, privacy=dataclasses.replace(privacy, max_epsilon=smaller)
    )
    return dataclasses.replace(request, settings=settings)


def check_secure(request: TrainRequest, node: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a run without `federation.secure` where this node sets
    `require-secure`.

    Also for a value other than true or false, which must not count as false.
    """
    value = _node_value(node, "require-secure", False)
    if str(value).lower() not in ("true", "false"):
        raise ConfigError(f"require-secure = {value} in this node's config: give true or false")
    if str(value).lower() == "true" and not request.settings.federation.secure:
        raise ConfigError(
            "this node's config has require-secure = true, and the run has no secure aggregation: "
            "refused; set federation.secure in the scenario, or remove require-secure here"
        )


def _node_value(node: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Value of `key` in the node-config. Raises `ConfigError` for a variant spelling."""
    for name in node:
        if name != key and str(name).lower().replace("_", "-") == key:
            raise ConfigError(f"this node's config has {name}: it is written {key}")
    return node.get(key, default)


def log_folder(request: TrainRequest, node: Mapping[str, Any]) -> Path | None:
    """Folder of client.log before the hospital's name is known; None where there is none."""
    if state_dir := str(node.get("state-dir", "")):
        return Path(state_dir)
    return (
        Path(request.run) / "hospitals" / f"partition-{node['partition-id']}"
        if trusts_paths(node)
        else None
    )


# A process of the simulation serves hospitals for many rounds: map shards once.
@functools.lru_cache(maxsize=1)
def _open_all(settings: Settings, root: str) -> list[Hospital]:
    return open_hospitals(settings, root)


@functools.lru_cache(maxsize=1)
def _open_own(settings: Settings, root: str) -> Hospital:
    return open_hospital(settings, root)


class Progress:
    """Writes `progress.json` at intervals: images seen of this round. Stays local."""

    def __init__(self, folder: Path, round_number: int, images: int) -> None:
        self.path, self.round, self.images = folder / "progress.json", round_number, images
        self.next_write = 0.0

    def __call__(self, seen: int) -> None:
        """Report that `seen` images of this round are done. Never raises."""
        if (now := time.monotonic()) < self.next_write and seen < self.images:
            return
        self.next_write = now + PROGRESS_SECONDS
        with contextlib.suppress(OSError):
            part = self.path.with_suffix(".part")
            part.write_text(
                json.dumps(
                    {"round": self.round, "images": min(seen, self.images), "of": self.images}
                ),
                encoding="utf-8",
            )
            os.replace(part, self.path)


def log_failure(folder: Path | None, round_number: int, step: str) -> None:
    """Append the current exception with its traceback to this hospital's `client.log`."""
    log(folder, f"round {round_number}, while {step}\n{traceback.format_exc()}")


def log(folder: Path | None, text: str) -> None:
    """Append a text with the time to this hospital's `client.log`. Never raises."""
    if folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "client.log", "a", encoding="utf-8") as stream:
            stream.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}, {text}\n")
