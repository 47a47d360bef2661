"""Networks: recorded numbers, definitions of the fast paths, conditioning, sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedgan.config import ModelSettings
from fedgan.models.stylegan2 import layers
from fedgan.models.stylegan2.discriminator import Discriminator
from fedgan.models.stylegan2.generator import Generator, SynthesisLayer, ToRGB
from fedgan.training.losses import path_lengths, r1_penalty

SMALL = ModelSettings(z_dim=8, w_dim=8, channel_base=64, channel_max=8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(found: Tensor, recorded: np.ndarray) -> float:
    difference = np.abs(found.detach().numpy() - recorded).max()
    return float(difference / np.abs(recorded).max())


# --- recorded numbers ----------------------------------------------------------------------------


def take_parameters(network: nn.Module, vectors: dict[str, np.ndarray], prefix: str) -> None:
    """Copy the recorded parameters by module name; every trained parameter must be covered."""
    targets = dict(network.named_parameters()) | dict(network.named_buffers())
    recorded = {
        key[len(prefix) :].replace("/", "."): value
        for key, value in vectors.items()
        if key.startswith(prefix)
    }
    assert {name for name, _ in network.named_parameters()} <= recorded.keys()
    with torch.no_grad():
        for name, value in recorded.items():
            targets[name].copy_(torch.from_numpy(value).reshape(targets[name].shape))


@pytest.fixture
def recorded_generator(reference_vectors):
    model = ModelSettings(z_dim=32, w_dim=32, mapping_layers=2, channel_base=512, channel_max=32)
    generator = Generator(model, 32, 3, 3)
    take_parameters(generator, reference_vectors, "param/G/")
    return generator


@pytest.fixture
def recorded_discriminator(reference_vectors):
    discriminator = Discriminator(
        ModelSettings(channel_base=512, channel_max=32, minibatch_std_group=4), 32, 3, 3
    )
    take_parameters(discriminator, reference_vectors, "param/D/")
    return discriminator


def test_mapping_and_truncation_match_recorded_w(recorded_generator, reference_vectors):
    z, c = (torch.from_numpy(reference_vectors[key]) for key in ("in/z", "in/c"))
    assert relative_error(recorded_generator.mapping(z, c), reference_vectors["out/w"]) < 1e-4
    assert (
        relative_error(
            recorded_generator.styles(z, c, psi=0.7)[:, 0], reference_vectors["out/w_psi_0.7"]
        )
        < 1e-4
    )


@pytest.mark.parametrize("noise", ["none", "const"])
def test_synthesis_matches_recorded_images(recorded_generator, reference_vectors, noise):
    z, c = (torch.from_numpy(reference_vectors[key]) for key in ("in/z", "in/c"))
    recorded = reference_vectors[
        "out/image_no_noise" if noise == "none" else "out/image_const_noise"
    ]
    assert relative_error(recorded_generator(z, c, noise=noise), recorded) < 1e-4


def test_path_lengths_match_recorded_numbers(recorded_generator, reference_vectors):
    ws = (
        torch.from_numpy(reference_vectors["out/w"])
        .unsqueeze(1)
        .repeat(1, recorded_generator.synthesis.num_ws, 1)
    )
    ws.requires_grad_(True)
    # The recorded noise has unit variance; `path_lengths` divides it by √(H·W).
    lengths = path_lengths(
        recorded_generator.synthesis(ws, "const"),
        ws,
        torch.from_numpy(reference_vectors["in/pl_noise"]),
    )
    assert relative_error(lengths, reference_vectors["out/pl_length_per_image"]) < 1e-4


def test_discriminator_matches_recorded_logits_and_r1(recorded_discriminator, reference_vectors):
    x = torch.from_numpy(reference_vectors["in/x"]).requires_grad_(True)
    logits = recorded_discriminator(x, torch.from_numpy(reference_vectors["in/c"]))
    assert relative_error(logits, reference_vectors["out/d_logits"]) < 1e-4
    assert relative_error(r1_penalty(logits, x), reference_vectors["out/r1_per_image"]) < 1e-4


def test_resampling_matches_recorded_numbers(reference_vectors):
    x = torch.from_numpy(reference_vectors["in/fir_x"])
    assert relative_error(layers.upsample(x), reference_vectors["out/fir_up"]) < 1e-4
    half = halving(channels=x.shape[1])
    assert relative_error(half(x), reference_vectors["out/fir_down"]) < 1e-4


# --- fast paths against plain definitions --------------------------------------------------------


def halving(channels: int) -> layers.Conv:
    """An identity 1 × 1 convolution that halves the side."""
    conv = layers.Conv(channels, channels, 1, seeded(), bias=False, down=True).requires_grad_(False)
    conv.weight.copy_(torch.eye(channels)[:, :, None, None] / conv.gain)
    return conv


def plain_fir(x: Tensor, up: int, down: int) -> Tensor:
    """[1, 3, 3, 1] resampling by its definition: insert zeros, pad, sum over the taps."""
    b, c, h, w = x.shape
    wide = x.new_zeros(b, c, h * up, w * up)
    wide[:, :, ::up, ::up] = x
    before, after = (2, 1) if up == 2 else (1, 1)
    padded = F.pad(wide, (before, after, before, after))
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8 * up
    size = padded.shape[2] - 3, padded.shape[3] - 3
    out = x.new_zeros(b, c, *size)
    for i in range(4):
        for j in range(4):
            out += taps[i] * taps[j] * padded[:, :, i : i + size[0], j : j + size[1]]
    return out[:, :, ::down, ::down]


@given(side=st.integers(2, 9), channels=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_upsampling_equals_its_definition(side, channels, seed):
    x = torch.randn(2, channels, 2 * side, 2 * side, generator=seeded(seed), dtype=torch.float64)
    assert torch.allclose(layers.upsample(x), plain_fir(x, up=2, down=1), atol=1e-12)


@given(
    side=st.integers(2, 9),
    kernel=st.sampled_from([1, 3]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_down_convolution_is_blur_then_stride_2(side, kernel, bias, seed):
    """Blur at full size with the convolution's padding as margin, then the kernel at stride 2."""
    conv = (
        layers.Conv(3, 5, kernel, seeded(seed), bias=bias, down=True, input_gain=1.3)
        .double()
        .requires_grad_(False)
    )
    if bias:
        conv.bias.normal_(generator=seeded(seed + 1))
    x = torch.randn(2, 3, 2 * side, 2 * side, generator=seeded(seed + 2), dtype=torch.float64)
    margin = kernel // 2
    blurred = plain_fir(F.pad(x, (margin, margin, margin, margin)), up=1, down=1)
    plain = F.conv2d(blurred, conv.weight * 1.3 / math.sqrt(3 * kernel * kernel), conv.bias)[
        :, :, ::2, ::2
    ]
    assert conv(x).shape == (2, 5, side, side)
    assert torch.allclose(conv(x), plain, atol=1e-12)


