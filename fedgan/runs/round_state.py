"""The server's state after each round: checkpoints, and the lines of metrics.jsonl.

`checkpoints/round-N.safetensors` holds all arrays that travel, the strategy's moments, and the
server's average of the generator where the hospitals' average does not travel. The JSON beside it
holds the totals and the round's line of `metrics.jsonl`. The line is written after the checkpoint,
so that a run that stops in between finds it in the JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgan import files
from fedgan.config import PrivacySettings, Settings, to_dict
from fedgan.data.dataset import ImageDataset
from fedgan.errors import CheckpointError
from fedgan.run_folder import RunFolder, is_line, scan_lines
from fedgan.runs.compatibility import reason_to_end
from fedgan.runs.participants import Member, Participant
from fedgan.runs.preparation import changes_since
from fedgan.training.checkpoint import (
    WRONG,
    FormatError,
    load_tensors,
    save_tensors,
    settings_of_round,
)
from fedgan.training.ema import AVERAGE
from fedgan.training.trainer import Trainer
from fedgan.training.warm_start import warm_start

Arrays = dict[str, np.ndarray]

# keys of a checkpoint's JSON that the state takes as they are, and the types of all
TAKEN = {
    "images_seen": (int, float),
    "bytes_exchanged": (int, float),
    "wall_seconds": (int, float),
    "line": (dict, type(None)),
    "exclusive": (bool,),
    "channels": (int,),
    "resolution": (int,),
    "phantoms": (bool,),
}
KINDS = TAKEN | {"round": (int,), "participants": (list,), "since": (dict,), "exhausted": (list,)}
STRATEGY_STATE = "strategy/"  # prefix of the strategy's moments among the tensors
KEEP_ROUNDS = 3


@dataclass
class State:
    """The federation after `round`: float32 arrays by prefixed key, totals over the whole run.

    `exhausted`: hospitals without privacy budget for another step, each {name, number, images (of
    its training split), units (of privacy), round (its last)}; they train no more in this run.
    `participants`: all hospitals that ever joined. `since`: by hospital number, the round of its
    last reply that counted, from whose state it continues. `average`: the generator's moving
    average (`ema/…`) where the server keeps it, else empty. `phantoms`: all images of all hospitals
    are phantoms, by the hospitals' own statement. `line`: the round's line of metrics.jsonl.
    """

    round: int
    arrays: Arrays
    moments: Arrays = field(default_factory=dict)
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
    average: Arrays = field(default_factory=dict)

    def is_over(self, settings: Settings) -> bool:
        """Whether all rounds are done, or fewer hospitals may train than the strategy needs."""
        return self.round >= settings.federation.rounds or bool(self.ended_early(settings))

    def ended_early(self, settings: Settings) -> str:
        """Why spent privacy budgets end the run; empty where they do not."""
        return reason_to_end(settings, sorted(row["name"] for row in self.exhausted))


def initial_state(settings: Settings, members: Sequence[Member]) -> State:
    """Round 0: the networks initialised by `settings.seed`, as at every hospital."""
    first = members[0]
    shape = (1, first.channels, first.resolution, first.resolution)
    empty = ImageDataset(
        "server",
        np.zeros(shape, np.uint8),
        np.zeros((1, len(first.label_names)), np.uint8),
        first.label_names,
    )
    # without privacy: this Trainer sees no image
    trainer = Trainer(dataclasses.replace(settings, privacy=PrivacySettings()), empty)
    warm_start(trainer, settings)
    return State(
        round=0,
        arrays=trainer.get_parameters(settings.federation.exchange),
        label_names=first.label_names,
        exclusive=first.exclusive,
        channels=first.channels,
        resolution=first.resolution,
        phantoms=all(member.phantoms for member in members),
        participants=[member.participant(0) for member in members],
        average=trainer.get_parameters(["ema"]) if keeps_average(settings) else {},
    )


def keeps_average(settings: Settings) -> bool:
    """Whether the server keeps the generator's average, as the hospitals' do not travel."""
    return "ema" not in settings.federation.exchange


def save_state(run: RunFolder, settings: Settings, state: State, experiment: str) -> None:
    """Write the checkpoint of a round and delete an old one.

    The newest three are kept, and all evaluated rounds.
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
    """The federation after the newest complete round, or None where there is none.

    A damaged checkpoint is renamed (`.damaged`), with a note, and the one before is loaded. Raises
    `CheckpointError` when all are damaged, for another format or experiment, or for other settings
    than config.toml has.
    """
    settings = run.settings()
    while (newest := run.last_round()) is not None:
        path = run.checkpoint(newest)
        try:
            tensors, meta = load_tensors(path)
            state = _state(path, newest, tensors, meta)
        except FormatError:
            raise
        except CheckpointError as error:
            aside = path.with_name(path.name + ".damaged")
            path.replace(aside)
            if run.last_round() is None:
                raise CheckpointError(
                    f"{error}: there is none before it; begin the run again"
                ) from None
            text = (
                f"{path.name} is damaged and renamed to {aside.name}: resuming from round "
                f"{run.last_round()}"
            )
            on_event({"event": "note", "text": text})
            continue
        if meta.get("experiment") != experiment:
            raise CheckpointError(
                f"{path} belongs to another experiment than {run.environment}: was it copied here?"
            )
        if changed := changes_since(run, settings, meta):
            raise CheckpointError(
                f"{path.with_suffix('.json')} was written with other settings than {run.config} "
                f"has now: {changed}; restore the one of them that was changed"
            )
        return state
    return None


