"""Judges the arms of a comparison, all with one evaluator: the same real classifiers, extractor, test images and seeds.

What an arm generates is generated once, kept as `synthetic.npz` beside its checkpoints, and reused by every figure. An
arm whose checkpoint, data and evaluation settings are those of its evaluation.json is not judged again.
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
from simulations.comparison.plan import Arm, Job

FORMAT = 2  # of evaluation.json and predictions: another number means that all is judged again
Step = Callable[[float, str], None]  # (share of the work that is done, what is done now)


@dataclass(frozen=True)
class EvaluationContext:
    """Everything that all arms share: settings, the hospitals' training images, the real side."""

    settings: Settings
    folder: ComparisonFolder
    hospitals: list[Hospital]
    train: ImageDataset
    reference: RealReference
    device: str


def open_evaluation_context(
    folder: ComparisonFolder, say: Callable[[str], None] | None = None
) -> EvaluationContext:
    """The one evaluator of a comparison; what it learns of the real images is kept in `reference/`."""
    settings = folder.settings()
    device = evaluation_device(settings)
    hospitals, guests = open_prepared(settings, folder), evaluation_hospitals(settings, folder)
    trained = pool_hospitals([(hospital.name, hospital.train) for hospital in hospitals], "train")
    held = [
        pool_hospitals([(guest.name, guest.split(split)) for guest in guests], split)
        for split in ("val", "test")
    ]
    check_disjoint_patients(trained, *held)
    train, val, test = (_by_name(guests, split) for split in ("train", "val", "test"))
    reference = RealReference(
        train,
        val,
        test,
        settings.evaluation,
        settings.seed,
        device,
        on_progress=say,
        folder=folder.reference,
    )
    return EvaluationContext(settings, folder, hospitals, train, reference, device)


def _by_name(hospitals: Sequence[Hospital], split: str) -> ImageDataset:
    """A split of all hospitals, pooled; an image's institution is its hospital, also where one pool was dealt to several."""
    sets = [
        (hospital.name, dataclasses.replace(data, institutions=np.full(len(data), hospital.name)))
        for hospital in hospitals
        for data in [hospital.split(split)]
    ]
    return pool_hospitals(sets, split)


def evaluate_arm(context: EvaluationContext, arm: Arm, step: Step) -> None:
    """Write an arm's evaluation.json, predictions.npz, curve.json and samples, and those of its members' own generators."""
    key = evaluation_key(context.settings, arm, context.folder)
    if _is_evaluated_with(arm, key):
        return
    step(0.0, "generating")
    parts = [_Part.of(context, job, arm) for job in arm.jobs]
    synthetic = union(context.settings, parts)
    files.write_bytes(arm.run.samples / "final.png", png_bytes(_grid(context, parts)))
    step(0.1, "judging")
    facts = {"arm": arm.kind, "name": arm.name, "round": max(part.round for part in parts)}
    restricted_to = None if arm.by_hospital else parts[0].generator
    _write_evaluation(
        context, arm.run, facts, evaluate_synthetic(context.reference, synthetic, restricted_to)
    )
    if arm.by_hospital:
        for number, part in enumerate(parts):
            step(0.6 + 0.3 * number / len(parts), f"judging {part.hospital} alone")
            own = {"arm": arm.kind, "name": f"{arm.name}: {part.hospital}", "round": part.round}
            judged = evaluate_synthetic(_quick(context.reference), part.synthetic, part.generator)
            _write_evaluation(context, part.job.run, own, judged)
    step(0.9, "measuring the curve")
    files.write_json(arm.run.path / "curve.json", curve(context, arm))
    files.write_json(arm.run.path / "judged.json", {"key": key, "files": _evaluation_files(arm)})
    step(1.0, "done")


