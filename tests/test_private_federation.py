"""Private federations: spent budgets, equal noise, dry-run checks, and what travels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message
from rich.console import Console
from scipy.optimize import brentq
from small_federation import (
    NAMES,
    LocalGrid,
    NoEvaluator,
    error_reply,
    federate,
    ledger_in,
    tiny,
    write_shards,
)

from client.app import app
from fedgan import files
from fedgan.cli.progress import round_text, rounds_table
from fedgan.config import Settings
from fedgan.errors import ConfigError, FederationError
from fedgan.privacy import step
from fedgan.privacy.accounting import Mechanism, epsilon_of, filtered_steps
from fedgan.privacy.ledger import NAME as LEDGER
from fedgan.privacy.ledger import Ledger
from fedgan.privacy.register import FOLDER
from fedgan.run_folder import RunFolder
from fedgan.runs.budget import make_budget
from fedgan.runs.compatibility import reason_to_end
from fedgan.runs.preparation import experiment_of, prepare_run
from fedgan.training.checkpoint import load_tensors
from server.federation import Federation
from server.metrics import finite_numbers
from simulations import runner

SIZES = (48, 32, 16)  # half is the training split: 24, 16, 8
HELD = [size // 2 for size in SIZES]
BATCH = 6  # apportioned by size, 3, 2, 1: every hospital has the same sampling rate
ROUNDS = 4
STEP = Mechanism(1.0, BATCH / sum(HELD), 1)
STEPS = 3  # per round
DELTA = 1e-3  # of every hospital: all have the same budget in steps
PRIVATE = (
    *(
        "model.minibatch_std_group=0",
        "augment.mode=none",
        "training.r1_gamma=0",
        "training.labels=uniform",
    ),
    *(f"training.batch_size={BATCH}", "federation.batch=shared", "training.path_length_weight=0"),
)


def private(data: Path, *overrides: str, rounds: int = ROUNDS, hospitals: int = 3) -> Settings:
    kimg = BATCH * STEPS * rounds / 1000
    return tiny(
        data,
        *PRIVATE,
        "privacy.noise_multiplier=1",
        f"privacy.delta={DELTA}",
        *overrides,
        rounds=rounds,
        kimg=kimg,
        hospitals=hospitals,
    )


def spend(data: Path, name: str, steps: int) -> None:
    """Enter the steps of an earlier run on this shard."""
    facts = {
        "run": "earlier",
        "kind": "discriminator steps",
        "unit": "patient",
        "delta": DELTA,
        "data": "x",
    }
    assert (
        ledger_in(data / name).reserve(Mechanism(1.0, STEP.sample_rate, 1), steps, **facts) == steps
    )  # type: ignore[arg-type]


def budget(steps: int) -> float:
    """An ε that allows a hospital with an earlier run exactly `steps` steps in all."""

    def least(count: int) -> float:
        return float(brentq(lambda limit: allowed_by(limit) - count + 0.5, 1e-3, 1e3))

    def allowed_by(limit: float) -> int:
        return filtered_steps(limit, DELTA, [], STEP, 10**6)

    return (least(steps) + least(steps + 1)) / 2


def lines_of(run: RunFolder) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return [
        json.loads(line, parse_constant=refuse) for line in run.metrics.read_text().splitlines()
    ]


def rows_of(run: RunFolder, name: str) -> list[dict[str, Any]]:
    return [row for line in lines_of(run) for row in line["hospitals"] if row["name"] == name]


def fail_in(round_number: int, hospital: int | None = None) -> Any:
    def fault(number: int, message: Message) -> Any:
        at = message.content.config_records["config"].get("round")
        return (
            error_reply(message, "gone")
            if at == round_number and hospital in (None, number)
            else None
        )

    return fault


def trained_rounds(grid: LocalGrid, hospital: int) -> list[int]:
    """Rounds in which a hospital was asked to train."""
    messages = [
        message for message in grid.sent if grid.nodes.get(message.metadata.dst_node_id) == hospital
    ]
    return [
        int(message.content.config_records["config"].get("round", 0))
        for message in messages
        if "arrays" in message.content
    ]  # type: ignore[arg-type]


def restore_progress(run: RunFolder, grid: LocalGrid) -> None:
    Federation(run.settings(), run, experiment_of(run), NoEvaluator()).train(grid)


def mean_model(run: RunFolder, number: int, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The mean of these hospitals' models, weighted by the size of their training splits."""
    states = [
        load_tensors(run.hospital_state(name) / f"state-{number:05d}.safetensors")[0]
        for name in names
    ]
    weights = np.array([HELD[NAMES.index(name)] for name in names], float)
    keys = [key for key in states[0] if key.startswith(("generator/", "discriminator/", "ema/"))]
    found = zip(states, weights / weights.sum(), strict=True)
    parts = [{key: weight * state[key].double().numpy() for key in keys} for state, weight in found]
    return {key: np.sum([part[key] for part in parts], axis=0) for key in keys}


