"""Damaged and hostile inputs of every reader: the project's own error, in bounded time and memory.

Each target is a function of one input, which is a mutation of a valid one. The seed is fixed, so
each run tries the same inputs: few in `make test`, 30,000 in `make fuzz` (FEDGAN_FUZZ=number).
The seeds of inputs that once failed are tried first.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image
from small_federation import tiny, write_shards

from client.hospital import TrainRequest
from client.policy import read_policy
from fedgan import files
from fedgan.config import Settings, load_scenario, settings_hash, to_dict
from fedgan.data.importers import import_source, read_folder, read_manifest, read_npz
from fedgan.data.shard import Shard
from fedgan.deployment import registrations
from fedgan.errors import FedganError
from fedgan.exchange.bundle import pack_bundle, unpack_bundle
from fedgan.exchange.outbound_log import OutboundLog
from fedgan.privacy.ledger import Ledger
from fedgan.redact import is_printable
from fedgan.run_folder import RunFolder, read_lines
from fedgan.runs.participants import Member
from fedgan.runs.preparation import experiment_of
from fedgan.runs.round_state import initial_state, load_state, save_state
from fedgan.training.checkpoint import load_generator, load_tensors
from server.aggregation.update_checks import check_update
from server.requests import failure_reason
from server.roster import read_member

INPUTS = int(os.environ.get("FEDGAN_FUZZ", "1300"))
SECONDS = 3.0  # per input
GROWTH = 512 << 20  # bytes of this process over all inputs of a target
# by target: seeds of inputs that once failed
FAILED = {"introductions": (9, 13, 28), "manifests": (124, 665), "requests": (0,), "shards": (23,)}
SCENARIO = Path(__file__).parents[1] / "simulations" / "three_hospitals.toml"
TOKENS = (
    *(b"[" * 2000, b"{" * 2000, b'{"a":' * 200, b"9" * 5000, b"1e999", b"-1", b"NaN", b"null"),
    *(b"\x00", b"\xff\xfe", b"\xe2\x80\xae", b"\x1b[2J", b"\r\n", b'"""', b"../", b"__class__"),
    *(b"(10**9,", b"|O", b"(-1,)", (2**63 - 1).to_bytes(8, "little"), b"\xff" * 8, b""),
)
ODD: tuple[Any, ...] = (
    *(0, -1, 1, 2**31, 2**63 - 1, -(2**63), 1.5, 1e308, float("nan"), float("inf")),
    *(True, False, "", "a" * 5000, "\x1b[2J", "a\nb", "\u202e", "../../x", b"\xff" * 9),
    *([], [0] * 5000, ["a", "a"], [""], ["\u200b"], [1.5, float("nan")]),
)


class TooSlowError(BaseException):
    """Raised in an input that takes more than `SECONDS`; no handler of the project catches it."""


def mutated(rng: random.Random, data: bytes) -> bytes:
    """One to four changes of bytes: flips, cuts, doubled pieces, numbers and tokens."""
    text = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(text) + 1), rng.choice((1, 1, 2, 4, 8, 16, 64))
        kind = rng.randrange(6)
        if kind == 0 and text:
            text[rng.randrange(len(text))] = rng.randrange(256)
        elif kind == 1:
            del text[at : at + length]
        elif kind == 2:
            text[at:at] = text[at : at + length] * rng.choice((1, 2, 50))
        elif kind == 3:
            text[at : at + length] = rng.choice(TOKENS)
        elif kind == 4:
            del text[at:]
        else:
            text[at : at + length] = rng.randbytes(length)
    return bytes(text)


def odd_values(rng: random.Random, facts: dict[str, Any]) -> dict[str, Any]:
    """A dictionary with one to three values replaced, removed or added."""
    changed = dict(facts)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*facts, "other"])
        changed.pop(key, None)
        if rng.random() < 0.8:
            changed[key] = rng.choice(ODD)
    return changed


