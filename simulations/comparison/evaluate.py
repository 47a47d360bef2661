"""Evaluation of all arms of a comparison with the same classifiers, extractor, images and seeds.

The images of an arm are generated once, kept as `synthetic.npz` beside its checkpoints, and used
for every figure. An arm is evaluated again only when its checkpoint, the data or the evaluation
settings differ from those of its evaluation.json.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgan import files
from fedgan.apportion import apportion
from fedgan.comparison_folder import ComparisonFolder
from fedgan.config import Settings, to_dict
from fedgan.data.dataset import ImageDataset, pool
from fedgan.data.federation import Hospital, find_shards
from fedgan.data.shard import Shard
from fedgan.data.splits import check_disjoint_patients
from fedgan.errors import CheckpointError
from fedgan.evaluation.evaluate import EvaluationResult, evaluate_synthetic
from fedgan.evaluation.features import REFERENCE
from fedgan.evaluation.grids import png_bytes, real_grid, sample_grid
from fedgan.evaluation.reference import RealReference, pool_hospitals
from fedgan.evaluation.sampling import generate_images, synthetic_labels
from fedgan.run_folder import RunFolder
from fedgan.runs.evaluator import evaluation_device
from fedgan.runs.preparation import evaluation_hospitals, open_prepared
from fedgan.runs.round_state import is_evaluated
from fedgan.training.checkpoint import load_generator
from simulations.comparison.arm import Arm, Job

FORMAT = 3  # of evaluation.json and predictions: arms of another number are evaluated again
KEY_FILE = "evaluation_key.json"  # key and file hashes of an arm's evaluation
Step = Callable[[float, str], None]  # (share of the work that is done, current step)


@dataclass(frozen=True)
class EvaluationContext:
    """What all arms share: settings, the hospitals' training images, the real reference."""

    settings: Settings
    folder: ComparisonFolder
    hospitals: list[Hospital]
    train: ImageDataset
    reference: RealReference
    device: str


def open_evaluation_context(
    folder: ComparisonFolder, on_status: Callable[[str], None] | None = None
) -> EvaluationContext:
    """The evaluator of a comparison; what it computes of real images is kept in `reference/`."""
    settings = folder.settings()
    device = evaluation_device(settings)
    hospitals, guests = open_prepared(settings, folder), evaluation_hospitals(settings, folder)
    trained = pool_hospitals([(hospital.name, hospital.train) for hospital in hospitals], "train")
    held = [
        pool_hospitals([(guest.name, guest.split(split)) for guest in guests], split)
        for split in ("val", "test")
    ]
    check_disjoint_patients(trained, *held)
    train, val, test = (_pool_by_hospital(guests, split) for split in ("train", "val", "test"))
    reference = RealReference(
        train,
        val,
        test,
        settings.evaluation,
        settings.seed,
        device,
        on_progress=on_status,
        folder=folder.reference,
    )
    return EvaluationContext(settings, folder, hospitals, train, reference, device)


def _pool_by_hospital(hospitals: Sequence[Hospital], split: str) -> ImageDataset:
    """A split of all hospitals, pooled.

    The institution of an image is its hospital, also where one pool was partitioned.
    """
    sets = [
        (hospital.name, dataclasses.replace(data, institutions=np.full(len(data), hospital.name)))
        for hospital in hospitals
        for data in [hospital.split(split)]
    ]
    return pool_hospitals(sets, split)


