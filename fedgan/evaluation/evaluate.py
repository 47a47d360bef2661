"""The final evaluation: classifiers trained on real and on synthetic images, tested on real ones, and distances.

The generator and every classifier see training images (or images made from them) alone. The test split gives the
utility figures; validation and test images together are the real side of the distances.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from fedgan.config import EvaluationSettings
from fedgan.data.dataset import OWN_PATIENT, ImageDataset, pool
from fedgan.data.labels import LabelMap
from fedgan.errors import DataError
from fedgan.evaluation.bootstrap import clusters
from fedgan.evaluation.classification import BATCH, SELECTION, probabilities, train_classifier, training_steps
from fedgan.evaluation.features import Extractor, ReferenceExtractor, SqueezeNetExtractor
from fedgan.evaluation.fidelity import fidelity
from fedgan.evaluation.utility import utility
from fedgan.models.classifiers import Classifier

Progress = Callable[[str], None]
FEWEST_TEST_IMAGES = 2
FEWEST_HELD_OUT = 4


class RealReference:
    """What an evaluation needs of the real images. Everything is computed when first asked for, and then kept.

    The first real classifier serves three ends: the extractor while training goes on, the extractor of the final
    distances, and the first seed of the real arm; it is trained once.
    """

    def __init__(
        self,
        train: ImageDataset,
        val: ImageDataset,
        test: ImageDataset,
        settings: EvaluationSettings,
        seed: int = 0,
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        if len(train) == 0:
            raise DataError("the evaluator has no real training image: check the splits of the shards")
        self.train, self.val, self.test = (merged(dataset, settings.label_map) for dataset in (train, val, test))
        self.settings, self.seed, self.device, self.classifier_name = settings, seed, device, settings.classifier
        self.steps = training_steps(len(train), settings.epochs)
        self._progress = progress
        self._classifiers: dict[int, Classifier] = {}
        self._features: dict[str, np.ndarray] = {}

    @property
    def has_classes(self) -> bool:
        """Whether there is anything for a classifier to learn."""
        return self.train.label_dim >= (2 if self.train.exclusive else 1)

    @property
    def can_extract(self) -> bool:
        """Whether distances can be computed: an own weights file, or labels to train the reference classifier on."""
        return self.settings.features != "reference" or self.has_classes

    @cached_property
    def extractor(self) -> Extractor:
        """The extractor that `evaluation.features` names. Raises `ConfigError` or `DataError` for an unusable file."""
        if self.settings.features == "reference":
            return ReferenceExtractor(self.classifier(0), self.device)
        return SqueezeNetExtractor(self.settings.features, self.device)

    def classifier(self, number: int) -> Classifier:
        """Real classifier number `number`, trained with seed `seed + number` on the real training split."""
        if number not in self._classifiers:
            self.say(f"training real classifier {number + 1} of {self.settings.seeds}")
            self._classifiers[number] = train_classifier(
                self.train, self.steps, self.seed + number, self.classifier_name, self.device
            )
        return self._classifiers[number]

    def features(self, split: str) -> np.ndarray:
        """Features (N, D) of the real images of 'train', 'val' or 'test'."""
        if split not in self._features:
            dataset: ImageDataset = getattr(self, split)
            self._features[split] = self.extractor(dataset.images)
        return self._features[split]

    @cached_property
    def held_out(self) -> np.ndarray:
        """Features (N, D) of all real images that nothing was trained on: validation and test."""
        return np.concatenate([self.features(split) for split in ("val", "test") if len(getattr(self, split))])

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Utility of the real arm."""
        return self.utility([self.classifier(number) for number in range(self.settings.seeds)])

    def utility(self, classifiers: list[Classifier]) -> dict[str, Any]:
        """Utility of some classifiers over all test images and inside each institution."""
        test = self.test
        scores = np.stack([probabilities(classifier, test, self.device) for classifier in classifiers])
        groups = clusters(test.patients, test.institutions, len(test))

        def measure(rows: np.ndarray) -> dict[str, Any]:
            inside = np.unique(groups[rows], return_inverse=True)[1].reshape(-1)
            return utility(
                scores[:, rows], test.labels[rows], test.label_names, test.exclusive, inside, self.settings.bootstrap, self.seed
            )

        places = np.asarray(test.institutions) if len(test.institutions) == len(test) else np.full(len(test), test.name)
        return {
            **measure(np.arange(len(test))),
            "per_institution": {str(place): measure(np.flatnonzero(places == place)) for place in np.unique(places)},
        }

    def say(self, text: str) -> None:
        """Report progress, where somebody listens."""
        if self._progress is not None:
            self._progress(text)


