"""Evaluation of the arms: one evaluator, nothing evaluated twice, no choice by the test split."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedgan import files
from fedgan.comparison_folder import ComparisonFolder
from fedgan.config import Settings, from_dict, to_dict
from fedgan.data.dataset import ImageDataset
from fedgan.data.shard import write_shard
from fedgan.errors import CheckpointError, SplitError
from fedgan.evaluation import reference
from fedgan.evaluation.evaluate import evaluate_synthetic
from fedgan.evaluation.reference import RealReference
from fedgan.run_folder import RunFolder
from fedgan.runs.preparation import evaluation_hospitals
from simulations.comparison import evaluate
from simulations.comparison.arm import Arm
from simulations.comparison.compare import prepare
from simulations.comparison.evaluate import (
    apportion_by_size,
    evaluate_arm,
    evaluation_key,
    is_arm_evaluated,
    open_evaluation_context,
    read_scores,
    write_real_grid,
)
from simulations.comparison.plan import plan_of
from simulations.comparison.standalone import train_standalone

LABELS = ("dark", "bright")
SIDE, IMAGES, ROUNDS = 16, 24, 2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_data(root: Path, other_test: bool = False) -> Path:
    """Two hospitals; beta has dark images only. `other_test`: alpha has other test images."""
    for number, (name, size) in enumerate((("alpha", 96), ("beta", 48))):
        rng = np.random.default_rng(number)
        kinds = np.arange(size) % 2 if name == "alpha" else np.zeros(size, int)
        splits = np.array(["train", "train", "test", "test", "train", "train", "val", "val"])[
            np.arange(size) % 8
        ]
        images = rng.integers(0, 128, (size, 1, SIDE, SIDE)) + 100 * kinds[:, None, None, None]
        if other_test and name == "alpha":
            test = splits == "test"
            # a choice by these would differ
            images[test], kinds = images[test] + 1, np.where(test, 1 - kinds, kinds)
        write_shard(
            root / name,
            images.astype(np.uint8),
            np.eye(2, dtype=np.uint8)[kinds],
            patients=[f"{name}-{row}" for row in range(size)],
            splits=splits,
            label_names=LABELS,
            name=name,
        )
    return root


def scenario(data: Path, *overrides: str) -> Settings:
    tree: dict[str, Any] = {
        "name": "tiny",
        "data": {"root": str(data), "resolution": SIDE},
        "model": {
            "z_dim": 4,
            "w_dim": 8,
            "channel_base": 64,
            "channel_max": 8,
            "mapping_layers": 1,
        },
        "training": {"kimg": 0.032, "batch_size": 4, "device": "cpu"},
        "federation": {"hospitals": 2, "rounds": ROUNDS},
        "evaluation": {
            "every": 1,
            "images": IMAGES,
            "seeds": 2,
            "epochs": 2,
            "bootstrap": 10,
            "suite": "quick",
        },
        "comparison": {"arms": ["centralized", "local"], "seeds": 1},
    }
    return from_dict(tree, overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> ComparisonFolder:
    """A comparison whose arms are trained and not evaluated."""
    root = tmp_path_factory.mktemp("trained")
    folder = ComparisonFolder.at(root / "study")
    settings = scenario(write_data(root / "data"))
    prepare(settings, folder, lambda event: None)
    for arm in plan_of(settings, folder):
        for job in arm.jobs:
            train_standalone(job, lambda event: None)
    return folder


@pytest.fixture(scope="module")
def evaluated(
    trained: ComparisonFolder, tmp_path_factory: pytest.TempPathFactory
) -> ComparisonFolder:
    """The same comparison with both arms evaluated."""
    folder = copy(trained, tmp_path_factory.mktemp("evaluated"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    evaluate_all(folder)
    torch.set_num_threads(before)
    return folder


def copy(folder: ComparisonFolder, root: Path, *overrides: str) -> ComparisonFolder:
    """A copy of the comparison with changed settings."""
    found = ComparisonFolder.at(root / "study")
    shutil.copytree(folder.path, found.path)
    found.write_settings(from_dict(to_dict(found.settings()), overrides))
    return found


def arms_of(folder: ComparisonFolder) -> dict[str, Arm]:
    return {arm.name: arm for arm in plan_of(folder.settings(), folder)}


def evaluate_all(folder: ComparisonFolder) -> list[str]:
    """Evaluate every arm and return the texts of its steps."""
    steps: list[str] = []
    context = open_evaluation_context(folder, steps.append)
    for arm in arms_of(folder).values():
        evaluate_arm(
            context, arm, lambda share, text, name=arm.name: steps.append(f"{name}: {text}")
        )  # type: ignore[misc]
    return steps


def synthetic(run: RunFolder) -> tuple[np.ndarray, np.ndarray]:
    with np.load(run.path / "synthetic.npz", allow_pickle=False) as arrays:
        return arrays["images"], arrays["labels"]


def written(folder: ComparisonFolder) -> dict[str, int]:
    return {
        str(path.relative_to(folder.path)): path.stat().st_mtime_ns
        for path in folder.path.rglob("*")
        if path.is_file()
    }


# --- repeated calls ------------------------------------------------------------------------------


def test_evaluated_arm_is_not_evaluated_again(evaluated: ComparisonFolder) -> None:
    assert all(
        is_arm_evaluated(evaluated.settings(), arm, evaluated)
        for arm in arms_of(evaluated).values()
    )
    before = written(evaluated)
    assert evaluate_all(evaluated) == []
    assert written(evaluated) == before


@pytest.mark.parametrize(
    "change", ["evaluation.epochs=3", "evaluation.seeds=3", "evaluation.bootstrap=20"]
)
def test_changed_evaluation_settings_reuse_the_synthetic_images(
    change: str, evaluated: ComparisonFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(evaluated, tmp_path, change, "comparison.arms=centralized")
    arm = arms_of(folder)["centralized"]
    assert not is_arm_evaluated(folder.settings(), arm, folder)
    generated: list[int] = []
    generate = evaluate.generate_images
    monkeypatch.setattr(
        evaluate,
        "generate_images",
        lambda generator, labels, *rest, **how: (
            generated.append(1) or generate(generator, labels, *rest, **how)
        ),
    )
    images = (arm.folder / "synthetic.npz").stat().st_mtime_ns
    steps = evaluate_all(folder)
    assert "centralized: generating" in steps
    assert len(generated) == ROUNDS  # a point of the curve per kept round, no synthetic set
    assert (arm.folder / "synthetic.npz").stat().st_mtime_ns == images
    assert is_arm_evaluated(folder.settings(), arm, folder)
    key, _, value = change.removeprefix("evaluation.").partition("=")
    found = arm.run.read_json(arm.run.evaluation)["utility"]
    assert (found["steps"], found["seeds"], found["bootstrap"])["esb".index(key[0])] == (
        4 if key == "epochs" else int(value)
    )


def test_evaluation_key_covers_all_inputs(evaluated: ComparisonFolder, tmp_path: Path) -> None:
    settings, arms = evaluated.settings(), arms_of(evaluated)
    weights, guests = tmp_path / "weights.npz", write_data(tmp_path / "guests")
    weights.write_bytes(b"one")

    def key(*changes: str, name: str = "centralized", folder: ComparisonFolder = evaluated) -> str:
        return evaluation_key(from_dict(to_dict(settings), changes), arms[name], folder)

    keys = {key(name=name) for name in arms}
    for change in ("evaluation.psi=0.5", "evaluation.suite=full", "data.root=elsewhere", "seed=1"):
        keys.add(key(change))
    # the key depends on the content of the file, not on its name
    for content in (b"one", b"other"):
        weights.write_bytes(content)
        keys.add(key(f"evaluation.features={weights}"))
    keys.add(key(f"evaluation.root={guests}"))
    shutil.rmtree(guests)
    write_data(guests, other_test=True)  # other images at the same path
    keys.add(key(f"evaluation.root={guests}"))
    other = ComparisonFolder(tmp_path / "other")
    files.write_json(
        other.hospitals,
        [row | {"content_hash": "0" * 64} for row in evaluated.read_json(evaluated.hospitals)],
    )
    keys.add(key(folder=other))
    assert len(keys) == 11
    for change in ("comparison.margin=0.1", "name=x", "evaluation.show_real=all"):
        assert key(change, name="local") == key(name="local")


def test_modified_or_removed_evaluation_files_are_evaluated_again(
    evaluated: ComparisonFolder, tmp_path: Path
) -> None:
    folder = copy(evaluated, tmp_path)
    settings, arm = folder.settings(), arms_of(folder)["local"]
    for name in (
        "members/beta/evaluation.json",
        "members/alpha/predictions.npz",
        "predictions.npz",
        "curve.json",
        "evaluation.json",
    ):
        path = arm.folder / name
        before = path.read_bytes()
        for damage in (lambda path=path: path.write_bytes(b"{}"), path.unlink):
            damage()
            assert not is_arm_evaluated(settings, arm, folder), name
            assert is_arm_evaluated(settings, arms_of(folder)["centralized"], folder)
            if name != "evaluation.json":
                path.write_bytes(before)
                assert is_arm_evaluated(settings, arm, folder)
    evaluate_arm(open_evaluation_context(folder), arm, lambda share, text: None)
    assert path.read_bytes() == before
    assert is_arm_evaluated(settings, arm, folder)


def test_another_checkpoint_is_evaluated_again(evaluated: ComparisonFolder, tmp_path: Path) -> None:
    folder = copy(evaluated, tmp_path)
    arms = arms_of(folder)
    member = arms["local"].jobs[1].run
    for path in (member.checkpoint(ROUNDS), member.checkpoint(ROUNDS).with_suffix(".json")):
        path.unlink()
    assert is_arm_evaluated(folder.settings(), arms["centralized"], folder)
    assert not is_arm_evaluated(folder.settings(), arms["local"], folder)
    before, _ = synthetic(member)
    evaluate_arm(open_evaluation_context(folder), arms["local"], lambda share, text: None)
    after, _ = synthetic(member)
    assert (before != after).any()


@pytest.mark.parametrize("damage", ["torn", "empty", "gone"])
def test_damaged_synthetic_images_are_generated_again(
    damage: str, evaluated: ComparisonFolder, tmp_path: Path
) -> None:
    folder = copy(evaluated, tmp_path, "evaluation.bootstrap=11", "comparison.arms=centralized")
    run = arms_of(folder)["centralized"].run
    before, _ = synthetic(run)
    path = run.path / "synthetic.npz"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-200] if damage == "torn" else b"")
    evaluate_all(folder)
    np.testing.assert_array_equal(synthetic(run)[0], before)


def test_damaged_checkpoint_fails_its_evaluation_by_name(
    evaluated: ComparisonFolder, tmp_path: Path
) -> None:
    folder = copy(evaluated, tmp_path)
    arm = arms_of(folder)["centralized"]
    path = arm.run.checkpoint(ROUNDS)
    path.with_suffix(".json").write_text('{"sha256": ')
    assert not is_arm_evaluated(folder.settings(), arm, folder)
    with pytest.raises(CheckpointError, match=r"round-00002\.json is damaged"):
        evaluate_arm(open_evaluation_context(folder), arm, lambda share, text: None)
    shutil.copy(trained_json(evaluated), path.with_suffix(".json"))
    path.write_bytes(path.read_bytes()[:-1])
    (arm.folder / "evaluation_key.json").unlink()
    with pytest.raises(CheckpointError, match=r"round-00002\.safetensors is damaged"):
        evaluate_arm(open_evaluation_context(folder), arm, lambda share, text: None)


def trained_json(folder: ComparisonFolder) -> Path:
    return arms_of(folder)["centralized"].run.checkpoint(ROUNDS).with_suffix(".json")


def test_arm_without_a_round_cannot_be_evaluated(
    evaluated: ComparisonFolder, tmp_path: Path
) -> None:
    folder = copy(evaluated, tmp_path)
    shutil.rmtree(arms_of(folder)["local"].jobs[0].run.checkpoints)
    with pytest.raises(CheckpointError, match="local, seed 0 has no finished round"):
        evaluate_arm(
            open_evaluation_context(folder), arms_of(folder)["local"], lambda share, text: None
        )


# --- one evaluator -------------------------------------------------------------------------------


def test_all_arms_share_one_evaluator_and_one_reference(evaluated: ComparisonFolder) -> None:
    found = [arm.run.read_json(arm.run.evaluation) for arm in arms_of(evaluated).values()]
    assert found[0]["evaluator"] == found[1]["evaluator"]
    assert found[0]["utility"]["real"] == found[1]["utility"]["real"]
    assert all(
        one["fidelity"]["frechet_reference"] == found[0]["fidelity"]["frechet_reference"]
        for one in found
    )
    assert all(one["utility"]["synthetic_images"] == IMAGES for one in found)
    assert len(list(evaluated.reference.glob("classifier-*.safetensors"))) == 2
    for arm in arms_of(evaluated).values():
        scores = read_scores(arm.run)
        assert scores is not None
        assert scores.shape == (2, found[0]["utility"]["test_images"], 2)
        np.testing.assert_allclose(scores.sum(2), 1, atol=1e-12)
        assert scores.dtype == np.float64  # rounded scores would have ties
        with Image.open(arm.run.samples / "final.png") as picture:
            assert picture.format == "PNG"


def test_each_hospital_generator_is_evaluated_beside_the_union(evaluated: ComparisonFolder) -> None:
    local = arms_of(evaluated)["local"]
    for job in local.jobs:
        found = job.run.read_json(job.run.evaluation)
        assert found["suite"] == "quick"
        assert set(found["utility"]["synthetic"]["per_institution"]) == {"alpha", "beta"}
        assert synthetic(job.run)[0].shape == (IMAGES, 1, SIDE, SIDE)
    alpha, beta = (read_scores(job.run) for job in local.jobs)
    assert alpha is not None
    assert beta is not None
    assert (alpha != beta).any()


def test_full_suite_is_quick_for_single_hospitals(
    evaluated: ComparisonFolder, tmp_path: Path
) -> None:
    folder = copy(
        evaluated, tmp_path, "evaluation.suite=full", "evaluation.seeds=1", "comparison.arms=local"
    )
    evaluate_all(folder)
    local = arms_of(folder)["local"]
    whole = local.run.read_json(local.run.evaluation)
    assert whole["suite"] == "full"
    assert {"mixed", "real_on_synthetic"} <= set(whole["utility"])
    assert whole["label_fidelity"]
    assert [job.run.read_json(job.run.evaluation)["suite"] for job in local.jobs] == [
        "quick",
        "quick",
    ]
    assert any("several generators" in note for note in whole["notes"])


def test_curves_have_a_point_per_kept_round(evaluated: ComparisonFolder) -> None:
    for arm in arms_of(evaluated).values():
        points = json.loads((arm.folder / "curve.json").read_text())
        assert [(point["round"], point["images_seen"]) for point in points] == [(1, 16), (2, 32)]
        assert all(np.isfinite(point["frechet"]) for point in points)
        # the validation split is too small here
        assert {point["split"] for point in points} == {"train"}
        assert points[0]["frechet"] != points[1]["frechet"]


def test_real_sample_grid_is_written_once_and_only_where_allowed(
    evaluated: ComparisonFolder, tmp_path: Path
) -> None:
    folder = copy(evaluated, tmp_path)
    path = folder.samples / "real.png"

    def write(show: str) -> None:
        folder.write_settings(
            from_dict(to_dict(folder.settings()), [f"evaluation.show_real={show}"])
        )
        write_real_grid(open_evaluation_context(folder))

    write("phantoms")  # images of data.root may be of patients
    assert not path.exists()
    write("all")
    before = path.stat().st_mtime_ns
    write("all")
    assert path.stat().st_mtime_ns == before
    write("none")
    assert not path.exists()


# --- the union -----------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 10_000), min_size=1, max_size=6), total=st.integers(6, 3000))
def test_shares_are_proportional_and_add_up(sizes: list[int], total: int) -> None:
    counts = apportion_by_size(sizes, total)
    exact = [size / sum(sizes) * total for size in sizes]
    assert sum(counts) == total
    assert all(count >= 1 for count in counts)
    if min(exact) >= 1:
        assert all(abs(count - share) < 1 for count, share in zip(counts, exact, strict=True))


def test_union_has_each_hospital_share_and_its_own_classes(
    evaluated: ComparisonFolder,
) -> None:
    context, local = open_evaluation_context(evaluated), arms_of(evaluated)["local"]
    parts = [evaluate._Part.of(context, job, local) for job in local.jobs]
    union = evaluate.union(context.settings, parts)
    assert len(union) == IMAGES
    first, second = (len(hospital.train) for hospital in context.hospitals)
    count = IMAGES * first // (first + second)  # 48 and 24 training images: 16 and 8 of 24
    own = [synthetic(job.run) for job in local.jobs]
    np.testing.assert_array_equal(
        union.images[np.arange(IMAGES)],
        np.concatenate([own[0][0][:count], own[1][0][: IMAGES - count]]),
    )
    assert union.labels[:count].sum(0).min() > 0
    assert union.labels[count:].tolist() == [[1, 0]] * (IMAGES - count)  # beta has dark images only
    assert len(own[1][1]) == IMAGES
    assert own[1][1][:, 1].sum() == 0


def test_grid_of_several_generators_uses_the_owner_of_each_class(
    evaluated: ComparisonFolder,
) -> None:
    context, local = open_evaluation_context(evaluated), arms_of(evaluated)["local"]
    parts = [evaluate._Part.of(context, job, local) for job in local.jobs]
    both = evaluate._GeneratorByClass(parts)
    z, c = torch.randn(4, both.z_dim), torch.eye(2)[[0, 1, 0, 1]]
    with torch.inference_mode():
        images = both(z, c, noise="const")
        alpha = parts[0].generator(z, c, noise="const")
    assert both.counts.tolist() == [[24, 24], [24, 0]]
    assert torch.equal(images, alpha)  # of equals the first


# --- institutions --------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_institution_of_a_partitioned_image_is_its_hospital(partition: str, tmp_path: Path) -> None:
    folder = ComparisonFolder.at(tmp_path / "study")
    settings = scenario(
        write_data(tmp_path / "data"), f"data.partition={partition}", "federation.hospitals=3"
    )
    prepare(settings, folder, lambda event: None)
    context = open_evaluation_context(folder)
    expected = [(hospital.name, len(hospital.test)) for hospital in context.hospitals]
    assert sorted(name for name, _ in expected) == ["hospital-1", "hospital-2", "hospital-3"]
    names, counts = np.unique(context.reference.test_institutions, return_counts=True)
    assert list(zip(names.tolist(), counts.tolist(), strict=True)) == sorted(
        row for row in expected if row[1]
    )
    whole = {name for hospital in context.hospitals for name in hospital.test.patients.tolist()}
    assert len(whole) == len(context.reference.test)


# --- no choice by the test split -----------------------------------------------------------------


def test_no_choice_depends_on_the_test_split(
    trained: ComparisonFolder, evaluated: ComparisonFolder, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data", other_test=True)
    folder = copy(trained, tmp_path, f"data.root={data}")
    assert evaluate_all(folder)
    changed, kept = (
        open_evaluation_context(folder).reference,
        open_evaluation_context(evaluated).reference,
    )
    assert changed.test_hash != kept.test_hash
    same = (
        changed.test.images[np.arange(len(changed.test))]
        == kept.test.images[np.arange(len(kept.test))]
    ).all((1, 2, 3))
    assert 0 < same.sum() < len(same)
    for number in range(2):
        name = f"classifier-{number}.safetensors"
        assert (folder.reference / name).read_bytes() == (evaluated.reference / name).read_bytes()
    for ours, theirs in zip(arms_of(folder).values(), arms_of(evaluated).values(), strict=True):
        for one, other in zip([ours, *ours.jobs], [theirs, *theirs.jobs], strict=True):
            changed_scores, kept_scores = read_scores(one.run), read_scores(other.run)
            assert changed_scores is not None
            assert kept_scores is not None
            np.testing.assert_array_equal(changed_scores[:, same], kept_scores[:, same])
            assert (changed_scores[:, ~same] != kept_scores[:, ~same]).any()
        for one, other in zip(ours.jobs, theirs.jobs, strict=True):
            for a, b in zip(synthetic(one.run), synthetic(other.run), strict=True):
                np.testing.assert_array_equal(a, b)
        assert (ours.folder / "curve.json").read_bytes() == (
            theirs.folder / "curve.json"
        ).read_bytes()
        figures = [arm.run.read_json(arm.run.evaluation)["utility"] for arm in (ours, theirs)]
        assert figures[0]["synthetic"] != figures[1]["synthetic"]
        assert figures[0]["selection"] == figures[1]["selection"]
        assert "real validation split" in figures[0]["validation"]
        assert "test" not in figures[0]["validation"]


def test_full_suite_classifiers_do_not_depend_on_the_test_split(
    trained: ComparisonFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Includes the classifiers of mixed training sets; each is copied when it is trained."""
    fitted: list[dict[str, torch.Tensor]] = []
    fit = RealReference.fit

    def keep(self: RealReference, *arguments: Any) -> Any:
        classifier = fit(self, *arguments)
        fitted.append({key: value.clone() for key, value in classifier.state_dict().items()})
        return classifier

    monkeypatch.setattr(RealReference, "fit", keep)
    found = []
    for number, other in enumerate((False, True)):
        data = write_data(tmp_path / f"data-{number}", other_test=other)
        settings = scenario(data, "evaluation.suite=full", "evaluation.seeds=1")
        hospitals = evaluation_hospitals(settings, RunFolder(tmp_path))
        sets = [
            _pooled([getattr(hospital, split) for hospital in hospitals])
            for split in ("train", "val", "test")
        ]
        real = RealReference(*sets, settings.evaluation, seed=0)
        evaluate_synthetic(real, dataclasses.replace(real.train, patients=np.empty(0, str)))
        found.append(list(fitted))
        fitted.clear()
    assert len(found[0]) == len(found[1]) == 5  # real, synthetic, and three mixed sets
    for ours, theirs in zip(*found, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def _pooled(sets: list[ImageDataset]) -> ImageDataset:
    return reference.pool_hospitals([(one.name, one) for one in sets], "all")


# --- patients ------------------------------------------------------------------------------------


def test_patient_in_training_and_test_images_is_an_error(
    trained: ComparisonFolder, tmp_path: Path
) -> None:
    data = Path(trained.settings().data.root)
    shards = {path.name: path for path in data.iterdir()}
    guests = tmp_path / "guests"
    shutil.copytree(shards["alpha"], guests / "alpha")
    rows = np.load(shards["beta"] / "images.npy").shape[0]
    write_shard(  # beta's patients again, training patients among the test images
        guests / "beta",
        np.zeros((rows, 1, SIDE, SIDE), np.uint8),
        np.eye(2, dtype=np.uint8)[np.zeros(rows, int)],
        patients=[f"beta-{row}" for row in range(rows)],
        splits=["test" if row % 8 == 0 else "train" for row in range(rows)],
        label_names=LABELS,
        name="beta",
    )
    folder = copy(trained, tmp_path, f"evaluation.root={guests}")
    with pytest.raises(
        SplitError, match="6 patients of the training images are also in 'test'"
    ) as caught:
        open_evaluation_context(folder)
    assert "beta-" not in str(caught.value)
    assert "evaluation.root" in str(caught.value)


# --- real classifiers on the disk ----------------------------------------------------------------


def real_side(folder: Path, **changes: Any) -> RealReference:
    def data(count: int, seed: int) -> ImageDataset:
        rng = np.random.default_rng(seed)
        kinds = np.arange(count) % 2
        images = rng.integers(0, 128, (count, 1, SIDE, SIDE)) + 100 * kinds[:, None, None, None]
        return ImageDataset(
            "real", images.astype(np.uint8), np.eye(2, dtype=np.uint8)[kinds], LABELS
        )

    settings = dataclasses.replace(scenario(Path("nowhere")).evaluation, **changes)
    return RealReference(data(40, 0), data(16, 1), data(16, 2), settings, seed=3, folder=folder)


def test_saved_real_classifier_is_used_for_the_same_recipe_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    fit = RealReference.fit
    monkeypatch.setattr(
        RealReference, "fit", lambda self, *given: trained.append(given[2]) or fit(self, *given)
    )
    first = real_side(tmp_path).scores
    assert trained == [0, 1]
    np.testing.assert_array_equal(real_side(tmp_path).scores, first)
    assert trained == [0, 1]

    other = real_side(tmp_path, epochs=9).scores  # more steps: another recipe
    assert trained == [0, 1, 0, 1]
    assert (other != first).any()
    np.testing.assert_array_equal(real_side(tmp_path).scores, first)
    assert trained == [0, 1] * 3

    path = tmp_path / "classifier-1.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    np.testing.assert_array_equal(real_side(tmp_path).scores, first)
    assert trained == [*[0, 1] * 3, 1]
    assert path.read_bytes() == whole
    path.with_suffix(".json").unlink()
    np.testing.assert_array_equal(real_side(tmp_path).scores, first)
    assert trained == [*[0, 1] * 3, 1, 1]


def test_validation_images_are_part_of_the_classifier_recipe(tmp_path: Path) -> None:
    one, other = real_side(tmp_path), real_side(tmp_path)
    _ = one.scores
    other.val = other.val.take(np.arange(8))
    assert other._cached_classifier(0) is None
    assert one._cached_classifier(0) is not None
