"""Client-level DP: clipping, absent hospitals, noise, privacy cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st
from small_federation import LocalGrid, error_reply, federate, tiny, write_shards

from client import app as client_app
from client.app import app
from client.wire import update_record
from fedgan import files
from fedgan.config import Settings
from fedgan.errors import ConfigError
from fedgan.privacy.accounting import Mechanism, epsilon_of
from fedgan.privacy.client_level import clipped_change
from fedgan.privacy.ledger import Ledger
from fedgan.run_folder import RunFolder
from fedgan.runs.compatibility import check_compatibility
from fedgan.runs.preparation import experiment_of
from fedgan.training.checkpoint import load_tensors
from server.aggregation.client_level_dp import (
    LEDGER,
    noise_statement,
    private_mean,
    record_round,
)
from server.federation import Federation

SHAPES = {"generator/strength": (1,), "discriminator/w": (40, 50), "ema/b": (7,)}
HOSPITALS = 3


def settings_of(
    *overrides: str, hospitals: int = HOSPITALS, data: Path = Path("nowhere"), rounds: int = 2
) -> Settings:
    return tiny(data, *overrides, hospitals=hospitals, rounds=rounds, kimg=0.012 * rounds)


def arrays(rng: np.random.Generator, scale: float) -> dict[str, np.ndarray]:
    return {
        key: np.asarray(scale * rng.standard_normal(shape), np.float32)
        for key, shape in SHAPES.items()
    }


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    return math.sqrt(
        sum(float(np.square(one[key].astype(float) - other[key]).sum()) for key in one)
    )


def shifted(sent: dict[str, np.ndarray], update: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The model of a hospital, with its arrays in reverse order."""
    return {key: sent[key] + update[key] for key in reversed(list(sent))}


# --- the mechanism --------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.floats(0.01, 100.0), st.sampled_from([0.1, 1.0, 10.0]))
def test_absence_of_a_hospital_moves_the_sum_by_the_clip(
    seed: int, size: float, clip: float
) -> None:
    rng = np.random.default_rng(seed)
    settings = settings_of(
        "privacy.client_level=server",
        "privacy.client_noise_multiplier=0",
        f"privacy.client_clip={clip}",
    )
    sent = {key: np.zeros_like(array) for key, array in arrays(rng, 1.0).items()}
    others = [arrays(rng, 0.01) for _ in range(HOSPITALS - 1)]
    update = arrays(rng, size)
    present = private_mean(settings, sent, [update, *others])
    absent = private_mean(settings, sent, others)
    zero = private_mean(settings, sent, [sent, *others])
    assert all(np.array_equal(absent[key], zero[key]) for key in sent)
    sensitivity = HOSPITALS * distance(present, absent)
    length = min(clip, distance(update, sent))
    assert sensitivity == pytest.approx(length, rel=1e-4, abs=1e-6)
    assert distance(clipped_change(update, sent, clip), sent) <= clip


@pytest.mark.parametrize("present", [3, 2, 0])
def test_noise_is_independent_of_the_hospitals_that_reply(present: int) -> None:
    clip, noise = 0.5, 4.0
    settings = settings_of(
        "privacy.client_level=server",
        f"privacy.client_noise_multiplier={noise}",
        f"privacy.client_clip={clip}",
    )
    sent = {"generator/w": np.zeros((300, 400), np.float32), "ema/one": np.zeros(1, np.float32)}
    update = {key: np.full(value.shape, 1e-6, np.float32) for key, value in sent.items()}
    noises = []
    for _ in range(2):
        np.random.seed(0)  # the noise does not depend on numpy's seed
        found = private_mean(settings, sent, [shifted(sent, update)] * present)["generator/w"]
        assert found.dtype == np.float32
        assert found.std() == pytest.approx(noise * clip / HOSPITALS, rel=0.01)
        assert abs(found.mean()) < 0.02
        noises.append(found)
    assert not np.array_equal(*noises)


