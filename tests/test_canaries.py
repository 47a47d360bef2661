"""Empirical ε: the bound of one run, canaries in the Trainer and through Flower."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from small_federation import federate, ledger_in, tiny, write_shards

import client.app
from fedgan.audit import canaries as canaries_module
from fedgan.audit.attacks.logan import discriminator_scores
from fedgan.audit.attacks.one_run import epsilon_lower_bound, p_value, score_canaries
from fedgan.audit.audit import headline
from fedgan.audit.canaries import audit_canaries, canary_report
from fedgan.audit.canary_step import Canaries, CanaryStep, Claim, log_likelihood_ratio
from fedgan.audit.rules import exceeded_claim
from fedgan.audit.subject import LocalTraining
from fedgan.cli.audit_subject import load_audited_model, local_trainings
from fedgan.config import Settings
from fedgan.data.dataset import ImageDataset, unit_numbers
from fedgan.data.federation import open_hospitals
from fedgan.data.shard import write_shard
from fedgan.errors import CheckpointError, ConfigError
from fedgan.models.stylegan2.discriminator import Discriminator
from fedgan.privacy.ledger import NAME as LEDGER
from fedgan.privacy.ledger import Ledger
from fedgan.privacy.step import PrivateStep
from fedgan.report.run.privacy.canaries import canary_table
from fedgan.report.run.privacy.findings import Audit
from fedgan.run_folder import RunFolder
from fedgan.training.losses import discriminator_loss
from fedgan.training.start import begin_training

DELTA = 1e-5
PRIVATE = (
    *("model.minibatch_std_group=0", "augment.mode=none", "training.r1_gamma=0"),
    *("training.labels=uniform", "training.path_length_weight=0", f"privacy.delta={DELTA}"),
)
CPU = torch.device("cpu")


# --- the bound ----------------------------------------------------------------------------------


def accuracy(epsilon: float) -> float:
    """Accuracy of randomised response with ε."""
    return 1 / (1 + math.exp(-epsilon))


@given(st.integers(1, 40), st.integers(0, 40), st.floats(0, 5))
def test_p_value_without_delta_is_the_binomial_tail(guesses, correct, epsilon):
    correct, q = min(correct, guesses), accuracy(epsilon)
    exact = sum(
        math.comb(guesses, hits) * q**hits * (1 - q) ** (guesses - hits)
        for hits in range(correct, guesses + 1)
    )
    assert p_value(guesses, guesses, correct, epsilon, 0.0) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("guesses", [5, 100])
def test_bound_of_correct_guesses_has_a_closed_form(guesses):
    q = 0.05 ** (1 / guesses)  # all correct: q^r = 5 %
    assert epsilon_lower_bound(guesses, guesses, guesses, 0.0) == pytest.approx(
        math.log(q / (1 - q)), abs=1e-4
    )


@given(st.integers(2, 200), st.data(), st.sampled_from([0.0, 1e-5, 1e-3]))
def test_bound_is_monotone_in_hits_delta_and_coins(canaries, data, delta):
    guesses = data.draw(st.integers(1, canaries))
    correct = data.draw(st.integers(0, guesses - 1))
    bound = epsilon_lower_bound(canaries, guesses, correct, delta)
    assert epsilon_lower_bound(canaries, guesses, correct + 1, delta) >= bound - 1e-5
    assert epsilon_lower_bound(canaries, guesses, correct, delta + 1e-3) <= bound + 1e-5
    assert epsilon_lower_bound(canaries + 50, guesses, correct, delta) <= bound + 1e-5


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("guesses", [20, 200])
def test_bound_exceeds_randomised_response_in_five_percent(epsilon, guesses):
    """Exact: the sum of P(v correct) over all v whose bound is above ε."""
    hits = np.arange(guesses + 1)
    above = [epsilon_lower_bound(guesses, guesses, int(v), 0.0) > epsilon for v in hits]
    wrong = binom.pmf(hits, guesses, accuracy(epsilon))[above].sum()
    assert wrong <= 0.05
    assert guesses < 100 or wrong > 0.01  # and it is not empty


def test_delta_term_covers_canaries_revealed_with_probability_delta():
    """Each coin is revealed with probability δ, else randomised: (ε, δ)-private, more hits."""
    canaries, delta, epsilon = 400, 0.03, 1.0
    q = delta + (1 - delta) * accuracy(epsilon)
    hits = np.arange(canaries + 1)

    def wrong(assumed: float) -> float:
        above = [epsilon_lower_bound(canaries, canaries, int(v), assumed) > epsilon for v in hits]
        return float(binom.pmf(hits, canaries, q)[above].sum())

    assert wrong(delta) <= 0.05 < wrong(0.0)


def test_scores_with_abstention_exceed_epsilon_in_five_percent():
    """Scores of Gaussian noise: ε at δ = 0.01 of one Gaussian release is below its bound."""
    from fedgan.privacy.accounting import Mechanism, epsilon_of

    rng, runs, canaries, noise, delta = np.random.default_rng(0), 200, 200, 1.0, 1e-3
    epsilon = epsilon_of([Mechanism(noise, 1.0, 1)], delta)
    bounds = []
    for _ in range(runs):
        included = rng.random(canaries) < 0.5
        scores = included + noise * rng.normal(size=canaries)
        bounds.append(score_canaries(scores, included, delta).epsilon_low)
    assert np.mean(np.array(bounds) > epsilon) <= 0.05
    assert np.median(bounds) > 0.4  # an audit that finds something


def test_score_canaries_guesses_both_ends_and_abstains():
    included = np.arange(100) % 2 == 0
    scores = np.where(included, 1.0, 0.0) + np.arange(100) / 1000
    found = score_canaries(scores, included, 0.0)
    assert (found.canaries, found.included) == (100, 50)
    assert (found.guesses, found.correct) == (80, 80)
    assert found.epsilon_low > 2.8
    assert score_canaries(-scores, included, 0.0).epsilon_low == 0.0
    with pytest.raises(ValueError, match="not numbers"):
        score_canaries(np.full(100, np.nan), included, 0.0)
    with pytest.raises(ValueError, match="5 correct of 4"):
        epsilon_lower_bound(10, 4, 5, 0.0)


def test_likelihood_ratio_agrees_with_normal_densities():
    from scipy.stats import norm

    sums, noise, q = np.linspace(-3, 4, 9), 1.3, 0.2
    mixture = (1 - q) * norm.pdf(sums, 0, noise) + q * norm.pdf(sums, 1, noise)
    expected = np.log(mixture / norm.pdf(sums, 0, noise))
    assert log_likelihood_ratio(sums, noise, q) == pytest.approx(expected)
    assert log_likelihood_ratio(sums, noise, 1.0) == pytest.approx((2 * sums - 1) / (2 * noise**2))
    assert (log_likelihood_ratio(sums, 0.0, q) == sums).all()


# --- canaries in the data -----------------------------------------------------------------------


def images(count: int, patients: bool = True) -> ImageDataset:
    rng = np.random.default_rng(1)
    labels = np.eye(2, dtype=np.uint8)[np.arange(count) % 2]
    names = np.array([f"p{row // 2}" for row in range(count)]) if patients else np.empty(0, str)
    return ImageDataset(
        "clinic",
        rng.integers(0, 256, (count, 1, 16, 16)).astype(np.uint8),
        labels,
        ("dark", "bright"),
        patients=names,
        institutions=np.array(["a"] * len(names), str),
    )


def settings(*overrides: str, batch: int = 8) -> Settings:
    return tiny(Path("none"), *PRIVATE, f"training.batch_size={batch}", *overrides)


def test_excluded_canaries_are_blank_and_n_is_constant():
    data = images(6)
    found = Canaries(data, 10, rng=np.random.default_rng(2))
    pixels = found.dataset.images[np.arange(26)]
    shown = pixels[6:].reshape(20, -1).any(axis=1)
    assert len(found.dataset) == 26
    assert 2 < found.included.sum() < 18
    assert (shown == found.included).all()
    assert (found.dataset.labels[6:].sum(axis=1) == found.included).all()
    assert (pixels[:6] == data.images).all()
    assert len(set(found.dataset.patients[6:])) == 20  # a unit each
    assert len(np.unique(found.images.reshape(20, -1), axis=0)) == 20
    assert unit_numbers(Canaries(images(6, patients=False), 3).dataset).max() == 11


@pytest.mark.parametrize("unit", ["image", "patient"])
def test_draws_hold_no_excluded_canary_and_number_units(tmp_path, unit):
    found = Canaries(images(10), 8, Claim(1.0, 0.5, DELTA))
    step = canary_step(tmp_path, found, f"privacy.unit={unit}", "privacy.noise_multiplier=1")
    absent = set(10 + np.flatnonzero(~found.included))
    taken: set[int] = set()
    for number in range(40):
        draw = step.draw(number)
        assert not absent & set(draw.rows)
        assert len(draw.units) == len(draw.rows)
        numbers = draw.units.numpy()
        assert (np.diff(numbers) >= 0).all()
        assert set(numbers) == set(range(len(set(numbers))))
        taken |= set(draw.rows)
    assert taken == set(range(26)) - absent


def canary_step(tmp_path: Path, found: Canaries, *overrides: str) -> CanaryStep:
    ledger = Ledger(tmp_path / LEDGER)
    return CanaryStep(found, settings(*overrides), found.dataset, 8, 800, ledger, "x", CPU)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_gradient_canaries_pass_clip_noise_and_ledger(tmp_path, noise):
    """One release per step: 1 where a canary was sampled, with the noise of its multiplier."""
    clip, count = 0.7, 40
    found = Canaries(images(10), count, Claim(noise, 0.5, DELTA), np.random.default_rng(3))
    keys = (f"privacy.noise_multiplier={noise}", f"privacy.max_grad_norm={clip}")
    step = canary_step(tmp_path, found, *keys)
    network = Discriminator(settings().model, 16, 1, 2, torch.Generator().manual_seed(2))
    seen = []
    assert step.reserve(30) == 30
    for number in range(30):
        draw = step.draw(number)
        pixels, labels = found.dataset.batch(draw.rows)
        reals = (pixels.float() / 127.5 - 1, labels)
        fakes = (torch.zeros_like(reals[0]), torch.zeros_like(labels))
        before = found.evidence.copy()
        step.gradient(network, discriminator_loss, fakes, reals, draw)
        if noise:
            continue
        sampled = np.isin(found.first + count + np.arange(count), draw.rows)
        assert found.evidence - before == pytest.approx(sampled.astype(float), abs=1e-3)
        seen.append(sampled)
    included = found.included[count:]
    if noise:  # σ = 1: a sum over 30 steps of half of them, in units of the clip
        assert found.evidence[included].mean() > found.evidence[~included].mean() + 1
    else:
        assert (np.any(seen, axis=0) == included).all()
    assert Ledger(tmp_path / LEDGER).entries()[0].steps == 30


def test_gradient_canaries_change_no_other_gradient(tmp_path):
    found = Canaries(images(12), 4)
    network = Discriminator(settings().model, 16, 1, 2, torch.Generator().manual_seed(2))
    gradients = []
    for kind in (PrivateStep, functools.partial(CanaryStep, found)):
        ledger = Ledger(tmp_path / f"{len(gradients)}.jsonl")
        plain = settings("privacy.noise_multiplier=0")
        step = kind(plain, found.dataset, 8, 800, ledger, "x", CPU)
        step.reserve(1)
        rows = np.arange(12)  # no canary
        draw = dataclasses.replace(step.draw(0), rows=rows, units=torch.from_numpy(rows))
        pixels, labels = found.dataset.batch(rows)
        reals = (pixels.float() / 127.5 - 1, labels)
        step.gradient(network, discriminator_loss, (-reals[0], labels), reals, draw)
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- the run ------------------------------------------------------------------------------------


def audit(*overrides: str, count: int = 100, steps: int = 25) -> dict[str, Any]:
    training = LocalTraining(0, 8, 8 * steps)
    return audit_canaries(settings(*overrides), images(16), training, count)


def test_canaries_of_a_private_run_stay_below_the_ledger():
    found = audit("privacy.noise_multiplier=1")
    assert (found["steps"], found["sample_rate"], found["delta"]) == (25, 0.5, DELTA)
    assert found["noise_multiplier"] == 1.0
    assert set(found["kinds"]) == {"images", "gradients"}
    for kind in found["kinds"].values():
        assert 0 <= kind["epsilon_low"] < found["epsilon"]
        assert kind["canaries"] == 100
    assert found["kinds"]["gradients"]["epsilon_low"] > 0.5  # and the audit is no empty one
    assert exceeded_claim(found) == ""


def test_canaries_without_noise_exceed_the_claim(monkeypatch):
    """The ledger enters noise that the step does not add."""

    class Noiseless(CanaryStep):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.noise_multiplier = 0.0

    monkeypatch.setattr(canaries_module, "CanaryStep", Noiseless)
    found = audit("privacy.noise_multiplier=20")
    assert found["epsilon"] < 1.0
    assert found["kinds"]["gradients"]["epsilon_low"] > 2.0
    assert "by canary gradients, the ledger states 0" in exceeded_claim(found)


def test_canaries_of_a_run_without_noise_have_no_finite_ledger():
    found = audit("privacy.noise_multiplier=0")
    assert (found["epsilon"], exceeded_claim(found)) == (None, "")
    assert found["kinds"]["gradients"]["epsilon_low"] > 2.0


def test_claim_is_that_of_the_run_with_epsilon():
    """The noise is that of the run's data and length, not of the data with canaries."""
    found = audit("privacy.epsilon=3", count=20)
    plain = PrivateStep(
        settings("privacy.epsilon=3"), images(16), 8, 200, Ledger(Path("none")), "x", CPU
    )
    assert found["noise_multiplier"] == plain.noise_multiplier
    assert found["sample_rate"] == plain.sample_rate
    assert 2.5 < found["epsilon"] <= 3.0


