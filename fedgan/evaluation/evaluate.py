"""Final evaluation of a synthetic set: utility for classifiers, fidelity to real images.

Generators and classifiers see training images (or images made from them) only; classifiers are
selected on validation images. The test split gives the utility figures; validation and test images
together are the real side of the distances. `evaluation.suite` = quick leaves out the most
expensive parts; all arms of a comparison share one suite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedgan.data.dataset import UNKNOWN_PATIENT, ImageDataset
from fedgan.errors import DataError
from fedgan.evaluation.classification import (
    BATCH,
    SELECTION,
    SELECTION_BY_VALIDATION,
    probabilities,
    split_for_validation,
)
from fedgan.evaluation.features import ReferenceExtractor
from fedgan.evaluation.metrics.fidelity import (
    Numbers,
    fidelity,
    grouped_fidelity,
)
from fedgan.evaluation.metrics.label_fidelity import label_fidelity
from fedgan.evaluation.metrics.ms_ssim import WINDOW, intra_class_ms_ssim
from fedgan.evaluation.metrics.path_length import perceptual_path_length
from fedgan.evaluation.metrics.utility import NO_FINDING, majority_scores, names_normal, utility
from fedgan.evaluation.mixing import (
    SHARES,
    label_mix_rows,
    missing_share,
    mixed_set,
    stratified_rows,
)
from fedgan.evaluation.reference import RealReference, institutions_of, merged
from fedgan.evaluation.sampling import to_float

MIN_TEST_IMAGES = 2
MIN_HELD_OUT = 4
MIN_TO_SPLIT = 20  # synthetic images; with fewer none is held back for validation
MAX_LABEL_FIDELITY_IMAGES = 2000
NOTED_DEVIATION = 0.02  # from a hospital's label mix
PATHS = 512  # of the perceptual path length


@dataclass(frozen=True)
class EvaluationResult:
    """`numbers`: the part of evaluation.json; `scores` (S, N, K): test probabilities."""

    numbers: dict[str, Any]
    scores: np.ndarray | None


def evaluate_synthetic(
    reference: RealReference, synthetic: ImageDataset, generator: Any = None
) -> EvaluationResult:
    """All of evaluation.json about a synthetic set.

    Keys: label_names, suite, utility, fidelity, label_fidelity, notes. `generator` made the set and
    gives its path length; None for a set of several generators. What cannot be computed is None,
    with a sentence in `notes`. Raises `FedganError` for data that do not fit.
    """
    generator_labels = synthetic.labels  # before evaluation.label_map merges them
    synthetic = merged(synthetic, reference.settings.label_map)
    notes: list[str] = []
    utility_block, scores, labels_block = _utility(reference, synthetic, notes)
    numbers = {
        "label_names": list(synthetic.label_names),
        "suite": reference.settings.suite,
        "utility": utility_block,
        "fidelity": _fidelity(reference, synthetic, generator, generator_labels, notes),
        "label_fidelity": labels_block,
        "notes": notes,
    }
    return EvaluationResult(numbers, scores)


# --- utility ------------------------------------------------------------------------------------


def _utility(
    reference: RealReference, synthetic: ImageDataset, notes: list[str]
) -> tuple[dict[str, Any] | None, np.ndarray | None, dict[str, Any] | None]:
    """The utility block, the scores of the synthetic-only classifiers, and the label fidelity."""
    settings, test = reference.settings, reference.test
    if not reference.has_classes:
        notes.append(
            "The images have no classes to distinguish: there is no classifier and no utility."
        )
        return None, None, None
    if len(test) < MIN_TEST_IMAGES:
        notes.append("The real test split has fewer than two images: utility cannot be measured.")
        return None, None, None
    scores, held_back = synthetic_only(reference, synthetic)
    reference.on_progress("testing on real images")
    majority = majority_scores(reference.train.labels, len(test), test.exclusive)
    result: dict[str, Any] = {
        "classifier": reference.classifier_name,
        "seeds": settings.seeds,
        "steps": reference.steps,
        "batch": BATCH,
        "selection": SELECTION_BY_VALIDATION
        if reference.validation is not None and held_back
        else SELECTION,
        "validation": _validation_sources(reference, held_back),
        "bootstrap": settings.bootstrap,
        "resampled": _resampled(test),
        "real": reference.metrics,
        "synthetic": reference.utility(scores),
        "majority": reference.utility(majority, institutions=False),
        "train_images": len(reference.train),
        "synthetic_images": len(synthetic),
        "test_images": len(test),
    }
    notes += _class_notes(result["real"])
    if settings.suite == "quick":
        return result, scores, None
    labels_block = _real_on_synthetic(reference, synthetic)
    result["real_on_synthetic"] = labels_block.pop("utility")
    result["mixed"] = _mixed(reference, synthetic, notes)
    return result, scores, labels_block


def synthetic_only(reference: RealReference, synthetic: ImageDataset) -> tuple[np.ndarray, int]:
    """TSTR: scores (S, N, K) of the test images by synthetic-only classifiers.

    Also returns the number of synthetic images that were held back for validation.
    """
    train, validation = synthetic, None
    if len(synthetic) >= MIN_TO_SPLIT:
        train, validation = split_for_validation(synthetic, seed=reference.seed)
    classifiers = []
    for number in range(reference.settings.seeds):
        reference.on_progress(
            f"training synthetic classifier {number + 1} of {reference.settings.seeds}"
        )
        classifiers.append(reference.fit(train, validation, number))
    return reference.score(classifiers, reference.test), len(validation) if validation else 0


def _mixed(
    reference: RealReference, synthetic: ImageDataset, notes: list[str]
) -> list[dict[str, Any]]:
    """Utility of classifiers trained on all real and some synthetic images, one row per share."""
    rows = []
    for share in SHARES:
        try:
            both = mixed_set(reference.train, synthetic, share, reference.seed)
        except DataError as error:
            notes.append(f"Real + {share} × synthetic was not measured: {error}.")
            continue
        reference.on_progress(f"training on real + {share} × synthetic")
        classifiers = [
            reference.fit(both, reference.validation, number)
            for number in range(reference.settings.seeds)
        ]
        figures = reference.utility(reference.score(classifiers, reference.test))
        rows.append(
            {"share": share, "synthetic_images": len(both) - len(reference.train), **figures}
        )
    return rows


def _real_on_synthetic(reference: RealReference, synthetic: ImageDataset) -> dict[str, Any]:
    """TRTS: `utility` of real classifiers on synthetic images, and label fidelity of both."""
    part = synthetic.take(
        stratified_rows(
            synthetic.labels, min(len(synthetic), MAX_LABEL_FIDELITY_IMAGES), reference.seed
        )
    )
    classifiers = [reference.classifier(number) for number in range(reference.settings.seeds)]
    scores = np.stack(
        [probabilities(classifier, part, reference.device) for classifier in classifiers]
    )
    names, exclusive, bootstrap = part.label_names, part.exclusive, reference.settings.bootstrap
    return {
        "utility": utility(
            scores, part.labels, names, exclusive, np.arange(len(part)), bootstrap, reference.seed
        ),
        "synthetic": label_fidelity(scores, part.labels, names, exclusive),
        "real": label_fidelity(reference.scores, reference.test.labels, names, exclusive),
    }


def _validation_sources(reference: RealReference, held_back: int) -> str:
    """The images on which classifiers were selected, as text."""
    real = (
        f"{len(reference.val)} images of the real validation split"
        if len(reference.val)
        else "none"
    )
    synthetic = f"{held_back} held-back synthetic images" if held_back else "none"
    return (
        f"trained on real or mixed images: {real}; trained on synthetic images alone: {synthetic}"
    )


def _resampled(test: ImageDataset) -> str:
    """The unit of the bootstrap: patients, images, or patients where they are known."""
    known = [
        bool(patient) and not str(patient).startswith(UNKNOWN_PATIENT) for patient in test.patients
    ]
    if not any(known):
        return "images"
    return "patients" if all(known) else "patients where they are known"


def _class_notes(metrics: dict[str, Any]) -> list[str]:
    """Sentences for the classes and institutions whose AUC is undefined."""
    notes = []
    for label, row in metrics["per_class"].items():
        if row["auc"] is None:
            what = "positive" if row["positives"] == 0 else "negative"
            notes.append(
                f"'{label}' has no {what} image in the real test split: its AUC is null and not in "
                "the macro mean."
            )
    for institution, inside in metrics["per_institution"].items():
        undefined = [label for label, row in inside["per_class"].items() if row["auc"] is None]
        if inside["macro_auc"] is None:
            notes.append(
                f"Inside {institution} no class has both positive and negative test images: "
                "its AUC is null."
            )
        elif undefined:
            notes.append(
                f"Inside {institution} the AUC is undefined for {', '.join(undefined)}: its macro "
                "mean is over the other classes."
            )
    return notes


# --- fidelity and diversity ---------------------------------------------------------------------


def _fidelity(
    reference: RealReference,
    synthetic: ImageDataset,
    generator: Any,
    generator_labels: np.ndarray,
    notes: list[str],
) -> dict[str, Any] | None:
    if not reference.can_extract:
        notes.append(
            "The images have no classes to train the reference extractor on: "
            "set evaluation.features to a weights file for Fréchet and kernel distances."
        )
        return None
    if len(reference.val) + len(reference.test) < MIN_HELD_OUT:
        notes.append("Fewer than four held-out real images: distances cannot be measured.")
        return None
    reference.on_progress("measuring distances")
    features, extractor, k = (
        reference.extractor(synthetic.images),
        reference.extractor,
        reference.settings.neighbours,
    )
    real, patients = reference.held_out_features, reference.held_out_groups
    measured = fidelity(real, features, reference.seed, k=k, patients=patients)
    if int(str(measured["images"])) <= features.shape[1]:
        notes.append(
            f"The distances rest on {measured['images']} images per side for {features.shape[1]} "
            "features: read the Fréchet distance beside its reference value only."
        )
    result: dict[str, Any] = {
        "extractor": extractor.name,
        "fid": extractor.is_fid,
        "real": "validation and test images",
        **measured,
    }
    if reference.settings.suite == "quick":
        return result
    result["per_class"] = _by_class(reference, synthetic, features, notes)
    result["per_hospital"] = _by_hospital(reference, synthetic, features, notes)
    result["ms_ssim"] = _ms_ssim(reference, synthetic, notes)
    result["path_length"] = _path_length(reference, generator, generator_labels, notes)
    return result


def _by_class(
    reference: RealReference, synthetic: ImageDataset, features: np.ndarray, notes: list[str]
) -> dict[str, Numbers | None]:
    """Fidelity per class: real images with the label against synthetic ones with it."""
    held = reference.held_out
    rows = {
        name: (np.flatnonzero(held.labels[:, k]), np.flatnonzero(synthetic.labels[:, k]))
        for k, name in enumerate(held.label_names)
    }
    normal = np.flatnonzero(held.labels.sum(1) == 0)
    if not held.exclusive and len(normal) and not names_normal(held.label_names):
        rows[NO_FINDING] = (normal, np.flatnonzero(synthetic.labels.sum(1) == 0))
    return _grouped(reference, features, rows, notes, "class")


def _by_hospital(
    reference: RealReference, synthetic: ImageDataset, features: np.ndarray, notes: list[str]
) -> dict[str, Numbers | None]:
    """Fidelity per hospital: its held-out images against synthetic ones in its label mix."""
    held = reference.held_out
    hospitals = institutions_of(held)
    rows = {}
    for hospital in np.unique(hospitals):
        real = np.flatnonzero(hospitals == hospital)
        mix = label_mix_rows(synthetic.labels, held.labels[real], reference.seed)
        rows[str(hospital)] = (real, mix.rows)
        notes += _mix_notes(
            str(hospital), len(mix.rows), mix.deviation, min(len(real) // 2, len(synthetic))
        )
        if missing := missing_share(synthetic.labels, held.labels[real]):
            notes.append(
                f"{missing:.0%} of the real images of {hospital} have labels that no synthetic "
                "image has."
            )
    return _grouped(reference, features, rows, notes, "hospital")


def _mix_notes(hospital: str, count: int, deviation: float, enough: int) -> list[str]:
    """Notes for a hospital whose label mix the synthetic set has in few images, or not exactly."""
    notes = []
    if 0 < count < enough:
        notes.append(
            f"Fidelity for {hospital} rests on {count} synthetic images where its real ones allow "
            f"{enough}: there are no more in its mix of labels, and none is used twice."
        )
    if deviation > NOTED_DEVIATION:
        notes.append(
            f"The synthetic images that {hospital} is compared with deviate from its mix of "
            f"labels: {deviation:.0%} of them would need other labels."
        )
    return notes


def _grouped(
    reference: RealReference,
    features: np.ndarray,
    rows: dict[str, tuple[np.ndarray, np.ndarray]],
    notes: list[str],
    what: str,
) -> dict[str, Numbers | None]:
    k = reference.settings.neighbours
    found = grouped_fidelity(
        reference.held_out_features,
        features,
        rows,
        reference.seed,
        k=k,
        patients=reference.held_out_groups,
    )
    if missing := [name for name, numbers in found.items() if numbers is None]:
        notes.append(
            f"Fidelity by {what} was not measured for {', '.join(missing)}: "
            f"fewer than {2 * k} images per side."
        )
    return found


def _ms_ssim(
    reference: RealReference, synthetic: ImageDataset, notes: list[str]
) -> dict[str, dict[str, float | None]] | None:
    """MS-SSIM of random pairs inside each class, of synthetic and of real training images."""
    train = reference.train
    if train.resolution < WINDOW:
        notes.append(
            f"MS-SSIM was not measured: images below {WINDOW} pixels have no scale that fits."
        )
        return None
    real, made = (
        intra_class_ms_ssim(
            data.images, data.labels, data.label_names, data.exclusive, seed=reference.seed
        )
        for data in (train, synthetic)
    )
    return {name: {"synthetic": made.get(name), "real": real.get(name)} for name in real}


def _path_length(
    reference: RealReference, generator: Any, labels: np.ndarray, notes: list[str]
) -> float | None:
    if generator is None:
        notes.append("The images come from several generators: there is no single path length.")
        return None
    extractor: Any = reference.extractor
    if isinstance(extractor, ReferenceExtractor):
        network = extractor.classifier.features
        return perceptual_path_length(
            generator,
            labels,
            lambda x: network(to_float(x)),
            PATHS,
            reference.seed,
            device=reference.device,
        )
    return perceptual_path_length(
        generator, labels, extractor.features, PATHS, reference.seed, device=reference.device
    )
