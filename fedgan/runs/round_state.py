"""What the server leaves on its disk after each round, and how it goes on from there.

`checkpoints/round-N.safetensors` holds all arrays that travel, the strategy's moments and the server's own average of the
generator where the hospitals' does not travel; the JSON beside it holds the totals and the round's line of
`metrics.jsonl`. The line is written after the checkpoint: whoever stops in between finds it in the JSON again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedgan import files
from fedgan.config import PrivacySettings, Settings, to_dict
from fedgan.data.dataset import ImageDataset
from fedgan.errors import CheckpointError
from fedgan.run_folder import RunFolder
from fedgan.runs.compatibility import reason_to_end
from fedgan.runs.participants import Member, Participant
from fedgan.training.checkpoint import FormatError, load_tensors, save_tensors
from fedgan.training.ema import AVERAGE
from fedgan.training.trainer import Trainer
from fedgan.training.warm_start import warm_start

STRATEGY_STATE = "strategy/"  # prefix of the strategy's moments among the tensors
KEEP_ROUNDS = 3


@dataclass
class State:
    """The federation after `round`: arrays float32 by prefixed key, totals over the whole run.

    `exhausted`: hospitals whose privacy ledger allows no further step, each {name, number, images (of its training split),
    units (of privacy), round (its last)}. They take no more part in this run, also after a restart.
    `participants`: every hospital that has ever joined. `since`: by hospital number, the round whose state it goes on from, that of its
    last answer that counted.
    `average`: the generator's moving average (`ema/…`) where it does not travel and the server keeps it; else empty.
    `phantoms`: all images of all hospitals are phantoms, by the hospitals' own statement.
    """

    round: int
    arrays: dict[str, np.ndarray]
    moments: dict[str, np.ndarray] = field(default_factory=dict)
    images_seen: int = 0
    bytes_exchanged: int = 0
    wall_seconds: float = 0.0
    line: dict[str, Any] | None = None
    label_names: tuple[str, ...] = ()
    exclusive: bool = True
    channels: int = 0
    resolution: int = 0
    exhausted: list[dict[str, Any]] = field(default_factory=list)
    phantoms: bool = False
    participants: list[Participant] = field(default_factory=list)
    since: dict[int, int] = field(default_factory=dict)
    average: dict[str, np.ndarray] = field(default_factory=dict)

    def is_over(self, settings: Settings) -> bool:
        """Whether no round is left: all are done, or fewer hospitals may train than the strategy needs."""
        return self.round >= settings.federation.rounds or bool(self.ended_early(settings))

    def ended_early(self, settings: Settings) -> str:
        """The sentence that says which spent budgets end the run (fedgan/runs/compatibility.py:reason_to_end); empty where none do."""
        return reason_to_end(settings, sorted(row["name"] for row in self.exhausted))


def initial_state(settings: Settings, members: Sequence[Member]) -> State:
    """Round 0: the networks as `settings.seed` initialises them, the same that every hospital makes for itself."""
    first = members[0]
    shape = (1, first.channels, first.resolution, first.resolution)
    nobody = ImageDataset(
        "server",
        np.zeros(shape, np.uint8),
        np.zeros((1, len(first.label_names)), np.uint8),
        first.label_names,
    )
    begin = Trainer(
        dataclasses.replace(settings, privacy=PrivacySettings()), nobody
    )  # no image is seen here
    warm_start(begin, settings)
    arrays = begin.get_parameters(settings.federation.exchange)
    phantoms = all(member.phantoms for member in members)
    shape_of = (first.label_names, first.exclusive, first.channels, first.resolution)
    participants = [member.participant(0) for member in members]
    average = begin.get_parameters(["ema"]) if keeps_average(settings) else {}
    return State(
        0,
        arrays,
        {},
        0,
        0,
        0.0,
        None,
        *shape_of,
        phantoms=phantoms,
        participants=participants,
        average=average,
    )


def keeps_average(settings: Settings) -> bool:
    """Whether the server averages the generators of its rounds, because the hospitals' averages do not travel."""
    return "ema" not in settings.federation.exchange