def assert_model(run: RunFolder, number: int, expected: dict[str, np.ndarray]) -> None:
    for key, tensor in load_tensors(run.checkpoint(number))[0].items():
        np.testing.assert_allclose(
            tensor.numpy(), expected[key].reshape(tensor.shape), rtol=1e-5, atol=1e-6
        )


# --- budgets --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Path, LocalGrid]:
    """Four rounds; beta may train one round and one step. Stopped in round 3, then resumed."""
    folder = tmp_path_factory.mktemp("stopped")
    data = write_shards(folder / "data", SIZES)
    allowed = (ROUNDS + 1) * STEPS  # because alpha repeats a round
    spend(data, "beta", allowed - STEPS - 1)
    run = RunFolder.at(folder / "run")
    settings = private(data, f"privacy.max_epsilon={budget(allowed)}")
    with pytest.raises(FederationError, match="in round 3"):
        federate(settings, run, app, fail_in(3, hospital=2))
    grid = LocalGrid(3, app)
    grid.nodes = {
        node: number for node, number in grid.nodes.items() if number != 1
    }  # beta is offline
    restore_progress(run, grid)
    return run, data, grid


def test_exhausted_hospital_leaves_and_others_continue(
    stopped: tuple[RunFolder, Path, LocalGrid],
) -> None:
    run, data, _ = stopped
    settings, plan = run.settings(), make_budget(run.settings(), HELD)
    lines = lines_of(run)
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert [[row["name"] for row in line["hospitals"]] for line in lines] == [[*NAMES[:3]]] * 2 + [
        ["alpha", "gamma"]
    ] * 2
    beta = rows_of(run, "beta")
    assert [row.get("exhausted") for row in beta] == [None, 1.0]
    assert [row["images"] for row in beta] == [plan.images[0][1], plan.batches[1]]
    for index, name in ((0, "alpha"), (2, "gamma")):
        assert [row["images"] for row in rows_of(run, name)] == [row[index] for row in plan.images]
        assert not any("exhausted" in row for row in rows_of(run, name))
    assert [line.get("exhausted") for line in lines] == [None, ["beta"], ["beta"], ["beta"]]
    assert not any("ended" in line for line in lines)
    counts = np.cumsum([sum(row["images"] for row in line["hospitals"]) for line in lines])
    assert [line["images_seen"] for line in lines] == counts.tolist()
    ledger = ledger_in(data / "beta")
    assert (
        max(entry.epsilon for entry in ledger.entries() if entry.epsilon)
        <= settings.privacy.max_epsilon
    )
    assert beta[-1]["epsilon"] == pytest.approx(epsilon_of(ledger.mechanisms(), DELTA))
    assert (run.hospital_state("beta") / "state-00002.safetensors").is_file()