def _state(
    path: Path, round_number: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]
) -> State:
    """The state in a checkpoint. Raises `CheckpointError` for values that no run writes."""
    arrays, average, moments = Arrays(), Arrays(), Arrays()
    try:
        has_average = "ema" not in settings_of_round(path, meta).federation.exchange
        for key, tensor in tensors.items():
            if key.startswith(STRATEGY_STATE):
                moments[key] = tensor.numpy()
            elif has_average and key.startswith(AVERAGE):
                average[key] = tensor.numpy()
            else:
                arrays[key] = tensor.numpy()
        if wrong := [key for key, kinds in KINDS.items() if type(meta[key]) not in kinds]:
            raise ValueError(f"{wrong[0]} has the wrong type")
        if meta["round"] != round_number or not (meta["line"] is None or is_line(meta["line"])):
            raise ValueError("it is of another round")
        if any(array.dtype != np.float32 for array in (arrays | average).values()):
            raise ValueError("an array is not float32")
        return State(
            round=round_number,
            arrays=arrays,
            moments=moments,
            average=average,
            label_names=tuple(meta["label_names"]),
            participants=[
                Participant(
                    *(int(row["number"]), str(row["name"]), int(row["images"])),
                    *(int(row["units"]), int(row["joined"])),
                    tuple(map(int, row["label_counts"])),
                    str(row.get("key", "")),
                )
                for row in meta["participants"]
            ],
            since={int(number): int(done) for number, done in meta["since"].items()},
            exhausted=[
                row | {"name": str(row["name"]), "number": int(row["number"])}
                for row in meta["exhausted"]
            ],
            **{key: meta[key] for key in TAKEN},
        )
    except WRONG as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged ({type(error).__name__}: {error}); use an earlier one"
        ) from None


def is_evaluated(settings: Settings, round_number: int) -> bool:
    """Whether this round is evaluated: every `evaluation.every`-th and the last, not round 0."""
    every = settings.evaluation.every
    return round_number > 0 and (
        round_number == settings.federation.rounds or (every > 0 and round_number % every == 0)
    )


def exhausted_in(run: RunFolder) -> list[str]:
    """Names of the hospitals whose privacy budget is spent by the newest round."""
    newest = run.last_round()
    if newest is None:
        return []
    path = run.checkpoint(newest).with_suffix(".json")
    rows = (run.read_json(path) or {}).get("exhausted", [])
    try:
        return [str(row["name"]) for row in rows]
    except WRONG:
        raise CheckpointError(f"{path} is damaged: remove it, and resume the run") from None


def is_over(run: RunFolder, settings: Settings) -> bool:
    """Whether no round of a federation's run is left; as `State.is_over`, from its files."""
    newest = run.last_round()
    if newest is None:
        return False
    return newest >= settings.federation.rounds or bool(reason_to_end(settings, exhausted_in(run)))


# --- metrics.jsonl -------------------------------------------------------------------------------


def has_line(run: RunFolder, round_number: int) -> bool:
    """Whether `metrics.jsonl` has a line of this round."""
    return round_number in scan_lines(run)[0]


def restore_lines(
    run: RunFolder,
    newest: int,
    on_event: Callable[[dict[str, Any]], None],
    complete: Callable[[int, dict[str, Any]], dict[str, Any]] = lambda number, line: line,
) -> None:
    """Restore lines of rounds before `newest` from their checkpoints, and remove damaged lines.

    A note names the lines and rounds. `complete` adds the evaluation, which no checkpoint holds.
    """
    lines, damaged = scan_lines(run)
    restored, lost = list[int](), list[int]()
    for number in range(1, newest):
        if number not in lines:
            try:
                meta = run.read_json(run.checkpoint(number).with_suffix(".json")) or {}
            except CheckpointError:
                meta = {}
            line: Any = meta.get("line")
            if is_line(line) and line["round"] == number:
                lines[number] = complete(number, line)
            (restored if number in lines else lost).append(number)
    if not (damaged or restored):
        return
    _write_lines(run, lines)
    texts = [
        f"{_named(what, numbers)} {then}"
        for what, numbers, then in (
            ("line", damaged, "damaged and left out"),
            ("round", restored, "restored from the checkpoint"),
            ("round", lost, "lost: no checkpoint holds its line"),
        )
        if numbers
    ]
    on_event({"event": "note", "text": f"{run.metrics.name}: {'; '.join(texts)}"})


def _named(what: str, numbers: Sequence[int]) -> str:
    """'round 2 is', or 'rounds 2, 3, 5 and 7 more are'."""
    if len(numbers) == 1:
        return f"{what} {numbers[0]} is"
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return f"{what}s {', '.join(map(str, numbers[:3]))}{more} are"


def _write_lines(run: RunFolder, lines: Mapping[int, dict[str, Any]]) -> None:
    text = "".join(json.dumps(lines[number]) + "\n" for number in sorted(lines))
    files.write_text(run.metrics, text)


def write_line(run: RunFolder, line: dict[str, Any]) -> None:
    """Write a round's line to `metrics.jsonl`, replacing lines of this and later rounds.

    The whole file is rewritten: appending after a torn line would lose both.
    """
    before = {number: old for number, old in scan_lines(run)[0].items() if number < line["round"]}
    _write_lines(run, before | {line["round"]: line})