def save_state(run: RunFolder, settings: Settings, state: State, experiment: str) -> None:
    """Write the checkpoint of a round and remove those that nobody needs any more.

    Kept are the newest three and those of the rounds that the evaluator looked at.
    """
    meta = {
        "round": state.round,
        "images_seen": state.images_seen,
        "bytes_exchanged": state.bytes_exchanged,
        "wall_seconds": state.wall_seconds,
        "settings": to_dict(settings),
        "label_names": list(state.label_names),
        "exclusive": state.exclusive,
        "channels": state.channels,
        "resolution": state.resolution,
        "experiment": experiment,
        "line": state.line,
        "exhausted": state.exhausted,
        "phantoms": state.phantoms,
        "participants": [dataclasses.asdict(participant) for participant in state.participants],
        "since": {str(number): done for number, done in sorted(state.since.items())},
    }
    tensors = {
        key: torch.from_numpy(np.ascontiguousarray(array))
        for key, array in (state.arrays | state.average | state.moments).items()
    }
    save_tensors(run.checkpoint(state.round), tensors, meta)
    old = state.round - KEEP_ROUNDS
    if old >= 0 and not is_evaluated(settings, old):
        for path in (run.checkpoint(old).with_suffix(".json"), run.checkpoint(old)):
            path.unlink(missing_ok=True)


def load_state(
    run: RunFolder, experiment: str, on_event: Callable[[dict[str, Any]], None] = lambda event: None
) -> State | None:
    """The federation after the newest whole round, or None where no round is complete.

    A damaged checkpoint is put aside (`.damaged`) and the one before serves, which is told. Raises `CheckpointError` when none is
    left of those that were there, or when the checkpoint belongs to another experiment.
    """
    while (newest := run.last_round()) is not None:
        path = run.checkpoint(newest)
        try:
            tensors, meta = load_tensors(path)
        except FormatError:
            raise
        except CheckpointError as error:
            aside = path.with_name(path.name + ".damaged")
            path.replace(aside)
            if run.last_round() is None:
                raise CheckpointError(
                    f"{error}: there is none before it; begin the run anew"
                ) from None
            text = f"{path.name} is damaged and now {aside.name}: going on from round {run.last_round()}"
            on_event({"event": "note", "text": text})
            continue
        if meta.get("experiment") != experiment:
            raise CheckpointError(
                f"{path} belongs to another experiment than {run.environment}: was it copied here?"
            )
        return _state(newest, tensors, meta)
    return None


def _state(
    round_number: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]
) -> State:
    arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
    own = (
        (STRATEGY_STATE,)
        if "ema" in meta["settings"]["federation"]["exchange"]
        else (STRATEGY_STATE, AVERAGE)
    )
    return State(
        round=round_number,
        arrays={key: array for key, array in arrays.items() if not key.startswith(own)},
        average={
            key: array
            for key, array in arrays.items()
            if key.startswith(AVERAGE) and AVERAGE in own
        },
        moments={key: array for key, array in arrays.items() if key.startswith(STRATEGY_STATE)},
        images_seen=meta["images_seen"],
        bytes_exchanged=meta["bytes_exchanged"],
        wall_seconds=meta["wall_seconds"],
        line=meta["line"],
        label_names=tuple(meta["label_names"]),
        exclusive=meta["exclusive"],
        channels=meta["channels"],
        resolution=meta["resolution"],
        exhausted=meta.get("exhausted", []),
        phantoms=meta["phantoms"],
        participants=[
            Participant(**row | {"label_counts": tuple(row["label_counts"])})
            for row in meta["participants"]
        ],
        since={int(number): done for number, done in meta.get("since", {}).items()},
    )


def is_evaluated(settings: Settings, round_number: int) -> bool:
    """Whether the evaluator looks at this round (round 0 is nobody's; the last is the final evaluation's)."""
    every = settings.evaluation.every
    return round_number > 0 and (
        round_number == settings.federation.rounds or (every > 0 and round_number % every == 0)
    )


def exhausted_in(run: RunFolder) -> list[str]:
    """Names of those whose privacy budget was spent by the newest round."""
    newest = run.last_round()
    meta = (
        run.read_json(run.checkpoint(newest).with_suffix(".json")) if newest is not None else None
    )
    return [row["name"] for row in (meta or {}).get("exhausted", [])]


def is_over(run: RunFolder, settings: Settings) -> bool:
    """Whether a federation's run has no round left: all are done, or spent privacy budgets leave the strategy too few."""
    newest = run.last_round()
    if newest is None:
        return False
    return newest >= settings.federation.rounds or bool(reason_to_end(settings, exhausted_in(run)))


def has_line(run: RunFolder, round_number: int) -> bool:
    """Whether `metrics.jsonl` already tells of this round."""
    return any(line.get("round") == round_number for line in files.read_json_lines(run.metrics))


def write_line(run: RunFolder, line: dict[str, Any]) -> None:
    """Write a round's line to `metrics.jsonl`, in the place of any line of this or a later round (an abandoned try).

    The file is written anew each time: appending behind a torn line would lose both.
    """
    rows = [
        old for old in files.read_json_lines(run.metrics) if old.get("round", 0) < line["round"]
    ]
    files.write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in [*rows, line]))
