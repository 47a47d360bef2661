"""Sampling, classifier training, and the central evaluator with generators of known quality."""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

from fedgan.config import EvaluationSettings, ModelSettings, Settings
from fedgan.data.dataset import ImageDataset
from fedgan.errors import ConfigError, DataError, FedganError
from fedgan.evaluation import classification, evaluate, reference
from fedgan.evaluation.classification import (
    augment,
    class_weights,
    classification_loss,
    cycle,
    probabilities,
    train_classifier,
    training_steps,
)
from fedgan.evaluation.evaluate import evaluate_synthetic
from fedgan.evaluation.grids import grid_rows, png_bytes, real_grid, sample_grid
from fedgan.evaluation.reference import RealReference, pool_hospitals
from fedgan.evaluation.sampling import (
    generate_images,
    synthetic_dataset,
    synthetic_labels,
    to_float,
    to_uint8,
)
from fedgan.models.classifiers import build_classifier
from fedgan.models.stylegan2.generator import Generator
from fedgan.run_folder import RunFolder
from fedgan.runs.evaluator import Evaluator

SIDE, CLASSES = 16, 3
NAMES = ("alpha", "beta", "gamma")
QUICK = EvaluationSettings(images=150, seeds=2, epochs=6, bootstrap=50, suite="quick")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _render(labels, rng):
    """One bright band per label at its own height; grey level, position and noise vary."""
    images = 90 + 15 * rng.normal(size=(len(labels), 1, SIDE, SIDE))
    for row, vector in enumerate(labels):
        for k in np.flatnonzero(vector):
            top = 1 + 5 * k + rng.integers(2)
            images[row, :, top : top + 3] += 45 + 10 * rng.normal()
    return np.clip(images, 0, 255).astype(np.uint8)


def _data(count, seed, name="somewhere", exclusive=True, label_names=NAMES):
    rng = np.random.default_rng(seed)
    if exclusive:
        labels = np.eye(CLASSES, dtype=np.uint8)[
            np.r_[0:CLASSES, rng.choice(CLASSES, count - CLASSES, p=[0.5, 0.3, 0.2])]
        ]
    else:
        labels = (rng.random((count, CLASSES)) < 0.35).astype(np.uint8)
    patients = np.array([f"p{row // 2}" for row in range(count)])
    return ImageDataset(
        name, _render(labels, rng), labels, label_names, exclusive, patients, np.full(count, name)
    )


class _Generator(torch.nn.Module):
    """A fake generator of real images, of the given label if `is_conditional`; z selects one."""

    z_dim, label_dim = 4, CLASSES

    def __init__(self, dataset, is_conditional=True, diverges=False):
        super().__init__()
        self.is_conditional, self.diverges, self.labels = is_conditional, diverges, dataset.labels
        self.images = to_float(
            torch.from_numpy(np.asarray(dataset.images[np.arange(len(dataset))]))
        )
        self.calls = []

    def forward(self, z, c, psi=1.0, noise="random"):
        self.calls.append((len(z), psi, noise, self.training))
        choice = (z[:, 0].abs() * 1e4).long().numpy()
        rows = []
        for pick, vector in zip(choice, c.numpy(), strict=True):
            fitting = (
                np.flatnonzero((self.labels == vector).all(1))
                if self.is_conditional
                else np.arange(len(self.labels))
            )
            rows.append(fitting[pick % len(fitting)] if len(fitting) else 0)
        images = self.images[rows].clone()
        if self.diverges:
            images[-1, 0, 0, 0] = float("nan")
        return images


@dataclass
class _Hospital:
    name: str
    train: ImageDataset
    val: ImageDataset
    test: ImageDataset