def test_rounds_after_a_leave_average_the_others(
    stopped: tuple[RunFolder, Path, LocalGrid],
) -> None:
    run, _, _ = stopped
    assert_model(run, 2, mean_model(run, 2, NAMES[:3]))
    assert_model(run, 4, mean_model(run, 4, ("alpha", "gamma")))


def test_resumed_run_skips_exhausted_hospitals(
    stopped: tuple[RunFolder, Path, LocalGrid],
) -> None:
    run, _, grid = stopped
    assert trained_rounds(grid, 0) == trained_rounds(grid, 2) == [3, 4]
    assert trained_rounds(grid, 1) == []
    (gone,) = load_tensors(run.checkpoint(4))[1]["exhausted"]  # type: ignore[misc]
    assert gone == {"name": "beta", "number": 1, "images": 16, "units": 0, "round": 2}


def test_repeated_round_is_entered_again(
    stopped: tuple[RunFolder, Path, LocalGrid],
) -> None:
    run, data, _ = stopped
    entries = ledger_in(
        data / "alpha"
    ).entries()  # alpha had trained round 3 when gamma failed in it
    assert [entry.steps for entry in entries] == [STEPS] * (ROUNDS + 1)
    assert [entry.steps for entry in ledger_in(data / "gamma").entries()] == [STEPS] * ROUNDS
    spent = [entry.epsilon or 0.0 for entry in entries]
    assert spent == sorted(spent)
    assert rows_of(run, "alpha")[-1]["epsilon"] == pytest.approx(spent[-1])