def evaluation_key(settings: Settings, arm: Arm, folder: ComparisonFolder) -> str:
    """sha256 of all that an arm's figures depend on: checkpoints, data, evaluation settings, extractor, kind of device."""
    hashes = []
    for job in arm.jobs:
        newest = job.run.last_round()
        if newest is None:
            raise CheckpointError(f"{arm.label} has no finished round: it cannot be judged")
        hashes.append(
            (job.run.read_json(job.run.checkpoint(newest).with_suffix(".json")) or {}).get("sha256")
        )
    tree = to_dict(settings)
    evaluation = {
        name: value for name, value in tree["evaluation"].items() if name != "show_real"
    }  # changes no figure
    held = [
        row["content_hash"] or row["content_check"]
        for row in folder.read_json(folder.hospitals) or []
    ]
    if settings.evaluation.root:
        held += [
            Shard.open(path).card.content_hash for path in find_shards(settings.evaluation.root)
        ]
    features = settings.evaluation.features
    weights = (
        "" if features == REFERENCE else hashlib.sha256(Path(features).read_bytes()).hexdigest()
    )
    facts = [
        FORMAT,
        hashes,
        tree["data"],
        evaluation,
        settings.seed,
        held,
        weights,
        evaluation_device(settings),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def is_arm_evaluated(settings: Settings, arm: Arm, folder: ComparisonFolder) -> bool:
    """Whether an arm's evaluation is there and is about its newest checkpoint and these settings."""
    try:
        return _is_evaluated_with(arm, evaluation_key(settings, arm, folder))
    except CheckpointError:  # damaged: the judgement will say so of this arm, and the others go on
        return False


def read_scores(run: RunFolder) -> np.ndarray | None:
    """The probabilities (S, N, K) of the test images that were written beside an evaluation; None where there are none."""
    path = run.path / "predictions.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        scores: np.ndarray = arrays["synthetic"]
    return scores


# --- what an arm generates -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """One generator and the `evaluation.images` images that were drawn from it; `hospital`: whose own it is, if one's."""

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
        train = _asked(context, arm, job)
        images = context.settings.evaluation.images
        synthetic = _generated(context, job.run, generator, train, images, meta["sha256"])
        return _Part(
            job, generator, synthetic, train, job.members[0] if arm.by_hospital else "", newest
        )


def _asked(context: EvaluationContext, arm: Arm, job: Job) -> ImageDataset:
    """The training images whose mix of labels a generator is asked for: those of its own members."""
    members = job.members or arm.members  # a job without members is everybody's
    chosen = [
        (hospital.name, hospital.train)
        for hospital in context.hospitals
        if hospital.name in members
    ]
    return pool_hospitals(chosen, "+".join(members))


def _generated(
    context: EvaluationContext,
    run: RunFolder,
    generator: Any,
    train: ImageDataset,
    count: int,
    checkpoint: str,
) -> ImageDataset:
    """The images of one generator: read from synthetic.npz where they are of this very checkpoint, else drawn and kept."""
    psi, seed = context.settings.evaluation.psi, context.settings.seed
    labels = synthetic_labels(train.labels, count, seed)
    key = f"{checkpoint} {count} {psi:g} {seed} {hashlib.sha256(labels.tobytes()).hexdigest()}"
    path = run.path / "synthetic.npz"
    images = _kept_images(path, key)
    if images is None:
        images = generate_images(generator, labels, seed, psi, device=context.device)
        with files.atomic_path(path) as part, open(part, "wb") as stream:
            np.savez(stream, images=images, labels=labels, key=np.array(key))
    return ImageDataset("synthetic", images, labels, train.label_names, train.exclusive)


def _kept_images(path: Path, key: str) -> np.ndarray | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if str(arrays["key"]) == key:
                images: np.ndarray = arrays["images"]
                return images
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
    ):  # not there, or torn: drawn again
        pass
    return None


def union(settings: Settings, parts: Sequence[_Part]) -> ImageDataset:
    """What who pools the hospitals' releases gets: of each its share of the images, by its training images, in its own mix."""
    if len(parts) == 1:
        return parts[0].synthetic
    counts = shares([len(part.train) for part in parts], settings.evaluation.images)
    return pool(
        [part.synthetic.take(np.arange(count)) for part, count in zip(parts, counts, strict=True)],
        "synthetic",
    )


def shares(sizes: Sequence[int], total: int) -> list[int]:
    """`total` (at least one for each) dealt in proportion to `sizes`, by largest remainder, at least one each."""
    exact = np.array(sizes) / sum(sizes) * total
    return apportion(exact.tolist(), total, minimum=1)


class _ByClass:
    """Several hospitals' generators as one: each label vector is drawn by the hospital that has most images of it."""

    training = False

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts = parts
        first = parts[0].generator
        self.z_dim, self.label_dim, self.resolution = first.z_dim, first.label_dim, first.resolution
        self.held = np.stack([part.train.labels.sum(0) for part in parts])

    def to(self, device: str) -> _ByClass:
        return self

    def eval(self) -> _ByClass:
        return self

    def train(self, mode: bool = True) -> _ByClass:
        return self

    def __call__(self, z: torch.Tensor, c: torch.Tensor, **how: Any) -> torch.Tensor:
        whose = (c.cpu().numpy() @ self.held.T).argmax(1)
        images = [part.generator(z, c, **how) for part in self.parts]
        return torch.stack([images[owner][row] for row, owner in enumerate(whose)])