def as_message(records: dict[str, Any]) -> Message | None:
    """A message with these records; None where Flower itself cannot hold one of the values."""
    try:
        return Message(RecordDict(records), dst_node_id=1, message_type="train")
    except (TypeError, ValueError, OverflowError):
        return None


# --- the targets: each returns the inputs' reader, given a folder -------------------------------

Try = Callable[[random.Random], None]


def file_target(
    folder: Path, valid: dict[str, bytes], read: Callable[[Path], Any], where: str
) -> Try:
    """Mutate one of the files of `valid` (by path) per input, and read `where`."""

    def attempt(rng: random.Random) -> None:
        name = rng.choice(sorted(valid))
        for other, data in valid.items():
            path = folder / other
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(mutated(rng, data) if other == name else data)
        read(folder / where)

    return attempt


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of all files of a folder, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def bundles(folder: Path, settings: Settings) -> Try:
    arrays = {f"g/{number}": np.ones((2, number + 1), np.float32) for number in range(4)}
    valid = pack_bundle(arrays)

    def attempt(rng: random.Random) -> None:
        for array in unpack_bundle(mutated(rng, valid), valid).values():
            array.sum()

    return attempt


def a_run(folder: Path, settings: Settings) -> RunFolder:
    """A prepared run after its initial round."""
    run = RunFolder.at(folder / "run")
    run.path.mkdir()
    run.write_settings(settings)
    environment = {"experiment": "fuzz", "settings_hash": settings_hash(run.settings())}
    files.write_json(run.environment, environment)
    member = Member(1, 0, "north", 8, ("dark", "bright"), True, 1, 16)
    state = initial_state(settings, [member])
    for number in (0, 1):
        state.round, state.line = number, {"round": number, "images_seen": 8, "hospitals": []}
        save_state(run, settings, state, "fuzz")
    files.write_text(run.metrics, json.dumps(state.line) + "\n")
    files.write_json(run.hospitals, [{"name": "north", "counts": {}, "images": {"train": 8}}])
    return run


def run_files(folder: Path, settings: Settings) -> Try:
    run = a_run(folder, settings)
    valid = {name: data for name, data in contents(run.path).items() if "checkpoints" not in name}

    def read(path: Path) -> None:
        for part in (
            *(run.settings, run.hospital_rows, lambda: read_lines(run)),
            *(lambda: experiment_of(run), lambda: load_state(run, "fuzz")),
        ):
            with contextlib.suppress(FedganError):
                part()

    return file_target(run.path, valid, read, ".")


def checkpoints(folder: Path, settings: Settings) -> Try:
    run = a_run(folder, settings)
    valid = {name: data for name, data in contents(run.path).items() if "round-00001" in name}

    def read(path: Path) -> None:
        for part in (load_tensors, load_generator, lambda _: load_state(run, "fuzz")):
            with contextlib.suppress(FedganError):
                part(path)
        for damaged in run.checkpoints.glob("*.damaged"):
            damaged.unlink()

    return file_target(run.path, valid, read, "checkpoints/round-00001.safetensors")


def scenarios(folder: Path, settings: Settings) -> Try:
    return file_target(folder, {"a.toml": SCENARIO.read_bytes()}, load_scenario, "a.toml")


def overrides(folder: Path, settings: Settings) -> Try:
    pairs = [
        f"{section}.{key}={json.dumps(value)}"
        for section, table in to_dict(settings).items()
        if isinstance(table, dict)
        for key, value in table.items()
    ]

    def attempt(rng: random.Random) -> None:
        given = [mutated(rng, rng.choice(pairs).encode()).decode(errors="replace")]
        key = rng.choice(pairs).partition("=")[0]
        load_scenario(SCENARIO, [*given, f"{key}={rng.choice(ODD)}"])

    return attempt


