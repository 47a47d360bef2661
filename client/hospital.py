"""A hospital's own shard, state and logs. Nothing here is shared with other hospitals.

In a simulation the state lies in a folder of the run (`hospitals/NAME`), and the shard is the one
with the hospital's number. In a deployment both come from the SuperNode's node-config (`data-root`,
`state-dir`), and no path from the server is read or written; its limits are in client/policy.py. A
hospital is simulated when its process was started by `fedgan simulate` (`SIMULATION` in its
environment) or by Flower's own engine (Ray's actors).

The state folder of an experiment holds the states of the last rounds, and in `experiment.json` what
the first request pinned: a later request with other values is refused. One process at a time
trains (`LocalHospital.locked`). docs/explanation/federation.md has the rules.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgan import files
from fedgan.config import Settings, from_dict, to_dict
from fedgan.data.federation import Hospital, open_hospital, open_hospitals
from fedgan.errors import CheckpointError, ConfigError
from fedgan.exchange.outbound_log import NAME as OUTBOUND
from fedgan.redact import printable
from fedgan.run_folder import RunFolder

SIMULATION = "FEDGAN_SIMULATION"  # environment variable, "1" in simulated hospitals
KEEP_STATES = 3  # a server that lost its last round goes back by one; one more as reserve
PROGRESS_SECONDS = 0.5
STATES = "state-*"  # files of states
TEMPORARY = (".*.part", "*.part", "*.tmp")  # of killed processes
LOG_LINE, LOG_LINES = 2000, 200  # characters per line and lines of an entry of client.log


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
        """Parse a message's ConfigRecord.

        Raises `ConfigError` for an unsafe experiment id, and for values that no server sends.
        """
        experiment = str(config.get("experiment"))
        if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z_-]{0,63}", experiment):
            raise ConfigError(
                "the server's experiment id is no name of up to 64 letters, digits, '-' and '_': "
                "it names a folder of this hospital"
            )
        try:
            tree = files.parse_json(str(config["settings"]))
        except (KeyError, ValueError):
            raise ConfigError("the server's settings are no JSON") from None
        counts = ("round", "since", "images", "planned", "batch")
        numbers = {key: config.get(key, 0) for key in counts}
        noise = config.get("least_noise", 0.0)
        if any(type(value) is not int or not 0 <= value < 2**31 for value in numbers.values()):
            raise ConfigError(f"the server's {', '.join(counts)} are not whole numbers from 0")
        if type(noise) not in (int, float) or not 0 <= noise < math.inf:
            raise ConfigError("the server's least_noise is no number from 0")
        return TrainRequest(
            from_dict(tree, source="the server's settings"),
            experiment,
            str(config.get("run", "")),
            **numbers,
            least_noise=float(noise),
            note=str(config.get("note", "")),
        )


@dataclass(frozen=True)
class LocalHospital:
    """A hospital with its shard and the paths of its state and outbound log."""

    number: int
    hospital: Hospital
    folder: Path
    outbound: Path

    def state(self, round_number: int) -> Path:
        """Path of the Trainer's state after `round_number`."""
        return self.folder / f"state-{round_number:05d}.safetensors"

    def states(self) -> list[int]:
        """Rounds of the states in the folder, also of damaged ones, ascending."""
        numbers = (path.stem.removeprefix("state-") for path in self.folder.glob(STATES))
        return sorted({int(number) for number in numbers if number.isdigit()})

    @contextlib.contextmanager
    def locked(self, request: TrainRequest, seconds: float) -> Iterator[None]:
        """Wait up to `seconds` until no other process works on the states, and hold their lock.

        Removes temporary files of killed processes. Raises `ConfigError` when the other process
        does not end.
        """

        def on_wait() -> None:
            text = f"round {request.round} waits for another process that trains this hospital"
            log(self.folder, text)

        with files.locked(self.folder, seconds, on_wait):
            for pattern in TEMPORARY:
                for path in self.folder.glob(pattern):
                    path.unlink(missing_ok=True)
            yield

    def check_pins(self, asked: TrainRequest, trains: bool) -> None:
        """Compare a request with what the experiment's first request for training pinned.

        `trains`: whether this is such a request; the first one pins its values. Raises
        `ConfigError` for other values, `CheckpointError` where the pinned ones are unreadable: they
        are not replaced silently.
        """
        label, pins = self.folder / "experiment.json", pins_of(asked)
        kept = _read_label(label)
        if kept is None or kept["experiment"] != asked.experiment:
            if trains:
                self._write_pins(label, asked.experiment, pins, is_foreign=kept is not None)
            return
        first = kept["pinned"]
        numbers = REQUESTED if asked.settings.privacy.on and trains else ()
        differing = [
            f"{key} = {pins.get(key)!r}, pinned is {first.get(key)!r}"
            for key in sorted((first.keys() | pins.keys()) - set(REQUESTED)) + list(numbers)
            if pins.get(key) != first.get(key)
            # may rise: a hospital that joins later may need more noise
            and not (key == LEAST_NOISE and asked.least_noise >= first.get(key, 0.0))
        ]
        if differing:
            raise ConfigError(
                "the request differs from what the first request of this experiment pinned: "
                f"{'; '.join(differing)}; begin a new run for other settings"
            )

    def _write_pins(
        self, label: Path, experiment: str, pins: Mapping[str, Any], is_foreign: bool
    ) -> None:
        if is_foreign:  # a folder that another experiment has used
            for path in self.folder.glob(STATES):
                path.unlink()
        elif self.states():
            text = "experiment.json was lost: this experiment's settings are pinned anew"
            log(self.folder, text)
        names = {"experiment": experiment, "hospital": self.hospital.name}
        files.write_json(label, {**names, "pinned": pins})

    def check_is_newest(self, request: TrainRequest) -> None:
        """Raise `CheckpointError` for a request that is older than the states.

        A server that lost its last rounds repeats them from a state that is still here. A request
        for an earlier round than the newest state's, whose own state (`since`) is gone, is an old
        one.
        """
        states = self.states()
        repeated = [number for number in states if number >= request.round]
        is_gone = request.since not in states if request.since else len(repeated) >= KEEP_STATES
        if states and request.round < states[-1] and is_gone:
            raise CheckpointError(
                f"the request for round {request.round} from round {request.since} is older than "
                f"this hospital's state of round {states[-1]}: an old process or message"
            )

    def remove_old_states(self, request: TrainRequest) -> None:
        """Keep this round's state, the one that it continued, and the last few before; remove
        others before this round.

        Those between the two belong to replies that did not count. States of later rounds are
        another process's, or those of rounds that a server repeats.
        """
        counted = [number for number in self.states() if number <= request.since]
        kept = counted[-(KEEP_STATES - 1) :]
        for path in self.folder.glob(STATES):
            number = path.stem.removeprefix("state-")
            if number.isdigit() and int(number) < request.round and int(number) not in kept:
                path.unlink(missing_ok=True)