def test_hospital_clips_its_update_by_its_settings() -> None:
    rng = np.random.default_rng(3)
    # some weights of StyleGAN2 have a standard deviation of 100
    sent, update = arrays(rng, 100.0), arrays(rng, 2.0)
    model = shifted(sent, update)

    def sends(side: str, after: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        settings = settings_of(f"privacy.client_level={side}")
        return {key: item.numpy() for key, item in update_record(after, sent, settings).items()}

    clipped = sends("client", model)
    assert distance(clipped, sent) == pytest.approx(1.0, rel=1e-2)
    direction = {key: (clipped[key] - sent[key]) * distance(model, sent) for key in sent}
    assert distance(direction, update) < 0.05 * distance(model, sent)
    assert distance(sends("server", model), model) == 0
    assert distance(sends("client", sent), sent) == 0


def test_client_level_dp_refuses_other_results_than_a_mean() -> None:
    for strategy in ("fedadam", "fedmedian", "krum"):
        with pytest.raises(ConfigError, match="computes another result"):
            check_compatibility(
                settings_of(
                    "privacy.client_level=server", f"federation.strategy={strategy}", hospitals=3
                )
            )


def test_absent_hospital_equals_one_that_sends_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, noise, data = 0.5, 3.0, write_shards(tmp_path / "data", (40, 24, 16))
    now: list[int] = []
    update_of = client_app.update_record

    def zero_of_the_last(after: Any, before: Any, settings: Settings) -> Any:
        return update_of(before if now[-1] == 2 else after, before, settings)

    monkeypatch.setattr(client_app, "update_record", zero_of_the_last)

    def change(name: str, is_absent: bool, multiplier: float) -> np.ndarray:
        def fault(number: int, message: Message) -> Message | None:
            now.append(number)
            is_training = message.metadata.message_type == "train"
            return (
                error_reply(message, "away") if is_absent and number == 2 and is_training else None
            )

        settings = settings_of(
            "privacy.client_level=server",
            f"privacy.client_clip={clip}",
            f"privacy.client_noise_multiplier={multiplier}",
            "federation.min_hospitals=1",
            data=data,
            rounds=1,
        )
        run = RunFolder.at(tmp_path / name)
        federate(settings, run, app, fault)
        begin, end = (load_tensors(run.checkpoint(number))[0] for number in (0, 1))
        (line,) = files.read_json_lines(run.metrics)
        assert len(line["hospitals"]) == 3 - is_absent
        assert line["client_level_dp"]["hospitals"] == 3
        return np.concatenate([(end[key] - begin[key]).numpy().ravel() for key in sorted(begin)])

    absent, zero = change("absent", True, 0.0), change("zero", False, 0.0)
    assert np.array_equal(absent, zero)
    assert np.linalg.norm(absent) > 0.1 * clip
    assert change("noisy", True, noise).std() == pytest.approx(noise * clip / 3, rel=0.1)


# --- privacy cost ---------------------------------------------------------------------------------


def test_every_release_is_one_gaussian_mechanism_of_the_ledger(tmp_path: Path) -> None:
    settings = settings_of("privacy.client_level=server", "privacy.client_noise_multiplier=5")
    run, records = RunFolder.at(tmp_path), list[dict[str, Any]]()
    for _ in range(4):
        records.append(record_round(settings, run, "x"))
    assert [row["releases"] for row in records] == [1, 2, 3, 4]
    for row in records:
        assert row["epsilon"] == pytest.approx(
            epsilon_of([Mechanism(5.0, 1.0, row["releases"])], 1e-5), rel=1e-6
        )
        # against the exact curve of the Gaussian mechanism (arXiv 1805.06530, theorem 8)
        assert row["epsilon"] == pytest.approx(
            gaussian(5 / math.sqrt(row["releases"]), 1e-5), rel=0.03
        )
    assert records[0]["delta"] == 1e-5
    assert (
        record_round(
            settings_of("privacy.client_level=server", "privacy.client_noise_multiplier=0"),
            run,
            "y",
        )["epsilon"]
        is None
    )


def gaussian(noise: float, delta: float) -> float:
    """ε of one Gaussian mechanism with this noise over its sensitivity."""

    def tail(epsilon: float) -> float:
        def normal(x: float) -> float:
            return 0.5 * math.erfc(-x / math.sqrt(2))

        return normal(0.5 / noise - epsilon * noise) - math.exp(epsilon) * normal(
            -0.5 / noise - epsilon * noise
        )

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) > delta else (low, middle)
    return high