def npz_packs(folder: Path, settings: Settings) -> Try:
    source = folder / "valid.npz"
    images = np.arange(24 * 256, dtype=np.uint32).astype(np.uint8).reshape(24, 16, 16)
    columns = {"label": np.arange(24) % 2, "patient": np.array([f"p{row}" for row in range(24)])}
    np.savez(source, images=images, **columns)
    card = json.dumps({"labels": ["a", "b"], "title": "t"}).encode()
    valid = {"a.npz": source.read_bytes(), "a.json": card}
    return file_target(folder, valid, lambda path: _imported(read_npz(path), folder), "a.npz")


def image_folders(folder: Path, settings: Settings) -> Try:
    valid = {}
    for number, suffix in enumerate(("png", "jpg", "bmp", "tif", "webp")):
        path = folder / f"valid.{suffix}"
        Image.fromarray(np.full((16, 16), 40 * number, np.uint8)).save(path)
        valid[f"source/class-{number % 2}/{number}.{suffix}"] = path.read_bytes()
    return file_target(folder, valid, lambda path: _imported(read_folder(path), folder), "source")


def manifests(folder: Path, settings: Settings) -> Try:
    for number in range(6):
        Image.fromarray(np.full((16, 16), 40 * number, np.uint8)).save(folder / f"{number}.png")
    rows = "".join(f"{number}.png,{'ab'[number % 2]},p{number},train\n" for number in range(6))
    valid = {"a.csv": f"path,label,patient,split\n{rows}".encode()}
    return file_target(folder, valid, lambda path: _imported(read_manifest(path), folder), "a.csv")


def _imported(source: Any, folder: Path) -> None:
    shutil.rmtree(folder / "out", ignore_errors=True)
    import_source(source, folder / "out")


def shards(folder: Path, settings: Settings) -> Try:
    root = write_shards(folder / "data", (16,))
    valid = contents(root)

    def read(path: Path) -> None:
        (card,) = path.glob("*/card.json")
        shard = Shard.open(card.parent)
        np.asarray(shard.images[np.arange(min(4, len(shard)))])

    return file_target(root, valid, read, ".")


def records(folder: Path, settings: Settings) -> Try:
    """Registration lists, ledgers and outbound logs; a ledger's chain refuses any change."""
    row = registrations.Registration("north", "register/north.pub", "SHA256:x", "2026-01-01")
    valid = {
        "list": registrations.as_text([row]).encode(),
        "ledger.jsonl": b'{"format": 1, "hash": "x", "steps": 3}\n',
        "outbound.jsonl": b'{"round": 1, "records": [["a", "arrays", []]], "hash": "x"}\n',
    }

    def read(path: Path) -> None:
        for part in (
            lambda: registrations.read(path / "list"),
            lambda: Ledger(path / "ledger.jsonl").entries(),
            lambda: OutboundLog(path / "outbound.jsonl").read(),
        ):
            with contextlib.suppress(FedganError):
                part()

    return file_target(folder, valid, read, ".")


def introductions(folder: Path, settings: Settings) -> Try:
    facts = {"number": 0, "name": "a", "images": 5, "label_names": ["dark"], "exclusive": True}
    facts |= {"channels": 1, "resolution": 16, "units": 5, "label_counts": [5], "phantoms": False}

    def attempt(rng: random.Random) -> None:
        try:
            record = ConfigRecord(odd_values(rng, facts))
        except (TypeError, ValueError, OverflowError):
            return  # Flower itself refuses the value
        if message := as_message({"hospital": record}):
            member = read_member(7, message, settings, rng.choice(("", "north", "north=5", "x=y")))
            assert is_printable(member.name)

    return attempt


