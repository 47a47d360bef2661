"""One account per image: the register of a hospital finds every ledger that knows a unit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_federation import LocalGrid, NoEvaluator, federate, ledger_in, tiny, write_shards

from client.app import app
from fedgan.config import Settings
from fedgan.data.federation import Hospital, open_hospitals
from fedgan.data.shard import write_shard
from fedgan.errors import ConfigError, DataError, FederationError
from fedgan.privacy import accounting
from fedgan.privacy import ledger as ledger_module
from fedgan.privacy.accounting import Mechanism, epsilon_rdp, filtered_steps
from fedgan.privacy.ledger import NAME, Entry, JointLedger, Ledger, binding
from fedgan.privacy.register import (
    FOLDER,
    VARIABLE,
    Register,
    existing_ledger,
    ledger_at,
    ledger_of,
)
from fedgan.run_folder import RunFolder
from fedgan.runs.preparation import experiment_of, prepare_run
from server.federation import Federation

STEP = Mechanism(1.0, 0.1)
PRIVATE = (
    "privacy.noise_multiplier=1",
    "privacy.delta=1e-3",
    "model.minibatch_std_group=0",
    "augment.mode=none",
    "training.r1_gamma=0",
    "training.labels=uniform",
    "training.path_length_weight=0",
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """RDP alone, which takes milliseconds; the bookkeeping is the same."""
    monkeypatch.setattr(ledger_module, "epsilon_of", epsilon_rdp)
    monkeypatch.setattr(accounting, "_best", accounting.accountants.rdp)
    monkeypatch.setattr(accounting, "_likely", accounting._quick)


def shard(path: Path, patients: Sequence[str], seed: int = 0, institution: str = "north") -> Path:
    """A shard of two images per patient, which follow from `seed` and the patient."""
    images = [
        np.random.default_rng([seed, *patient.encode(), copy]).integers(0, 256, (1, 16, 16))
        for patient in patients
        for copy in (0, 1)
    ]
    count = len(images)
    write_shard(
        path,
        np.array(images, np.uint8),
        np.eye(2, dtype=np.uint8)[np.arange(count) % 2],
        patients=np.repeat(patients, 2),
        institutions=[institution] * count,
        splits=["train"] * (count - 4) + ["val"] * 2 + ["test"] * 2,
        label_names=("dark", "bright"),
    )
    return path


def opened(root: Path, hospitals: int = 1, *keys: str) -> tuple[Settings, list[Hospital]]:
    found = tiny(root, *PRIVATE, *keys, hospitals=hospitals)
    return found, open_hospitals(found)


def spend(joint: JointLedger, steps: int, run: str = "a", **facts: object) -> int:
    known = {"kind": "steps", "unit": "patient", "delta": 1e-3, "data": "x", **facts}
    return joint.reserve(STEP, steps, run=run, **known)  # type: ignore[arg-type]


def account(root: Path) -> JointLedger:
    chosen, hospitals = opened(root)
    return ledger_of(chosen, hospitals)


PATIENTS = [f"p{number}" for number in range(8)]


# --- one account --------------------------------------------------------------------------------


def test_every_use_of_a_shard_is_entered_in_its_one_ledger(tmp_path: Path) -> None:
    """Simulated, deployed with two state folders, and divided by a partition."""
    data = write_shards(tmp_path / "data", (48, 32))
    run = RunFolder.at(tmp_path / "simulated")
    federate(tiny(data, *PRIVATE, hospitals=2, rounds=1, kimg=0.016), run, app)
    ledger = ledger_in(data / "alpha")
    counts = [len(ledger.entries())]
    for state in ("one", "two"):
        deployed = RunFolder.at(tmp_path / f"run-{state}")
        prepare_run(tiny(data, *PRIVATE, hospitals=2, rounds=1, kimg=0.016), deployed)

        def node(number: int, state: str = state) -> dict[str, str]:
            name = ("alpha", "beta")[number]
            return {"data-root": str(data / name), "state-dir": str(tmp_path / state / name)}

        grid = LocalGrid(2, app, node_config=node)
        federation = Federation(
            deployed.settings(), deployed, experiment_of(deployed), NoEvaluator()
        )
        federation.train(grid)  # type: ignore[arg-type]
        counts.append(len(ledger.entries()))
    run = RunFolder.at(tmp_path / "divided")
    federate(
        tiny(data, *PRIVATE, "data.partition=iid", hospitals=2, rounds=1, kimg=0.016), run, app
    )
    counts.append(len(ledger.entries()))
    assert counts == [1, 2, 3, 5]  # both hospitals of the partition hold images of alpha
    assert {entry.part for entry in ledger.entries()} == {"", "hospital-1", "hospital-2"}
    assert not list(tmp_path.glob("[!d]*/**/privacy-ledger*"))
    spent = [entry.mechanism for entry in ledger.entries()]
    whole = epsilon_rdp(spent, 1e-3)
    assert 0 < ledger.epsilon(1e-3) < whole, "the parts of a run hold different patients"
    assert ledger.epsilon(1e-3) >= epsilon_rdp(spent[:4], 1e-3)


@pytest.mark.parametrize("kind", ["copy", "subset", "new ids", "moved"])
def test_known_images_continue_their_account(tmp_path: Path, kind: str) -> None:
    shard(tmp_path / "data" / "first", PATIENTS)
    assert spend(account(tmp_path / "data" / "first"), 5) == 5
    other = tmp_path / "data" / "other"
    if kind == "copy":
        shutil.copytree(tmp_path / "data" / "first", other)
        shutil.rmtree(other / FOLDER)
    elif kind == "subset":
        shard(other, [*PATIENTS[:1], "new1", "new2", "new3"])
    elif kind == "new ids":
        shard(other, PATIENTS, institution="renamed")  # the same pixels
    else:
        (tmp_path / "data" / "first").rename(other)
    again = account(other)
    assert spend(again, 7, "b") == 7
    assert [entry.steps for entry in again.ledgers[0].entries()][-1] == 7
    assert again.epsilon(1e-3) == pytest.approx(epsilon_rdp([Mechanism(1.0, 0.1, 12)], 1e-3))
    if kind != "moved":
        assert [e.steps for e in ledger_in(tmp_path / "data" / "first").entries()] == [5, 7]
    assert spend(again, 10**6, "c", max_epsilon=again.epsilon(1e-3)) == 0


def test_ledger_command_counts_the_ledgers_of_copies(
    tmp_path: Path, fedgan: Callable[..., tuple[int, str, str]]
) -> None:
    one = shard(tmp_path / "data" / "one", PATIENTS)
    spend(account(one), 5)
    two = shard(tmp_path / "data" / "two", PATIENTS)
    spend(account(two), 7, "b")
    code, out, _ = fedgan("ledger", two, "--json")
    (found,) = json.loads(out)["ledgers"]
    assert (code, found["entries"]) == (0, 1)
    assert found["epsilon"] == pytest.approx(epsilon_rdp([Mechanism(1.0, 0.1, 12)], 1e-3))
    assert "those with images in common: " in fedgan("ledger", two)[1]


def test_trainings_that_begin_at_once_on_copies_are_charged_to_both(tmp_path: Path) -> None:
    one, two = (shard(tmp_path / "data" / name, PATIENTS) for name in ("one", "two"))
    first, second = account(one), account(two)  # neither has an entry yet
    spend(first, 5)
    spend(second, 7, "b")
    spend(first, 1)
    assert [entry.steps for entry in ledger_in(one).entries()] == [5, 7, 1]
    assert [entry.steps for entry in ledger_in(two).entries()] == [7, 1]
    whole = epsilon_rdp([Mechanism(1.0, 0.1, 13)], 1e-3)
    assert account(two).epsilon(1e-3) == pytest.approx(whole)


def test_other_patients_have_an_account_of_their_own(tmp_path: Path) -> None:
    shard(tmp_path / "data" / "first", PATIENTS)
    spend(account(tmp_path / "data" / "first"), 5)
    shard(tmp_path / "data" / "other", [f"q{number}" for number in range(6)])
    other = account(tmp_path / "data" / "other")
    assert len(other.ledgers) == 1
    assert other.epsilon(1e-3) == 0.0


def test_ledger_of_a_read_only_shard_lies_in_the_register(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = shard(tmp_path / "data" / "first", PATIENTS)
    before = {path.name for path in place.iterdir()}
    monkeypatch.setattr("os.access", lambda path, mode: place not in (path, Path(path).parent))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "state" / "ledgers"))
    spend(account(place), 5)
    spend(account(place), 7, "b")
    assert {path.name for path in place.iterdir()} == before
    (path,) = tmp_path.rglob(NAME)
    assert path.parent.parent == tmp_path / "state" / "ledgers"
    assert [entry.steps for entry in existing_ledger(place).entries()] == [5, 7]
    monkeypatch.delenv(VARIABLE)  # the register is found from the ledger's path
    assert len(ledger_at(path).entries()) == 2


# --- what is refused ------------------------------------------------------------------------------


def test_older_copies_of_all_files_of_a_ledger_are_refused(tmp_path: Path) -> None:
    place = shard(tmp_path / "data" / "first", PATIENTS)
    spend(account(place), 5)
    shutil.copytree(place / FOLDER, tmp_path / "backup")
    spend(account(place), 5)
    shutil.rmtree(place / FOLDER)
    shutil.copytree(tmp_path / "backup", place / FOLDER)
    with pytest.raises(DataError, match="not the ledger with 2 entries that the register knows"):
        account(place)


def test_deleted_ledger_of_known_images_is_refused(tmp_path: Path) -> None:
    place = shard(tmp_path / "data" / "first", PATIENTS)
    spend(account(place), 5)
    shutil.copytree(place, tmp_path / "data" / "copy")
    shutil.rmtree(place / FOLDER)
    shutil.rmtree(tmp_path / "data" / "copy" / FOLDER)
    for root in (place, tmp_path / "data" / "copy"):
        with pytest.raises(DataError, match=r"first/ledger/.* which is gone, so their cost is unk"):
            account(root)


def test_rewritten_chain_is_refused(tmp_path: Path) -> None:
    """Who can write the shard, but does not have the key, can make no chain."""
    place = shard(tmp_path / "data" / "first", PATIENTS)
    spend(account(place), 500)
    path = place / FOLDER / NAME
    shutil.rmtree(place / FOLDER)
    forged = Ledger(path)
    spend(JointLedger([forged]), 1)
    assert len(forged.entries()) == 1
    with pytest.raises(DataError, match="does not follow from the key of this hospital's register"):
        account(place)


def test_ledger_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    place = shard(tmp_path / "data" / "first", PATIENTS)
    (place / NAME).write_text("{}\n")
    with pytest.raises(DataError, match="a ledger of an earlier version, whose costs"):
        account(place)


def test_ledger_of_an_earlier_version_in_the_state_dir_is_refused(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", (48,))
    run = RunFolder.at(tmp_path / "run")
    prepare_run(tiny(data, *PRIVATE, hospitals=1, rounds=1, kimg=0.016), run)
    node = {"data-root": str(data / "alpha"), "state-dir": str(tmp_path / "state")}
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / NAME).write_text("{}\n")
    grid = LocalGrid(1, app, node_config=lambda number: node)
    federation = Federation(run.settings(), run, experiment_of(run), NoEvaluator())
    with pytest.raises(FederationError, match="DataError while preparing the training"):
        federation.train(grid)  # type: ignore[arg-type]
    assert not ledger_in(data / "alpha").exists()


def test_reading_without_the_key_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = shard(tmp_path / "data" / "first", PATIENTS)
    spend(account(place), 5)
    assert len(existing_ledger(place).entries()) == 1
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match=f"cannot be verified here: .* {VARIABLE}"):
        existing_ledger(place)
    with pytest.raises(DataError, match=f"cannot be verified here: .* {VARIABLE}"):
        account(place)
    assert not (tmp_path / "elsewhere").exists()


def test_register_names_no_patient_and_hides_its_key(tmp_path: Path) -> None:
    place = shard(tmp_path / "data" / "first", PATIENTS)
    spend(account(place), 5)
    register = Register.of(place)
    (units,) = register.folder.glob("*.units")
    assert len(units.read_text().split()) == 6 + 12  # training patients and images
    assert not any(name in units.read_text() for name in PATIENTS)
    assert (register.folder / "key").stat().st_mode & 0o777 == 0o600
    (record,) = register.folder.glob("*.json")
    assert json.loads(record.read_text())["entries"] == 1


def test_phantoms_have_a_ledger_without_a_register(tmp_path: Path) -> None:
    run = RunFolder.at(tmp_path / "run")
    keys = (*PRIVATE, "data.root=", "data.phantom_images=60")
    chosen = tiny(Path(""), *keys, hospitals=1)
    prepare_run(chosen, run)
    hospitals = open_hospitals(run.settings(), run.path / "shards")
    spend(ledger_of(run.settings(), hospitals), 3)
    assert not list(tmp_path.rglob(".ledgers"))
    (path,) = tmp_path.rglob(NAME)
    assert len(Ledger(path).entries()) == 1


# --- a run is frozen, several runs are filtered ---------------------------------------------------


@pytest.mark.parametrize(
    ("step", "delta"), [(Mechanism(0.9, 0.1), 1e-3), (Mechanism(1.0, 0.2), 1e-3), (STEP, 1e-5)]
)
def test_run_keeps_the_mechanism_of_its_first_entry(
    tmp_path: Path, step: Mechanism, delta: float
) -> None:
    joint = JointLedger([Ledger(tmp_path / NAME)])
    spend(joint, 3)
    facts = {"run": "a", "kind": "steps", "unit": "patient", "data": "x"}
    with pytest.raises(ConfigError, match="a run keeps those of its first entry"):
        joint.reserve(step, 3, delta=delta, **facts)  # type: ignore[arg-type]
    # More noise costs no less than was stated: the first noise is entered.
    joint.reserve(Mechanism(2.0, 0.1), 3, delta=1e-3, **facts)  # type: ignore[arg-type]
    assert [entry.noise_multiplier for entry in joint.ledgers[0].entries()] == [1.0, 1.0]


@given(
    st.lists(
        st.tuples(st.sampled_from([0.7, 1.0, 3.0]), st.sampled_from([0.01, 0.1, 1.0])), max_size=5
    ),
    st.floats(0.5, 10.0),
    st.sampled_from([1e-5, 1e-3]),
)
@settings(max_examples=40)
def test_filter_stays_within_the_limit_whatever_was_chosen(
    choices: list[tuple[float, float]], limit: float, delta: float
) -> None:
    """Each run takes all that is allowed of a mechanism that follows from those before."""
    spent: list[Mechanism] = []
    for noise, rate in choices:
        step = Mechanism(noise, rate)
        steps = filtered_steps(limit, delta, spent, step, 1000)
        spent.append(Mechanism(noise, rate, steps))
        assert epsilon_rdp(spent, delta) <= limit + 1e-9
    assert filtered_steps(limit, delta, [*spent, Mechanism(0.0, 0.1, 1)], STEP, 10) == 0


def test_binding_entries_are_of_the_costliest_part_of_each_run() -> None:
    def entry(run: str, part: str, steps: int) -> Entry:
        facts = {"kind": "steps", "unit": "patient", "delta": 1e-3, "data": "x", "previous": ""}
        return Entry(
            time="", run=run, noise_multiplier=1.0, sample_rate=0.1, steps=steps, epsilon=None,
            part=part, **facts,
        )  # fmt: skip

    entries = [
        entry("a", "one", 3),
        entry("a", "two", 5),
        entry("b", "", 7),
        entry("c", "one", 2),
        entry("c", "", 1),
    ]
    assert [each.steps for each in binding(entries)] == [5, 7, 2, 1]
    assert [each.steps for each in binding(entries, "a", "one")] == [3, 7, 2, 1]
    assert [each.steps for each in binding(entries, "a", "three")] == [7, 2, 1]