def test_noise_statement_explains_epsilon_and_noise() -> None:
    text = noise_statement(
        settings_of("privacy.client_level=server", "privacy.client_noise_multiplier=2", rounds=5),
        1_000_000,
    )
    epsilon = epsilon_of([Mechanism(2.0, 1.0, 5)], 1e-5)
    assert f"5 rounds cost every hospital epsilon = {epsilon:.3g} at delta = 1e-05" in text
    assert "over 1,000,000 numbers the noise is 2,000 times as long" in text
    assert "delta = 1/3 would allow the full disclosure of one hospital" in text


@pytest.mark.parametrize("side", ["server", "client"])
def test_client_level_dp_run_clips_adds_noise_and_reports_epsilon(
    side: str, tmp_path: Path
) -> None:
    clip, noise, data = 0.5, 3.0, write_shards(tmp_path / "data", (40, 24, 16))
    overrides = (
        f"privacy.client_level={side}",
        f"privacy.client_clip={clip}",
        "privacy.client_noise_multiplier=",
    )
    change, lines = {}, {}
    for multiplier in (0.0, noise):
        settings = settings_of(*overrides[:2], f"{overrides[2]}{multiplier}", data=data, rounds=1)
        run = RunFolder.at(tmp_path / f"run-{multiplier}")
        federate(settings, run, app)
        begin, end = (load_tensors(run.checkpoint(number))[0] for number in (0, 1))
        change[multiplier] = np.concatenate(
            [(end[key] - begin[key]).numpy().ravel() for key in begin]
        )
        (lines[multiplier],) = files.read_json_lines(run.metrics)
    # the mean of three updates of at most the clip's length
    assert 0.1 * clip < np.linalg.norm(change[0.0]) < 1.01 * clip
    assert change[noise].std() == pytest.approx(noise * clip / 3, rel=0.1)
    assert lines[0.0]["client_level_dp"]["epsilon"] is None
    reported = lines[noise]["client_level_dp"]
    assert (
        reported["releases"],
        reported["hospitals"],
        reported["clip"],
        reported["noise_multiplier"],
    ) == (
        1,
        3,
        clip,
        noise,
    )
    assert reported["epsilon"] == pytest.approx(
        epsilon_of(Ledger(run.path / LEDGER).mechanisms(), 1e-5)
    )
    assert all("loss_g" not in row for line in lines.values() for row in line["hospitals"])


def test_repeated_round_counts_twice_and_the_note_appears_once(
    tmp_path: Path,
) -> None:
    settings = settings_of(
        "privacy.client_level=server",
        "privacy.client_noise_multiplier=3",
        data=write_shards(tmp_path / "d", (40, 24, 16)),
    )
    run = RunFolder.at(tmp_path / "run")
    federation = federate(settings, run, app)
    run.checkpoint(2).unlink()
    run.checkpoint(2).with_suffix(".json").unlink()
    events: list[dict[str, Any]] = []
    Federation(run.settings(), run, experiment_of(run), federation.evaluator, events.append).train(
        LocalGrid(3, app)
    )  # type: ignore[arg-type]
    assert [event["event"] for event in events].count("note") == 1
    assert [line["client_level_dp"]["releases"] for line in files.read_json_lines(run.metrics)] == [
        1,
        3,
    ]
