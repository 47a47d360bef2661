"""Classifier training: selection by validation, class weights, mixes with synthetic images."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgan.config import EvaluationSettings
from fedgan.data.dataset import ImageDataset
from fedgan.errors import DataError
from fedgan.evaluation import classification
from fedgan.evaluation.classification import (
    CHECKS,
    PATIENCE,
    SELECTION_BY_VALIDATION,
    check_steps,
    class_weights,
    classification_loss,
    probabilities,
    split_for_validation,
    train_classifier,
    validation_loss,
)
from fedgan.evaluation.mixing import mixed_count, mixed_set, stratified_rows
from fedgan.evaluation.reference import RealReference
from fedgan.evaluation.sampling import to_float

SIDE, NAMES = 16, ("common", "rare")
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _data(count, seed, signal=20.0, rare=0.5, name="synthetic", names=NAMES):
    """Noise, slightly brighter in the class 'rare'."""
    rng = np.random.default_rng(seed)
    truth = np.arange(count) < rare * count
    grey = 110 + 40 * rng.normal(size=(count, 1, SIDE, SIDE)) + signal * truth[:, None, None, None]
    return ImageDataset(
        name,
        np.clip(grey, 0, 255).astype(np.uint8),
        np.eye(2, dtype=np.uint8)[truth.astype(int)],
        names,
    )


class _Forbidden:
    """A test split that raises on any access."""

    def __getattr__(self, name):
        raise AssertionError(f"training looked at .{name} of the test split")

    def __len__(self):
        raise AssertionError("training counted the test split")


# --- selection by the validation split ----------------------------------------------------------


def _scripted(monkeypatch, losses):
    """Replace the validation losses; collects the networks at each check."""
    snapshots, left = [], iter(losses)

    def look(classifier, validation, weights, device="cpu"):
        snapshots.append({key: value.clone() for key, value in classifier.state_dict().items()})
        return next(left)

    monkeypatch.setattr(classification, "validation_loss", look)
    return snapshots


def test_bf16_training_learns_and_keeps_float32_weights():
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    labels = np.eye(2, dtype=np.uint8)[np.arange(128) % 2]
    images = (
        rng.integers(0, 100, (128, 1, 16, 16), np.uint8)
        + (120 * labels[:, 1]).astype(np.uint8)[:, None, None, None]
    )
    data = ImageDataset("toy", images, labels, ("dark", "bright"))
    plain, short = (
        train_classifier(data, 24, 0, precision=precision) for precision in ("fp32", "bf16")
    )
    assert {
        tensor.dtype for tensor in short.state_dict().values() if tensor.is_floating_point()
    } == {torch.float32}
    assert any(
        not torch.equal(a, b) for a, b in zip(plain.parameters(), short.parameters(), strict=True)
    )
    assert (probabilities(short, data).argmax(1) == labels.argmax(1)).mean() > 0.9


def test_training_keeps_the_network_of_the_best_check(monkeypatch):
    data = _data(128, 0)
    snapshots = _scripted(monkeypatch, [5.0, 4.0, 1.0, 3.0, 2.0, float("nan"), 1.5])
    kept = train_classifier(data, 14, 0, validation=_data(20, 1), checks=7).state_dict()
    assert len(snapshots) == 7
    same = [all(torch.equal(kept[key], one[key]) for key in kept) for one in snapshots]
    assert same == [False, False, True, False, False, False, False]


def test_training_stops_early_without_improvement(monkeypatch):
    steps = []
    snapshots = _scripted(monkeypatch, [1.0, 0.5, *[2.0] * 20])
    train_classifier(
        _data(128, 0),
        32,
        0,
        progress=lambda step, _: steps.append(step),
        validation=_data(20, 1),
        checks=16,
    )
    assert len(snapshots) == 2 + PATIENCE
    assert steps[-1] == sorted(check_steps(32, 16))[1 + PATIENCE]


def test_training_keeps_the_last_network_without_a_finite_loss(monkeypatch):
    data = _data(128, 0)
    _scripted(monkeypatch, [float("nan")] * 3)
    kept, last = (
        train_classifier(data, 3, 0, validation=_data(20, 1), checks=3),
        train_classifier(data, 3, 0),
    )
    assert all(
        torch.equal(value, last.state_dict()[key]) for key, value in kept.state_dict().items()
    )


def test_validation_does_not_change_the_training_steps(monkeypatch):
    data, validation = _data(128, 0), _data(50, 1)
    snapshots = _scripted(monkeypatch, [1.0])
    train_classifier(data, 6, 0, validation=validation, checks=1)
    monkeypatch.undo()
    with_checks, real = [], classification.validation_loss

    def look(classifier, *args):
        with_checks.append(classifier.state_dict()["head.weight"].clone())
        return real(classifier, *args)

    monkeypatch.setattr(classification, "validation_loss", look)
    train_classifier(data, 6, 0, validation=validation, checks=3)
    plain = train_classifier(data, 6, 0)
    assert torch.equal(with_checks[-1], plain.state_dict()["head.weight"])
    assert torch.equal(snapshots[-1]["head.weight"], plain.state_dict()["head.weight"])
    assert not plain.training


def test_training_returns_the_lowest_validation_loss(monkeypatch):
    data, validation = _data(64, 0, signal=2.0), _data(60, 1, signal=2.0)
    losses, real = [], classification.validation_loss
    monkeypatch.setattr(
        classification, "validation_loss", lambda *args: losses.append(real(*args)) or losses[-1]
    )
    kept = train_classifier(data, 24, 0, validation=validation)
    assert 1 + PATIENCE <= len(losses) <= CHECKS
    assert real(kept, validation, class_weights(data.labels, True)) == pytest.approx(
        min(losses), rel=1e-6
    )


def test_validation_loss_uses_eval_mode_and_training_class_weights():
    data = _data(100, 0)
    classifier = train_classifier(data, 3, 0).train()
    weights = torch.tensor([1.0, 7.0])
    found = validation_loss(classifier, data, weights)
    assert classifier.training
    with torch.no_grad():
        logits = classifier.eval()(to_float(torch.from_numpy(data.images)))
    expected = classification_loss(
        logits, torch.from_numpy(data.labels.astype(np.float32)), weights, True
    )
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_checks_are_in_the_second_half_of_the_steps():
    assert sorted(check_steps(80, 8)) == [45, 50, 55, 60, 65, 70, 75, 80]
    assert check_steps(1, 8) <= {0, 1}
    assert 1 in check_steps(1, 8)
    assert str(CHECKS) in SELECTION_BY_VALIDATION
    assert str(PATIENCE) in SELECTION_BY_VALIDATION


def test_training_and_validation_never_read_the_test_split():
    real = EvaluationSettings(epochs=1, seeds=1)
    reference = RealReference(_data(80, 0), _data(20, 1), _Forbidden(), real)
    assert not reference.classifier(0).training
    train, validation = split_for_validation(_data(80, 2), 0.2, 0)
    train_classifier(train, 2, 0, validation=validation)
    with pytest.raises(AssertionError, match="test split"):  # the guard works
        train_classifier(train, 2, 0, validation=_Forbidden())  # type: ignore[arg-type]


def test_training_refuses_a_validation_split_that_does_not_fit():
    data = _data(40, 0)
    with pytest.raises(DataError, match="cannot validate"):
        train_classifier(data, 1, 0, validation=data.take(np.empty(0, int)))
    with pytest.raises(DataError, match="cannot validate"):
        train_classifier(data, 1, 0, validation=_data(40, 0, names=("other", "names")))


# --- a split of synthetic images ----------------------------------------------------------------


@settings(max_examples=40)
@given(SEEDS, st.integers(4, 200), st.sampled_from([0.1, 0.25, 0.5]))
def test_split_for_validation_is_stratified_and_disjoint(seed, count, share):
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, 3)) < 0.4).astype(np.uint8)
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 2), np.uint8)
    data = ImageDataset("synthetic", images, labels, ("a", "b", "c"), False)
    train, validation = split_for_validation(data, share, seed)
    rows = np.sort(
        np.r_[train.images[np.arange(len(train))], validation.images[np.arange(len(validation))]][
            :, 0, 0, 0
        ]
    )
    np.testing.assert_array_equal(rows, np.arange(count))
    vectors, counts = np.unique(labels, axis=0, return_counts=True)
    for vector, have in zip(vectors, counts, strict=True):
        kept = (validation.labels == vector).all(1).sum()
        eligible = counts[counts > 1].sum() or count
        expected = max(1, int(share * eligible)) / eligible * have
        assert abs(kept - expected) < 1 or have == 1
        assert kept < have or (counts == 1).all()  # never all images of a vector
    again = split_for_validation(data, share, seed)[1]
    np.testing.assert_array_equal(again.labels, validation.labels)


def test_split_for_validation_refuses_images_with_patients():
    data = dataclasses.replace(_data(20, 0), patients=np.repeat(np.arange(10), 2).astype(str))
    with pytest.raises(DataError, match="by image"):
        split_for_validation(data, 0.1, 0)
    blank = dataclasses.replace(data, patients=np.full(20, ""))
    assert [len(part) for part in split_for_validation(blank, 0.1, 0)] == [18, 2]
    for share in (0.0, 0.6):
        with pytest.raises(DataError, match="share"):
            split_for_validation(blank, share, 0)


# --- weights of classes -------------------------------------------------------------------------


def test_class_weights_raise_minority_recall(monkeypatch):
    train, test = _data(400, 0, signal=5.0, rare=0.05), _data(300, 1, signal=5.0)

    def recall():
        called = probabilities(train_classifier(train, 30, 0), test).argmax(1)
        return (called[test.labels[:, 1] == 1] == 1).mean()

    weighted = recall()
    monkeypatch.setattr(
        classification, "class_weights", lambda labels, exclusive: torch.ones(labels.shape[1])
    )
    ignored = recall()
    assert weighted > 0.5
    assert weighted > ignored + 0.25


# --- mixes --------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(SEEDS, st.integers(1, 150), st.floats(0.0, 1.0))
def test_stratified_rows_keep_proportions(seed, count, share):
    labels = (np.random.default_rng(seed).random((count, 2)) < 0.3).astype(np.uint8)
    expected = round(share * count)
    rows = stratified_rows(labels, expected, seed)
    assert len(set(rows.tolist())) == expected
    assert (np.diff(rows) > 0).all()
    for vector in np.unique(labels, axis=0):
        have = (labels == vector).all(1)
        assert abs(have[rows].sum() - have.sum() * expected / count) < 1 + 1e-9


def test_stratified_rows_select_rows_with_equal_probability():
    labels = np.eye(3, dtype=np.uint8)[np.repeat([0, 1, 2], [28, 11, 1])]
    hits = np.zeros(40)
    for seed in range(2000):
        hits[stratified_rows(labels, 8, seed)] += 1
    assert abs(hits / 2000 - 0.2).max() < 0.045  # five standard errors


@pytest.mark.parametrize(("share", "count"), [(0.5, 20), (1, 40), ("all", 100)])
def test_mixed_set_has_all_real_and_a_share_of_synthetic_images(share, count):
    real = dataclasses.replace(
        _data(40, 0, name="real"), patients=np.repeat(np.arange(20), 2).astype(str)
    )
    synthetic = _data(100, 1, rare=0.2)
    mixed = mixed_set(real, synthetic, share, seed=3)
    assert len(mixed) == 40 + count
    np.testing.assert_array_equal(mixed.images[np.arange(40)], real.images)
    assert mixed.labels[40:].sum(0).tolist() == [0.8 * count, 0.2 * count]
    known = {image.tobytes() for image in synthetic.images}
    assert {image.tobytes() for image in mixed.images[np.arange(40, 40 + count)]} <= known
    assert mixed.patients.tolist() == [*real.patients.tolist(), *[""] * count]
    assert set(mixed.institutions[:40]) == {"real"}
    assert set(mixed.institutions[40:]) == {"synthetic"}
    assert len(mixed.take(np.r_[0, 45])) == 2
    assert not train_classifier(mixed, 1, 0).training


def test_mixed_set_refuses_unusable_shares():
    real, synthetic = _data(40, 0, name="real"), _data(30, 1)
    assert mixed_count(40, 30, "all") == 30
    with pytest.raises(
        DataError, match=r"needs 40 synthetic images, there are 30.*evaluation\.images"
    ):
        mixed_set(real, synthetic, 1, 0)
    with pytest.raises(DataError, match="above 0"):
        mixed_count(40, 30, 0.0)
    with pytest.raises(DataError, match="differ"):
        mixed_set(real, _data(30, 1, names=("x", "y")), 0.5, 0)
