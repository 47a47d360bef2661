"""What would void the guarantee without a word: refused when privacy is on, each with its reason and what to use instead.

A guarantee holds for a mechanism, not for a number that an accountant prints. Each rule here names a part of a GAN's
training that reads private images past the clipped and noisy gradient, or that makes the accountant's assumptions false.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from fedgan.config import Settings
from fedgan.errors import ConfigError

BATCH_STATISTICS = (nn.modules.batchnorm._BatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def check_private(settings: Settings) -> None:
    """Raise `ConfigError` that lists all that voids the guarantee; nothing where privacy is off."""
    if settings.privacy.on and (found := list(refusals(settings))):
        raise ConfigError("privacy is on, but its guarantee would not hold: " + "; ".join(found))


def refusals(settings: Settings) -> Iterator[str]:
    """Each part of the settings that voids the guarantee: 'key = value: why; what instead'."""
    training, model, augment, privacy = settings.training, settings.model, settings.augment, settings.privacy
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
    if training.labels == "data" and not privacy.label_noise:
        yield (
            "training.labels = 'data': the generator's labels follow the counts of real labels; use 'uniform', or release "
            "the counts with noise: privacy.label_noise"
        )


def check_modules(discriminator: nn.Module) -> None:
    """Raise `ConfigError` when a layer of D computes statistics over the batch, which ties images to one another."""
    for name, module in discriminator.named_modules():
        if isinstance(module, BATCH_STATISTICS):
            raise ConfigError(
                f"privacy is on, but D's layer {name} ({type(module).__name__}) takes statistics over other images: their "
                "gradients are not one image's; use a layer without them, e.g. GroupNorm"
            )


def check_start(settings: Settings, path: Path, trained_on: str) -> None:
    """Raise `ConfigError` for a warm start whose checkpoint was trained on images that are not known to be public.

    `trained_on`: the `data.root` of the checkpoint's run; empty for drawn phantoms.
    """
    if settings.privacy.on and trained_on and not settings.privacy.public_start:
        raise ConfigError(
            f"training.warm_start = {path.name} was trained on images of a data.root: if they are private, what they give "
            "away is counted nowhere; start from phantoms, or declare them public by privacy.public_start = true"
        )
