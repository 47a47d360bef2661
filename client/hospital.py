"""One hospital's place: its shard, its disk, its log. Nothing here is shared with anybody.

In a simulation the place is a folder of the run (`hospitals/NAME`) and the shard is the one with the
hospital's number. In a deployment both come from the SuperNode's own node-config (`data-root`,
`state-dir`), and no path that a server sends is read or written; its `max-epsilon` and `require-secure` bind
whatever the server asks. A simulation is a process that `fedgan simulate` (by `SIMULATION` in its environment) or
Flower's own engine (Ray's actors) has started.
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

SIMULATION = "FEDGAN_SIMULATION"  # "1" in the environment of simulated hospitals
KEEP_STATES = 3  # a server that lost its last round goes back one; one more for good measure
PROGRESS_SECONDS = 0.5


@dataclass(frozen=True)
class TrainRequest:
    """What the server asks for. `images`: real images of this round, `planned`: of all rounds, `batch`: of a step here;
    `since`: the round whose state is continued (0: none); `least_noise`: a noise multiplier that is gone above at the least;
    `note`: what became of this hospital's last answer, where it did not count."""

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
        """Read the ConfigRecord of a message. Raises `ConfigError` for an experiment id that could not be a folder's name."""
        experiment = str(config["experiment"])
        if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}", experiment):
            raise ConfigError(
                "the server's experiment id is not made of up to 64 letters and digits: it would name a folder here"
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
    """A hospital that knows its shard and where its state lies."""

    number: int
    hospital: Hospital
    folder: Path
    ledger: Path
    outbound: Path

    def state(self, round_number: int) -> Path:
        """The Trainer's state after `round_number`."""
        return self.folder / f"state-{round_number:05d}.safetensors"

    def state_of(self, request: TrainRequest) -> Path:
        """The state that the order continues. Raises `CheckpointError` when it is not here or of another experiment."""
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

    def begin(self, request: TrainRequest) -> None:
        """Mark the folder as the experiment's, before its first round. States of another experiment are removed."""
        label = self.folder / "experiment.json"
        for old in self.folder.glob("state-*"):
            old.unlink()
        files.write_json(label, {"experiment": request.experiment, "hospital": self.hospital.name})

    def keep_states(self, request: TrainRequest) -> None:
        """Keep the state of this round, the one that it went on from, and the last few before that; remove the others.

        States between the two are of answers that did not count.
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
    """Whether this hospital may use the server's paths: it is simulated on the server's machine and has no data of its own."""
    ray = sys.modules.get("ray")
    simulated = os.environ.get(SIMULATION) == "1" or (ray is not None and ray.is_initialized())
    return simulated and not node.get("data-root")


def find_local_hospital(request: TrainRequest, node: Mapping[str, Any]) -> LocalHospital:
    """The place of the hospital on this node. Raises `DataError` or `ConfigError` when its shard cannot be opened."""
    number = int(node["partition-id"])
    own_data, own_state = str(node.get("data-root", "")), str(node.get("state-dir", ""))
    if not trusts_paths(node):
        if missing := [key for key in ("data-root", "state-dir") if not node.get(key)]:
            raise ConfigError(
                f"this node names no {missing[0]}: say in its node-config where its own shard and state lie"
            )
        hospital = _open_own(request.settings, own_data)
    else:
        everyone = _open_all(
            request.settings, request.settings.data.root or str(Path(request.run) / "shards")
        )
        if number >= len(everyone):
            raise ConfigError(
                f"partition-id = {number}, but there are {len(everyone)} hospitals (counted from 0)"
            )
        hospital = everyone[number]
    folder = (
        Path(own_state) / request.experiment
        if own_state
        else RunFolder(Path(request.run)).hospital_state(hospital.name)
    )
    # what is known of the shard outlives every run: it lies beside the shard, or where this node keeps its state
    place = Path(own_state) if own_state else hospital.place or folder
    # a simulation may read shards that nobody may write to
    sent = place if own_state or os.access(place, os.W_OK) else folder
    return LocalHospital(number, hospital, folder, place / LEDGER, sent / OUTBOUND)


def apply_epsilon_cap(request: TrainRequest, node: Mapping[str, Any]) -> TrainRequest:
    """The order under this node's own `max-epsilon`: the smaller of it and the server's `privacy.max_epsilon` counts.

    Raises `ConfigError` where it is no number above 0, and for a run without privacy, which no epsilon bounds.
    """
    if _own(node, "max-epsilon") is None:
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
            f"this node's config says max-epsilon = {limit:g}, and the run has no privacy: it is refused here; ask for "
            "privacy.epsilon, or take max-epsilon out"
        )
    smaller = min(limit, privacy.max_epsilon or limit)
    settings = dataclasses.replace(
        request.settings, privacy=dataclasses.replace(privacy, max_epsilon=smaller)
    )
    return dataclasses.replace(request, settings=settings)


def check_secure(request: TrainRequest, node: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a run without `federation.secure` where this node's own `require-secure` insists on it.

    Also where it is neither true nor false: a hospital that meant to insist must not be taken for one that did not.
    """
    insists = _own(node, "require-secure", False)
    if str(insists).lower() not in ("true", "false"):
        raise ConfigError(f"require-secure = {insists} in this node's config: give true or false")
    if str(insists).lower() == "true" and not request.settings.federation.secure:
        raise ConfigError(
            "this node's config says require-secure = true, and the run has no secure aggregation: it is refused here; ask for "
            "federation.secure, or take require-secure out"
        )


def _own(node: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """What this node's config says for `key`. Raises `ConfigError` for another spelling of it, which would bind nobody."""
    for name in node:
        if name != key and str(name).lower().replace("_", "-") == key:
            raise ConfigError(f"this node's config has {name}: it is written {key}")
    return node.get(key, default)


def log_folder(request: TrainRequest, node: Mapping[str, Any]) -> Path | None:
    """Where a failure is noted before the hospital's name is known; None where the node names no place of its own."""
    if own := str(node.get("state-dir", "")):
        return Path(own)
    return (
        Path(request.run) / "hospitals" / f"partition-{node['partition-id']}"
        if trusts_paths(node)
        else None
    )


# A process of the simulation serves hospitals for many rounds: shards are mapped once.
@functools.lru_cache(maxsize=1)
def _open_all(settings: Settings, root: str) -> list[Hospital]:
    return open_hospitals(settings, root)


@functools.lru_cache(maxsize=1)
def _open_own(settings: Settings, root: str) -> Hospital:
    return open_hospital(settings, root)


class Progress:
    """Writes `progress.json` now and then: how many of the round's images have been shown. For the eyes of this site."""

    def __init__(self, folder: Path, round_number: int, images: int) -> None:
        self.path, self.round, self.images = folder / "progress.json", round_number, images
        self.next = 0.0

    def __call__(self, shown: int) -> None:
        """Note that `shown` images of this round are done. Never raises: progress is no reason to fail."""
        if (now := time.monotonic()) < self.next and shown < self.images:
            return
        self.next = now + PROGRESS_SECONDS
        with contextlib.suppress(OSError):
            part = self.path.with_suffix(".part")
            part.write_text(
                json.dumps(
                    {"round": self.round, "images": min(shown, self.images), "of": self.images}
                ),
                encoding="utf-8",
            )
            os.replace(part, self.path)


def log_failure(folder: Path | None, round_number: int, doing: str) -> None:
    """Append the current exception with its traceback to this hospital's own `client.log`."""
    log(folder, f"round {round_number}, while {doing}\n{traceback.format_exc()}")


def log(folder: Path | None, text: str) -> None:
    """Append a text with the time to this hospital's own `client.log`. Never raises."""
    if folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "client.log", "a", encoding="utf-8") as stream:
            stream.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}, {text}\n")