# --- pinned settings ------------------------------------------------------------------------------

# What decides what leaves a hospital. Not federation.wire and secure_range: a run whose numbers
# exceed 16 bits or the range continues with another format of the same numbers.
PINNED: dict[str, tuple[str, ...]] = {
    "privacy": (),  # all keys
    "model": (),
    "data": ("resolution", "label_map"),
    "training": ("batch_size", "sampling", "labels"),
    "federation": ("secure", "exchange", "delta", "share_label_counts"),
}
LEAST_NOISE = "least_noise"
REQUESTED = ("planned", "batch", LEAST_NOISE)  # with privacy: from them follows the noise


def pins_of(asked: TrainRequest) -> dict[str, Any]:
    """What a request pins, by key."""
    tree = to_dict(asked.settings)
    pins = {
        f"{section}.{key}": tree[section][key]
        for section, keys in PINNED.items()
        for key in keys or tree[section]
    }
    if asked.settings.privacy.on:
        pins |= {key: getattr(asked, key) for key in REQUESTED}
    return pins


def _read_label(path: Path) -> dict[str, Any] | None:
    """Content of experiment.json; None where it is missing."""
    try:
        label = files.parse_json(path.read_bytes())
        if isinstance(label["experiment"], str) and isinstance(label["pinned"], dict):
            return dict(label)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise CheckpointError(
        f"{path} is damaged: it holds the pinned settings of this experiment; put back a "
        "copy, or delete it to pin those of the next request"
    )


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
    shard_folder = Path(own_state) if own_state else hospital.shard_path or folder
    # In a simulation the shard's folder may be read-only.
    log_place = shard_folder if own_state or os.access(shard_folder, os.W_OK) else folder
    return LocalHospital(number, hospital, folder, log_place / OUTBOUND)


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
    """Append a text with the time to this hospital's `client.log`. Never raises.

    The text may be the server's: invisible characters are escaped, lines cut, and all lines but the
    first are indented, so that no text looks like another entry.
    """
    if folder is None:
        return
    lines = text.rstrip("\n").split("\n")
    if len(lines) > LOG_LINES:
        lines = [*lines[: LOG_LINES // 2], "…", *lines[-LOG_LINES // 2 :]]
    entry = "\n    ".join(printable(line, LOG_LINE) for line in lines)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "client.log", "a", encoding="utf-8") as stream:
            stream.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}, {entry}\n")