def replies(folder: Path, settings: Settings) -> Try:
    member = Member(1, 0, "north", 8, ("dark", "bright"), True, 1, 16)
    sent = {"g/a": np.zeros((2, 3), np.float32), "d/b": np.zeros(4, np.float32)}
    facts = {"images_seen": 8, "images": 8, "threads": 1, "round": 1, "loss_g": 0.5}

    def array(rng: random.Random, value: np.ndarray) -> Array:
        valid = Array(value)
        if rng.random() < 0.6:
            return valid
        data = mutated(rng, valid.data)
        shape = rng.choice((list(value.shape), [2**40, 3], [-1], []))
        dtype = rng.choice(("float32", "float64", "object", "<U9", "x"))
        return Array(dtype, shape, rng.choice((valid.stype, "other")), data)

    def attempt(rng: random.Random) -> None:
        try:
            given = {key: array(rng, value) for key, value in sent.items()}
            content = {
                "arrays": ArrayRecord(given),
                "facts": ConfigRecord(odd_values(rng, facts)),
                "metrics": MetricRecord(odd_values(rng, {"num_examples": 8})),
            }
        except (TypeError, ValueError, OverflowError):
            return
        content.pop(rng.choice(("arrays", "facts", "metrics", "none")), None)
        if message := as_message(content):
            check_update(member, message, sent, 1, 8)

    return attempt


def error_texts(folder: Path, settings: Settings) -> Try:
    from flwr.app import Error

    valid = b"hospital: ValueError while training round 2 (partition-id 3)"

    def attempt(rng: random.Random) -> None:
        text = mutated(rng, valid).decode(errors="replace")
        code = rng.choice((0, 1, 3, 5, 8, 99))
        request = as_message({"a": ConfigRecord({"b": 1})})
        assert request
        why = failure_reason(Message(Error(code=code, reason=text), reply_to=_received(request)))
        assert is_printable(why)
        assert len(why) <= 400

    return attempt


def _received(message: Message) -> Message:
    """A message as a node receives it, with an id that a reply can name."""
    message.metadata.__dict__["_message_id"] = "id"
    return message


def requests(folder: Path, settings: Settings) -> Try:
    config = {"experiment": "e", "run": "/r", "settings": json.dumps(to_dict(settings))}
    config |= {"round": 1, "since": 0, "images": 8, "planned": 8, "batch": 4, "least_noise": 1.0}
    node = {"partition-id": 0, "data-root": "/d", "state-dir": "/s", "max-epsilon": 4.0}

    def attempt(rng: random.Random) -> None:
        with contextlib.suppress(FedganError):
            read_policy(odd_values(rng, node | {"min-images": 3, "unit": "patient"}))
        if rng.random() < 0.5:
            text = mutated(rng, config["settings"].encode()).decode(errors="replace")
            TrainRequest.read(config | {"settings": text})
        else:
            TrainRequest.read(odd_values(rng, config))

    return attempt


# --- the test -----------------------------------------------------------------------------------

TARGETS = (
    *(bundles, run_files, checkpoints, scenarios, overrides, npz_packs, image_folders, manifests),
    *(shards, records, introductions, replies, error_texts, requests),
)


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.__name__)
def test_any_input_gives_a_result_or_an_own_error(
    target: Callable[[Path, Settings], Try], tmp_path: Path
) -> None:
    settings = tiny(write_shards(tmp_path / "data", (8,)), hospitals=1, rounds=2, kimg=0.016)
    (tmp_path / "fuzz").mkdir()
    torch.set_num_threads(1)
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    attempt = target(tmp_path / "fuzz", settings)
    begun, worst = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    for number in (*FAILED.get(target.__name__, ()), *range(INPUTS // len(TARGETS))):
        start = time.perf_counter()
        try:
            with time_limit():
                attempt(random.Random(number))
        except FedganError:
            pass
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            pytest.fail(f"input {number} of {target.__name__}: {type(error).__name__}: {error}")
        worst = max(worst, time.perf_counter() - start)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun) << 10
    print(f"{target.__name__}: slowest {worst:.2f} s, {grown >> 20} MiB more", file=sys.stderr)
    assert grown < GROWTH
