"""Standalone training equals a federation of one hospital, and can be stopped and continued."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_federation import federate, tiny, write_shards

from client.app import app
from fedgan import files
from fedgan.comparison_folder import ComparisonFolder
from fedgan.config import Settings
from fedgan.errors import ConfigError
from fedgan.run_folder import RunFolder
from fedgan.runs import lock
from fedgan.runs.lock import locked
from fedgan.runs.preparation import open_prepared
from fedgan.runs.round_state import STRATEGY_STATE
from fedgan.training.checkpoint import load_tensors, with_prefix
from fedgan.training.ema import ema_decay
from fedgan.training.trainer import Trainer
from simulations.comparison.arm import (
    FEDERATION,
    POOLED,
    Arm,
    FederatedStart,
    Job,
    pool_training_images,
)
from simulations.comparison.compare import is_job_done, prepare
from simulations.comparison.plan import plan_of
from simulations.comparison.results import _cost
from simulations.comparison.standalone import (
    continue_federation,
    is_trained_standalone,
    train_standalone,
)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def quiet(event: dict[str, Any]) -> None:
    """Ignore an event."""


def comparison(path: Path, settings: Settings) -> list[Arm]:
    """Prepare a comparison in `path` and return its arms."""
    folder = ComparisonFolder.at(path)
    prepare(settings, folder, quiet)
    return plan_of(settings, folder)


def small(
    data: Path, *overrides: str, arms: str = "centralized", hospitals: int = 2, rounds: int = 3
) -> Settings:
    changes = [f"comparison.arms={arms}", "comparison.seeds=1", *overrides]
    return tiny(data, *changes, hospitals=hospitals, rounds=rounds, kimg=0.012 * rounds)


def at_end(event_round: int, error: type[BaseException]) -> Callable[[dict[str, Any]], None]:
    """An `on_event` that raises `error` at the end of a round."""

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "round_end" and event["round"] == event_round:
            raise error

    return on_event


def arrays(run: RunFolder, number: int, part: str) -> dict[str, np.ndarray]:
    return {
        key: value.numpy()
        for key, value in with_prefix(load_tensors(run.checkpoint(number))[0], part).items()
    }


def timeless(run: RunFolder) -> list[dict[str, Any]]:
    """The metrics lines of a run without times and memory."""
    clock = ("seconds", "core_seconds", "peak_memory_bytes")
    return [
        {
            key: value
            for key, value in line.items()
            if key not in ("wall_seconds", "bytes_exchanged")
        }
        | {
            "hospitals": [
                {key: value for key, value in row.items() if key not in clock}
                for row in line["hospitals"]
            ]
        }
        for line in files.read_json_lines(run.metrics)
    ]


def test_standalone_training_equals_a_federation_of_one_hospital(
    tmp_path: Path,
) -> None:
    data = write_shards(tmp_path / "data", (40,))
    settings = small(data, "evaluation.every=1", hospitals=1, rounds=2)
    federation = RunFolder.at(tmp_path / "federation")
    federate(settings, federation, app)
    (job,) = comparison(tmp_path / "study", settings)[0].jobs
    train_standalone(job, quiet)
    for number in (1, 2):
        for part in ("ema/", "generator/"):
            ours, theirs = arrays(job.run, number, part), arrays(federation, number, part)
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[key], theirs[key]) for key in ours), (number, part)
    first, last = arrays(job.run, 1, "ema/"), arrays(job.run, 2, "ema/")
    assert any((first[key] != last[key]).any() for key in first)
    assert timeless(job.run) == timeless(federation)
    assert load_tensors(job.run.checkpoint(2))[1]["images_seen"] == sum(job.images) == 24


def test_metrics_lines_have_the_keys_of_a_federation(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", (40, 24))
    # each round measures everything
    always = ("training.r1_interval=1", "training.path_length_interval=1")
    settings = small(data, *always, arms="centralized,local", rounds=2)
    federation = RunFolder.at(tmp_path / "federation")
    federate(settings, federation, app)
    (line,) = files.read_json_lines(federation.metrics)[-1:]
    arms = comparison(tmp_path / "study", settings)
    for job in [job for arm in arms for job in arm.jobs]:
        train_standalone(job, quiet)
        own = files.read_json_lines(job.run.metrics)
        assert [row["round"] for row in own] == [1, 2]
        assert own[-1].keys() == line.keys()
        assert own[-1]["mean"].keys() == line["mean"].keys()
        assert own[-1]["hospitals"][0].keys() == line["hospitals"][0].keys()
        assert own[-1]["bytes_exchanged"] == 0
        assert own[-1]["images_seen"] == sum(job.images)
        assert own[-1]["wall_seconds"] >= own[0]["wall_seconds"] > 0
        assert own[-1]["hospitals"][0]["peak_memory_bytes"] > 2**20
    names = [
        files.read_json_lines(job.run.metrics)[0]["hospitals"][0]["name"]
        for arm in arms
        for job in arm.jobs
    ]
    assert names == [POOLED, "alpha", "beta"]


def test_pooled_images_keep_the_order_of_hospitals(tmp_path: Path) -> None:
    settings = small(write_shards(tmp_path / "data", (40, 24)))
    arm = comparison(tmp_path / "study", settings)[0]
    hospitals = open_prepared(settings, ComparisonFolder.at(tmp_path / "study"))
    data = pool_training_images(hospitals)
    expected = np.concatenate(
        [hospital.train.images[np.arange(len(hospital.train))] for hospital in hospitals]
    )
    np.testing.assert_array_equal(data.images[np.arange(len(data))], expected)
    assert list(dict.fromkeys(data.institutions.tolist())) == ["alpha", "beta"]
    assert pool_training_images(hospitals[1:]) is hospitals[1].train
    assert arm.members == ("alpha", "beta")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_training_stopped_twice_equals_an_uninterrupted_one(
    error: type[BaseException], tmp_path: Path
) -> None:
    settings = small(write_shards(tmp_path / "data", (40, 24)))
    (whole,) = comparison(tmp_path / "whole", settings)[0].jobs
    (broken,) = comparison(tmp_path / "broken", settings)[0].jobs
    train_standalone(whole, quiet)
    for number in (1, 2):
        with pytest.raises(error):
            train_standalone(broken, at_end(number, error))
        assert broken.run.last_round() == number
        assert not is_trained_standalone(broken)
    events: list[dict[str, Any]] = []
    train_standalone(broken, events.append)
    assert [event["round"] for event in events if event["event"] == "round_start"] == [3]
    assert events[0]["event"] == "start"
    assert (events[0]["first_round"], events[0]["images_seen"], events[0]["images"]) == (3, 24, 36)
    for number in (1, 2, 3):
        assert (
            whole.run.checkpoint(number).read_bytes() == broken.run.checkpoint(number).read_bytes()
        )
    assert _state(whole, 3).read_bytes() == _state(broken, 3).read_bytes()
    assert timeless(whole.run) == timeless(broken.run)
    assert is_trained_standalone(broken)
    assert is_job_done(broken)


def _state(job: Job, number: int) -> Path:
    return job.folder / "trainer" / f"state-{number:05d}.safetensors"


def test_lost_round_or_metrics_line_is_restored(tmp_path: Path) -> None:
    settings = small(write_shards(tmp_path / "data", (40,)), hospitals=1)
    (job,) = comparison(tmp_path / "study", settings)[0].jobs
    train_standalone(job, quiet)
    last, lines = job.run.checkpoint(3).read_bytes(), timeless(job.run)
    for path in (job.run.checkpoint(3), job.run.checkpoint(3).with_suffix(".json")):
        path.unlink()
    assert not is_trained_standalone(job)
    train_standalone(job, quiet)
    assert job.run.checkpoint(3).read_bytes() == last
    assert timeless(job.run) == lines

    text = job.run.metrics.read_text()
    job.run.metrics.write_text("".join(text.splitlines(keepends=True)[:2]) + '{"round": 3, "im')
    assert not is_trained_standalone(job)
    train_standalone(job, quiet)
    assert job.run.metrics.read_text() == text
    assert job.run.checkpoint(3).read_bytes() == last


def test_damaged_checkpoint_is_put_aside_and_the_round_before_is_used(tmp_path: Path) -> None:
    settings = small(write_shards(tmp_path / "data", (40,)), hospitals=1)
    (job,) = comparison(tmp_path / "study", settings)[0].jobs
    (whole,) = comparison(tmp_path / "whole", settings)[0].jobs
    train_standalone(whole, quiet)
    with pytest.raises(KeyboardInterrupt):
        train_standalone(job, at_end(2, KeyboardInterrupt))
    path = job.run.checkpoint(2)
    path.write_bytes(path.read_bytes()[:-1])
    texts: list[str] = []
    train_standalone(job, lambda event: texts.append(str(event.get("text", ""))))
    assert (
        "round-00002.safetensors is damaged and renamed to round-00002.safetensors.damaged: "
        "resuming from round 1" in texts
    )
    assert job.run.checkpoint(3).read_bytes() == whole.run.checkpoint(3).read_bytes()


def test_second_process_in_one_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "TIMEOUT", 0.2)
    (job,) = comparison(
        tmp_path / "study", small(write_shards(tmp_path / "data", (40,)), hospitals=1)
    )[0].jobs
    with locked(job.run), pytest.raises(ConfigError, match="in use by another fedgan"):
        train_standalone(job, quiet)


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Arm]:
    """A federation of three rounds with changed ADA, and the arm that continues its round 2."""
    root = tmp_path_factory.mktemp("tuning")
    data = write_shards(root / "data", (40, 24))
    changes = (
        *("evaluation.every=1", "comparison.finetune_share=0.3"),
        *("augment.interval=1", "augment.speed_kimg=0.1", "training.ema_rampup=1"),
    )
    federated, finetuned = comparison(
        root / "study", small(data, *changes, arms="federated,finetuned")
    )
    (source,) = federated.jobs
    assert source.kind == FEDERATION
    before = torch.get_num_threads()
    federate(source.settings, source.run, app)
    torch.set_num_threads(before)
    return source, finetuned


def test_finetuning_starts_from_federated_weights_and_hospital_progress(
    tuning: tuple[Job, Arm], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, finetuned = tuning
    begun: list[dict[str, Any]] = []
    train = Trainer.train

    def watched(self: Trainer, *arguments: Any, **more: Any) -> dict[str, float]:
        facts = {
            "seen": self.images_seen,
            "steps": self.step.steps,
            "p": self.step.ada.p,
            "parts": self.get_parameters(self.parts),
        }
        begun.append(facts)
        return train(self, *arguments, **more)

    monkeypatch.setattr(Trainer, "train", watched)
    wanted, _ = load_tensors(source.run.checkpoint(2))
    rows = {row["name"]: row for row in files.read_json_lines(source.run.metrics)[1]["hospitals"]}
    lines = files.read_json_lines(source.run.metrics)
    for job in finetuned.jobs:
        (name,) = job.members
        shown = [
            row["images"] for line in lines for row in line["hospitals"] if row["name"] == name
        ]
        assert job.start == FederatedStart(source.folder, 2, sum(shown[:2]))
        events: list[dict[str, Any]] = []
        train_standalone(job, events.append)
        at = begun.pop(0)
        assert (at["seen"], at["steps"], at["p"]) == (
            sum(shown[:2]),
            sum(shown[:2]) // 4,
            rows[name]["p"],
        )
        for part in ("generator", "discriminator", "ema"):
            own = with_prefix(at["parts"], f"{part}/")
            assert own
            for key, array in own.items():
                assert np.array_equal(array.ravel(), wanted[f"{part}/{key}"].numpy().ravel()), (
                    part,
                    key,
                )
        (line,) = files.read_json_lines(job.run.metrics)
        assert line["images_seen"] == line["hospitals"][0]["images_seen"] == sum(shown)
        assert line["hospitals"][0]["images"] == shown[2] == sum(job.images)
        assert load_tensors(job.run.checkpoint(1))[1]["images_seen"] == sum(shown)
        start = next(event for event in events if event["event"] == "start")
        assert (start["images_seen"], start["images"]) == (sum(shown[:2]), sum(shown))
        assert is_trained_standalone(job)
    assert {rows[job.members[0]]["p"] for job in finetuned.jobs} != {0.2}  # the initial ADA p
    one, other = (load_tensors(job.run.checkpoint(1))[0] for job in finetuned.jobs)
    assert any(not torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert any(not torch.equal(tensor, wanted[key]) for key, tensor in one.items())


def test_finetuning_continues_the_moving_average(
    tuning: tuple[Job, Arm],
) -> None:
    source, finetuned = tuning
    job = finetuned.jobs[0]
    assert job.start is not None
    seen, received = job.start.images_seen, load_tensors(source.run.checkpoint(2))[0]
    settings = job.settings
    found = {}
    for kind in ("continued", "restarted"):
        trainer = Trainer(settings, pool_training_images(open_prepared(settings, job.run)), "cpu")
        if kind == "continued":
            continue_federation(job.start, job.members[0], trainer, True, [])
        else:  # the same weights without the image count, as in the first step of a training
            arrays = {
                key: tensor.numpy()
                for key, tensor in received.items()
                if not key.startswith(STRATEGY_STATE)
            }
            trainer.load_parameters(arrays)
        trainer.train(4)
        found[kind] = {
            part: with_prefix(trainer.get_parameters(trainer.parts), f"{part}/")
            for part in ("ema", "generator")
        }
    restarted, continued = found["restarted"], found["continued"]
    assert all(
        np.array_equal(array, restarted["generator"][key])
        for key, array in restarted["ema"].items()
    )  # a restart drops the average
    decay = ema_decay(4, 1.25, 1.0, seen)
    assert 0.5 < decay < 1
    for key, average in continued["ema"].items():
        before, now = (
            received[f"ema/{key}"].numpy().reshape(average.shape),
            continued["generator"][key],
        )
        if key.endswith("w_avg"):  # a plain mean over batches, with one more batch in both
            np.testing.assert_allclose(
                average,
                before + (restarted["ema"][key] - before) / (seen // 4 + 1),
                rtol=1e-5,
                atol=1e-6,
            )
            continue
        np.testing.assert_allclose(
            average, decay * before + (1 - decay) * now, rtol=1e-5, atol=1e-6
        )


def test_private_arm_withholds_figures_of_its_secret_samples(tmp_path: Path) -> None:
    private = (
        *("model.minibatch_std_group=0", "augment.mode=none", "training.r1_gamma=0"),
        *("training.labels=uniform", "privacy.noise_multiplier=1", "comparison.arms=centralized"),
    )
    withheld = {"seconds", "core_seconds", "peak_memory_bytes"}
    data = write_shards(tmp_path / "data", (40, 24))
    for name, keys, expected in (("open", (), withheld), ("private", private, set())):
        (arm,) = comparison(tmp_path / name, small(data, *keys, rounds=1))
        train_standalone(arm.jobs[0], quiet)
        (line,) = files.read_json_lines(arm.jobs[0].run.metrics)
        (row,) = line["hospitals"]
        assert row.keys() & withheld == expected
        assert {"loss_g", "images", "threads"} <= row.keys()
        cost = _cost(arm, [[line]])
        assert [cost[key] is None for key in ("core_seconds", "peak_memory_bytes")] == [
            not expected
        ] * 2