def test_canary_report_names_the_kind_that_exceeds_the_ledger():
    found = Canaries(images(16), 100, rng=np.random.default_rng(0))
    claim = Claim(1.0, 0.5, DELTA)
    report = canary_report(found, found.included[:100].astype(float), claim, 25, 1.0)
    assert exceeded_claim(report).endswith("by canary images, the ledger states 1.00")
    verdict = headline({"hospitals": [], "canaries": [{"name": "clinic", **report}]})
    assert verdict.startswith("the guarantee does not hold at clinic: ε is at least")
    shown = Audit({"canaries": [{"name": "clinic", **report}]})
    assert "The guarantee does not hold at clinic" in shown.verdict()
    assert "clinic, images" in canary_table(shown)
    assert canary_table(Audit({"canaries": [{"kinds": 3}, "text"]})) == ""
    assert report["kinds"]["images"]["epsilon_low"] > 2.5


def test_canaries_need_a_private_run():
    with pytest.raises(ConfigError, match="no differential privacy"):
        audit_canaries(tiny(Path("none")), images(16), LocalTraining(0, 8, 80), 10)


# --- through Flower -----------------------------------------------------------------------------


def federated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[str, Any]:
    """A federation of two hospitals with canaries in the first; its figures."""
    data = write_shards(tmp_path / "data", (32, 16))
    keys = [*PRIVATE, "training.batch_size=32", "federation.batch=shared", *overrides]
    plan = tiny(data, *keys, hospitals=2, rounds=2, kimg=0.8)
    own = open_hospitals(plan)[0]
    found = Canaries(own.train, 60)
    rows = [found.dataset, own.val, own.test]
    write_shard(
        data / own.name,
        np.concatenate([part.images[np.arange(len(part))] for part in rows]),
        # a shard of exclusive labels has one for each image, also for a blank one
        _with_labels(np.concatenate([part.labels for part in rows])),
        patients=[str(name) for part in rows for name in part.patients],
        splits=["train"] * len(rows[0]) + ["val"] * len(rows[1]) + ["test"] * len(rows[2]),
        label_names=own.train.label_names,
        name=own.name,
        overwrite=True,
    )

    def begin(settings: Settings, dataset: ImageDataset, **others: Any) -> Any:
        observed = functools.partial(CanaryStep, found) if dataset.name == own.name else PrivateStep
        return begin_training(settings, dataset, **others, private_step=observed)

    monkeypatch.setattr(client.app, "begin_training", begin)
    run = RunFolder.at(tmp_path / "run")
    federate(plan, run, client.app.app)
    entries = ledger_in(data / own.name).entries()
    claim = Claim(entries[-1].noise_multiplier, entries[-1].sample_rate, DELTA)
    steps = sum(entry.steps for entry in entries)
    return canary_report(found, _scores(run, found), claim, steps, entries[-1].cost)


