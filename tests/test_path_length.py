"""Perceptual path length against its closed form, torchmetrics, and known generators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import perceptual_path_length as theirs

from fedgan.config import ModelSettings
from fedgan.errors import FedganError
from fedgan.evaluation.metrics.path_length import _draw, perceptual_path_length, slerp
from fedgan.models.stylegan2.generator import Generator


class Toy(torch.nn.Module):
    """z → w = z (and the label), w → an image that is a function of it."""

    label_dim, resolution = 2, 4

    def __init__(self, image, z_dim=6):
        super().__init__()
        self.z_dim, self.synthesis = z_dim, _Synthesis(image)

    def mapping(self, z, c):
        return torch.cat([z, c], dim=1)


class _Synthesis(torch.nn.Module):
    num_ws = 3

    def __init__(self, image):
        super().__init__()
        self.image = image

    def forward(self, ws, noise):
        assert noise == "const"
        assert ws.shape[1] == self.num_ws
        return self.image(ws[:, 0]).view(-1, 1, 4, 4)


def _linear():
    weight = 0.02 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    return weight, Toy(lambda w: w @ weight)


LABELS = np.eye(2, dtype=np.uint8)


def flat(images):
    return images.flatten(1)


@pytest.mark.parametrize("epsilon", [1e-2, 1e-4])
def test_path_length_of_a_linear_generator_has_the_closed_form(epsilon):
    weight, generator = _linear()
    ends, _, _ = _draw(200, 6, 2, seed=3)
    step = (ends[1] - ends[0]) @ weight[:6] * 127.5
    expected = float(step.square().sum(1).mean())
    assert perceptual_path_length(generator, LABELS, flat, 200, 3, epsilon) == pytest.approx(
        expected, rel=1e-3
    )


def test_path_length_agrees_with_torchmetrics():
    weight, generator = _linear()
    ends, _, _ = _draw(64, 6, 2, seed=5)
    samples = iter(ends)

    class Theirs(torch.nn.Module):
        def sample(self, count):
            return next(samples)

        def forward(self, z):
            return (z @ weight[:6] * 127.5 + 127.5).view(-1, 1, 4, 4)

    class Distance(torch.nn.Module):
        def forward(self, a, b):  # of images in [-1, 1]
            return ((a - b) * 127.5).flatten(1).square().sum(1)

    expected, _, _ = theirs(
        Theirs(),
        64,
        epsilon=1e-2,
        lower_discard=None,
        upper_discard=None,
        sim_net=Distance(),
        interpolation_method="lerp",
    )
    assert perceptual_path_length(generator, LABELS, flat, 64, 5, 1e-2) == pytest.approx(
        float(expected), rel=1e-4
    )


@pytest.mark.parametrize("space", ["w", "z"])
def test_path_length_is_smaller_for_a_smooth_generator(space):
    weight, smooth = _linear()
    jumpy = Toy(lambda w: 0.3 * torch.sin(20 * (w @ weight)))
    assert perceptual_path_length(
        smooth, LABELS, flat, 100, 0, space=space
    ) * 3 < perceptual_path_length(jumpy, LABELS, flat, 100, 0, space=space)


def test_path_length_in_z_is_that_of_the_great_circle():
    """Images are the latent: the speed on a great circle of unit length is its angle."""
    generator = Toy(lambda w: torch.nn.functional.pad(w[:, :6] / 127.5, (0, 10)))
    ends, _, _ = _draw(50, 6, 2, seed=1)
    a, b = (x / x.norm(dim=1, keepdim=True) for x in ends)
    expected = float((a * b).sum(1).acos().square().mean())
    assert perceptual_path_length(generator, LABELS, flat, 50, 1, 1e-2, space="z") == pytest.approx(
        expected, rel=1e-2
    )


def test_slerp_starts_and_ends_at_its_arguments():
    a, b = torch.eye(3, dtype=torch.float64)[:2].split(1)
    half = torch.full((1, 1), 0.5, dtype=torch.float64)
    torch.testing.assert_close(slerp(a, 5 * b, half), (a + b) / 2**0.5)
    torch.testing.assert_close(slerp(a, b, 2 * half), b)
    torch.testing.assert_close(slerp(a, a, half), a)


def test_path_length_of_constant_or_saturated_images_is_zero():
    assert perceptual_path_length(Toy(lambda w: torch.zeros(len(w), 16)), LABELS, flat, 10, 0) == 0
    assert (
        perceptual_path_length(Toy(lambda w: 5 + 0.01 * torch.cat([w, w], 1)), LABELS, flat, 10, 0)
        == 0
    )  # all clamped


def test_path_length_keeps_one_given_label_per_path():
    seen = []
    generator = Toy(lambda w: seen.append(w[:, 6:]) or torch.zeros(len(w), 16))
    perceptual_path_length(generator, np.repeat(LABELS, [3, 1], axis=0), flat, 400, 0)
    first, second = seen[0], seen[1]
    torch.testing.assert_close(first, second)
    assert set(torch.cat(seen).unique().tolist()) == {0.0, 1.0}
    assert torch.cat(seen)[:, 0].mean() == pytest.approx(0.75, abs=0.08)


def test_path_length_of_stylegan_converges_with_the_step():
    model = ModelSettings(z_dim=16, w_dim=16, mapping_layers=2, channel_base=64, channel_max=8)
    generator = Generator(model, 16, 1, 2).train()
    lengths = [
        perceptual_path_length(generator, LABELS, flat, 32, 0, epsilon, space=space)
        for space in ("w", "z")
        for epsilon in (1e-3, 1e-4)
    ]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.05)
    assert lengths[2] == pytest.approx(lengths[3], rel=0.05)
    assert lengths[0] > 0
    assert generator.training  # mode restored


def test_path_length_refuses_unusable_arguments():
    _, generator = _linear()
    for labels in (np.zeros((3, 1)), np.zeros((0, 2)), np.zeros(2)):
        with pytest.raises(ValueError, match="do not fit"):
            perceptual_path_length(generator, labels, flat, 4, 0)
    for options in ({"space": "v"}, {"epsilon": 0.0}, {"samples": 0}):
        with pytest.raises(ValueError, match="path length needs"):
            perceptual_path_length(
                **{
                    "generator": generator,
                    "labels": LABELS,
                    "features": flat,
                    "samples": 4,
                    "seed": 0,
                }
                | options
            )
    with pytest.raises(FedganError, match="diverged"):
        perceptual_path_length(
            Toy(lambda w: torch.full((len(w), 16), torch.nan)), LABELS, flat, 4, 0
        )


def test_path_length_does_not_depend_on_the_batch():
    _, generator = _linear()
    whole = perceptual_path_length(generator, LABELS, flat, 40, 0)
    generator.resolution = 128  # four pairs at once
    assert perceptual_path_length(generator, LABELS, flat, 40, 0) == pytest.approx(whole, rel=1e-4)
