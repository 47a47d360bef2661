"""The real side of an evaluation: real classifiers, their scores, and features of real images.

Everything is computed on first use and cached; with a folder also on disk, so all arms of a
comparison share the same classifiers and extractor in all processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgan.config import EvaluationSettings
from fedgan.data.dataset import ImageArray, ImageDataset, pool, unit_numbers
from fedgan.data.labels import LabelMap
from fedgan.errors import CheckpointError, DataError
from fedgan.evaluation.classification import probabilities, train_classifier, training_steps
from fedgan.evaluation.feature_cache import FeatureCache, images_hash
from fedgan.evaluation.features import REFERENCE, Extractor, ReferenceExtractor, extractor_from
from fedgan.evaluation.metrics.frechet_distance import frechet_distance
from fedgan.evaluation.metrics.utility import utility
from fedgan.models.classifiers import Classifier, build_classifier
from fedgan.training.checkpoint import load_into, load_tensors, save_tensors

OnProgress = Callable[[str], None]
QUICK_IMAGES = 1000  # at most, of a distance during training
MIN_VALIDATION = 100  # with fewer, training images replace validation images in a curve


class RealReference:
    """The real classifiers, scores and features of an evaluation.

    The first real classifier is trained once and has three uses: extractor during training,
    extractor of the final distances, first seed of the real arm. Classifiers are selected on the
    validation split; nothing is selected on the test split. `folder`: cache of classifiers and
    features, None for none.
    """

    def __init__(
        self,
        train: ImageDataset,
        val: ImageDataset,
        test: ImageDataset,
        settings: EvaluationSettings,
        seed: int = 0,
        device: str = "cpu",
        on_progress: OnProgress | None = None,
        folder: Path | None = None,
    ) -> None:
        if len(train) == 0:
            raise DataError(
                "the evaluator has no real training image: check the splits of the shards"
            )
        self.train, self.val, self.test = (
            merged(dataset, settings.label_map) for dataset in (train, val, test)
        )
        self.settings, self.seed, self.device, self.folder = settings, seed, device, folder
        self.classifier_name = settings.classifier
        self.steps = training_steps(len(train), settings.epochs)
        self.on_progress = on_progress or (lambda text: None)
        self._classifiers: dict[int, Classifier] = {}
        self._features: dict[str, np.ndarray] = {}
        self._cache = FeatureCache(folder / "features") if folder else None

    # --- capabilities ----------------------------------------------------------------------------

    @property
    def has_classes(self) -> bool:
        """Whether a classifier has classes to learn."""
        return self.train.label_dim >= (2 if self.train.exclusive else 1)

    @property
    def can_extract(self) -> bool:
        """Whether distances can be computed: by a weights file or the reference classifier."""
        return self.settings.features != REFERENCE or self.has_classes

    @property
    def validation(self) -> ImageDataset | None:
        """The real images on which real-trained classifiers are selected, if any."""
        return self.val if len(self.val) else None

    # --- classifiers -----------------------------------------------------------------------------

    def classifier(self, number: int) -> Classifier:
        """Real classifier `number`, trained with seed `seed + number`."""
        if number not in self._classifiers:
            self._classifiers[number] = self._cached_classifier(number) or self._train_classifier(
                number
            )
        return self._classifiers[number]

    def fit(
        self, dataset: ImageDataset, validation: ImageDataset | None, number: int
    ) -> Classifier:
        """Train a classifier by the common recipe, with at most as many steps as the real ones."""
        seed, precision = self.seed + number, self.settings.precision
        return train_classifier(
            dataset,
            self.steps,
            seed,
            self.classifier_name,
            self.device,
            validation=validation,
            precision=precision,
        )

    @cached_property
    def scores(self) -> np.ndarray:
        """Probabilities (S, N, K) of the test images by the real classifiers (TRTR)."""
        return self.score(
            [self.classifier(number) for number in range(self.settings.seeds)], self.test
        )

    def score(self, classifiers: list[Classifier], dataset: ImageDataset) -> np.ndarray:
        """Probabilities (S, N, K) of a dataset's images."""
        return np.stack(
            [probabilities(classifier, dataset, self.device) for classifier in classifiers]
        )

    # --- figures on the test images --------------------------------------------------------------

    @cached_property
    def test_groups(self) -> np.ndarray:
        """Cluster (N,) of each test image: its patient."""
        return unit_numbers(self.test)

    @property
    def test_institutions(self) -> np.ndarray:
        """Institution (N,) of each test image."""
        return institutions_of(self.test)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Utility of the real arm."""
        return self.utility(self.scores)

    def utility(self, scores: np.ndarray, institutions: bool = True) -> dict[str, Any]:
        """Utility of scores (S, N, K) over all test images, and inside each institution."""
        found = self._measure(scores, np.arange(len(self.test)))
        if institutions:
            names = self.test_institutions
            found["per_institution"] = {
                str(name): self._measure(scores, np.flatnonzero(names == name))
                for name in np.unique(names)
            }
        return found

    def _measure(self, scores: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
        test, settings = self.test, self.settings
        inside = np.unique(self.test_groups[rows], return_inverse=True)[1].reshape(-1)
        return utility(
            scores[:, rows],
            test.labels[rows],
            test.label_names,
            test.exclusive,
            inside,
            settings.bootstrap,
            self.seed,
        )

    # --- features --------------------------------------------------------------------------------

    @cached_property
    def extractor(self) -> Extractor:
        """The extractor of `evaluation.features`. Raises as `extractor_from`."""
        if self.settings.features == REFERENCE:
            return ReferenceExtractor(self.classifier(0), self.device)
        return extractor_from(self.settings.features, self.device)

    def features(self, split: str) -> np.ndarray:
        """Features (N, D) of the real images of 'train', 'val' or 'test'."""
        if split not in self._features:
            dataset: ImageDataset = getattr(self, split)
            self._features[split] = self._extract(dataset.images)
        return self._features[split]

    @cached_property
    def held_out(self) -> ImageDataset:
        """All real images that are not trained on: validation and test."""
        parts = [dataset for dataset in (self.val, self.test) if len(dataset)]
        return pool(parts, "held out") if len(parts) > 1 else parts[0]

    @cached_property
    def held_out_features(self) -> np.ndarray:
        """Features (N, D) of `held_out`, in its order."""
        return np.concatenate(
            [self.features(split) for split in ("val", "test") if len(getattr(self, split))]
        )

    @cached_property
    def held_out_groups(self) -> np.ndarray:
        """Cluster (N,) of each held-out image: its patient."""
        return unit_numbers(self.held_out)

    @cached_property
    def quick(self) -> tuple[str, np.ndarray]:
        """Split and real features (n, D) of the curve during training."""
        split = "val" if len(self.val) >= MIN_VALIDATION else "train"
        dataset: ImageDataset = getattr(self, split)
        count = min(len(dataset), QUICK_IMAGES, self.settings.images)
        if split == "val" and count == len(dataset):
            return split, self.features("val")
        rows = np.sort(np.random.default_rng(self.seed).permutation(len(dataset))[:count])
        return split, self._extract(dataset.take(rows).images)

    def quick_distance(self, synthetic: ImageArray) -> dict[str, Any]:
        """A point of a curve: {"frechet", "extractor", "images", "split"}.

        `synthetic`: as many images as `quick` has real ones.
        """
        split, real = self.quick
        distance = frechet_distance(real, self.extractor(synthetic))
        return {
            "frechet": distance,
            "extractor": self.extractor.name,
            "images": len(real),
            "split": split,
        }

    # --- cache on disk ---------------------------------------------------------------------------

    @cached_property
    def test_hash(self) -> str:
        """sha256 of the test images and labels: arms are comparable only if it is equal."""
        return _dataset_hash(self.test)

    def _extract(self, images: ImageArray) -> np.ndarray:
        return (
            self._cache.features(images, self.extractor) if self._cache else self.extractor(images)
        )

    @cached_property
    def _recipe(self) -> str:
        """sha256 of everything that a real classifier depends on, except its number."""
        facts = {
            "train": _dataset_hash(self.train),
            "val": _dataset_hash(self.val),
            "classifier": self.classifier_name,
            "precision": self.settings.precision,
            "steps": self.steps,
            "seed": self.seed,
            "threads": torch.get_num_threads(),
            "device": self.device,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _classifier_file(self, number: int) -> Path | None:
        return self.folder / f"classifier-{number}.safetensors" if self.folder else None

    def _train_classifier(self, number: int) -> Classifier:
        self.on_progress(f"training real classifier {number + 1} of {self.settings.seeds}")
        classifier = self.fit(self.train, self.validation, number)
        if path := self._classifier_file(number):
            save_tensors(path, classifier.state_dict(), {"recipe": self._recipe})
        return classifier

    def _cached_classifier(self, number: int) -> Classifier | None:
        """The classifier cached for this reference; None if absent or of another recipe."""
        path = self._classifier_file(number)
        if path is None or not path.is_file():
            return None
        train = self.train
        classifier = build_classifier(
            self.classifier_name, train.channels, train.resolution, train.label_dim
        )
        try:
            tensors, meta = load_tensors(path)
            if meta.get("recipe") != self._recipe:
                return None
            load_into(classifier, tensors, str(path))
        except CheckpointError:  # damaged: train it again
            return None
        layout = {"device": torch.device(self.device), "memory_format": torch.channels_last}
        network = classifier.to(**layout)  # type: ignore[call-overload]
        result: Classifier = network.eval()
        return result


def merged(dataset: ImageDataset, label_map: str) -> ImageDataset:
    """The dataset with labels merged by `evaluation.label_map` (empty: unchanged).

    Raises `DataError` for a label without a rule.
    """
    if not label_map:
        return dataset
    labels, names = LabelMap.parse(label_map).apply(dataset.labels, dataset.label_names)
    return dataclasses.replace(dataset, labels=labels, label_names=names)


def institutions_of(dataset: ImageDataset) -> np.ndarray:
    """Institution (N,) of each image; the dataset's name where none is given."""
    count = len(dataset)
    given = len(dataset.institutions) == count
    return np.asarray(dataset.institutions) if given else np.full(count, dataset.name)


def with_institutions(dataset: ImageDataset, name: str) -> ImageDataset:
    """The dataset with an institution (`name` if not given) and a patient or blank per image."""
    count = len(dataset)
    institutions = (
        dataset.institutions if len(dataset.institutions) == count else np.full(count, name)
    )
    patients = dataset.patients if len(dataset.patients) == count else np.full(count, "")
    return dataclasses.replace(
        dataset,
        institutions=np.where(np.asarray(institutions) == "", name, institutions),
        patients=np.asarray(patients, str),
    )


def pool_hospitals(datasets: list[tuple[str, ImageDataset]], name: str) -> ImageDataset:
    """All images of several hospitals, given as (name, dataset), with institutions."""
    return pool([with_institutions(dataset, hospital) for hospital, dataset in datasets], name)


def _dataset_hash(dataset: ImageDataset) -> str:
    digest = hashlib.sha256(images_hash(dataset.images).encode())
    digest.update(np.ascontiguousarray(dataset.labels, np.uint8).tobytes())
    digest.update("|".join(dataset.label_names).encode())
    return digest.hexdigest()