def _grid(context: EvaluationContext, parts: Sequence[_Part]) -> Any:
    """Rows of a class each, from the same latents in every arm."""
    generator = parts[0].generator if len(parts) == 1 else _ByClass(parts)
    train, settings = context.train, context.settings
    psi = settings.evaluation.psi
    return sample_grid(
        generator,
        train.label_names,
        train.exclusive,
        seed=settings.seed,
        psi=psi,
        device=context.device,
    )


def write_real_grid(context: EvaluationContext) -> None:
    """samples/real.png of the comparison, where `evaluation.show_real` allows it; one that it no longer allows goes."""
    place = context.folder.samples / "real.png"
    if not context.settings.shows_real:
        place.unlink(missing_ok=True)
    elif not place.is_file():
        files.write_bytes(place, png_bytes(real_grid(context.train, seed=context.settings.seed)))


# --- figures ---------------------------------------------------------------------------------------


def _write_evaluation(
    context: EvaluationContext, run: RunFolder, facts: dict[str, Any], judged: EvaluationResult
) -> None:
    """predictions.npz first: an evaluation.json always has them."""
    reference = context.reference
    if judged.scores is not None:
        stream = io.BytesIO()
        np.savez(stream, synthetic=judged.scores)
        files.write_bytes(run.path / "predictions.npz", stream.getvalue())
    evaluator = {
        "extractor": reference.extractor.key if reference.can_extract else None,
        "classifier": reference.classifier_name,
        "suite": judged.numbers["suite"],
        "test_hash": reference.test_hash,
        "seed": reference.seed,
        "psi": reference.settings.psi,
        "images": reference.settings.images,
    }
    files.write_json(
        run.evaluation,
        {**facts, **judged.numbers, "psi": reference.settings.psi, "evaluator": evaluator},
    )


def _quick(reference: RealReference) -> RealReference:
    """The same real side, classifiers and features included, for the quick suite."""
    other = copy.copy(reference)
    other.settings = dataclasses.replace(reference.settings, suite="quick")
    return other


def curve(context: EvaluationContext, arm: Arm) -> list[dict[str, Any]]:
    """[{images_seen, frechet, round, split}] at every checkpoint that the training kept, federation's rounds before it included.

    The real side is the validation split (training images where that is too small, as `split` says), never the test split.
    """
    if not context.reference.can_extract:
        return []
    sources = [(job.run, _asked(context, arm, job)) for job in arm.jobs]
    points = []
    if start := arm.jobs[0].start:
        whole = [
            (
                RunFolder(start.folder),
                _asked(context, arm, dataclasses.replace(arm.jobs[0], settings=context.settings)),
            )
        ]
        points = [
            _point(context, whole, number)
            for number in _kept_rounds(arm, whole)
            if number <= start.round
        ]
    points += [_point(context, sources, number) for number in _kept_rounds(arm, sources)]
    return points


def _point(
    context: EvaluationContext, sources: Sequence[tuple[RunFolder, ImageDataset]], number: int
) -> dict[str, Any]:
    """One point of a curve: generators after round `number`, each asked for its share of the images in its own mix."""
    settings, seed = context.settings, context.settings.seed
    counts = shares([len(train) for _, train in sources], len(context.reference.quick[1]))
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
    """Rounds of which every source still has a checkpoint that was to be looked at, and the last."""
    newest = min(run.last_round() or 0 for run, _ in sources)
    settings = arm.jobs[0].settings
    wanted = [
        number
        for number in range(1, newest + 1)
        if number == newest or is_evaluated(settings, number)
    ]
    return [
        number for number in wanted if all(run.checkpoint(number).is_file() for run, _ in sources)
    ]


def _evaluation_files(arm: Arm) -> dict[str, str]:
    """sha256 of what a judgement left, by its place in the arm's folder: what another hand wrote over is judged again."""
    homes = [arm.run, *((job.run for job in arm.jobs) if arm.by_hospital else ())]
    places = [
        home.path / name
        for home in homes
        for name in ("evaluation.json", "predictions.npz", "curve.json")
    ]
    return {
        str(place.relative_to(arm.folder)): hashlib.sha256(place.read_bytes()).hexdigest()
        for place in places
        if place.is_file()
    }


def _is_evaluated_with(arm: Arm, key: str) -> bool:
    found = arm.run.read_json(arm.run.path / "judged.json") or {}
    return found.get("key") == key and found.get("files") == _evaluation_files(arm)
