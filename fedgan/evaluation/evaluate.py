"""The final evaluation of a synthetic set: what it is worth to a classifier, and how it differs from real images.

The generator and every classifier see training images (or images made from them) alone; classifiers are chosen on
declared validation images. The test split gives the utility figures; validation and test images together are the real
side of the distances. `evaluation.suite` = quick leaves out what costs most; the arms of a comparison share one suite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedgan.data.dataset import OWN_PATIENT, ImageDataset
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
    label_mix_rows,
    missing_share,
)
from fedgan.evaluation.metrics.label_fidelity import label_fidelity
from fedgan.evaluation.metrics.ms_ssim import WINDOW, intra_class_ms_ssim
from fedgan.evaluation.metrics.path_length import perceptual_path_length
from fedgan.evaluation.metrics.utility import NO_FINDING, majority_scores, names_normal, utility
from fedgan.evaluation.mixing import SHARES, mixed_set, stratified_rows
from fedgan.evaluation.reference import RealReference, merged
from fedgan.evaluation.sampling import to_float

FEWEST_TEST_IMAGES = 2
FEWEST_HELD_OUT = 4
FEWEST_TO_SPLIT = 20  # synthetic images below which none is kept aside for validation
READ_IMAGES = 2000  # most synthetic images that real classifiers are tested on
WORTH_SAYING = 0.02  # deviation from a hospital's mix of labels beyond which there is a note
PATHS = 512  # of the perceptual path length


@dataclass(frozen=True)
class EvaluationResult:
    """`numbers`: the evaluator's part of evaluation.json; `scores` (S, N, K): probabilities of the real test images."""

    numbers: dict[str, Any]
    scores: np.ndarray | None


def evaluate_synthetic(
    reference: RealReference, synthetic: ImageDataset, generator: Any = None
) -> EvaluationResult:
    """Everything that evaluation.json says about a synthetic set: label_names, suite, utility, fidelity, label_fidelity, notes.

    `generator` made the set and gives its path length; None for a set of several generators. What cannot be computed is
    None, with a sentence in `notes`. Raises `FedganError` for data that do not fit.
    """
    made_labels = (
        synthetic.labels
    )  # the generator's own, which evaluation.label_map may merge for the classifiers
    synthetic = merged(synthetic, reference.settings.label_map)
    notes: list[str] = []
    worth, scores, reading = _utility(reference, synthetic, notes)
    numbers = {
        "label_names": list(synthetic.label_names),
        "suite": reference.settings.suite,
        "utility": worth,
        "fidelity": _fidelity(reference, synthetic, generator, made_labels, notes),
        "label_fidelity": reading,
        "notes": notes,
    }
    return EvaluationResult(numbers, scores)


# --- utility ---------------------------------------------------------------------------------------