def evaluate_arm(context: EvaluationContext, arm: Arm, step: Step) -> None:
    """Write evaluation.json, predictions.npz, curve.json and samples of an arm.

    Where it has one generator per hospital, also those of each hospital.
    """
    key = evaluation_key(context.settings, arm, context.folder)
    if _is_evaluated_with(arm, key):
        return
    step(0.0, "generating")
    parts = [_Part.of(context, job, arm) for job in arm.jobs]
    synthetic = union(context.settings, parts)
    files.write_bytes(arm.run.samples / "final.png", png_bytes(_grid(context, parts)))
    step(0.1, "evaluating")
    facts = {"arm": arm.kind, "name": arm.name, "round": max(part.round for part in parts)}
    generator = None if arm.is_per_hospital else parts[0].generator
    result = evaluate_synthetic(context.reference, synthetic, generator)
    _write_evaluation(context, arm.run, facts, result)
    if arm.is_per_hospital:
        for number, part in enumerate(parts):
            step(0.6 + 0.3 * number / len(parts), f"evaluating {part.hospital} alone")
            facts = {"arm": arm.kind, "name": f"{arm.name}: {part.hospital}", "round": part.round}
            quick = _with_quick_suite(context.reference)
            result = evaluate_synthetic(quick, part.synthetic, part.generator)
            _write_evaluation(context, part.job.run, facts, result)
    step(0.9, "measuring the curve")
    files.write_json(arm.run.path / "curve.json", curve(context, arm))
    files.write_json(arm.run.path / KEY_FILE, {"key": key, "files": _evaluation_files(arm)})
    step(1.0, "done")


