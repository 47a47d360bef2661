"""Privacy ledger: crashes, tampering, budgets, pools, and `fedgan ledger`."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from small_federation import ledger_in

from fedgan import files
from fedgan.cli import main
from fedgan.config import from_dict
from fedgan.data.shard import Shard, write_shard
from fedgan.errors import ConfigError, DataError, StorageError
from fedgan.privacy import accounting
from fedgan.privacy import ledger as ledger_module
from fedgan.privacy.accounting import Mechanism, epsilon_rdp
from fedgan.privacy.ledger import NAME, JointLedger, Ledger
from fedgan.run_folder import RunFolder

STEP = Mechanism(1.0, 0.01)
FACTS = {
    "run": "a",
    "kind": "discriminator steps",
    "unit": "image",
    "delta": 1e-3,
    "data": "1" * 64,
}
GENERATE_ONLY = (Phase.explicit, Phase.generate)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """RDP alone, which takes milliseconds; the bookkeeping is the same."""
    monkeypatch.setattr(ledger_module, "epsilon_of", epsilon_rdp)
    monkeypatch.setattr(accounting, "_best", accounting.accountants.rdp)
    monkeypatch.setattr(accounting, "_likely", accounting._quick)


def filled(folder: Path, entries: int = 3, **facts: object) -> Ledger:
    folder.mkdir(parents=True, exist_ok=True)
    ledger = ledger_in(folder)
    for steps in range(1, entries + 1):
        assert ledger.reserve(STEP, 10 * steps, **{**FACTS, **facts}) == 10 * steps
    return ledger


# --- crashes --------------------------------------------------------------------------------------


def test_new_ledger_is_empty_and_creates_no_file(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "shard" / NAME)
    assert ledger.entries() == []
    assert ledger.epsilon(1e-5) == 0.0
    assert not (tmp_path / "shard").exists()


def test_entries_round_trip_with_cumulative_epsilon(tmp_path: Path) -> None:
    entries = filled(tmp_path).entries()
    assert [entry.steps for entry in entries] == [10, 20, 30]
    assert [entry.epsilon for entry in entries] == sorted(entry.epsilon for entry in entries)
    assert entries[-1].epsilon == epsilon_rdp([Mechanism(1.0, 0.01, 60)], 1e-3)


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_torn_last_line_is_replaced_by_the_next_entry(tmp_path: Path, kept: int) -> None:
    ledger = filled(tmp_path)
    whole = ledger.path.read_bytes()
    line = whole.splitlines()[-1]
    ledger.path.write_bytes(whole + line[:kept])
    assert len(ledger.entries()) == 3
    assert ledger.reserve(STEP, 5, **FACTS) == 5  # type: ignore[arg-type]
    assert ledger.path.read_bytes().startswith(whole)
    assert [entry.steps for entry in ledger.entries()] == [10, 20, 30, 5]


def test_crash_between_entry_and_head_is_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = filled(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_write_head", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ledger.reserve(STEP, 7, **FACTS)  # type: ignore[arg-type]
    assert [entry.steps for entry in ledger.entries()] == [10, 20, 7], (
        "what may have been released is counted"
    )
    ledger.reserve(STEP, 8, **FACTS)  # type: ignore[arg-type]
    assert [entry.steps for entry in ledger.entries()] == [10, 20, 7, 8]


CHILD = """
import sys
from pathlib import Path
from fedgan.privacy import ledger as module
from fedgan.privacy.accounting import Mechanism
module.epsilon_of = lambda mechanisms, delta: float(sum(m.steps for m in mechanisms))  # fake
ledger = module.Ledger(Path(sys.argv[1]))
print("go", flush=True)
while True:
    facts = dict(run="r" * 3000, kind="k", unit="image", delta=1e-3, data="d")
    ledger.reserve(Mechanism(1.0, 0.01), 1, **facts)
    print("paid", flush=True)