def _utility(
    reference: RealReference, synthetic: ImageDataset, notes: list[str]
) -> tuple[dict[str, Any] | None, np.ndarray | None, dict[str, Any] | None]:
    """The utility block, the scores of the synthetic-only classifiers, and the label fidelity."""
    settings, test = reference.settings, reference.test
    if not reference.has_classes:
        notes.append(
            "The images have no classes to tell apart: there is no classifier and no utility."
        )
        return None, None, None
    if len(test) < FEWEST_TEST_IMAGES:
        notes.append("The real test split has fewer than two images: utility cannot be measured.")
        return None, None, None
    scores, aside = synthetic_only(reference, synthetic)
    reference.say("testing on real images")
    majority = majority_scores(reference.train.labels, len(test), test.exclusive)
    result: dict[str, Any] = {
        "classifier": reference.classifier_name,
        "seeds": settings.seeds,
        "steps": reference.steps,
        "batch": BATCH,
        "selection": SELECTION_BY_VALIDATION
        if reference.validation is not None and aside
        else SELECTION,
        "validation": _declared(reference, aside),
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
    reading = _read(reference, synthetic)
    result["real_on_synthetic"] = reading.pop("utility")
    result["mixed"] = _mixed(reference, synthetic, notes)
    return result, scores, reading


def synthetic_only(reference: RealReference, synthetic: ImageDataset) -> tuple[np.ndarray, int]:
    """Scores (S, N, K) of the test images by classifiers that saw synthetic images alone, and how many chose among them."""
    train, validation = synthetic, None
    if len(synthetic) >= FEWEST_TO_SPLIT:
        train, validation = split_for_validation(synthetic, seed=reference.seed)
    classifiers = []
    for number in range(reference.settings.seeds):
        reference.say(f"training synthetic classifier {number + 1} of {reference.settings.seeds}")
        classifiers.append(reference.fit(train, validation, number))
    return reference.score(classifiers, reference.test), len(validation) if validation else 0


def _mixed(
    reference: RealReference, synthetic: ImageDataset, notes: list[str]
) -> list[dict[str, Any]]:
    """Utility of classifiers trained on all real and some synthetic images, a row a share."""
    rows = []
    for share in SHARES:
        try:
            both = mixed_set(reference.train, synthetic, share, reference.seed)
        except DataError as error:
            notes.append(f"Real + {share} × synthetic was not measured: {error}.")
            continue
        reference.say(f"training on real + {share} × synthetic")
        classifiers = [
            reference.fit(both, reference.validation, number)
            for number in range(reference.settings.seeds)
        ]
        figures = reference.utility(reference.score(classifiers, reference.test))
        rows.append(
            {"share": share, "synthetic_images": len(both) - len(reference.train), **figures}
        )
    return rows


def _read(reference: RealReference, synthetic: ImageDataset) -> dict[str, Any]:
    """What real-trained classifiers read in synthetic images: `utility` on them, and label fidelity beside that of real ones."""
    part = synthetic.take(
        stratified_rows(synthetic.labels, min(len(synthetic), READ_IMAGES), reference.seed)
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


def _declared(reference: RealReference, aside: int) -> str:
    """Which images classifiers were chosen on, in words."""
    real = (
        f"{len(reference.val)} images of the real validation split"
        if len(reference.val)
        else "none"
    )
    synthetic = f"{aside} synthetic images kept aside" if aside else "none"
    return (
        f"trained on real or mixed images: {real}; trained on synthetic images alone: {synthetic}"
    )


def _resampled(test: ImageDataset) -> str:
    """What the bootstrap drew: patients, images, or patients where they are known."""
    known = [
        bool(patient) and not str(patient).startswith(OWN_PATIENT) for patient in test.patients
    ]
    if not any(known):
        return "images"
    return "patients" if all(known) else "patients where they are known"


def _class_notes(metrics: dict[str, Any]) -> list[str]:
    """Sentences for the classes and institutions whose AUC is not defined."""
    notes = []
    for label, row in metrics["per_class"].items():
        if row["auc"] is None:
            what = "positive" if row["positives"] == 0 else "negative"
            notes.append(
                f"'{label}' has no {what} image in the real test split: its AUC is null and not in the macro mean."
            )
    for place, inside in metrics["per_institution"].items():
        undefined = [label for label, row in inside["per_class"].items() if row["auc"] is None]
        if inside["macro_auc"] is None:
            notes.append(
                f"Inside {place} no class has both positive and negative test images: its AUC is null."
            )
        elif undefined:
            notes.append(
                f"Inside {place} the AUC is undefined for {', '.join(undefined)}: its macro mean is over the other classes."
            )
    return notes


# --- fidelity and diversity ------------------------------------------------------------------------


def _fidelity(
    reference: RealReference,
    synthetic: ImageDataset,
    generator: Any,
    made_labels: np.ndarray,
    notes: list[str],
) -> dict[str, Any] | None:
    if not reference.can_extract:
        notes.append(
            "The images have no classes to train the reference extractor on: "
            "set evaluation.features to a weights file for Fréchet and kernel distances."
        )
        return None
    if len(reference.val) + len(reference.test) < FEWEST_HELD_OUT:
        notes.append("Fewer than four held-out real images: distances cannot be measured.")
        return None
    reference.say("measuring distances")
    features, extractor, k = (
        reference.extractor(synthetic.images),
        reference.extractor,
        reference.settings.neighbours,
    )
    real, patients = reference.held_out_features, reference.held_out_groups
    measured = fidelity(real, features, reference.seed, k=k, patients=patients)
    if int(str(measured["images"])) <= features.shape[1]:
        notes.append(
            f"The distances rest on {measured['images']} images a side for {features.shape[1]} features: "
            "read the Fréchet distance beside its floor only."
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
    result["ms_ssim"] = _structure(reference, synthetic, notes)
    result["path_length"] = _path_length(reference, generator, made_labels, notes)
    return result


def _by_class(
    reference: RealReference, synthetic: ImageDataset, features: np.ndarray, notes: list[str]
) -> dict[str, Numbers | None]:
    """Fidelity inside each class: real images that have the label against synthetic ones that were asked for it."""
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
    """Fidelity for each hospital: its held-out images against synthetic ones in its own mix of labels."""
    held = reference.held_out
    places = (
        np.asarray(held.institutions)
        if len(held.institutions) == len(held)
        else np.full(len(held), held.name)
    )
    rows = {}
    for place in np.unique(places):
        real = np.flatnonzero(places == place)
        mix = label_mix_rows(synthetic.labels, held.labels[real], reference.seed)
        rows[str(place)] = (real, mix.rows)
        notes += _mix_notes(
            str(place), len(mix.rows), mix.deviation, min(len(real) // 2, len(synthetic))
        )
        if lacking := missing_share(synthetic.labels, held.labels[real]):
            notes.append(
                f"{lacking:.0%} of the real images of {place} have labels that no synthetic image has."
            )
    return _grouped(reference, features, rows, notes, "hospital")


def _mix_notes(place: str, count: int, deviation: float, enough: int) -> list[str]:
    """Sentences for a hospital whose label mix the synthetic set holds in few images, or not as it is."""
    notes = []
    if 0 < count < enough:
        notes.append(
            f"Fidelity for {place} rests on {count} synthetic images where its real ones allow {enough}: "
            "there are no more in its mix of labels, and none is taken twice."
        )
    if deviation > WORTH_SAYING:
        notes.append(
            f"The synthetic images that {place} is compared with are not quite in its mix of labels: "
            f"{deviation:.0%} of them would need other labels."
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
            f"Fidelity by {what} was not measured for {', '.join(missing)}: fewer than {2 * k} images on a side."
        )
    return found


def _structure(
    reference: RealReference, synthetic: ImageDataset, notes: list[str]
) -> dict[str, dict[str, float | None]] | None:
    """MS-SSIM of random pairs inside each class, of synthetic images and beside them of real training images."""
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
        notes.append("The images come from several generators: there is no one path length.")
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