def evaluation_key(settings: Settings, arm: Arm, folder: ComparisonFolder) -> str:
    """sha256 of checkpoints, data, evaluation settings, extractor and kind of device of an arm."""
    checkpoints = []
    for job in arm.jobs:
        newest = job.run.last_round()
        if newest is None:
            raise CheckpointError(f"{arm.label} has no finished round: it cannot be evaluated")
        meta = job.run.read_json(job.run.checkpoint(newest).with_suffix(".json")) or {}
        checkpoints.append(meta.get("sha256"))
    tree = to_dict(settings)
    del tree["evaluation"]["show_real"]  # changes no figure
    data = [row.get("content_hash") or row.get("content_check") for row in folder.hospital_rows()]
    if settings.evaluation.root:
        shards = find_shards(settings.evaluation.root)
        data += [Shard.open(path).card.content_hash for path in shards]
    features = settings.evaluation.features
    weights = (
        "" if features == REFERENCE else hashlib.sha256(Path(features).read_bytes()).hexdigest()
    )
    facts = [
        FORMAT,
        checkpoints,
        tree["data"],
        tree["evaluation"],
        settings.seed,
        data,
        weights,
        evaluation_device(settings),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def is_arm_evaluated(settings: Settings, arm: Arm, folder: ComparisonFolder) -> bool:
    """Whether an arm has an evaluation of its newest checkpoint with these settings."""
    try:
        return _is_evaluated_with(arm, evaluation_key(settings, arm, folder))
    except CheckpointError:  # damaged: the evaluation reports it for this arm, others continue
        return False


def read_scores(run: RunFolder) -> np.ndarray | None:
    """Probabilities (S, N, K) of the test images beside an evaluation; None without the file."""
    path = run.path / "predictions.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        scores: np.ndarray = arrays["synthetic"]
    return scores


# --- synthetic images ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """One generator and `evaluation.images` images of it. `hospital`: its owner, "" for all."""

    job: Job
    generator: Any
    synthetic: ImageDataset
    train: ImageDataset
    hospital: str
    round: int

    @staticmethod
    def of(context: EvaluationContext, job: Job, arm: Arm) -> _Part:
        newest = job.run.last_round()
        assert newest is not None
        generator, meta = load_generator(job.run.checkpoint(newest), context.device)
        train = _training_images(context, arm, job)
        synthetic = _synthetic_images(context, job.run, generator, train, meta["sha256"])
        hospital = job.members[0] if arm.is_per_hospital else ""
        return _Part(job, generator, synthetic, train, hospital, newest)


def _training_images(context: EvaluationContext, arm: Arm, job: Job) -> ImageDataset:
    """Training images of a job's members, whose label distribution its generator is given."""
    members = job.members or arm.members  # no members in the settings: all hospitals
    chosen = [
        (hospital.name, hospital.train)
        for hospital in context.hospitals
        if hospital.name in members
    ]
    return pool_hospitals(chosen, "+".join(members))


def _synthetic_images(
    context: EvaluationContext,
    run: RunFolder,
    generator: Any,
    train: ImageDataset,
    checkpoint: str,
) -> ImageDataset:
    """Images of one generator; synthetic.npz keeps those of `checkpoint` (sha256)."""
    evaluation, seed = context.settings.evaluation, context.settings.seed
    labels = synthetic_labels(train.labels, evaluation.images, seed)
    label_hash = hashlib.sha256(labels.tobytes()).hexdigest()
    key = f"{checkpoint} {evaluation.images} {evaluation.psi:g} {seed} {label_hash}"
    path = run.path / "synthetic.npz"
    images = _saved_images(path, key)
    if images is None:
        images = generate_images(generator, labels, seed, evaluation.psi, device=context.device)
        with files.atomic_path(path) as part, open(part, "wb") as stream:
            np.savez(stream, images=images, labels=labels, key=np.array(key))
    return ImageDataset("synthetic", images, labels, train.label_names, train.exclusive)


def _saved_images(path: Path, key: str) -> np.ndarray | None:
    """The images of synthetic.npz; None where it is missing, damaged or has another key."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["key"]) == key:
                images: np.ndarray = arrays["images"]
                return images
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    return None


def union(settings: Settings, parts: Sequence[_Part]) -> ImageDataset:
    """The pooled releases of all hospitals: `evaluation.images` synthetic images.

    Each hospital's share is in proportion to its training images and has its label distribution.
    """
    if len(parts) == 1:
        return parts[0].synthetic
    counts = apportion_by_size([len(part.train) for part in parts], settings.evaluation.images)
    return pool(
        [part.synthetic.take(np.arange(count)) for part, count in zip(parts, counts, strict=True)],
        "synthetic",
    )


def apportion_by_size(sizes: Sequence[int], total: int) -> list[int]:
    """Apportion `total` in proportion to `sizes`, at least one each."""
    exact = np.array(sizes) / sum(sizes) * total
    return apportion(exact.tolist(), total, minimum=1)


class _GeneratorByClass:
    """Several generators as one: a label vector uses that of the hospital with most such images."""

    training = False

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts = parts
        first = parts[0].generator
        self.z_dim, self.label_dim, self.resolution = first.z_dim, first.label_dim, first.resolution
        self.counts = np.stack([part.train.labels.sum(0) for part in parts])

    def to(self, device: str) -> _GeneratorByClass:
        return self

    def eval(self) -> _GeneratorByClass:
        return self

    def train(self, mode: bool = True) -> _GeneratorByClass:
        return self

    def __call__(self, z: torch.Tensor, c: torch.Tensor, **options: Any) -> torch.Tensor:
        owners = (c.cpu().numpy() @ self.counts.T).argmax(1)
        images = [part.generator(z, c, **options) for part in self.parts]
        return torch.stack([images[owner][row] for row, owner in enumerate(owners)])


def _grid(context: EvaluationContext, parts: Sequence[_Part]) -> Any:
    """Sample grid, one row per class, from the same latents in every arm."""
    return sample_grid(
        parts[0].generator if len(parts) == 1 else _GeneratorByClass(parts),
        context.train.label_names,
        context.train.exclusive,
        seed=context.settings.seed,
        psi=context.settings.evaluation.psi,
        device=context.device,
    )


def write_real_grid(context: EvaluationContext) -> None:
    """Write samples/real.png of the comparison, or remove it, as `evaluation.show_real` says."""
    path = context.folder.samples / "real.png"
    if not context.settings.shows_real:
        path.unlink(missing_ok=True)
    elif not path.is_file():
        files.write_bytes(path, png_bytes(real_grid(context.train, seed=context.settings.seed)))


# --- figures -------------------------------------------------------------------------------------


def _write_evaluation(
    context: EvaluationContext, run: RunFolder, facts: dict[str, Any], result: EvaluationResult
) -> None:
    """Write predictions.npz, then evaluation.json: the latter implies the former."""
    reference = context.reference
    if result.scores is not None:
        stream = io.BytesIO()
        np.savez(stream, synthetic=result.scores)
        files.write_bytes(run.path / "predictions.npz", stream.getvalue())
    evaluator = {
        "extractor": reference.extractor.key if reference.can_extract else None,
        "classifier": reference.classifier_name,
        "suite": result.numbers["suite"],
        "test_hash": reference.test_hash,
        "seed": reference.seed,
        "psi": reference.settings.psi,
        "images": reference.settings.images,
    }
    files.write_json(
        run.evaluation,
        {**facts, **result.numbers, "psi": reference.settings.psi, "evaluator": evaluator},
    )


def _with_quick_suite(reference: RealReference) -> RealReference:
    """The same reference, classifiers and features included, with the quick suite."""
    other = copy.copy(reference)
    other.settings = dataclasses.replace(reference.settings, suite="quick")
    return other


def curve(context: EvaluationContext, arm: Arm) -> list[dict[str, Any]]:
    """Fréchet distance at every kept checkpoint: [{images_seen, frechet, round, split, images}].

    It includes the rounds of the federation that a fine-tuned arm continues. The real images are
    the validation split (training images where that is too small, see `split`), never the test
    split.
    """
    if not context.reference.can_extract:
        return []
    points = []
    if start := arm.jobs[0].start:
        federated = dataclasses.replace(arm.jobs[0], settings=context.settings)
        whole = [(RunFolder(start.folder), _training_images(context, arm, federated))]
        points = [
            _curve_point(context, whole, number)
            for number in _kept_rounds(arm, whole)
            if number <= start.round
        ]
    sources = [(job.run, _training_images(context, arm, job)) for job in arm.jobs]
    points += [_curve_point(context, sources, number) for number in _kept_rounds(arm, sources)]
    return points


def _curve_point(
    context: EvaluationContext, sources: Sequence[tuple[RunFolder, ImageDataset]], number: int
) -> dict[str, Any]:
    """One point: the generators after round `number`, each with its share of the images."""
    settings, seed = context.settings, context.settings.seed
    counts = apportion_by_size(
        [len(train) for _, train in sources], len(context.reference.quick[1])
    )
    images, seen = [], 0
    for (run, train), count in zip(sources, counts, strict=True):
        generator, meta = load_generator(run.checkpoint(number), context.device)
        labels = synthetic_labels(train.labels, count, seed)
        images.append(
            generate_images(generator, labels, seed, settings.evaluation.psi, device=context.device)
        )
        seen += meta["images_seen"]
    found = context.reference.quick_distance(np.concatenate(images))
    return {
        "images_seen": seen,
        "frechet": found["frechet"],
        "round": number,
        "split": found["split"],
        "images": found["images"],
    }


def _kept_rounds(arm: Arm, sources: Sequence[tuple[RunFolder, ImageDataset]]) -> list[int]:
    """Evaluated rounds, and the last, of which every source still has a checkpoint."""
    newest = min(run.last_round() or 0 for run, _ in sources)
    settings = arm.jobs[0].settings
    return [
        number
        for number in range(1, newest + 1)
        if (number == newest or is_evaluated(settings, number))
        and all(run.checkpoint(number).is_file() for run, _ in sources)
    ]


def _evaluation_files(arm: Arm) -> dict[str, str]:
    """sha256 of the evaluation's files by relative path: a changed one is evaluated again."""
    runs = [arm.run, *((job.run for job in arm.jobs) if arm.is_per_hospital else ())]
    paths = [
        run.path / name
        for run in runs
        for name in ("evaluation.json", "predictions.npz", "curve.json")
    ]
    return {
        str(path.relative_to(arm.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.is_file()
    }


def _is_evaluated_with(arm: Arm, key: str) -> bool:
    found = arm.run.read_json(arm.run.path / KEY_FILE) or {}
    return found.get("key") == key and found.get("files") == _evaluation_files(arm)
