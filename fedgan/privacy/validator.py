"""What would void the guarantee without a word: refused when privacy is on, each with its reason and what to use instead.

A guarantee holds for a mechanism, not for a number that an accountant prints. Each rule here names a part of a GAN's
training that reads private images past the clipped and noisy gradient, or that makes the accountant's assumptions false.

Two more parts void it where they exist, and here they do not, so that there is nothing to refuse. No checkpoint is chosen by
a figure: a run's result is its last round, and `fedgan generate` takes that or the file that a person names. (A person who
compares rounds on private images and releases the best has released a choice that nobody counted.) And no loss of the
generator uses a classifier: those that judge are trained after the run, on what it released.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedgan.config import Settings
from fedgan.data.dataset import ImageDataset
from fedgan.errors import ConfigError
from fedgan.privacy.step import releases_labels

PROBES = 4  # images of a batch by which D is asked whether it keeps them apart


def check_private(settings: Settings) -> None:
    """Raise `ConfigError` that lists all that voids the guarantee; nothing where privacy is off."""
    if settings.privacy.on and (found := list(refusals(settings))):
        raise ConfigError("privacy is on, but its guarantee would not hold: " + "; ".join(found))


def refusals(settings: Settings) -> Iterator[str]:
    """Each part of the settings that voids the guarantee: 'key = value: why; what instead'."""
    training, model, augment, privacy = (
        settings.training,
        settings.model,
        settings.augment,
        settings.privacy,
    )
    if privacy.epsilon > 0 and privacy.noise_multiplier >= 0:
        yield "privacy.epsilon and privacy.noise_multiplier both say how much noise: give one of them"
    if model.minibatch_std_group:
        yield (
            f"model.minibatch_std_group = {model.minibatch_std_group}: other images of the batch move an image's gradient, "
            "so clipping each bounds nothing; set it to 0"
        )
    if augment.mode == "ada" and not privacy.r_t_noise:
        yield (
            "augment.mode = 'ada': p follows D's signs on real images, which nobody accounts for; use 'fixed' with augment.p, "
            "or release the signs with noise: privacy.r_t_noise"
        )
    if training.r1_gamma != 0 and not privacy.r1:
        yield (
            f"training.r1_gamma = {training.r1_gamma:g}: R1 is a gradient at real images outside the clipped loss; set it "
            "to 0, or privacy.r1 = true for one inside"
        )
    if training.sampling == "shuffle":
        yield (
            "training.sampling = 'shuffle': the accountant counts on Poisson samples, of which nobody knows who is in them; "
            "use 'auto'"
        )
    if training.labels == "data" and not releases_labels(settings):
        yield (
            "training.labels = 'data': the generator's labels follow the counts of real labels; use 'uniform', or release "
            "the counts with noise: privacy.label_noise"
        )
    if settings.federation.share_label_counts:
        yield (
            "federation.share_label_counts = true: the server would learn the real counts of labels, without noise; set it to "
            "false, and with it model.hospitals = 0, which draws by them"
        )
    if (
        settings.evaluation.show_real == "all"
        and settings.data.root
        and not settings.evaluation.root
    ):
        yield (
            "evaluation.show_real = 'all': pictures of the training images themselves would stand on the page; use 'none', or "
            "'phantoms'"
        )


def check_modules(discriminator: nn.Module, dataset: ImageDataset) -> None:
    """Raise `ConfigError` when a layer of D ties images to one another: their gradients are then not one image's.

    Layers with statistics over a batch, or running ones, are found by their kind; whatever else mixes images by the
    derivative of one image's logit at the others, on images of noise of the dataset's shape.
    """
    for name, module in discriminator.named_modules():
        instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
        if isinstance(module, nn.modules.batchnorm._NormBase) and (
            not instance or module.track_running_stats
        ):
            raise ConfigError(
                f"privacy is on, but D's layer {name} ({type(module).__name__}) takes statistics over other images: their "
                "gradients are not one image's; use a layer without them, e.g. GroupNorm"
            )
    device, own = next(discriminator.parameters()).device, torch.Generator().manual_seed(0)
    images = torch.randn(
        PROBES, dataset.channels, dataset.resolution, dataset.resolution, generator=own
    ).to(device)
    labels = torch.rand(PROBES, dataset.label_dim, generator=own).to(device)
    with torch.enable_grad():
        logits = discriminator(images.requires_grad_(True), labels)
        slopes = torch.stack(
            [torch.autograd.grad(logit, images, retain_graph=True)[0] for logit in logits]
        )
    if bool(slopes.flatten(2).abs().amax(dim=2).fill_diagonal_(0.0).any()):
        raise ConfigError(
            "privacy is on, but D's logit of an image depends on the other images of the batch (minibatch-std does that): "
            "clipping each gradient bounds nothing; set model.minibatch_std_group = 0, or use layers that keep images apart"
        )


def check_start(settings: Settings, path: Path, meta: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a warm start whose checkpoint was trained on images that are not known to be public.

    `meta`: what the checkpoint says of itself. By its `phantoms` all hospitals said that their images are drawn phantoms; the
    settings alone cannot tell, because a deployed hospital has its own data under an empty `data.root`. What that run began
    from may be private too.
    """
    if not settings.privacy.on or settings.privacy.public_start:
        return
    origin = meta.get("settings")
    if not origin:
        what = "does not say what it was trained on"
    elif meta.get("phantoms") is not True:
        root = origin.get("data", {}).get("root")
        what = (
            "was trained on images of a data.root"
            if root
            else "does not say that all its images were drawn phantoms"
        )
    elif origin.get("training", {}).get("warm_start"):
        what = "itself began from another model"
    else:
        return
    raise ConfigError(
        f"training.warm_start = {path.name} {what}: if its images are private, what they give away is counted nowhere; "
        "start from phantoms, or declare them public by privacy.public_start = true"
    )