def evaluate_synthetic(
    train: ImageDataset,
    val: ImageDataset,
    test: ImageDataset,
    synthetic: ImageDataset,
    settings: EvaluationSettings,
    seed: int = 0,
    progress: Progress | None = None,
    reference: RealReference | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Everything that evaluation.json says about a synthetic set: `label_names`, `utility`, `fidelity`, `notes`.

    `reference` (made once by the caller) spares training the real classifiers again for a further synthetic set.
    What cannot be computed is None, with a sentence in `notes`. Raises `FedganError` for data that do not fit.
    """
    reference = reference or RealReference(train, val, test, settings, seed, device, progress=progress)
    synthetic = merged(synthetic, settings.label_map)
    notes: list[str] = []
    return {
        "label_names": list(synthetic.label_names),
        "utility": _utility(reference, synthetic, notes),
        "fidelity": _fidelity(reference, synthetic, notes),
        "notes": notes,
    }


def _utility(reference: RealReference, synthetic: ImageDataset, notes: list[str]) -> dict[str, Any] | None:
    settings, test = reference.settings, reference.test
    if not reference.has_classes:
        notes.append("The images have no classes to tell apart: there is no classifier and no utility.")
        return None
    if len(test) < FEWEST_TEST_IMAGES:
        notes.append("The real test split has fewer than two images: utility cannot be measured.")
        return None
    classifiers = []
    for number in range(settings.seeds):
        reference.say(f"training synthetic classifier {number + 1} of {settings.seeds}")
        classifiers.append(
            train_classifier(synthetic, reference.steps, reference.seed + number, reference.classifier_name, reference.device)
        )
    reference.say("testing on real images")
    result: dict[str, Any] = {
        "classifier": reference.classifier_name,
        "seeds": settings.seeds,
        "steps": reference.steps,
        "batch": BATCH,
        "selection": SELECTION,
        "bootstrap": settings.bootstrap,
        "resampled": _resampled(test),
        "real": reference.metrics,
        "synthetic": reference.utility(classifiers),
        "train_images": len(reference.train),
        "synthetic_images": len(synthetic),
        "test_images": len(test),
    }
    notes += _class_notes(result["real"])
    return result


def _resampled(test: ImageDataset) -> str:
    """What the bootstrap drew: patients, images, or patients where they are known."""
    known = [bool(patient) and not str(patient).startswith(OWN_PATIENT) for patient in test.patients]
    if not any(known):
        return "images"
    return "patients" if all(known) else "patients where they are known"


def _class_notes(metrics: dict[str, Any]) -> list[str]:
    """Sentences for the classes and institutions whose AUC is not defined."""
    notes = []
    for label, row in metrics["per_class"].items():
        if row["auc"] is None:
            what = "positive" if row["positives"] == 0 else "negative"
            notes.append(f"'{label}' has no {what} image in the real test split: its AUC is null and not in the macro mean.")
    for place, inside in metrics["per_institution"].items():
        undefined = [label for label, row in inside["per_class"].items() if row["auc"] is None]
        if inside["macro_auc"] is None:
            notes.append(f"Inside {place} no class has both positive and negative test images: its AUC is null.")
        elif undefined:
            notes.append(
                f"Inside {place} the AUC is undefined for {', '.join(undefined)}: its macro mean is over the other classes."
            )
    return notes


def _fidelity(reference: RealReference, synthetic: ImageDataset, notes: list[str]) -> dict[str, Any] | None:
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
    features = reference.extractor(synthetic.images)
    measured = fidelity(reference.held_out, features, reference.seed)
    if measured["images"] <= features.shape[1]:
        notes.append(
            f"The distances rest on {measured['images']} images a side for {features.shape[1]} features: "
            "read the Fréchet distance beside its floor only."
        )
    return {"extractor": reference.extractor.name, "real": "validation and test images", **measured}


def merged(dataset: ImageDataset, label_map: str) -> ImageDataset:
    """The dataset with its labels merged by `evaluation.label_map` (empty: as it is).

    Raises `DataError` for a label without a rule.
    """
    if not label_map:
        return dataset
    labels, names = LabelMap.parse(label_map).apply(dataset.labels, dataset.label_names)
    return dataclasses.replace(dataset, labels=labels, label_names=names)


def with_places(dataset: ImageDataset, place: str) -> ImageDataset:
    """The dataset with an institution for each image (`place` where none is given) and patients or blanks: fit to be pooled."""
    count = len(dataset)
    institutions = dataset.institutions if len(dataset.institutions) == count else np.full(count, place)
    patients = dataset.patients if len(dataset.patients) == count else np.full(count, "")
    return dataclasses.replace(
        dataset, institutions=np.where(np.asarray(institutions) == "", place, institutions), patients=np.asarray(patients, str)
    )


def pool_places(datasets: list[tuple[str, ImageDataset]], name: str) -> ImageDataset:
    """All images of several hospitals, given as (name, dataset), with their institutions kept."""
    return pool([with_places(dataset, place) for place, dataset in datasets], name)
