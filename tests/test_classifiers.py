"""Classifiers of the evaluator: shapes, gradients, sizes, seeds, errors."""

from __future__ import annotations

import pytest
import torch

from fedgan.config import CLASSIFIERS
from fedgan.errors import ConfigError
from fedgan.models.classifiers import BUILDERS, build_classifier

FEATURES = {"small-cnn": 128, "resnet18": 512, "densenet121": 1024, "efficientnet-b2": 1408}
TORCHVISION = tuple(name for name in CLASSIFIERS if name != "small-cnn")


def _build(name, channels=3, side=32, labels=4, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_classifier(name, channels, side, labels)


def _images(count, channels, side, seed=0):
    return (
        torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2
        - 1
    )


def test_every_classifier_choice_has_a_network():
    assert set(BUILDERS) == set(CLASSIFIERS) == set(FEATURES)


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize(("channels", "side"), [(1, 32), (3, 64), (1, 224)])
def test_features_and_logits_have_the_documented_shapes(name, channels, side):
    classifier = _build(name, channels, side).eval()
    images = _images(1, channels, side)
    with torch.inference_mode():
        features = classifier.features(images)
        logits = classifier(images)
        torch.testing.assert_close(logits, classifier.head(features))
    assert classifier.name == name
    assert features.shape == (1, FEATURES[name]) == (1, classifier.feature_dim)
    assert logits.shape == (1, 4)


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_gradient_reaches_every_weight(name, channels):
    classifier = _build(name, channels, 32).train()
    classifier(_images(4, channels, 32)).square().sum().backward()
    still = [
        key
        for key, weight in classifier.named_parameters()
        if weight.grad is None or not weight.grad.abs().sum() > 0
    ]
    assert not still


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_initialization_is_deterministic_by_seed(name):
    first, again, other = (_build(name, seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_training_step_draws_no_random_numbers(name):
    classifier = _build(name).train()
    before = torch.random.get_rng_state()
    first = classifier(_images(4, 3, 32))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(
        classifier(_images(4, 3, 32)), first
    )  # batch statistics, not the running ones


@pytest.mark.parametrize("name", TORCHVISION)
def test_grey_images_equal_their_repetition_in_color(name):
    classifier = _build(name).eval()
    grey = _images(2, 1, 32)
    with torch.inference_mode():
        torch.testing.assert_close(classifier(grey), classifier(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("name", TORCHVISION)
def test_small_images_have_the_map_sizes_of_64_pixels(name):
    def last_map(side):
        sizes = []
        network = _build(name, 1, side).eval()
        hooks = [
            module.register_forward_hook(
                lambda module, inputs, output: sizes.append(tuple(output.shape[2:]))
            )
            for module in network.modules()
            if isinstance(module, torch.nn.Conv2d)
        ]
        with torch.inference_mode():
            network(_images(1, 1, side))
        assert hooks
        return sizes[-1]

    assert last_map(32) == last_map(64) == (2, 2)
    assert last_map(224) == (7, 7)


@pytest.mark.parametrize("name", TORCHVISION)
def test_other_channel_numbers_raise_a_config_error(name):
    with pytest.raises(ConfigError, match=f"'{name}' takes 1 or 3 channels, not 2"):
        build_classifier(name, 2, 32, 2)


def test_unknown_classifier_error_lists_the_choices():
    with pytest.raises(
        ConfigError, match=r"no classifier called 'vit'.*densenet121, efficientnet-b2"
    ):
        build_classifier("vit", 1, 32, 2)