def plain_modulated_conv(
    x: Tensor, layer: SynthesisLayer | ToRGB, style: Tensor, demodulate: bool
) -> Tensor:
    """Equations 1 to 3 of arXiv 1912.04958, per image: scale the weights, then convolve."""
    images = []
    for image, s in zip(x, style, strict=True):
        weight = layer.weight * layer.gain * s[None, :, None, None]
        if demodulate:
            weight = weight / (weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if layer.up:
            # Twice the side: insert zeros, correlate with the flipped kernel, low-pass.
            wide = image.new_zeros(
                1, image.shape[0], 2 * image.shape[1] + 3, 2 * image.shape[2] + 3
            )
            wide[0, :, 2:-2:2, 2:-2:2] = image
            raised = F.conv2d(wide, weight.flip(2, 3))
            fir = (4 * layers.fir_kernel()).to(x.dtype).expand(raised.shape[1], 1, 4, 4)
            images.append(F.conv2d(raised, fir, padding=1, groups=raised.shape[1])[0])
        else:
            images.append(F.conv2d(image[None], weight, padding=layer.kernel // 2)[0])
    return torch.stack(images)


@pytest.mark.parametrize("up", [False, True])
def test_synthesis_layer_equals_modulated_convolution(up):
    layer = SynthesisLayer(5, 6, 8, 0, 7, seeded(), up, input_gain=layers.GAIN).double()
    with torch.no_grad():
        layer.noise_strength.fill_(0.3)
        layer.bias.normal_(generator=seeded(1))
    side = 4 if up else 8
    x = torch.randn(3, 5, side, side, generator=seeded(2), dtype=torch.float64)
    w = torch.randn(3, 7, generator=seeded(3), dtype=torch.float64)
    # The layer's input lacks the activation's √2, the definition's has it.
    plain = plain_modulated_conv(x * layers.GAIN, layer, layer.affine(w), demodulate=True)
    plain = F.leaky_relu(plain + layer.noise_const * 0.3 + layer.bias[:, None, None], 0.2)
    assert torch.allclose(layer(x, w, "const", None), plain, atol=1e-6)


def test_to_rgb_modulates_without_demodulation():
    layer = ToRGB(5, 3, 1, 7, seeded()).double()
    x, w = torch.randn(2, 5, 4, 4, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    plain = plain_modulated_conv(x * layers.GAIN, layer, layer.affine(w), demodulate=False)
    assert torch.allclose(layer(x, w).double(), plain, atol=1e-5)


def test_untrained_generator_has_activations_of_unit_scale():
    """Equalised weights and demodulation keep the scale of the signal through all layers."""
    generator = Generator(ModelSettings(channel_base=1024, channel_max=64), 64, 3, 0, seeded())
    images = generator(torch.randn(16, 128, generator=seeded(1)), torch.zeros(16, 0), noise="none")
    assert 0.2 < images.std() < 5


def test_discriminator_with_two_halves_equals_two_passes():
    discriminator = Discriminator(SMALL, 16, 3, 2, seeded())
    images = torch.randn(16, 3, 16, 16, generator=seeded(1))
    c = F.one_hot(torch.arange(16) % 2, 2).float()
    together = discriminator(images, c, halves=2)
    apart = torch.cat([discriminator(images[:8], c[:8]), discriminator(images[8:], c[8:])])
    assert torch.allclose(together, apart, atol=1e-5)


def test_minibatch_std_equals_its_definition_per_half():
    x = torch.randn(16, 3, 4, 4, generator=seeded())
    out = layers.minibatch_std(x, group=4, halves=2)
    assert out.shape == (16, 4, 4, 4)
    assert torch.equal(out[:, :3], x)
    for half in range(2):
        for first in range(2):
            members = [8 * half + first + 2 * step for step in range(4)]
            expected = (x[members].var(dim=0, unbiased=False) + 1e-8).sqrt().mean()
            for member in members:
                assert torch.allclose(out[member, 3], expected.expand(4, 4), atol=1e-6)


# --- conditioning and sizes ----------------------------------------------------------------------


@pytest.mark.parametrize("label_dim", [0, 1, 5])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resolution", [16, 64])
def test_networks_support_every_size_and_kind_of_label(label_dim, channels, resolution):
    generator = Generator(SMALL, resolution, channels, label_dim, seeded())
    discriminator = Discriminator(SMALL, resolution, channels, label_dim, seeded())
    c = torch.ones(4, label_dim)  # multi-hot: all findings at once
    images = generator(torch.randn(4, 8), c, rng=seeded())
    assert images.shape == (4, channels, resolution, resolution)
    assert discriminator(images, c).shape == (4,)


def test_networks_support_the_largest_resolution():
    tiny = ModelSettings(z_dim=4, w_dim=4, channel_base=1024, channel_max=2)
    images = Generator(tiny, 1024, 1, 2, seeded())(
        torch.randn(1, 4), torch.ones(1, 2), noise="none"
    )
    assert images.shape == (1, 1, 1024, 1024)
    assert Discriminator(tiny, 1024, 1, 2, seeded())(images, torch.ones(1, 2)).shape == (1,)


def test_labels_change_images_and_logits():
    generator, discriminator = (
        Generator(SMALL, 16, 3, 3, seeded()),
        Discriminator(SMALL, 16, 3, 3, seeded()),
    )
    z = torch.randn(1, 8, generator=seeded(5))
    first, second = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 1.0, 1.0]])
    assert not torch.allclose(
        generator(z, first, noise="none"), generator(z, second, noise="none"), atol=1e-3
    )
    image = torch.randn(1, 3, 16, 16, generator=seeded(6))
    assert not torch.allclose(discriminator(image, first), discriminator(image, second), atol=1e-5)


def test_truncation_moves_w_to_w_avg():
    generator = Generator(SMALL, 16, 3, 0, seeded())
    generator.mapping.w_avg.normal_(generator=seeded(1))
    z, c = torch.randn(2, 8), torch.zeros(2, 0)
    full, none, half = (generator.styles(z, c, psi) for psi in (1.0, 0.0, 0.5))
    assert torch.allclose(none, generator.mapping.w_avg.expand_as(none))
    assert torch.allclose(half, (full + none) / 2, atol=1e-6)


def test_state_dict_has_no_constants():
    names = set(Generator(SMALL, 32, 3, 2, seeded()).state_dict()) | set(
        Discriminator(SMALL, 32, 3, 2, seeded()).state_dict()
    )
    assert not [name for name in names if name.endswith(("fir", "noise_const"))]
    assert "mapping.w_avg" in names


def test_initial_weights_have_unit_variance_over_lr_multiplier():
    """Equalised learning rate: unit variance over the multiplier (arXiv 1710.10196, 4.1)."""
    generator = Generator(ModelSettings(channel_base=2048, channel_max=64), 32, 3, 4, seeded())
    assert math.isclose(generator.mapping.fc0.weight.std().item(), 100, rel_tol=0.05)
    assert math.isclose(generator.synthesis.b32.conv1.weight.std().item(), 1, rel_tol=0.05)


def test_bfloat16_stays_close_to_float32():
    generator, discriminator = (
        Generator(SMALL, 16, 3, 2, seeded()),
        Discriminator(SMALL, 16, 3, 2, seeded()),
    )
    z, c = torch.randn(8, 8, generator=seeded(1)), torch.ones(8, 2)
    exact = generator(z, c, noise="const")
    logits = discriminator(exact, c)
    generator.dtype = discriminator.dtype = torch.bfloat16
    assert generator(z, c, noise="const").dtype == torch.float32
    assert (generator(z, c, noise="const") - exact).abs().max() < 0.1 * exact.abs().max()
    assert (discriminator(exact, c) - logits).abs().max() < 0.1 * max(
        1.0, logits.abs().max().item()
    )