"""


def test_killed_writer_loses_no_reserved_step(
    tmp_path: Path,
) -> None:
    """kill -9 at random points: entries stay a prefix, and every reserved step is entered."""
    ledger, before, rng = Ledger(tmp_path / NAME), [], random.Random(1)
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(ledger.path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "go\n"
        time.sleep(rng.uniform(0.02, 0.3))
        os.kill(child.pid, signal.SIGKILL)
        paid = child.stdout.read().count("paid")  # not communicate: it skips what is buffered
        child.wait(30)
        after = ledger.entries()
        assert after[: len(before)] == before
        assert paid <= len(after) - len(before) <= paid + 1
        before = after
    assert before, "no child came to write"
    ledger.reserve(STEP, 3, **FACTS)  # type: ignore[arg-type]
    assert ledger.entries()[:-1] == before


def _append(path: Path, times: int) -> None:
    ledger_module.epsilon_of = epsilon_rdp
    for _ in range(times):
        Ledger(path).reserve(STEP, 1, **FACTS)  # type: ignore[arg-type]


def test_processes_lock_the_ledger_of_a_shard(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(tmp_path / NAME, 8)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert len(Ledger(tmp_path / NAME).entries()) == 16


# --- tampering ------------------------------------------------------------------------------------


def test_changed_line_is_refused(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    lines = ledger.path.read_text().splitlines(keepends=True)
    for number in range(3):
        changed = [*lines]
        changed[number] = changed[number].replace(
            '"noise_multiplier": 1.0', '"noise_multiplier": 9.0'
        )
        ledger.path.write_text("".join(changed))
        with pytest.raises(DataError, match="put back the newest copy"):
            ledger.entries()


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_missing_line_is_refused(tmp_path: Path, missing: int) -> None:
    ledger = filled(tmp_path)
    lines = ledger.path.read_text().splitlines(keepends=True)
    ledger.path.write_text("".join(lines[:missing] + lines[missing + 1 :]))
    with pytest.raises(DataError, match="put back the newest copy"):
        ledger.entries()
    with pytest.raises(DataError):
        ledger.reserve(STEP, 1, **FACTS)  # type: ignore[arg-type]


def test_older_copy_or_deleted_ledger_is_refused(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 1)
    old = ledger.path.read_bytes()
    filled(tmp_path, 2)
    ledger.path.write_bytes(old)
    with pytest.raises(DataError, match="ends after 1 entries, but had 3"):
        ledger.entries()
    ledger.path.unlink()
    with pytest.raises(DataError, match="ends after 0 entries"):
        ledger.entries()


def test_other_last_entries_are_refused(tmp_path: Path) -> None:
    """A valid chain other than the written one: an old ledger that continued without its head."""
    ledger = filled(tmp_path / "a", 1)
    other = Ledger(tmp_path / "b" / NAME, ledger.key)
    other.path.parent.mkdir()
    other.path.write_bytes(ledger.path.read_bytes())
    other.reserve(STEP, 1, **FACTS)  # type: ignore[arg-type]
    ledger.reserve(STEP, 500, **FACTS)  # type: ignore[arg-type]
    ledger.path.write_bytes(other.path.read_bytes())
    with pytest.raises(DataError, match="not the entry that was written"):
        ledger.entries()


@pytest.mark.parametrize(
    "line",
    ["{}", "[]", "null", "not json", '{"steps": -1}', '{"time": 1}'],
)
def test_invalid_line_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / NAME).write_text(line + "\n")
    with pytest.raises(DataError, match="line 1: not an entry"):
        Ledger(tmp_path / NAME).entries()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", -5),
        ("steps", 1.5),
        ("noise_multiplier", float("nan")),
        ("sample_rate", 1.5),
        ("delta", 0),
        ("run", None),
    ],
)
def test_entry_with_values_out_of_range_is_refused(tmp_path: Path, key: str, value: object) -> None:
    row = vars(filled(tmp_path / "a", 1).entries()[0]) | {key: value}
    (tmp_path / NAME).write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="line 1: not an entry"):
        Ledger(tmp_path / NAME).entries()


def test_damaged_head_is_refused(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    files.write_text(ledger._head_path, '{"entries": ')
    with pytest.raises(DataError, match=r"head\.json is damaged"):
        ledger.entries()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_folder_that_is_not_writable_raises_storage_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="state-dir"):
        filled(tmp_path)
    tmp_path.chmod(0o700)


def test_read_only_disk_raises_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match=r"no private step is taken: make the folder writable"):
        Ledger(tmp_path / "shard" / NAME).reserve(STEP, 1, **FACTS)  # type: ignore[arg-type]


def test_ledger_without_file_locks_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = filled(tmp_path)
    monkeypatch.setattr(ledger_module, "fcntl", None)
    assert len(ledger.entries()) == 3
    with pytest.raises(StorageError, match="file locks"):
        ledger.reserve(STEP, 1, **FACTS)  # type: ignore[arg-type]


# --- budgets --------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True, phases=GENERATE_ONLY)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.8, 1.5]),
            st.sampled_from([0.01, 0.1, 1.0]),
            st.integers(0, 300),
            st.sampled_from([1e-5, 1e-3]),
        ),
        max_size=6,
    ),
    st.floats(0.2, 8.0),
)
def test_reservations_never_exceed_the_budget(
    tmp_path_factory: pytest.TempPathFactory,
    requests: list[tuple[float, float, int, float]],
    budget: float,
) -> None:
    ledger, spent = (
        Ledger(tmp_path_factory.mktemp("shard") / NAME),
        dict.fromkeys((1e-5, 1e-3), 0.0),
    )
    for number, (noise, rate, steps, delta) in enumerate(requests):
        facts = {**FACTS, "delta": delta, "run": f"{number // 2}", "kind": f"{number}"}
        allowed = ledger.reserve(Mechanism(noise, rate), steps, **facts, max_epsilon=budget)  # type: ignore[arg-type]
        assert 0 <= allowed <= steps
        for at, before in spent.items():
            spent[at] = ledger.epsilon(at)
            assert spent[at] >= before
        assert not allowed or spent[delta] <= budget
    for entry in ledger.entries():
        assert entry.epsilon is not None
        assert entry.epsilon <= budget
        assert entry.epsilon >= max(
            (
                old.epsilon or 0
                for old in ledger.entries()[: ledger.entries().index(entry)]
                if old.delta >= entry.delta
            ),
            default=0,
        )


def test_release_without_noise_has_infinite_epsilon(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path / NAME)
    assert ledger.reserve(Mechanism(0.0, 0.1), 5, **FACTS, max_epsilon=100.0) == 0
    assert ledger.reserve(Mechanism(0.0, 0.1), 5, **FACTS) == 5  # type: ignore[arg-type]
    assert ledger.entries()[0].epsilon is None
    assert ledger.epsilon(1e-5) == float("inf")
    facts = {**FACTS, "run": "b"}
    assert ledger.reserve(STEP, 5, **facts, max_epsilon=100.0) == 0  # type: ignore[arg-type]


def test_other_images_and_runs_share_the_ledger(tmp_path: Path) -> None:
    ledger = filled(tmp_path, 1)
    ledger.reserve(STEP, 10, **{**FACTS, "run": "b", "data": "2" * 64})  # type: ignore[arg-type]
    assert ledger.epsilon(1e-3) == epsilon_rdp([Mechanism(1.0, 0.01, 20)], 1e-3)


def test_error_of_the_accountant_never_lowers_epsilon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = filled(tmp_path, 2)
    spent = ledger.epsilon(1e-3)
    monkeypatch.setattr(
        ledger_module, "epsilon_of", lambda mechanisms, delta: 0.9 * epsilon_rdp(mechanisms, delta)
    )
    assert ledger.epsilon(1e-3) == spent
    assert ledger.epsilon(1e-4) > spent > ledger.epsilon(0.1)
    assert ledger.reserve(STEP, 1, **FACTS, max_epsilon=spent * 0.99) == 0  # type: ignore[arg-type]


# --- several shards as one pool -------------------------------------------------------------------


def test_units_image_and_patient_are_never_composed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / NAME)
    step = Mechanism(1.0, 0.01)
    ledger.reserve(step, 3, run="a", kind="k", unit="image", delta=1e-3, data="d")
    with pytest.raises(ConfigError, match=r"privacy\.unit = 'image'"):
        ledger.reserve(step, 3, run="b", kind="k", unit="patient", delta=1e-3, data="d")
    assert [entry.steps for entry in ledger.entries()] == [3]


def test_pool_reserves_what_every_shard_allows(tmp_path: Path) -> None:
    rich, poor = Ledger(tmp_path / "rich" / NAME), filled(tmp_path / "poor", 3)
    budget = poor.epsilon(1e-3) * 1.02
    allowed = JointLedger([rich, poor]).reserve(STEP, 500, **FACTS, max_epsilon=budget)
    assert 0 < allowed < 500
    assert rich.entries()[-1].steps == poor.entries()[-1].steps == allowed, (
        "the first was charged no more than was done"
    )
    assert poor.epsilon(1e-3) <= budget


def test_pool_epsilon_is_the_largest_of_its_shards(tmp_path: Path) -> None:
    many, much = filled(tmp_path / "many", 3), Ledger(tmp_path / "much" / NAME)
    much.reserve(Mechanism(0.5, 0.1), 100, **FACTS)  # type: ignore[arg-type]
    assert many.epsilon(1e-3) < much.epsilon(1e-3) == JointLedger([many, much]).epsilon(1e-3)


def test_shard_named_twice_is_entered_once(tmp_path: Path) -> None:
    twice = JointLedger([Ledger(tmp_path / NAME), Ledger(tmp_path / "." / NAME)])
    assert twice.reserve(STEP, 4, **FACTS) == 4  # type: ignore[arg-type]
    assert len(Ledger(tmp_path / NAME).entries()) == 1


# --- beside a shard -------------------------------------------------------------------------------


def test_new_import_of_a_shard_keeps_its_ledger(tmp_path: Path) -> None:
    def write(seed: int) -> None:
        images = np.random.default_rng(seed).integers(0, 256, (6, 1, 16, 16), dtype=np.uint8)
        columns = {
            "patients": [f"p{row}" for row in range(6)],
            "splits": ["train"] * 4 + ["val", "test"],
        }
        write_shard(
            tmp_path / "north",
            images,
            np.zeros((6, 0), np.uint8),
            **columns,
            label_names=(),
            overwrite=True,
        )

    write(0)
    ledger = filled(tmp_path / "north")
    before = ledger.entries()
    Shard.open(tmp_path / "north", verify=True)
    write(1)
    Shard.open(tmp_path / "north", verify=True)
    assert ledger.entries() == before
    ledger.path.unlink()
    with pytest.raises(DataError, match="ends after 0"):
        ledger.entries()


# --- fedgan ledger --------------------------------------------------------------------------------


def test_ledger_command_shows_runs_and_spent_epsilon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = filled(tmp_path / "north", 2)
    ledger.reserve(Mechanism(2.0, 0.02), 7, **{**FACTS, "run": "b"})  # type: ignore[arg-type]
    assert main(["ledger", str(tmp_path / "north"), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["ledgers"]
    assert [(row["run"], row["steps"], row["noise_multiplier"]) for row in report["releases"]] == [
        ("a", 30, 1.0),
        ("b", 7, 2.0),
    ]
    assert report["epsilon"] == ledger.epsilon(1e-3)
    assert main(["ledger", str(ledger.path), "--delta", "1e-5", "--max-epsilon", "3"]) == 0
    text = capsys.readouterr().out
    assert f"epsilon {ledger.epsilon(1e-5):.4g} at delta 1e-05, over 3 entries of 2 runs" in text
    assert "more steps with noise 2 and rate 0.02 fit into epsilon 3" in text


def test_ledger_command_shows_steps_that_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = filled(tmp_path / "north")
    assert main(["ledger", str(tmp_path), "--max-epsilon", "2", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["ledgers"]
    allowed = ledger.reserve(STEP, 10**8, **FACTS, max_epsilon=2.0)  # type: ignore[arg-type]
    assert report["steps_left"] == allowed > 0


def test_ledger_command_shows_infinite_epsilon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger_in(tmp_path).reserve(Mechanism(0.0, 0.1), 1, **FACTS)  # type: ignore[arg-type]
    assert main(["ledger", str(tmp_path)]) == 0
    assert "spent: epsilon infinite" in capsys.readouterr().out
    assert main(["ledger", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ledgers"][0]["epsilon"] is None


def test_ledger_command_finds_all_hospitals_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    filled(data / "north")
    filled(run / "shards" / "south")
    (data / "east").mkdir()
    run_folder = RunFolder.at(run)
    run_folder.write_settings(from_dict({"data": {"root": str(data)}}, source="test"))
    assert main(["ledger", str(run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["ledgers"]
    assert sorted(Path(row["path"]).parent.parent.name for row in report) == ["north", "south"]
    assert main(["ledger", str(data), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ledgers"]) == 1


def test_ledger_command_fails_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = filled(tmp_path / "north")
    ledger.path.write_bytes(ledger.path.read_bytes().replace(b'"steps": 20', b'"steps": 2'))
    assert main(["ledger", str(tmp_path / "north")]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "put back the newest copy" in err
    ledger.path.unlink()
    assert main(["ledger", str(tmp_path / "north")]) == 3, "the head reveals a missing ledger"
    assert "had 3" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for arguments, code, words in (
        (["ledger", str(tmp_path / "empty")], 3, "no privacy ledger"),
        (["ledger", str(tmp_path / "absent")], 3, "no privacy ledger"),
        (["ledger", str(tmp_path), "--delta", "2"], 2, "0 < delta < 1"),
        (["ledger", str(tmp_path), "--max-epsilon", "0"], 2, "above 0"),
    ):
        assert main(arguments) == code
        assert words in capsys.readouterr().err
