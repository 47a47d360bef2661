"""Refuse settings and networks that void the guarantee, each with its reason and alternative.

A guarantee holds for a mechanism, not for the number of an accountant. Each rule names a part of a
GAN's training that reads private images outside the clipped and noisy gradient, or that breaks an
assumption of the accountant.

Two more parts would void it and do not exist here. No checkpoint is selected by a metric: the
result of a run is its last round, and `fedgan generate` takes that or a named file. (Comparing
rounds on private images and releasing the best one is a selection that is not accounted.) And no
loss of the generator uses a classifier: those of the evaluator are trained after the run, on
released images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedgan.config import Settings
from fedgan.data.dataset import ImageDataset
from fedgan.errors import ConfigError
from fedgan.privacy.step import releases_labels

SHOWN = (
    "evaluation.show_real = 'all': the report would show training images; use 'none', or 'phantoms'"
)
PROBES = 4  # noise images on which D is tested for mixing


def check_private(settings: Settings) -> None:
    """Raise `ConfigError` with all that voids the guarantee; no-op where privacy is off."""
    if settings.privacy.on and (found := list(refusals(settings))):
        raise ConfigError("privacy is on, but its guarantee would not hold: " + "; ".join(found))


def refusals(settings: Settings) -> Iterator[str]:
    """Settings that void the guarantee, as 'key = value: why; what instead'."""
    training, model, augment, privacy = (
        settings.training,
        settings.model,
        settings.augment,
        settings.privacy,
    )
    if privacy.epsilon > 0 and privacy.noise_multiplier >= 0:
        yield "privacy.epsilon and privacy.noise_multiplier both set the noise: give one of them"
    if model.minibatch_std_group:
        yield (
            f"model.minibatch_std_group = {model.minibatch_std_group}: other images of the batch "
            "change an image's gradient, so clipping each bounds nothing; set it to 0"
        )
    if augment.mode == "ada" and not privacy.r_t_noise:
        yield (
            "augment.mode = 'ada': p follows D's signs on real images, which are not accounted; "
            "use 'fixed' with augment.p, or release the signs with noise: privacy.r_t_noise"
        )
    if training.r1_gamma != 0 and not privacy.r1:
        yield (
            f"training.r1_gamma = {training.r1_gamma:g}: R1 is a gradient at real images outside "
            "the clipped loss; set it to 0, or privacy.r1 = true for one inside"
        )
    if training.sampling == "shuffle":
        yield (
            "training.sampling = 'shuffle': the accountant assumes secret Poisson samples; use "
            "'auto'"
        )
    if training.labels == "data" and not releases_labels(settings):
        yield (
            "training.labels = 'data': the generator's labels follow the counts of real labels; "
            "use 'uniform', or release the counts with noise: privacy.label_noise"
        )
    if settings.federation.share_label_counts:
        yield (
            "federation.share_label_counts = true: the server would receive the real label counts "
            "without noise; set it to false, and with it model.hospitals = 0, which samples by them"
        )
    if privacy.unit == "patient" and not privacy.images_per_patient:
        yield (
            "privacy.images_per_patient = 0: the work and memory of a step would grow with a "
            "patient's images, without a bound; give one, e.g. 8"
        )
    if settings.data.partition == "quantities":
        yield (
            "data.partition = 'quantities': who else is in the pool decides whether a hospital "
            "gets a patient, so epsilon says nothing of the source; use 'iid' or 'dirichlet'"
        )
    evaluation, root = settings.evaluation, settings.data.root
    if evaluation.show_real == "all" and root and _are_nested(root, evaluation.root or root):
        yield SHOWN


def check_shown(
    settings: Settings, trained: Iterable[ImageDataset], shown: Iterable[ImageDataset]
) -> None:
    """Raise `ConfigError` where the report of a private run would show a training image.

    Images are compared by their content: the images of `evaluation.root` may be a copy. A deployed
    server cannot compare them, as it has no training image.
    """
    if not settings.privacy.on or settings.evaluation.show_real != "all":
        return
    known = {digest for dataset in trained for digest in _digests(dataset)}
    if any(digest in known for dataset in shown for digest in _digests(dataset)):
        raise ConfigError(f"privacy is on, but evaluation.root holds training images, and {SHOWN}")


def _are_nested(one: str, other: str) -> bool:
    first, second = (Path(path).expanduser().resolve() for path in (one, other))
    return first == second or first in second.parents or second in first.parents


def _digests(dataset: ImageDataset) -> Iterator[bytes]:
    rows = (dataset.images[np.array([row])] for row in range(len(dataset)))
    return (hashlib.sha256(image.tobytes()).digest() for image in rows)


def check_modules(discriminator: nn.Module, dataset: ImageDataset) -> None:
    """Raise `ConfigError` when D's layers mix images: a gradient is then not that of one image.

    Layers with batch or running statistics are found by their type; others by the derivative of one
    image's logit at the other images, on noise images of the dataset's shape.
    """
    for name, module in discriminator.named_modules():
        instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
        if isinstance(module, nn.modules.batchnorm._NormBase) and (
            not instance or module.track_running_stats
        ):
            raise ConfigError(
                f"privacy is on, but D's layer {name} ({type(module).__name__}) takes statistics "
                "over other images: a gradient is then not that of one image; use a layer without "
                "them, e.g. GroupNorm"
            )
    device, rng = next(discriminator.parameters()).device, torch.Generator().manual_seed(0)
    images = torch.randn(
        PROBES, dataset.channels, dataset.resolution, dataset.resolution, generator=rng
    ).to(device)
    labels = torch.rand(PROBES, dataset.label_dim, generator=rng).to(device)
    with torch.enable_grad():
        logits = discriminator(images.requires_grad_(True), labels)
        slopes = torch.stack(
            [torch.autograd.grad(logit, images, retain_graph=True)[0] for logit in logits]
        )
    if bool(slopes.flatten(2).abs().amax(dim=2).fill_diagonal_(0.0).any()):
        raise ConfigError(
            "privacy is on, but D's logit of an image depends on the other images of the batch (as "
            "by minibatch-std): clipping each gradient bounds nothing; set "
            "model.minibatch_std_group = 0, or use layers that do not mix images"
        )


def check_start(settings: Settings, path: Path, meta: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a warm start whose training images are not known to be public.

    `meta`: of the checkpoint. `phantoms` in it: all hospitals declared phantoms. The settings alone
    are not enough, because a deployed hospital has its own data while `data.root` is empty. The
    model that this run started from may be private too.
    """
    if not settings.privacy.on or settings.privacy.public_start:
        return
    origin = meta.get("settings")
    if not origin:
        what = "has no record of its training data"
    elif meta.get("phantoms") is not True:
        root = origin.get("data", {}).get("root")
        what = (
            "was trained on images of a data.root"
            if root
            else "has no record that all its images were phantoms"
        )
    elif origin.get("training", {}).get("warm_start"):
        what = "started from another model"
    else:
        return
    raise ConfigError(
        f"training.warm_start = {path.name} {what}: if its images are private, their privacy cost "
        "is not accounted; start from phantoms, or declare them public: privacy.public_start = "
        "true"
    )