def test_hospital_without_allowed_step_changes_nothing(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", SIZES)
    spend(data, "beta", 400)
    run = RunFolder.at(tmp_path / "run")
    federate(private(data, f"privacy.max_epsilon={budget(40)}", rounds=1), run, app)
    (row,) = rows_of(run, "beta")
    assert (row["images"], row["images_seen"], row["exhausted"]) == (0, 0, 1.0)
    assert lines_of(run)[0]["images_seen"] == sum(
        make_budget(run.settings(), HELD).images[0][index] for index in (0, 2)
    )
    assert_model(run, 1, mean_model(run, 1, ("alpha", "gamma")))
    assert [entry.run for entry in ledger_in(data / "beta").entries()] == ["earlier"]


def test_run_ends_when_every_budget_is_spent(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", SIZES)
    for name, steps in (("alpha", 1), ("beta", 1), ("gamma", 3)):
        spend(data, name, steps)
    run = RunFolder.at(tmp_path / "run")
    limit = budget(STEPS + 2)  # gamma less than one round, the others no more than two
    federation = federate(private(data, f"privacy.max_epsilon={limit}"), run, app)
    last, line = run.last_round(), lines_of(run)[-1]
    assert last == line["round"] == 2
    assert [[row["images"] for row in line["hospitals"]] for line in lines_of(run)] == [
        [9, 6, 2],
        [3, 2],
    ]
    assert line["exhausted"] == sorted(NAMES[:3])
    assert line["ended"] == "the privacy budget of every hospital is spent"
    evaluator: Any = federation.evaluator
    assert evaluator.evaluated_rounds == [last]
    events: list[dict[str, Any]] = []
    federation.on_event = events.append
    federation.evaluate_final()
    assert events[-1]["result"]["round"] == last
    assert events[-1]["result"]["images_seen"] == line["images_seen"]
    settings = run.settings()
    assert runner.is_trained(run, settings)
    assert not runner.is_complete(run, settings)
    files.write_json(run.evaluation, events[-1]["result"])
    assert runner.is_complete(run, settings)
    grid = LocalGrid(3, app)
    restore_progress(run, grid)
    assert grid.sent == []
    words = [event["message"] for event in _resumed(run)]
    assert words == [f"{run.path} is complete: {last} rounds and the evaluation are done"]


def _resumed(run: RunFolder) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    runner.resume(run, events.append)
    return events


def test_run_ends_with_too_few_hospitals_for_krum(
    tmp_path: Path,
) -> None:
    data = write_shards(tmp_path / "data", (16, 16, 16))
    spend(data, "beta", 400)
    settings = private(data, "federation.strategy=krum", f"privacy.max_epsilon={budget(40)}")
    run = RunFolder.at(tmp_path / "run")
    federation = federate(settings, run, app)
    (line,) = lines_of(run)
    assert line["exhausted"] == ["beta"]
    assert (
        line["ended"]
        == "krum needs 3 hospitals, and 2 are left: the privacy budget of beta is spent"
    )
    begin, kept = (load_tensors(run.checkpoint(number))[0] for number in (0, 1))
    assert all(begin[key].equal(kept[key]) for key in begin)
    before = ledger_in(data / "alpha").entries()
    evaluator: Any = federation.evaluator
    assert evaluator.evaluated_rounds == [1]
    events: list[dict[str, Any]] = []
    federation.on_event = events.append
    federation.evaluate_final()
    assert events[-1]["result"]["round"] == 1
    assert runner.is_trained(run, run.settings())
    grid = LocalGrid(3, app)
    restore_progress(run, grid)  # a resumed run sends no request
    assert grid.sent == []
    assert ledger_in(data / "alpha").entries() == before


def test_reason_of_early_end_counts_remaining_hospitals() -> None:
    settings = tiny(Path("x"), "federation.strategy=krum", hospitals=4)
    assert reason_to_end(settings, []) == reason_to_end(settings, ["a"]) == ""
    assert (
        reason_to_end(settings, ["a", "b"])
        == "krum needs 3 hospitals, and 2 are left: the privacy budget of a, b is spent"
    )
    assert "and 1 is left" in reason_to_end(settings, ["a", "b", "c"])
    plain = tiny(Path("x"), hospitals=4)
    assert reason_to_end(plain, ["a", "b", "c"]) == ""
    for each in (settings, plain):
        assert (
            reason_to_end(each, ["a", "b", "c", "d"])
            == "the privacy budget of every hospital is spent"
        )


# --- checks before a simulation -------------------------------------------------------------------

LABELS = ("training.labels=data", "privacy.label_noise=1")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("federation.batch=each", "training.batch_size=18", "federation.rounds=1"),
            "batch_size = 18 is more than the 16 images of 'beta'",
        ),
        (
            ("privacy.delta=0.05",),
            r"privacy\.delta = 0\.05 is more than 1/n of the n patients of 'alpha'",
        ),
        (
            ("privacy.noise_multiplier=-1", "privacy.epsilon=1", *LABELS),
            "no noise keeps 12 steps .* release labels with more noise",
        ),
        (
            (
                "privacy.noise_multiplier=-1",
                "privacy.epsilon=2",
                "augment.mode=ada",
                "privacy.r_t_noise=0.2",
            ),
            "privacy.r_t_noise = 0.2 leaves nothing for the gradient",
        ),
    ],
    ids=["batch", "delta", "no noise", "signs"],
)
def test_simulation_reports_refusals_before_it_starts(
    overrides: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    data = write_shards(tmp_path / "data", (48, 32, 32))
    run = RunFolder.at(tmp_path / "run")
    with pytest.raises(ConfigError, match=words) as found:
        runner.simulate(private(data, *overrides), run)
    assert "\n" not in str(found.value)
    assert not run.config.exists()
    prepare_run(private(data, *overrides), run)  # a deployed server has no shard of a hospital


def test_simulation_refuses_a_ledger_of_another_unit(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", SIZES)
    spend(data, "gamma", 1)
    with pytest.raises(ConfigError, match=r"accounts per patient.*unit = 'patient'"):
        runner.simulate(private(data, "privacy.unit=image"), RunFolder.at(tmp_path / "run"))
    assert len(ledger_in(data / "gamma").entries()) == 1


def test_check_can_begin_enters_nothing(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", SIZES)
    spend(data, "gamma", 1)
    keys = (
        "privacy.noise_multiplier=-1",
        "privacy.epsilon=8",
        "training.labels=data",
        "privacy.label_noise=20",
    )
    hospitals = prepare_run(private(data, *keys), RunFolder.at(tmp_path / "run"), simulated=True)
    assert [hospital.name for hospital in hospitals] == [*NAMES[:3]]
    assert not ledger_in(data / "alpha").exists()
    assert len(ledger_in(data / "gamma").entries()) == 1


def test_equal_noise_split_uses_the_largest_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        step, "noise_for", lambda epsilon, delta, rate, steps, others: 1 + rate
    )  # the real search takes seconds
    data = write_shards(tmp_path / "data", SIZES)
    keys = (
        "privacy.noise_multiplier=-1",
        "privacy.epsilon=4",
        "federation.batch=each",
        "training.batch_size=4",
    )
    found = {}
    for split in ("by_size", "equal"):
        run = RunFolder.at(tmp_path / split)
        federate(private(data, *keys, f"privacy.noise_split={split}", rounds=1), run, app)
        found[split] = {
            row["name"]: row["noise_multiplier"] for row in lines_of(run)[0]["hospitals"]
        }
    assert found["by_size"] == {name: 1 + 4 / size for name, size in zip(NAMES, HELD, strict=False)}
    assert found["equal"] == dict.fromkeys(NAMES[:3], 1 + 4 / min(HELD))


def test_repeated_round_gets_a_new_entry(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", SIZES[:1])
    settings = private(data, rounds=2, hospitals=1)
    run = RunFolder.at(tmp_path / "run")
    federate(settings, run, app)
    first = rows_of(run, "alpha")
    for suffix in (".safetensors", ".json"):
        run.checkpoint(2).with_suffix(suffix).unlink()
    federate(settings, run, app)
    again = rows_of(run, "alpha")
    assert again[0] == first[0]
    assert again[1]["epsilon"] > first[1]["epsilon"]
    assert again[1]["epsilon"] == pytest.approx(
        epsilon_of(ledger_in(data / "alpha").mechanisms(), DELTA)
    )


# --- what travels ---------------------------------------------------------------------------------

ALWAYS = {"round", "images", "images_seen", "threads"}
COST = {"epsilon", "delta", "noise_multiplier", "sample_rate"}
OWN = {"loss_g", "d_accuracy", "p"}  # from generated images and settings
OPEN = {"loss_d", "r1", "r_t", "seconds", "core_seconds", "peak_memory_bytes"}
PLAIN = (
    "model.minibatch_std_group=0",
    "training.path_length_weight=0",
    "training.r1_interval=1",
    "training.batch_size=6",
)


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (PLAIN, ALWAYS | OWN | OPEN),
        ((*PRIVATE, "privacy.noise_multiplier=1"), ALWAYS | OWN | COST),
        (
            (*PRIVATE, "privacy.noise_multiplier=1", "augment.mode=ada", "privacy.r_t_noise=5"),
            ALWAYS | OWN | COST | {"r_t"},
        ),
        ((*PLAIN, "privacy.client_level=server"), ALWAYS),
        ((*PRIVATE, "privacy.noise_multiplier=1", "privacy.client_level=client"), ALWAYS | COST),
    ],
    ids=["open", "private", "noisy signs", "hidden hospital", "both"],
)
def test_private_hospital_sends_no_measures_of_real_images(
    overrides: tuple[str, ...], facts: set[str], tmp_path: Path
) -> None:
    settings = tiny(
        write_shards(tmp_path / "data", SIZES[:1]), *overrides, hospitals=1, rounds=1, kimg=0.018
    )
    run, replies = RunFolder.at(tmp_path / "run"), list[Message]()

    def listening(message: Message, context: Any) -> Message:
        replies.append(app(message, context))
        return replies[-1]

    federate(settings, run, listening)  # type: ignore[arg-type]
    hello, trained = (reply.content for reply in replies)
    shape = {"label_names", "exclusive", "channels", "resolution"}
    assert (
        set(hello["hospital"]) == {"number", "name", "images", "phantoms"} | shape
    )  # `phantoms`: from the shard's card
    assert hello["hospital"]["phantoms"] is False
    assert set(trained) == {"arrays", "metrics", "facts"}
    assert set(trained["metrics"]) == {"num_examples"}
    assert set(trained["facts"]) == facts
    assert {key.split("/")[0] for key in trained["arrays"]} == {"generator", "discriminator", "ema"}
    (row,) = lines_of(run)[0]["hospitals"]
    assert set(row) == facts - {"round"} | {"name", "num_examples"}


def test_infinite_epsilon_is_null(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", SIZES[:1])
    run = RunFolder.at(tmp_path / "run")
    federate(private(data, "privacy.noise_multiplier=0", rounds=1, hospitals=1), run, app)
    (row,) = rows_of(run, "alpha")
    assert row["epsilon"] is None
    assert row["noise_multiplier"] == 0
    assert finite_numbers(
        ConfigRecord({"epsilon": float("inf"), "p": float("nan"), "loss_g": 1.0})
    ) == {
        "epsilon": None,
        "loss_g": 1.0,
    }  # type: ignore[arg-type]
    assert "  ε ∞" in round_text(lines_of(run)[0], 1)


def test_progress_shows_largest_epsilon_and_exhausted_hospitals() -> None:
    line: dict[str, Any] = {"round": 2, "images_seen": 3000, "mean": {"loss_g": 1.0}}
    private_line = line | {
        "hospitals": [
            {"name": "a", "epsilon": 1.234},
            {"name": "b", "epsilon": 2.5, "exhausted": 1.0},
        ]
    }
    assert round_text(private_line, 9).endswith("  ε 2.5  budget spent: b")
    assert "ε" not in round_text(line | {"hospitals": [{"name": "a"}]}, 9)
    hidden = line | {"hospitals": [{"name": "a"}], "client_level_dp": {"epsilon": 7.0}}
    assert round_text(hidden, 9).endswith("  ε 7")
    for lines, there in (([private_line], True), ([line], False)):
        console = Console(width=120)
        with console.capture() as capture:
            console.print(rounds_table(lines))
        assert ("ε" in capture.get()) is there


# --- with Flower and Ray --------------------------------------------------------------------------


@pytest.mark.slow
def test_simulated_private_run_stays_within_epsilon(tmp_path: Path) -> None:
    tight = (
        "data.root=",
        "data.phantom_images=150",
        "privacy.epsilon=10",
        "privacy.noise_multiplier=-1",
    )
    keys = (*tight, "training.labels=data", "privacy.label_noise=20", "training.batch_size=12")
    settings = tiny(tmp_path, *PRIVATE, *keys, rounds=2, kimg=0.24)
    run = RunFolder.at(tmp_path / "run")
    runner.simulate(settings, run)
    line = lines_of(run)[-1]
    assert line["round"] == 2
    hospitals = {row["name"]: row for row in run.read_json(run.hospitals)}
    assert len(line["hospitals"]) == len(hospitals) == 3
    for row in line["hospitals"]:
        assert row["delta"] == 1e-5
        spent = Ledger(run.path / "shards" / row["name"] / FOLDER / LEDGER)
        assert [entry.kind for entry in spent.entries()] == [
            "label counts",
            "discriminator steps",
            "discriminator steps",
        ]
        assert row["epsilon"] == pytest.approx(epsilon_of(spent.mechanisms(), 1e-5), rel=1e-9)
        assert 0 < row["epsilon"] <= 10
        assert "loss_d" not in row
    assert run.read_json(run.evaluation)["round"] == 2