def _hospitals(**kind):
    return [
        _Hospital(
            name, *(_data(size // part, 10 * number + part, name, **kind) for part in (1, 2, 3))
        )
        for number, (name, size) in enumerate((("north", 240), ("south", 120)))
    ]


# --- sampling -------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 4), st.integers(1, 200))
def test_synthetic_labels_are_real_vectors_in_real_proportions(seed, real, labels, count):
    vectors = (np.random.default_rng(seed).random((real, labels)) < 0.4).astype(np.uint8)
    sampled = synthetic_labels(vectors, count, seed)
    assert sampled.shape == (count, labels)
    distinct, occurs = np.unique(vectors, axis=0, return_counts=True)
    assert {tuple(row) for row in sampled} <= {tuple(row) for row in distinct}
    if len(distinct) <= count:
        for vector, share in zip(distinct, occurs / real, strict=True):
            occurrences = (sampled == vector).all(1).sum()
            assert occurrences >= 1
            assert occurrences <= max(1, np.ceil(share * count))
            assert occurrences >= np.floor(share * count) - len(distinct)


def test_synthetic_labels_are_proportional_and_keep_a_rare_class():
    labels = np.eye(3, dtype=np.uint8)[np.repeat([0, 1, 2], [60, 30, 10])]
    assert synthetic_labels(labels, 50, 0).sum(0).tolist() == [30, 15, 5]
    rare = np.eye(2, dtype=np.uint8)[np.repeat([0, 1], [9999, 1])]
    assert synthetic_labels(rare, 100, 0).sum(0).tolist() == [99, 1]
    assert synthetic_labels(np.zeros((5, 0), np.uint8), 7, 0).shape == (7, 0)


def test_grey_levels_survive_the_conversion_to_floats():
    levels = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(to_uint8(to_float(levels)), levels.numpy())
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_generated_images_depend_on_the_seed_not_on_the_batch():
    data = _data(60, 0)
    generator = _Generator(data).train()
    first = generate_images(generator, data.labels, seed=1, psi=0.7, batch=64)
    np.testing.assert_array_equal(first, generate_images(generator, data.labels, seed=1, batch=7))
    assert (first != generate_images(generator, data.labels, seed=2)).any()
    assert generator.calls[0] == (60, 0.7, "const", False)  # evaluation mode, constant noise
    assert generator.training  # the mode is restored


@pytest.mark.parametrize("names", [NAMES, ()])
def test_stylegan2_generator_can_be_sampled(names):
    generator = Generator(ModelSettings(z_dim=8, w_dim=8, channel_max=8), SIDE, 3, len(names))
    labels = np.eye(3, dtype=np.uint8)[[0, 1, 2, 0, 1]][:, : len(names)]
    images = generate_images(generator, labels, seed=0, psi=0.5)
    assert images.shape == (5, 3, SIDE, SIDE)
    assert len({image.tobytes() for image in images}) == 5
    again = generate_images(generator, labels, seed=0, psi=0.5, batch=2)
    # sums of another batch size round differently
    assert np.abs(again.astype(int) - images).max() <= 1
    assert sample_grid(generator, names, True).size[0] > 8 * SIDE


def test_generated_images_that_are_not_finite_are_an_error():
    data = _data(20, 0)
    generator = _Generator(data, diverges=True).train()
    with pytest.raises(FedganError, match=r"not finite.*diverged"):
        generate_images(generator, data.labels, seed=0)
    assert generator.training


def test_labels_and_images_of_wrong_shapes_are_refused():
    data = _data(20, 0)
    with pytest.raises(FedganError, match="do not fit a generator of 3 labels"):
        generate_images(_Generator(data), np.zeros((4, 2)), seed=0)
    larger = dataclasses.replace(data, images=np.zeros((20, 1, 32, 32), np.uint8))
    with pytest.raises(FedganError, match="channels, height, width"):
        synthetic_dataset(_Generator(data), larger, 8, seed=0)


# --- grids ----------------------------------------------------------------------------------------


def test_grid_rows_are_classes_single_findings_or_one_block():
    assert [name for name, _ in grid_rows(NAMES, True)] == list(NAMES)
    findings = grid_rows(NAMES, False)
    assert [name for name, _ in findings] == ["no finding", *NAMES]
    assert [int(vector.sum()) for _, vector in findings] == [0, 1, 1, 1]
    assert [name for name, _ in grid_rows(("No_Finding", "mass"), False)] == ["No_Finding", "mass"]
    assert {name for name, _ in grid_rows((), True)} == {""}


def test_grid_columns_share_one_latent_over_rows_and_rounds():
    class _LatentImage(torch.nn.Module):
        z_dim, label_dim = 2, CLASSES

        def forward(self, z, c, psi=1.0, noise="random"):
            return torch.tanh(z[:, :1, None, None]).expand(-1, 1, SIDE, SIDE)

    image = np.asarray(sample_grid(_LatentImage(), NAMES, True, columns=4, seed=3))
    cell = 4 * SIDE
    pixels = np.array(
        [
            [image[r * (cell + 2) + 5, -1 - (3 - c) * (cell + 2) - 5, 0] for c in range(4)]
            for r in range(CLASSES)
        ]
    )
    np.testing.assert_array_equal(pixels, np.repeat(pixels[:1], CLASSES, axis=0))
    assert len(set(pixels[0])) == 4
    np.testing.assert_array_equal(
        image, np.asarray(sample_grid(_LatentImage(), NAMES, True, columns=4, seed=3))
    )


def test_real_grid_has_the_sample_grid_layout_with_blank_cells():
    data = _data(30, 1)
    few = data.take(np.r_[0, 1, 2])  # one image per class
    sampled, real = sample_grid(_Generator(data), NAMES, True), real_grid(few)
    assert real.size == sampled.size
    assert np.asarray(real)[5, -5].tolist() == [235, 235, 235]


def test_real_grid_shows_images_of_a_single_finding_first():
    labels = np.array([[1, 1], [1, 0], [1, 1]], np.uint8)
    images = np.stack([np.full((1, SIDE, SIDE), value, np.uint8) for value in (10, 200, 20)])
    data = ImageDataset("x", images, labels, ("mass", "nodule"), False)
    image = np.asarray(real_grid(data, columns=3))
    # second row: 'mass' alone comes before the mixed cases
    assert image[64 + 2 + 10, 116 + 10, 0] == 200


def test_grid_is_a_png_for_every_kind_of_data():
    unconditional = ImageDataset(
        "u", np.zeros((9, 3, 64, 64), np.uint8), np.zeros((9, 0), np.uint8), ()
    )
    for data in (_data(12, 0), _data(12, 0, exclusive=False), unconditional):
        image = Image.open(io.BytesIO(png_bytes(real_grid(data))))
        assert image.format == "PNG"
        assert image.size[0] > 8 * 64


# --- classifier training --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "features"), [("small-cnn", 128), ("resnet18", 512)])
@pytest.mark.parametrize(("channels", "side"), [(1, 16), (3, 32), (1, 128)])
def test_classifiers_accept_every_image_size(name, features, channels, side):
    classifier = build_classifier(name, channels, side, 5).eval()
    images = torch.zeros(2, channels, side, side)
    assert classifier.features(images).shape == (2, features)
    assert classifier(images).shape == (2, 5)


def test_unknown_classifier_is_a_config_error():
    with pytest.raises(ConfigError, match="small-cnn, resnet18"):
        build_classifier("vit", 1, 32, 2)


def test_class_weights_balance_the_classes():
    # the fourth class never occurs
    exclusive = np.eye(4, dtype=np.uint8)[np.repeat([0, 1, 2], [60, 30, 10])]
    weights = class_weights(exclusive, True).numpy()
    np.testing.assert_allclose(weights, [100 / 180, 100 / 90, 100 / 30, 1.0], rtol=1e-6)
    # equal total weight per class
    np.testing.assert_allclose((weights * exclusive.sum(0))[:3], 100 / 3, rtol=1e-6)
    findings = np.array([[1, 0], [0, 0], [0, 0], [1, 0], [1, 1]], np.uint8)
    np.testing.assert_allclose(class_weights(findings, False), [2 / 3, 4.0])
    assert class_weights(np.eye(2, dtype=np.uint8)[[0] * 9999 + [1]], True).max() == 100.0


def test_classification_loss_equals_the_weighted_formula():
    rng = np.random.default_rng(0)
    logits, weights = (
        torch.from_numpy(rng.normal(size=(6, 3))),
        torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64),
    )
    truth = torch.tensor([0, 1, 2, 0, 0, 1])
    labels = functional.one_hot(truth, 3).double()
    each, row_weights = -logits.log_softmax(1)[range(6), truth], weights[truth]
    assert classification_loss(logits, labels, weights, True) == pytest.approx(
        float((each * row_weights).sum() / row_weights.sum())
    )
    p = logits.sigmoid()
    each = -(weights * labels * p.log() + (1 - labels) * (1 - p).log())
    assert classification_loss(logits, labels, weights, False) == pytest.approx(float(each.mean()))


def test_classifier_training_uses_class_weights_of_its_labels(monkeypatch):
    rng = np.random.default_rng(0)
    labels = np.eye(2, dtype=np.uint8)[np.repeat([0, 1], [190, 10])]
    images = np.clip(
        120 + 40 * rng.normal(size=(200, 1, SIDE, SIDE)) + 8 * labels[:, 1, None, None, None],
        0,
        255,
    ).astype(np.uint8)
    data = ImageDataset("x", images, labels, ("common", "rare"))
    weighted = probabilities(train_classifier(data, 12, 0), data)[:, 1].mean()
    monkeypatch.setattr(
        classification, "class_weights", lambda labels, exclusive: torch.ones(labels.shape[1])
    )
    assert weighted > probabilities(train_classifier(data, 12, 0), data)[:, 1].mean() + 0.1


def test_augmentation_shifts_images_and_repeats_edges():
    rows, columns = np.mgrid[0:32, 0:32]
    images = torch.from_numpy((8 * rows % 256 + columns).astype(np.uint8))[None, None].repeat(
        40, 2, 1, 1
    )
    out = augment(images, np.random.default_rng(0))
    seen = set()
    for image in out[:, 1].numpy():
        found = [
            (flip, dy, dx)
            for flip in (False, True)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            for shifted in [
                images[0, 0].numpy()[np.clip(np.arange(32) + dy, 0, 31)][
                    :, np.clip(np.arange(32) + dx, 0, 31)
                ]
            ]
            if (image == (shifted[:, ::-1] if flip else shifted)).all()
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 15
    assert {flip for flip, _, _ in seen} == {False, True}


def test_classifier_training_depends_only_on_its_seed():
    data = _data(70, 0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (train_classifier(data, 4, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_training_steps_follow_the_images_and_the_rate_ends_near_zero():
    assert training_steps(640, 12) == 120
    assert training_steps(1, 1) == 1
    assert max(cycle(step / 100) for step in range(100)) == pytest.approx(1.0)
    assert cycle(0.99) < 0.01


def test_training_on_an_empty_dataset_is_a_data_error():
    with pytest.raises(DataError, match="no image to train"):
        train_classifier(_data(5, 0).take(np.empty(0, int)), 2, 0)


# --- evaluation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    torch.set_num_threads(1)
    return RealReference(_data(240, 0), _data(80, 1), _data(160, 2), QUICK, seed=0)


def _released(data):
    """Real images without patients and institutions, like generated ones."""
    return dataclasses.replace(data, patients=np.empty(0, str), institutions=np.empty(0, str))


def test_utility_is_high_for_copies_and_chance_for_random_labels(real):
    copies = synthetic_dataset(_Generator(real.train), real.train, 200, seed=0)
    good = evaluate_synthetic(real, copies).numbers
    unconditional = synthetic_dataset(
        _Generator(real.train, is_conditional=False), real.train, 200, seed=0
    )
    bad = evaluate_synthetic(real, unconditional).numbers
    assert good["utility"]["real"]["macro_auc"] > 0.9
    assert good["utility"]["synthetic"]["macro_auc"] > good["utility"]["real"]["macro_auc"] - 0.05
    assert bad["utility"]["real"] == good["utility"]["real"]
    assert 0.3 < bad["utility"]["synthetic"]["macro_auc"] < 0.7
    assert good["notes"] == bad["notes"] or all(
        "distances rest on" in note for note in good["notes"]
    )
    assert good["fidelity"]["extractor"] == "reference classifier (small-cnn, penultimate, 128)"
    assert good["fidelity"]["images"] == 120  # half of 80 + 160 held-out images
    noise = np.random.default_rng(0).integers(0, 256, (200, 1, SIDE, SIDE), dtype=np.uint8)
    worse = evaluate._fidelity(
        real, ImageDataset("noise", noise, copies.labels, NAMES), None, copies.labels, []
    )
    assert worse["frechet"] > 2 * good["fidelity"]["frechet"]
    assert worse["kernel"] > good["fidelity"]["kernel"]
    assert worse["frechet_reference"] == good["fidelity"]["frechet_reference"]


def test_classifiers_do_not_depend_on_test_images(real):
    rng = np.random.default_rng(0)
    shuffled = dataclasses.replace(
        real.test, labels=rng.permutation(real.test.labels), images=255 - real.test.images
    )
    other = RealReference(real.train, real.val, shuffled, QUICK, seed=0)
    assert other.metrics["macro_auc"] != real.metrics["macro_auc"]
    for number in range(QUICK.seeds):
        first, second = real.classifier(number).state_dict(), other.classifier(number).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_class_without_test_images_is_null_with_a_note(real):
    keep = real.test.take(np.flatnonzero(real.test.labels[:, 2] == 0))
    short = RealReference(real.train, real.val, keep, dataclasses.replace(QUICK, epochs=1, seeds=1))
    result = evaluate_synthetic(short, _released(real.train)).numbers
    for arm in ("real", "synthetic"):
        assert result["utility"][arm]["per_class"]["gamma"]["auc"] is None
        assert result["utility"][arm]["macro_auc"] is not None
    assert any("'gamma' has no positive image" in note for note in result["notes"])


def test_images_without_labels_have_no_utility_and_a_note(real):
    def bare(data):
        return dataclasses.replace(data, labels=np.zeros((len(data), 0), np.uint8), label_names=())

    nothing = RealReference(bare(real.train), bare(real.val), bare(real.test), QUICK)
    evaluated = evaluate_synthetic(nothing, bare(real.train))
    result = evaluated.numbers
    assert evaluated.scores is None
    assert result["utility"] is None
    assert result["fidelity"] is None
    assert len(result["notes"]) == 2


def test_reference_without_real_images_is_a_data_error(real):
    with pytest.raises(DataError, match="no real training image"):
        RealReference(real.train.take(np.empty(0, int)), real.val, real.test, QUICK)


def test_pooled_hospitals_keep_their_institutions():
    first, second = _data(6, 0, "north"), _data(4, 1, "unknown")
    second = dataclasses.replace(second, institutions=np.empty(0, str), patients=np.empty(0, str))
    pooled = pool_hospitals([("north", first), ("south", second)], "test")
    assert pooled.institutions.tolist() == ["north"] * 6 + ["south"] * 4
    assert pooled.patients.tolist() == [*first.patients, "", "", "", ""]


# --- the central evaluator ------------------------------------------------------------------------


FACTS = {
    "arm": "federated",
    "name": "try",
    "images_seen": 1000,
    "wall_seconds": 2.5,
    "bytes_exchanged": 10,
}


def _evaluator(tmp_path, hospitals, **changes):
    settings = dataclasses.replace(
        Settings(seed=4), evaluation=dataclasses.replace(QUICK, **changes)
    )
    return Evaluator(settings, RunFolder.at(tmp_path / "run"), hospitals)


def test_evaluator_writes_samples_round_and_final_metrics(tmp_path, monkeypatch):
    training_sets = []
    monkeypatch.setattr(
        reference,
        "train_classifier",
        lambda data, *rest, **options: (
            training_sets.append(data.name) or train_classifier(data, *rest, **options)
        ),
    )
    hospitals = _hospitals()
    evaluator = _evaluator(tmp_path, hospitals, epochs=3)
    generator = _Generator(hospitals[0].train)
    evaluator.write_real_samples()
    first, second = (
        evaluator.evaluate_round(generator, 5, 500),
        evaluator.evaluate_round(generator, 10, 1000),
    )
    assert first["samples"] == "round-00005.png"
    assert first["fidelity"] == second["fidelity"]  # the same latents in every round
    assert first["fidelity"]["split"] == "val"
    assert first["fidelity"]["images"] == min(len(evaluator.reference.val), QUICK.images)
    assert training_sets == ["train"]
    result = evaluator.evaluate_final(generator, FACTS)
    # classifiers on real images are trained once
    assert sorted(training_sets) == ["synthetic"] * 2 + ["train"] * 2
    assert result == json.loads(evaluator.run.evaluation.read_text())
    assert FACTS.items() <= result.items()
    assert result["label_names"] == list(NAMES)
    assert set(result["utility"]["synthetic"]["per_institution"]) == {"north", "south"}
    assert result["utility"]["test_images"] == sum(len(hospital.test) for hospital in hospitals)
    assert result["utility"]["resampled"] == "patients"
    assert {
        "frechet",
        "frechet_reference",
        "kernel",
        "kernel_reference",
        "images",
        "reference_images",
    } <= set(result["fidelity"])
    samples = sorted(path.name for path in evaluator.run.samples.iterdir())
    assert samples == ["final.png", "real.png", "round-00005.png", "round-00010.png"]
    assert (evaluator.run.samples / "round-00005.png").read_bytes() == (
        evaluator.run.samples / "final.png"
    ).read_bytes()


def test_label_map_merges_labels_for_the_classifiers_only(tmp_path):
    hospitals = _hospitals()
    evaluator = _evaluator(tmp_path, hospitals, epochs=3, seeds=1, label_map="alpha=alpha,*=other")
    generator = _Generator(hospitals[0].train)
    result = evaluator.evaluate_final(generator, FACTS)
    assert result["label_names"] == ["alpha", "other"]
    assert set(result["utility"]["synthetic"]["per_class"]) == {"alpha", "other"}
    positives = sum(int((hospital.test.labels[:, 0] == 0).sum()) for hospital in hospitals)
    assert result["utility"]["real"]["per_class"]["other"]["positives"] == positives
    # the generator still receives labels of three columns
    assert evaluator.train.label_names == NAMES


def test_multi_label_findings_are_evaluated(tmp_path):
    hospitals = _hospitals(exclusive=False)
    evaluator = _evaluator(tmp_path, hospitals, epochs=2, seeds=1)
    evaluator.write_real_samples()
    result = evaluator.evaluate_final(_Generator(hospitals[0].train), FACTS)
    assert list(result["utility"]["real"]["per_class"]) == [*NAMES, "no finding"]


@pytest.mark.parametrize("exclusive", [True, False])
def test_full_suite_has_every_metric_and_quick_the_cheap_ones(exclusive, tmp_path):
    hospitals = _hospitals(exclusive=exclusive)
    generator = Generator(
        ModelSettings(z_dim=8, w_dim=8, channel_base=64, channel_max=8), SIDE, 1, CLASSES
    )
    quick, full = (
        _evaluator(
            tmp_path / suite, hospitals, epochs=1, seeds=1, images=200, suite=suite
        ).evaluate_final(generator, FACTS)
        for suite in ("quick", "full")
    )
    assert (quick["suite"], full["suite"]) == ("quick", "full")
    groups = [*NAMES] if exclusive else [*NAMES, "no finding"]
    utility, fidelity = full["utility"], full["fidelity"]
    assert utility["train_images"] == 360
    assert [(row["share"], row["synthetic_images"]) for row in utility["mixed"]] == [
        (0.5, 180),
        ("all", 200),
    ]
    assert any(
        note.startswith("Real + 1 × synthetic was not measured: ") for note in full["notes"]
    )  # 360 are required
    assert "per_institution" not in utility["majority"]
    assert utility["majority"]["macro_auc"] == 0.5
    assert 0 <= utility["real_on_synthetic"]["macro_auc"] <= 1
    assert list(fidelity["per_class"]) == groups
    assert set(fidelity["per_hospital"]) == {"north", "south"}
    assert list(fidelity["ms_ssim"])[:CLASSES] == list(NAMES)
    assert all(set(pair) == {"synthetic", "real"} for pair in fidelity["ms_ssim"].values())
    assert fidelity["path_length"] > 0
    assert set(full["label_fidelity"]) == {"synthetic", "real"}
    for name in ("frechet", "kernel", "precision", "recall", "density", "coverage"):
        assert {name, f"{name}_ci", f"{name}_reference"} <= set(fidelity)
    assert quick["label_fidelity"] is None
    assert not {"mixed", "real_on_synthetic"} & set(quick["utility"])
    assert not {"per_class", "per_hospital", "ms_ssim", "path_length"} & set(quick["fidelity"])
    assert {key: utility[key] for key in quick["utility"]} == quick["utility"]
    assert {key: fidelity[key] for key in quick["fidelity"]} == quick["fidelity"]


def test_hospital_label_mix_uses_no_image_twice_and_notes_deviations(
    real,
):
    made = _released(real.train)
    # six images of the first class
    keep = (made.labels[:, 0] == 0) | (np.cumsum(made.labels[:, 0]) <= 6)
    scarce = made.take(np.flatnonzero(keep))
    features = np.random.default_rng(0).normal(size=(len(made), real.held_out_features.shape[1]))
    sufficient_notes, scarce_notes = [], []
    evaluate._by_hospital(real, made, features, sufficient_notes)
    found = evaluate._by_hospital(real, scarce, features[: len(scarce)], scarce_notes)
    assert not any("in its mix of labels" in note for note in sufficient_notes)
    assert any("there are no more in its mix of labels" in note for note in scarce_notes)
    assert any("would need other labels" in note for note in scarce_notes)
    assert all(numbers["images"] <= 100 for numbers in found.values())


@pytest.mark.parametrize(
    ("names", "more_classes"), [(NAMES, ["no finding"]), (("alpha", "Normal", "gamma"), [])]
)
def test_images_without_findings_form_a_class_if_no_label_exists(real, names, more_classes):
    def findings(data):
        labels = data.labels * (np.arange(len(data)) % 3 > 0)[:, None]
        return dataclasses.replace(
            data, labels=labels.astype(np.uint8), label_names=names, exclusive=False
        )

    other = RealReference(findings(real.train), findings(real.val), findings(real.test), QUICK)
    made, features = findings(_released(real.train)), np.random.default_rng(1).normal(size=(240, 4))
    vars(other)["held_out_features"] = np.random.default_rng(2).normal(size=(240, 4))
    assert list(evaluate._by_class(other, made, features, [])) == [*names, *more_classes]
    assert list(evaluate._ms_ssim(other, made, [])) == [*names, *more_classes]


def test_diverged_generator_leaves_the_evaluation_unchanged(tmp_path):
    hospitals = _hospitals()
    evaluator = _evaluator(tmp_path, hospitals)
    evaluator.run.path.mkdir(parents=True)
    evaluator.run.evaluation.write_text("before")
    for run_evaluation in (
        lambda generator: evaluator.evaluate_round(generator, 1, 16),
        lambda generator: evaluator.evaluate_final(generator, FACTS),
    ):
        with pytest.raises(FedganError, match="not finite"):
            run_evaluation(_Generator(hospitals[0].train, diverges=True))
    assert evaluator.run.evaluation.read_text() == "before"
    assert not evaluator.run.samples.exists()


def test_missing_extractor_fails_before_the_training(tmp_path):
    evaluator = _evaluator(tmp_path, _hospitals(), features=str(tmp_path / "none.npz"))
    with pytest.raises(ConfigError, match=r"evaluation\.features"):
        evaluator.write_real_samples()


def test_evaluator_without_a_hospital_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no hospital"):
        _evaluator(tmp_path, [])


def test_small_validation_split_is_replaced_by_training_images(tmp_path):
    hospitals = _hospitals()
    hospitals = [dataclasses.replace(one, val=one.val.take(np.arange(4))) for one in hospitals]
    evaluator = _evaluator(tmp_path, hospitals, epochs=1)
    entry = evaluator.evaluate_round(_Generator(hospitals[0].train), 1, 16)
    assert entry["fidelity"]["split"] == "train"
    assert entry["fidelity"]["images"] == QUICK.images