def _with_labels(labels: np.ndarray) -> np.ndarray:
    labels = labels.copy()
    labels[labels.sum(axis=1) == 0, 0] = 1
    return labels


def _scores(run: RunFolder, found: Canaries) -> np.ndarray:
    """The exchanged discriminator's scores of the image canaries."""

    audited, _ = load_audited_model(run.checkpoint(2), run.settings())
    assert audited.discriminator is not None
    return discriminator_scores(audited.discriminator, found.images[:60], found.labels[:60])


def test_canaries_through_flower_stay_below_the_ledger(tmp_path, monkeypatch):
    found = federated(tmp_path, monkeypatch, "privacy.noise_multiplier=1")
    assert found["steps"] == 25
    assert exceeded_claim(found) == ""
    assert found["kinds"]["gradients"]["epsilon_low"] < found["epsilon"]


def test_canaries_through_flower_find_missing_noise(tmp_path, monkeypatch):
    found = federated(tmp_path, monkeypatch, "privacy.noise_multiplier=0")
    assert found["kinds"]["gradients"]["epsilon_low"] > 1.5


# --- the command --------------------------------------------------------------------------------


def test_audit_command_trains_with_canaries(fedgan, tmp_path):
    """At the hospital's own batch and number of images; the shard's ledger gets no entry."""
    data = write_shards(tmp_path / "data", (32, 16))
    keys = ["training.batch_size=6", "federation.batch=shared", "privacy.noise_multiplier=1"]
    plan = tiny(data, *PRIVATE, *keys, hospitals=2, rounds=2, kimg=0.06)
    run = RunFolder.at(tmp_path / "run")
    federate(plan, run, client.app.app)
    ledger = ledger_in(data / "alpha").path.read_bytes()
    words = ("--hospital", "alpha", "--canaries", "20", "--images", "50")
    code, out, err = fedgan("audit", run.path, *words)
    assert code == 0, err
    audited = json.loads(run.audit.read_text())
    (found,) = audited["canaries"]
    assert (found["name"], found["steps"], found["delta"]) == ("alpha", 10, DELTA)
    assert found["sample_rate"] == 4 / 16  # of six images four are its own
    assert found["epsilon"] == pytest.approx(ledger_in(data / "alpha").epsilon(DELTA))
    assert any("proves no guarantee" in note for note in audited["notes"])
    assert audited["settings"]["canaries"] == 20
    assert "epsilon     alpha: images at least" in out
    assert ledger_in(data / "alpha").path.read_bytes() == ledger
    with pytest.raises(CheckpointError, match="participants is damaged"):
        local_trainings(plan, {"participants": [{"number": 0}], "label_names": []})
